"""Spectral densities by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017), deflated by known pairs.

The quadrature of a random unit vector outside n known eigenvectors stands for the d - n eigenvalues that are
left; each known one stands for itself with weight 1/d. Hence the sampling error comes from the rest of the
spectrum alone, and the outliers have no error but their residual.

Nodes and weights are kept as they are; smoothing is done when a curve is asked for.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.errors import StudyError
from lossray.seeds import stream
from lossray.spectra.brackets import MOST_RULES, rules
from lossray.spectra.dense import DenseSpectra, dense_spectra
from lossray.spectra.eigensolver import living_members
from lossray.spectra.estimates import PackedEstimate, jackknife
from lossray.spectra.lanczos import KrylovPass
from lossray.spectra.operator import PackedOperator
from lossray.spectra.quadrature import Probing, Quadrature
from lossray.spectra.summary import Summarised, density_summary

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
_Rule = tuple[Quadrature, Array, Array]  # of whose products, nodes [m], weights [probes, m]


@dataclass(frozen=True, repr=False)
class SpectralDensity(Summarised):
    """The eigenvalue distribution of one operator; it prints as a histogram.

    Attributes:
        nodes: [probes, n] float64; each row of nodes and weights is a probe's estimate.
        weights: [probes, n], each row sums to 1; 0 for padding.
        exact: whether the nodes are all eigenvalues.
        dim: number of eigenvalues d.
    """

    nodes: Tensor
    weights: Tensor
    exact: bool
    dim: int

    def summary(self) -> str:
        """A histogram of the eigenvalues."""
        return density_summary(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row per node of each probe in ascending order, with columns of the table `density`."""
        import pandas as pd

        order = self.nodes.argsort(dim=1, stable=True)
        nodes, weights = self.nodes.gather(1, order), self.weights.gather(1, order)
        used = weights > 0  # padding has no weight
        indices = used.cumsum(dim=1) - 1
        probes = torch.arange(len(nodes), device=nodes.device)[:, None].expand_as(nodes)
        columns = {"probe": probes, "index": indices, "node": nodes, "weight": weights}
        return pd.DataFrame({name: column[used].tolist() for name, column in columns.items()})

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
class PackedDensity:
    """The eigenvalue distributions of R members of size d; NaN for a dead member.

    Attributes:
        nodes: [R, probes, n] float64, padded by nodes of weight 0.
        weights: [R, probes, n] float64, each row sums to 1.
        dim: d, the number of eigenvalues.
        exact: whether the nodes are all eigenvalues.
        deflation_error: [R] bound of the sum of what the eigenvalues are off by, in the sense of
            `Quadrature`.
        others: from the same products by other rules (brackets.py); empty where there are none.
    """

    nodes: Tensor
    weights: Tensor
    dim: int
    exact: bool
    deflation_error: Tensor
    others: tuple["PackedDensity", ...] = ()

    def sums(self, *functions: Callable[[Tensor], Tensor]) -> Tensor:
        """Each probe's estimates of sum_i f(lambda_i), [R, probes, number of functions]."""
        values = [(self.weights * function(self.nodes)).sum(dim=2) for function in functions]
        return self.dim * torch.stack(values, dim=2)

    def estimate(
        self,
        *functions: Callable[[Tensor], Tensor],
        of: Callable[[Tensor], Tensor] = lambda means: means[..., 0],
        slopes: Sequence[float] | None = None,
    ) -> PackedEstimate:
        """A function ``of`` the sums over all eigenvalues of the given functions.

        Its value is that of the mean of the Gauss rule and the one with a node at 0; all rules, and the error
        of the deflation, lie within its bound.

        Args:
            functions: of the nodes.
            of: of the sums [..., number of functions].
            slopes: the largest of each function; 0 by default, for what the deflation does not change.
        """
        sums = self.sums(*functions)
        means = [sums.mean(dim=1), *(other.sums(*functions).mean(dim=1) for other in self.others)]
        if self.others:
            sums = (sums + self.others[0].sums(*functions)) / 2
        estimate = jackknife(sums, of, exact=self.exact)
        off = (
            torch.tensor(slopes or [0.0] * len(functions), device="cpu").to(sums)
            * self.deflation_error[:, None]
        )
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(functions))), device="cpu").to(
            sums
        )
        means += [sums.mean(dim=1) + sign * off for sign in signs]
        errors = torch.stack([(of(mean) - estimate.value).abs() for mean in means])
        rules = errors[: -len(signs)].amax(dim=0)
        return replace(estimate, bound=rules + errors[-len(signs) :].amax(dim=0))

    def relative(self, unit: Tensor) -> "PackedDensity":
        """The densities of the operators divided by ``unit`` [R]."""
        return replace(
            self,
            nodes=self.nodes / unit[:, None, None],
            deflation_error=self.deflation_error / unit,
            others=tuple(other.relative(unit) for other in self.others),
        )

    def member(self, r: int) -> SpectralDensity:
        """The density of one member."""
        return SpectralDensity(self.nodes[r], self.weights[r], self.exact, self.dim)


def packed_density(
    operator: PackedOperator,
    *,
    probes: int,
    steps: int,
    seeds: Sequence[int],
    alive: Tensor | None = None,
) -> PackedDensity:
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
    quadratures = [member.quadrature for member in single.run()]
    return densities(
        [quadratures[r * probes : (r + 1) * probes] for r in range(n_members)], dim, operator.device
    )


