"""The `quick` study against the script that one would write without lossray (benchmarks/plain_study.py).

Both are started as a process, both use all cores, and both end with everything on disk. That they see the
same spectra is checked at the checkpoints where their weights agree: the same initial weights and minibatches
keep them together until rounding parts them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil

import lossray
from benchmarks.quick import without_further_analyses
from benchmarks.report import table, write_section

AS_THE_SCRIPT = (  # more than `quick` has
    "training.steps=2000",
    'training.checkpoints={count = 8, spacing = "log"}',
    "curvature.top=10",
)
SPECTRA_ONLY = ("angles.directions=[]", "angles.window=0")  # what comes nearest to the script's work
REPEATS = {3: 2, 16: 1}  # by the number of seeds; `quick` has 3, and a pack holds 16
SAME_WEIGHTS = 1e-4  # relative difference of the training losses at a checkpoint
SAME_SPECTRUM = 1e-2  # median relative difference of lambda_max; PyHessian's own error is some 5e-3


@dataclass(frozen=True)
class Agreement:
    """How far the two are apart at the checkpoints where their weights agree."""

    checkpoints: int
    median: float  # relative difference of lambda_max
    worst: float


@dataclass(frozen=True)
class Timings:
    """All, with so many seeds."""

    seeds: int
    whole: list[float]
    spectra: list[float]
    theirs: list[float]
    agreement: Agreement

    def rows(self) -> list[list[str]]:
        """Of `quick` and of its spectra alone: seeds, times, and the ratio (the median over the pairs)."""
        rows = []
        for name, ours in (("all of `quick`", self.whole), ("its spectra", self.spectra)):
            ratio = statistics.median(plain / own for own, plain in zip(ours, self.theirs, strict=True))
            rows.append([str(self.seeds), name, _spread(ours), _spread(self.theirs), f"{ratio:.2f}"])
        return rows


def main() -> None:
    """Run both in turn, then write the section."""
    timings = [_measure(seeds, repeats) for seeds, repeats in REPEATS.items()]
    write_section("script", "A study against a script", "python -m benchmarks.script", _body(timings))


def _measure(seeds: int, repeats: int) -> Timings:
    """Both in turn.

    Raises:
        SystemExit: the two do not see the same spectra.
    """
    plain_command = [sys.executable, "-m", "benchmarks.plain_study"]
    whole, spectra, theirs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        study = str(without_further_analyses(folder))
        lossray_command = [str(Path(sys.executable).with_name("lossray")), "run", study]
        settings = (f"seeds={seeds}", *AS_THE_SCRIPT)
        lossray_command += [part for setting in settings for part in ("--set", setting)] + ["--out"]
        for repeat in range(repeats):
            out, rows = Path(folder) / f"quick{repeat}", Path(folder) / f"plain{repeat}.json"
            whole.append(_seconds([*lossray_command, str(out)]))
            lean = [part for setting in SPECTRA_ONLY for part in ("--set", setting)]
            spectra.append(_seconds([*lossray_command, f"{out}-spectra", *lean]))
            theirs.append(_seconds([*plain_command, str(rows), str(seeds)]))
            print(f"{seeds} seeds: {whole[-1]:.1f} s, {spectra[-1]:.1f} s, {theirs[-1]:.1f} s", flush=True)
        agreement = compare(_study_rows(out), pd.DataFrame(json.loads(rows.read_text())))
    if not agreement.median < SAME_SPECTRUM:
        raise SystemExit(f"lambda_max differs by {agreement.median:.1e} where the weights agree")
    return Timings(seeds, whole, spectra, theirs, agreement)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def _seconds(command: Sequence[str]) -> float:
    clock = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - clock


def _study_rows(out: Path) -> pd.DataFrame:
    """One row per run and checkpoint: optimizer, seed, step, train_loss, lambda_max."""
    study = lossray.open_study(out)
    runs = study.table("runs")[["run_id", "optimizer", "seed"]]
    curvature = study.table("curvature")
    curvature = curvature[(curvature["operator"] == "hessian") & (curvature["block"] == "all")]
    curvature = curvature[["run_id", "step", "lambda_max"]]
    losses = study.table("checkpoints")[["run_id", "step", "train_loss"]]
    return runs.merge(losses, on="run_id").merge(curvature, on=["run_id", "step"])


def compare(ours: pd.DataFrame, theirs: pd.DataFrame) -> Agreement:
    """Compare lambda_max at the checkpoints where the training losses agree.

    Raises:
        SystemExit: the two have not done the same work.
    """
    key = ["optimizer", "seed", "step"]
    both = ours.merge(theirs, on=key, suffixes=("", "_plain"))
    if not len(both) == len(ours) == len(theirs):
        raise SystemExit(
            f"the study has {len(ours)} checkpoints, the script {len(theirs)}, {len(both)} shared"
        )
    difference = (both["train_loss"] - both["train_loss_plain"]).abs()
    both = both[difference <= SAME_WEIGHTS * both["train_loss"]]
    largest = both["eigenvalues"].map(max)
    relative = (largest - both["lambda_max"]).abs() / both["lambda_max"]
    return Agreement(len(both), float(relative.median()), float(relative.max()))


def _body(timings: Sequence[Timings]) -> str:
    agreement = timings[0].agreement
    repeats = " and ".join(f"{count} with {seeds} seeds" for seeds, count in REPEATS.items())
    rows = table(
        ("seeds", "study", "`lossray run`, s", "the script, s", "ratio"),
        [row for each in timings for row in each.rows()],
    )
    return f"""The study `quick` with {", ".join(AS_THE_SCRIPT)}, without the
sections from [degeneracy] on, against a script for the same runs and checkpoints: a loop over optimizers and
seeds with `torch.optim`, PyHessian's ten leading eigenvalues, trace and density (4 x 64) at each checkpoint
on the same examples, and one process for each of {psutil.cpu_count()} cores by `multiprocessing`.
All from the start of the process to its end; seconds are the median (smallest to largest) of the runs in
turn: {repeats}. "Its spectra" leaves out directions, angles and replays
(`{" ".join(f"--set {setting}" for setting in SPECTRA_ONLY)}`), which the script has not.

{rows}

At {agreement.checkpoints} checkpoints of {timings[0].seeds} seeds the weights of the two agree (training
losses within {SAME_WEIGHTS:g}); there the largest eigenvalues differ by {agreement.median:.1e} in the median
and {agreement.worst:.1e} at most
(relative). PyHessian stops when a value changes little, and mixes the two ends of the spectrum where both are
of one size, as early in training. The script writes eigenvalues, traces and densities; the study also
certifies and confirms every pair, finds the smallest eigenvalue, compares neighbouring checkpoints, and
measures four kinds of sharpness. All of `quick` finds 20 pairs in each of four gauges, with the directions
and angles in them, and replays 50 steps from each checkpoint. The start of Ray and its workers, idle cores
and the gathering cost a large part of its time (the section on useful work says how much): a script has
little of it."""


if __name__ == "__main__":
    main()
