"""Results in words: what notebooks and ``lossray spectrum`` print of eigenvalues and their sums."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # these print themselves with what is here
    import pandas as pd

    from lossray.spectra.analysis import Analysis
    from lossray.spectra.certified_pairs import EigenPairs
    from lossray.spectra.density import SpectralDensity
    from lossray.spectra.estimates import Estimate

BINS = 16  # of the histogram
WIDTH = 40  # characters of its longest bar
POORLY_KNOWN = 0.1  # residual over |value| of a pair that converged beside an outlier that dwarfs it
MOST_PAIRS = 10  # that a summary shows, of both ends together
LEADING_PAIRS = 4  # that the summary of an analysis shows
FEW_BINS = 10  # of the histogram in a summary
PAIR_HEADING = f"{'':4}{'value':>14} {'residual':>10} {'gap':>10}"


class Summarised(ABC):
    """A result that prints as a few lines, and never as a wall of tensors."""

    @abstractmethod
    def summary(self) -> str:
        """The result in a dozen lines."""

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """The result as a table, its columns named as those of a study's tables."""

    def __repr__(self) -> str:
        return self.summary()

    __str__ = __repr__


# ---- summaries


def pairs_summary(pairs: "EigenPairs") -> str:
    """How many eigenpairs of which end, whether more may have been missed, and the outermost of them."""
    groups = [(end, len(list(same))) for end, same in itertools.groupby(pairs.ends or [""] * len(pairs))]
    named = ", ".join(f"{count} {end}".strip() for end, count in groups)
    lines = [
        f"{named} eigenvalues of {len(pairs.vectors):,} ({_confirmation(pairs, 'beyond')}); "
        f"{pairs.matvecs} products",
        PAIR_HEADING,
    ]
    start = 0
    for _, count in groups:
        lines += _leading(pairs, start, count, most=max(1, MOST_PAIRS // len(groups)))
        start += count
    return "\n".join(lines)


def analysis_summary(analysis: "Analysis") -> str:
    """The outermost eigenvalues, and the sums over all of them."""
    lines = [
        f"{len(analysis.gradient):,} parameters: loss {analysis.loss:.6g}, gradient norm "
        f"{analysis.gradient_norm:.3g}; {analysis.matvecs} products",
        f"largest eigenvalues ({_confirmation(analysis.pairs, 'above')}) and the smallest",
        PAIR_HEADING,
        *_leading(analysis.pairs, 0, len(analysis.pairs), most=LEADING_PAIRS),
        "min" + _pair(analysis.smallest, 0)[3:],
        *sum_lines(analysis),
    ]
    return "\n".join(lines)


def density_summary(density: "SpectralDensity") -> str:
    """How it was found, and a histogram."""
    how = (
        "all eigenvalues are known" if density.exact else f"estimated from {len(density.nodes)} random probes"
    )
    return "\n".join(
        [
            f"density of {density.dim:,} eigenvalues, {how}; per bin, bars logarithmic",
            *histogram(density, bins=FEW_BINS),
        ]
    )


def estimate_summary(estimate: "Estimate") -> str:
    """The value with its standard error, and the interval that holds the truth in 95 of 100 cases."""
    text = estimate_text(estimate)
    if not estimate.dof:
        return text
    low, high = estimate.interval(0.95)
    return f"{text}, 95% interval {low:.5g} to {high:.5g}"


def _leading(pairs: "EigenPairs", start: int, count: int, *, most: int) -> list[str]:
    """The lines of the outermost pairs of one end, and how many there are more."""
    shown = count if count <= most else most - 1
    lines = [_pair(pairs, start + i, number=i) for i in range(shown)]
    if shown < count:
        last = float(pairs.values[start + count - 1])
        lines.append(f"    {count - shown} more, the last {last:.7g}")
    return lines


# ---- the text of the command


def spectrum_text(operator: str, analysis: "Analysis", heading: Sequence[str]) -> str:
    """Everything: all pairs, the sums, and the density.

    Args:
        operator: its name.
        analysis: of the operator.
        heading: lines that say what was analysed.
    """
    lines = [
        *heading,
        "",
        f"largest eigenvalues ({_confirmation(analysis.pairs, 'above')})",
        *pair_lines(analysis.pairs),
        "",
        "smallest eigenvalue",
        *pair_lines(analysis.smallest),
        "",
        *sum_lines(analysis),
        "",
        f"density: eigenvalues of the {operator} per bin, bars logarithmic",
        *histogram(analysis.density),
    ]
    return "\n".join(lines)


# ---- parts


def pair_lines(pairs: "EigenPairs") -> list[str]:
    """One line for each pair below a heading: value, residual and gap, and what is doubtful."""
    return [PAIR_HEADING, *(_pair(pairs, i) for i in range(len(pairs)))]


def sum_lines(analysis: "Analysis") -> list[str]:
    """One line for each sum over all eigenvalues."""
    return [
        f"trace                {estimate_text(analysis.trace)}",
        f"Frobenius norm       {estimate_text(analysis.frobenius)}",
        f"negative mass        {estimate_text(analysis.negative_mass)}   share of sum |lambda| below 0",
        f"participation        {estimate_text(analysis.participation)}   (sum |lambda|)^2 / sum lambda^2",
        f"effective dimension  {estimate_text(analysis.effective_dimension)}   "
        f"sum lambda / (lambda + {analysis.regulariser:.2g}) over lambda > 0",
    ]


def histogram(density: "SpectralDensity", bins: int = BINS) -> list[str]:
    """One line for each bin between the outermost nodes: its range, its eigenvalues, a bar."""
    used = density.weights > 0  # padding has no weight
    nodes, weights = density.nodes[used], density.weights[used] / len(density.nodes)
    low, high = float(nodes.min()), float(nodes.max())
    if not high > low:
        return [f"{low:11.4g}  all {density.dim:,}"]
    indices = ((nodes - low) / (high - low) * bins).long().clamp(0, bins - 1)
    shares = torch.zeros(bins, dtype=torch.float64, device="cpu").index_add(0, indices.cpu(), weights.cpu())
    counts = (density.dim * shares).tolist()
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64, device="cpu").tolist()
    scale = WIDTH / math.log1p(max(counts))
    bars = ["#" * round(scale * math.log1p(count)) for count in counts]
    return [
        f"{edges[i]:11.4g} to {edges[i + 1]:11.4g} {counts[i]:12,.1f}  {bars[i]}".rstrip()
        for i in range(bins)
    ]


def estimate_text(estimate: "Estimate") -> str:
    """The value and how far it may be off."""
    if estimate.stderr == 0 and estimate.bound == 0:
        return f"{estimate.value:.5g} (exact)"
    if math.isnan(estimate.stderr):
        return f"{estimate.value:.5g} (error not known)"
    return f"{estimate.value:.5g} +- {estimate.stderr:.2g}{_quadrature(estimate.bound)}"


def _confirmation(pairs: "EigenPairs", where: str) -> str:
    """Whether a search of the complement found nothing ``where``: above or beyond the last."""
    if pairs.confirmed:
        return f"confirmed: a fresh search found nothing {where} the last"
    return "not confirmed: a larger one may have been missed"


def _pair(pairs: "EigenPairs", i: int, number: int | None = None) -> str:
    flag = _flag(bool(pairs.converged[i]), float(pairs.relative_errors[i]))
    gap = float(pairs.gaps[i])
    distance = f"{gap:10.2g}" if math.isfinite(gap) else f"{'-':>10}"
    shown = i if number is None else number
    return f"{shown:3} {float(pairs.values[i]):14.7g} {float(pairs.residuals[i]):10.2g} {distance}{flag}"


def _flag(converged: bool, relative_error: float) -> str:
    if not converged:
        return "  not converged"
    if relative_error >= 1:
        return "  not told from 0"
    return f"  known to {relative_error:.0%} of itself" if relative_error > POORLY_KNOWN else ""


def _quadrature(bound: float) -> str:
    return f" (quadrature: up to {bound:.2g} off)" if bound > 0 else ""
