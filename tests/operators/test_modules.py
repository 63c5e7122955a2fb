"""What a user can get wrong, each refused by name; and the user's module, which is left as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lossray
from lossray.errors import DataError, ModelError
from lossray.networks.losses import cross_entropy
from lossray.operators.modules import ModuleObjective

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, generator=GENERATOR)
Y = torch.arange(12) % 3


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class _Everything(nn.Module):
    """Batch norm, dropout, a frozen parameter, layers in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)
        self.output = nn.Linear(5, 3)
        self.output.bias.requires_grad_(False)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(self.layer(x)))
        if self.fails:
            raise RuntimeError("no more")
        return self.output(hidden)  # type: ignore[no-any-return]


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(p) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def _assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = _state(model)
    for key in ("identities", "modes", "requires_grad", "hooks"):
        assert after[key] == before[key], key
    assert all(torch.equal(after["weights"][name], tensor) for name, tensor in before["weights"].items())
    assert torch.equal(after["random"], before["random"])
    for new, old in zip(after["grads"], before["grads"], strict=True):
        assert (new is None) == (old is None)
        assert old is None or torch.equal(new, old)


@pytest.mark.parametrize("mode", ["retained", "linearized", "recompute"])
def test_the_module_is_left_as_it_was(mode: str) -> None:
    model = _Everything()
    model.norm.eval()
    model.layer.weight.grad = torch.full((5, 4), 7.0)
    model.layer.register_forward_hook(lambda module, args, output: None)
    before = _state(model)
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    for kind in (lossray.Hessian, lossray.GaussNewton, lossray.EmpiricalFisher):
        matrix = kind(model, cross_entropy, loader, mode=mode)
        assert torch.isfinite(matrix @ torch.ones(matrix.shape[0])).all()
    _assert_same(model, before)


def test_the_module_is_left_as_it_was_also_when_it_raises() -> None:
    model = _Everything()
    model.output.eval()
    model.fails = True
    before = _state(model)
    with pytest.raises(ModelError, match=r"_Everything raised RuntimeError: no more"):
        lossray.Hessian(model, cross_entropy, (X, Y), train=True)
    _assert_same(model, before)


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))  # type: ignore[no-any-return]


def test_randomness_is_refused() -> None:
    dropping = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    with pytest.raises(ModelError, match=r"Sequential is random: 1 drop units in train mode.*train=False"):
        lossray.Hessian(dropping, cross_entropy, (X, Y), train=True)
    assert lossray.Hessian(dropping, cross_entropy, (X, Y)).shape == (43, 43)  # nothing drops in eval mode
    with pytest.raises(ModelError, match="_Noisy is random: two evaluations on the same examples"):
        lossray.Hessian(_Noisy(), cross_entropy, (X, Y))


def test_data_that_change_are_refused() -> None:
    with pytest.raises(DataError, match=r"data differ from one reading to the next.*shuffle=False"):
        lossray.Hessian(_net(), cross_entropy, DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True))

    class Growing:
        readings = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.readings += 1
            yield X + self.readings, Y

    with pytest.raises(DataError, match="differ from one reading"):
        lossray.Hessian(_net(), cross_entropy, Growing())


def test_batch_norm_over_several_batches_is_refused_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    halves = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    with pytest.raises(ModelError, match=r"batch norm in train mode \(1\) makes the loss .* 2 batches"):
        lossray.Hessian(model, cross_entropy, halves, train=True)
    with pytest.raises(ModelError, match=r"batch norm in train mode \(1\).*Fisher needs train=False"):
        lossray.EmpiricalFisher(model, cross_entropy, (X, Y), train=True)
    assert lossray.Hessian(model, cross_entropy, halves).shape == (53, 53)
    without = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    with pytest.raises(ModelError, match="2 batches"):  # it uses those of the batch in eval mode too
        lossray.Hessian(without, cross_entropy, halves)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_random_models_are_refused_at_any_scale_of_the_loss(scale: float) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return scale * (super().forward(x) + torch.randn(len(x), 3, dtype=x.dtype))

    targets = scale * torch.randn(12, 3)
    with pytest.raises(ModelError, match="Noisy is random"):
        lossray.Hessian(Noisy(4, 3), nn.MSELoss(), (X, targets))


