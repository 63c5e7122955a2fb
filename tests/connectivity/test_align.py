"""`align`: a permuted and rescaled copy is recovered, the function stays, the distance never grows."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import lossray
from lossray.connectivity.activations import Moments
from lossray.connectivity.align import aligned
from lossray.connectivity.scaling import nearest_factors
from lossray.connectivity.weight_matching import weight_matching
from lossray.errors import DataError, ModelError, StudyError
from lossray.networks.layout import layout_of
from lossray.networks.models import build_model
from lossray.networks.permutations import permutation_symmetry, permute
from lossray.networks.rescale import rescale
from lossray.networks.settings import model_settings
from lossray.networks.symmetry import rescaling_symmetry

NETWORKS = {
    "mlp": {"name": "mlp", "widths": [12, 8, 6]},
    "mlp, batch norm": {"name": "mlp", "widths": [12, 10], "norm": "batch"},
    "mlp, layer norm": {"name": "mlp", "widths": [12, 10], "norm": "layer", "dropout": 0.2},
    "tanh": {"name": "mlp", "widths": [12, 10], "activation": "tanh"},
    "cnn": {"name": "cnn", "channels": [4, 6], "kernel": 3, "widths": [10]},
    "cnn, batch norm": {"name": "cnn", "channels": [4, 6], "kernel": 3, "widths": [], "norm": "batch"},
    "resnet": {"name": "resnet", "width": 2},
    "resnet without norm": {"name": "resnet", "width": 2, "norm": "none"},
}


class Joined(nn.Module):
    """A user's own: the inner layer joins the hidden units to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.output = nn.Linear(64, 9), nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        return self.output(torch.relu(x + self.inner(x)))


def built(network: str) -> nn.Module:
    if network == "joined":
        return Joined()
    return build_model(model_settings(NETWORKS[network]), (1, 8, 8), 3)


def images(n: int = 40) -> Tensor:
    return torch.randn(n, 1, 8, 8)


def trained(network: str, *, steps: int = 6) -> nn.Module:
    """In eval mode, after some steps on a task that all models share; running statistics are its own."""
    model = built(network).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        x = images()
        targets = x[:, 0, :3, :4].sum(dim=2).argmax(dim=1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def shuffled(model: nn.Module) -> nn.Module:
    groups = permutation_symmetry(model).groups
    return permute(model, {name: torch.randperm(count) for name, count in groups.items()})


def rescaled(model: nn.Module) -> nn.Module:
    groups = rescaling_symmetry(model, layout_of(model)).groups
    return rescale(model, {name: torch.randn(s.stop - s.start).exp() for name, s in groups.items()})


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_permuted_copy_is_recovered_exactly(network, matching):
    to = trained(network)
    copied = shuffled(to)
    found = aligned(copied, to, images(), kind="permutation", matching=matching)
    assert found.distance == 0
    assert found.distance_before > 1
    assert found.function_change < 1e-12
    assert found.factors == {}
    for name, value in to.state_dict().items():  # running statistics too
        assert torch.equal(found.model.state_dict()[name], value)


@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize("network", ["mlp", "mlp, layer norm", "cnn, batch norm", "resnet"])
def test_a_permuted_and_rescaled_copy_is_recovered_to_rounding(network, matching):
    to = trained(network).double()
    copied = rescaled(shuffled(to))
    found = aligned(copied, to, (images(), torch.zeros(40)), matching=matching)
    assert found.distance <= 1e-12 * found.distance_before
    assert found.function_change < 1e-12
    for name, value in to.named_buffers():
        assert torch.equal(dict(found.model.named_buffers())[name], value)


@pytest.mark.parametrize("network", ["mlp, batch norm", "resnet without norm", "joined"])
def test_a_rescaled_copy_is_recovered_and_the_permutation_left_alone(network):
    to = trained(network).double()
    found = aligned(rescaled(to), to, kind="scale")
    assert found.distance <= 1e-12 * found.distance_before
    assert found.permutations == {}
    assert found.function_change is None


def test_in_float32_a_copy_is_recovered_to_its_rounding():
    to = trained("cnn")
    found = aligned(rescaled(shuffled(to)), to, images())
    assert found.distance <= 1e-6 * found.distance_before
    assert found.function_change < 1e-12  # before the weights are rounded
    assert found.model.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize("network", ["mlp", "tanh", "cnn, batch norm", "resnet without norm", "joined"])
def test_two_trained_models_come_closer_and_the_function_stays(network):
    model, to, x = trained(network, steps=20), trained(network, steps=20), images()
    before = {name: (copy.deepcopy(m.state_dict()), m) for name, m in (("model", model), ("to", to))}
    start = float((flat(model) - flat(to)).norm())
    ways = [("permutation", "weights"), ("both", "weights"), ("both", "activations")]
    distances = {}
    for kind, matching in ways if network == "tanh" else [*ways, ("scale", "weights")]:
        found = aligned(model, to, x, kind=kind, matching=matching)
        assert found.distance_before == pytest.approx(start, rel=1e-12)
        assert found.distance == pytest.approx(float((flat(found.model) - flat(to)).norm()), rel=1e-12)
        assert found.distance < start or matching == "activations"
        assert found.distance <= start
        assert found.function_change < 1e-12
        torch.testing.assert_close(found.model(x), model(x), rtol=1e-4, atol=1e-4)
        again = permute(model, found.permutations) if found.permutations else model
        again = rescale(again, found.factors) if found.factors else again
        assert torch.equal(flat(again), flat(found.model))
        distances[kind, matching] = found.distance
    if network != "tanh":
        alone = min(distances["permutation", "weights"], distances["scale", "weights"])
        assert distances["both", "weights"] < alone
    assert distances["permutation", "weights"] < 0.95 * start
    for state, own in before.values():
        assert not own.training
        assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())
        assert all(parameter.grad is None for parameter in own.parameters())


