"""A path of low loss between two modules of the user's: what `lossray.connect` is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lossray.connectivity.barriers import above_chord
from lossray.connectivity.curves import points_along, train_curves
from lossray.connectivity.examples import Indexed, IndexedExamples, joined
from lossray.connectivity.jumps import differing, jumps
from lossray.connectivity.paths import CURVES, KINDS, Kind, Path, bent, geometric, straight
from lossray.errors import ModelError, StudyError
from lossray.names import unknown_name
from lossray.networks.as_found import copied
from lossray.networks.batch_norm import has_statistics
from lossray.networks.layout import require_module, uncompiled
from lossray.networks.losses import Loss, in_dtype_of_outputs
from lossray.networks.stack import Members, Stack, stack_models
from lossray.operators.example_mean import require_example_mean
from lossray.operators.finite import require_finite_loss
from lossray.operators.modules import ModuleObjective
from lossray.training.batches import takes_all
from lossray.training.datasets import Dataset, Split
from lossray.training.settings import TrainingSettings
from lossray.training.steps import TrainingTask
from lossray.training.update_rules import OptimizerSettings, optimizer_settings

POINTS = 25  # of a path, where its barrier is looked for
STARTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a path before training, whose highest loss is that of a start
SAME_LOSS = 1e-4  # relative difference of one model's loss in two ways
NEEDED = "both must be of one architecture"


@dataclass(frozen=True, repr=False)
class Connection:
    """A path between two models; it prints as one line.

    Attributes:
        path: of R = 1 member; coordinates in the order of the trainable ``model.parameters()``.
    """

    path: Path
    _ends: tuple[nn.Module, nn.Module] = field(repr=False)
    _stack: Stack = field(repr=False)
    _buffers: tuple[Members, Members] = field(repr=False)  # of the ends, [1, *shape]
    _examples: IndexedExamples = field(repr=False)
    _loss: Loss = field(repr=False)  # of outputs and the numbers of examples

    def __repr__(self) -> str:
        dim = self.path.points.shape[-1]
        return f"a {self.path.kind} between two models of {dim:,} parameters: .at(t), .evaluate(), .barrier"

    def at(self, t: float) -> nn.Module:
        """The model at t, in eval mode: a new one each time.

        At t = 0 and t = 1 they are copies of the ends. Between them batch norm has the statistics that the
        data have there; other buffers are those of the end at t = 0.

        Raises:
            StudyError: t is not between 0 and 1.
        """
        if not 0 <= t <= 1:
            raise StudyError(f"connect, t: found {t}; allowed: 0 to 1")
        model = copied(self._ends[1 if t == 1 else 0]).eval()
        if t in (0, 1):
            return model
        theta, buffers = next(self._points([t]))
        tensors = self._stack.layout.split(theta) | buffers
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(tensors[f"model.{name}"][0])
        return model

    def evaluate(self, points: int = POINTS) -> pd.DataFrame:
        """The loss along the path, over all of the data in eval mode.

        Args:
            points: how many, evenly spaced in t from end to end.

        Returns:
            Columns t, loss (the mean over the examples), arc_length (from t = 0), and recomputed: the loss
            with recomputed batch-norm statistics at the ends too, of which the barrier is taken.

        Raises:
            StudyError: fewer than two points.
        """
        if points < 2:
            raise StudyError(f"connect, points: found {points}; allowed: 2 or more")
        ts = [i / (points - 1) for i in range(points)]
        lengths = self.path.lengths(ts)[0]
        losses = self.losses(ts)
        frame = {"t": ts, "loss": losses.tolist(), "arc_length": lengths.tolist()}
        return pd.DataFrame(frame | {"recomputed": self._treated_alike(ts, losses).tolist()})

    def losses(self, ts: Sequence[float]) -> Tensor:
        """The loss at T places, [T] float64: at t = 0 and t = 1 that of the models as they are."""
        return self._losses(ts, alike=False)

    @cached_property
    def barrier(self) -> float:
        """The largest loss above the chord of the ends' losses (2110.06296), at 25 points.

        Batch norm has the statistics of the data at all of them: ends with others of their own would be
        compared with what lies between by another measure.
        """
        ts = torch.linspace(0, 1, POINTS, dtype=torch.float64, device="cpu")
        return above_chord(ts, self._treated_alike(ts.tolist(), self.losses(ts.tolist())))

    def _treated_alike(self, ts: Sequence[float], losses: Tensor) -> Tensor:
        """Losses at ts from end to end, those of the ends with recomputed batch-norm statistics."""
        if not has_statistics(self._stack.template):
            return losses
        ends = self._losses([0.0, 1.0], alike=True)
        return torch.cat([ends[:1], losses[1:-1], ends[1:]])

    def _losses(self, ts: Sequence[float], *, alike: bool) -> Tensor:
        with torch.no_grad():
            points = self._points(ts, alike=alike)
            return torch.cat([self._means(theta, buffers) for theta, buffers in points]).cpu()

    def _points(
        self, ts: Sequence[float], *, alike: bool = False
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        indices = self._examples.indices
        return points_along(self.path, self._stack, *self._buffers, indices, ts, alike=alike)

    def _means(self, theta: Tensor, buffers: Members) -> Tensor:
        """Mean losses [R] float64 over all examples, by the user's batches."""
        means = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
        for chunk in self._examples.chunks():
            share = len(chunk) / len(self._examples.indices)
            means += share * self._stack.losses(theta, buffers, chunk, chunk, self._loss).double()
        return means


