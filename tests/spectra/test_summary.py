"""What a notebook prints of results, and their tables: short, and the numbers of the results themselves."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossray
from lossray.spectra.certified_pairs import EigenPairs
from lossray.spectra.density import SpectralDensity
from lossray.spectra.estimates import Estimate
from lossray.spectra.summary import Summarised
from lossray.storage.tables import TABLES

LINES, WIDTH = 16, 140


@pytest.fixture(scope="module")
def matrix() -> lossray.Hessian:
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
    inputs = torch.randn(30, 4, generator=draws, dtype=torch.float64)
    return lossray.Hessian(model, F.cross_entropy, (inputs, torch.arange(30) % 3))


def pairs_of(values: list[float], **changes: Any) -> EigenPairs:
    """Eigenpairs of a diagonal matrix of size 100."""
    k = len(values)
    fields: dict[str, Any] = {
        "values": torch.tensor(values, dtype=torch.float64),
        "vectors": torch.eye(100, dtype=torch.float64)[:, :k],
        "residuals": torch.full((k,), 1e-9, dtype=torch.float64),
        "converged": torch.ones(k, dtype=torch.bool),
        "confirmed": True,
        "gaps": torch.full((k,), math.inf, dtype=torch.float64),
        "complement": 0.0,
        "scale": max(map(abs, values)),
        "matvecs": 7,
        "orthogonality_loss": 0.0,
    }
    return EigenPairs(**{**fields, **changes})


@pytest.mark.parametrize(
    "result_of",
    [
        lossray.analyse,
        lossray.eigenpairs,
        lossray.spectral_density,
        lossray.trace,
        lossray.degeneracy,
        lambda matrix: lossray.eigenpairs(matrix, k=20, end="both"),
        lambda matrix: lossray.structural_floor(*_source(matrix)),
    ],
)
def test_results_print_a_few_lines_and_no_tensors(matrix, result_of) -> None:
    result = result_of(matrix)
    assert isinstance(result, Summarised)
    assert repr(result) == str(result) == result.summary()
    lines = str(result).splitlines()
    assert 1 <= len(lines) <= LINES
    assert max(map(len, lines)) <= WIDTH
    assert "tensor" not in str(result)


def _source(matrix: lossray.Hessian) -> tuple[Any, Any, Any]:
    model, loss, (batch,) = matrix.packed.objective.source
    return model, batch, loss


def test_pairs_print_their_values_and_what_is_doubtful() -> None:
    pairs = pairs_of(
        [5.0, 2.0, 1e-10],
        converged=torch.tensor([True, False, True]),
        confirmed=False,
        ends=("largest",) * 3,
    )
    first, _, *lines = str(pairs).splitlines()
    assert first == (
        "3 largest eigenvalues of 100 (not confirmed: a larger one may have been missed); 7 products"
    )
    assert lines[0].split() == ["0", "5", "1e-09", "-"]
    assert lines[1].endswith("not converged")
    assert lines[2].endswith("not told from 0")


def test_of_many_pairs_the_outermost_are_printed() -> None:
    pairs = pairs_of([float(20 - i) for i in range(20)], ends=("largest",) * 12 + ("smallest",) * 8)
    lines = str(pairs).splitlines()
    assert lines[0].startswith("12 largest, 8 smallest eigenvalues of 100")
    assert [line.split()[:2] for line in lines[2:]] == [
        ["0", "20"],
        ["1", "19"],
        ["2", "18"],
        ["3", "17"],
        ["8", "more,"],
        ["0", "8"],
        ["1", "7"],
        ["2", "6"],
        ["3", "5"],
        ["4", "more,"],
    ]
    assert lines[6].endswith("the last 9")


def test_pairs_become_rows_of_the_table_eigenvalues() -> None:
    pairs = pairs_of([3.0, 2.0, -1.0], ends=("largest", "largest", "smallest"))
    frame = pairs.to_frame()
    assert set(frame) <= {column.name for column in TABLES["eigenvalues"].columns}
    assert frame["end"].tolist() == ["largest", "largest", "smallest"]
    assert frame["index"].tolist() == [0, 1, 0]
    assert frame["eigenvalue"].tolist() == [3.0, 2.0, -1.0]
    assert frame["gap"].isna().all()
    assert frame["ipr"].tolist() == [1.0, 1.0, 1.0]
    unknown = pairs_of([3.0, 2.0]).to_frame()
    assert unknown["end"].isna().all()
    assert unknown["index"].tolist() == [0, 1]


def test_the_ends_of_pairs_are_told(matrix) -> None:
    assert lossray.eigenpairs(matrix, k=2, end="magnitude").ends == ("magnitude",) * 2
    assert lossray.eigenpairs(matrix, k=2, end="both").ends == ("largest",) * 2 + ("smallest",) * 2
    report = lossray.analyse(matrix, top=3)
    assert (report.pairs.ends, report.smallest.ends) == (("largest",) * 3, ("smallest",))


def test_an_analysis_becomes_a_row_of_the_table_curvature(matrix) -> None:
    report = lossray.analyse(matrix)
    frame = report.to_frame()
    declared = [column.name for column in TABLES["curvature"].columns]
    assert list(frame) == [name for name in declared if name in set(frame)]
    (row,) = frame.to_dict("records")
    assert (row["lambda_max"], row["trace"], row["dim"]) == (
        float(report.pairs.values[0]),
        report.trace.value,
        67,
    )
    assert row["participation_bound"] == report.participation.bound
    text = str(report)
    assert "67 parameters" in text
    assert f"{row['lambda_max']:14.7g}" in text
    assert f"min {row['lambda_min']:14.7g}" in text
    assert f"trace                {report.trace.value:.5g} (exact)" in text


def test_a_density_becomes_rows_of_the_table_density() -> None:
    nodes = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 4.0]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]], dtype=torch.float64)
    density = SpectralDensity(nodes, weights, False, dim=100)
    frame = density.to_frame()
    assert set(frame) <= {column.name for column in TABLES["density"].columns}
    assert frame.to_numpy().tolist() == [
        [0, 0, 1.0, 0.25],
        [0, 1, 2.0, 0.25],
        [0, 2, 3.0, 0.5],
        [1, 0, 4.0, 0.5],
        [1, 1, 5.0, 0.5],
    ]
    first, *bins = str(density).splitlines()
    assert first.startswith("density of 100 eigenvalues, estimated from 2 random probes")
    assert sum(float(line.split()[3]) for line in bins) == pytest.approx(100)


def test_an_estimate_is_a_line_with_its_interval() -> None:
    assert str(Estimate(2.0, 0.0, 0)) == "2 (exact)"
    assert str(Estimate(2.0, math.nan, 0)) == "2 (error not known)"
    estimate = Estimate(2.0, 0.1, 3, 0.01)
    low, high = estimate.interval(0.95)
    assert str(estimate) == f"2 +- 0.1 (quadrature: up to 0.01 off), 95% interval {low:.5g} to {high:.5g}"
    assert estimate.to_frame().to_dict("records") == [{"value": 2.0, "stderr": 0.1, "dof": 3, "bound": 0.01}]


def test_a_degeneracy_becomes_rows_of_its_table(matrix) -> None:
    found = lossray.degeneracy(matrix)
    frame = found.to_frame()
    declared = [column.name for column in TABLES["degeneracy"].columns]
    assert list(frame) == [name for name in declared if name in set(frame)]
    assert dict(zip(frame["threshold"], frame["nullity"], strict=True)) == found.counts
    assert frame["at_noise_floor"].tolist() == [False] * (len(found.counts) - 1) + [True]
    last = frame.iloc[-1]
    assert (last["rank"], last["excess"], last["nullity"]) == (found.rank, found.excess, found.nullity)
    assert frame["rank"].isna().sum() == len(frame) - 1
    assert f"nullity {found.nullity} of 67" in str(found)
    assert f"rank {found.rank}" in str(found)
    other = lossray.degeneracy(lossray.Restricted(matrix, ["0.weight"]))
    assert "not known (known for the Hessian of a model's loss alone)" in str(other)


def test_a_floor_becomes_a_row_for_each_cause(matrix) -> None:
    floor = lossray.structural_floor(*_source(matrix))
    frame = floor.to_frame()
    assert dict(zip(frame["cause"], frame["dimension"], strict=True)) == dict(floor.by_cause)
    assert str(floor).startswith(f"{floor.dimension} null directions are forced")


def test_a_connection_prints_as_a_line() -> None:
    models = [nn.Linear(2, 2) for _ in range(2)]
    data: tuple[Tensor, Tensor] = (torch.randn(5, 2), torch.arange(5) % 2)
    path = lossray.connect(*models, F.cross_entropy, data, kind="line")
    assert repr(path) == "a line between two models of 6 parameters: .at(t), .evaluate(), .barrier"