def test_losses_that_are_no_mean_are_refused_where_it_matters() -> None:
    total = nn.CrossEntropyLoss(reduction="sum")
    halves = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    with pytest.raises(ModelError, match=r"no mean over examples.*the mean over several batches"):
        lossray.Hessian(_net(), total, halves)
    with pytest.raises(ModelError, match="a weighted mean"):
        lossray.Hessian(_net(), total, (X, Y, torch.ones(12)))
    with pytest.raises(ModelError, match="the gradient of each example"):
        lossray.EmpiricalFisher(_net(), total, (X, Y))
    with pytest.raises(ModelError, match=r"returns a tensor \[12\] where a scalar tensor"):
        lossray.Hessian(_net(), nn.CrossEntropyLoss(reduction="none"), (X, Y))


def test_closures_have_a_hessian_alone() -> None:
    closure = lambda model, batch: (cross_entropy(model(batch[0]), batch[1]), 1.0)  # noqa: E731
    for kind, reason in (
        (lossray.GaussNewton, "outputs and the loss apart"),
        (lossray.EmpiricalFisher, "each example"),
    ):
        with pytest.raises(ModelError, match=reason):
            kind(_net(), closure=closure, data=[(X, Y)])
    cases = {
        "a tensor []; needed: (mean loss, weight)": lambda m, b: cross_entropy(m(b[0]), b[1]),
        "the mean loss is a tensor [12, 3]": lambda m, b: (m(b[0]), 1.0),
        "the mean loss is a float": lambda m, b: (1.0, 1.0),
        "found the weight 0.0; allowed: above 0": lambda m, b: (cross_entropy(m(b[0]), b[1]), 0.0),
    }
    for message, wrong in cases.items():
        with pytest.raises(ModelError) as caught:
            lossray.Hessian(_net(), closure=wrong, data=[(X, Y)])
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (((x, y) for x, y in [(X, Y)]), "a generator, which can be read once"),
        ([], "an empty list"),
        (7, "found int"),
        (X, r"found a tensor \[12, 4\]"),
        ([(X,)], "found a tuple of 1"),
        ([(X, Y, None, 1)], "found a tuple of 4"),
        ((X, Y[:5]), r"inputs a tensor \[12, 4\] and targets a tensor \[5\]"),
        ((X[:0], Y[:0]), "no example"),
        ((X, Y, torch.ones(3)), r"weights of a batch: found a tensor \[3\]; needed: one for each of 12"),
        ((X, Y, -torch.ones(12)), "negative or non-finite"),
        ((X, Y, torch.zeros(12)), "no example with a positive weight"),
        ((X * float("nan"), Y), "batch 0 of the data: found nan in the inputs of example 0"),
        (None, "data: found None"),
    ],
)
def test_impossible_data_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lossray.Hessian(_net(), cross_entropy, data)


