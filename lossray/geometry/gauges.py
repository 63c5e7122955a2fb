"""Gauges: coordinates in which angles are taken (theory 0.2, 2.1, 2.6).

With H~ = S H S a gradient becomes S g and a displacement S^-1 d, so that <g, d> and d'Hd are the same in
every gauge. Treating both alike would turn angles around.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.geometry.direction_kinds import COVECTORS

SMALLEST = 1e-100  # below it S counts as zero: the square of what S^-1 gives could overflow


@dataclass(frozen=True)
class Gauge:
    """Coordinates x = S^-1 theta of R members. Where S is zero a coordinate is dropped.

    Attributes:
        name: "raw", "balanced", "adaptive" or "preconditioned".
        scale: [R, d] float64, S >= 0.
    """

    name: str
    scale: Tensor

    @property
    def dropped(self) -> Tensor:
        """Coordinates in which S is zero, [R] int64."""
        return (self.scale == 0).sum(dim=1)

    @property
    def identity(self) -> bool:
        """Whether the gauge changes nothing."""
        return bool((self.scale == 1).all())

    def covector(self, vectors: Tensor) -> Tensor:
        """Gradients, or momentum buffers, [R, d] in the gauge: S u."""
        return self.scale * vectors.to(self.scale)

    def vector(self, vectors: Tensor) -> Tensor:
        """Displacements [R, d] in the gauge: S^-1 u; zero where S is."""
        kept = self.scale != 0
        return torch.where(kept, vectors.to(self.scale) / torch.where(kept, self.scale, 1), 0)

    def transform(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Directions [R, d] by name, each by its kind."""
        return {
            name: self.covector(vectors) if name in COVECTORS else self.vector(vectors)
            for name, vectors in directions.items()
        }


def raw(theta: Tensor) -> Gauge:
    """The parameters as they are: S = 1, for parameters [R, d]."""
    return Gauge("raw", torch.ones_like(theta, dtype=torch.float64))


def balanced(diagonal: Tensor) -> Gauge:
    """S = D^-1, with D [R, d] the rescaling that makes incoming and outgoing norms equal."""
    return Gauge("balanced", 1 / _sound(diagonal))


def adaptive(theta: Tensor) -> Gauge:
    """S = |theta|: spectrum and angles are the same in every rescaling of units."""
    scale = _sound(theta).abs()
    return Gauge("adaptive", torch.where(scale < SMALLEST, 0, scale))


def preconditioned(scale: Tensor) -> Gauge:
    """S = P^-1/2 with P [R, d] the diagonal of an optimizer's preconditioner.

    An infinite P, of what no step moves, drops a coordinate.
    """
    values = scale.detach().double()
    sound = ~torch.isnan(values).any(dim=1, keepdim=True)
    return Gauge("preconditioned", torch.where(sound, values, 1).rsqrt())


def _sound(values: Tensor) -> Tensor:
    """``values`` in float64, with ones in the rows of members that have diverged."""
    values = values.detach().double()
    return torch.where(torch.isfinite(values).all(dim=1, keepdim=True), values, 1)
