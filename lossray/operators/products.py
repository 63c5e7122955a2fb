"""Curvature products of one batch, twice differentiated backwards (Pearlmutter 1994; Schraudolph 2002).

The gradient is that of the *sum* over members, whose Hessian is block-diagonal: row r of a product belongs to
member r alone. vmap(grad) and torch.func.hessian are never used: they are wrong for LayerNorm (theory 2.14).
The kinks of ReLU count as flat (theory 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import grad, linearize

from lossray.errors import ModelError
from lossray.operators.objectives import Batch, Objective

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """What one batch adds to an operator; all of it counted by the batch's share of the examples.

    Attributes:
        losses: [R].
        gradient: [R, d].
        product: vectors [R, d] to products [R, d], in the dtype of the objective.
    """

    losses: Tensor
    gradient: Tensor
    product: Linear


PieceMaker = Callable[..., Piece]  # (objective, batch, *, linearized: bool)


def hessian_piece(objective: Objective, batch: Batch, *, linearized: bool = False) -> Piece:
    """H v, by a backward pass through the graph of the gradient, or by the linearised gradient."""
    theta = objective.theta
    losses = batch.share * objective.losses(theta, batch)
    _require_dependence(objective, losses)
    gradient = derivative(losses.sum(), theta, create_graph=True)
    product = pullback(gradient, theta)
    if linearized:
        objective_sum = lambda point: batch.share * objective.losses(point, batch).sum()  # noqa: E731
        product = linearize(grad(objective_sum), theta.detach())[1]
    return Piece(losses.detach(), gradient.detach(), product)


def gauss_newton_piece(objective: Objective, batch: Batch, *, linearized: bool = False) -> Piece:
    """J' (d2 loss / d outputs2) J v; the loss may be any function of the outputs, convex or not."""
    theta = objective.theta
    outputs = objective.outputs(theta, batch)
    leaf = outputs.detach().requires_grad_()
    losses = batch.share * objective.losses_of(leaf, batch)
    _require_dependence(objective, outputs, losses)
    slope = derivative(losses.sum(), leaf, create_graph=True)
    push = pushforward(objective, outputs, batch, linearized=linearized)
    curve, pull = pullback(slope, leaf), pullback(outputs, theta)
    return Piece(losses.detach(), pull(slope.detach()), lambda vectors: pull(curve(push(vectors))))


def fisher_piece(objective: Objective, batch: Batch, *, linearized: bool = False) -> Piece:
    """The mean of g_n g_n' v over the examples n, with g_n = J_n' (d loss_n / d outputs_n)."""
    theta = objective.theta
    outputs = objective.outputs(theta, batch)
    leaf = outputs.detach().requires_grad_()
    each = objective.example_losses(leaf, batch)  # [R, B]
    _require_dependence(objective, outputs, each)
    slopes = derivative(each.sum(), leaf)  # [R, B, ...]
    weights = torch.ones_like(each[0]) if batch.weights is None else batch.weights
    shares = batch.share * weights / weights.sum()
    push = pushforward(objective, outputs, batch, linearized=linearized)
    pull = pullback(outputs, theta)

    def weighted(scalars: Tensor) -> Tensor:
        """The slopes times one scalar per member and example."""
        return slopes * scalars.view(*scalars.shape, *[1] * (slopes.ndim - 2))

    def product(vectors: Tensor) -> Tensor:
        along = (slopes * push(vectors)).reshape(*each.shape, -1).sum(dim=2)  # g_n . v, [R, B]
        return pull(weighted(along * shares))

    gradient = pull(weighted(shares.expand_as(each)))
    return Piece((each * shares).sum(dim=1).detach(), gradient, product)


def pushforward(objective: Objective, outputs: Tensor, batch: Batch, *, linearized: bool) -> Linear:
    """The map v -> J v. J' u is linear in u, so its own derivative in u, pulled back along v, is J v."""
    theta = objective.theta
    if linearized:
        jvp: Linear = linearize(lambda point: objective.outputs(point, batch), theta.detach())[1]
        return jvp
    dummy = torch.zeros_like(outputs).requires_grad_()
    return pullback(derivative(outputs, theta, dummy, create_graph=True), dummy)


def pullback(values: Tensor, point: Tensor) -> Linear:
    """The map u -> (d values / d point)' u, through a graph that stays."""

    def pull(vectors: Tensor) -> Tensor:
        return derivative(values, point, vectors, retain_graph=True)

    return pull


def derivative(
    values: Tensor,
    point: Tensor,
    vectors: Tensor | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Tensor:
    """Like `torch.autograd.grad`, with zeros where ``values`` do not depend on ``point``."""
    if not values.requires_grad:
        return torch.zeros_like(point)
    retain = create_graph or retain_graph
    (derivative,) = torch.autograd.grad(
        values, point, vectors, create_graph=create_graph, retain_graph=retain, materialize_grads=True
    )
    if create_graph:
        _require_twice_differentiable(derivative)
    return derivative


def _require_dependence(objective: Objective, *values: Tensor) -> None:
    """Refuse what autograd has not recorded: its zeros would pass for a flat loss."""
    if not all(value.requires_grad for value in values):
        raise ModelError(
            f"loss {objective.names['loss']!r} of model {objective.names['model']!r} does not depend on the "
            "parameters as far as autograd can tell; take out detach() and torch.no_grad(), and call "
            "autograd.grad with create_graph=True (pass train=True if it does so in train mode alone)"
        )


def _require_twice_differentiable(derivative: Tensor) -> None:
    """Refuse a graph with a function that may be differentiated once only.

    Autograd leaves such a function out when it looks for a way to theta, so that the product would be wrong
    without a word.
    """
    seen, todo = set(), [derivative.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("autograd::Error"):
            raise ModelError(
                "the model or its loss uses a function that can be differentiated once only "
                "(once_differentiable): it has no Hessian here; use a differentiable implementation"
            )
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)


class Comparable(Protocol):
    """An operator that can be compared with itself in float64."""

    def difference(self, vectors: Tensor) -> Tensor:
        """Products minus those in float64, [R, d] or [R, b, d]."""


def error_norms(operator: Comparable, vectors: Tensor) -> Tensor:
    """Lengths [R] of the differences to the products in float64; NaN where a model refuses float64.

    A forward pass may pin a dtype of its own.
    """
    try:
        errors: Tensor = torch.linalg.vector_norm(operator.difference(vectors), dim=-1)
    except ModelError:
        errors = torch.full(vectors.shape[:1], float("nan"), dtype=torch.float64, device=vectors.device)
    return errors
