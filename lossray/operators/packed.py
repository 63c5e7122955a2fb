"""The packed operators of an objective: Hessian, Gauss-Newton and empirical Fisher, for R members at once."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lossray.errors import LossrayError, ModelError
from lossray.memory import is_out_of_memory
from lossray.operators.derivative_check import (
    TrialMaker,
    derivative_errors,
    example_trial,
    gradient_trial,
    output_trial,
    slope_trial,
)
from lossray.operators.exact_products import exact_products
from lossray.operators.example_mean import require_example_mean
from lossray.operators.finite import require_finite_loss
from lossray.operators.modes import plan_products
from lossray.operators.objectives import Objective
from lossray.operators.product_count import PRODUCTS
from lossray.operators.products import (
    Piece,
    PieceMaker,
    error_norms,
    fisher_piece,
    gauss_newton_piece,
    hessian_piece,
)
from lossray.operators.settings import ProductMode
from lossray.plugins import failure
from lossray.seeds import generator

MULTIPLE = 0.7390851332151607  # no power of two, and no float32
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-9}  # with double backward, relative


class ObjectiveOperator:
    """R symmetric d x d operators of one objective.

    Every mode but plain double backward is compared with it once, on a random vector, and given up for
    "retained" where it disagrees or fails. A member with a parameter that is not finite takes no part: its
    losses, gradient and products are NaN.

    Args:
        objective: what is differentiated.
        mode: "auto", "retained", "linearized" or "recompute"; see modes.py.
        derivative_error: [R] float64 of another operator of this model and loss; measured where it is None.

    Attributes:
        shape: (R, d).
        dtype: precision of the products.
        losses: mean loss of every member [R], float64.
        gradient: its gradient [R, d], float64.
        layout: how d divides into the parameters.
        mode: the mode that is used.
        matvecs: products so far; each is one per member.

    Raises:
        ModelError: the objective has no such operator, or cannot be differentiated.
        ResourceError: what has to be kept does not fit.
        ValueError: an unknown mode.
    """

    make_piece: ClassVar[PieceMaker]
    trials: ClassVar[tuple[TrialMaker, ...]]  # of the derivatives that the pieces take

    def __init__(
        self, objective: Objective, *, mode: str = "auto", derivative_error: Tensor | None = None
    ) -> None:
        if derivative_error is not None:
            self.derivative_error = derivative_error
        self.objective, self.layout = objective, objective.layout
        self.dtype, self.device = objective.dtype, objective.device
        self.shape = (objective.theta.shape[0], objective.theta.shape[1])
        self.matvecs = 0
        if torch.is_inference_mode_enabled():
            raise ModelError(
                "inside torch.inference_mode() nothing can be differentiated; use torch.no_grad() instead"
            )
        with _differentiating(objective):
            self._check()
            plan = plan_products(objective, mode, type(self).make_piece)
            self.mode: ProductMode = plan.mode
            self._size = plan.piece
            self._kept: list[Piece] | None = None
            if self.mode == "linearized":
                self._keep_linearized()
            losses, gradient = self._first_pass()
            if not objective.may_diverge:
                require_finite_loss(objective, losses, gradient)
        self.losses, self.gradient = self._masked(losses), self._masked(gradient)

    def apply(self, vectors: Tensor) -> Tensor:
        """Products of the members' operators with their vectors.

        Args:
            vectors: [R, d] or [R, b, d], any floating dtype; a block shares the work that does not depend on
                the vectors.

        Returns:
            Of the same shape, float64.

        Raises:
            ValueError: another shape.
            ModelError: at the first product, the derivatives are not those of the model.
        """
        block = self._block(vectors)
        self.require_derivatives()
        self.matvecs += block.shape[1]
        PRODUCTS.total += block.shape[0] * block.shape[1]
        with _differentiating(self.objective):
            products = self._sum(self._pieces(), block.to(self.device, self.dtype))
        if not self.objective.may_diverge:
            self._require_finite(products, block)
        return self._masked(products.view(vectors.shape))

    def difference(self, vectors: Tensor) -> Tensor:
        """Products minus those in float64 from double backward, [R, d] or [R, b, d]; counts no product.

        Products in float64 are taken with multiples of the vectors: what a model computes in a lower
        precision inside is rounded otherwise there.
        """
        block = self._block(vectors)
        exact = self.objective.to(torch.float64)
        multiple = MULTIPLE if self.dtype == torch.float64 else 1.0
        with _differentiating(exact):
            products = self._sum(self._pieces(), (multiple * block).to(self.device, self.dtype)) / multiple
            pieces = _pieces(exact, type(self).make_piece, self._size)
            expected = self._sum(pieces, block.to(self.device, torch.float64))
        return self._masked((products - expected).view(vectors.shape))

    def product_error(self, vectors: Tensor) -> Tensor:
        """|(A - A64) v| of every member for ``vectors`` [R, d], with a reference in float64: [R].

        Of products in float64 it is their rounding, with that of lower precisions inside the model. NaN where
        the model cannot be evaluated in float64.
        """
        return error_norms(self, vectors)

    @cached_property
    def derivative_error(self) -> Tensor:
        """How far autograd's derivatives are from a finite difference, relative: [R] float64.

        NaN where it cannot be told: at a kink, or from rounding.

        Raises:
            ModelError: too far.
        """
        with _differentiating(self.objective):
            return derivative_errors(self.objective, type(self).trials)

    def require_derivatives(self) -> None:
        """Refuse derivatives that are not those of the model, once."""
        _ = self.derivative_error

    def _check(self) -> None:
        """Refuse an objective that has no such operator."""

    def _require_finite(self, products: Tensor, block: Tensor) -> None:
        """Refuse products of finite vectors that are not finite."""
        if not bool(torch.isfinite(products).all()) and bool(torch.isfinite(block).all()):
            raise ModelError(
                f"{self.objective.names['model']} with loss {self.objective.names['loss']!r}: loss and "
                "gradient are finite and the second derivatives are not, as those of a root or a norm at 0; "
                "keep away from such points, for example by adding a small number under the root"
            )

    def _pieces(self) -> Iterator[Piece]:
        if self._kept is not None:
            return iter(self._kept)
        return _pieces(self.objective, type(self).make_piece, self._size)

    def _sum(self, pieces: Iterator[Piece], block: Tensor) -> Tensor:
        """Sum of the pieces' products with ``block`` [R, b, d], float64."""
        total = torch.zeros(block.shape, dtype=torch.float64, device=self.device)
        for piece in pieces:
            for i, vectors in enumerate(block.unbind(1)):
                total[:, i] += piece.product(vectors)
            del piece  # its graph is gone before the next one is built
        return total

    def _first_pass(self) -> tuple[Tensor, Tensor]:
        """Losses [R] and gradient [R, d] in float64; keeps the pieces unless they are to be recomputed."""
        losses = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        gradient = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        kept = []
        for piece in self._pieces():
            losses += piece.losses
            gradient += piece.gradient
            if self.mode != "recompute":
                kept.append(piece)
            del piece
        if self.mode != "recompute":
            self._kept = kept
        return losses, gradient

    def _keep_linearized(self) -> None:
        """Linearise, and go on with double backward where that fails or disagrees."""
        probe = torch.randn(
            self.shape, generator=generator(0, "linearized"), device="cpu", dtype=torch.float64
        )
        block = probe[:, None].to(self.device, self.dtype)
        make_piece = type(self).make_piece
        expected = self._sum(_pieces(self.objective, make_piece, self._size), block)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.fx, on its own graphs
                self._kept = list(_pieces(self.objective, make_piece, self._size, linearized=True))
            products = self._sum(iter(self._kept), block)
            error = torch.linalg.vector_norm(products - expected, dim=-1)
            agrees = error <= AGREEMENT[self.dtype] * torch.linalg.vector_norm(expected, dim=-1)
        except Exception as error:  # torch.func fails in many ways, with no common type
            if is_out_of_memory(error):
                raise
            agrees = torch.zeros(1, dtype=torch.bool, device="cpu")
        if not bool(agrees.all()):
            self._kept = None
            self.mode = plan_products(self.objective, "auto", make_piece).mode

    def _block(self, vectors: Tensor) -> Tensor:
        """``vectors`` as [R, b, d]."""
        n_members, dim = self.shape
        if vectors.ndim not in (2, 3) or (vectors.shape[0], vectors.shape[-1]) != self.shape:
            raise ValueError(
                f"vectors: found {list(vectors.shape)}; allowed: [{n_members}, {dim}] or "
                f"[{n_members}, b, {dim}]"
            )
        return vectors if vectors.ndim == 3 else vectors[:, None]

    def _masked(self, values: Tensor) -> Tensor:
        """``values`` [R, ...] with NaN in the rows of dead members."""
        return values.masked_fill(self.objective.dead.view(-1, *[1] * (values.ndim - 1)), float("nan"))


