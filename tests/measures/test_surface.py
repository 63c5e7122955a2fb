"""`lossray.surface`: closed forms on quadratics, the model's own losses at every point, a study's table."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossray
from lossray.errors import ModelError, StudyError
from lossray.seeds import stream
from lossray.storage.tables import TABLES

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 3
T = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double().eval()


def surface(model, axes="eigenvectors", points=5, **options):
    return lossray.surface(model, F.cross_entropy, (X, Y), axes, points, **options)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def loss_of(model):
    with torch.no_grad():
        return float(F.cross_entropy(model(X), Y))


def moved(model, shift):
    other = copy.deepcopy(model)
    nn.utils.vector_to_parameters(flat(model) + shift, other.parameters())
    return other


def test_of_a_quadratic_the_prediction_is_the_surface():
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    H = lossray.Hessian(model, F.mse_loss, (X, T))
    dense = H @ torch.eye(10, dtype=torch.float64)
    step = -0.1 * H.gradient
    for axes, options in (
        ("eigenvectors", {}),
        ("gradient", {}),
        ("update", {"update": step}),
        ("random", {}),
    ):
        found = lossray.surface(model, F.mse_loss, (X, T), axes, 5, **options)
        torch.testing.assert_close(found.loss, found.quadratic(H.loss), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.curvature, found.vectors.T @ dense @ found.vectors)
        torch.testing.assert_close(found.slope, found.vectors.T @ H.gradient)
        assert found.loss[2, 2] == pytest.approx(H.loss)
        assert found.accuracy is None
        assert found.x.tolist() == [-1, -0.5, 0, 0.5, 1]


def test_axes_reach_where_the_quadratic_term_has_added_the_loss():
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    H = lossray.Hessian(model, F.mse_loss, (X, T))
    found = lossray.surface(model, F.mse_loss, (X, T), points=3)
    pairs = lossray.eigenpairs(H, k=2, tol=1e-6)
    longest = float(flat(model).norm())
    for i in range(2):
        length = min(math.sqrt(2 * H.loss / float(pairs.values[i])), longest)
        torch.testing.assert_close(
            found.vectors[:, i], length * pairs.vectors[:, i], rtol=1e-3, atol=1e-3 * length
        )
    wide = lossray.surface(model, F.mse_loss, (X, T), points=3, span=2.0)
    assert wide.x.tolist() == [-2, 0, 2]


@pytest.mark.parametrize("axes", ["eigenvectors", "random", "gradient"])
def test_every_point_is_the_model_there(axes):
    model = net()
    found = surface(model, axes)
    for i, j in ((0, 0), (1, 3), (2, 2), (4, 1)):
        there = moved(model, found.x[i] * found.vectors[:, 0] + found.y[j] * found.vectors[:, 1])
        assert found.loss[i, j] == pytest.approx(loss_of(there), rel=1e-12)
        assert found.accuracy[i, j] == pytest.approx(float((there(X).argmax(1) == Y).double().mean()))


def test_the_data_in_batches_and_with_weights():
    model = net()
    whole = surface(model, "random")
    parts = lossray.surface(model, F.cross_entropy, [(X[:9], Y[:9]), (X[9:], Y[9:])], "random", 5)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.accuracy, whole.accuracy)
    weights = (torch.arange(40) < 9).double()
    weighted = lossray.surface(model, F.cross_entropy, (X, Y, weights), "random", 5)
    torch.testing.assert_close(
        weighted.loss, lossray.surface(model, F.cross_entropy, (X[:9], Y[:9]), "random", 5).loss
    )


def test_the_gradient_leads_downhill_and_the_update_is_its_own_multiple():
    model = net()
    H = lossray.Hessian(model, F.cross_entropy, (X, Y))
    found = surface(model, "gradient")
    assert float(found.slope[0]) < 0
    x = found.vectors[:, 0]
    assert float(F.cosine_similarity(x, H.gradient, dim=0)) == pytest.approx(-1)
    assert float(x @ found.vectors[:, 1]) == pytest.approx(0, abs=1e-10)
    v1 = lossray.eigenpairs(H, k=1, tol=1e-6).vectors[:, 0]
    rest = v1 - (v1 @ x) * x / (x @ x)
    assert float(F.cosine_similarity(rest, found.vectors[:, 1], dim=0)) == pytest.approx(1, abs=1e-5)
    step = -0.3 * H.gradient
    update = surface(model, "update", update=step)
    torch.testing.assert_close(update.loss, found.loss)
    times = float(x.norm() / step.norm())
    assert update.axes[0] == f"the update, {times:.3g} times"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    torch.testing.assert_close(surface(model, "update", optimizer=optimizer).loss, found.loss)


def test_two_directions_in_any_form():
    model = net()
    u, v = (torch.randn(51, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    found = surface(model, (u, v))
    assert torch.equal(found.vectors, torch.stack([u, v], dim=1))
    as_dict = {n: p for n, p in zip(dict(model.named_parameters()), _split(model, v), strict=True)}
    other = surface(model, [_split(model, u), as_dict])
    assert torch.equal(other.loss, found.loss)


def _split(model, vector):
    sizes = [p.numel() for p in model.parameters()]
    return [piece.view(p.shape) for piece, p in zip(vector.split(sizes), model.parameters(), strict=True)]


def test_the_plane_of_three_points_holds_them():
    models = [net(seed) for seed in (0, 1, 2)]
    found = surface(models[0], models, 7)
    assert list(found.marks) == ["origin", "a", "b"]
    for (x, y), model in zip(found.marks.values(), models, strict=True):
        place = flat(models[0]) + x * found.vectors[:, 0] + y * found.vectors[:, 1]
        torch.testing.assert_close(place, flat(model))
        assert found.x[0] < x < found.x[-1]
        assert found.y[0] < y < found.y[-1]
    there = moved(models[0], found.x[1] * found.vectors[:, 0] + found.y[5] * found.vectors[:, 1])
    assert found.loss[1, 5] == pytest.approx(loss_of(there), rel=1e-12)
    # The origin is the first point, whatever the model is, and the form of the points does not matter.
    for points in ([m.state_dict() for m in models], [flat(m) for m in models]):
        other = surface(net(9), points, 7)
        torch.testing.assert_close(other.loss, found.loss)
        assert other.marks["b"][0] == pytest.approx(found.marks["b"][0])
    torch.testing.assert_close(
        found.slope, found.vectors.T @ lossray.Hessian(models[0], F.cross_entropy, (X, Y)).gradient
    )


def test_batch_norm_keeps_the_statistics_of_the_origin():
    models = [net(seed, norm=True) for seed in (0, 1, 2)]
    for seed, model in enumerate(models):
        model[1].running_mean.fill_(seed)
    found = surface(models[2], models)
    other = surface(net(5, norm=True), [m.state_dict() for m in models])
    torch.testing.assert_close(found.loss, other.loss)
    assert found.notes == ("batch-norm statistics are those of the origin at all points",)
    assert surface(models[0], "random").notes == ()


def test_the_model_is_left_as_it_was():
    model = net(norm=True).train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    surface(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))


def test_closures_and_outputs():
    model = net()
    whole = surface(model, "random")
    closure = lambda model, batch: (F.cross_entropy(model(batch[0]), batch[1]), len(batch[1]))  # noqa: E731
    closed = lossray.surface(
        model, closure=closure, data=[(X[:9], Y[:9]), (X[9:], Y[9:])], axes="random", points=5
    )
    torch.testing.assert_close(closed.loss, whole.loss)
    assert closed.accuracy is None

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return {"logits": self.net(x)}

    named = lossray.surface(Named(), F.cross_entropy, (X, Y), "random", 5, outputs="logits")
    torch.testing.assert_close(named.loss, whole.loss)
    torch.testing.assert_close(named.accuracy, whole.accuracy)


class Once(torch.autograd.Function):
    """A function that is differentiated once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].cos()


