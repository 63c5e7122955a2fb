"""Analysis of a pack against its members one at a time: R models at once, or each in turn.

The members of both are the same trained models with the same seeds, so that the eigenvalues must agree. On a
machine with a GPU larger packs of larger models are measured there too, with the peak of its memory.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import table, write_section
from lossray.networks.executor import choose_executor
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import Stack, build_stack
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.spectra.analysis import packed_analysis
from lossray.training.data_settings import DataSettings
from lossray.training.datasets import Dataset, load_dataset
from lossray.training.loop import train
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import optimizer_settings

TINY_MLP = {"name": "mlp", "widths": [32]}  # d = 2,410
MODELS = {"mlp": {"name": "mlp"}, "cnn": {"name": "cnn"}, "resnet-20": {"name": "resnet", "depth": 20}}
EXAMPLES = (64, 256, 1000)
MEMBERS = 16
GPU_MEMBERS = (1, 4, 16, 64, 256)
GPU_EXAMPLES = 1000
TOP = 10
TOLERANCE = 1e-3
PROBES, LANCZOS_STEPS = 4, 64  # of the density
STEPS = 200  # of training, so that the spectra have outliers
REPEATS = 5
GPU_REPEATS = 3
AGREEMENT = 5e-3  # of the eigenvalues, over the largest: each is known to the tolerance
HEADER = ("model", "members", "examples", "executor", "at once, s", "one at a time, s", "speed-up")


@dataclass(frozen=True)
class Pack:
    """Trained members of one architecture, and the examples that define their losses."""

    stack: Stack
    theta: Tensor  # [R, d]
    buffers: dict[str, Tensor]  # [R, *shape]
    inputs: Tensor
    targets: Tensor
    executor: str

    @property
    def members(self) -> int:
        """How many."""
        return len(self.theta)

    def member(self, r: int) -> "Pack":
        """One member as a pack of its own."""
        buffers = {name: buffer[r : r + 1] for name, buffer in self.buffers.items()}
        return Pack(self.stack, self.theta[r : r + 1], buffers, self.inputs, self.targets, self.executor)


def main() -> None:
    """Measure what this machine can, and write the section."""
    torch.set_num_threads(1)
    dataset = load_dataset(DataSettings(source="digits"), dtype=torch.float32)
    rows = []
    for examples in EXAMPLES:
        pack = make_pack(TINY_MLP, MEMBERS, examples, dataset, torch.device("cpu"))
        rows.append(["tiny mlp", *compare(pack, REPEATS)])
        print(" | ".join(rows[-1]), flush=True)
    body = f"{_text()}\n\n{table(HEADER, rows)}"
    if torch.cuda.is_available():
        body += f"\n\n{_gpu_section(dataset)}"
    write_section(
        "packed_analysis",
        "Packed analysis against one member at a time",
        "python -m benchmarks.packed_analysis",
        body,
    )


def _text() -> str:
    return f"""The whole analysis ({TOP} leading eigenpairs to a residual of {TOLERANCE:g} times the largest
eigenvalue, the smallest, the trace, the density from {PROBES} probes) of the members of a pack: all at once,
and in turn as packs of one. The tiny mlp has one hidden layer of 32
(2,410 parameters); digits, one thread, after {STEPS} steps of Adam. Set-up is included. Seconds for all
members are the median (smallest to largest) of {REPEATS} repeats, both in turn; the speed-up is the median
over the pairs. That both find the same eigenvalues is checked."""


def _gpu_section(dataset: Dataset) -> str:
    device = torch.device("cuda")
    rows = []
    for name, model in MODELS.items():
        for members in GPU_MEMBERS:
            pack = make_pack(model, members, GPU_EXAMPLES, dataset, device)
            torch.cuda.reset_peak_memory_stats()
            _analyse(pack, range(members))
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append([name, *compare(pack, GPU_REPEATS), f"{peak:.2f}"])
            print(" | ".join(rows[-1]), flush=True)
    return f"""On {torch.cuda.get_device_name()} with {GPU_EXAMPLES:,} examples ({GPU_REPEATS} repeats):

{table((*HEADER, "peak memory at once, GiB"), rows)}"""


def make_pack(
    model: dict[str, object], members: int, examples: int, dataset: Dataset, device: torch.device
) -> Pack:
    """Train the members as a study does, under the executor that it would choose."""
    build = partial(build_model, model_settings(model), dataset.input_shape, dataset.n_outputs)
    first = (dataset.train.inputs[:4], dataset.train.targets[:4])
    executor = choose_executor(build, *first, F.cross_entropy, device=device.type)
    seeds = tuple(range(members))
    stack, theta, buffers = build_stack(build, seeds, executor=executor, dtype=torch.float32, device=device)
    optimizer = optimizer_settings({"name": "adam", "lr": 1e-3})
    training = TrainingSettings.model_validate(
        {"steps": STEPS, "batch_size": 64, "checkpoints": {"steps": []}}
    )
    *_, last = train(stack, theta, buffers, optimizer, training, dataset, pack_id="pack", seeds=seeds)
    parameters = {name: tensor.to(device) for name, tensor in last.parameters.items()}
    return Pack(
        stack=stack,
        theta=stack.layout.join(parameters),
        buffers={name: tensor.to(device) for name, tensor in last.buffers.items()},
        inputs=dataset.train.inputs[:examples].to(device),
        targets=dataset.train.targets[:examples].to(device),
        executor=executor,
    )


def compare(pack: Pack, repeats: int) -> list[str]:
    """Members, examples, executor, both times and the speed-up.

    Raises:
        SystemExit: the two find different eigenvalues.
    """
    at_once, in_turn = [], []
    for repeat in range(repeats + 1):  # the first warms up
        whole, packed = _timed(lambda: _analyse(pack, range(pack.members)))
        loop, single = _timed(lambda: torch.cat([_analyse(pack.member(r), [r]) for r in range(pack.members)]))
        if repeat:
            at_once.append(whole)
            in_turn.append(loop)
    difference = float(((packed - single).abs().amax(1) / single[:, 0]).max())
    if not difference < AGREEMENT:
        raise SystemExit(f"the eigenvalues of pack and loop differ by {difference:.1e}")
    speedup = statistics.median(loop / whole for whole, loop in zip(at_once, in_turn, strict=True))
    counts = [str(pack.members), f"{len(pack.targets):,}", pack.executor]
    return [*counts, _spread(at_once), _spread(in_turn), f"{speedup:.2f}"]


def _analyse(pack: Pack, seeds: Sequence[int]) -> Tensor:
    """Leading eigenvalues [R, TOP]."""
    batch = (pack.inputs, pack.targets)
    operator = PackedHessian(
        PackedObjective(pack.stack, pack.theta, pack.buffers, F.cross_entropy, [batch]), mode="retained"
    )
    found = packed_analysis(
        operator, top=TOP, tolerance=TOLERANCE, probes=PROBES, steps=LANCZOS_STEPS, seeds=list(seeds)
    )
    return found.pairs.values


def _timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    clock = time.perf_counter()
    result = function().cpu()  # waits for the device
    return time.perf_counter() - clock, result


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
