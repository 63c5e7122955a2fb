"""Full reports of a checkpoint against the peers that can be imported here."""

import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch

from benchmarks import ours, peers
from benchmarks.accuracy import accuracy
from benchmarks.curvature import Run, timed_report
from benchmarks.gpu_check.recorder import Recorder, Row
from benchmarks.problems import Problem, make_problem, setting_of
from benchmarks.reference import Reference, reference
from benchmarks.sides import PROBES, STEPS, TOLERANCE, TOP, Side

MODELS = ("mlp", "cnn", "vit", "resnet-20")
SMALL_MODELS = ("tiny mlp",)
REPEATS = 2
TITLE = "Full reports against the peers"
TEXT = f"""As in the section on curvature: the {TOP} leading eigenpairs to a residual of {TOLERANCE:g} times
the largest eigenvalue, the trace, and the density from {PROBES} probes of {STEPS} steps, float32. Each peer
with its defaults, where it is installed; each is warmed up by one product. Seconds are the median
(smallest to largest) of {REPEATS} repeats; "over lossray" divides medians. Errors against float64: of the
eigenvalues the largest, over the largest eigenvalue; of the trace the root mean square, over the trace."""


def measure(record: Recorder) -> None:
    """One model after another; of each all engines."""
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
    models = SMALL_MODELS if record.small else MODELS
    record.each(models, partial(_reports, device=record.device))


def _reports(name: str, *, device: torch.device) -> Iterator[Row]:
    problem = make_problem(setting_of(name)).to(device)
    exact = reference(problem)
    first = _runs(ours.SIDES[0], problem)
    lossray = median(run.seconds for run in first)
    yield _row(ours.SIDES[0], problem, first, exact, lossray)
    error = accuracy([run.report for run in first], exact).eigenvalues
    if not error < TOLERANCE:
        raise SystemExit(f"lossray's eigenvalues are off by {error:.1e}")
    for module, distribution in peers.DISTRIBUTIONS.items():
        try:
            sides = peers.sides(module)
        except ImportError:
            yield _empty(problem, distribution, "not installed here")
            continue
        for side in sides:
            try:
                yield _row(side, problem, _runs(side, problem), exact, lossray)
            except (Exception, SystemExit) as error:  # a peer's failure is a row, and no failure of ours
                traceback.print_exc()
                yield _empty(problem, side.name, f"failed: {type(error).__name__}: {error}")


def _runs(side: Side, problem: Problem) -> list[Run]:
    side.product(problem)(torch.ones(problem.dim, device=problem.device))
    return [timed_report(side, problem, seed) for seed in range(REPEATS)]


def _row(side: Side, problem: Problem, runs: list[Run], exact: Reference, lossray: float) -> Row:
    errors = accuracy([run.report for run in runs], exact)
    seconds = [run.seconds for run in runs]
    return {
        "model": problem.name,
        "engine": side.name,
        "seconds": seconds,
        "over lossray": median(seconds) / lossray,
        "products": runs[-1].report.products,
        "eigenvalues": errors.eigenvalues,
        "trace": errors.trace,
    }


def _empty(problem: Problem, engine: str, reason: str) -> Row:
    rest = dict.fromkeys(("over lossray", "products", "eigenvalues", "trace"), "")
    return {"model": problem.name, "engine": engine, "seconds": reason, **rest}
