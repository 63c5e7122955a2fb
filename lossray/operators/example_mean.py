"""Whether a loss is a mean over examples: only then may a batch be split, and several make one mean.

A sum is none, nor a loss that is divided by class weights or by the number of counted targets, nor one that
holds the examples of a batch against each other, nor any loss of a model that mixes them. Two things are
compared, whole against the mean over unequal parts of distinct examples, in float64 where that works: the
loss of the model's outputs, over many examples with every value that targets have; and the loss of the model,
over a few. Each time the value, the gradient and the product of the Hessian with a random vector: values
alone are blind where all examples lose the same, or nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.errors import DataError, ModelError, ResourceError
from lossray.memory import is_out_of_memory
from lossray.operators.exact_products import exact_products
from lossray.operators.finite import require_finite_batches
from lossray.operators.graph_memory import held_bytes
from lossray.operators.mean_remedy import remedy, whole
from lossray.operators.objectives import Batch, Objective
from lossray.operators.representative import representative, representatives
from lossray.seeds import generator

LOSS_EXAMPLES = 512  # for the loss of outputs
MODEL_EXAMPLES = 24  # for the model
AT_ONCE = 256  # examples of a forward pass
GRAPH_BYTES = 2**28  # of the model's graph over the few examples, about
GRAPH_OF_FORWARD = 8  # bytes of a twice differentiated graph in float64, in those that a forward pass keeps
MOST_SHAPES = 4  # sets of examples of one shape that are tried
SAME = {torch.float64: 1e-5, torch.float32: 1e-3}  # relative difference that counts as rounding
NOTHING = 1e-12  # gradient and curvature, over the loss, that say nothing


@dataclass(frozen=True)
class Difference:
    """How far whole and parts are apart.

    Attributes:
        size: relative; inf where a part is not finite.
        informative: False where gradient and curvature vanish, and any loss would pass.
        dtype: in which they were compared.
    """

    size: float
    informative: bool
    dtype: torch.dtype

    @property
    def same(self) -> bool:
        """Whether it is rounding."""
        return self.size <= SAME.get(self.dtype, SAME[torch.float32])


def is_example_mean(objective: Objective) -> bool:
    """Whether batches may be split: False where the loss is no mean over examples, and where that is open."""
    try:
        results = differences(objective)
    except Exception as error:  # a user's loss or model may fail on a part in any way, and then is not split
        if is_out_of_memory(error):
            raise
        return False
    return all(one.same and one.informative for one in results)


def require_example_mean(
    objective: Objective, *, purpose: str, anywhere: bool = False, alone: bool = False
) -> None:
    """Refuse an objective whose loss is no mean over examples.

    Args:
        objective: a loss of outputs and targets.
        purpose: for which it has to be, for the message.
        anywhere: at other parameters as well, to which training or a path leads; these take no closure.
        alone: each example is to have a loss of its own.

    Raises:
        ModelError: it is not.
        DataError: it is not finite in some example.
    """
    try:
        results = differences(objective, anywhere=anywhere, alone=alone)
    except (DataError, ResourceError):
        raise
    except Exception as error:  # a user's loss or model may raise anything on a part
        if isinstance(error, ModelError) and not _takes_whole(objective):
            raise
        reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        raise ModelError(
            f"{_subject(objective)} fails on a part of the examples: {reason}{whole(closure=not anywhere)}"
        ) from error
    worst = max((one for one in results if not one.same), key=lambda one: one.size, default=None)
    if worst is None:
        return
    if not math.isfinite(worst.size) and not objective.may_diverge:
        require_finite_batches(objective)
    apart = f"by {worst.size:.2g} of its size" if math.isfinite(worst.size) else "and on a part is not finite"
    raise ModelError(
        f"{_subject(objective)} is no mean over examples: over some of them it differs from the mean over "
        f"their parts {apart}, so that {purpose} would be wrong; {remedy(objective, closure=not anywhere)}"
    )


def _takes_whole(objective: Objective) -> bool:
    """Whether model and loss take the batches as they are."""
    try:
        with torch.no_grad():
            for batch in objective.batches():
                objective.losses(objective.theta, batch)
    except ModelError:
        return False
    return True


def differences(objective: Objective, *, anywhere: bool = False, alone: bool = False) -> list[Difference]:
    """All that is compared, on examples of each shape."""
    alive = (~objective.dead).nonzero()
    if not len(alive):
        return []
    objective = objective.member(int(alive[0]))
    with exact_products(objective.device, recurrent=objective.recurrent):
        exact = _in_double(objective)
        sets = representatives(exact.batches(), len(exact.sizes), LOSS_EXAMPLES)[:MOST_SHAPES]
        return [one for batch in sets for one in _compared(exact, batch, anywhere, alone)]


def _compared(objective: Objective, batch: Batch, anywhere: bool, alone: bool) -> list[Difference]:
    few = representative(batch, _affordable(objective, batch))
    results = [_of_model(objective, objective.theta, few)]
    if anywhere or not results[0].informative:
        elsewhere = _of_model(objective, _moved(objective.theta), few)
        results = [results[0], elsewhere] if anywhere else [elsewhere]
    if all(one.same for one in results) and (batch.size or 0) > (few.size or 0):
        results += _of_loss(objective, batch)
    if all(one.same for one in results) and alone:
        results.append(_of_each(objective, few))
    return results


# ---- the loss of the model


def _of_model(objective: Objective, theta: Tensor, batch: Batch) -> Difference:
    """Over the examples in the order of their targets, cut in two."""
    n = batch.size or 0
    parts = [(len(rows) / n, batch.pick(rows)) for rows in _cut(torch.arange(n, device=objective.device))]

    def loss_over(part: Batch) -> Callable[[Tensor], Tensor]:
        return lambda point: objective.losses(point, part).sum()

    return _difference(loss_over(batch), [(share, loss_over(part)) for share, part in parts], theta)


def _moved(theta: Tensor) -> Tensor:
    """Generic parameters near ``theta``."""
    noise = torch.randn(theta.shape, generator=generator(0, "elsewhere"), device="cpu", dtype=torch.float64)
    return theta.detach() + 0.1 * _scale(theta) * noise.to(theta)


def _affordable(objective: Objective, batch: Batch) -> int:
    """Examples whose graph takes a moderate memory, by what a forward pass of two of them keeps."""
    two = batch.pick(slice(0, 2))
    held = held_bytes(lambda: objective.losses(objective.theta, two))
    of_weights = 2 * objective.theta.numel() * objective.theta.element_size()
    each = GRAPH_OF_FORWARD * max(held - of_weights, 1) / (two.size or 1)
    return int(min(MODEL_EXAMPLES, max(3, GRAPH_BYTES // each)))


# ---- the loss of its outputs


def _of_loss(objective: Objective, batch: Batch) -> list[Difference]:
    """In the order of the targets and in another; nothing where outputs are no tensor of one row for each.

    Where outputs say nothing, as under a hinge loss that is zero, those of other examples take their place.
    """
    try:
        with torch.no_grad():
            outputs = torch.cat([objective.outputs(objective.theta, p) for p in batch.split(AT_ONCE)], dim=1)
    except ModelError:
        return []
    n = batch.size or 0
    shuffled = torch.randperm(n, generator=generator(0, "parts"), device="cpu").to(objective.device)
    orders = (torch.arange(n, device=objective.device), shuffled)
    results = [_of_outputs(objective, outputs, batch, order) for order in orders]
    if not results[0].informative:
        results = [_of_outputs(objective, outputs[:, shuffled], batch, order) for order in orders]
    return results


def _of_outputs(objective: Objective, outputs: Tensor, batch: Batch, order: Tensor) -> Difference:

    def loss_over(rows: Tensor) -> Callable[[Tensor], Tensor]:
        part = batch.pick(rows)
        return lambda point: objective.losses_of(point[:, rows], part).sum()

    parts = [(len(rows) / len(order), loss_over(rows)) for rows in _cut(order)]
    return _difference(loss_over(order), parts, outputs)


def _of_each(objective: Objective, batch: Batch) -> Difference:
    """The mean over the examples' own losses against the loss over all of them."""
    with torch.no_grad():
        outputs = objective.outputs(objective.theta, batch)

    def mean(point: Tensor) -> Tensor:
        return objective.example_losses(point, batch).mean()

    return _difference(lambda point: objective.losses_of(point, batch).sum(), [(1.0, mean)], outputs)


