"""How many eigenvalues are zero: counts below thresholds, a noise floor, and a rank where a gap supports one.

All eigenvalues of a matrix that is formed in float64 where it is small enough; otherwise the counts of a
stochastic quadrature, which resolves nothing far below the largest eigenvalue (theory 5B).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.memory import require_bytes
from lossray.operators.objectives import Batch, PackedObjective
from lossray.spectra.certified_pairs import PRODUCTS_AT_ONCE
from lossray.spectra.density import packed_density
from lossray.spectra.estimates import PackedEstimate, jackknife
from lossray.spectra.operator import PackedOperator

GAP = 1e3  # smallest ratio of neighbouring eigenvalues that supports a rank, whatever their rounding
SHARP = 1e-3  # largest noise floor, as a share of |lambda|max, beside which there is a rank
SAFETY = 10  # of the noise floor over the errors that were observed
GRID = tuple(10.0**-power for power in range(1, 15))  # thresholds, as shares of |lambda|max
FLOAT32_GRID = GRID[:6]  # what products in float32 can tell
QUADRATURE_GRID = GRID[:2]  # what a quadrature of 64 nodes resolves
POWER_STEPS = 40  # for the norm of the asymmetry
MATRICES = 4  # of the size of the operator that a dense solve holds at a time


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues of one matrix, and what is too small to be told from zero.

    Attributes:
        values: [d] float64, by ascending |lambda|.
        noise_floor: an eigenvalue of this size or less cannot be told from zero.
        dtype: of the products that it was made from.
    """

    values: Tensor
    noise_floor: float
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        """|lambda|max."""
        return float(self.values[-1].abs()) if len(self.values) else 0.0


@dataclass(frozen=True)
class Count:
    """The eigenvalues below one threshold.

    Attributes:
        tau: the threshold as a share of |lambda|max.
        threshold: in the units of the eigenvalues.
        at_noise_floor: whether it is the noise floor.
        nullity: number of |lambda| <= threshold.
        stderr: its standard error; 0 where all eigenvalues are known.
        gap: smallest |lambda| above the threshold over the largest below; NaN where it is not known.
        rank: eigenvalues above, where the gap supports it.
        rank_at_least: eigenvalues that are known to exceed the threshold.
    """

    tau: float
    threshold: float
    at_noise_floor: bool
    nullity: float
    stderr: float
    gap: float
    rank: int | None
    rank_at_least: int


def dense_matrices(operator: PackedOperator) -> Tensor:
    """The matrices [R, d, d] of R operators, float64, as their products give them: not symmetrised.

    Raises:
        ResourceError: they would not fit.
    """
    n_members, dim = operator.shape
    require_bytes(
        MATRICES * 8 * n_members * dim**2,
        operator.device,
        what=f"all eigenvalues of {n_members} x {dim:,} parameters",
        remedy="use a smaller model, or [degeneracy] dense_up_to below its size",
    )
    identity = torch.eye(dim, dtype=torch.float64, device=operator.device)
    parts = [operator.apply(rows.expand(n_members, -1, -1)) for rows in identity.split(PRODUCTS_AT_ONCE)]
    return torch.cat(parts, dim=1)


def spectrum_of(matrix: Tensor, dtype: torch.dtype, null_vectors: Tensor | None = None) -> Spectrum | None:
    """All eigenvalues of one matrix; None where it is not finite.

    The noise floor is 10 max(|Hv|/|v| over vectors that are known to be null, |H - H'|_2, eps |lambda|max).

    Args:
        matrix: [d, d] float64, not symmetrised.
        dtype: of the products that it was made from.
        null_vectors: [n, d] vectors that are known to be null.
    """
    if not bool(torch.isfinite(matrix).all()):
        return None
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    values = values[values.abs().argsort()]
    errors = [torch.finfo(dtype).eps * float(values[-1].abs()), skew_norm(matrix)]
    if null_vectors is not None and len(null_vectors):
        images = torch.linalg.vector_norm(null_vectors @ matrix.T, dim=1)
        errors.append(float((images / torch.linalg.vector_norm(null_vectors, dim=1)).max()))
    return Spectrum(values, SAFETY * max(errors), dtype)


