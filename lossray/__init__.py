"""The empirical geometry of neural-network loss surfaces.

The names below are loaded when first used: `import lossray` loads neither torch nor ray.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossray.connectivity.alignment import align
    from lossray.connectivity.connect import connect
    from lossray.curvature.floor import structural_floor
    from lossray.curvature.matrices import (
        EmpiricalFisher,
        GaussNewton,
        Hessian,
        Preconditioned,
        Restricted,
        Scaled,
    )
    from lossray.curvature.nullity import degeneracy
    from lossray.curvature.single import analyse, eigenpairs, spectral_density, trace
    from lossray.networks.rescaling import balance, rescale
    from lossray.results import open_study
    from lossray.training.record import record

__version__ = "0.2.0"

_HOMES = {
    "EmpiricalFisher": "lossray.curvature.matrices",
    "GaussNewton": "lossray.curvature.matrices",
    "Hessian": "lossray.curvature.matrices",
    "Preconditioned": "lossray.curvature.matrices",
    "Restricted": "lossray.curvature.matrices",
    "Scaled": "lossray.curvature.matrices",
    "align": "lossray.connectivity.alignment",
    "analyse": "lossray.curvature.single",
    "balance": "lossray.networks.rescaling",
    "connect": "lossray.connectivity.connect",
    "degeneracy": "lossray.curvature.nullity",
    "eigenpairs": "lossray.curvature.single",
    "open_study": "lossray.results",
    "record": "lossray.training.record",
    "rescale": "lossray.networks.rescaling",
    "spectral_density": "lossray.curvature.single",
    "structural_floor": "lossray.curvature.floor",
    "trace": "lossray.curvature.single",
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
    "balance",
    "connect",
    "degeneracy",
    "eigenpairs",
    "main",
    "open_study",
    "record",
    "rescale",
    "spectral_density",
    "structural_floor",
    "trace",
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
