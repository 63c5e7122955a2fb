"""Modules of a user's, written into a folder of a test."""

from pathlib import Path


def write(folder: Path, **sources: str) -> None:
    """Files by dotted module name, with ``__`` for the dot: ``pkg__init`` is pkg/__init__.py."""
    for name, source in sources.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        if path.stem == "init":
            path = path.with_name("__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
