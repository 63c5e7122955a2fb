"""All parts one after another, the section, and a summary; the exit code says whether all passed."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import psutil
import torch

from benchmarks.gpu_check import document
from benchmarks.gpu_check.parts import MARGIN, PARTS
from benchmarks.gpu_check.processes import run_limited
from benchmarks.gpu_check.recorder import RESULTS, Recorder, append, read
from benchmarks.gpu_check.requirements import left_out

SECTION, LOG = "section.md", "log.txt"
LAST_LINES = 15  # of the log of a part that failed


def run_all(device: str, folder: Path, names: Sequence[str]) -> int:
    """Run the parts; 0 where all passed."""
    if device == "cuda" and not torch.cuda.is_available():
        _say(f"torch {torch.__version__} sees no GPU here; `make gpu-check DEVICE=cpu` is a dry run")
        return 2
    for line in left_out():
        _say(line)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).unlink(missing_ok=True)
    append(folder / RESULTS, device=device, parts=list(names), not_installed=left_out())
    with (folder / LOG).open("wb") as log:
        for name in names:
            _run_part(name, device, folder, log)
    return _conclude(folder)


def measure(name: str, device: str, folder: Path) -> int:
    """One part, in this process; its time counts from the start of the process."""
    left = PARTS[name].limit(device) - MARGIN - (time.time() - psutil.Process().create_time())
    record = Recorder(folder, name, torch.device("cuda:0" if device == "cuda" else "cpu"), left)
    if record.small:
        torch.set_num_threads(1)
    PARTS[name].module.measure(record)
    return int(record.failed)


def write(folder: Path) -> int:
    """Put results from another machine into the document."""
    records = read(folder)
    if document.is_dry(records):
        _say(f"{folder} holds a dry run, which says nothing of a GPU")
        return 2
    document.write(records)
    return 0


def _run_part(name: str, device: str, folder: Path, log: BinaryIO) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--measure", name, "--device", device]
    before, clock = log.tell(), time.monotonic()
    end = run_limited([*command, "--out", str(folder)], PARTS[name].limit(device), log)
    seconds = time.monotonic() - clock
    append(folder / RESULTS, part=name, end=end, seconds=seconds)
    _say(f"{name} {end} after {seconds:.0f} s")
    if end != "passed":
        lines = (folder / LOG).read_bytes()[before:].decode(errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-LAST_LINES:]), flush=True)


def _conclude(folder: Path) -> int:
    """Write the section: from a GPU into the document, and beside the results in any case."""
    records = read(folder)
    if document.is_dry(records):
        section = document.dry_section(records)
        print(section)
    else:
        section = document.write(records)
    (folder / SECTION).write_text(section)
    failed = document.failed(records)
    print(document.summary(records))
    _say(f"{'failed: ' + ', '.join(failed) if failed else 'all passed'}; results in {folder}")
    return int(bool(failed))


def _say(text: str) -> None:
    print(f"gpu-check: {text}", flush=True)
