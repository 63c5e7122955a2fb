"""Spectral densities by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017), deflated by known pairs.

The quadrature of a random unit vector outside n known eigenvectors stands for the d - n eigenvalues that are
left; each known one stands for itself with weight 1/d. Hence the sampling error comes from the rest of the
spectrum alone, and the outliers have no error but their residual.

Nodes and weights are kept as they are; smoothing is done when a curve is asked for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.curvature.dense import DenseSpectra, dense_spectra
from lossray.curvature.eigensolver import living_members
from lossray.curvature.estimates import Estimate, jackknife
from lossray.curvature.lanczos import KrylovPass
from lossray.curvature.pairs import PackedOperator
from lossray.curvature.quadrature import Probing, Quadrature
from lossray.errors import StudyError
from lossray.seeds import stream


@dataclass(frozen=True)
class SpectralDensity:
    """The eigenvalue distribution of one operator: each row of nodes and weights is a probe's estimate."""

    nodes: Tensor  # [probes, n] float64
    weights: Tensor  # [probes, n], each row sums to 1; 0 for padding
    exact: bool  # whether the nodes are all eigenvalues

    def on_grid(self, points: Tensor, width: float) -> Tensor:
        """The density at ``points`` [p]: a mixture of normal distributions of standard deviation ``width``.

        Returns:
            [p] float64, the mean over the probes; its integral over the real line is 1.

        Raises:
            StudyError: a width that is not positive.
        """
        if not width > 0:
            raise StudyError(f"width: found {width}; allowed: a positive number")
        distances = (points.to(self.nodes)[:, None] - self.nodes.flatten()) / width
        heights = torch.exp(-0.5 * distances.square()) / (width * math.sqrt(2 * math.pi))
        return heights @ self.weights.flatten() / len(self.nodes)


@dataclass(frozen=True)
class Densities:
    """The eigenvalue distributions of R members of size d; NaN for a dead member."""

    nodes: Tensor  # [R, probes, n] float64; padded by nodes of weight 0
    weights: Tensor  # [R, probes, n], each row sums to 1
    dim: int
    exact: bool

    def sums(self, *functions: Callable[[Tensor], Tensor]) -> Tensor:
        """Each probe's estimates of sum_i f(lambda_i), [R, probes, number of functions]."""
        values = [(self.weights * function(self.nodes)).sum(dim=2) for function in functions]
        return self.dim * torch.stack(values, dim=2)

    def estimate(
        self,
        *functions: Callable[[Tensor], Tensor],
        of: Callable[[Tensor], Tensor] = lambda means: means[..., 0],
    ) -> Estimate:
        """A function ``of`` the sums over all eigenvalues of the given functions."""
        return jackknife(self.sums(*functions), of, exact=self.exact)

    def member(self, r: int) -> SpectralDensity:
        """The density of one member."""
        return SpectralDensity(self.nodes[r], self.weights[r], self.exact)


def packed_density(
    operator: PackedOperator,
    *,
    probes: int,
    steps: int,
    seeds: Sequence[int],
    alive: Tensor | None = None,
) -> Densities:
    """The densities of R members, without knowledge of any eigenpair.

    Args:
        operator: R symmetric operators of size d. Where d <= probes * steps the matrix is formed instead.
        probes: random start vectors of each member.
        steps: Lanczos steps, and products, with each.
        seeds: one per member.
        alive: [R] bool; the other members come out as NaN.

    Raises:
        StudyError: an impossible number of probes or steps.
        ResourceError: the bases would not fit the memory.
    """
    check_density(probes, steps)
    n_members, dim = operator.shape
    living = living_members(n_members, alive)
    if dim <= probes * steps:
        return exact_densities(dense_spectra(operator, living))
    single = KrylovPass(
        _ProbesAsMembers(operator, probes),
        (),
        seeds=[stream(seed, "probe", i) for seed in seeds for i in range(probes)],
        tolerance=1.0,
        alive=[flag for flag in living for _ in range(probes)],
        basis=steps + 1,
        max_matvecs=steps,
        probing=Probing(1, steps),
    )
    found = [member.quadrature for member in single.run()]
    return densities([found[r * probes : (r + 1) * probes] for r in range(n_members)], dim, operator.device)