def test_without_a_hessian_there_are_random_axes_alone():
    model = net()
    model[1] = type("Sine", (nn.Module,), {"forward": lambda self, x: Once.apply(x)})()
    found = surface(model, "random")
    assert torch.isfinite(found.loss).all()
    assert found.curvature.isnan().all()
    (note,) = found.notes
    assert note.startswith("no slope and curvature: ")
    with pytest.raises(ModelError, match="differentiated once"):
        surface(model)


def test_the_table_and_the_text():
    found = surface(net(), points=3)
    frame = found.to_frame()
    declared = [column.name for column in TABLES["surfaces"].columns]
    assert list(frame) == [name for name in declared if name in set(frame)]
    assert len(frame) == 9
    row = frame.set_index(["i", "j"]).loc[0, 2]
    assert (row["x"], row["y"], row["loss"]) == (-1, 1, float(found.loss[0, 2]))
    assert row["accuracy"] == float(found.accuracy[0, 2])
    lines = str(found).splitlines()
    lowest = float(found.loss.min())
    assert lines[0].startswith(f"loss on 3 x 3 points: lowest {lowest:.4g} at (")
    assert lines[1].startswith(f"x: {found.axes[0]}; x = 1 is ")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("axes", "options", "says"),
    [
        ("eigenvector", {}, "axes: found 'eigenvector'.*did you mean 'eigenvectors'"),
        ("update", {}, "needs update=, the step, or optimizer="),
        ("update", {"update": torch.zeros(51)}, "the update is zero"),
        ("update", {"update": torch.zeros(5)}, r"update: found the shape \[5\]"),
        ([torch.ones(51)], {}, "found 1 entries; allowed: two directions, or three points"),
        ([torch.ones(51), torch.ones(5)], {}, r"the second: found the shape \[5\]"),
        ([torch.ones(51), torch.zeros(51)], {}, "a direction is zero"),
        ([net(), net(1)], {}, r"a plane has three points: axes=\(model, a, b\)"),
        ([net(), net(1), net(1)], {}, "lie on a line"),
        ("random", {"points": 1}, "points: found 1"),
        ("random", {"span": 0.0}, "span: found 0.0"),
    ],
)
def test_a_mistake_is_named(axes, options, says):
    with pytest.raises(StudyError, match=says):
        surface(net(), axes, **options)


def test_the_losses_are_those_of_a_study(charted):
    study = lossray.open_study(charted)
    table = study.table("surfaces")
    run_id = table["run_id"][0]
    data = study.data("train")
    for kind in ("eigenvectors", "random"):
        rows = table[(table["run_id"] == run_id) & (table["kind"] == kind)]
        model = study.model(run_id, int(rows["step"].iloc[0]))
        seed = stream(int(study.table("runs")["seed"][0]), "surface", int(rows["step"].iloc[0]))
        found = lossray.surface(model, F.cross_entropy, data, kind, 5, seed=seed).to_frame()
        both = found.merge(rows, on=["i", "j"])
        assert len(both) == 25
        for column in ("x", "y", "x_norm", "y_norm", "loss", "accuracy"):
            np.testing.assert_allclose(both[f"{column}_x"], both[f"{column}_y"], rtol=2e-3, atol=1e-6)