# ---- whole and parts


def _cut(rows: Tensor) -> list[Tensor]:
    """Two unequal parts, about a third and the rest, whose sizes have no divisor in common with the whole's.

    A class that both share is thus never shared evenly.
    """
    n = len(rows)
    size = max(1, n // 3)
    while size < n - 1 and math.gcd(size, n) > 1:
        size += 1
    return [rows[:size], rows[size:]] if n > 1 else [rows]


def _difference(
    whole: Callable[[Tensor], Tensor],
    parts: Sequence[tuple[float, Callable[[Tensor], Tensor]]],
    point: Tensor,
) -> Difference:
    """Of value, gradient and Hessian-vector product at ``point``, relative to the larger of the latter two.

    The vector is as long as the point is, so that all three are changes of the loss by their size.
    """
    noise = torch.randn(
        point.shape, generator=generator(0, "example mean"), device="cpu", dtype=torch.float64
    )
    direction = _scale(point) * noise.to(point)
    length = float(torch.linalg.vector_norm(direction.double()))
    derivatives, dtype = _derivatives(whole, point, direction)
    means, sizes = [torch.zeros_like(one) for one in derivatives], [_norm(one) for one in derivatives]
    parted = [0.0, 0.0, 0.0]
    for share, part in parts:
        for i, one in enumerate(_derivatives(part, point, direction)[0]):
            means[i] = means[i] + share * one
            parted[i] += share * _norm(one)
    if not all(map(math.isfinite, parted)):
        return Difference(math.inf, True, dtype)
    value, slope, bend = (
        max(whole_size, parts_size) * unit
        for whole_size, parts_size, unit in zip(sizes, parted, (1, length, length), strict=True)
    )
    gaps = [_norm(one - mean) for one, mean in zip(derivatives, means, strict=True)]
    change = max(slope, bend)
    relative = [gaps[0] / (max(value, change) or 1)]
    relative += [gap * length / (change or 1) for gap in gaps[1:]]
    return Difference(max(relative), change > NOTHING * value, dtype)


def _derivatives(
    function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor
) -> tuple[list[Tensor], torch.dtype]:
    """Value, gradient and Hessian-vector product in float64, and the dtype that the value came in."""
    point = point.detach().requires_grad_()
    value = function(point)
    gradient = product = torch.zeros_like(point)
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, point, create_graph=True, materialize_grads=True)
    if gradient.requires_grad:
        product = _product(gradient, point, direction)
    return [one.detach().double() for one in (value, gradient, product)], value.dtype


def _product(gradient: Tensor, point: Tensor, direction: Tensor) -> Tensor:
    """H v; zeros where torch has no second derivative, which the Fisher matrix does not take."""
    try:
        (product,) = torch.autograd.grad(gradient, point, direction, materialize_grads=True)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        product = torch.zeros_like(point)
    return product


def _in_double(objective: Objective) -> Objective:
    """The objective in float64, or as it is where model or loss do not take that."""
    exact = objective.to(torch.float64)
    try:
        with torch.no_grad():
            exact.losses(exact.theta, next(iter(exact.batches())).pick(slice(0, 2)))
    except Exception:  # whatever a user's model or loss raises at another dtype
        return objective
    return exact


def _scale(point: Tensor) -> float:
    """Root mean square; 1 for zeros."""
    return float(point.detach().double().square().mean().sqrt()) or 1.0


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _subject(objective: Objective) -> str:
    return f"loss {objective.names['loss']!r} of model {objective.names['model']!r}"
