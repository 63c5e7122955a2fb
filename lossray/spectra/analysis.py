"""Everything about R operators from one Krylov pass: pairs at both ends, density, trace and what follows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossray.spectra.certified_pairs import EigenPairs, PackedEigenPairs, certify
from lossray.spectra.dense import dense_spectra
from lossray.spectra.density import (
    PackedDensity,
    SpectralDensity,
    bracketed_densities,
    check_density,
    exact_densities,
    frobenius_estimate,
    trace_estimate,
)
from lossray.spectra.eigensolver import (
    basis_size,
    check_solve,
    is_small,
    living_members,
    most_matvecs,
)
from lossray.spectra.ends import Wanted
from lossray.spectra.estimates import Estimate, PackedEstimate, unit_of
from lossray.spectra.lanczos import KrylovPass, capacity
from lossray.spectra.operator import CurvatureOperator
from lossray.spectra.quadrature import Probing, Quadrature
from lossray.spectra.summary import Summarised, analysis_summary

if TYPE_CHECKING:
    import pandas as pd

# Further probes for the trace, of one product each, where a density takes many. With few of them Student's t
# intervals would miss the trace too often where the rest of the spectrum has a low rank.
TRACES_PER_PROBE, FEWEST_TRACES = 4, 16
RESOLVED_SHARE = 1e-2  # of |lambda|max: about what a quadrature of 64 nodes resolves (theory 4)


@dataclass(frozen=True, repr=False)
class Analysis(Summarised):
    """One operator at one point; it prints as a dozen lines.

    Attributes:
        pairs: the largest, ``top`` of them.
        smallest: the algebraically smallest.
        ipr: [top] inverse participation ratios sum v_i^4 of the largest: 1/d spread, 1 localised.
        product_error: |(H - H in float64) v|, v the top vector; NaN where float64 does not work.
        derivative_error: of autograd against a finite difference, relative; NaN where it cannot be told.
        density: the distribution of all eigenvalues.
        trace: the sum of the eigenvalues.
        frobenius: the Frobenius norm.
        negative_mass: sum of |lambda| over negative eigenvalues, over the sum over all.
        participation: (sum |lambda|)^2 / sum lambda^2.
        effective_dimension: sum of lambda / (lambda + regulariser) over positive lambda.
        regulariser: a hundredth of |lambda|max.
        matvecs: products, all told.
        loss: the mean loss.
        gradient: [d] float64.
        gradient_norm: its length.
    """

    pairs: EigenPairs
    smallest: EigenPairs
    ipr: Tensor
    product_error: float
    derivative_error: float
    density: SpectralDensity
    trace: Estimate
    frobenius: Estimate
    negative_mass: Estimate
    participation: Estimate
    effective_dimension: Estimate
    regulariser: float
    matvecs: int
    loss: float
    gradient: Tensor
    gradient_norm: float

    def summary(self) -> str:
        """The outermost eigenvalues, and the sums over all of them."""
        return analysis_summary(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row with columns of the table `curvature`.

        ``.pairs``, ``.smallest`` and ``.density`` have tables of their own.
        """
        import pandas as pd

        estimates = {
            "frobenius_norm": self.frobenius,
            "negative_mass": self.negative_mass,
            "participation": self.participation,
            "effective_dimension": self.effective_dimension,
        }
        row: dict[str, float] = {
            "lambda_max": float(self.pairs.values[0]),
            "lambda_min": float(self.smallest.values[0]),
            "confirmed": self.pairs.confirmed,
            "trace": self.trace.value,
            "trace_stderr": self.trace.stderr,
        }
        for name, estimate in estimates.items():
            row |= {name: estimate.value, f"{name}_stderr": estimate.stderr, f"{name}_bound": estimate.bound}
        row |= {
            "effective_dimension_regulariser": self.regulariser,
            "matvecs": self.matvecs,
            "orthogonality_loss": self.pairs.orthogonality_loss,
            "derivative_error": self.derivative_error,
            "dim": len(self.gradient),
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
        }
        return pd.DataFrame([row])


