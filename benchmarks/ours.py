"""lossray's own side of the comparison, with its defaults."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

import lossray
from benchmarks.problems import Problem
from benchmarks.sides import PROBES, STEPS, TOP, Part, Parts, Report, Side


def product(problem: Problem) -> Callable[[Tensor], object]:
    """In whatever way the operator chooses for the model."""
    return lossray.Hessian(problem.model, problem.loss, (problem.inputs, problem.targets)).__matmul__


def report(problem: Problem, seed: int) -> Report:
    """Everything from one Krylov pass."""
    parts = Parts(lambda: 0)
    with parts.part("set-up"):
        hessian = lossray.Hessian(problem.model, problem.loss, (problem.inputs, problem.targets))
    with parts.part("all"):
        found = lossray.analyse(hessian, top=TOP, probes=PROBES, steps=STEPS, seed=seed)
    if not bool(found.pairs.converged.all()):
        raise SystemExit(f"{problem.name}, seed {seed}: lossray's eigenpairs did not converge")
    whole = Part(parts.measured["all"].seconds, int(found.matvecs))
    return Report(
        values=_array(found.pairs.values),
        trace=float(found.trace.value),
        nodes=_array(found.density.nodes),
        weights=_array(found.density.weights),
        parts=parts.measured | {"all": whole},
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


SIDES = (Side("lossray", product, report),)
