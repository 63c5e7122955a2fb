"""The peers, each called as its documentation recommends."""

import importlib

from benchmarks.sides import Side

DISTRIBUTIONS = {  # by module of this package
    "pyhessian": "PyHessian",
    "hessian_eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops-for-pytorch",
}


def sides(module: str) -> tuple[Side, ...]:
    """The engines of one peer.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module(f"benchmarks.peers.{module}").SIDES
