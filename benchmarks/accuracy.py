"""How far reports are from the reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wasserstein_distance

from benchmarks.reference import Reference
from benchmarks.sides import Report


@dataclass(frozen=True)
class Accuracy:
    """Errors of one engine's reports over several seeds."""

    eigenvalues: float  # largest over the seeds of the largest over the leading values, over lambda_max
    trace: float  # root mean square over the seeds, over the trace
    density: float | None  # mean over the seeds of the Wasserstein-1 distance, over the mean |eigenvalue|


def accuracy(reports: Sequence[Report], reference: Reference) -> Accuracy:
    """The errors of reports of one problem; the density's where the whole spectrum is known."""
    eigenvalues = [np.abs(report.values - reference.values).max() for report in reports]
    trace = [report.trace - reference.trace for report in reports]
    density = None
    if reference.spectrum is not None:
        distances = [_distance(report, reference.spectrum) for report in reports]
        density = float(np.mean(distances) / np.abs(reference.spectrum).mean())
    return Accuracy(
        eigenvalues=float(max(eigenvalues) / reference.values[0]),
        trace=float(np.sqrt(np.mean(np.square(trace))) / abs(reference.trace)),
        density=density,
    )


def _distance(report: Report, spectrum: np.ndarray) -> float:
    """Wasserstein-1 distance between the probes' mean measure and the spectrum; 1 mean |value| = useless."""
    known = np.isfinite(report.nodes)  # rows that ended early are padded
    nodes, weights = report.nodes[known], report.weights[known]
    return float(wasserstein_distance(nodes, spectrum, u_weights=weights))
