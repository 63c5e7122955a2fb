"""What a symmetric operator is: R of one size applied to R vectors at once; or one, a pack of one member."""

from typing import Protocol

import torch
from torch import Tensor

from lossray.errors import StudyError


class PackedOperator(Protocol):
    """R symmetric operators of one size, applied to one vector each, or to b."""

    @property
    def shape(self) -> tuple[int, int]:
        """R and d."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the products: the level of their rounding."""

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""

    def apply(self, vectors: Tensor) -> Tensor:
        """The products with ``vectors`` [R, d] or [R, b, d], float64, of the same shape.

        Those of member r depend on its own vectors alone.
        """


class CurvatureOperator(PackedOperator, Protocol):
    """A packed operator that knows its losses and gradients too."""

    @property
    def losses(self) -> Tensor:
        """Mean losses [R], float64."""

    @property
    def gradient(self) -> Tensor:
        """Gradients [R, d], float64."""

    @property
    def derivative_error(self) -> Tensor:
        """How far autograd's derivatives are from a finite difference, relative, [R]; NaN if unknown."""

    def product_error(self, vectors: Tensor) -> Tensor:
        """How far the products with unit vectors [R, d] are from those in float64, [R]."""


class SingleOperator(Protocol):
    """What `lossray.Hessian` and the other operators of one model are."""

    @property
    def packed(self) -> CurvatureOperator:
        """The operator as a pack of one member."""


def packed_of(operator: SingleOperator) -> CurvatureOperator:
    """The operator as a pack of one member.

    Raises:
        StudyError: it is no operator of lossray's.
    """
    packed = getattr(operator, "packed", None)
    if packed is None:
        raise StudyError(
            f"operator: found {type(operator).__name__}; allowed: lossray.Hessian(model, loss, data), "
            "GaussNewton, EmpiricalFisher, or one of these Restricted, Scaled or Preconditioned"
        )
    return operator.packed
