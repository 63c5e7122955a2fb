"""The share of wall time that a study's cores spend in useful work, from the `tasks` tables of two studies.

The one is `quick`; the other is made of analyses of about a second each, where what lies between tasks weighs
most.

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


# Two packs of two runs, of which every checkpoint is analysed in about a second on one core.
SECONDS = """name = "seconds"
seeds = 2
[data]
source = "digits"
[[models]]
name = "mlp"
widths = [32, 32]
[[optimizers]]
name = "sgd"
lr = 0.1
[[optimizers]]
name = "momentum"
lr = 0.02
[training]
steps = 1000
batch_size = 64
checkpoints = {count = 50, spacing = "linear"}
[curvature]
top = 6
vectors = false
[angles]
gauges = ["raw"]
directions = ["gradient", "update"]
window = 0
"""


def main() -> None:
    """Run the studies, then write the section."""
    cores = psutil.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        seconds = Path(folder) / "seconds.toml"
        seconds.write_text(SECONDS)
        bodies = [
            _body(name, *_run(study, Path(folder) / name), cores)
            for name, study in (("quick", "quick"), ("seconds", str(seconds)))
        ]
    write_section(
        "utilisation",
        "Useful work of a study's cores",
        "python -m benchmarks.utilisation",
        "\n\n".join([*bodies, "A task counts as 1 core for its whole wall time."]),
    )


def _run(study: str, out: Path) -> tuple[pd.DataFrame, datetime, float]:
    """Run a study as a user does: its tasks, when the command began, and its wall time."""
    command = [str(Path(sys.executable).with_name("lossray")), "run", study, "--out", str(out)]
    begin = datetime.now(UTC)
    clock = time.perf_counter()
    subprocess.run(command, check=True)
    return lossray.open_study(str(out)).table("tasks"), begin, time.perf_counter() - clock


def _body(name: str, tasks: pd.DataFrame, begin: datetime, seconds: float, cores: int) -> str:
    """What is said of one study, from its tasks and the wall time of the command that ran them."""
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
    shares = [[what, f"{value:.1f}", f"{value / cores / seconds:.1%}"] for what, value in rows]
    whole, between = work.sum() / cores / seconds, work.sum() / cores / span
    median = useful.loc[useful["kind"] == "curvature", "wall_seconds"].median()
    return f"""**{name}**, whose analyses take {median:.1f} s in the median, took {seconds:.1f} s of wall time
on {cores} cores, {span:.1f} s of it from the start of its first task to the end of its last. Useful work took
**{whole:.0%}** of the cores' time over the whole command, and **{between:.0%}** between the first task and
the last.

{table(("what", "core-seconds", "share"), shares)}"""


if __name__ == "__main__":
    main()
