"""What the engines are judged by: products in float64 by double backward, and solves far beyond 1e-3."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from benchmarks.problems import Problem
from benchmarks.sides import TOP, Array
from lossray.seeds import generator

DEFLATED = 40  # leading pairs whose share of the trace is known exactly
SAMPLES = 200  # random vectors for the rest


@dataclass(frozen=True)
class Reference:
    """The converged numbers of one problem."""

    values: Array  # [TOP] descending
    trace: float
    trace_stderr: float  # 0 where the trace is exact
    spectrum: Array | None  # [d] ascending, for small problems


class ExactHessian:
    """The Hessian in float64; the gradient's graph is retained."""

    def __init__(self, problem: Problem) -> None:
        model = copy.deepcopy(problem.model).double()
        loss = problem.loss(model(problem.inputs.double()), problem.targets)
        self.parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        self.gradient = torch.cat([gradient.flatten() for gradient in gradients])
        self.dim = len(self.gradient)
        self.device = problem.device

    def __matmul__(self, vector: Tensor) -> Tensor:
        """H v for v [d] in float64."""
        pieces = torch.autograd.grad(
            self.gradient, self.parameters, vector, retain_graph=True, materialize_grads=True
        )
        return torch.cat([piece.flatten() for piece in pieces])


def reference(problem: Problem) -> Reference:
    """Exact for a small problem; otherwise ARPACK to 1e-9 and a deflated estimate of the trace."""
    hessian = ExactHessian(problem)
    if problem.dense:
        spectrum = dense_spectrum(hessian)
        return Reference(spectrum[::-1][:TOP].copy(), float(spectrum.sum()), 0.0, spectrum)
    operator = LinearOperator(
        (hessian.dim, hessian.dim),
        matvec=lambda vector: (hessian @ torch.from_numpy(vector.ravel()).to(hessian.device)).cpu().numpy(),
        dtype=np.float64,
    )
    start = torch.randn(hessian.dim, generator=generator(0, "reference"), dtype=torch.float64).numpy()
    values, vectors = eigsh(operator, k=DEFLATED, which="LA", tol=1e-9, v0=start)
    rest, stderr = _rest_of_trace(hessian, torch.from_numpy(vectors).to(hessian.device))
    return Reference(np.sort(values)[::-1][:TOP].copy(), float(values.sum()) + rest, stderr, None)


def dense_spectrum(hessian: ExactHessian) -> Array:
    """All eigenvalues [d], ascending."""
    columns = torch.eye(hessian.dim, dtype=torch.float64, device=hessian.device)
    matrix = torch.stack([hessian @ column for column in columns])
    values: Array = torch.linalg.eigvalsh((matrix + matrix.T) / 2).cpu().numpy()
    return values


def _rest_of_trace(hessian: ExactHessian, vectors: Tensor) -> tuple[float, float]:
    """Trace on the complement of ``vectors`` [d, n] by Hutchinson's estimator, and its standard error."""
    random = generator(0, "reference trace")
    samples = []
    for _ in range(SAMPLES):
        signs = 2.0 * torch.randint(2, (hessian.dim,), generator=random) - 1
        probe = signs.double().to(hessian.device)
        probe -= vectors @ (vectors.T @ probe)
        samples.append(float(probe @ (hessian @ probe)))
    return float(np.mean(samples)), float(np.std(samples, ddof=1)) / math.sqrt(SAMPLES)
