"""The study `quick` without the analyses that follow the spectra: what its benchmarks are about."""

from importlib import resources
from pathlib import Path

FIRST = "\n[degeneracy]\n"  # of the sections that are left out


def without_further_analyses(folder: str | Path) -> Path:
    """Write it into ``folder``; the path of the study file."""
    text = resources.files("flows.studies").joinpath("quick.toml").read_text()
    path = Path(folder) / "quick.toml"
    path.write_text(text.partition(FIRST)[0] + "\n")
    return path
