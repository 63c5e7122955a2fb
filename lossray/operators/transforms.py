"""Packed operators in other coordinates: scaled, preconditioned, restricted to some parameters."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor

from lossray.errors import ModelError
from lossray.names import nearest
from lossray.networks.layout import Layout
from lossray.operators.products import error_norms
from lossray.spectra.operator import PackedOperator

SHOWN_NAMES = 8  # parameters that a message lists


class PointOperator(PackedOperator, Protocol):
    """A packed operator at a point whose loss and gradient are known; see `ObjectiveOperator`."""

    @property
    def losses(self) -> Tensor:
        """Mean losses [R], float64; NaN for dead members."""

    @property
    def gradient(self) -> Tensor:
        """Gradients [R, d], float64."""

    @property
    def layout(self) -> Layout:
        """How d divides into the parameters."""

    @property
    def mode(self) -> str:
        """How the products are formed."""

    @property
    def matvecs(self) -> int:
        """Products so far."""

    @property
    def derivative_error(self) -> Tensor:
        """How far autograd's derivatives are from a finite difference, relative, [R]; NaN if unknown."""

    def difference(self, vectors: Tensor) -> Tensor:
        """Products minus those in float64, [R, d] or [R, b, d]."""

    def product_error(self, vectors: Tensor) -> Tensor:
        """How far the products with unit vectors [R, d] are from those in float64, [R]."""


class PackedScaled:
    """S A S with S = diag s: A in the coordinates theta = S x.

    Its gradient is S g, by the chain rule; everything else is the operator's own.

    Args:
        operator: A, R operators of size d.
        scale: s, [R, d] or [d]; zeros are allowed.

    Raises:
        ValueError: another shape, or values of a living member that are not finite.
    """

    def __init__(self, operator: PointOperator, scale: Tensor) -> None:
        self.operator = operator
        self.scale = _checked_scale(operator, scale)  # [R, d] float64
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.losses, self.layout, self.mode = operator.losses, operator.layout, operator.mode
        self.gradient = self.scale * operator.gradient

    @property
    def matvecs(self) -> int:
        """Products so far, of the operator underneath."""
        return self.operator.matvecs

    @property
    def derivative_error(self) -> Tensor:
        """That of the operator underneath, [R]; see `ObjectiveOperator`."""
        return self.operator.derivative_error

    def apply(self, vectors: Tensor) -> Tensor:
        """The products with ``vectors`` [R, d] or [R, b, d], float64."""
        scale = self.scale if vectors.ndim == 2 else self.scale[:, None]
        return scale * self.operator.apply(scale * vectors.to(scale))

    def difference(self, vectors: Tensor) -> Tensor:
        """Products minus those in float64; see `ObjectiveOperator.difference`."""
        scale = self.scale if vectors.ndim == 2 else self.scale[:, None]
        return scale * self.operator.difference(scale * vectors.to(scale))

    def product_error(self, vectors: Tensor) -> Tensor:
        """|(A - A64) v| of every member [R] for ``vectors`` [R, d]; see `ObjectiveOperator`."""
        return error_norms(self, vectors)


class PackedPreconditioned(PackedScaled):
    """D^-1/2 A D^-1/2, the curvature that an optimizer with preconditioner D meets.

    Args:
        operator: A, R operators of size d.
        scale: the diagonal of D, [R, d] or [d], above zero; infinite where the optimizer moves nothing.

    Raises:
        ValueError: another shape, or values of a living member that are not above zero.
    """

    def __init__(self, operator: PointOperator, scale: Tensor) -> None:
        diagonal = _filled_scale(operator, scale)
        if not bool((diagonal > 0).all()):
            raise ValueError(
                f"scale: found {float(diagonal.min()):.3g}; allowed: above zero, as the diagonal of D is in "
                "D^-1/2 H D^-1/2 (Scaled takes any numbers)"
            )
        super().__init__(operator, diagonal.rsqrt())


