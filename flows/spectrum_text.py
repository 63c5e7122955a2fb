"""A spectrum as text: certified eigenvalues, the sums over all of them, and a histogram of the density."""

import math
from collections.abc import Sequence

import torch

from lossray.spectra.analysis import Analysis
from lossray.spectra.certified_pairs import EigenPairs
from lossray.spectra.density import SpectralDensity
from lossray.spectra.estimates import Estimate

BINS = 16  # of the histogram
WIDTH = 40  # characters of its longest bar
POORLY_KNOWN = 0.1  # residual over |value| of a pair that converged beside an outlier that dwarfs it


def describe(operator: str, analysis: Analysis, heading: Sequence[str]) -> str:
    """The whole text.

    Args:
        operator: its name.
        analysis: of the operator.
        heading: lines that say what was analysed.
    """
    confirmed = analysis.pairs.confirmed
    found = (
        "a fresh search found nothing above the last" if confirmed else "a larger one may have been missed"
    )
    lines = [
        *heading,
        "",
        f"largest eigenvalues ({'' if confirmed else 'not '}confirmed: {found})",
        *_pairs(analysis.pairs),
        "",
        "smallest eigenvalue",
        *_pairs(analysis.smallest),
        "",
        f"trace                {_estimate(analysis.trace)}",
        f"Frobenius norm       {_estimate(analysis.frobenius)}",
        f"negative mass        {_estimate(analysis.negative_mass)}   share of sum |lambda| below 0",
        f"participation        {_estimate(analysis.participation)}   (sum |lambda|)^2 / sum lambda^2",
        f"effective dimension  {_estimate(analysis.effective_dimension)}   "
        f"sum lambda / (lambda + {analysis.regulariser:.2g}) over lambda > 0",
        "",
        f"density: eigenvalues of the {operator} per bin, bars logarithmic",
        *histogram(analysis.density, len(analysis.gradient)),
    ]
    return "\n".join(lines)


def histogram(density: SpectralDensity, dim: int) -> list[str]:
    """One line for each bin between the outermost nodes: its range, its eigenvalues, a bar.

    Args:
        density: nodes and weights.
        dim: number of eigenvalues.
    """
    used = density.weights > 0  # padding has no weight
    nodes, weights = density.nodes[used], density.weights[used] / len(density.nodes)
    low, high = float(nodes.min()), float(nodes.max())
    if not high > low:
        return [f"{low:11.4g}  all {dim:,}"]
    bins = ((nodes - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    counts = (dim * torch.zeros(BINS, dtype=torch.float64).index_add(0, bins.cpu(), weights.cpu())).tolist()
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
    scale = WIDTH / math.log1p(max(counts))
    bars = ["#" * round(scale * math.log1p(count)) for count in counts]
    return [
        f"{edges[i]:11.4g} to {edges[i + 1]:11.4g} {counts[i]:12,.1f}  {bars[i]}".rstrip()
        for i in range(BINS)
    ]


def _pairs(pairs: EigenPairs) -> list[str]:
    lines = [f"{'':4}{'value':>14} {'residual':>10} {'gap':>10}"]
    for i in range(len(pairs)):
        flag = _flag(bool(pairs.converged[i]), float(pairs.relative_errors[i]))
        gap = float(pairs.gaps[i])
        known = f"{gap:10.2g}" if math.isfinite(gap) else f"{'-':>10}"
        lines.append(f"{i:3} {float(pairs.values[i]):14.7g} {float(pairs.residuals[i]):10.2g} {known}{flag}")
    return lines


def _flag(converged: bool, relative_error: float) -> str:
    if not converged:
        return "  not converged"
    if relative_error >= 1:
        return "  not told from 0"
    return f"  known to {relative_error:.0%} of itself" if relative_error > POORLY_KNOWN else ""


def _estimate(estimate: Estimate) -> str:
    if estimate.stderr == 0 and estimate.bound == 0:
        return f"{estimate.value:.5g} (exact)"
    if math.isnan(estimate.stderr):
        return f"{estimate.value:.5g} (error not known)"
    return f"{estimate.value:.5g} +- {estimate.stderr:.2g}{_quadrature(estimate.bound)}"


def _quadrature(bound: float) -> str:
    return f" (quadrature: up to {bound:.2g} off)" if bound > 0 else ""
