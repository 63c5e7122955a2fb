"""docs/benchmarks.md: one section per benchmark, each replaced by its own run."""

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from lossray.packages import installed

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
SECTIONS = (  # in the order of the document
    "packs",
    "packed_analysis",
    "curvature",
    "curves",
    "scoring",
    "script",
    "utilisation",
    "gpu_check",
)
HEADER = "# Benchmarks\n\nEach section is written by the command that it names.\n"


def write_section(name: str, title: str, command: str, body: str, *, on: str | None = None) -> str:
    """Print a section and put it into the document in place of its predecessor.

    ``on`` describes the machine; None: this one.

    Returns:
        The section.
    """
    section = f"## {title}\n\n`{command}` on {on or machine()}.\n\n{body.strip()}\n"
    print(section)
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    sections = {key: found.group(1) for key in SECTIONS if (found := _marked(key).search(text))}
    sections[name] = section
    parts = [f"<!-- {key} -->\n{sections[key]}<!-- /{key} -->\n" for key in SECTIONS if key in sections]
    DOCUMENT.write_text("\n".join([HEADER, *parts]))
    return section


def fill(document: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between <!-- name --> and <!-- /name --> by each part.

    Raises:
        ValueError: the document does not have one such place for each part.
    """
    text = document.read_text()
    places = re.findall(r"<!-- (\w+) -->", text)
    if any(places.count(name) != 1 for name in parts):
        raise ValueError(f"{document.name} has places for {', '.join(places)}; there are {', '.join(parts)}")
    for name, part in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n\n{part.strip()}\n\n{end}{after}"
    document.write_text(text)


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """The machine and the software in words, without names and paths."""
    memory = psutil.virtual_memory().total / 2**30
    software = ", ".join(f"{name} {installed(name)}" for name in ("torch", "ray"))
    return (
        f"{_processor()}, {psutil.cpu_count()} cores, {memory:.0f} GiB of memory, {_system()}, "
        f"Python {platform.python_version()}, {software}"
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:  # not Linux
        return f"{platform.system()} {platform.release()}"
