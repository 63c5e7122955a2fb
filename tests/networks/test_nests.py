"""A stack evaluates models of several inputs as it does the same model of one."""

import pytest
import torch
from torch import nn

from lossray.errors import ModelError
from lossray.networks.batch_norm import refresh_statistics
from lossray.networks.losses import cross_entropy
from lossray.networks.models import build_model, check_model
from lossray.networks.nests import as_floats, chunks, count, described, rows, shapes, tensors_in
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack


class Two(nn.Module):
    """Two inputs, [B, 3] and [B, 2]."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(2, 5)
        self.norm, self.drop, self.out = nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 4)

    def forward(self, a, b):
        return self.out(self.drop(torch.tanh(self.norm(self.left(a) * self.right(b)))))


class Joined(Two):
    """The same of one input [B, 5]."""

    def forward(self, x):
        return super().forward(x[:, :3], x[:, 3:])


X = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
Y = torch.arange(24).view(2, 12) % 4


def nest_of(kind, x):
    a, b = x[..., :3], x[..., 3:]
    return (a, b) if kind == "tuple" else {"b": b, "a": a}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("per_member", [True, False])
def test_losses_gradients_and_outputs(kind, executor, per_member):
    x, y = (X, Y) if per_member else (X[0], Y[0])
    one = build_stack(Joined, (3, 8), executor=executor, dtype=torch.float64)
    two = build_stack(Two, (3, 8), executor=executor, dtype=torch.float64)
    assert torch.equal(one[1], two[1])
    found = []
    for (stack, theta, buffers), inputs in ((one, x), (two, nest_of(kind, x))):
        outputs = stack.outputs(theta, buffers, inputs, per_member=per_member)
        own = {name: tensor.clone() for name, tensor in buffers.items()}
        trained = stack.gradients(
            theta, own, inputs, y, cross_entropy, train=True, keys=(0, 1), per_member=per_member
        )
        found.append((outputs, *trained, *own.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_batch_norm_is_refreshed(kind, monkeypatch):
    monkeypatch.setattr("lossray.networks.batch_norm.CHUNK", 5)
    one = build_stack(Joined, (0, 1), executor="vmap", dtype=torch.float64)
    two = build_stack(Two, (0, 1), executor="vmap", dtype=torch.float64)
    expected, found = refresh_statistics(*one, X[0]), refresh_statistics(*two, nest_of(kind, X[0]))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_nests():
    nest = nest_of("dict", X[0])
    assert count(nest) == 12
    assert shapes(nest) == {"a": (3,), "b": (2,)}
    assert shapes(X[0]) == (5,)
    assert described(nest_of("tuple", X[0])) == "([12, 3], [12, 2])"
    assert [count(part) for part in chunks(nest, 5)] == [5, 5, 2]
    assert [len(part) for part in chunks(X[0][:0], 5)] == [0]
    assert torch.equal(torch.cat([part["b"] for part in chunks(nest, 5)]), nest["b"])
    assert torch.equal(rows(nest_of("tuple", X[0]), torch.tensor([3, 1]))[1], X[0][[3, 1], 3:])
    mixed = as_floats((X[0], Y[0]), torch.float32)
    assert [tensor.dtype for tensor in tensors_in(mixed)] == [torch.float32, torch.int64]


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "resnet", "vit"])
def test_models_of_one_input_refuse_several_by_name(name):
    for shape in (((4,), (3, 3)), {"u": (4,), "v": (2,)}):
        kind = "mapping" if isinstance(shape, dict) else "tuple"
        with pytest.raises(ModelError, match=f"'{name}' takes one tensor, but the inputs are a {kind} of 2"):
            build_model(model_settings({"name": name}), shape, 2)


def test_a_model_gets_the_shapes_of_its_inputs(tmp_path, monkeypatch):
    (tmp_path / "lossray_test_two_inputs.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, sizes, out):\n"
        "        super().__init__()\n"
        "        self.u, self.v = nn.Linear(sizes['u'][0], out), nn.EmbeddingBag(9, out)\n"
        "    def forward(self, v, u):\n        return self.u(u) + self.v(v)\n"
        "def net(input_shape, n_outputs):\n    return Net(input_shape, n_outputs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = model_settings({"name": "lossray_test_two_inputs:net"})
    inputs = {"u": torch.randn(6, 4, dtype=torch.float64), "v": torch.zeros(6, 2, dtype=torch.int64)}
    assert check_model(settings, inputs, 3) == 4 * 3 + 3 + 9 * 3
    with pytest.raises(ModelError, match=r"on inputs \{u: \[6, 4\], w: \[6, 2\]\}: TypeError"):
        check_model(settings, {"u": inputs["u"], "w": inputs["v"]}, 3)