@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_a_model_that_no_permutation_brings_closer_stays(matching):
    to = trained("mlp")
    near = copy.deepcopy(to)
    for parameter in near.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    found = aligned(near, to, images(), kind="permutation", matching=matching)
    assert torch.equal(flat(found.model), flat(near))
    assert found.distance == found.distance_before
    assert all(torch.equal(p, torch.arange(len(p))) for p in found.permutations.values())
    assert aligned(to, to).distance == 0


def test_without_a_relu_both_is_the_permutation_and_scale_is_refused():
    model, to = trained("tanh", steps=3), trained("tanh", steps=3)
    both, alone = aligned(model, to), aligned(model, to, kind="permutation")
    assert both.factors == {}
    assert torch.equal(flat(both.model), flat(alone.model))
    with pytest.raises(ModelError, match=r"no ReLU rescaling symmetry: activation activation1 \(Tanh\)"):
        aligned(model, to, kind="scale")


def test_where_nothing_can_be_permuted_both_is_the_scale_alone():
    class Depthwise(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten()
            )

    to = Depthwise().double()
    found = aligned(rescaled(to), to, torch.randn(5, 4, 8, 8))
    assert found.permutations == {}
    assert found.distance <= 1e-12 * found.distance_before
    with pytest.raises(ModelError, match="is a grouped convolution"):
        aligned(to, to, kind="permutation")
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="no ReLU rescaling symmetry"):
        aligned(linear, linear)


def test_one_layer_is_matched_as_no_permutation_could_better():
    model, to = (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double() for _ in range(2))
    others = (permute(model, {"0": p}) for p in itertools.permutations(range(5)))
    least = min(float((flat(other) - flat(to)).norm()) for other in others)
    assert aligned(model, to, kind="permutation").distance == pytest.approx(least, rel=1e-12)


def test_a_match_of_weights_is_optimal_in_each_group_alone():
    model, to = built("cnn").double(), built("cnn").double()
    symmetry = permutation_symmetry(model)
    source, target = (dict(own.named_parameters()) for own in (model, to))
    with torch.no_grad():
        found = weight_matching(symmetry, source, target)
        best = sum(float((w * target[n]).sum()) for n, w in symmetry.apply(source, found).items())
        for p in itertools.permutations(range(4)):
            other = symmetry.apply(source, found | {"conv1": torch.tensor(p)})
            assert sum(float((w * target[n]).sum()) for n, w in other.items()) <= best + 1e-12


@pytest.mark.parametrize("network", ["mlp", "resnet without norm", "joined"])
def test_no_factor_alone_brings_a_model_closer(network):
    model, to = (trained(network, steps=2).double() for _ in range(2))
    symmetry = rescaling_symmetry(model, layout_of(model))
    theta, target = flat(rescaled(model)), flat(to)
    alpha = nearest_factors(symmetry, theta, target)

    def distance(factors: Tensor) -> Tensor:
        return (symmetry.diagonal(factors) * theta - target).norm(dim=-1)

    for change in (1e-3, 0.1, 1.0, 3.0):
        for sign in (-1, 1):
            changed = alpha * (sign * change * torch.eye(symmetry.units, dtype=torch.float64)).exp()
            assert bool((distance(changed) > distance(alpha)).all())
    assert distance(alpha) < distance(torch.ones_like(alpha))


