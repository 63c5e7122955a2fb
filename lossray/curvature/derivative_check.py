"""Whether the derivatives that products use are those of the model: one central difference tells.

Autograd follows what it has recorded. It does not see what a custom function kept of its forward pass,
weights that are read past their module, or a state that moves with the weights; its second derivatives are
then wrong while the products stay symmetric, and every residual small. The difference is taken in float64,
over a few examples and along a random direction, of the module itself with its weights changed in place.

A kink between the two points of a difference makes it wrong too, with a probability that falls with the step
and the number of examples, as does rounding where a model computes in float32. Both show in the
difference over a longer step. So nothing is refused before several attempts with ever smaller steps and fewer
examples have failed, and agree about it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossray.curvature.objectives import Batch, Objective
from lossray.curvature.products import derivative, hessian_piece, pullback, pushforward
from lossray.curvature.representative import representative
from lossray.errors import ModelError
from lossray.seeds import generator

LARGEST = 1e-4  # relative difference of sound derivatives; they reach 1e-8
ATTEMPTS = ((8, 1e-6), (4, 1e-7), (2, 1e-8), (1, 1e-8))  # examples, and the step as a share of |theta|
CONSIDERED = 256  # examples from which these are chosen
LONGER = 3  # the other step, over the first
SETTLED = 0.1  # of a difference is the most that the other step may change where the difference is meant
SETTLED_ATTEMPTS = 2  # that must agree
FLOOR = 1e-3  # of what is differentiated, over the length of the point: derivatives below may be rounding


@dataclass(frozen=True)
class Trial:
    """A derivative along a direction, and the function whose derivative it is."""

    found: Tensor
    function: Callable[[float], Tensor]  # at so much of the direction, which has length 1
    length: float  # of the point: the step's unit


TrialMaker = Callable[[Objective, Batch, int], Trial]  # of one member, at examples, with a seed


@dataclass(frozen=True)
class Outcome:
    """Of one trial."""

    error: float
    settled: bool  # another step says the same


def derivative_errors(objective: Objective, makers: Sequence[TrialMaker]) -> Tensor:
    """The relative difference of each member, [R] float64: NaN where it cannot be told, or of dead members.

    Args:
        objective: in any dtype; compared in float64.
        makers: what the operator differentiates.

    Raises:
        ModelError: a derivative is not that of the function.
    """
    errors = torch.full((len(objective.dead),), math.nan, dtype=torch.float64, device=objective.device)
    try:
        exact = objective.to(torch.float64)
        first = next(iter(exact.batches()))
    except Exception:  # whatever a user's model or data raise in another dtype
        return errors
    for r in (~objective.dead).nonzero().flatten().tolist():
        member = exact.member(r)
        found = [_error(member, first, maker) for maker in makers]
        errors[r] = max(found) if not any(map(math.isnan, found)) else math.nan
    return errors


def _error(objective: Objective, batch: Batch, maker: TrialMaker) -> float:
    """The smallest difference of the attempts; NaN where none is small and they do not agree."""
    settled = []
    for seed, (examples, share) in enumerate(ATTEMPTS):
        try:
            trial = maker(objective, _few(objective, batch, examples), seed)
            outcome = _outcome(trial, share)
        except Exception:  # a user's model may take no such number of examples, or no float64
            continue
        if outcome.error <= LARGEST:
            return outcome.error
        if outcome.settled:
            settled.append(outcome.error)
    if len(settled) < SETTLED_ATTEMPTS:
        return math.nan
    raise ModelError(
        f"model {objective.names['model']!r} with loss {objective.names['loss']!r}: what autograd gives for "
        f"the second derivatives differs from a finite difference by {min(settled):.2g} of its size. Likely "
        "causes: an autograd.Function whose backward cannot be differentiated (it detaches, or keeps tensors "
        "of its forward pass), weights that are read past their module (from a list, or from a tensor made "
        "of them before), detach() or no_grad() on the way, a state that moves with the weights (spectral "
        "norm in train mode). Use differentiable operations of torch on registered parameters, and eval mode"
    )


def _outcome(trial: Trial, share: float) -> Outcome:
    step = share * (trial.length or 1.0)
    ahead, behind = trial.function(step), trial.function(-step)
    difference = (ahead - behind) / (2 * step)
    floor = FLOOR * _norm(ahead) / (trial.length or 1.0)
    gap, size = _norm(trial.found - difference), max(_norm(trial.found), _norm(difference), floor)
    error = gap / size if size else 0.0
    if error <= LARGEST or not math.isfinite(error):
        return Outcome(error, False)
    longer = LONGER * step
    other = (trial.function(longer) - trial.function(-longer)) / (2 * longer)
    return Outcome(error, _norm(difference - other) <= SETTLED * gap)


def _few(objective: Objective, batch: Batch, count: int) -> Batch:
    """A few examples of a batch, or all of one that cannot be divided."""
    if batch.size is None:
        return replace(batch, share=1.0)
    places = torch.linspace(0, batch.size - 1, min(batch.size, CONSIDERED)).round().long()
    considered = batch.pick(places.to(objective.device))
    return replace(representative(considered, max(2, count) if objective.coupled else count), share=1.0)


# ---- what is differentiated


def gradient_trial(objective: Objective, batch: Batch, seed: int) -> Trial:
    """The gradient of the loss in the parameters, whose derivative is the Hessian."""
    theta = objective.theta.detach()
    direction = _direction(theta, seed)
    found = hessian_piece(objective, batch).product(direction)
    return Trial(found, lambda step: objective.plain_gradient(theta + step * direction, batch), _norm(theta))


def output_trial(objective: Objective, batch: Batch, seed: int) -> Trial:
    """The outputs in the parameters, whose derivative is J."""
    theta = objective.theta.detach()
    direction = _direction(theta, seed)
    outputs = objective.outputs(objective.theta, batch)
    found = pushforward(objective, outputs, batch, linearized=False)(direction)
    return Trial(found, lambda step: objective.plain_outputs(theta + step * direction, batch), _norm(theta))


def slope_trial(objective: Objective, batch: Batch, seed: int) -> Trial:
    """The slope of the loss in the outputs, whose derivative is its Hessian there."""
    outputs = objective.outputs(objective.theta, batch).detach().requires_grad_()
    direction = _direction(outputs, seed)

    def slope(point: Tensor, *, keep: bool = False) -> Tensor:
        return derivative(objective.losses_of(point, batch).sum(), point, create_graph=keep)

    found = pullback(slope(outputs, keep=True), outputs)(direction)
    return Trial(found, lambda step: slope(outputs + step * direction), _norm(outputs))


def example_trial(objective: Objective, batch: Batch, seed: int) -> Trial:
    """The losses of the examples in the outputs, whose derivatives are their slopes."""
    outputs = objective.outputs(objective.theta, batch).detach().requires_grad_()
    direction = _direction(outputs, seed)
    slopes = derivative(objective.example_losses(outputs, batch).sum(), outputs)
    found = (slopes * direction).reshape(*slopes.shape[:2], -1).sum(dim=2)

    def losses(step: float) -> Tensor:
        return objective.example_losses(outputs + step * direction, batch).detach()

    return Trial(found, losses, _norm(outputs))


def _direction(point: Tensor, seed: int) -> Tensor:
    noise = torch.randn(point.shape, generator=generator(seed, "derivative"), dtype=torch.float64)
    direction: Tensor = (noise / torch.linalg.vector_norm(noise)).to(point)
    return direction


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.detach()))