def skew_norm(matrix: Tensor) -> float:
    """|A - A'|_2, by power iteration on its square from a fixed vector."""
    skew = matrix - matrix.T
    if not bool((skew != 0).any()):
        return 0.0
    vector = torch.linspace(1, 2, len(skew), dtype=skew.dtype, device=skew.device)
    size = 0.0
    for _ in range(POWER_STEPS):
        vector = skew @ (vector / torch.linalg.vector_norm(vector))
        size = max(size, float(torch.linalg.vector_norm(vector)))
        if size == 0:
            break
    return size


def counts_of(spectrum: Spectrum) -> list[Count]:
    """The counts at the noise floor and at all thresholds of the grid above it, in descending order."""
    grid = FLOAT32_GRID if spectrum.dtype == torch.float32 else GRID
    if spectrum.scale == 0:
        return [_count(spectrum, 0.0, at_noise_floor=True)]
    floor = spectrum.noise_floor / spectrum.scale
    counts = [_count(spectrum, tau, at_noise_floor=False) for tau in grid if tau > floor]
    return [*counts, _count(spectrum, floor, at_noise_floor=True)]


def _count(spectrum: Spectrum, tau: float, *, at_noise_floor: bool) -> Count:
    sizes = spectrum.values.abs()
    threshold = spectrum.noise_floor if at_noise_floor else tau * spectrum.scale
    # An eigenvalue that equals the threshold but for rounding counts as below it, on every machine.
    below = int((sizes <= threshold + (0 if at_noise_floor else spectrum.noise_floor)).sum())
    # Where nothing lies below, the errors that make the floor stand in for it.
    lower = float(sizes[below - 1]) if below else spectrum.noise_floor / SAFETY
    upper = float(sizes[below]) if below < len(sizes) else math.nan
    gap = math.inf if lower == 0 and upper > 0 else upper / lower if lower else math.nan
    if below == len(sizes):
        gap = math.inf if at_noise_floor else math.nan  # nothing above the floor: the matrix is zero
    return Count(
        tau=tau,
        threshold=threshold,
        at_noise_floor=at_noise_floor,
        nullity=float(below),
        stderr=0.0,
        gap=gap,
        rank=len(sizes) - below if _is_gap(spectrum, lower, upper) else None,
        rank_at_least=len(sizes) - below,
    )


def _is_gap(spectrum: Spectrum, lower: float, upper: float) -> bool:
    """Whether two neighbouring sizes support a rank however they are rounded.

    What lies below the noise floor is rounding: that it came out smaller than the errors that were observed
    is luck, and another processor's differ. What lies above is known to within the noise floor.
    """
    noise = spectrum.noise_floor
    if spectrum.dtype != torch.float64 or noise > SHARP * spectrum.scale:
        return False
    if spectrum.scale == 0:
        return True  # of a matrix that is zero
    below = lower + noise if lower > noise else max(lower, noise / SAFETY)
    return upper - noise > GAP * below


# ---- quadrature


def quadrature_counts(
    operator: PackedOperator,
    *,
    probes: int,
    steps: int,
    seeds: Sequence[int],
    scales: Sequence[float] | None = None,
    alive: Tensor | None = None,
) -> list[list[Count]]:
    """Counts below coarse thresholds from random probes, for every member; none for a dead one.

    Args:
        operator: R operators.
        probes: random vectors.
        steps: Lanczos steps with each.
        seeds: one per member.
        scales: |lambda|max of every member, where it is known; otherwise the largest node.
        alive: [R] members that take part.
    """
    dim = operator.shape[1]
    density = packed_density(operator, probes=probes, steps=steps, seeds=seeds, alive=alive)
    members: list[list[Count]] = []
    for r in range(operator.shape[0]):
        nodes, weights = density.nodes[r].abs(), density.weights[r]
        if not bool(torch.isfinite(nodes).all()):
            members.append([])
            continue
        scale = float(nodes[weights > 0].max()) if scales is None else scales[r]
        members.append(
            [
                _quadrature_count(nodes, weights, tau, scale, dim, density.exact, operator.dtype)
                for tau in QUADRATURE_GRID
            ]
        )
    return members


