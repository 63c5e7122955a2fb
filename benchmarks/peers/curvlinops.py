"""curvlinops 3: its operator with SciPy's ``eigsh`` (ARPACK), its XTrace and its quadrature.

The largest eigenvalue is handed on to the quadrature, which otherwise computes it again; the smallest it
computes itself. Its Hessian is wrong for LayerNorm (forward over reverse: theory 2.14), so on the vit the
errors are not its solvers'.
"""

from collections.abc import Callable

import numpy as np
import torch
from curvlinops import HessianLinearOperator, LanczosApproximateSpectrumCached, xtrace
from scipy.sparse.linalg import eigsh
from torch import Tensor

from benchmarks.problems import Problem
from benchmarks.sides import PROBES, STEPS, TOLERANCE, TOP, Parts, Report, Side

TRACE_PRODUCTS = 60  # it has no default; what `lossray.trace` takes


def product(problem: Problem) -> Callable[[Tensor], object]:
    """Forward over reverse, with vmap over the columns."""
    return _operator(problem).__matmul__


def report(problem: Problem, seed: int) -> Report:
    """As in its examples; the check that the operator is deterministic is part of its set-up."""
    counter = [0]
    parts = Parts(lambda: counter[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with parts.part("set-up"):
            operator = _operator(problem)
        _count(operator, counter)
        start = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(np.float32)
        with parts.part("pairs"):
            values, _ = eigsh(operator.to_scipy(), k=TOP, which="LA", tol=TOLERANCE, v0=start)
        with parts.part("trace"):
            trace = float(xtrace(operator, TRACE_PRODUCTS))
        with parts.part("density"):
            boundaries = (None, float(values.max()))
            spectrum = LanczosApproximateSpectrumCached(operator, STEPS, boundaries=boundaries)
            spectrum.approximate_spectrum(num_repeats=PROBES)
    quadrature = spectrum._lanczos_iters  # nodes and eigenvectors: it returns the smoothed density only
    return Report(
        values=np.sort(values.astype(np.float64))[::-1],
        trace=trace,
        nodes=np.stack([nodes.double().cpu().numpy() for nodes, _ in quadrature]),
        weights=np.stack([vectors[0].double().square().cpu().numpy() for _, vectors in quadrature]),
        parts=parts.measured,
    )


def _operator(problem: Problem) -> HessianLinearOperator:
    data = [(problem.inputs, problem.targets)]
    return HessianLinearOperator(problem.model, problem.loss, list(problem.model.parameters()), data)


def _count(operator: HessianLinearOperator, counter: list[int]) -> None:
    original = operator._matmat

    def counting(columns: list[Tensor]) -> list[Tensor]:
        counter[0] += columns[0].shape[-1]
        return original(columns)

    operator._matmat = counting


SIDES = (Side("curvlinops", product, report),)
