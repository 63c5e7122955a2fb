"""Whatever the architecture: `balance`, `rescale` and `align` keep the function to rounding, or refuse it.

The architectures are of the kinds that a picture of the operations gets wrong: axes that are not what they
look like, state outside of the layers, layers whose weights are made from others.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import lossray
from lossray.connectivity.align import aligned
from lossray.errors import ModelError
from lossray.networks.as_found import copied
from lossray.networks.layout import layout_of
from lossray.networks.permutations import permutation_symmetry, permute
from lossray.networks.symmetry import rescaling_symmetry

SCALE = 3.0


class Body(nn.Module):
    """Layers and a forward pass, both given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Peeking(nn.Module):
    """It reads the weights of a layer that is not its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.held = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.held[0].weight.mean()


def peeking() -> nn.Module:
    layer = nn.Linear(6, 5)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 2), Peeking(layer))


class Two(nn.Module):
    """Of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.o(torch.relu(self.a(x))) + y


class Steep(nn.Module):
    """Python decides by the norm of a buffer-free copy of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.o(h * 2 if float(self.a.weight.detach().norm()) > 2 else h)


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def tokens(norm: nn.Module, *, t: int, c: int) -> nn.Module:
    """[B, t, 6], normalised along axis 1, which holds the tokens."""
    return Body(
        lambda m, x: m.o(torch.relu(m.c(torch.relu(m.n(m.a(x))))).flatten(1)),
        a=nn.Linear(6, c),
        n=norm,
        c=nn.Linear(c, c),
        o=nn.Linear(t * c, 3),
    )


def reshaped(change: Callable[[Tensor], Tensor], features: int) -> nn.Module:
    """A convolution of 6 channels on [B, 2, 6, 6], another order of its values, and linear layers."""
    return Body(
        lambda m, x: m.o(torch.relu(m.h(change(torch.relu(m.a(x)))))).reshape(x.shape[0], -1, 3).mean(1),
        a=nn.Conv2d(2, 6, 3, padding=1),
        h=nn.Linear(features, 5),
        o=nn.Linear(5, 3),
    )


def hooked(register: str, hook: Callable[..., Any]) -> nn.Module:
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    getattr(model[1], register)(hook)
    return model


def made(make: Callable[[nn.Module], Any]) -> nn.Module:
    """A layer whose weights are made from others, behind one of the usual kind."""
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    make(model[2])
    model.train()(torch.randn(3, 6))
    return model


FLAT, TOKENS, IMAGES = (6,), (7, 6), (2, 6, 6)
SAME = (6, 6)  # as many tokens as features
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm of features": (
        lambda: chain(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)),
        FLAT,
    ),
    "batch norm of tokens": (lambda: tokens(nn.BatchNorm1d(7), t=7, c=5), TOKENS),
    "batch norm of as many tokens": (lambda: tokens(nn.BatchNorm1d(6), t=6, c=6), SAME),
    "group norm of tokens": (lambda: tokens(nn.GroupNorm(3, 6), t=6, c=6), SAME),
    "one group of tokens": (lambda: tokens(nn.GroupNorm(1, 6), t=6, c=6), SAME),
    "instance norm of tokens": (lambda: tokens(nn.InstanceNorm1d(6, affine=True), t=6, c=6), SAME),
    "prelu of tokens": (lambda: tokens(nn.PReLU(6), t=6, c=6), SAME),
    "layer norm of tokens": (lambda: tokens(nn.LayerNorm((6, 6)), t=6, c=6), SAME),
    "batch norm, then tokens last": (
        lambda: chain(
            nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
        ),
        SAME,
    ),
    "view of pixels": (lambda: reshaped(lambda x: x.view(-1, 6), 6), IMAGES),
    "reshape of rows": (lambda: reshaped(lambda x: x.reshape(-1, 36), 36), IMAGES),
    "channels last": (lambda: reshaped(lambda x: x.permute(0, 2, 3, 1).flatten(1), 216), IMAGES),
    "transposed": (lambda: reshaped(lambda x: x.transpose(1, 2).flatten(1), 216), IMAGES),
    "flatten of pixels": (lambda: reshaped(lambda x: x.flatten(2), 36), IMAGES),
    "split in two": (lambda: reshaped(lambda x: x.flatten(1).view(-1, 108), 108), IMAGES),
    "rolled": (lambda: reshaped(lambda x: x.roll(1, 1).flatten(1), 216), IMAGES),
    "softmax": (lambda: reshaped(lambda x: x.softmax(1).flatten(1), 216), IMAGES),
    "pool of the channels": (
        lambda: chain(
            nn.Conv1d(7, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.Linear(36, 2)
        ),
        TOKENS,
    ),
    "in place": (
        lambda: Body(
            lambda m, x: m.o(_first_zeroed(torch.relu(m.a(x)))), a=nn.Linear(6, 5), o=nn.Linear(5, 2)
        ),
        FLAT,
    ),
    "scaled by a constant": (
        lambda: Body(
            lambda m, x: m.o(torch.relu(m.a(x)) * torch.arange(5.0).to(x)),
            a=nn.Linear(6, 5),
            o=nn.Linear(5, 2),
        ),
        FLAT,
    ),
    "weights of another layer": (peeking, FLAT),
    "python decides": (Steep, FLAT),
    "called twice": (
        lambda: Body(
            lambda m, x: m.o(torch.relu(m.b(torch.relu(m.b(torch.relu(m.a(x))))))),
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 5),
            o=nn.Linear(5, 2),
        ),
        FLAT,
    ),
    "functional call": (
        lambda: Body(
            lambda m, x: m.o(torch.relu(F.linear(x, m.a.weight * 2, m.a.bias))),
            a=nn.Linear(6, 5),
            o=nn.Linear(5, 2),
        ),
        FLAT,
    ),
    "recurrent": (
        lambda: Body(
            lambda m, x: m.o(torch.relu(m.h(m.r(x)[0][:, -1]))),
            r=nn.RNN(6, 5, batch_first=True),
            h=nn.Linear(5, 4),
            o=nn.Linear(4, 2),
        ),
        TOKENS,
    ),
    "attention": (
        lambda: Body(
            lambda m, x: m.o(torch.relu(m.h(m.r(x, x, x)[0])).mean(1)),
            r=nn.MultiheadAttention(6, 2, batch_first=True),
            h=nn.Linear(6, 4),
            o=nn.Linear(4, 2),
        ),
        TOKENS,
    ),
    "forward hook": (lambda: hooked("register_forward_hook", lambda m, x, y: y.sigmoid()), FLAT),
    "pre-hook": (lambda: hooked("register_forward_pre_hook", lambda m, x: (x[0].cos(),)), FLAT),
    "backward hook": (lambda: hooked("register_full_backward_hook", lambda m, x, y: None), FLAT),
    "own forward of an instance": (lambda: _patched(), FLAT),
    "old weight norm": (lambda: made(weight_norm), FLAT),
    "old spectral norm": (lambda: made(spectral_norm), FLAT),
    "pruned": (lambda: made(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), FLAT),
    "new weight norm": (lambda: made(parametrizations.weight_norm), FLAT),
    "new spectral norm": (lambda: made(parametrizations.spectral_norm), FLAT),
    "orthogonal": (lambda: made(parametrizations.orthogonal), FLAT),
    "float32 inside": (
        lambda: Body(
            lambda m, x: m.o(torch.relu(m.a(x)).float().to(x.dtype)), a=nn.Linear(6, 5), o=nn.Linear(5, 2)
        ),
        FLAT,
    ),
}


def _first_zeroed(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def _patched() -> nn.Module:
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].forward = torch.sigmoid  # type: ignore[method-assign]
    return model


def trained_like(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """In eval mode and float64; no weight or statistic is at its default."""
    torch.manual_seed(seed)
    model = build().double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and not name.endswith(("_u", "_v", "mask")):
                tensor += 0.2 * torch.rand_like(tensor)
    return model


def changes(model: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        before, after = model(x), other(x)
    return (after - before).abs().max() / before.abs().max()


def outcomes(name: str, *, data: bool) -> dict[str, Tensor | str]:
    """The relative change of the function by each operation, or why it was refused."""
    build, shape = ARCHITECTURES[name]
    model, to = trained_like(build, 1), trained_like(build, 2)
    x = torch.randn(9, *shape, dtype=torch.float64)
    given = x if data else None
    before = copy.deepcopy(model.state_dict())
    expected = model(x).detach()
    found: dict[str, Tensor | str] = {}
    for what, change in {
        "balance": lambda: lossray.balance(model, given),
        "rescale": lambda: lossray.rescale(
            model, dict.fromkeys(rescaling_symmetry(model, layout_of(model), given).groups, SCALE), given
        ),
        "permute": lambda: permute(
            model,
            {n: torch.arange(k).roll(1) for n, k in permutation_symmetry(model, given).groups.items()},
            given,
        ),
        "align": lambda: lossray.align(model, to, given),
    }.items():
        try:
            found[what] = changes(model, change(), x)
        except ModelError as error:
            found[what] = str(error)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    return found


@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_function_is_kept_or_the_model_refused(name, data):
    bound = 1e-6 if name == "float32 inside" else 1e-12
    for what, found in outcomes(name, data=data).items():
        assert isinstance(found, str) or float(found) <= bound, (what, found)


def test_axis_1_is_told_from_the_last_by_what_the_model_is_given():
    model = trained_like(ARCHITECTURES["batch norm, then tokens last"][0], 1)
    groups = [
        permutation_symmetry(model, torch.randn(4, *shape, dtype=torch.float64)).groups
        for shape in (FLAT, SAME)
    ]
    assert groups == [{"0": 6, "3": 6}] * 2
    x = torch.randn(4, 6, dtype=torch.float64)
    for shape in (FLAT, SAME):
        x = torch.randn(4, *shape, dtype=torch.float64)
        assert changes(model, permute(model, {"0": [1, 2, 3, 4, 5, 0]}, x), x) < 1e-13
    with pytest.raises(ModelError, match=r"no hidden.* 1 \(BatchNorm1d\) acts along axis 1.*pass data="):
        permutation_symmetry(nn.Sequential(*list(model)[:3], nn.Linear(6, 2)))


@pytest.mark.parametrize(
    "name", ["batch norm of tokens", "group norm of tokens", "view of pixels", "recurrent"]
)
def test_what_can_be_kept_is_not_refused(name):
    assert not any(isinstance(found, str) for found in outcomes(name, data=True).values())


def test_hooks_are_refused_by_name_also_those_of_all_modules():
    with pytest.raises(ModelError, match=r"'1' has a forward hook .*lambda"):
        lossray.balance(hooked("register_forward_hook", lambda m, x, y: None))
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: None)
    try:
        with pytest.raises(ModelError, match="every module has a forward pre-hook"):
            lossray.align(model, copy.deepcopy(model))
    finally:
        handle.remove()
    assert lossray.balance(model)[0].weight.shape == (5, 6)


@pytest.mark.parametrize(
    ("name", "maker"),
    [("old weight norm", "weight_norm"), ("old spectral norm", "spectral_norm"), ("pruned", "pruning")],
)
def test_layers_made_from_others_are_named_and_the_models_copied(name, maker):
    model = ARCHITECTURES[name][0]()
    with pytest.raises(ModelError, match=rf"2 \(Linear with {maker}\) is not known"):
        lossray.balance(model)
    found = aligned(
        chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), model),
        chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), copied(model)),
    )
    assert list(found.permutations) == ["0", "2"]  # what lies before it


def test_a_state_that_no_layer_shows_is_measured():
    model = trained_like(peeking, 3)
    with pytest.raises(
        ModelError, match=r"outputs of Sequential change by .* depend on more than its layers show"
    ):
        lossray.balance(model, torch.randn(5, 6, dtype=torch.float64))


def test_inputs_that_nobody_can_guess_are_asked_for():
    model = Two().double()
    with pytest.raises(ModelError, match=r"no inputs were found .* pass data="):
        lossray.balance(model)
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    other = lossray.balance(model, ((x, y), torch.zeros(4)))
    torch.testing.assert_close(other(x, y), model(x, y), rtol=1e-12, atol=1e-12)


def test_factors_of_many_orders_of_magnitude_are_rounding_only():
    torch.manual_seed(5)
    model = chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    other = lossray.rescale(model, {"0": [1e6, 1e-6, 1, 1e5, 1e-5], "2": [1e-6, 1e6, 1.0, 1e3]})
    assert changes(model, other, torch.randn(50, 6)) < 1e-5
    assert changes(model, lossray.balance(other), torch.randn(50, 6)) < 1e-5
