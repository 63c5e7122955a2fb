"""PyHessian 0.1, with its own defaults; its tolerance is the change of a value between two iterations.

Two things are not its own. It calls ``torch.eig``, which torch no longer has, and is given an equivalent one.
And its density is read as the real parts of the nodes and weights: it treats a symmetric matrix as a general
one. Its eigenvalues are the largest in magnitude, and come sorted here.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.problems import Problem
from benchmarks.sides import PROBES, STEPS, TOLERANCE, TOP, Parts, Report, Side

pyhessian = importlib.import_module("pyhessian.hessian")  # in the package a class hides the module


def product(problem: Problem) -> Callable[[Tensor], object]:
    """Its product takes the vector as one tensor per parameter; the gradient's graph is retained."""
    engine = _engine(problem)
    sizes = [parameter.numel() for parameter in engine.params]

    def multiply(vector: Tensor) -> object:
        pieces = vector.split(sizes)
        shaped = [piece.view_as(p) for piece, p in zip(pieces, engine.params, strict=True)]
        return pyhessian.hessian_vector_product(engine.gradsH, engine.params, shaped)

    return multiply


def report(problem: Problem, seed: int) -> Report:
    """Eigenvalues, trace and density one after the other, as its README does."""
    with torch.random.fork_rng(devices=[]), _counted() as count:
        torch.manual_seed(seed)
        parts = Parts(count)
        with parts.part("set-up"):
            engine = _engine(problem)
        with parts.part("pairs"):
            values, _ = engine.eigenvalues(tol=TOLERANCE, top_n=TOP)
        with parts.part("trace"):
            samples = engine.trace()
        with parts.part("density"), eigendecomposition_supplied():
            nodes, weights = engine.density(iter=STEPS, n_v=PROBES)
    return Report(
        values=np.sort(np.array(values, dtype=np.float64))[::-1],
        trace=float(np.mean(samples)),
        nodes=np.array(nodes, dtype=np.float64),
        weights=np.array(weights, dtype=np.float64),
        parts=parts.measured,
    )


@contextmanager
def eigendecomposition_supplied() -> Iterator[None]:
    """Inside, ``torch.eig`` works again, for its density."""
    with patch.object(torch, "eig", _eig):
        yield


def _engine(problem: Problem) -> "pyhessian.hessian":
    data = (problem.inputs, problem.targets)
    engine = pyhessian.hessian(problem.model, problem.loss, data=data, cuda=problem.device.type == "cuda")
    problem.model.zero_grad()  # it leaves the gradient's graph in .grad
    return engine


@contextmanager
def _counted() -> Iterator[Callable[[], int]]:
    original, calls = pyhessian.hessian_vector_product, []

    def counting(*args: object) -> object:
        calls.append(None)
        return original(*args)

    with patch.object(pyhessian, "hessian_vector_product", counting):
        yield lambda: len(calls)


def _eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    """What ``torch.eig`` returned: eigenvalues [n, 2] as pairs (real, imaginary), and the vectors."""
    values, vectors = torch.linalg.eig(matrix)
    return torch.view_as_real(values), vectors.real


SIDES = (Side("PyHessian", product, report),)
