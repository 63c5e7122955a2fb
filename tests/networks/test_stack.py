"""A stack of R members equals R models, under either executor, with noise and statistics of their own."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.limits import Limits
from lossray.networks.executor import choose_executor
from lossray.networks.stack import EXECUTORS, build_stack
from lossray.seeds import stream

cross_entropy = nn.functional.cross_entropy


def dropout_net() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )


def large_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 40, 3), nn.Flatten(), nn.Linear(640, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class FusedAttention(nn.Module):
    """Its fused kernels have no double backward, and no rule for vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, -1])


class LooksAtItsInputs(nn.Linear):
    """Branches on numbers of the batch, which vmap takes only as long as all members share it."""

    def __init__(self):
        super().__init__(12, 3)

    def forward(self, x):
        return super().forward(x) if float(x.abs().max()) > 1e-3 else super().forward(-x)


class FunctionalDropout(nn.Module):
    """Draws from torch's default generator, out of reach of the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(x, 0.5, self.training))


def batch(members: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(members, 6, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (members, 6), generator=generator)


def initialised(build, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "initialisation"))
        return build().double()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("build", "shape"), [(dropout_net, (12,)), (convolutions, (1, 8, 8))])
def test_eval_losses_and_gradients_equal_those_of_separate_models(executor, build, shape):
    stack, theta, buffers = build_stack(build, (3, 1, 4), executor=executor, dtype=torch.float64)
    inputs, targets = batch(3, *shape)
    theta.requires_grad_()
    losses = stack.losses(theta, buffers, inputs, targets, cross_entropy, per_member=True)
    (gradient,) = torch.autograd.grad(losses.sum(), theta)
    for r, seed in enumerate((3, 1, 4)):
        model = initialised(build, seed).eval()
        loss = cross_entropy(model(inputs[r]), targets[r])
        loss.backward()
        expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(losses[r], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient[r], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("build", "shape"), [(dropout_net, (12,)), (convolutions, (1, 8, 8))])
def test_gradients_are_those_of_the_losses_and_buffers_are_updated_alike(build, shape, executor, members):
    stack, theta, buffers = build_stack(build, range(members), executor=executor, dtype=torch.float64)
    inputs, targets = batch(members, *shape)
    noise = {"train": True, "keys": tuple(range(members)), "per_member": True}
    own = copy.deepcopy(buffers)
    losses, gradient = stack.gradients(theta, own, inputs, targets, cross_entropy, **noise)
    leaf = theta.clone().requires_grad_()
    expected = stack.losses(leaf, buffers, inputs, targets, cross_entropy, **noise)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-10, atol=1e-14)
    assert not losses.requires_grad
    assert not gradient.requires_grad
    for name, buffer in buffers.items():
        torch.testing.assert_close(own[name], buffer, rtol=1e-12, atol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 12, bias=False)
        self.decode = nn.Linear(12, 12, bias=False)
        self.decode.weight = self.encode.weight
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.relu(self.encode(x)))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_tied_parameters_are_one_and_unused_ones_have_no_gradient(executor):
    stack, theta, buffers = build_stack(Tied, (0, 1), executor=executor, dtype=torch.float64)
    inputs, targets = batch(2, 12)
    _, gradient = stack.gradients(theta, buffers, inputs, targets, cross_entropy, per_member=True)
    for r in range(2):
        model = initialised(Tied, r)
        cross_entropy(model(inputs[r]), targets[r]).backward()
        pieces = {name: piece[r] for name, piece in stack.layout.split(gradient).items()}
        torch.testing.assert_close(pieces["encode.weight"], model.encode.weight.grad, rtol=1e-10, atol=1e-14)
        assert not pieces["unused"].any()


def test_the_template_gets_its_own_tensors_back_also_after_a_failure():
    stack, theta, buffers = build_stack(dropout_net, (0, 1), executor="loop", dtype=torch.float64)
    own = {**dict(stack.template.named_parameters()), **dict(stack.template.named_buffers())}
    stack.outputs(theta, buffers, torch.zeros(6, 12, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        stack.outputs(theta, buffers, torch.zeros(6, 5, dtype=torch.float64))
    now = {**dict(stack.template.named_parameters()), **dict(stack.template.named_buffers())}
    assert all(now[name] is tensor for name, tensor in own.items())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("build", "shape"), [(dropout_net, (12,)), (convolutions, (1, 8, 8))])
def test_noise_and_statistics_of_a_member_do_not_depend_on_its_pack(executor, build, shape):
    inputs, targets = batch(3, *shape)
    pack = build_stack(build, (0, 1, 2), executor=executor, dtype=torch.float64)
    solo = build_stack(build, (1,), executor=executor, dtype=torch.float64)
    together = pack[0].losses(
        *pack[1:], inputs, targets, cross_entropy, train=True, keys=(7, 8, 9), per_member=True
    )
    alone = solo[0].losses(
        *solo[1:], inputs[1:2], targets[1:2], cross_entropy, train=True, keys=(8,), per_member=True
    )
    torch.testing.assert_close(together[1], alone[0], rtol=1e-12, atol=0)
    for name, buffer in solo[2].items():
        torch.testing.assert_close(pack[2][name][1], buffer[0], rtol=1e-12, atol=0)


class RunningMean(nn.Module):
    """Replaces its buffers in train mode, and uses one of them in the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        self.register_buffer("mean", torch.ones(12))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(x * self.mean)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0)
            self.calls = self.calls + 1
        return outputs


