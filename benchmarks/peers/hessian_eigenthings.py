"""hessian-eigenthings 1.0 (alpha), with its own defaults, and with as many Lanczos steps as 1e-3 needs.

By default its Lanczos takes 2 k steps, which converge few pairs. The other side is given for free what a user
would have to search: the fewest steps that suffice. Above 50 steps it does not reorthogonalise unless asked;
it is asked.
"""

from collections.abc import Callable
from functools import lru_cache, partial

from hessian_eigenthings import HessianOperator, lanczos, spectral_density, supervised_loss, trace
from torch import Tensor

from benchmarks.problems import Problem
from benchmarks.sides import PROBES, STEPS, TOLERANCE, TOP, Parts, Report, Side

SEARCHED = (20, 30, 40, 60, 80, 120, 160, 240, 320, 480)  # Lanczos steps


def product(problem: Problem) -> Callable[[Tensor], object]:
    """Double backward; the gradient's graph is built for every product."""
    return _operator(problem).matvec


def report(problem: Problem, seed: int, *, converged: bool) -> Report:
    """Lanczos, Hutch++ with its default number of products, and its quadrature."""
    steps = _sufficient_steps(problem) if converged else None
    counter = [0]
    parts = Parts(lambda: counter[0])
    with parts.part("set-up"):
        operator = _operator(problem)
    _count(operator, counter)
    with parts.part("pairs"):
        if steps is None:
            pairs = lanczos(operator, k=TOP, which="LA", seed=seed)
        else:
            pairs = _lanczos(operator, steps, seed)
    with parts.part("trace"):
        estimate = trace(operator, seed=seed)
    with parts.part("density"):
        density = spectral_density(operator, num_runs=PROBES, lanczos_steps=STEPS, seed=PROBES * seed)
    return Report(
        values=pairs.eigenvalues.double().cpu().numpy(),
        trace=float(estimate.estimate),
        nodes=density.raw_eigenvalues.double().cpu().numpy(),
        weights=density.raw_weights.double().cpu().numpy(),
        parts=parts.measured,
    )


def _operator(problem: Problem) -> HessianOperator:
    data = [(problem.inputs, problem.targets)]
    return HessianOperator(problem.model, data, supervised_loss(problem.loss))


def _lanczos(operator: HessianOperator, steps: int, seed: int) -> "lanczos":
    return lanczos(
        operator, k=TOP, max_iter=steps, tol=TOLERANCE, which="LA", reorthogonalize=True, seed=seed
    )


@lru_cache
def _sufficient_steps(problem: Problem) -> int:
    for steps in SEARCHED:
        pairs = _lanczos(_operator(problem), steps, seed=0)
        if bool((pairs.residuals <= TOLERANCE * pairs.eigenvalues[0]).all()):
            return steps
    raise SystemExit(f"{problem.name}: hessian-eigenthings did not converge in {SEARCHED[-1]} steps")


def _count(operator: HessianOperator, counter: list[int]) -> None:
    original = operator.matvec

    def counting(vector: Tensor) -> Tensor:
        counter[0] += 1
        return original(vector)

    operator.matvec = counting


SIDES = (
    Side("hessian-eigenthings, defaults", product, partial(report, converged=False)),
    Side("hessian-eigenthings, to 1e-3", product, partial(report, converged=True)),
)
