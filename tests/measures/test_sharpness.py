"""`lossray.sharpness`: closed forms on quadratics, dense spectra in an optimizer's metric, a study's rows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossray
from lossray.errors import StudyError
from lossray.seeds import generator
from lossray.storage.tables import TABLES

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 3


def quadratic():
    """Half a squared error with the Hessian diag(9, 4, 1) at (1, 1, 1): the gradient is (9, 4, 1)."""
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(model.weight)
    data = (torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), torch.zeros(3, 1).double())
    return model, lossray.Hessian(model, lambda o, y: 1.5 * (o - y).square().mean(), data)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def trained(make, steps=5):
    model = net()
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model, optimizer


def hessian(model, data=(X, Y)):
    return lossray.Hessian(model, F.cross_entropy, data)


def dense(matrix):
    return matrix @ torch.eye(matrix.shape[0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "threshold", "first"),  # the first step, in gradients
    [
        ({}, 2, 1.0),
        ({"momentum": 0.9}, 3.8, 1.0),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8, 1.9),
    ],
)
def test_descent_on_a_quadratic_in_closed_form(options, threshold, first):
    model, H = quadratic()
    found = lossray.sharpness(H, torch.optim.SGD(model.parameters(), lr=0.2, **options))
    assert found.lambda_max == found.preconditioned_lambda_max == pytest.approx(9)
    assert found.lambda_max_lr == found.preconditioned_lr == pytest.approx(1.8)
    assert found.threshold == pytest.approx(threshold)
    assert found.lambda_max_residual < 1e-6
    along = (9**3 + 4**3 + 1) / (81 + 16 + 1)  # g'Hg / |g|^2
    assert found.critical_sharpness == pytest.approx(first * along, rel=3e-4)


def test_critical_sharpness_of_a_given_update():
    _, H = quadratic()
    delta = torch.tensor([-1.0, -2.0, 0.5])
    found = lossray.sharpness(H, update={"weight": 0.05 * delta[None]}, lr=0.05)
    slope, bend = -9 - 8 + 0.5, 9 + 16 + 0.25  # -delta'H delta / g'delta
    assert found.critical_sharpness == pytest.approx(-bend / slope, rel=3e-4)
    assert found.lambda_max_lr == pytest.approx(0.45)
    assert (found.threshold, found.preconditioned_lambda_max) == (None, None)
    uphill = lossray.sharpness(H, update=torch.ones(3), lr=1.0)
    assert math.isnan(uphill.critical_sharpness)


def test_what_adam_meets_is_the_dense_spectrum_in_its_metric():
    model, optimizer = trained(lambda model: torch.optim.Adam(model.parameters(), lr=0.03))
    found = lossray.sharpness(hessian(model), optimizer, tol=1e-9)
    second = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**5) for p in model.parameters()]
    scale = torch.cat([(v.sqrt() + 1e-8).flatten() for v in second]).rsqrt()
    H = dense(hessian(model))
    assert found.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]))
    largest = float(torch.linalg.eigvalsh(scale[:, None] * H * scale)[-1])
    assert found.preconditioned_lambda_max == pytest.approx(largest, rel=1e-8)
    assert found.preconditioned_lr == pytest.approx(0.03 * largest, rel=1e-8)
    assert found.threshold == pytest.approx(38)
    assert found.lr == 0.03
    assert found.notes == ()


def test_groups_with_rates_of_their_own_share_the_largest():
    def make(model):
        groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters()}]
        return torch.optim.SGD(groups, lr=0.1)

    model, optimizer = trained(make)
    found = lossray.sharpness(hessian(model), optimizer, tol=1e-9)
    rates = torch.cat([torch.full((30,), 0.01), torch.full((21,), 0.1)]).double().sqrt()
    largest = float(torch.linalg.eigvalsh(rates[:, None] * dense(hessian(model)) * rates)[-1])
    assert found.preconditioned_lr == pytest.approx(largest, rel=1e-7)
    assert (found.lr, found.lambda_max_lr) == (pytest.approx(0.1), None)


def test_batch_sharpness_is_the_ratio_of_means_over_the_minibatches():
    model = net()
    batches = [(X[i : i + 10], Y[i : i + 10]) for i in range(0, 40, 10)]
    found = lossray.sharpness(hessian(model), minibatches=batches)
    curved, squares = [], []
    for batch in batches:
        H = hessian(model, batch)
        curved.append(float(H.gradient @ (H @ H.gradient)))
        squares.append(float(H.gradient @ H.gradient))
    assert found.batch_sharpness == pytest.approx(sum(curved) / sum(squares))
    assert found.batches == 4
    assert found.batch_sharpness_stderr > 0
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=10)
    again = lossray.sharpness(hessian(model), minibatches=loader)
    assert again.batch_sharpness == pytest.approx(found.batch_sharpness, rel=1e-12)


def test_of_all_examples_at_once_it_is_exact_and_of_one_minibatch_its_error_is_open():
    H = hessian(net())
    full = lossray.sharpness(H, minibatches=(X, Y))
    g = H.gradient
    assert full.batch_sharpness == pytest.approx(float(g @ (H @ g) / (g @ g)))
    assert full.batch_sharpness_stderr == 0
    assert math.isnan(lossray.sharpness(H, minibatches=[(X[:9], Y[:9])]).batch_sharpness_stderr)


def test_a_closure_has_minibatches_of_its_own():
    model = net()
    closure = lambda model, batch: (F.cross_entropy(model(batch["x"]), batch["y"]), len(batch["y"]))  # noqa: E731
    batches = [{"x": X[i : i + 20], "y": Y[i : i + 20]} for i in (0, 20)]
    found = lossray.sharpness(lossray.Hessian(model, closure=closure, data=batches), minibatches=batches)
    pairs = [(X[i : i + 20], Y[i : i + 20]) for i in (0, 20)]
    plain = lossray.sharpness(hessian(model), minibatches=pairs)
    assert found.batch_sharpness == pytest.approx(plain.batch_sharpness)


def test_what_is_not_known_is_a_note():
    model = net()
    fresh = lossray.sharpness(hessian(model), torch.optim.Adam(model.parameters()))
    assert "no preconditioner: the optimizer has none, or has taken no step" in fresh.notes
    assert fresh.preconditioned_lr is None

    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"rate": 0.1})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["rate"] * p.grad

    own = lossray.sharpness(hessian(model), Own(model.parameters()))
    assert any("optimizer Own is not known" in note for note in own.notes)
    assert (own.lr, own.lambda_max_lr, own.threshold, own.critical_sharpness) == (None,) * 4
    assert "note: optimizer Own is not known" in str(own)


def test_it_becomes_a_row_of_the_table_and_prints_as_a_few_lines():
    model, optimizer = trained(lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01))
    found = lossray.sharpness(hessian(model), optimizer, minibatches=[(X[:20], Y[:20]), (X[20:], Y[20:])])
    frame = found.to_frame()
    assert list(frame) == [c.name for c in TABLES["sharpness"].columns if c.name not in ("run_id", "step")]
    assert frame.notna().all(axis=None)
    lines = repr(found).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "largest eigenvalue",
        "preconditioned",
        "threshold",
        "batch sharpness",
        "critical sharpness",
    ]
    assert f"times lr {found.preconditioned_lr:.5g}" in lines[1]
    assert repr(lossray.sharpness(hessian(model))).count("\n") == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"update": torch.ones(51)}, "found update without lr"),
        ({"lr": 0.0}, "lr: found 0.0; allowed: above 0"),
        ({"optimizer": "adam"}, "optimizer: found str"),
        ({"update": torch.ones(5), "lr": 1.0}, r"update: found the shape \[5\]"),
    ],
)
def test_a_mistake_is_named(change, says):
    with pytest.raises(StudyError, match=says):
        lossray.sharpness(hessian(net()), **change)


def test_only_a_hessian_has_a_sharpness_and_the_rate_is_said_once():
    model = net()
    for other in (
        lossray.GaussNewton(model, F.cross_entropy, (X, Y)),
        lossray.Restricted(hessian(model), ["0.*"]),
    ):
        with pytest.raises(StudyError, match=r"needed: lossray\.Hessian"):
            lossray.sharpness(other)
    with pytest.raises(StudyError, match="both optimizer and lr"):
        lossray.sharpness(hessian(model), torch.optim.SGD(model.parameters(), lr=0.1), lr=0.1)


def test_the_numbers_are_those_of_a_study(undisturbed):
    study = lossray.open_study(undisturbed)
    inputs, targets = study.data("train")
    draws = [
        torch.randperm(len(targets), generator=generator(0, "batch sharpness", i))[:16] for i in range(16)
    ]
    minibatches = [(inputs[index], targets[index]) for index in draws]
    for row in study.table("sharpness").query("step == 12").to_dict("records"):
        model = study.model(row["run_id"], 12)
        found = lossray.sharpness(
            lossray.Hessian(model, F.cross_entropy, (inputs, targets)), minibatches=minibatches, tol=1e-5
        )
        assert found.lambda_max == pytest.approx(row["lambda_max"], rel=1e-3)
        assert found.batch_sharpness == pytest.approx(row["batch_sharpness"], rel=1e-4)
        assert found.batch_sharpness_stderr == pytest.approx(row["batch_sharpness_stderr"], rel=1e-4)
        assert found.batches == row["batches"]
    assert np.isfinite(found.lambda_max)