class PackedRestricted:
    """The block of an operator that belongs to some of the parameters.

    Args:
        operator: R operators of size d.
        names: parameters by name or glob, such as ``["blocks.0.*", "output.weight"]``; they stand in the
            order of the layout, whatever the order here.

    Raises:
        ModelError: a name or glob that no parameter matches.
    """

    def __init__(self, operator: PointOperator, names: Iterable[str]) -> None:
        self.operator = operator
        layout = operator.layout
        chosen = select_parameters(layout, names)
        self.index = _positions(layout, chosen).to(operator.device)  # [d of the block]
        self.layout = Layout(
            names=tuple(layout.names[i] for i in chosen),
            shapes=tuple(layout.shapes[i] for i in chosen),
            roles=tuple(layout.roles[i] for i in chosen),
        )
        self.shape = (operator.shape[0], len(self.index))
        self.dtype, self.device = operator.dtype, operator.device
        self.losses, self.mode = operator.losses, operator.mode
        self.gradient = operator.gradient[:, self.index]

    @property
    def matvecs(self) -> int:
        """Products so far, of the operator underneath."""
        return self.operator.matvecs

    @property
    def derivative_error(self) -> Tensor:
        """That of the operator underneath, [R]; see `ObjectiveOperator`."""
        return self.operator.derivative_error

    def apply(self, vectors: Tensor) -> Tensor:
        """The products with ``vectors`` [R, d] or [R, b, d], float64."""
        return self.operator.apply(self._embedded(vectors))[..., self.index]

    def difference(self, vectors: Tensor) -> Tensor:
        """Products minus those in float64; see `ObjectiveOperator.difference`."""
        return self.operator.difference(self._embedded(vectors))[..., self.index]

    def product_error(self, vectors: Tensor) -> Tensor:
        """|(A - A64) v| of every member [R] for ``vectors`` [R, d]; see `ObjectiveOperator`."""
        return error_norms(self, vectors)

    def _embedded(self, vectors: Tensor) -> Tensor:
        """``vectors`` with zeros for the other parameters."""
        if vectors.ndim not in (2, 3) or (vectors.shape[0], vectors.shape[-1]) != self.shape:
            raise ValueError(f"vectors: found {list(vectors.shape)}; allowed: {list(self.shape)}, or a block")
        full = torch.zeros(
            (*vectors.shape[:-1], self.operator.shape[1]), dtype=torch.float64, device=self.device
        )
        full[..., self.index] = vectors.to(full)
        return full


def select_parameters(layout: Layout, names: Iterable[str]) -> list[int]:
    """Indices in ``layout`` of the parameters that match a name or glob, in the order of the layout.

    Raises:
        ModelError: one that no parameter matches, or none given.
    """
    patterns = [names] if isinstance(names, str) else list(names)
    chosen: set[int] = set()
    for pattern in patterns:
        matches = {i for i, name in enumerate(layout.names) if name == pattern or fnmatchcase(name, pattern)}
        if not matches:
            guess = nearest(pattern, layout.names)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise ModelError(f"no parameter matches {pattern!r}; there are {_listed(layout.names)}{hint}")
        chosen |= matches
    if not chosen:
        raise ModelError(f"no parameter was named; there are {_listed(layout.names)}")
    return sorted(chosen)


def _positions(layout: Layout, chosen: Sequence[int]) -> Tensor:
    """Places of the chosen parameters' elements on the last axis of theta."""
    starts = [sum(layout.sizes[:i]) for i in chosen]
    parts = [
        torch.arange(start, start + layout.sizes[i], device="cpu")
        for start, i in zip(starts, chosen, strict=True)
    ]
    return torch.cat(parts)


def _checked_scale(operator: PointOperator, scale: Tensor) -> Tensor:
    """``scale`` as [R, d] in float64, with ones for dead members."""
    values = _filled_scale(operator, scale)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("scale: found values that are not finite; allowed: finite numbers")
    return values


def _filled_scale(operator: PointOperator, scale: Tensor) -> Tensor:
    """Likewise, finite or not."""
    scale = torch.as_tensor(scale)
    if scale.shape != operator.shape and scale.shape != operator.shape[1:]:
        raise ValueError(
            f"scale: found the shape {list(scale.shape)}; allowed: {list(operator.shape)} or "
            f"{list(operator.shape[1:])}"
        )
    alive = torch.isfinite(operator.losses)[:, None]
    values = scale.detach().to(operator.device, torch.float64).expand(operator.shape)
    return torch.where(alive, values, torch.ones_like(values))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_NAMES])
    return shown if len(names) <= SHOWN_NAMES else f"{shown}, ... ({len(names)} in all)"
