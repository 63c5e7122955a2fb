"""Whether the derivatives that products use are those of the model: one central difference tells.

Autograd follows what it has recorded. It does not see what a custom function kept of its forward pass,
weights that are read past their module, or a state that moves with the weights; its second derivatives are
then wrong while the products stay symmetric, and every residual small. The difference is taken in float64,
over a few examples and along a random direction, of the module itself with its weights changed in place.

A kink between the two points of a difference makes it wrong too, with a probability that falls with the step
and the number of examples; so does one at the point, and rounding, where a model computes in float32 or a
softmax is saturated. Kinks set the differences ahead and behind apart, rounding those of two steps. So
nothing is refused before every step has failed, two of them with differences that agree, and the same at
smaller parameters.

Parameters are measured in units of their tensor's size, outputs in those of their component's: a step of one
length for all would be far outside what a small one takes beside a large one, as after a rescaling that keeps
the function.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossray.errors import ModelError
from lossray.memory import is_out_of_memory
from lossray.operators.objectives import Batch, Objective, converted
from lossray.operators.products import derivative, hessian_piece, pullback, pushforward
from lossray.operators.representative import representative
from lossray.seeds import generator

LARGEST = {torch.float64: 1e-4, torch.float32: 1e-2}  # relative difference of derivatives in these dtypes
# Examples, and the step as a share of |theta|: smaller ones miss kinks, larger ones drown rounding.
ATTEMPTS = ((8, 1e-6), (4, 1e-7), (2, 1e-8), (1, 1e-8), (8, 1e-5), (8, 1e-4), (8, 1e-3))
WHOLE = ((None, 1e-6), (None, 1e-8))  # the batch, where model or loss take no other number of examples
CONSIDERED = 256  # examples from which these are chosen
AGREEING = 0.1  # of the difference: how far those ahead and behind, or of two steps, may be apart
AGREEING_ATTEMPTS = 2  # that refuse
SHRUNK = (0.1, 0.01)  # times the parameters: there no softmax is saturated, and what is wrong is wrong too
FLOOR = 1e-3  # of what is differentiated, over the length of the point: derivatives below may be rounding


@dataclass(frozen=True)
class Trial:
    """A derivative along a direction, and the function whose derivative it is.

    Attributes:
        derivative: by autograd, float64.
        function: at so much of the direction, which has length 1.
        length: of the point in the same units: the step's unit.
    """

    derivative: Tensor
    function: Callable[[float], Tensor]
    length: float


@dataclass(frozen=True)
class Side:
    """One way to evaluate a member at a few examples.

    Attributes:
        objective: of one member.
        batch: the examples, in the objective's dtype.
    """

    objective: Objective
    batch: Batch


TrialMaker = Callable[[Side, Side, int], Trial]  # as products do it, in float64 with changed weights; a seed


def derivative_errors(objective: Objective, makers: Sequence[TrialMaker]) -> Tensor:
    """The relative difference of each member, [R] float64: NaN where it cannot be told, or of dead members.

    Args:
        objective: in any dtype; its derivatives are compared in float64, or in its own where that fails.
        makers: what the operator differentiates.

    Raises:
        ModelError: a derivative is not that of the function.
    """
    errors = torch.full((len(objective.dead),), math.nan, dtype=torch.float64, device=objective.device)
    exact = objective.to(torch.float64)
    first = next(iter(exact.batches()))
    for r in (~objective.dead).nonzero().flatten().tolist():
        differences = [_told(objective.member(r), exact.member(r), first, maker) for maker in makers]
        errors[r] = torch.tensor(differences, device="cpu").max()  # NaN stays NaN
    return errors


def _told(objective: Objective, exact: Objective, batch: Batch, maker: TrialMaker) -> float:
    """The difference; NaN where it cannot be told from rounding or kinks.

    Raises:
        ModelError: it is too large, here and at parameters that are smaller.
    """
    error, wrong = _error(objective, exact, batch, maker)
    if not wrong:
        return error
    for factor in SHRUNK:
        shrunk, shrunk_exact = (_at(one, factor * one.theta.detach()) for one in (objective, exact))
        if not _error(shrunk, shrunk_exact, batch, maker)[1]:
            return math.nan
    raise ModelError(_message(objective, error))


def _at(objective: Objective, theta: Tensor) -> Objective:
    """The objective at other parameters."""
    other = copy.copy(objective)
    other.theta = theta.requires_grad_()
    return other


def _error(objective: Objective, exact: Objective, batch: Batch, maker: TrialMaker) -> tuple[float, bool]:
    """The difference in the first attempt where it is small; else the largest that is meant, and True."""
    agreeing, told = [], False
    whole = replace(batch, share=1.0, weights=None)
    for seed, (count, share) in enumerate([*ATTEMPTS, *WHOLE]):
        if told and count is None:
            break
        few = whole if count is None else _few(exact, batch, count)
        error, meant, dtype = _attempt(objective, exact, few, maker, seed, share)
        if error <= LARGEST[dtype]:
            return error, False
        told = told or (count is not None and not math.isnan(error))
        if meant:
            agreeing.append(error)
    if len(agreeing) >= AGREEING_ATTEMPTS:
        return max(agreeing), True
    return math.nan, False


def _attempt(
    objective: Objective, exact: Objective, few: Batch, maker: TrialMaker, seed: int, share: float
) -> tuple[float, bool, torch.dtype]:
    """The difference, whether it is meant, and the dtype of the derivative: float64 if that works.

    Where it does not, not even in place, the differences are taken in the objective's own dtype as well.
    """
    for differentiated, other in ((exact, exact), (objective, exact), (objective, objective)):
        try:
            trial = maker(_side(differentiated, few), _side(other, few), seed)
            return *_difference(trial, share, LARGEST[differentiated.dtype]), differentiated.dtype
        except Exception as error:  # a user's model may take no such number of examples, or no float64
            if is_out_of_memory(error):
                raise
    return math.nan, False, objective.dtype


def _side(objective: Objective, few: Batch) -> Side:
    return Side(objective, converted(few, objective.device, objective.dtype))


def _difference(trial: Trial, share: float, largest: float) -> tuple[float, bool]:
    """The relative difference, and whether it is meant rather than due to a kink or to rounding."""
    step = share * (trial.length or 1.0)
    ahead, behind = trial.function(step), trial.function(-step)
    central = (ahead - behind) / (2 * step)
    floor = FLOOR * _norm(ahead) / (trial.length or 1.0)
    gap, size = _norm(trial.derivative - central), max(_norm(trial.derivative), _norm(central), floor)
    error = gap / size if size else 0.0
    if error <= largest or not math.isfinite(error):
        return error, False
    apart = _norm(ahead - 2 * trial.function(0.0) + behind) / step
    wider = (trial.function(3 * step) - trial.function(-3 * step)) / (6 * step)
    return error, max(apart, _norm(wider - central)) <= AGREEING * gap


def _message(objective: Objective, error: float) -> str:
    return (
        f"model {objective.names['model']!r} with loss {objective.names['loss']!r}: what autograd gives for "
        f"its derivatives differs from a finite difference by {error:.2g} of its size. Likely causes: an "
        "autograd.Function whose backward cannot be differentiated (it detaches, or keeps tensors of its "
        "forward pass), weights that are read past their module (from a list, or from a tensor made of them "
        "before), detach() or no_grad() on the way, a state that moves with the weights (spectral norm in "
        "train mode). Use differentiable operations of torch on registered parameters, and eval mode"
    )


def _few(objective: Objective, batch: Batch, count: int) -> Batch:
    """A few examples of a batch, or all of one that cannot be divided."""
    if batch.size is None:
        return replace(batch, share=1.0)
    indices = torch.linspace(0, batch.size - 1, min(batch.size, CONSIDERED), device="cpu").round().long()
    considered = batch.pick(indices.to(objective.device))
    return replace(representative(considered, max(2, count) if objective.coupled else count), share=1.0)


# ---- what is differentiated


def gradient_trial(autograd: Side, plain: Side, seed: int) -> Trial:
    """The gradient of the loss in the parameters, whose derivative is the Hessian."""
    theta, units = _point(plain)
    direction = units * _direction(theta, seed)
    product = hessian_piece(autograd.objective, autograd.batch).product(
        direction.to(autograd.objective.dtype)
    )

    def gradient(step: float) -> Tensor:
        return units * plain.objective.plain_gradient(theta + step * direction, plain.batch)

    return Trial(units * product.double(), gradient, _norm(theta / units))


def output_trial(autograd: Side, plain: Side, seed: int) -> Trial:
    """The outputs in the parameters, whose derivative is J."""
    theta, units = _point(plain)
    direction = units * _direction(theta, seed)
    outputs = autograd.objective.outputs(autograd.objective.theta, autograd.batch)
    push = pushforward(autograd.objective, outputs, autograd.batch, linearized=False)

    def moved(step: float) -> Tensor:
        return plain.objective.plain_outputs(theta + step * direction, plain.batch)

    return Trial(push(direction.to(autograd.objective.dtype)).double(), moved, _norm(theta / units))


def slope_trial(autograd: Side, plain: Side, seed: int) -> Trial:
    """The slope of the loss in the outputs, whose derivative is its Hessian there."""
    outputs = autograd.objective.outputs(autograd.objective.theta, autograd.batch).detach().requires_grad_()
    units = _component_units(outputs)
    direction = units * _direction(outputs, seed)

    def slope(side: Side, point: Tensor, *, keep: bool = False) -> Tensor:
        return derivative(side.objective.losses_of(point, side.batch).sum(), point, create_graph=keep)

    product = pullback(slope(autograd, outputs, keep=True), outputs)(direction)

    def moved(step: float) -> Tensor:
        return units.double() * slope(plain, _ahead(outputs, step, direction))

    return Trial((units * product).double(), moved, _norm(outputs / units))


def example_trial(autograd: Side, plain: Side, seed: int) -> Trial:
    """The losses of the examples in the outputs, whose derivatives are their slopes."""
    outputs = autograd.objective.outputs(autograd.objective.theta, autograd.batch).detach().requires_grad_()
    units = _component_units(outputs)
    direction = units * _direction(outputs, seed)
    slopes = derivative(autograd.objective.example_losses(outputs, autograd.batch).sum(), outputs)
    directional = (slopes * direction).reshape(*slopes.shape[:2], -1).sum(dim=2)

    def losses(step: float) -> Tensor:
        return plain.objective.example_losses(_ahead(outputs, step, direction), plain.batch).detach()

    return Trial(directional.double(), losses, _norm(outputs / units))


def _point(side: Side) -> tuple[Tensor, Tensor]:
    """The parameters [1, d], and the root mean square of each one's tensor; where that is 0 a neighbour's."""
    theta = side.objective.theta.detach()
    parts = torch.split(theta, list(side.objective.layout.sizes), dim=1)
    sizes = [_norm(part) / math.sqrt(max(part.numel(), 1)) for part in parts]
    last = next((size for size in sizes if size), 1.0)
    units = []
    for part, size in zip(parts, sizes, strict=True):
        last = size or last
        units.append(torch.full_like(part, last))
    return theta, torch.cat(units, dim=1)


def _component_units(outputs: Tensor) -> Tensor:
    """The root mean square of each component of outputs [1, B, ...] over the examples, [1, 1, ...]."""
    values = outputs.detach()
    units = values.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(units > 0, units, float(values.square().mean().sqrt()) or 1.0)


def _ahead(point: Tensor, step: float, direction: Tensor) -> Tensor:
    """The point in float64, so much along the direction, as a leaf."""
    return (point.detach().double() + step * direction.double()).requires_grad_()


def _direction(point: Tensor, seed: int) -> Tensor:
    noise = torch.randn(
        point.shape, generator=generator(seed, "derivative"), device="cpu", dtype=torch.float64
    )
    direction: Tensor = (noise / torch.linalg.vector_norm(noise)).to(point)
    return direction


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.detach()))