def test_units_without_weights_keep_their_gauge():
    model, to = trained("mlp").double(), trained("mlp").double()
    model.hidden1.weight.data[3], model.hidden1.bias.data[3] = 0, 0
    to.hidden2.weight.data[:, 5] = 0
    found = aligned(model, to, images(), kind="scale")
    assert found.factors["hidden1"][3] == 1
    assert found.distance < found.distance_before


def test_the_match_of_activations_is_blind_to_scale_and_to_how_the_data_come():
    model, to, x = trained("cnn").double(), trained("cnn").double(), images(50)
    expected = aligned(model, to, x, matching="activations")
    for own, data in ((rescaled(model), x), (model, [(x[:7], None), (x[7:], None)]), (model, x.numpy())):
        found = aligned(own, to, data, matching="activations")
        for group, permutation in expected.permutations.items():
            assert torch.equal(found.permutations[group], permutation)


def test_moments_of_parts_give_the_correlation_of_the_whole():
    model, other = 3 + torch.randn(60, 4, dtype=torch.float64), torch.rand(60, 4, dtype=torch.float64)
    model[:, 1] = 2.0
    parts = [Moments.of(model[i : i + 25], other[i : i + 25]) for i in (0, 25, 50)]
    found = parts[0].merged(parts[1]).merged(parts[2]).correlation()
    whole = torch.corrcoef(torch.cat([other, model], dim=1).T)[:4, 4:]
    assert bool((found[:, 1] == 0).all())
    torch.testing.assert_close(found[:, [0, 2, 3]], whole[:, [0, 2, 3]], rtol=1e-12, atol=1e-12)


def test_mode_and_random_state_stay_and_the_facade_returns_the_model():
    model, to = trained("mlp, layer norm", steps=2).train(), trained("mlp, layer norm", steps=2)
    compiled, x = torch.compile(model), images()
    state = torch.get_rng_state()
    new = lossray.align(compiled, to, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(new) is nn.Sequential
    assert (new.training, model.training, to.training) == (True, True, False)
    assert torch.equal(flat(new), flat(lossray.align(model, to)))  # the same draws in each call


def test_a_function_that_changes_is_refused_with_the_number():
    class Weighted(nn.Module):  # by the weights of a layer that is not its own
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.held = [layer]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.held[0].weight[0, 0]

    ends = [built("mlp") for _ in range(2)]
    model, to = (nn.Sequential(end, Weighted(end.hidden1)) for end in ends)
    with pytest.raises(ModelError, match=r"outputs of Sequential change by \d.* of the largest, .* 1e-09 is"):
        lossray.align(model, to, images())
    broken = images()
    broken[3] = torch.nan
    with pytest.raises(DataError, match="found nan in the inputs of example 3"):
        lossray.align(ends[0], ends[1], broken)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "matching 'activations': found no data"),
        ({"x": torch.ones(())}, "found a dict with x; allowed: inputs"),
        ((3, 4), "found a int"),
        (torch.ones(0, 64), r"found a tensor \[0, 64\]"),
        (iter([torch.ones(2, 64)]), "can be read once"),
    ],
)
def test_data_that_cannot_be_used_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        lossray.align(built("mlp"), built("mlp"), data, matching="activations")


def test_arguments_that_cannot_be_used_are_refused():
    model = built("mlp")
    with pytest.raises(
        StudyError, match=r"align, kind: found 'scales'; allowed: permutation, scale, both; did you"
    ):
        lossray.align(model, model, kind="scales")
    with pytest.raises(StudyError, match="align, matching: found 'weight'"):
        lossray.align(model, model, matching="weight")
    with pytest.raises(ModelError, match="found int; allowed"):
        lossray.align(model, 3)
    with pytest.raises(ModelError, match=r"Sequential on inputs \[2, 5\]: RuntimeError"):
        lossray.align(model, model, torch.ones(2, 5))
    with pytest.raises(ModelError, match=r"'hidden1.weight' is \[12, 64\] in model and \[10, 24\] in to"):
        lossray.align(model, built("cnn"))
    other = built("mlp")
    other.hidden2.bias.requires_grad_(False)
    with pytest.raises(ModelError, match=r"'hidden2.bias' is \[8\] in model and \[8\] \(not trained\) in to"):
        lossray.align(model, other)
    other = built("mlp")
    other.hidden2.bias.data[0] = torch.inf
    with pytest.raises(ModelError, match="align: to has weights that are not finite"):
        lossray.align(model, other)
    tanh = copy.deepcopy(model)
    tanh.activation1 = nn.Tanh()
    with pytest.raises(ModelError, match="not of one architecture"):
        lossray.align(model, tanh, images(), matching="activations")
