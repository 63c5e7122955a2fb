"""What is missing on this machine, said up front."""

from importlib.util import find_spec

REQUIRED = (
    "fsspec",
    "numpy",
    "pandas",
    "PIL",
    "psutil",
    "pyarrow",
    "pydantic",
    "pytest",
    "pytest_timeout",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "threadpoolctl",
    "torch",
    "typer",
)
OPTIONAL = {
    "ray": "the study runs in one process",
    "pyhessian": "no comparison with PyHessian",
    "hessian_eigenthings": "no comparison with hessian-eigenthings",
    "curvlinops": "no comparison with curvlinops",
}
REMEDY = "install it, or put a folder that holds it on PYTHONPATH: docs/cluster.md, GPUs"


def lacking() -> list[str]:
    """One line for each required module that is not there."""
    return [f"{name} is missing: {REMEDY}" for name in REQUIRED if find_spec(name) is None]


def left_out() -> list[str]:
    """One line for each module that is not there and only leaves something out."""
    return [
        f"{name} is not installed: {effect}" for name, effect in OPTIONAL.items() if find_spec(name) is None
    ]
