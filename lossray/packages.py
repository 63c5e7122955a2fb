"""The installed versions of lossray and of the packages that its numbers depend on."""

import functools
from importlib.metadata import PackageNotFoundError, version

OF_NUMBERS = ("lossray", "torch")  # another version of these may compute other numbers


@functools.cache
def installed(package: str) -> str:
    """The version of a package, "not installed" where it has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def running() -> dict[str, str]:
    """The versions that numbers are computed with now, by package."""
    return {name: installed(name) for name in OF_NUMBERS}
