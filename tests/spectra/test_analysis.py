"""The analysis of a pack, and the [curvature] section."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from lossray.networks.losses import get_loss
from lossray.networks.stack import build_stack
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.operators.settings import CurvatureSettings
from lossray.spectra.analysis import PackedAnalysis, packed_analysis


def _operator(*, spoiled: int | None = None) -> PackedHessian:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(20, 5, dtype=torch.float64, generator=generator), torch.arange(20) % 3)]
    stack, theta, buffers = build_stack(build, [0, 1, 2], executor="vmap", dtype=torch.float64)
    if spoiled is not None:
        theta[spoiled] = math.nan
    loss = get_loss("cross_entropy")
    return PackedHessian(
        PackedObjective(stack, theta, buffers, loss, data, dtype=torch.float64), mode="retained"
    )


def analyse(operator: PackedHessian, **options: object) -> PackedAnalysis:
    usual: dict[str, object] = {"probes": 2, "steps": 16, "seeds": [0, 1, 2]}
    return packed_analysis(operator, **(usual | options))  # type: ignore[arg-type]


def test_a_pack_is_analysed_at_once() -> None:
    operator = _operator()
    analysis = analyse(operator, top=4, tolerance=1e-8)
    assert analysis.pairs.values.shape == (3, 4)
    assert analysis.pairs.converged.all()
    assert torch.equal(analysis.losses, operator.losses)
    assert torch.equal(analysis.gradient, operator.gradient)
    assert torch.allclose(analysis.gradient_norm, operator.gradient.square().sum(dim=1).sqrt())
    # Members go on taking part until the last one is done, so the slowest has as many as the operator.
    assert analysis.pairs.matvecs.max() <= operator.matvecs
    dim = operator.shape[1]
    assert (analysis.ipr >= 1 / dim).all()
    assert (analysis.ipr <= 1).all()
    assert torch.allclose(analysis.ipr, (analysis.pairs.vectors**4).sum(dim=2))


@pytest.mark.parametrize("how", ["not finite", "said to be dead"])
def test_a_dead_member_is_nan_and_the_others_are_unharmed(how: str) -> None:
    healthy = analyse(_operator(), top=4, tolerance=1e-8)
    if how == "not finite":
        analysis = analyse(_operator(spoiled=1), top=4, tolerance=1e-8)
    else:
        alive = torch.tensor([True, False, True])
        analysis = analyse(_operator(), top=4, tolerance=1e-8, alive=alive)
    assert analysis.alive.tolist() == [True, False, True]
    for r in (0, 2):
        assert torch.equal(analysis.pairs.values[r], healthy.pairs.values[r])
        assert torch.equal(analysis.pairs.vectors[r], healthy.pairs.vectors[r])
        assert torch.equal(analysis.gradient[r], healthy.gradient[r])
    for rows in (
        analysis.pairs.values,
        analysis.pairs.vectors,
        analysis.pairs.residuals,
        analysis.ipr,
        analysis.losses,
        analysis.gradient,
        analysis.gradient_norm,
    ):
        assert torch.isnan(rows[1]).all()
    assert not analysis.pairs.converged[1].any()


def test_settings_defaults_are_those_of_the_design() -> None:
    assert CurvatureSettings().plain() == {
        "operators": ["hessian"],
        "top": 10,
        "tolerance": 1e-3,
        "probes": 4,
        "steps": 64,
        "examples": "all",
        "dtype": "float32",
        "vectors": True,
    }


def test_settings_take_what_toml_gives() -> None:
    settings = CurvatureSettings.model_validate({"operators": ["ggn", "hessian:layers"], "examples": 500})
    assert settings.operators == ("ggn", "hessian:layers")
    assert settings.examples == 500


@pytest.mark.parametrize(
    "table",
    [
        {"operators": ["hesian"]},
        {"operators": ["hessian:blocks"]},
        {"operators": []},
        {"operators": ["ggn", "ggn"]},
        {"operators": "hessian"},
        {"top": 0},
        {"top": 2.5},
        {"top": True},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"tolerance": math.nan},
        {"probes": 0},
        {"steps": 1},
        {"examples": 0},
        {"examples": "some"},
        {"examples": True},
        {"dtype": "float16"},
        {"vectors": 1},
        {"tops": 3},
    ],
)
def test_settings_refuse(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CurvatureSettings.model_validate(table)