class PackedHessian(ObjectiveOperator):
    """The Hessians of the mean losses."""

    make_piece = staticmethod(hessian_piece)
    trials = (gradient_trial,)


class PackedGaussNewton(ObjectiveOperator):
    """J' (d2 loss / d outputs2) J: the Hessians of the losses of the linearised networks."""

    make_piece = staticmethod(gauss_newton_piece)
    trials = (output_trial, slope_trial)

    def _check(self) -> None:
        _require_loss(self.objective, "Gauss-Newton needs the outputs and the loss apart")


class PackedFisher(ObjectiveOperator):
    """The empirical Fisher: the mean of g_n g_n' over the examples, g_n the gradient of example n's loss."""

    make_piece = staticmethod(fisher_piece)
    trials = (output_trial, example_trial)

    def _check(self) -> None:
        _require_loss(self.objective, "the empirical Fisher needs the loss of each example")
        if self.objective.coupled:
            raise ModelError(
                f"batch norm in train mode ({', '.join(self.objective.coupled)}) mixes the examples of a "
                "batch, so that no example has a gradient of its own: the empirical Fisher needs train=False"
            )
        require_example_mean(self.objective, purpose="the gradient of each example", alone=True)


@contextmanager
def _differentiating(objective: Objective) -> Iterator[None]:
    """Exact products, and a ModelError for whatever a user's model or loss cannot do."""
    try:
        with exact_products(objective.device, recurrent=objective.recurrent):
            yield
    except (LossrayError, ValueError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{objective.names['model']} with loss {objective.names['loss']!r}: differentiating it twice "
            f"failed: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What failed; where torch's text does not say what to do about it, that."""
    if "backward through the graph a second time" in str(error):
        return (
            "the model or its loss calls backward() or autograd.grad without create_graph=True, which frees "
            "the graph: pass create_graph=True there, or train=True if it does so in train mode alone"
        )
    return failure(error)


def _pieces(
    objective: Objective, make_piece: PieceMaker, size: int | None, *, linearized: bool = False
) -> Iterator[Piece]:
    """The pieces of all batches, of ``size`` examples at most."""
    for batch in objective.batches():
        for part in batch.split(size):
            yield make_piece(objective, part, linearized=linearized)


def _require_loss(objective: Objective, reason: str) -> None:
    if getattr(objective, "closure", None) is not None:
        raise ModelError(
            f"closure {objective.names['loss']!r}: {reason}, and a closure returns the mean loss alone; pass "
            "loss(outputs, targets) and data, or take the Hessian"
        )