def test_impossible_models_and_arguments_are_refused() -> None:
    closure = lambda model, batch: (model(X).sum(), 1.0)  # noqa: E731
    frozen = _net().requires_grad_(False)
    infinite = _net()
    with torch.no_grad():
        infinite[0].bias[1] = float("inf")
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("model: found int", 3, cross_entropy, {}),
        ("Sequential has lazy layers", nn.Sequential(nn.LazyLinear(3)), cross_entropy, {}),
        ("found both of loss and closure", _net(), cross_entropy, {"closure": closure}),
        ("found neither of loss and closure", _net(), None, {}),
        ("loss: found str; allowed: a function", _net(), "mse", {}),
        ("no trainable parameter", frozen, cross_entropy, {}),
        ("parameter '0.bias' has values that are not finite", infinite, cross_entropy, {}),
        ("dtype: found torch.float16; allowed", _net(), cross_entropy, {"dtype": torch.float16}),
        (
            "parameter '0.weight' is torch.complex64",
            nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)),
            cross_entropy,
            {},
        ),
    ]
    for message, model, loss, options in cases:
        with pytest.raises(ModelError, match=message):
            lossray.Hessian(model, loss, (X, Y), **options)
    with pytest.raises(ModelError, match="raised RuntimeError: mat1 and mat2"):
        lossray.Hessian(_net(), cross_entropy, (X[:, :2], Y))
    with pytest.raises(ModelError, match=r"loss 'cross_entropy' raised IndexError: Target 1[0-2] is"):
        lossray.Hessian(_net(), cross_entropy, (X, Y + 10))
    with pytest.raises(
        ValueError, match="mode: found 'fast'; allowed: auto, retained, linearized, recompute"
    ):
        lossray.Hessian(_net(), cross_entropy, (X, Y), mode="fast")


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


def test_outputs_of_any_form_have_a_hessian() -> None:
    loss = lambda outputs, targets: cross_entropy(outputs["logits"], targets)  # noqa: E731
    assert lossray.Hessian(_Pair(), loss, (X, Y)).shape == (15, 15)
    with pytest.raises(
        ModelError, match=r"_Pair returns a dict with logits where Gauss-Newton and Fisher need one tensor"
    ):
        lossray.GaussNewton(_Pair(), loss, (X, Y))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: object, slope: Tensor) -> Tensor:
        return 2 * slope


class _Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(self.layer(x))  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize("kind", [lossray.Hessian, lossray.GaussNewton])
def test_functions_that_can_be_differentiated_once_are_refused(kind: Any) -> None:
    """Autograd would leave them out without a word, and the product would be wrong."""
    with pytest.raises(ModelError, match="differentiated once only"):
        kind(_Stubborn(), cross_entropy, (X, Y))


def test_vectors_of_another_shape_are_refused() -> None:
    hessian = lossray.Hessian(_net(), cross_entropy, (X, Y))
    with pytest.raises(ValueError, match=r"found the shape \[4\]; allowed: \[43\] or \[43, k\]"):
        hessian @ torch.ones(4)
    with pytest.raises(ValueError, match=r"found torch.int64; allowed: real floating-point"):
        hessian @ torch.ones(43, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"vectors: found \[43\]; allowed: \[1, 43\] or \[1, b, 43\]"):
        hessian.packed.apply(torch.ones(43))


def test_data_stay_where_they_are() -> None:
    """One batch at a time is converted: a loader is read anew for every product in mode "recompute"."""
    readings = []

    class Data:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            readings.append(1)
            yield X[:5], Y[:5]
            yield X[5:], Y[5:]

    hessian = lossray.Hessian(_net(), cross_entropy, Data(), mode="recompute")
    hessian.packed.require_derivatives()  # before the first product
    before = len(readings)
    hessian @ torch.ones(43, 4)  # a block reads the data once
    assert len(readings) == before + 1


def test_another_dtype_starts_from_the_original_weights() -> None:
    model = _net().double()
    objective = ModuleObjective(model, cross_entropy, (X.double(), Y), dtype=torch.float32)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.equal(objective.to(torch.float64).theta[0].detach(), theta)
    assert torch.equal(objective.theta[0].detach(), theta.float())


