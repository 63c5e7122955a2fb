import math
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from lossray.errors import ModelError, StudyError
from lossray.networks.layers import group_count
from lossray.networks.losses import cross_entropy
from lossray.networks.models import build_model, check_model
from lossray.networks.settings import MODELS, model_settings

SMALL = {  # one table per kind of layer: small enough for dense checks
    "linear": {"name": "linear", "widths": [5, 4]},
    "mlp": {"name": "mlp", "widths": [6]},
    "mlp-layer": {"name": "mlp", "widths": [6], "norm": "layer"},
    "mlp-batch": {"name": "mlp", "widths": [6], "norm": "batch"},
    "cnn": {"name": "cnn", "channels": [2, 3], "kernel": 3, "widths": [5]},
    "cnn-batch": {"name": "cnn", "channels": [2, 3], "kernel": 3, "widths": [], "norm": "batch"},
    "cnn-group": {"name": "cnn", "channels": [4, 8], "kernel": 3, "widths": [], "norm": "group"},
    "resnet-none": {"name": "resnet", "width": 2, "norm": "none"},
    "resnet-group": {"name": "resnet", "width": 4, "norm": "group"},
    "resnet-batch": {"name": "resnet", "width": 2, "norm": "batch"},
    "vit": {"name": "vit", "dim": 8, "depth": 1, "heads": 2},
}


def build(table, input_shape=(1, 8, 8), n_outputs=10, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(model_settings(table), input_shape, n_outputs)


def inputs(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


class TestShapes:
    @pytest.mark.parametrize("name", MODELS)
    def test_defaults_build_for_digits(self, name):
        assert build({"name": name})(inputs(3, 1, 8, 8)).shape == (3, 10)

    @pytest.mark.parametrize("name", ["linear", "mlp"])
    def test_flat_inputs(self, name):
        assert build({"name": name}, (20,), 3)(inputs(4, 20)).shape == (4, 3)

    @pytest.mark.parametrize("shape", [(3, 32, 32), (1, 7, 7), (2, 9, 6), (1, 1, 5), (2, 1, 1)])
    @pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "resnet-batch", "resnet-group", "vit"])
    def test_any_image_size(self, name, shape):
        outputs = build(SMALL[name], shape, 4)(inputs(3, *shape))
        assert outputs.shape == (3, 4)
        assert outputs.isfinite().all()

    @pytest.mark.parametrize("name", ["cnn", "resnet", "vit"])
    def test_image_models_refuse_flat_inputs(self, name):
        with pytest.raises(ModelError, match=rf"'{name}' needs images.*shape \[20\].*linear, mlp"):
            build({"name": name}, (20,))

    def test_empty_widths(self):
        assert [name for name, _ in build({"name": "linear", "widths": []}).named_parameters()] == [
            "output.weight"
        ]
        assert build({"name": "cnn", "widths": []})(inputs(2, 1, 8, 8)).shape == (2, 10)


