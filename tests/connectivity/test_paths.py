"""Paths: exact ends, closed forms, derivatives, lengths, and theory 2.7 on line and orbit."""

import math

import pytest
import torch
from torch import Tensor, nn

import lossray
from lossray.connectivity.paths import CURVES, KINDS, Path, bent, geometric, straight
from lossray.errors import ModelError, StudyError
from lossray.networks.stack import stack_models


def points(k: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(k, 3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def make(kind: str, *, dtype: torch.dtype = torch.float64) -> Path:
    a, b = points(2, dtype=dtype)
    a[0, 0], b[0, 0] = -0.0, 0.0  # a sum would lose the sign of the first
    if kind == "line":
        return straight(a, b)
    if kind == "geometric":
        return geometric(a, a * b.abs())
    path = bent(kind, a, b, 3)
    path.bends.add_(points(5, dtype=dtype)[2:])
    return path


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_exact(kind, dtype):
    path = make(kind, dtype=dtype)
    mixed = path.at(torch.tensor([0.0, 1.0, 0.5]))
    for t, end in ((0.0, path.points[0]), (1.0, path.points[-1])):
        assert torch.equal(bits(path.at(t)), bits(end))
        assert torch.equal(bits(mixed[int(t)]), bits(end[int(t)]))
    assert path.at(0.3).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_each_member_may_have_a_place_of_its_own(kind):
    path = make(kind)
    ts = [0.2, 0.5, 0.9]
    together = path.at(torch.tensor(ts, dtype=torch.float64))
    for r, t in enumerate(ts):
        torch.testing.assert_close(together[r], path.at(t)[r], rtol=1e-14, atol=1e-15)
        alone = Path(kind, path.points[:, r : r + 1]).at(t)[0]
        torch.testing.assert_close(together[r], alone, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", ["line", *CURVES])
def test_coefficients_are_the_derivative_by_the_control_points(kind):
    path = make(kind)
    leaf = path.points.clone().requires_grad_()
    ts = torch.tensor([0.13, 0.5, 0.81], dtype=torch.float64)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((Path(kind, leaf).at(ts) * weights).sum(), leaf)
    torch.testing.assert_close(gradient, path.coefficients(ts)[:, :, None] * weights)


@pytest.mark.parametrize("kind", ["line", *CURVES])
def test_coefficients_sum_to_one(kind):
    for t in (0.0, 0.1, 1 / 3, 0.5, 1.0):
        torch.testing.assert_close(make(kind).coefficients(t).sum(dim=0), torch.ones(3, dtype=torch.float64))


def test_a_line_is_straight():
    path = make("line")
    torch.testing.assert_close(path.at(0.3), 0.7 * path.points[0] + 0.3 * path.points[1])


def test_a_polychain_passes_through_its_bends_at_equal_times():
    path = make("polychain")
    for i in range(5):
        torch.testing.assert_close(path.at(i / 4), path.points[i])
    torch.testing.assert_close(path.at(0.375), (path.points[1] + path.points[2]) / 2)


def test_a_bezier_curve_follows_de_casteljau():
    path = make("bezier")
    for t in (0.1, 0.5, 0.77):
        level = path.points
        while len(level) > 1:
            level = (1 - t) * level[:-1] + t * level[1:]
        torch.testing.assert_close(path.at(t), level[0])
    assert len(path.bends) == 3


def test_a_geometric_path_multiplies_by_powers():
    path = make("geometric")
    a, b = path.points
    ratio = torch.where(a == 0, 1, b / a)
    torch.testing.assert_close(path.at(0.3), a * ratio**0.3)
    torch.testing.assert_close(path.at(0.5).abs(), (a * b).sqrt())


@pytest.mark.parametrize("kind", CURVES)
def test_training_starts_on_the_line(kind):
    a, b = points(2)
    path = bent(kind, a, b, 2)
    for t in (0.0, 0.2, 0.5, 1.0):
        torch.testing.assert_close(path.at(t), a + t * (b - a))
    path.bends.zero_()
    assert torch.equal(a, points(2)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_many_small_chords(kind):
    path = make(kind)
    found = path.lengths([0.0, 0.3, 0.5, 1.0])
    grid = torch.stack([path.at(i / 1000) for i in range(1001)])
    sums = torch.linalg.vector_norm(grid.diff(dim=0), dim=2).cumsum(dim=0)
    expected = torch.stack([sums[0] * 0, sums[299], sums[499], sums[999]], dim=1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


def test_length_of_a_parabola():
    """x = 2 t, y = 4 t (1 - t): the arc length has a closed form."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    expected = math.sqrt(5) + math.asinh(2) / 2
    assert Path("bezier", corners[:, None]).lengths([1.0]).item() == pytest.approx(expected, rel=1e-12)


def relu_net(width: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).double()


def outputs_along(path: Path, model: nn.Module, inputs: Tensor, ts: list[float]) -> Tensor:
    stack, _, _ = stack_models([model], executor="loop", dtype=torch.float64)
    return torch.cat([stack.outputs(path.at(t), {}, inputs) for t in ts]).detach()


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()[None]


def test_the_line_to_a_rescaled_copy_scales_the_function_by_a_closed_form():
    """Theory 2.7: f_t - b2 = c(t) (f_0 - b2), c(t) = 1 + t (1 - t) (alpha + 1 / alpha - 2)."""
    model, alpha = relu_net(6), 3.75
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    path = straight(flat(model), flat(lossray.rescale(model, {"0": alpha})))
    ts = [0.0, 0.25, 0.5, 0.9, 1.0]
    bias = model[2].bias.detach()
    found = outputs_along(path, model, inputs, ts) - bias
    factors = torch.tensor([1 + t * (1 - t) * (alpha + 1 / alpha - 2) for t in ts], dtype=torch.float64)
    torch.testing.assert_close(found, factors[:, None, None] * found[:1], rtol=1e-12, atol=1e-12)
    assert factors[2] > 1.4


def test_the_function_is_constant_on_the_geometric_path_of_a_rescaling():
    model = relu_net(5)
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    copy = lossray.rescale(model, {"0": [0.2, 0.5, 1.0, 3.0, 8.0]})
    found = outputs_along(geometric(flat(model), flat(copy)), model, inputs, [0.0, 0.1, 0.5, 0.8, 1.0])
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-12, atol=1e-12)
    bowed = outputs_along(straight(flat(model), flat(copy)), model, inputs, [0.0, 0.5])
    assert (bowed[1] - bowed[0]).abs().max() > 0.1


def test_a_geometric_path_needs_ends_with_the_same_signs():
    a, b = points(2).abs()
    b[1, 4] *= -1
    with pytest.raises(ModelError, match=r"coordinate 4 of member 1 \(1 differ\)"):
        geometric(a, b)
    with pytest.raises(ModelError, match="same signs"):
        geometric(a, torch.zeros_like(a))


def test_impossible_arguments():
    a, b = points(2)
    with pytest.raises(StudyError, match="found 'beziers'; allowed: polychain, bezier; did you mean"):
        bent("beziers", a, b, 1)
    with pytest.raises(StudyError, match="found 'line'"):
        bent("line", a, b, 1)
    with pytest.raises(StudyError, match="bends: found 0"):
        bent("bezier", a, b, 0)
    for t in (-0.1, 1.1, math.nan, torch.tensor([0.1, 0.2, 1.5])):
        with pytest.raises(ValueError, match="allowed: 0 to 1"):
            straight(a, b).at(t)
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        straight(a, b).lengths([0.0, 2.0])
    with pytest.raises(ValueError, match="not linear"):
        make("geometric").coefficients(0.5)
