"""The curvature engine against PyHessian, hessian-eigenthings and curvlinops, in one process.

Same model, weights, examples and threads for all. The engines take turns, so that a disturbance hits all of
them; each repeat has a seed of its own, and the errors are those of the reports that were timed.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks import ours, peers
from benchmarks.accuracy import Accuracy, accuracy
from benchmarks.devices import wait_for
from benchmarks.problems import SETTINGS, Problem, make_problem
from benchmarks.reference import Reference, reference
from benchmarks.report import table, write_section
from benchmarks.sides import PROBES, STEPS, TOLERANCE, TOP, Report, Side

THREADS = (1, 2)
PRODUCT_REPEATS = 15
PRODUCT_SECONDS = 0.05  # of one repeat: short products are repeated inside it

PRODUCT_HEADER = ("model", "d", "examples", "threads", "gradient, ms")
REPORT_HEADER = (
    "model",
    "threads",
    "engine",
    "seconds",
    "over lossray",
    "products",
    "eigenvalues",
    "trace",
    "density",
)


@dataclass(frozen=True)
class Run:
    """One report, timed from outside."""

    seconds: float
    report: Report


def main() -> None:
    """Measure everything and write the section."""
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
    sides = (*ours.SIDES, *(side for module in peers.DISTRIBUTIONS for side in peers.sides(module)))
    products, reports = [], []
    warm = make_problem(SETTINGS[-1])
    for side in sides:
        side.report(warm, 0)
    for setting in SETTINGS:
        problem = make_problem(setting)
        exact = reference(problem)
        for threads in THREADS:
            with limited(threads):
                if not problem.dense:  # those are for the accuracy; their products take microseconds
                    products.append(product_row(problem, sides, threads))
                    print(" | ".join(products[-1]), flush=True)
                if threads > 1 and (problem.dense or problem.repeats == 1):  # one is enough of the slow
                    continue
                rows = report_rows(problem, exact, sides, threads)
                print("\n".join(" | ".join(row) for row in rows), flush=True)
                reports.extend(rows)
    header = (*PRODUCT_HEADER, *(side.name.split(",")[0] for side in _by_product(sides)))
    body = f"{_text()}\n\n{table(header, products)}\n\n{_report_text()}\n\n{table(REPORT_HEADER, reports)}"
    write_section("curvature", "Curvature against its peers", "python -m benchmarks.curvature", body)


def _text() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in peers.DISTRIBUTIONS.values())
    return f"""Against {versions}; models briefly trained on digits, everything in float32.

One product with the Hessian, in gradients over the same examples (forward and backward): median (smallest to
largest) of {PRODUCT_REPEATS} repeats in turn, set-up excluded."""


def _report_text() -> str:
    return f"""The full report of one checkpoint: the {TOP} leading eigenpairs to a residual of {TOLERANCE:g}
times the largest eigenvalue, the trace, and the density from {PROBES} probes of {STEPS} steps; with the
set-up. Each peer with its defaults (benchmarks/peers says how). Seconds are the median (smallest to largest)
of 1 to 5 repeats in turn, fewer for the larger models; "over lossray" is the median over neighbouring
repeats. Errors against float64: "eigenvalues" the largest of all values and seeds, as a share of the largest
eigenvalue; "trace" the root mean square over the seeds, as a share of the trace (of the estimated ones, the
reference's own standard error stands beside it); "density" the Wasserstein-1 distance to all d eigenvalues,
in mean absolute eigenvalues, where d is small enough to know them."""


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Torch and the BLAS of NumPy and SciPy on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(limits=threads):
            yield
    finally:
        torch.set_num_threads(before)


def product_row(problem: Problem, sides: Sequence[Side], threads: int) -> list[str]:
    """The costs of one product, in gradients."""
    vector = torch.randn(problem.dim, generator=torch.Generator().manual_seed(0))
    gradient = _timed(lambda _: problem.gradient(), vector, 1)
    inner = max(1, round(PRODUCT_SECONDS / gradient))
    multiply = [side.product(problem) for side in _by_product(sides)]
    for function in multiply:
        function(vector)  # warm
    gradients, costs = [], [[] for _ in multiply]
    for _ in range(PRODUCT_REPEATS):
        gradients.append(_timed(lambda _: problem.gradient(), vector, inner))
        for cost, function in zip(costs, multiply, strict=True):
            cost.append(_timed(function, vector, inner) / gradients[-1])
    row = [problem.name, f"{problem.dim:,}", f"{len(problem.targets):,}", str(threads)]
    return [*row, f"{1e3 * statistics.median(gradients):.2f}", *(_spread(cost) for cost in costs)]


def _by_product(sides: Sequence[Side]) -> list[Side]:
    """One side for each way to multiply."""
    return list({side.product: side for side in reversed(sides)}.values())[::-1]


def report_rows(problem: Problem, exact: Reference, sides: Sequence[Side], threads: int) -> list[list[str]]:
    """One row for each engine: its time, products and errors."""
    runs: list[list[Run]] = [[] for _ in sides]
    for seed in range(problem.repeats):
        for own, side in zip(runs, sides, strict=True):
            own.append(timed_report(side, problem, seed))
    return [
        [problem.name, str(threads), side.name, *_timings(own, runs[0]), *_errors(own, exact)]
        for side, own in zip(sides, runs, strict=True)
    ]


def timed_report(side: Side, problem: Problem, seed: int) -> Run:
    """One report, which starts on an idle device; its numbers are on the CPU at its end."""
    gc.collect()
    wait_for(problem.device)
    clock = time.perf_counter()
    report = side.report(problem, seed)
    return Run(time.perf_counter() - clock, report)


def _timings(runs: Sequence[Run], first: Sequence[Run]) -> list[str]:
    ratio = statistics.median(run.seconds / one.seconds for run, one in zip(runs, first, strict=True))
    return [_spread([run.seconds for run in runs]), f"{ratio:.1f}", _products(runs)]


def _products(runs: Sequence[Run]) -> str:
    """Their median number, and how it divides into the parts of the last report."""
    parts = [f"{part.products}" for part in runs[-1].report.parts.values() if part.products]
    total = statistics.median(run.report.products for run in runs)
    return f"{total:.0f}" + (f" ({' + '.join(parts)})" if len(parts) > 1 else "")


def _errors(runs: Sequence[Run], exact: Reference) -> list[str]:
    errors: Accuracy = accuracy([run.report for run in runs], exact)
    trace = f"{errors.trace:.1e}"
    if exact.trace_stderr:
        trace += f" (± {exact.trace_stderr / abs(exact.trace):.0e})"
    density = "" if errors.density is None else f"{errors.density:.3f}"
    return [f"{errors.eigenvalues:.1e}", trace, density]


def _timed(function: Callable[[Tensor], object], vector: Tensor, times: int) -> float:
    clock = time.perf_counter()
    for _ in range(times):
        function(vector)
    return (time.perf_counter() - clock) / times


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
