"""Training curves between models as one pack against one after the other, in one process on one thread.

Both train the same curves: the same ends, minibatches and places on the curve, by the same code, so that the
ratio is what packing alone gives. Repeats of the two alternate, so that a disturbance hits both; the speed-up
is the median over neighbouring pairs. That both end at the same bends is checked, not assumed.
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import table, write_section
from lossray.connectivity.curves import train_curves
from lossray.connectivity.paths import bent
from lossray.networks.executor import choose_executor
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.training.data_settings import DataSettings
from lossray.training.datasets import Dataset, load_dataset
from lossray.training.loop import train
from lossray.training.settings import TrainingSettings
from lossray.training.steps import TrainingTask
from lossray.training.update_rules import optimizer_settings

CURVES = 8
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "widths": [64, 64]},
    "cnn": {"name": "cnn", "channels": [4], "kernel": 3, "widths": [16]},
}
RULES = {"momentum": {"name": "momentum", "lr": 0.02}, "adam": {"name": "adam", "lr": 1e-3}}
STEPS = 200
ENDS = 100  # steps of training behind each end
BATCH = 64
REPEATS = 5
AGREEMENT = 1e-2  # of the trained bends, over what training moved them; float32 rounding grows along the way


@dataclass(frozen=True)
class Problem:
    """Curves to be trained."""

    task: TrainingTask
    ends: tuple[Tensor, Tensor]  # [CURVES, d] each


def main() -> None:
    """Measure everything and write the section; with the argument "trial", print a short run alone."""
    trial = sys.argv[1:] == ["trial"]
    steps, repeats = (20, 2) if trial else (STEPS, REPEATS)
    torch.set_num_threads(1)
    dataset = load_dataset(DataSettings(source="digits"), dtype=torch.float32)
    rows, worst = [], 0.0
    for model in MODELS:
        for rule in RULES:
            row, difference = _compare(_problem(model, rule, dataset, steps), (model, rule), repeats)
            rows.append(row)
            worst = max(worst, difference)
            print(" | ".join(row), flush=True)
    header = ("model", "optimizer", "executor", "a pack of 8, µs", "one by one, µs", "speed-up")
    if not trial:
        body = f"{_text(worst)}\n\n{table(header, rows)}"
        write_section("curves", "Curves between models", "python -m benchmarks.curves", body)


def _text(worst: float) -> str:
    return f"""{CURVES} Bezier curves of one bend on digits, minibatches of {BATCH}, one thread: mlp (64-64)
and cnn (4 channels, kernel 3, 16 units). The ends are runs of {ENDS} steps from different seeds. Microseconds
of wall time per curve and step: median (smallest to largest) of {REPEATS} repeats of {STEPS} steps, pack and
one by one in turn; the speed-up is the median over the pairs. One by one is the same code on packs of one.
The trained bends differ by at most {worst:.0e} of the distance that training moved them."""


def _problem(model: str, rule: str, dataset: Dataset, steps: int) -> Problem:
    build = partial(build_model, model_settings(MODELS[model]), dataset.input_shape, dataset.n_outputs)
    examples = (dataset.train.inputs[:4], dataset.train.targets[:4])
    executor = choose_executor(build, *examples, F.cross_entropy, device="cpu")
    seeds = tuple(range(2 * CURVES))
    stack, theta, buffers = build_stack(build, seeds, executor=executor, dtype=torch.float32)
    training = TrainingSettings(steps=ENDS, batch_size=BATCH)
    optimizer = optimizer_settings(RULES[rule])
    *_, last = train(stack, theta, buffers, optimizer, training, dataset, pack_id="ends", seeds=seeds)
    a, b = stack.layout.join(last.parameters).chunk(2)
    short = TrainingSettings(steps=steps, batch_size=BATCH)
    task = TrainingTask(stack, F.cross_entropy, dataset, short, optimizer, "curves", seeds[:CURVES])
    return Problem(task, (a, b))


def _compare(problem: Problem, name: tuple[str, str], repeats: int) -> tuple[list[str], float]:
    """The row of one comparison, and the largest difference of the bends."""
    everyone, alone = slice(0, CURVES), [slice(i, i + 1) for i in range(CURVES)]
    _timed(problem, [alone[0]]), _timed(problem, [everyone])  # what is set up once
    packs, singles = [], []
    for _ in range(repeats):
        packs.append(_timed(problem, [everyone]))
        singles.append(_timed(problem, alone))
    start = bent("bezier", *problem.ends, 1).bends[0]
    moved = (packs[0][1] - start).norm(dim=1)
    difference = ((packs[0][1] - singles[0][1]).norm(dim=1) / moved).max().item()
    if not difference < AGREEMENT:
        raise SystemExit(f"{' '.join(name)}: the bends of the pack and one by one differ by {difference:.1e}")
    speedup = statistics.median(single[0] / pack[0] for pack, single in zip(packs, singles, strict=True))
    spreads = [_spread([seconds for seconds, _ in timings]) for timings in (packs, singles)]
    return [*name, problem.task.stack.executor, *spreads, f"{speedup:.2f}"], difference


def _timed(problem: Problem, packs: list[slice]) -> tuple[float, Tensor]:
    """Seconds per curve and step of training these packs in turn, and the trained bends, [curves, d]."""
    bends = []
    clock = time.perf_counter()
    for members in packs:
        task = replace(problem.task, seeds=problem.task.seeds[members])
        start = bent("bezier", *(end[members] for end in problem.ends), 1)
        limit = torch.full((len(task.seeds),), 10.0, dtype=torch.float64)
        curves = train_curves(task, start, {}, initial_loss=limit)
        if not bool(curves.alive.all()):
            raise SystemExit("a curve has diverged")
        bends.append(curves.path.bends[0])
    seconds = time.perf_counter() - clock
    rows = torch.cat(bends)
    return seconds / len(rows) / problem.task.training.steps, rows


def _spread(seconds: list[float]) -> str:
    micros = sorted(1e6 * value for value in seconds)
    return f"{statistics.median(micros):.0f} ({micros[0]:.0f} to {micros[-1]:.0f})"


if __name__ == "__main__":
    main()
