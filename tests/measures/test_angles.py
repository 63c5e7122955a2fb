"""`lossray.angles`: closed forms, dense eigenvectors in every gauge, and the rows of a study's table."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossray
from lossray.errors import StudyError
from lossray.networks.layout import layout_of
from lossray.networks.symmetry import rescaling_symmetry
from lossray.storage.tables import TABLES

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 3


def net(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).double()


def trained(optimizer=torch.optim.Adam, steps=5, **options):
    """A network after some steps, and the optimizer that made them."""
    model = net()
    steps_by = optimizer(model.parameters(), **{"lr": 0.05, **options})
    for _ in range(steps):
        steps_by.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        steps_by.step()
    return model, steps_by


def hessian(model):
    return lossray.Hessian(model, F.cross_entropy, (X, Y))


def dense(matrix):
    return (matrix @ torch.eye(matrix.shape[0], dtype=torch.float64)).numpy()


def vector(seed, d):
    return torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_diagonal_hessian_in_closed_form():
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 0.5, 1.0]]))
    data = (torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])).double(), torch.zeros(4, 1).double())
    H = lossray.Hessian(model, lambda o, y: 2 * (o - y).square().mean(), data)  # diag(16, 9, 4, 1)
    u = torch.tensor([0.0, 3.0, 4.0, 0.0])
    frame = lossray.angles(H, {"update": u}, k=(1, 2, 3, 9), gauges=("raw", "adaptive")).to_frame()
    rows = frame.set_index(["gauge", "subspace"])
    assert list(frame["subspace"].unique()) == ["v1", "top2", "top3", "vmin"]
    assert rows["energy"]["raw", "top2"] == pytest.approx(9 / 25)
    assert rows["angle_degrees"]["raw", "top2"] == pytest.approx(math.degrees(math.acos(3 / 5)))
    assert rows["null_ratio"]["raw", "top2"] == pytest.approx(9 / 25 * 4 / 2)
    assert rows["energy"]["raw", "vmin"] == pytest.approx(0)
    # |theta| o H o |theta| is diag(16, 36, 1, 1), in which the second axis leads, and u is (0, 1.5, 8, 0).
    assert rows["energy"]["adaptive", "v1"] == pytest.approx(1.5**2 / (1.5**2 + 8**2))


@pytest.mark.parametrize("as_covectors", [True, False])
def test_in_every_gauge_the_angles_are_those_to_the_dense_eigenvectors(as_covectors):
    model, optimizer = trained()
    H = hessian(model)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    symmetry = rescaling_symmetry(model, layout_of(model))
    second = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**5) for p in model.parameters()]
    P = torch.cat([(v.sqrt() + 1e-8).flatten() for v in second])
    scales = {
        "raw": torch.ones_like(theta),
        "balanced": 1 / symmetry.diagonal(symmetry.balance_factors(theta[None]))[0],
        "adaptive": theta.abs(),
        "preconditioned": P.rsqrt(),
    }
    u = vector(1, len(theta))
    options = {"covectors": ["u"]} if as_covectors else {}
    found = lossray.angles(
        H, {"u": u}, k=(1, 3), gauges=list(scales), optimizer=optimizer, tol=1e-9, **options
    )
    rows = found.to_frame().query("direction == 'u'").set_index(["gauge", "subspace"])
    for gauge, s in scales.items():
        own = (u * s if as_covectors else u / s).numpy()
        basis = np.linalg.eigh(s.numpy()[:, None] * dense(H) * s.numpy())[1].T[::-1]
        for subspace, space in (("v1", basis[:1]), ("top3", basis[:3]), ("vmin", basis[-1:])):
            row = rows.loc[gauge, subspace]
            energy = np.square(space @ own).sum() / (own @ own)
            assert row["energy"] == pytest.approx(energy, rel=1e-6, abs=1e-12)
            flips = (np.square(own) * np.square(space).sum(axis=0)).sum() / (own @ own)
            assert row["sign_flip_null"] == pytest.approx(flips, rel=1e-6)
            assert (row["dim"], row["dropped"]) == (len(u), 0)
    assert set(found.pairs) == set(scales)
    assert found.notes == ()


def test_the_rows_have_the_columns_of_the_table_and_print_as_a_few_lines():
    model, optimizer = trained()
    found = lossray.angles(hessian(model), optimizer=optimizer, gauges=("raw", "balanced", "adaptive"))
    frame = found.to_frame()
    assert list(frame) == [c.name for c in TABLES["angles"].columns if c.name not in ("run_id", "step")]
    assert set(frame["direction"]) == {"gradient", "momentum", "update"}
    lines = repr(found).splitlines()
    assert len(lines) == 2 + len(frame.drop_duplicates(["direction", "gauge"]))
    energy = frame.query("direction == 'update' and gauge == 'raw' and subspace == 'v1'")["energy"].item()
    (line,) = [line for line in lines if line.startswith("update                 raw")]
    assert f" {energy:.2g} (" in line
    many = lossray.angles(hessian(model), {f"u{i}": vector(i, 51) for i in range(20)}, gauges="raw")
    assert len(repr(many).splitlines()) == 13
    assert "10 more in .to_frame()" in repr(many)


def test_all_forms_of_a_direction_are_one():
    model = net()
    H = hessian(model)
    F.cross_entropy(model(X), Y).backward()
    pieces = [p.grad for p in model.parameters()]
    forms = {
        "flat": nn.utils.parameters_to_vector(pieces),
        "array": nn.utils.parameters_to_vector(pieces).numpy(),
        "list": pieces,
        "generator": (p.grad for p in model.parameters()),
        "dict": {name: p.grad for name, p in model.named_parameters()},
    }
    frame = lossray.angles(H, forms, gauges="raw").to_frame()
    for _, rows in frame.drop(columns=["direction", "gauge"]).groupby("subspace"):
        assert len(rows) == len(forms)
        assert len(rows.drop_duplicates()) == 1
    default = lossray.angles(H, gauges="raw").to_frame()
    assert set(default["direction"]) == {"gradient"}
    expected = frame.query("direction == 'list'")["energy"].to_numpy()
    np.testing.assert_allclose(default["energy"], expected, rtol=1e-9, atol=1e-20)


def test_frozen_parameters_and_buffers_are_left_out():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    model[0].weight.requires_grad_(False)
    F.cross_entropy(model(X), Y).backward()
    H = hessian(model)
    forms = {
        "list": [p.grad for p in model.parameters()],
        "dict": {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()},
    }
    frame = lossray.angles(H, forms, k=1, gauges="raw").to_frame()
    assert set(frame["dim"]) == {6 + 6 + 6 + 18 + 3}


def test_momentum_and_update_are_those_of_the_next_step():
    model, optimizer = trained(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
    H = hessian(model)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    state = {name: p.clone() for name, p in model.named_parameters()}
    buffers = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()])
    found = lossray.angles(H, {"by hand": buffers}, optimizer=optimizer, gauges="raw").to_frame()
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    for name, p in model.named_parameters():  # back to where the Hessian is
        p.data.copy_(state[name])
    own = lossray.angles(H, {"step": moved}, gauges="raw").to_frame()
    energies = {
        direction: rows["energy"].to_numpy()
        for direction, rows in [*found.groupby("direction"), *own.groupby("direction")]
    }
    np.testing.assert_allclose(energies["update"], energies["step"], rtol=1e-9, atol=1e-20)
    np.testing.assert_allclose(energies["momentum"], energies["by hand"], rtol=1e-12)


def test_the_update_is_that_at_the_minibatch_gradient_where_it_is_given():
    model, optimizer = trained(torch.optim.SGD)
    found = lossray.angles(
        hessian(model), {"minibatch_gradient": vector(3, 51)}, optimizer=optimizer, gauges="raw"
    )
    frame = found.to_frame()
    update, gradient = (
        frame[frame["direction"] == name]["energy"].to_numpy() for name in ("update", "minibatch_gradient")
    )
    np.testing.assert_allclose(update, gradient, rtol=1e-6)  # plain descent
    assert found.notes == ("no direction 'momentum': the optimizer keeps none, or has taken no step",)


def test_for_plain_descent_the_preconditioned_gauge_is_the_raw_one():
    model, optimizer = trained(torch.optim.SGD)
    H = hessian(model)
    before = H.matvecs
    found = lossray.angles(H, optimizer=optimizer, gauges=("raw", "preconditioned")).to_frame()
    of_two = H.matvecs - before
    raw, same = (found[found["gauge"] == g].drop(columns="gauge") for g in ("raw", "preconditioned"))
    assert raw.reset_index(drop=True).equals(same.reset_index(drop=True))
    lossray.angles(H, optimizer=optimizer, gauges="raw")
    assert H.matvecs - before == 2 * of_two  # one solve each


def test_what_is_missing_is_a_note():
    smooth = hessian(net(nn.Tanh))
    found = lossray.angles(smooth)
    assert set(found.to_frame()["gauge"]) == {"raw"}
    (note,) = found.notes
    assert note.startswith("no gauge 'balanced': ")
    assert f"note: {note}" in str(found)
    model = net()
    fresh = torch.optim.Adam(model.parameters())
    found = lossray.angles(hessian(model), optimizer=fresh, gauges=("raw", "preconditioned"))
    assert "no gauge 'preconditioned': the optimizer has none, or has taken no step" in found.notes

    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure):
            raise ZeroDivisionError("by zero")

    found = lossray.angles(hessian(model), optimizer=Own(model.parameters()), gauges="raw")
    assert any("optimizer Own is not known" in note for note in found.notes)
    assert any(note.startswith("no update: Own.step raised TypeError") for note in found.notes)


def test_a_scale_stands_in_for_the_optimizer():
    model, _ = trained()
    P = vector(4, 51).exp()
    frame = lossray.angles(hessian(model), gauges="preconditioned", scale=P, k=1).to_frame()
    H = dense(hessian(model))
    s = P.rsqrt().numpy()
    v1 = np.linalg.eigh(s[:, None] * H * s)[1][:, -1]
    g = s * hessian(model).gradient.numpy()
    assert frame["energy"][0] == pytest.approx((v1 @ g) ** 2 / (g @ g), rel=1e-3)
    P[7] = torch.inf  # of what no step moves
    assert set(lossray.angles(hessian(model), gauges="preconditioned", scale=P).to_frame()["dropped"]) == {1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"directions": {"u": torch.ones(50)}},
            r"direction 'u': found the shape \[50\]; allowed: a tensor \[51",
        ),
        ({"directions": {"u": "x"}}, "found str"),
        ({"directions": {"u": [torch.ones(6, 4)]}}, "found 1 entries; allowed: one for each of 4"),
        ({"directions": {"u": [torch.ones(4, 6), None, None, None]}}, r"'0.weight': found a tensor \[4, 6\]"),
        ({"directions": {"u": [None] * 4}}, r"nothing but None; call backward"),
        ({"directions": {"u": {"0.wieght": torch.ones(6, 4)}}}, "found '0.wieght'.*did you mean '0.weight'"),
        ({"directions": {"u": {"0.weight": torch.ones(6, 4)}}}, "parameter '0.bias' is missing"),
        ({"directions": {"u": torch.full((51,), torch.nan)}}, "not finite"),
        ({"directions": torch.ones(51)}, "directions: found Tensor; allowed: a dict"),
        ({"gauges": ["balance"]}, "gauges: found 'balance'; .*'balanced'"),
        ({"gauges": ["preconditioned"]}, "needs optimizer=, or scale="),
        ({"gauges": ["preconditioned"], "scale": torch.zeros(51)}, "scale: found .*above 0"),
        ({"k": (0,)}, "k: found"),
        ({"k": (51, 80)}, "below that of the parameters, 51"),
        ({"optimizer": "adam"}, "optimizer: found str"),
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())}, "steps none of the parameters"),
    ],
)
def test_a_mistake_is_named(change, says):
    with pytest.raises(StudyError, match=says):
        lossray.angles(hessian(net()), **change)


def test_matrices_without_a_model_and_models_that_have_moved_are_refused():
    model = net()
    H = hessian(model)
    for other in (lossray.Restricted(H, ["0.*"]), lossray.Scaled(H, torch.ones(51)), model):
        with pytest.raises(StudyError, match=r"needed: lossray\.Hessian"):
            lossray.angles(other)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(StudyError, match="weights of Sequential have changed"):
        lossray.angles(H)


def test_a_matrix_keeps_its_point_when_the_model_is_trained_on():
    model = net()
    H = hessian(model)
    v, expected = vector(0, 51), dense(hessian(net()))
    with torch.no_grad():
        model[0].weight.mul_(3)
    np.testing.assert_allclose((H @ v).numpy(), expected @ v.numpy(), rtol=1e-12, atol=1e-14)
    assert lossray.analyse(H, top=1).product_error < 1e-12


def test_the_energies_are_those_of_a_study(undisturbed):
    study = lossray.open_study(undisturbed)
    table = study.table("angles")
    run_id, step = table["run_id"][0], 12
    H = lossray.Hessian(study.model(run_id, step), F.cross_entropy, study.data("train"))
    rows = table[(table["run_id"] == run_id) & (table["step"] == step) & (table["direction"] == "gradient")]
    gauges = ["raw", "balanced", "adaptive"]
    sizes = sorted(set(rows["k"]))
    frame = lossray.angles(H, k=sizes, gauges=gauges, tol=1e-5).to_frame()
    both = frame.merge(rows[rows["gauge"].isin(gauges)], on=["direction", "gauge", "subspace"])
    assert len(both) == len(frame) == len(gauges) * (len(sizes) + 1)
    known = both[(both["resolved_x"] == True) & (both["resolved_y"] == True)]  # noqa: E712
    assert len(known) > len(gauges)
    for column, tolerance in (("energy", 1e-2), ("sign_flip_null", 1e-2), ("layer_null", 1e-2)):
        np.testing.assert_allclose(known[f"{column}_x"], known[f"{column}_y"], rtol=tolerance, atol=1e-5)
    assert both["dim_x"].equals(both["dim_y"].rename("dim_x"))