@dataclass(frozen=True)
class PackedAnalysis:
    """One operator at one point, for R members; NaN in the rows of dead members.

    Attributes:
        pairs: the largest, [R, top].
        smallest: the algebraically smallest, [R, 1].
        ipr: [R, top] inverse participation ratios sum v_i^4 of the largest: 1/d spread, 1 localised.
        product_error: [R] |(H - H in float64) v|, v the top vector; NaN where float64 does not work.
        derivative_error: [R] of autograd against a finite difference, relative; NaN where it cannot be told.
        density: the distribution of all eigenvalues.
        trace: the sum of the eigenvalues.
        frobenius: the Frobenius norm.
        negative_mass: sum of |lambda| over negative eigenvalues, over the sum over all.
        participation: (sum |lambda|)^2 / sum lambda^2.
        effective_dimension: sum of lambda / (lambda + regulariser) over positive lambda.
        regulariser: [R] a hundredth of |lambda|max.
        matvecs: [R] int64, products with each member, all told.
        losses: [R] float64, the mean losses.
        gradient: [R, d] float64.
        gradient_norm: [R] its length.
        alive: [R] bool, the members that were analysed.
    """

    pairs: PackedEigenPairs
    smallest: PackedEigenPairs
    ipr: Tensor
    product_error: Tensor
    derivative_error: Tensor
    density: PackedDensity
    trace: PackedEstimate
    frobenius: PackedEstimate
    negative_mass: PackedEstimate
    participation: PackedEstimate
    effective_dimension: PackedEstimate
    regulariser: Tensor
    matvecs: Tensor
    losses: Tensor
    gradient: Tensor
    gradient_norm: Tensor
    alive: Tensor

    def member(self, r: int) -> "Analysis":
        """The analysis of one member."""
        return Analysis(
            pairs=replace(self.pairs.member(r, "largest"), derivative_error=float(self.derivative_error[r])),
            smallest=replace(
                self.smallest.member(r, "smallest"), derivative_error=float(self.derivative_error[r])
            ),
            ipr=self.ipr[r],
            product_error=float(self.product_error[r]),
            derivative_error=float(self.derivative_error[r]),
            density=self.density.member(r),
            trace=self.trace.member(r),
            frobenius=self.frobenius.member(r),
            negative_mass=self.negative_mass.member(r),
            participation=self.participation.member(r),
            effective_dimension=self.effective_dimension.member(r),
            regulariser=float(self.regulariser[r]),
            matvecs=int(self.matvecs[r]),
            loss=float(self.losses[r]),
            gradient=self.gradient[r],
            gradient_norm=float(self.gradient_norm[r]),
        )