def check_density(probes: int, steps: int) -> None:
    """Refuse impossible numbers.

    Raises:
        StudyError: naming the argument.
    """
    for name, value in (("probes", probes), ("steps", steps)):
        if value < 1:
            raise StudyError(f"{name}: found {value}; allowed: a whole number from 1")


def exact_densities(spectra: DenseSpectra) -> PackedDensity:
    """All eigenvalues, each of weight 1/d."""
    nodes = spectra.values[:, None]
    dim = nodes.shape[2]
    weights = torch.where(nodes.isnan(), nodes, 1 / dim)
    return PackedDensity(nodes, weights, dim, exact=True, deflation_error=torch.zeros_like(nodes[:, 0, 0]))


def densities(
    quadratures: Sequence[Sequence[Quadrature | None]], dim: int, device: torch.device
) -> PackedDensity:
    """The densities that quadratures stand for.

    Args:
        quadratures: of every member, one or several; the probes of a block share one.
        dim: size of the operators.
        device: where the result is to live.
    """
    members = [[None if q is None else (q, q.nodes, q.weights) for q in member] for member in quadratures]
    return _densities(members, dim, device)


def bracketed_densities(
    quadratures: Sequence[Quadrature | None], dim: int, device: torch.device
) -> PackedDensity:
    """The densities of one block of probes for each member, with the other rules that its products allow."""
    extra_rules = [[] if q is None else list(rules(q)) for q in quadratures]
    others = []
    for i in range(MOST_RULES):
        members = [
            [None if q is None else (q, *(extra[i] if i < len(extra) else (q.nodes, q.weights)))]
            for q, extra in zip(quadratures, extra_rules, strict=True)
        ]
        others.append(_densities(members, dim, device))
    return replace(densities([[q] for q in quadratures], dim, device), others=tuple(others))


def _densities(members: Sequence[Sequence[_Rule | None]], dim: int, device: torch.device) -> PackedDensity:
    """Of every member one rule, or several with the same vectors locked."""
    measures = [_measure(member, dim) for member in members]
    living = [nodes for nodes, _ in measures if nodes is not None]
    shape = (
        max((len(nodes) for nodes in living), default=1),
        max((nodes.shape[1] for nodes in living), default=1),
    )
    rows = [_padded(nodes, weights, shape) for nodes, weights in measures]
    nodes, weights = (torch.stack(tensors).to(device) for tensors in zip(*rows, strict=True))
    errors = [float("nan") if member[0] is None else member[0][0].deflation_error for member in members]
    deflation_error = torch.tensor(errors, dtype=torch.float64, device=device)
    return PackedDensity(nodes, weights, dim, exact=False, deflation_error=deflation_error)


def trace_estimate(quadratures: Sequence[Quadrature | None], unit: Tensor) -> PackedEstimate:
    """The traces of R members from the quadratures of one probing round; None stands for a dead member.

    Args:
        quadratures: one per member.
        unit: [R] in which the estimates neither overflow nor vanish.
    """
    samples = _samples([None if q is None else q.traces for q in quadratures]).to(unit.device)
    return jackknife((samples / unit[:, None])[:, :, None]).times(unit)


def frobenius_estimate(quadratures: Sequence[Quadrature | None], dim: int, unit: Tensor) -> PackedEstimate:
    """The Frobenius norms; arguments as in `trace_estimate`, and the size of the operators."""
    rows: list[Array | None] = []
    for quadrature, size in zip(quadratures, unit.tolist(), strict=True):
        if quadrature is None:
            rows.append(None)
            continue
        deflated = np.square(quadrature.deflated / size).sum()
        rows.append(
            deflated + (dim - len(quadrature.deflated)) * quadrature.squares * (quadrature.unit / size) ** 2
        )
    estimate = jackknife(_samples(rows).to(unit.device)[:, :, None], lambda means: means[..., 0].sqrt())
    # At most 2 |lambda|max times what the eigenvalues are off by, in the squares.
    errors = [float("nan") if q is None else q.deflation_error for q in quadratures]
    off = 2 * torch.tensor(errors, dtype=torch.float64, device=unit.device) / unit
    bound = off / (2 * estimate.value).masked_fill(estimate.value == 0, 1)
    return replace(estimate, bound=bound).times(unit)


def _samples(rows: Sequence[Array | None]) -> Tensor:
    """[R, n]; NaN for what is missing."""
    n = max((len(row) for row in rows if row is not None), default=1)
    return torch.stack(
        [
            torch.full((n,), float("nan"), dtype=torch.float64, device="cpu")
            if row is None
            else torch.from_numpy(row)
            for row in rows
        ]
    )


def _measure(rules: Sequence[_Rule | None], dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Nodes and weights [probes, n] of one member; None where it has none."""
    rows = []
    for rule in rules:
        if rule is None:
            return None, None
        deflated = torch.from_numpy(rule[0].deflated)
        rest = (dim - len(deflated)) / dim
        for weights in torch.from_numpy(rule[2]):
            nodes = torch.cat([deflated, torch.from_numpy(rule[1])])
            rows.append((nodes, torch.cat([torch.full_like(deflated, 1 / dim), rest * weights])))
    longest = max(len(nodes) for nodes, _ in rows)
    padded = [_padded(nodes[None], weights[None], (1, longest)) for nodes, weights in rows]
    return torch.cat([nodes for nodes, _ in padded]), torch.cat([weights for _, weights in padded])


def _padded(nodes: Tensor | None, weights: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Filled up with copies of the last node, of weight 0; NaN where there is nothing."""
    if nodes is None or weights is None:
        missing = torch.full(shape, float("nan"), dtype=torch.float64, device="cpu")
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