class TestArchitectures:
    def test_parameter_counts(self):
        assert count(build({"name": "mlp", "widths": [64, 64]})) == 64 * 65 + 64 * 65 + 65 * 10
        # the paper's option A has 269,722 (0.27M); two projections with their norms add 2,752
        assert count(build({"name": "resnet", "depth": 20}, (3, 32, 32))) == 269_722 + 2_752
        lenet = 6 * 25 + 6 + 16 * 150 + 16 + (16 * 49 + 1) * 120 + 121 * 84 + 85 * 10
        assert count(build({"name": "cnn"}, (1, 28, 28))) == lenet
        d, tokens = 8, 16
        block = 4 * (d * d + d) + 4 * d + (4 * d * d + 4 * d) + (4 * d * d + d)
        assert count(build(SMALL["vit"])) == (4 * d + d) + tokens * d + block + 2 * d + (d + 1) * 10

    def test_names_read_well(self):
        names = [
            name for name, _ in build({"name": "mlp", "widths": [4], "norm": "batch"}).named_parameters()
        ]
        assert names == [
            *("hidden1.weight", "hidden1.bias", "norm1.weight", "norm1.bias"),
            *("output.weight", "output.bias"),
        ]

    def test_bias_false(self):
        names = [name for name, _ in build({"name": "mlp", "bias": False}).named_parameters()]
        assert all(name.endswith("weight") for name in names)

    @pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
    def test_activation(self, activation):
        model = build({"name": "mlp", "widths": [5], "activation": activation}, (3,), 2)
        x = inputs(4, 3)
        hidden = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh}[activation](
            model.hidden1(x)
        )
        torch.testing.assert_close(model(x), model.output(hidden))

    @pytest.mark.parametrize("name", ["mlp", "cnn", "resnet-none", "vit"])
    def test_dropout_acts_in_training_only(self, name):
        model = build(SMALL[name] | {"dropout": 0.5})
        x = inputs(4, 1, 8, 8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
        assert any(type(module) is nn.Dropout for module in model.modules())

    def test_group_norm_groups(self):
        for channels in range(1, 100):
            groups = group_count(channels)
            assert channels % groups == 0
            assert groups == 1 or channels // groups >= 4
        assert [group_count(c) for c in (8, 16, 32, 64)] == [2, 4, 8, 8]

    def test_attention_is_torchs(self):
        attention = build(SMALL["vit"]).blocks[0].attention
        x = inputs(3, 5, 8)
        query, key, value = (
            layer(x).view(3, 5, 2, 4).transpose(1, 2)
            for layer in (attention.query, attention.key, attention.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        expected = attention.output(mixed.transpose(1, 2).reshape(3, 5, 8))
        torch.testing.assert_close(attention(x), expected)

    @pytest.mark.parametrize(("shape", "patch"), [((1, 8, 8), 2), ((3, 32, 32), 4), ((1, 9, 6), 1)])
    def test_default_patch_divides_the_image(self, shape, patch):
        assert build({"name": "vit"}, shape).patches.kernel_size == (patch, patch)

    def test_vit_sees_the_order_of_patches(self):
        model = build(SMALL["vit"])
        x = inputs(2, 1, 8, 8)
        assert not torch.allclose(model(x), model(x.flip(-1).roll(1, -1)), atol=1e-4)


class TestInitialisation:
    def test_depends_on_the_generator_alone(self):
        first, again, other = (build(SMALL["vit"], seed=seed) for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        assert not torch.equal(first.output.weight, other.output.weight)

    @pytest.mark.parametrize(
        ("init", "activation", "std"),
        [
            ("kaiming_normal", "relu", math.sqrt(2 / 400)),
            ("kaiming_normal", "tanh", 5 / 3 / math.sqrt(400)),
            ("xavier_normal", "relu", math.sqrt(2 / 900)),
        ],
    )
    def test_standard_deviation(self, init, activation, std):
        model = build({"name": "mlp", "widths": [500], "init": init, "activation": activation}, (400,))
        assert model.hidden1.weight.std().item() == pytest.approx(std, rel=0.02)  # 200,000 draws: 6 sigma
        assert not model.hidden1.bias.any()

    def test_kaiming_counts_the_kernel(self):
        model = build({"name": "cnn", "channels": [200], "init": "kaiming_normal"}, (8, 8, 8))
        assert model.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.03)

    def test_orthogonal(self):
        weight = build({"name": "linear", "widths": [30], "init": "orthogonal"}, (20,)).hidden1.weight
        torch.testing.assert_close(weight.T @ weight, torch.eye(20), atol=1e-5, rtol=0)

    def test_scale_multiplies_the_weights(self):
        one, three = build(SMALL["cnn"]), build(SMALL["cnn"] | {"init_scale": 3.0})
        torch.testing.assert_close(three.conv1.weight, 3 * one.conv1.weight)
        torch.testing.assert_close(three.output.weight, 3 * one.output.weight)
        assert torch.equal(three.conv1.bias, one.conv1.bias)


class TestLinear:
    def test_is_the_product_of_its_matrices(self):
        model = build({"name": "linear", "widths": [6, 4]}, (5,), 3)
        product = model.output.weight @ model.hidden2.weight @ model.hidden1.weight
        x = inputs(7, 5)
        torch.testing.assert_close(model(x), x @ product.T)

    def test_hessian_rank(self):
        """Theory 2.8: rank H = 2qM - Lq^2 + q(r + k) at generic parameters, q = min(r, k, widths)."""
        widths, d_in, k, examples = [3, 2], 4, 3, 20
        model = build({"name": "linear", "widths": widths}, (d_in,), k).double()
        x, y = inputs(examples, d_in, dtype=torch.float64), inputs(examples, k, seed=1, dtype=torch.float64)
        hessian = dense_hessian(model, lambda: 0.5 * (model(x) - y).square().sum(1).mean())
        values = torch.linalg.eigvalsh(hessian).abs()
        q, layers = 2, len(widths) + 1
        expected = 2 * q * sum(widths) - layers * q * q + q * (d_in + k)
        assert int((values > 1e-9 * values.max()).sum()) == expected


def dense_hessian(model, loss):
    """By double backward."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True) for entry in flat]
    return torch.stack(
        [
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(row, parameters, strict=True)
                ]
            )
            for row in rows
        ]
    )


class TestStacking:
    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize("name", SMALL)
    def test_vmap_over_stacked_weights_equals_each_model(self, name, train):
        models = [build(SMALL[name], seed=seed).double().train(train) for seed in range(3)]
        x = inputs(5, 1, 8, 8, dtype=torch.float64)
        parameters, buffers = stack_module_state(models)
        template = models[0]

        def one(member_parameters, member_buffers):
            return functional_call(template, (member_parameters, member_buffers), (x,))

        stacked_buffers = {key: value.clone() for key, value in buffers.items()}
        outputs = vmap(one)(parameters, stacked_buffers)
        torch.testing.assert_close(outputs, torch.stack([model(x) for model in models]))
        for key, value in stacked_buffers.items():  # running statistics, updated by both
            torch.testing.assert_close(value, torch.stack([dict(m.named_buffers())[key] for m in models]))

    @pytest.mark.parametrize("name", SMALL)
    def test_packed_hessian_products(self, name):
        """Double backward through the vmapped loss: symmetric, and the derivative of the gradient."""
        table = SMALL[name] | ({} if name == "linear" else {"activation": "tanh"})
        models = [build(table, seed=seed).double().eval() for seed in range(2)]
        x = inputs(6, 1, 8, 8, dtype=torch.float64)
        y = torch.arange(6) % 10
        stacked, buffers = stack_module_state(models)
        names = list(stacked)

        def gradient(values):
            def loss(parameters, member_buffers):
                state = dict(zip(names, parameters, strict=True))
                return cross_entropy(functional_call(models[0], (state, member_buffers), (x,)), y)

            return torch.autograd.grad(vmap(loss)(values, buffers).sum(), values, create_graph=True)

        values = tuple(stacked[key].detach().requires_grad_() for key in names)
        a = [inputs(*value.shape, seed=i, dtype=torch.float64) for i, value in enumerate(values)]
        b = [inputs(*value.shape, seed=99 + i, dtype=torch.float64) for i, value in enumerate(values)]
        g = gradient(values)
        ha = torch.autograd.grad(g, values, a, retain_graph=True)
        hb = torch.autograd.grad(g, values, b)
        left, right = (sum((p * q).sum() for p, q in zip(*pair, strict=True)) for pair in ((a, hb), (b, ha)))
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)

        def shifted(sign):
            moved = tuple(
                (v + sign * 1e-7 * d).detach().requires_grad_() for v, d in zip(values, a, strict=True)
            )
            return gradient(moved)

        for product, up, down in zip(ha, shifted(1), shifted(-1), strict=True):
            torch.testing.assert_close(product, ((up - down) / 2e-7).detach(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", ["mlp", "mlp-batch", "resnet-batch", "resnet-group", "vit"])
    def test_train_mode_hessian_is_symmetric(self, name):
        model = build(SMALL[name], (1, 4, 4), 3).double().train()
        x, y = inputs(5, 1, 4, 4, dtype=torch.float64), torch.arange(5) % 3
        parameters = list(model.parameters())
        gradient = torch.autograd.grad(cross_entropy(model(x), y), parameters, create_graph=True)
        vectors = [[inputs(*p.shape, seed=seed, dtype=torch.float64) for p in parameters] for seed in (1, 2)]
        products = [torch.autograd.grad(gradient, parameters, v, retain_graph=True) for v in vectors]
        left, right = (
            sum((p * q).sum() for p, q in zip(vectors[i], products[1 - i], strict=True)) for i in (0, 1)
        )
        assert left.isfinite()
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-11)


class TestSettings:
    @pytest.mark.parametrize("table", SMALL.values(), ids=SMALL)
    def test_round_trip(self, table):
        settings = model_settings(table)
        assert model_settings(settings.plain()) == settings

    @pytest.mark.parametrize(
        ("table", "where", "message"),
        [
            ({"name": "mpl"}, ("name",), "found 'mpl'; allowed: linear, mlp, .*; did you mean 'mlp'"),
            ({"name": "zzzzz"}, ("name",), r"package.module:function \[type"),
            ({}, ("name",), "required"),
            ({"name": 3}, ("name",), "string"),
            ({"name": "nets:"}, ("name",), "package.module:function"),
            ({"name": "nets.:f"}, ("name",), "package.module:function"),
            ({"name": "mlp", "width": [3]}, ("width",), "not permitted"),
            ({"name": "linear", "activation": "relu"}, ("activation",), "not permitted"),
            ({"name": "mlp", "widths": [0]}, ("widths", 0), "greater than or equal to 1"),
            ({"name": "mlp", "widths": [64.0]}, ("widths", 0), "integer"),
            ({"name": "mlp", "widths": 64}, ("widths",), "tuple"),
            ({"name": "mlp", "dropout": 1.0}, ("dropout",), "less than 1"),
            ({"name": "mlp", "dropout": -0.1}, ("dropout",), "greater than or equal to 0"),
            ({"name": "mlp", "activation": "sigmoid"}, ("activation",), "'relu', 'gelu' or 'tanh'"),
            ({"name": "mlp", "bias": 1}, ("bias",), "boolean"),
            ({"name": "mlp", "init": "he"}, ("init",), "kaiming_normal"),
            ({"name": "mlp", "init_scale": 0.0}, ("init_scale",), "greater than 0"),
            ({"name": "mlp", "init_scale": math.inf}, ("init_scale",), "finite"),
            ({"name": "cnn", "channels": []}, ("channels",), "at least 1"),
            ({"name": "cnn", "kernel": 4}, ("kernel",), "found 4; .*odd"),
            ({"name": "resnet", "depth": 9}, ("depth",), "found 9; .*6n \\+ 2"),
            ({"name": "resnet", "depth": 2}, ("depth",), "found 2; .*6n \\+ 2"),
            ({"name": "resnet", "norm": "layer"}, ("norm",), "'batch', 'group' or 'none'"),
            ({"name": "vit", "heads": 3}, (), "heads = 3 and dim = 32; heads must divide dim"),
            ({"name": "vit", "patch": 0}, ("patch",), "greater than or equal to 1"),
        ],
    )
    def test_bad_tables(self, table, where, message):
        with pytest.raises(ValidationError, match=message) as caught:
            model_settings(table)
        (error,) = caught.value.errors()
        assert error["loc"] == where

    def test_patch_must_divide_the_image(self):
        with pytest.raises(ModelError, match="patch: found 3; images of 8 x 8 allow 1, 2, 4, 8"):
            build({"name": "vit", "patch": 3})

    def test_only_the_models_own_keys_reach_the_hash(self):
        assert "patch" not in model_settings({"name": "mlp"}).plain()


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


class TestUserModels:
    def test_keys_and_sizes_reach_the_function(self, user_module):
        user_module(
            "lossray_test_net",
            "import math, torch\nfrom torch.nn import Flatten, Linear, Sequential\n"
            "def net(n_outputs, input_shape, *, width, deep=False):\n"
            "    first = Linear(math.prod(input_shape), width)\n"
            "    return Sequential(Flatten(), first, Linear(width, n_outputs))\n"
            "def fixed():\n    return torch.nn.Linear(4, 3)\n",
        )
        settings = model_settings({"name": "lossray_test_net:net", "width": 7})
        assert settings.plain() == {"name": "lossray_test_net:net", "width": 7}
        model = build_model(settings, (2, 3), 5)
        assert [tuple(p.shape) for p in model.parameters()] == [(7, 6), (7,), (5, 7), (5,)]
        assert check_model(settings, inputs(4, 2, 3), 5) == count(model)
        assert count(build({"name": "lossray_test_net:fixed"})) == 15

    def test_errors_name_what_is_wrong(self, user_module):
        user_module(
            "lossray_test_bad",
            "import torch\n"
            "def net(width):\n    return torch.nn.Linear(width, 2)\n"
            "def number():\n    return 3\n"
            "def frozen():\n    return torch.nn.Linear(2, 2).requires_grad_(False)\n"
            "def empty():\n    return torch.nn.ReLU()\n"
            "def lazy():\n    return torch.nn.LazyLinear(3)\n"
            "def broken():\n    return 1 / 0\n",
        )
        cases = [
            ({"name": "lossray_test_bad:net"}, "missing a required argument: 'width'"),
            ({"name": "lossray_test_bad:net", "wdith": 3}, "'wdith'|'width'"),
            ({"name": "lossray_test_bad:number"}, "returned int instead of a torch.nn.Module"),
            ({"name": "lossray_test_bad:frozen"}, "Linear without a trainable"),
            ({"name": "lossray_test_bad:empty"}, "ReLU without a trainable"),
            ({"name": "lossray_test_bad:lazy"}, "lazy"),
            ({"name": "lossray_test_bad:broken"}, r"ZeroDivisionError: .*\(lossray_test_bad.py:13\)"),
        ]
        for table, message in cases:
            with pytest.raises(ModelError, match=message):
                build(table)
        with pytest.raises(StudyError, match="no function 'nett'; did you mean 'net'"):
            build({"name": "lossray_test_bad:nett"})


class TestCheckModel:
    def test_counts_parameters_and_keeps_the_global_generator(self):
        state = torch.get_rng_state()
        assert check_model(model_settings({"name": "linear", "widths": []}), inputs(2, 6), 3) == 18
        assert torch.equal(torch.get_rng_state(), state)

    def test_refuses_models_that_do_not_fit(self, user_module):
        user_module("lossray_test_fit", "import torch\ndef net(a, b):\n    return torch.nn.Linear(a, b)\n")
        table = {"name": "lossray_test_fit:net", "a": 6, "b": 4}
        with pytest.raises(ModelError, match=r"returns \[2, 4\] where a tensor \[2, 3\]"):
            check_model(model_settings(table), inputs(2, 6), 3)
        with pytest.raises(ModelError, match=r"on inputs \[2, 5\]: RuntimeError"):
            check_model(model_settings(table), inputs(2, 5), 4)

    def test_refuses_outputs_that_are_no_floats(self, user_module):
        user_module(
            "lossray_test_signs",
            "import torch\n"
            "class Net(torch.nn.Linear):\n"
            "    def forward(self, x):\n        return super().forward(x) > 0\n"
            "def net():\n    return Net(6, 3)\n",
        )
        with pytest.raises(ModelError, match=r"returns torch\.bool where floats are needed"):
            check_model(model_settings({"name": "lossray_test_signs:net"}), inputs(2, 6), 3)

    def test_refuses_models_that_are_random_in_eval_mode(self, user_module):
        user_module(
            "lossray_test_random",
            "import torch\n"
            "class Net(torch.nn.Linear):\n"
            "    always = False\n"
            "    def forward(self, x):\n"
            "        noise = torch.randn_like(x) if self.training or self.always else 0\n"
            "        return super().forward(x + noise)\n"
            "class Careless(Net):\n"
            "    always = True\n"
            "def net():\n    return Net(6, 3)\n"
            "def careless():\n    return Careless(6, 3)\n",
        )
        assert check_model(model_settings({"name": "lossray_test_random:net"}), inputs(2, 6), 3) == 21
        with pytest.raises(ModelError, match=r"random in eval mode.*only if self\.training"):
            check_model(model_settings({"name": "lossray_test_random:careless"}), inputs(2, 6), 3)


def test_a_model_of_integer_inputs_is_checked_in_its_own_dtype(tmp_path, monkeypatch):
    (tmp_path / "tokens_mine.py").write_text(
        "from torch import nn\n"
        "def net(n_outputs):\n"
        "    return nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, n_outputs))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = model_settings({"name": "tokens_mine:net"})
    assert check_model(settings, torch.zeros(2, 3, dtype=torch.int64), 5) == 7 * 4 + 4 * 5 + 5
