"""The share of wall time that a study's cores spend in useful work, from the `tasks` table of `quick`.

Useful work is the training between two checkpoints, evaluation and publication included (kind `checkpoint`),
the analysis of a checkpoint (kind `curvature`), its comparison with the one before (kind `pair`), and what
follows them (kinds `trajectory`, `separations`, ...). All else is counted against it: the start of Python,
Ray and its workers, waiting, gathering, shutting down.
"""

import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import psutil

import lossray
from benchmarks.report import table, write_section

USEFUL = (
    "checkpoint",
    "curvature",
    "pair",
    "degeneracy",
    "trajectory",
    "separations",
    "surfaces",
    "connectivity",
    "ensemble",
)
CPUS = 1.0  # of every task: the default of [resources], which `quick` keeps


def main() -> None:
    """Run the study, then write the section."""
    cores = psutil.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quick"
        command = [str(Path(sys.executable).with_name("lossray")), "run", "quick", "--out", str(out)]
        begin = datetime.now(UTC)
        clock = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - clock
        tasks = lossray.open_study(str(out)).table("tasks")
    write_section(
        "utilisation",
        "Useful work of a study's cores",
        "python -m benchmarks.utilisation",
        _body(tasks, begin, seconds, cores),
    )


def _body(tasks: pd.DataFrame, begin: datetime, seconds: float, cores: int) -> str:
    """The section, from the tasks and the wall time of the command that ran them."""
    useful = tasks[tasks["kind"].isin(USEFUL)]
    first, last = useful["started"].min(), useful["finished"].max()
    span = (last - first).total_seconds()
    startup = (first - pd.Timestamp(begin)).total_seconds()
    work = CPUS * useful.groupby("kind")["wall_seconds"].sum()
    rows = [(f"{kind} tasks ({sum(useful['kind'] == kind)})", work[kind]) for kind in USEFUL if kind in work]
    rows += [
        ("start-up, before the first task", cores * startup),
        ("idle between the first task and the last", cores * span - work.sum()),
        ("gather and shutdown, after the last task", cores * (seconds - startup - span)),
    ]
    shares = [[name, f"{value:.1f}", f"{value / cores / seconds:.1%}"] for name, value in rows]
    whole, between = work.sum() / cores / seconds, work.sum() / cores / span
    return f"""`lossray run quick` took {seconds:.1f} s of wall time on {cores} cores, {span:.1f} s of it from
the start of its first task to the end of its last. Useful work took **{whole:.0%}** of the cores' time over
the whole command, and **{between:.0%}** between the first task and the last. A task counts as {CPUS:g} core
for its whole wall time.

{table(("what", "core-seconds", "share"), shares)}"""


if __name__ == "__main__":
    main()
