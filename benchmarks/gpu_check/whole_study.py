"""A whole study with every section on the device, and its first spectra against those of the CPU."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch

import lossray
from benchmarks.gpu_check.recorder import Recorder, Row

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import lossray; lossray.main()", "run"]
STUDY = """
name = "small"
seeds = 2

[data]
source = "digits"

[[models]]
name = "mlp"
widths = [16]

[[models]]
name = "cnn"
channels = [4]
widths = [16]

[[optimizers]]
name = "adam"
lr = 3e-3

[training]
steps = 40
checkpoints = {steps = [0, 40]}

[curvature]
top = 4
examples = 128
"""
FURTHER = """
[degeneracy]

[trajectory]

[surfaces]
points = 5

[connectivity]
steps = 20

[ensembles]
methods = ["rescale_retrain"]
budgets = [2]
"""
ONLY_STEP_0 = ["--set", "training.steps=1", "--set", "training.checkpoints.steps=[0]"]
SHARE = 0.25  # of the GPU, for each actor and task
AGREEMENT = 5e-3  # of the largest eigenvalue at step 0, which is known to 1e-3
TITLE = "A whole study"
TEXT = f"""`lossray run` of an mlp and a cnn with every section; benchmarks/gpu_check/whole_study.py holds it.
With Ray, training actors and analysis tasks share the GPU, {SHARE:g} of it each; without, `--in-process`.
"difference" is the largest between the study's largest eigenvalues at step 0 and those of the same study on
the CPU, relative (at most {AGREEMENT:g})."""


def measure(record: Recorder) -> None:
    """With Ray where it is installed; without it in any case."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        on_cpu = Path(folder) / "cpu"
        _run(STUDY, on_cpu, ["--in-process", *ONLY_STEP_0], {"CUDA_VISIBLE_DEVICES": ""})
        expected = _first_values(on_cpu)
        ways = ("on Ray", "in this process") if find_spec("ray") else ("in this process",)
        record.each(ways, partial(_study, folder=Path(folder), expected=expected, device=record.device))


def _study(way: str, *, folder: Path, expected: pd.Series, device: torch.device) -> Iterator[Row]:
    out = folder / way.replace(" ", "-")
    clock = time.perf_counter()
    _run(STUDY + FURTHER, out, _options(way, device), {})
    seconds = time.perf_counter() - clock
    study = lossray.open_study(out)
    tasks = study.table("tasks")
    there = tasks["device"] == (torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    difference = float((_first_values(out) / expected - 1).abs().max())
    yield {
        "how": way,
        "seconds": seconds,
        "tasks": len(tasks),
        "tasks on the device": int(there.sum()),
        "largest memory in use, MB": float(tasks.loc[there, "peak_bytes"].max()) / 1e6,
        "difference": difference,
    }
    elsewhere = sorted(set(tasks.loc[~there, "kind"]) - {"gather"})
    if elsewhere:
        raise SystemExit(f"not on the device: {', '.join(elsewhere)}")
    if not difference < AGREEMENT:
        raise SystemExit(f"the first eigenvalues differ from the CPU's by {difference:.1e}")


def _options(way: str, device: torch.device) -> list[str]:
    if way == "in this process":
        return ["--in-process"]
    if device.type == "cpu":
        return []
    return [word for kind in ("train", "curvature") for word in ("--set", f"resources.{kind}.gpus={SHARE:g}")]


def _run(study: str, out: Path, options: list[str], environment: dict[str, str]) -> None:
    """A study as a process of its own, from the source tree.

    Raises:
        SystemExit: it did not come to its end, or a task failed.
    """
    path = out.with_suffix(".toml")
    path.write_text(study)
    folders = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [*COMMAND, str(path), "--out", str(out), *options]
    code = subprocess.run(command, env=os.environ | environment | {"PYTHONPATH": folders}).returncode
    if code:
        raise SystemExit(f"lossray run {' '.join(options)} ended with {code}")


def _first_values(out: Path) -> pd.Series:
    """The largest eigenvalue of every run at step 0, by model and seed."""
    study = lossray.open_study(out)
    rows = study.table("curvature")
    rows = rows[(rows["step"] == 0) & (rows["operator"] == "hessian") & (rows["block"] == "all")]
    rows = rows.merge(study.table("runs")[["run_id", "model", "seed"]], on="run_id")
    return rows.set_index(["model", "seed"])["lambda_max"].sort_index()
