"""The empirical geometry of neural-network loss surfaces.

The names below are loaded when first used: `import lossray` loads neither torch nor ray.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossray.connectivity.align import align
    from lossray.connectivity.connect import connect
    from lossray.measures.angles import angles
    from lossray.measures.directional_curvature import directional_curvature
    from lossray.measures.sharpness import sharpness
    from lossray.measures.surface import surface
    from lossray.measures.trajectory import trajectory
    from lossray.networks.balance import balance
    from lossray.networks.rescale import rescale
    from lossray.nullity.degeneracy import degeneracy
    from lossray.nullity.structural_floor import structural_floor
    from lossray.operators.matrices import (
        EmpiricalFisher,
        GaussNewton,
        Hessian,
        Preconditioned,
        Restricted,
        Scaled,
    )
    from lossray.results import open_study
    from lossray.spectra.analyse import analyse
    from lossray.spectra.eigenpairs import eigenpairs
    from lossray.spectra.spectral_density import spectral_density
    from lossray.spectra.trace import trace
    from lossray.training.record import record

__version__ = "0.2.0"

_HOMES = {
    "EmpiricalFisher": "lossray.operators.matrices",
    "GaussNewton": "lossray.operators.matrices",
    "Hessian": "lossray.operators.matrices",
    "Preconditioned": "lossray.operators.matrices",
    "Restricted": "lossray.operators.matrices",
    "Scaled": "lossray.operators.matrices",
    "align": "lossray.connectivity.align",
    "analyse": "lossray.spectra.analyse",
    "angles": "lossray.measures.angles",
    "balance": "lossray.networks.balance",
    "connect": "lossray.connectivity.connect",
    "degeneracy": "lossray.nullity.degeneracy",
    "eigenpairs": "lossray.spectra.eigenpairs",
    "directional_curvature": "lossray.measures.directional_curvature",
    "open_study": "lossray.results",
    "record": "lossray.training.record",
    "rescale": "lossray.networks.rescale",
    "sharpness": "lossray.measures.sharpness",
    "spectral_density": "lossray.spectra.spectral_density",
    "structural_floor": "lossray.nullity.structural_floor",
    "surface": "lossray.measures.surface",
    "trace": "lossray.spectra.trace",
    "trajectory": "lossray.measures.trajectory",
}

__all__ = [
    "EmpiricalFisher",
    "GaussNewton",
    "Hessian",
    "Preconditioned",
    "Restricted",
    "Scaled",
    "__version__",
    "align",
    "analyse",
    "angles",
    "balance",
    "connect",
    "degeneracy",
    "directional_curvature",
    "eigenpairs",
    "main",
    "open_study",
    "record",
    "rescale",
    "sharpness",
    "spectral_density",
    "structural_floor",
    "surface",
    "trace",
    "trajectory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lossray' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def main() -> None:
    """The command ``lossray``.

    The user's folder may hold a ``flows.py`` or a ``tasks.py``, and stands before the installation on the
    path under ``ray job submit``: the import order is settled before the command line is loaded.
    """
    from lossray.imports import settle_imports

    settle_imports([os.getcwd()])
    importlib.import_module("flows.cli").run_command()
