"""Running out of the device's memory, in earnest: a study goes on with less, to the same numbers."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import flows
import lossray
from benchmarks.gpu_check.recorder import Recorder, Row

STUDY = """
name = "memory"

[data]
source = "digits"

[[models]]
name = "mlp"

[[optimizers]]
name = "sgd"
lr = 0.1

[training]
steps = 1

[curvature]
top = 10
examples = 256
"""
SEEDS, WIDTHS = 32, [128, 128]  # the Krylov basis of one pack takes a gigabyte
SMALL_SEEDS, SMALL_WIDTHS = 2, [8]
ALLOWED = 2**29  # bytes that lossray may have of the device
AGREEMENT = 5e-3  # of the largest eigenvalues, which are known to 1e-3
TITLE = "Out of memory"
TEXT = f"""A pack of {SEEDS} seeds whose analysis needs more than the {ALLOWED / 2**30:g} GiB that it is left:
"capped" by the allocator, which then fails in the middle of the work, and "filled", where all other memory of
the device is taken, which lossray sees beforehand. "held" is the first line of that in the table `tasks`;
"difference" is the largest of the eigenvalues against the same study with all memory, relative (at most
{AGREEMENT:g}). A dry run has all memory each time."""


def measure(record: Recorder) -> None:
    """The study with all memory first."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        out = Path(folder) / "all"
        _run(out, small=record.small)
        expected = _largest(out)
        record.each(("capped", "filled"), partial(_study, out=out, expected=expected, record=record))


def _study(way: str, *, out: Path, expected: pd.Series, record: Recorder) -> Iterator[Row]:
    clock = time.perf_counter()
    with {"capped": _capped, "filled": _filled}[way](record.device):
        _run(out.with_name(way), small=record.small)
    reduced = lossray.open_study(out.with_name(way)).table("tasks")["reduced"].dropna()
    difference = float((_largest(out.with_name(way)) / expected - 1).abs().max())
    yield {
        "memory": way,
        "seconds": time.perf_counter() - clock,
        "tasks with less": len(reduced),
        "held": reduced.iloc[0] if len(reduced) else "",
        "difference": difference,
    }
    if record.device.type == "cuda" and not len(reduced):
        raise SystemExit("the memory did not run out, so that nothing was shown")
    if not difference < AGREEMENT:
        raise SystemExit(f"the eigenvalues differ by {difference:.1e}")


@contextmanager
def _capped(device: torch.device) -> Iterator[None]:
    """Torch's allocator fails beyond what is allowed; what the driver says of free memory stays."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(ALLOWED / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def _filled(device: torch.device) -> Iterator[None]:
    """All other memory is taken."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    filling = torch.empty(free - ALLOWED, dtype=torch.uint8, device=device)
    yield
    del filling
    torch.cuda.empty_cache()


def _run(out: Path, *, small: bool) -> None:
    """The study in this process.

    Raises:
        SystemExit: a task failed.
    """
    path = out.with_suffix(".toml")
    path.write_text(STUDY)
    seeds, widths = (SMALL_SEEDS, SMALL_WIDTHS) if small else (SEEDS, WIDTHS)
    overrides = [f"seeds={seeds}", f"resources.pack={seeds}", f"models.0.widths={widths}"]
    if code := flows.run(path, out, overrides=overrides, in_process=True):
        raise SystemExit(f"the study ended with {code}")


def _largest(out: Path) -> pd.Series:
    """The largest eigenvalue at every checkpoint of every run."""
    return lossray.open_study(out).table("curvature").set_index(["run_id", "step"])["lambda_max"].sort_index()