def connect(
    model_a: nn.Module,
    model_b: nn.Module,
    loss: Loss,
    data: Any,
    kind: Kind = "bezier",
    *,
    bends: int = 1,
    steps: int = 1000,
    lr: float = 3e-3,
    batch_size: int | Literal["full"] = 128,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Connection:
    """A path from one model to another, along which the loss is low if it is trained.

    A curve (Garipov et al., 1802.10026) starts as the straight line, and its bends are trained on minibatches
    at random places of the curve, in train mode; the learning rate falls to 0 by half a cosine.

    Args:
        model_a: the end at t = 0. Any module; both models are left as they are.
        model_b: the end at t = 1, of the same architecture.
        loss: ``loss(outputs, targets)``, the mean over examples.
        data: a batch (inputs, targets) or (inputs, targets, weights), or a list of batches, as
            `lossray.Hessian` takes them. Held on the models' device.
        kind: "bezier", or "polychain", of straight pieces; "line" and "geometric" (between a model and its
            rescaled copy, see `lossray.rescale`) are not trained.
        bends: control points between the ends of a curve.
        steps: optimizer steps.
        lr: the learning rate at the start.
        batch_size: examples per step, or "full".
        optimizer: by name, as in a study file.
        weight_decay: of the bends.
        seed: of minibatches, places and dropout.

    Raises:
        ModelError: models of different architectures, or with buffers other than batch norm's that differ and
            matter; a model or loss that cannot be used, a geometric path between ends whose signs differ, or
            a training that diverges.
        DataError: data that cannot be used.
        StudyError: an impossible argument.

    Example:
        Two minima of the loss (b max(0, a) - 1)^2 are (2, 1/2) and (1/2, 2). The line between them climbs to
        (25 / 16 - 1)^2. The path along which the unit is rescaled stays at zero; training comes close to it.

        >>> import lossray, torch
        >>> from torch.nn.functional import mse_loss
        >>> a, b = (torch.nn.Linear(1, 1, bias=False) for _ in "ab")
        >>> _ = torch.nn.init.ones_(a.weight), torch.nn.init.ones_(b.weight)
        >>> model, data = torch.nn.Sequential(a, torch.nn.ReLU(), b), (torch.ones(1, 1), torch.ones(1, 1))
        >>> ends = lossray.rescale(model, {"0": 2.0}), lossray.rescale(model, {"0": 0.5})
        >>> [round(lossray.connect(*ends, mse_loss, data, kind).barrier, 4) for kind in ("line", "geometric")]
        [0.3164, 0.0]
        >>> lossray.connect(*ends, mse_loss, data, "bezier", steps=300, lr=0.03).barrier < 0.01
        True
    """
    if kind not in KINDS:
        raise StudyError(f"connect, kind: {unknown_name(str(kind), KINDS)}")
    plan = _plan(steps, batch_size, optimizer, lr, weight_decay)
    if not callable(loss):
        raise ModelError(
            f"connect, loss: found {type(loss).__name__}; allowed: a function of outputs, targets"
        )
    _require_same_architecture(model_a, model_b)
    ends = (copied(uncompiled(model_a)), copied(uncompiled(model_b)))
    objectives = [ModuleObjective(end, loss, data) for end in ends]
    _loss_of(objectives[0])
    start = _start(ends, objectives[0], loss, kind, bends)
    _require_same_function(start, objectives[1])
    _require_no_jump(start)
    if kind not in CURVES:
        return start
    if not (objectives[0].coupled or takes_all(len(start._examples.indices), batch_size)):
        require_example_mean(objectives[0], purpose="a mean over minibatches", anywhere=True)
    return replace(start, path=_trained(start, *plan, seed))


def _plan(
    steps: int, batch_size: int | str, optimizer: str, lr: float, weight_decay: float
) -> tuple[TrainingSettings, OptimizerSettings]:
    """The arguments as settings, which check them."""
    decay = {"weight_decay": weight_decay} if weight_decay else {}  # not every optimizer takes it
    rule = {"name": optimizer, "lr": lr, "schedule": "cosine", **decay}
    try:
        training = TrainingSettings.model_validate({"steps": steps, "batch_size": batch_size})
        return training, optimizer_settings(rule)
    except ValidationError as error:
        first = error.errors()[0]
        key = "optimizer" if first["loc"] == ("name",) else ".".join(map(str, first["loc"]))
        raise StudyError(f"connect, {key}: {first['msg']}") from None


def _start(
    ends: tuple[nn.Module, nn.Module], objective: ModuleObjective, loss: Loss, kind: Kind, bends: int
) -> Connection:
    """The path before any training."""
    examples = joined(objective.batches())
    copies = [Indexed(copied(end).to(objective.device), examples) for end in ends]
    stack, theta, buffers = stack_models(
        copies, executor="loop", dtype=objective.dtype, device=objective.device
    )
    a, b = theta.split(1)
    sides = (
        {n: tensor[:1] for n, tensor in buffers.items()},
        {n: tensor[1:] for n, tensor in buffers.items()},
    )
    straights = {"line": straight, "geometric": geometric}
    path = straights[kind](a, b) if kind in straights else bent(kind, a, b, bends)
    return Connection(path, ends, stack, sides, examples, examples.loss(in_dtype_of_outputs(loss)))


def _trained(start: Connection, training: TrainingSettings, optimizer: OptimizerSettings, seed: int) -> Path:
    """The path with its bends trained on the numbers of the examples."""
    everything = Split(start._examples.indices, start._examples.indices)
    nothing = Split(start._examples.indices[:0], start._examples.indices[:0])
    dataset = Dataset(everything, nothing, nothing, n_outputs=0, fingerprint="", input_shape=())
    task = TrainingTask(start._stack, start._loss, dataset, training, optimizer, "connect", (seed,))
    # The ends may have a loss of almost nothing; the middle of the line is what training starts from.
    highest = start.losses(STARTS).nan_to_num(nan=torch.inf).max()
    initial_loss = highest[None].to(start._examples.device)
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "connect: inside torch.inference_mode() no curve can be trained; use torch.no_grad()"
        )
    with torch.enable_grad():
        curves = train_curves(task, start.path, start._buffers[0], initial_loss=initial_loss)
    if not bool(curves.alive):
        raise ModelError(f"connect: the training of the curve diverged at lr = {optimizer.lr:g}; pass less")
    return curves.path


