"""Packs of seeds against one plain PyTorch loop per seed."""

from collections.abc import Iterator
from functools import lru_cache, partial
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.devices import full_precision
from benchmarks.gpu_check.recorder import Recorder, Row
from benchmarks.packs import AGREEMENT, BATCH, time_loop, time_pack
from lossray.networks.executor import choose_executor
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.training.data_settings import DataSettings
from lossray.training.datasets import Dataset, load_dataset, on_device
from lossray.training.update_rules import optimizer_settings

MODELS = {"mlp": {"name": "mlp"}, "cnn": {"name": "cnn"}, "resnet-8": {"name": "resnet", "depth": 8}}
STEPS = {"mlp": 100, "cnn": 60, "resnet-8": 30}
MEMBERS = (1, 4, 16, 64, 256)
REPEATS = 3
SMALL_STEPS, SMALL_MEMBERS, SMALL_REPEATS = 5, (1, 4), 1
TITLE = "Packs of seeds against plain loops"
TEXT = f"""As in the section on packs, on this device: digits, minibatches of {BATCH}, Adam, full float32
(no TF32) for both. Time per run and step, median (smallest to largest) of repeats in turn, after one of each
that is not counted; the speed-up is the median over the pairs. The losses that both log differ by the last
column (relative, at most {AGREEMENT:g})."""


def measure(record: Recorder) -> None:
    """Small packs of all models first."""
    members = SMALL_MEMBERS if record.small else MEMBERS
    cases = [(model, size) for size in members for model in MODELS]
    with full_precision():
        record.each(cases, partial(_compare, device=record.device, small=record.small))


def _compare(case: tuple[str, int], *, device: torch.device, small: bool) -> Iterator[Row]:
    model, members = case
    dataset = _dataset(device)
    build = partial(build_model, model_settings(MODELS[model]), dataset.input_shape, dataset.n_outputs)
    settings = optimizer_settings({"name": "adam", "lr": 1e-3})
    steps, repeats = (SMALL_STEPS, SMALL_REPEATS) if small else (STEPS[model], REPEATS)
    few = (dataset.train.inputs[:4].cpu(), dataset.train.targets[:4].cpu())
    executor = choose_executor(build, *few, F.cross_entropy, device=device)
    packs, loops = [], []
    for _ in range(repeats + 1):  # the first warms up
        packs.append(time_pack(build, settings, dataset, steps, members, executor))
        loops.append(time_loop(build, settings, dataset, steps, seed=0))
    difference = float(((packs[0].losses - loops[0].losses).abs() / loops[0].losses).max())
    speedups = [loop.seconds / pack.seconds for pack, loop in zip(packs[1:], loops[1:], strict=True)]
    yield {
        "model": model,
        "pack": members,
        "executor": executor,
        "pack, µs": [1e6 * pack.seconds for pack in packs[1:]],
        "plain loop, µs": [1e6 * loop.seconds for loop in loops[1:]],
        "speed-up": median(speedups),
        "difference": difference,
    }
    if not difference < AGREEMENT:
        raise SystemExit(f"the losses of pack and plain loop differ by {difference:.1e}")


@lru_cache
def _dataset(device: torch.device) -> Dataset:
    return on_device(load_dataset(DataSettings(source="digits"), dtype=torch.float32), device)