@pytest.mark.parametrize("executor", EXECUTORS)
def test_buffers_that_a_model_replaces_are_updated_as_in_a_plain_loop(executor):
    stack, theta, buffers = build_stack(RunningMean, (0, 1), executor=executor, dtype=torch.float64)
    inputs, targets = batch(2, 12)
    models = [initialised(RunningMean, seed) for seed in (0, 1)]
    for _ in range(3):
        found = stack.gradients(
            theta, buffers, inputs, targets, cross_entropy, train=True, keys=(1, 2), per_member=True
        )
        for r, model in enumerate(models):
            model.zero_grad()
            loss = cross_entropy(model(inputs[r]), targets[r])
            loss.backward()
            expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            torch.testing.assert_close(found[0][r], loss.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(found[1][r], expected, rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(buffers["mean"][r], model.mean, rtol=1e-12, atol=0)
    assert buffers["calls"].tolist() == [3, 3]
    stack.outputs(theta, buffers, inputs[0])
    assert buffers["calls"].tolist() == [3, 3]  # eval mode changes nothing


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("members", [1, 2])
def test_a_parameter_may_be_a_number(executor, members):
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(12, 3)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    stack, theta, buffers = build_stack(Scaled, range(members), executor=executor, dtype=torch.float64)
    inputs, targets = batch(members, 12)
    found = stack.losses(theta, buffers, inputs, targets, cross_entropy, per_member=True)
    for r in range(members):
        expected = cross_entropy(initialised(Scaled, r)(inputs[r]), targets[r])
        torch.testing.assert_close(found[r], expected, rtol=1e-12, atol=0)


def test_the_mode_of_every_layer_is_the_one_asked_for_from_the_first_call_on():
    def half_frozen() -> nn.Module:
        model = dropout_net()
        model[2].eval()  # batch norm
        return model

    stack, theta, buffers = build_stack(half_frozen, (0, 1), executor="vmap", dtype=torch.float64)
    inputs, targets = batch(2, 12)
    noise = {"train": True, "keys": (1, 2), "per_member": True}
    first = stack.losses(theta, copy.deepcopy(buffers), inputs, targets, cross_entropy, **noise)
    stack.outputs(theta, buffers, inputs, per_member=True)
    assert torch.equal(first, stack.losses(theta, buffers, inputs, targets, cross_entropy, **noise))


def test_masks_of_dropout_layers_and_other_random_numbers_are_independent():
    drawn = []

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(12, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            ones = torch.ones(6, 100)
            drawn.append((self.drop(ones) > 0, nn.functional.dropout(ones, 0.5, self.training) > 0))
            return self.layer(x)

    stack, theta, buffers = build_stack(Twice, (0, 1), executor="loop", dtype=torch.float64)
    inputs, targets = batch(1, 12)
    stack.losses(theta, buffers, inputs[0], targets[0], cross_entropy, train=True, keys=(1, 2))
    for layer, other in drawn[-2:]:
        kept_by_both = (layer & other).double().mean()  # 0.5 if the masks are one
        assert abs(kept_by_both - 0.25) < 0.09  # 5 standard deviations


def test_dropout_is_active_and_its_masks_follow_the_key():
    stack, theta, buffers = build_stack(dropout_net, (0, 0), executor="vmap", dtype=torch.float64)
    inputs, targets = batch(1, 12)

    def losses(keys: tuple[int, int]) -> Tensor:
        own = {name: tensor.clone() for name, tensor in buffers.items()}
        return stack.losses(theta, own, inputs[0], targets[0], cross_entropy, train=True, keys=keys)

    assert torch.equal(losses((5, 6)), losses((5, 6)))
    assert losses((5, 5))[0] == losses((5, 5))[1]
    assert losses((5, 6))[0] != losses((5, 6))[1]
    with pytest.raises(ModelError, match="keys"):
        stack.losses(theta, buffers, inputs[0], targets[0], cross_entropy, train=True)


def test_dropout_mask_is_unbiased_and_kept_values_are_scaled():
    stack, theta, _ = build_stack(
        lambda: nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.25)),
        (0,),
        executor="loop",
        dtype=torch.float64,
    )
    x = torch.ones(20_000, 1, dtype=torch.float64)
    weight = theta[0, 0]
    mean = stack.losses(theta, {}, x, x, lambda out, _: out.mean(), train=True, keys=(3,))[0] / weight
    largest = stack.losses(theta.abs(), {}, x, x, lambda out, _: out.max(), train=True, keys=(3,))[0] / weight
    assert abs(mean - 1) < 0.02  # 5 standard deviations
    torch.testing.assert_close(largest.abs(), torch.tensor(4 / 3, dtype=torch.float64))


def test_randomness_outside_dropout_layers_is_seeded_by_the_key_in_the_loop():
    stack, theta, buffers = build_stack(FunctionalDropout, (0, 0), executor="loop", dtype=torch.float64)
    inputs, targets = batch(1, 12)
    args = (theta, buffers, inputs[0], targets[0], cross_entropy)
    state = torch.get_rng_state()
    first = stack.losses(*args, train=True, keys=(1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, stack.losses(*args, train=True, keys=(1, 2)))
    assert first[0] != first[1]
    with pytest.raises(ModelError, match="loop executor"):
        stack.with_executor("vmap").losses(*args, train=True, keys=(1, 2))


@pytest.mark.parametrize(
    ("build", "shape", "device", "expected"),
    [
        (dropout_net, (12,), "cpu", "vmap"),
        (convolutions, (1, 8, 8), "cpu", "vmap"),
        (large_convolutions, (1, 8, 8), "cpu", "loop"),
        (large_convolutions, (1, 8, 8), "cuda", "vmap"),
        (Recurrent, (3, 4), "cpu", "loop"),
        (FunctionalDropout, (12,), "cpu", "loop"),
        (FusedAttention, (3, 4), "cpu", "loop"),
        (LooksAtItsInputs, (12,), "cpu", "loop"),
    ],
)
def test_executor_is_vmap_where_it_works_and_pays(build, shape, device, expected):
    inputs, targets = batch(1, *shape)
    assert choose_executor(build, inputs[0], targets[0], cross_entropy, device=device) == expected


def test_nan_member_leaves_the_others_bit_identical():
    stack, theta, buffers = build_stack(dropout_net, (0, 1, 2), executor="vmap", dtype=torch.float32)
    inputs, targets = batch(3, 12)
    poisoned = theta.clone()
    poisoned[1] = float("nan")

    def gradient(weights: Tensor) -> Tensor:
        weights = weights.clone().requires_grad_()
        own = copy.deepcopy(buffers)
        losses = stack.losses(
            weights,
            own,
            inputs.float(),
            targets,
            cross_entropy,
            train=True,
            keys=(1, 2, 3),
            per_member=True,
        )
        return torch.autograd.grad(losses.sum(), weights)[0]

    healthy, spoilt = gradient(theta), gradient(poisoned)
    assert spoilt[1].isnan().any()
    assert torch.equal(healthy[[0, 2]], spoilt[[0, 2]])


def test_layout_joins_what_it_splits_and_knows_the_roles():
    stack, theta, _ = build_stack(
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(2, 3, 2), nn.Linear(4, 3)),
        (0, 1),
        executor="loop",
        dtype=torch.float32,
    )
    assert torch.equal(stack.layout.join(stack.layout.split(theta)), theta)
    assert stack.layout.roles == ("embedding", "kernel", "other", "matrix", "other")


def test_frozen_parameters_are_buffers_and_a_model_without_any_other_is_refused():
    def frozen() -> nn.Module:
        model = dropout_net()
        model[1].requires_grad_(False)
        return model

    stack, _, buffers = build_stack(frozen, (0,), executor="vmap", dtype=torch.float64)
    assert "1.weight" in buffers
    assert "1.weight" not in stack.layout.names
    with pytest.raises(ModelError, match="no trainable parameter"):
        build_stack(lambda: nn.Flatten(), (0,), executor="vmap", dtype=torch.float64)


def test_a_model_that_seeds_torch_itself_is_refused():
    def always_the_same() -> nn.Module:
        torch.manual_seed(0)
        return dropout_net()

    state = torch.get_rng_state()
    with pytest.raises(ModelError, match=r"take torch\.manual_seed out of it"):
        build_stack(always_the_same, (0, 1), executor="vmap", dtype=torch.float64)
    assert torch.equal(state, torch.get_rng_state())


def test_a_table_of_positions_is_no_matrix():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(3, 4))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.positions).mean(1))

    stack, _, _ = build_stack(Positions, (0,), executor="loop", dtype=torch.float32)
    assert dict(zip(stack.layout.names, stack.layout.roles, strict=True))["positions"] == "other"
    assert dict(zip(stack.layout.names, stack.layout.roles, strict=True))["head.weight"] == "matrix"


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("build", "shape"), [(dropout_net, (12,)), (convolutions, (1, 8, 8))])
@pytest.mark.parametrize("per_member", [True, False])
def test_members_evaluated_in_groups_give_what_they_give_together(
    build, shape, executor, at_once, per_member
):
    stack, theta, buffers = build_stack(build, range(5), executor=executor, dtype=torch.float64)
    inputs, targets = batch(5, *shape)
    data = (inputs, targets) if per_member else (inputs[0], targets[0])
    noise = {"train": True, "keys": tuple(range(5)), "per_member": per_member}
    limited = stack.limited(Limits(at_once))
    own = copy.deepcopy(buffers)
    expected = stack.gradients(theta, buffers, *data, cross_entropy, **noise)
    torch.testing.assert_close(
        limited.gradients(theta, own, *data, cross_entropy, **noise), expected, rtol=1e-10, atol=1e-14
    )
    for name, buffer in buffers.items():
        torch.testing.assert_close(own[name], buffer, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        limited.losses(theta, own, *data, cross_entropy, per_member=per_member),
        stack.losses(theta, buffers, *data, cross_entropy, per_member=per_member),
    )
    torch.testing.assert_close(
        limited.outputs(theta, own, data[0], per_member=per_member),
        stack.outputs(theta, buffers, data[0], per_member=per_member),
    )


def test_a_group_is_all_that_is_evaluated_at_a_time():
    seen = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.weight)
            return super().forward(x)

    stack, theta, buffers = build_stack(
        lambda: Counting(12, 3), range(5), executor="vmap", dtype=torch.float64
    )
    inputs, targets = batch(5, 12)
    stack.limited(Limits(2)).gradients(theta, buffers, inputs, targets, cross_entropy, per_member=True)
    assert len(seen) == 3