# ---- are the two models of one architecture?


def _require_same_architecture(model_a: nn.Module, model_b: nn.Module) -> None:
    for model in (model_a, model_b):
        require_module(model)
    a, b = uncompiled(model_a), uncompiled(model_b)
    for (name_a, shape_a), (name_b, shape_b) in zip(_shapes(a), _shapes(b), strict=False):
        if name_a != name_b:
            raise ModelError(f"connect: model_a has {name_a} where model_b has {name_b}; {NEEDED}")
        if shape_a != shape_b:
            raise ModelError(f"connect: {name_a} is {shape_a} in model_a and {shape_b} in model_b; {NEEDED}")
    sides = {"model_a": _shapes(a), "model_b": _shapes(b)}
    (less, few), (more, many) = sorted(sides.items(), key=lambda side: len(side[1]))
    if len(few) < len(many):
        raise ModelError(f"connect: {more} has {many[len(few)][0]} and {less} has not; {NEEDED}")
    for side, model in (("model_a", a), ("model_b", b)):
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ModelError(f"connect: parameter {name!r} of {side} has values that are not finite")
    frozen = {name: parameter for name, parameter in b.named_parameters() if not parameter.requires_grad}
    for name, parameter in a.named_parameters():
        if name in frozen and not torch.equal(parameter.cpu(), frozen[name].cpu()):
            raise ModelError(
                f"connect: the frozen parameter {name!r} differs between the models, and a path moves those "
                "alone that are trainable: let it require a gradient, or make it the same"
            )


