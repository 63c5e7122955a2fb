"""Seconds per run-step of packs against one plain PyTorch loop per seed, in one process on one thread.

Both do the same work: the same initial weights and minibatches, the loss logged every ten steps, and one
evaluation of the three splits at the end. Repeats of the two alternate, so that a disturbance hits both; the
speed-up is the median over neighbouring pairs. That both train to the same losses is checked, not assumed.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.devices import wait_for
from benchmarks.report import table, write_section
from lossray.networks.executor import choose_executor
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.seeds import generator, stream
from lossray.training.data_settings import DataSettings
from lossray.training.datasets import Dataset, load_dataset
from lossray.training.loop import train
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import OptimizerSettings, optimizer_settings

MEMBERS = (1, 4, 16, 64)
STEPS = {"mlp": 300, "cnn": 60}
OPTIMIZERS = {"sgd": {"name": "sgd", "lr": 0.1}, "adam": {"name": "adam", "lr": 1e-3}}
BATCH = 64
REPEATS = 3
AGREEMENT = 1e-2  # relative difference of a logged loss; float32 rounding grows along a trajectory


@dataclass(frozen=True)
class Timing:
    """One timed training."""

    seconds: float  # per run-step
    losses: Tensor  # of the first member, at the logged steps


def main() -> None:
    """Measure everything and write the section."""
    torch.set_num_threads(1)
    dataset = load_dataset(DataSettings(source="digits"), dtype=torch.float32)
    rows, worst = [], 0.0
    for model in STEPS:
        for optimizer in OPTIMIZERS:
            for members in MEMBERS:
                row, difference = _compare(model, optimizer, members, dataset)
                rows.append(row)
                worst = max(worst, difference)
                print(" | ".join(row), flush=True)
    header = ("model", "optimizer", "pack", "executor", "pack, µs", "plain loop, µs", "speed-up")
    body = f"{_text(worst)}\n\n{table(header, rows)}"
    write_section("packs", "Packs against plain loops", "python -m benchmarks.packs", body)


def _text(worst: float) -> str:
    steps = " and ".join(f"{count} steps of the {model}" for model, count in STEPS.items())
    return f"""Training on digits with minibatches of {BATCH} on one thread; the default mlp (64-64) and cnn.
The plain loop is what one would write for one seed: `nn.Module`, `torch.optim`, minibatches by index. Both
log their losses and evaluate at the end. Microseconds of wall time per run and step: median (smallest to
largest) of {REPEATS} repeats of {steps}, pack and plain loop in turn; the
speed-up is the median over the pairs. A pack of one is evaluated without vmap. The losses that the two log
differ by at most {worst:.0e} (relative)."""


def _compare(model: str, optimizer: str, members: int, dataset: Dataset) -> tuple[list[str], float]:
    """The row of one comparison, and the largest relative difference between the losses."""
    build = partial(build_model, model_settings({"name": model}), dataset.input_shape, dataset.n_outputs)
    settings, steps = optimizer_settings(OPTIMIZERS[optimizer]), STEPS[model]
    examples = (dataset.train.inputs[:4], dataset.train.targets[:4])
    executor = choose_executor(build, *examples, F.cross_entropy, device="cpu")
    packs, plains = [], []
    for _ in range(REPEATS):
        packs.append(time_pack(build, settings, dataset, steps, members, executor))
        plains.append(time_loop(build, settings, dataset, steps, seed=0))
    difference = ((packs[0].losses - plains[0].losses).abs() / plains[0].losses).max().item()
    if not difference < AGREEMENT:
        raise SystemExit(f"{model} {optimizer}: the losses of pack and plain loop differ by {difference:.1e}")
    speedup = statistics.median(
        plain.seconds / pack.seconds for pack, plain in zip(packs, plains, strict=True)
    )
    row = [model, optimizer, str(members), executor, _spread(packs), _spread(plains), f"{speedup:.2f}"]
    return row, difference


def _spread(timings: list[Timing]) -> str:
    micros = sorted(1e6 * timing.seconds for timing in timings)
    return f"{statistics.median(micros):.0f} ({micros[0]:.0f} to {micros[-1]:.0f})"


def time_pack(
    build: Callable[[], nn.Module],
    optimizer: OptimizerSettings,
    dataset: Dataset,
    steps: int,
    members: int,
    executor: str,
) -> Timing:
    """The members with seeds 0 to `members` - 1 as one pack, as a study trains them, where the data are."""
    seeds, device = tuple(range(members)), dataset.train.targets.device
    stack, theta, buffers = build_stack(build, seeds, executor=executor, dtype=torch.float32, device=device)
    training = TrainingSettings.model_validate(
        {"steps": steps, "batch_size": BATCH, "checkpoints": {"steps": []}}
    )
    checkpoints = train(stack, theta, buffers, optimizer, training, dataset, pack_id="pack", seeds=seeds)
    next(checkpoints)  # step 0: set up and evaluated
    wait_for(device)
    clock = time.perf_counter()
    (last,) = checkpoints
    wait_for(device)
    seconds = time.perf_counter() - clock
    return Timing(seconds / steps / members, last.log["train_loss"][:-1, 0].cpu())  # the last row is no step


def time_loop(
    build: Callable[[], nn.Module], settings: OptimizerSettings, dataset: Dataset, steps: int, *, seed: int
) -> Timing:
    """One seed, as one would write it without lossray."""
    device = dataset.train.targets.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "initialisation"))
        model = build().to(device)
    rule = torch.optim.SGD if settings.name == "sgd" else torch.optim.Adam
    optimizer = rule(model.parameters(), lr=settings.lr)
    inputs, targets = dataset.train.inputs, dataset.train.targets
    batches = len(inputs) // BATCH
    losses = []
    wait_for(device)
    clock = time.perf_counter()
    for step in range(steps):
        epoch, batch = divmod(step, batches)
        if batch == 0:
            order = torch.randperm(len(inputs), generator=generator(seed, "order", epoch)).to(device)
        indices = order[batch * BATCH : (batch + 1) * BATCH]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[indices]), targets[indices])
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        for split in (dataset.train, dataset.validation, dataset.test):
            outputs = model(split.inputs)
            F.cross_entropy(outputs, split.targets).item()
            (outputs.argmax(dim=1) == split.targets).float().mean().item()
    wait_for(device)
    seconds = time.perf_counter() - clock
    return Timing(seconds / steps, torch.tensor(losses, dtype=torch.float64))


if __name__ == "__main__":
    main()
