"""The analysis of a whole pack at once against its members in turn."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu_check.recorder import Recorder, Row
from benchmarks.packed_analysis import HEADER, MODELS, compare, make_pack
from lossray.training.data_settings import DataSettings
from lossray.training.datasets import load_dataset

CASES = (("mlp", 8), ("cnn", 8), ("mlp", 32))
SMALL_CASES = (("mlp", 2),)
EXAMPLES, SMALL_EXAMPLES = 1000, 20
TITLE = "Packed analysis against one member at a time"
TEXT = """As in the section on packed analysis; one repeat after one that warms up. The peak is that of the
device's memory while the members are analysed, at once or in turn. That both find the same eigenvalues is
checked."""


def measure(record: Recorder) -> None:
    """One pack after another."""
    cases, examples = (SMALL_CASES, SMALL_EXAMPLES) if record.small else (CASES, EXAMPLES)
    record.each(cases, partial(_compare, examples=examples, device=record.device))


def _compare(case: tuple[str, int], *, examples: int, device: torch.device) -> Iterator[Row]:
    model, members = case
    dataset = load_dataset(DataSettings(source="digits"), dtype=torch.float32)
    pack = make_pack(MODELS[model], members, examples, dataset, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    row = dict(zip(HEADER, [model, *compare(pack, repeats=1)], strict=True))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else ""
    yield row | {"peak, GiB": peak}