def _shapes(model: nn.Module) -> list[tuple[str, str]]:
    """What has to be the same in both: parameters, then buffers, by name."""
    parameters = [
        (f"parameter {name!r}", f"{list(parameter.shape)}{'' if parameter.requires_grad else ' (frozen)'}")
        for name, parameter in model.named_parameters()
    ]
    return parameters + [
        (f"buffer {name!r}", f"{list(buffer.shape)}") for name, buffer in model.named_buffers()
    ]


def _require_same_function(start: Connection, objective: ModuleObjective) -> None:
    """Refuse a model_b that computes something else with its weights than model_a's architecture would."""
    loss_b = _loss_of(objective)
    loss_in_a = float(start.losses([1.0]))
    alike = abs(loss_in_a - loss_b) <= SAME_LOSS * max(abs(loss_b), abs(loss_in_a))
    if alike or _same_outputs(start, objective):
        return
    raise ModelError(
        f"connect: model_b has a loss of {loss_b:.6g}, and its weights in model_a's architecture one of "
        f"{loss_in_a:.6g}; {NEEDED}"
    )


def _loss_of(objective: ModuleObjective) -> float:
    """The loss over all examples, finite.

    Raises:
        DataError: it is not, in some example.
    """
    with torch.no_grad():
        batches = objective.batches()
        loss = sum(batch.share * float(objective.losses(objective.theta, batch)) for batch in batches)
        require_finite_loss(objective, torch.tensor(loss, device="cpu"))
    return loss


def _same_outputs(start: Connection, objective: ModuleObjective) -> bool:
    """Whether both have the same outputs, up to rounding: all that a loss of 0 consists of."""
    theta, buffers = next(start._points([1.0]))
    with torch.no_grad():
        for batch, chunk in zip(objective.batches(), start._examples.chunks(), strict=True):
            try:
                outputs_b = objective.outputs(objective.theta, batch)
            except ModelError:  # no single tensor
                return False
            outputs_in_a = start._stack.outputs(theta, buffers, chunk)
            if not bool((outputs_in_a - outputs_b).abs().amax() <= SAME_LOSS * outputs_b.abs().amax()):
                return False
    return True


def _require_no_jump(start: Connection) -> None:
    """Refuse ends whose buffers, other than batch norm's, differ so that the loss would jump at t = 1."""
    stack, (side_a, side_b) = start._stack, start._buffers
    with torch.no_grad():
        jump = jumps(stack, start.path.points[-1], side_a, side_b, start._examples.indices, start._means)
    if bool(jump.any()):
        names = [repr(name.removeprefix("model.")) for name in differing(stack, side_a, side_b)]
        raise ModelError(
            f"connect: the buffers {', '.join(names)} differ between the models, and a path moves weights "
            "alone: with those of model_a all along, the loss would jump at t = 1; let both models have the "
            "same, or make them parameters"
        )