def _quadrature_count(
    nodes: Tensor, weights: Tensor, tau: float, scale: float, dim: int, exact: bool, dtype: torch.dtype
) -> Count:
    below = (nodes <= (tau + SAFETY * torch.finfo(dtype).eps) * scale) & (weights > 0)
    shares = dim * torch.where(below, weights, 0).sum(dim=1)  # [probes]
    estimate: PackedEstimate = jackknife(shares.view(1, -1, 1), exact=exact)
    # Ritz values interlace the eigenvalues: as many of these exceed the threshold, and of a full set all do.
    above = int((~below & (weights > 0)).sum(dim=1).max())
    return Count(
        tau=tau,
        threshold=tau * scale,
        at_noise_floor=False,
        nullity=float(estimate.value[0]),
        stderr=float(estimate.stderr[0]),
        gap=math.nan,
        rank=None,
        rank_at_least=above,
    )


def gram_counts(objective: PackedObjective) -> list[list[Count]]:
    """The counts of Gauss-Newton matrices of any size d, from their [N C, N C] Gram matrices.

    G = J' M J with M the loss's Hessian in the outputs, block-diagonal over examples. Where M = B B' its
    non-zero eigenvalues are those of B' J J' B; the rank is at most N C, under cross entropy N (C - 1).

    Args:
        objective: R members, of a loss that is convex in the outputs, in float64.
    """
    dim = objective.theta.shape[1]
    members = []
    for r in range(objective.theta.shape[0]):
        factor = _factor(objective, r)
        values = torch.linalg.eigvalsh(factor @ factor.T)
        full = torch.zeros(max(dim, len(values)), dtype=torch.float64, device="cpu")
        full[: len(values)] = values.cpu()
        full = full[full.abs().argsort()][-dim:]
        scale = float(full[-1].abs())
        eps = torch.finfo(torch.float64).eps
        members.append(counts_of(Spectrum(full, SAFETY * eps * scale, torch.float64)))
    return members


def _factor(objective: PackedObjective, r: int) -> Tensor:
    """B' J of one member, [N C, d]: the square root of the Gauss-Newton matrix."""
    parts = []
    for batch in objective.batches():
        theta = objective.theta.detach()[r : r + 1].requires_grad_()
        alone = objective.member(r)
        outputs = alone.outputs(theta, batch)[0]  # [N, C]
        jacobian = torch.stack(
            [
                torch.autograd.grad(value, theta, retain_graph=True, materialize_grads=True)[0][0]
                for value in outputs.flatten()
            ]
        ).view(*outputs.shape, -1)
        roots = _output_roots(alone, outputs.detach(), batch) * batch.share**0.5
        parts.append(torch.einsum("nij,nid->njd", roots, jacobian).flatten(0, 1))
    return torch.cat(parts)


def _output_roots(objective: PackedObjective, outputs: Tensor, batch: Batch) -> Tensor:
    """B [N, C, C] with B B' the Hessian of the mean loss in the outputs of each example."""
    leaf = outputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective.losses_of(leaf[None], batch).sum(), leaf, create_graph=True)
    columns = [
        torch.autograd.grad(slope[:, c].sum(), leaf, retain_graph=True, materialize_grads=True)[0]
        for c in range(outputs.shape[1])
    ]
    values, vectors = torch.linalg.eigh(torch.stack(columns, dim=2))
    roots: Tensor = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return roots


class MatrixOperator:
    """R matrices [R, d, d] as a packed operator: a quadrature on them can be held against the truth."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = (matrices + matrices.mT) / 2
        self.shape = (matrices.shape[0], matrices.shape[1])
        self.dtype, self.device = matrices.dtype, matrices.device

    def apply(self, vectors: Tensor) -> Tensor:
        """The products with ``vectors`` [R, d] or [R, b, d]."""
        block = vectors if vectors.ndim == 3 else vectors[:, None]
        return (block.to(self.matrices) @ self.matrices).view(vectors.shape)