def test_inference_mode_is_refused_and_no_grad_is_no_trouble() -> None:
    model = _net()
    with torch.inference_mode(), pytest.raises(ModelError, match=r"inference_mode\(\) nothing can be diff"):
        lossray.Hessian(model, cross_entropy, (X, Y))
    vector = torch.randn(43, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inside = lossray.Hessian(model, cross_entropy, (X, Y)) @ vector
    assert torch.equal(inside, lossray.Hessian(model, cross_entropy, (X, Y)) @ vector)
    assert inside.norm() > 0


@pytest.mark.parametrize("kind", [lossray.Hessian, lossray.GaussNewton, lossray.EmpiricalFisher])
def test_a_loss_that_autograd_has_not_recorded_is_refused(kind: Any) -> None:
    def detached(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets).detach()

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    for model, loss in ((_net(), detached), (Silent(), cross_entropy)):
        with pytest.raises(
            ModelError, match=r"does not depend on the parameters as far as autograd can tell"
        ):
            kind(model, loss, (X, Y))


def test_a_compiled_model_is_analysed_as_what_it_was_made_from() -> None:
    model = _net()
    compiled = torch.compile(model, backend="eager")
    vector = torch.randn(43, generator=torch.Generator().manual_seed(1))
    expected = lossray.Hessian(model, cross_entropy, (X, Y)) @ vector
    assert torch.equal(lossray.Hessian(compiled, cross_entropy, (X, Y)) @ vector, expected)


SORTED = torch.arange(3).repeat_interleave(400)
MANY = torch.randn(1200, 4, generator=torch.Generator().manual_seed(3))


def _ignoring() -> tuple[Any, Tensor]:
    targets = SORTED.clone()
    targets[700:1100] = -100
    return nn.CrossEntropyLoss(), targets


NOT_MEANS = {
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 20.0])), SORTED),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), SORTED),
    "ignored targets": _ignoring(),
}


@pytest.mark.parametrize("name", NOT_MEANS)
def test_losses_divided_by_something_else_than_the_examples(name: str) -> None:
    """Refused over several batches and in the Fisher; one batch is never split."""
    loss, targets = NOT_MEANS[name]
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3))
    for first in (1, 600):
        halves = [(MANY[:first], targets[:first]), (MANY[first:], targets[first:])]
        with pytest.raises(ModelError, match="is no mean over examples"):
            lossray.Hessian(model, loss, halves)
    with pytest.raises(ModelError, match="is no mean over examples"):
        lossray.EmpiricalFisher(model, loss, (MANY, targets))
    whole = lossray.Hessian(model, loss, (MANY, targets))
    assert whole.loss == pytest.approx(float(loss(model(MANY), targets).detach()), rel=1e-5)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model(MANY), targets), parameters, create_graph=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    vector = torch.randn(whole.shape[0], generator=torch.Generator().manual_seed(4))
    exact = torch.cat([part.flatten() for part in torch.autograd.grad(flat @ vector, parameters)])
    assert (whole @ vector - exact).norm() < 1e-4 * exact.norm()


class _OfOneSize(nn.Module):
    """Takes batches of so many examples alone, as recurrent networks with a fixed first state do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = _net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(self.size, 4))


@pytest.mark.parametrize("size", [10, 90])
def test_models_that_take_batches_of_one_size(size: int) -> None:
    x = torch.randn(2 * size, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(2 * size) % 3
    model, halves = _OfOneSize(size), list(zip(x.split(size), labels.split(size), strict=True))
    vector = torch.randn(43, generator=torch.Generator().manual_seed(3))

    def closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return cross_entropy(model(batch[0]), batch[1]), len(batch[1])

    both = lossray.Hessian(model, closure=closure, data=halves) @ vector
    assert torch.allclose(
        both, lossray.Hessian(model.net, cross_entropy, halves) @ vector, rtol=1e-4, atol=1e-6
    )
    one = lossray.Hessian(model, cross_entropy, halves[0]) @ vector
    free = lossray.Hessian(model.net, cross_entropy, halves[0]) @ vector
    assert torch.allclose(one, free, rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ModelError, match=r"part of the examples: .* batches of one size alone, pass closure="
    ):
        lossray.Hessian(model, cross_entropy, halves)
    wrong = [halves[0], (halves[1][0], labels[size:] + 5)]
    with pytest.raises(ModelError, match="out of bounds") as caught:
        lossray.Hessian(model.net, cross_entropy, wrong)
    assert "one size" not in str(caught.value)