def packed_analysis(
    operator: CurvatureOperator,
    *,
    top: int,
    tolerance: float,
    probes: int,
    steps: int,
    seeds: Sequence[int],
    alive: Tensor | None = None,
    block: int = 1,
) -> PackedAnalysis:
    """Everything about R operators from one Krylov pass.

    The first round finds the pairs at both ends. The second starts from ``probes`` random vectors outside
    them: it confirms the pairs, and its quadrature gives density, trace and the other sums. It goes on until
    the confirmation is done and its polynomials resolve what the pairs leave of the spectrum as finely as
    ``steps`` Lanczos steps resolve the whole, in a basis of ``2 * steps`` vectors at most.

    Args:
        operator: R operators of size d.
        top: eigenpairs at the large end, at most d.
        tolerance: largest residual of a converged pair, as a share of |lambda|max.
        probes: random vectors of the density.
        steps: Lanczos steps that resolve the whole spectrum.
        seeds: one per member; its result depends on its own seed.
        alive: [R] bool; dead members are skipped, as are those whose loss or gradient is not finite.
        block: vectors of a block in the first round; more than one pays on a GPU.

    Raises:
        StudyError: an impossible argument.
        ResourceError: the basis would not fit the memory.
    """
    n_members, dim = operator.shape
    check_solve(n_members, seeds=seeds, tolerance=tolerance, block=block, max_matvecs=None)
    check_density(probes, steps)
    finite = torch.isfinite(operator.losses) & torch.isfinite(operator.gradient).all(dim=1)
    analysed = finite if alive is None else finite & alive.to(finite.device)
    ends = (Wanted("largest", min(top, dim)), Wanted("smallest", 1, confirm=False))
    least, largest_block = basis_size(ends, block=max(block, probes)), max(block, probes)
    living = living_members(n_members, analysed)
    if is_small(operator, ends, least + largest_block):
        spectra = dense_spectra(operator, living)
        blocks = [spectra.blocks(end) for end in ends]
        density = exact_densities(spectra)
        quadratures = None
    else:
        solver = KrylovPass(
            operator,
            ends,
            seeds=seeds,
            tolerance=tolerance,
            alive=living,
            basis=min(max(least, 2 * steps), dim - capacity(ends) - largest_block),
            block=block,
            max_matvecs=most_matvecs(ends),
            probing=Probing(probes, steps, traces=max(FEWEST_TRACES, TRACES_PER_PROBE * probes)),
        )
        members = solver.run()
        blocks = [solver.blocks(end) for end in ends]
        quadratures = [member.quadrature for member in members]
        density = bracketed_densities(quadratures, dim, operator.device)
    largest = certify(operator, blocks[0], ends[0], tolerance=tolerance)
    smallest_blocks = [replace(block, matvecs=0) for block in blocks[1]]  # the pass is counted once
    smallest = certify(operator, smallest_blocks, ends[1], tolerance=tolerance)
    return _summary(operator, largest, smallest, density, quadratures, analysed)


def _summary(
    operator: CurvatureOperator,
    largest: PackedEigenPairs,
    smallest: PackedEigenPairs,
    density: PackedDensity,
    quadratures: Sequence[Quadrature | None] | None,
    analysed: Tensor,
) -> PackedAnalysis:
    """The results, with what follows from the density."""
    unit = unit_of(largest.scale)
    relative = density.relative(unit)  # in which no square overflows or vanishes
    if quadratures is None:
        trace = relative.estimate(lambda nodes: nodes).times(unit)
        frobenius = relative.estimate(torch.square, of=lambda means: means[..., 0].sqrt()).times(unit)
    else:
        trace = trace_estimate(quadratures, unit)
        frobenius = frobenius_estimate(quadratures, density.dim, unit)
    gradient = operator.gradient.masked_fill(~analysed[:, None], float("nan"))
    leading = largest.vectors[:, 0]
    return PackedAnalysis(
        pairs=largest,
        smallest=smallest,
        ipr=largest.vectors.pow(4).sum(dim=2),
        product_error=operator.product_error(leading.nan_to_num(nan=0.0)).masked_fill(
            leading.isnan().any(dim=1), float("nan")
        ),
        derivative_error=operator.derivative_error.masked_fill(~analysed, float("nan")),
        density=density,
        trace=trace,
        frobenius=frobenius,
        negative_mass=relative.estimate(
            lambda nodes: (-nodes).clamp(min=0),
            torch.abs,
            of=lambda means: _ratio(means[..., 0], means[..., 1]),
            slopes=(1, 1),
        ),
        participation=relative.estimate(
            torch.abs,
            torch.square,
            of=lambda means: _ratio(means[..., 0].square(), means[..., 1]),
            slopes=(1, 2),
        ),
        effective_dimension=relative.estimate(_effective, slopes=(1 / RESOLVED_SHARE,)),
        regulariser=RESOLVED_SHARE * largest.scale,
        matvecs=largest.matvecs + smallest.matvecs,
        losses=operator.losses.masked_fill(~analysed, float("nan")),
        gradient=gradient,
        gradient_norm=torch.linalg.vector_norm(gradient, dim=1),
        alive=analysed,
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Part of the whole; 0 of nothing: the operator is 0."""
    return part / whole.masked_fill(whole == 0, 1)


def _effective(nodes: Tensor) -> Tensor:
    """Lambda / (lambda + regulariser) of the positive nodes, in units of |lambda|max; 0 for the others."""
    positive = nodes.clamp(min=0)
    return positive / (positive + RESOLVED_SHARE)