def check_density(probes: int, steps: int) -> None:
    """Refuse impossible numbers.

    Raises:
        StudyError: naming the argument.
    """
    for name, value in (("probes", probes), ("steps", steps)):
        if value < 1:
            raise StudyError(f"{name}: found {value}; allowed: a whole number from 1")


def exact_densities(spectra: DenseSpectra) -> Densities:
    """All eigenvalues, each of weight 1/d."""
    nodes = spectra.values[:, None]
    dim = nodes.shape[2]
    return Densities(nodes, torch.where(nodes.isnan(), nodes, 1 / dim), dim, exact=True)


def densities(
    quadratures: Sequence[Sequence[Quadrature | None]], dim: int, device: torch.device
) -> Densities:
    """The densities that quadratures stand for.

    Args:
        quadratures: of every member, one or several; the probes of a block share one.
        dim: size of the operators.
        device: where the result is to live.
    """
    members = [_measure(own, dim) for own in quadratures]
    known = [nodes for nodes, _ in members if nodes is not None]
    shape = (
        max((len(nodes) for nodes in known), default=1),
        max((nodes.shape[1] for nodes in known), default=1),
    )
    rows = [_padded(nodes, weights, shape) for nodes, weights in members]
    nodes, weights = (torch.stack(tensors).to(device) for tensors in zip(*rows, strict=True))
    return Densities(nodes, weights, dim, exact=False)


def trace_estimate(quadratures: Sequence[Quadrature | None], device: torch.device) -> Estimate:
    """The traces of R members from the quadratures of one probing round; None stands for a dead member."""
    probes = max((len(own.traces) for own in quadratures if own is not None), default=1)
    rows = [
        torch.full((probes,), float("nan"), dtype=torch.float64)
        if own is None
        else torch.from_numpy(own.traces)
        for own in quadratures
    ]
    return jackknife(torch.stack(rows).to(device)[:, :, None])


def _measure(quadratures: Sequence[Quadrature | None], dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Nodes and weights [probes, n] of one member; None where it has none."""
    rows = []
    for quadrature in quadratures:
        if quadrature is None:
            return None, None
        known = torch.from_numpy(quadrature.deflated)
        rest = (dim - len(known)) / dim
        for weights in torch.from_numpy(quadrature.weights):
            nodes = torch.cat([known, torch.from_numpy(quadrature.nodes)])
            rows.append((nodes, torch.cat([torch.full_like(known, 1 / dim), rest * weights])))
    longest = max(len(nodes) for nodes, _ in rows)
    padded = [_padded(nodes[None], weights[None], (1, longest)) for nodes, weights in rows]
    return torch.cat([nodes for nodes, _ in padded]), torch.cat([weights for _, weights in padded])


def _padded(nodes: Tensor | None, weights: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Filled up with copies of the last node, of weight 0; NaN where there is nothing."""
    if nodes is None or weights is None:
        missing = torch.full(shape, float("nan"), dtype=torch.float64)
        return missing, missing
    extra = shape[1] - nodes.shape[1]
    return (
        torch.cat([nodes, nodes[:, -1:].expand(-1, extra)], dim=1),
        torch.nn.functional.pad(weights, (0, extra)),
    )


class _ProbesAsMembers:
    """Each member p times over, so that its probes have bases of their own and share the operator's calls."""

    def __init__(self, operator: PackedOperator, probes: int) -> None:
        self.operator, self.probes = operator, probes
        self.shape = (operator.shape[0] * probes, operator.shape[1])
        self.dtype, self.device = operator.dtype, operator.device

    def apply(self, vectors: Tensor) -> Tensor:
        block = vectors.reshape(self.operator.shape[0], -1, self.shape[1])
        return self.operator.apply(block).reshape(vectors.shape)
