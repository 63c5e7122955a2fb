"""The workbench of the ensemble methods: a pack of base runs, and what a method may do for its budget.

A method works on all base runs of a pack at once; every run depends on its own seed alone. All costs are
counted here, in gradients of single examples of one run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.connectivity.curves import train_curves
from lossray.connectivity.paths import Path, bent
from lossray.ensembles.budget import Budget
from lossray.networks.batch_norm import has_statistics, refresh_statistics
from lossray.networks.losses import Loss
from lossray.networks.stack import Stack
from lossray.seeds import stream
from lossray.storage.checkpoints import Checkpoint
from lossray.training.batches import takes_all
from lossray.training.datasets import Dataset
from lossray.training.schedules import learning_rate
from lossray.training.settings import TrainingSettings
from lossray.training.steps import LearningRates, PackState, TrainingTask, fresh, resumed, take_step
from lossray.training.update_rules import OptimizerSettings

FORWARD = 1 / 3  # cost of a forward pass: a gradient is a forward and a backward pass, which costs two
PRODUCT = 2.0  # of a Hessian-vector product

Buffers = Mapping[str, Tensor]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class PackedWeights:
    """One set of weights for each base run.

    Attributes:
        theta: [R, d].
        buffers: name -> [R, *shape].
        alive: [R] bool; the weights of the others mean nothing.
    """

    theta: Tensor
    buffers: Buffers
    alive: Tensor

    def where(self, healthy: Tensor) -> "PackedWeights":
        """The same, with those that are not ``healthy`` [R] marked as dead."""
        return replace(self, alive=self.alive & healthy)


@dataclass(frozen=True)
class BaseRuns:
    """What the base runs have in common.

    Attributes:
        stack: the architecture.
        build: fresh initialisations by seeds: theta [R, d] and buffers.
        loss: of the study.
        dataset: of the study, in the training dtype.
        training: the [training] section.
        optimizer: that of the base runs.
        seeds: of the base runs, [R].
        checkpoint: the newest checkpoint of the base runs at or before a step.
    """

    stack: Stack
    build: Callable[[Sequence[int]], tuple[Tensor, dict[str, Tensor]]]
    loss: Loss
    dataset: Dataset
    training: TrainingSettings
    optimizer: OptimizerSettings
    seeds: tuple[int, ...]
    checkpoint: Callable[[int], Checkpoint]

    @property
    def examples(self) -> int:
        """Training examples N."""
        return len(self.dataset.train.targets)

    @property
    def batch(self) -> int:
        """Examples of one step."""
        size = self.training.batch_size
        return self.examples if takes_all(self.examples, size) else int(size)


@dataclass
class Bench:
    """What a method works with, and what it has taken so far for each base run, in gradients of examples.

    Attributes:
        base_runs: the base runs.
        budget: what the method may spend.
        bends: control points of a curve between its ends.
    """

    base_runs: BaseRuns
    budget: Budget
    bends: int = 1

    def __post_init__(self) -> None:
        """Nothing is spent yet."""
        self.spent: Array = np.zeros(len(self.base_runs.seeds))  # [R], replaced when something is paid
        self._initial_loss: Tensor | None = None  # [R], what divergence is judged by

    def pay(self, gradients: float | Array) -> None:
        """Add to what each base run has taken, [R] or the same for all."""
        self.spent = self.spent + gradients

    # ---- training

    def base(self) -> PackedWeights:
        """The base runs after those steps of their own training that the budget has for them."""
        steps = self.budget.base_steps
        base_runs, checkpoint = self.base_runs, self.base_runs.checkpoint(steps)
        task = self._task(base_runs.training, base_runs.optimizer, base_runs.seeds)
        device = base_runs.dataset.train.targets.device
        like = torch.empty(0, dtype=getattr(torch, base_runs.training.dtype), device=device)
        pack = resumed(task, like, checkpoint)
        self._initial_loss = pack.initial_loss
        self._advance(task, pack, range(checkpoint.step, steps))
        self.pay(steps * base_runs.batch)
        return _point(pack)

    def fresh_runs(self, purpose: str, number: int, steps: int) -> PackedWeights:
        """Independent runs from initialisations of their own, trained for ``steps`` under the run's schedule.

        Args:
            purpose: names the seeds; the empty string takes those of the base runs.
            number: names them too.
            steps: of training.
        """
        base_runs = self.base_runs
        seeds = self.seeds(purpose, number) if purpose else base_runs.seeds
        theta, buffers = base_runs.build(seeds)
        task = self._task(self._training(steps), base_runs.optimizer, seeds)
        pack = fresh(task, theta, buffers)
        pack.initial_loss = self.initial_loss()
        self._advance(task, pack, range(steps))
        self.pay(steps * base_runs.batch)
        return _point(pack)

    def retrain(
        self,
        start: PackedWeights,
        steps: int,
        *,
        cycle: int,
        rates: LearningRates | None = None,
    ) -> PackedWeights:
        """One cycle: the run's optimizer afresh, its learning rate falling to 0 along half a cosine.

        Args:
            start: where it begins.
            steps: how many.
            cycle: names the order of the examples, which is the same for all methods.
            rates: learning rates parameter by parameter.
        """
        (end,) = self.course(start, steps, [steps], rate=self.cosine(steps), cycle=cycle, rates=rates)
        return end

    def course(
        self,
        start: PackedWeights,
        steps: int,
        captures: Sequence[int],
        *,
        rate: Callable[[int], float],
        cycle: int = 0,
        rates: LearningRates | None = None,
    ) -> list[PackedWeights]:
        """The points after each of the steps ``captures`` of one training with a rate of its own."""
        base_runs = self.base_runs
        seeds = self.seeds("cycle", cycle)
        task = replace(
            self._task(self._training(steps), base_runs.optimizer, seeds),
            rate=rate,
            rates=rates or LearningRates(),
        )
        pack = fresh(task, start.theta, start.buffers)
        pack.initial_loss = self.initial_loss()
        pack.bury(start.alive, 0)
        points, done = [], 0
        for step in captures:
            self._advance(task, pack, range(done, step))
            points.append(_point(pack))
            done = step
        self.pay(done * base_runs.batch)
        return points

    def curve(self, a: PackedWeights, b: PackedWeights, steps: int, *, cycle: int = 0) -> Path:
        """A Bezier curve from a to b, trained for ``steps``; NaN where it diverges or an end is dead."""
        base_runs = self.base_runs
        task = replace(
            self._task(self._training(steps), base_runs.optimizer, self.seeds("curve", cycle)),
            rate=self.cosine(steps),
        )
        path = bent("bezier", a.theta, b.theta, self.bends)
        curves = train_curves(task, path, a.buffers, initial_loss=self.initial_loss())
        self.pay(steps * base_runs.batch)
        healthy = curves.alive & a.alive & b.alive
        inner = curves.path.points.masked_fill(~healthy[:, None], torch.nan)
        return replace(curves.path, points=inner)

    def on_path(self, path: Path, a: PackedWeights, b: PackedWeights, t: float) -> PackedWeights:
        """The point at t of a path from a to b, batch-norm statistics recomputed between the ends."""
        if t in (0.0, 1.0):
            end = a if t == 0 else b
            return end.where(torch.isfinite(path.at(0.5)).all(dim=1))
        theta = path.at(t)
        return self.refreshed(
            PackedWeights(theta, a.buffers, a.alive & b.alive & torch.isfinite(theta).all(dim=1))
        )

    def refreshed(self, point: PackedWeights) -> PackedWeights:
        """The same weights with batch-norm statistics of the training examples; free where there are none."""
        if not has_statistics(self.base_runs.stack.template):
            return point
        self.pay(FORWARD * self.base_runs.examples)
        inputs = self.base_runs.dataset.train.inputs
        return replace(
            point, buffers=refresh_statistics(self.base_runs.stack, point.theta, point.buffers, inputs)
        )

    def cosine(self, steps: int) -> Callable[[int], float]:
        """Half a cosine from the run's learning rate to 0."""
        settings = self.base_runs.optimizer.model_copy(update={"schedule": "cosine", "floor": 0.0})
        return lambda step: learning_rate(settings, step, steps)

    def seeds(self, purpose: str, number: int) -> tuple[int, ...]:
        """Seeds that depend on those of the base runs and a name."""
        return tuple(stream(seed, f"ensembles/{purpose}", number) for seed in self.base_runs.seeds)

    def initial_loss(self) -> Tensor:
        """The base runs' initial losses; read from their first checkpoint where no base was asked for."""
        if self._initial_loss is None:
            device = self.base_runs.dataset.train.targets.device
            self._initial_loss = self.base_runs.checkpoint(0).initial_loss.to(device)
        return self._initial_loss

    def _training(self, steps: int) -> TrainingSettings:
        """The [training] section for another number of steps."""
        return self.base_runs.training.model_copy(update={"steps": steps})

    def _task(
        self, training: TrainingSettings, optimizer: OptimizerSettings, seeds: tuple[int, ...]
    ) -> TrainingTask:
        base_runs = self.base_runs
        return TrainingTask(
            base_runs.stack, base_runs.loss, base_runs.dataset, training, optimizer, "", seeds
        )

    def _advance(self, task: TrainingTask, pack: PackState, steps: range) -> None:
        for step in steps:
            if not pack.anyone:
                return
            take_step(task, pack, step)


def _point(pack: PackState) -> PackedWeights:
    """A copy of where a pack stands."""
    buffers = {name: tensor.clone() for name, tensor in pack.buffers.items()}
    return PackedWeights(pack.theta.clone(), buffers, pack.alive.clone())
