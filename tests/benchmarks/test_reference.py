"""The references and error measures that benchmarks/curvature.py judges by; they need no peer."""

import numpy as np
import pytest
import torch
from torch import nn

import benchmarks.reference
from benchmarks.accuracy import accuracy
from benchmarks.problems import Problem
from benchmarks.reference import ExactHessian, Reference, dense_spectrum, reference
from benchmarks.sides import Part, Report


def softmax_regression(*, dense: bool) -> Problem:
    """At theta = 0 the Hessian is (I - 11'/C) / C kron X'X / N (theory 2.9)."""
    inputs = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(30, 3, bias=False)
    nn.init.zeros_(model.weight)
    targets = torch.arange(50) % 3
    return Problem("softmax", model, inputs, targets, nn.CrossEntropyLoss(), dense)


def closed_form(problem: Problem) -> np.ndarray:
    """All eigenvalues, ascending."""
    inputs = problem.inputs.double()
    gram = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs)).numpy() / 3
    return np.sort(np.concatenate([gram, gram, np.zeros(30)]))


def perfect_report(spectrum: np.ndarray) -> Report:
    nodes = np.tile(spectrum, (2, 1))
    weights = np.full_like(nodes, 1 / len(spectrum))
    return Report(spectrum[::-1][:10].copy(), spectrum.sum(), nodes, weights, {"all": Part(1.0, 2)})


def test_the_dense_spectrum_is_the_closed_form():
    problem = softmax_regression(dense=True)
    np.testing.assert_allclose(dense_spectrum(ExactHessian(problem)), closed_form(problem), atol=1e-12)


def test_the_iterative_reference_finds_every_copy_and_the_trace(monkeypatch):
    monkeypatch.setattr(benchmarks.reference, "DEFLATED", 60)
    problem = softmax_regression(dense=False)
    exact = closed_form(problem)
    found = reference(problem)
    np.testing.assert_allclose(found.values, exact[::-1][:10], rtol=1e-8)
    # 60 pairs are all that is not null: nothing is left to estimate
    assert found.trace == pytest.approx(exact.sum(), rel=1e-8)
    assert found.trace_stderr < 1e-8


def test_a_perfect_report_has_no_error():
    spectrum = closed_form(softmax_regression(dense=True))
    errors = accuracy(
        [perfect_report(spectrum)], Reference(spectrum[::-1][:10], spectrum.sum(), 0.0, spectrum)
    )
    assert (errors.eigenvalues, errors.trace) == (0, 0)
    assert errors.density == pytest.approx(0, abs=1e-12)


def test_errors_have_the_scales_that_the_table_names():
    spectrum = np.array([0.0, 1.0, 3.0, 4.0])
    report = Report(
        values=np.array([5.0, 3.0]),
        trace=6.0,
        nodes=np.array([[0.0, np.nan], [0.0, np.nan]]),  # a padded row
        weights=np.array([[1.0, 0.0], [1.0, 0.0]]),
        parts={"pairs": Part(1.0, 3), "trace": Part(1.0, 4)},
    )
    errors = accuracy([report], Reference(np.array([4.0, 3.0]), 8.0, 0.0, spectrum))
    assert report.products == 7
    assert errors.eigenvalues == pytest.approx(1 / 4)
    assert errors.trace == pytest.approx(2 / 8)
    assert errors.density == pytest.approx(1.0)  # everything at zero is off by the mean |eigenvalue|
