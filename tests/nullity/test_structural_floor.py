"""The structural floor is the measured nullity, at initialisation and in training (theory 2.3)."""

import pytest
import torch
from torch import nn

import lossray
from lossray.errors import DataError, ModelError
from lossray.networks.losses import cross_entropy, mse
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.nullity.structural_floor import null_vectors, structural_floor
from lossray.training.data_settings import data_settings
from lossray.training.datasets import load_dataset

DIGITS = load_dataset(data_settings({"standardise": "feature"}), dtype=torch.float64).train
IMAGES, LABELS = DIGITS.inputs[:200], DIGITS.targets[:200]
SMALL = nn.functional.avg_pool2d(IMAGES, 2)  # 4 x 4


def model_of(table, inputs, seed=0, outputs=10):
    torch.manual_seed(seed)
    return build_model(model_settings(table), tuple(inputs.shape[1:]), outputs).double()


def trained(model, inputs, loss, steps, lr=0.02):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(inputs), LABELS).backward()
        optimizer.step()
    return model


# Pixels that are always zero, units that die, pairs of units that are never active together, pooling windows.
NETS = {
    "mlp": ({"name": "mlp", "widths": [8]}, SMALL, cross_entropy),
    "mlp-dead-inputs": ({"name": "mlp", "widths": [5]}, IMAGES, cross_entropy),
    "mlp-deep": ({"name": "mlp", "widths": [8, 6]}, SMALL, cross_entropy),
    "mlp-deep-mse": ({"name": "mlp", "widths": [7, 5]}, SMALL, mse),
    "mlp-no-bias": ({"name": "mlp", "widths": [8, 6], "bias": False}, SMALL, cross_entropy),
    "cnn": ({"name": "cnn", "channels": [3], "kernel": 3, "widths": []}, SMALL, cross_entropy),
    "cnn-deep": ({"name": "cnn", "channels": [2, 3], "kernel": 3, "widths": [5]}, SMALL, cross_entropy),
    "cnn-wide-kernel": ({"name": "cnn", "channels": [2, 3], "kernel": 5, "widths": []}, SMALL, mse),
}


@pytest.mark.parametrize("steps", [0, 30])
@pytest.mark.parametrize("name", NETS)
def test_the_floor_of_a_relu_network_is_its_measured_nullity(name, steps):
    table, inputs, loss = NETS[name]
    model = trained(model_of(table, inputs), inputs, loss, steps)
    found = lossray.degeneracy(lossray.Hessian(model, loss, (inputs, LABELS)))
    assert found.structural_nullity is not None
    assert found.gap > 1e3
    assert found.nullity == found.structural_nullity > 0
    assert (found.excess, found.rank) == (0, found.dim - found.nullity)


def test_most_of_these_nets_have_null_directions_beyond_dead_inputs_and_the_shift():
    counts = {}
    for name in ("mlp-dead-inputs", "mlp-deep", "cnn-deep"):
        table, inputs, loss = NETS[name]
        counts[name] = structural_floor(model_of(table, inputs), (inputs, LABELS), loss).by_cause
    assert counts["mlp-dead-inputs"]["first layer"] > 0
    assert counts["mlp-deep"]["later layers"] > 0
    assert counts["cnn-deep"]["later layers"] > 0
    assert counts["mlp-deep"]["softmax shift"] <= 6 + 1


@pytest.mark.parametrize(
    ("table", "inputs"),
    [
        ({"name": "mlp", "widths": [5, 4], "activation": "tanh"}, IMAGES),
        ({"name": "cnn", "channels": [2], "kernel": 3, "widths": [4], "activation": "gelu"}, SMALL),
    ],
)
def test_smooth_networks_have_dead_inputs_and_the_shift(table, inputs):
    model = model_of(table, inputs)
    found = lossray.degeneracy(lossray.Hessian(model, cross_entropy, (inputs, LABELS)))
    assert found.excess == 0
    floor = structural_floor(model, (inputs, LABELS), cross_entropy)
    assert floor.complete
    flat = torch.cat([inputs.flatten(1), torch.ones(len(inputs), 1)], dim=1)
    blind = flat.shape[1] - int(torch.linalg.matrix_rank(flat)) if table["name"] == "mlp" else 0
    assert floor.by_cause["first layer"] == (5 * blind if table["name"] == "mlp" else 0)
    assert floor.by_cause["softmax shift"] == 4 + 1


def test_softmax_regression_is_null_along_the_shift_and_dead_inputs():
    model = model_of({"name": "linear", "widths": [], "bias": True}, IMAGES)
    found = lossray.degeneracy(lossray.Hessian(model, cross_entropy, (IMAGES, LABELS)))
    rank = int(torch.linalg.matrix_rank(torch.cat([IMAGES.flatten(1), torch.ones(200, 1)], dim=1)))
    assert found.nullity == found.structural_nullity == 650 - 9 * rank


def test_dead_units_count_with_all_their_weights():
    model = model_of({"name": "mlp", "widths": [4, 3]}, SMALL)
    with torch.no_grad():
        model.hidden1.bias[0] = -1e3  # never active
    floor = structural_floor(model, (SMALL, LABELS), mse)
    assert floor.by_cause["first layer"] >= 16 + 1
    assert floor.by_cause["later layers"] >= 3
    found = lossray.degeneracy(lossray.Hessian(model, mse, (SMALL, LABELS)))
    assert found.excess == 0


def test_a_unit_whose_way_to_the_output_is_closed_counts_as_dead():
    model = model_of({"name": "mlp", "widths": [4, 3]}, SMALL)
    with torch.no_grad():
        model.hidden2.bias.fill_(-1e3)  # the second layer is silent
    floor = structural_floor(model, (SMALL, LABELS), mse)
    assert floor.by_cause == {"first layer": 4 * 17, "later layers": 3 * 5 + 10 * 3, "mixing": 0}


def test_shift_vectors_are_null_and_there_is_one_for_each_feature_and_the_bias():
    model = model_of({"name": "mlp", "widths": [6]}, SMALL)
    vectors = null_vectors(model, (SMALL, LABELS), cross_entropy)
    assert vectors.shape == (7, 16 * 6 + 6 + 60 + 10)
    hessian = lossray.Hessian(model, cross_entropy, (SMALL, LABELS))
    assert float((hessian @ vectors.T).abs().max()) < 1e-15
    assert float((vectors @ hessian.gradient).abs().max()) < 1e-15
    assert len(null_vectors(model, (SMALL, LABELS), mse)) == 0
    bent = nn.Sequential(nn.Flatten(), nn.Linear(16, 10), nn.Tanh())
    assert len(null_vectors(bent, (SMALL, LABELS), cross_entropy)) == 0


def test_of_an_architecture_that_is_not_understood_the_shift_is_known():
    model = model_of({"name": "resnet", "width": 2}, IMAGES)
    floor = structural_floor(model, (IMAGES[:8], LABELS[:8]), cross_entropy)
    assert (floor.complete, dict(floor.by_cause)) == (False, {"softmax shift": 8 + 1})
    assert structural_floor(model, (IMAGES[:8], LABELS[:8]), mse).dimension == 0


def test_any_loss_that_ignores_shifts_is_a_softmax_loss_and_batches_may_be_several():
    model = model_of({"name": "mlp", "widths": [6]}, SMALL)
    data = [(SMALL[:120], LABELS[:120]), (SMALL[120:], LABELS[120:])]
    whole = structural_floor(model, (SMALL, LABELS), nn.CrossEntropyLoss())
    assert structural_floor(model, data, nn.functional.cross_entropy) == whole
    assert whole.by_cause["softmax shift"] == 7
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert structural_floor(model, data, smoothed) == whole


def chain(*layers, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*layers).double()


BINARY = LABELS % 2
FEW = SMALL[:6], LABELS[:6]
# Null directions that turn with the weights. A bias of 4 keeps units active on all examples.
MIXING = {
    # The two classes tell one sum of the units apart: a linear network.
    "always-on": lambda: chain(nn.Flatten(), shifted(nn.Linear(16, 2)), nn.ReLU(), nn.Linear(2, 2)),
    # More features than pixels: the next layer's weights have combinations that no example can see.
    "dependent-features": lambda: chain(
        *(shifted(nn.Conv2d(1, 4, 2)), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(36, 3), nn.LeakyReLU(0.5), nn.Linear(3, 2)),
    ),
    "deep-and-narrow": lambda: chain(
        nn.Flatten(),
        *(nn.Linear(16, 2), nn.LeakyReLU(), shifted(nn.Linear(2, 5)), nn.LeakyReLU(), nn.Linear(5, 2)),
    ),
}


def shifted(layer):
    nn.init.constant_(layer.bias, 4.0)
    return layer


@pytest.mark.parametrize("name", MIXING)
def test_combinations_that_turn_with_the_weights_are_counted(name):
    model = MIXING[name]()
    data = (SMALL, BINARY)
    floor = structural_floor(model, data, cross_entropy)
    found = lossray.degeneracy(lossray.Hessian(model, cross_entropy, data))
    assert floor.by_cause["mixing"] > 0
    assert found.gap > 1e3
    assert (found.nullity, found.excess) == (floor.dimension, 0)


def test_always_active_units_mix_as_in_a_linear_network():
    """Theory 2.8 on 17 inputs (a one for the bias): (m - q)(r + k - 2 q) with m = 2, q = k = 1, r = 17."""
    floor = structural_floor(MIXING["always-on"](), (SMALL, BINARY), cross_entropy)
    assert floor.by_cause["softmax shift"] == 2 + 1
    assert floor.by_cause["mixing"] >= (2 - 1) * (17 + 1 - 2)


def test_few_examples_leave_directions_that_none_of_them_sees():
    model = model_of({"name": "mlp", "widths": [12]}, SMALL)
    floor = structural_floor(model, FEW, mse)
    found = lossray.degeneracy(lossray.Hessian(model, mse, FEW))
    assert floor.by_cause["mixing"] > 0
    assert found.excess == 0


def test_at_a_critical_point_there_is_more_than_the_floor():
    """Without a residual H is the outer part: K theta of every unit is null too (theory 2.1)."""
    model = model_of({"name": "mlp", "widths": [4]}, SMALL)
    targets = model(SMALL).detach()
    found = lossray.degeneracy(lossray.Hessian(model, mse, (SMALL, targets)))
    assert found.gap > 1e3
    assert found.excess == 4


def test_a_network_too_large_for_a_dense_spectrum_has_a_lower_bound():
    model = model_of({"name": "mlp", "widths": [8, 6]}, SMALL)
    whole = structural_floor(model, (SMALL, LABELS), cross_entropy)
    part = structural_floor(model, (SMALL, LABELS), cross_entropy, dense_up_to=100)
    assert (whole.complete, part.complete) == (True, False)
    assert dict(whole.by_cause) == {**part.by_cause, "mixing": 0}
    assert whole.excess(whole.dimension + 2) == 2
    assert part.excess(part.dimension + 2) is None  # there may be mixing
    assert part.excess(part.dimension) == 0


def test_layers_that_work_in_place_are_followed():
    plain = chain(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 10))
    in_place = chain(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(inplace=True), nn.Linear(5, 10))
    found = [structural_floor(model, (SMALL, LABELS), cross_entropy) for model in (plain, in_place)]
    assert found[0] == found[1]
    assert found[0].complete


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.output, self.spare = nn.Linear(16, 10), nn.Linear(3, 3)

    def forward(self, x):
        return self.output(x.flatten(1))


class Rows(nn.Module):
    """Acts along the last axis of images."""

    def __init__(self):
        super().__init__()
        self.first, self.output = nn.Linear(4, 3), nn.Linear(12, 10)

    def forward(self, x):
        return self.output(self.first(x).relu().flatten(1))


@pytest.mark.parametrize(
    "model",
    [Idle(), Rows(), nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.PReLU(), nn.Linear(5, 10))],
)
def test_what_looks_like_a_chain_but_is_none_has_a_lower_bound(model):
    floor = structural_floor(model, (SMALL, LABELS), cross_entropy)
    assert not floor.complete
    found = lossray.degeneracy(lossray.Hessian(model.double(), cross_entropy, (SMALL, LABELS)))
    assert found.nullity >= floor.dimension > 0


def test_examples_of_no_weight_force_nothing():
    model = model_of({"name": "mlp", "widths": [6]}, SMALL)
    weights = (torch.arange(200) < 150).double()
    whole = structural_floor(model, (SMALL, LABELS, weights), cross_entropy)
    assert whole == structural_floor(model, (SMALL[:150], LABELS[:150]), cross_entropy)


def test_the_model_stays_as_it_was():
    model = model_of({"name": "mlp", "widths": [6]}, SMALL).float().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structural_floor(model, (SMALL.float(), LABELS), cross_entropy)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_layers_stay_in_their_own_mode():
    model = nn.Sequential(nn.Linear(16, 6), nn.BatchNorm1d(6).eval(), nn.ReLU(), nn.Linear(6, 10))
    structural_floor(model, (SMALL.flatten(1), LABELS), cross_entropy)
    assert [layer.training for layer in model] == [True, False, True, True]


class Tied(nn.Module):
    """A layer that is called twice, and with `last` once more as the last one."""

    def __init__(self, *, last):
        super().__init__()
        self.hidden, self.last = nn.Linear(10, 10), last
        self.out = self.hidden if last else nn.Linear(10, 10)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(torch.relu(self.hidden(x)))))


@pytest.mark.parametrize(("last", "shift"), [(False, 11), (True, 0)])
def test_weights_that_act_in_several_places_have_no_floor_of_their_own(last, shift):
    torch.manual_seed(0)
    model, inputs = Tied(last=last).double(), SMALL.flatten(1)[:, :10]
    floor = structural_floor(model, (inputs, LABELS), cross_entropy)
    assert (floor.complete, floor.dimension) == (False, shift)
    found = lossray.degeneracy(lossray.Hessian(model, cross_entropy, (inputs, LABELS)))
    assert found.structural_nullity == shift
    assert found.excess == (None if found.nullity > shift else 0)


@pytest.mark.parametrize(
    ("model", "data", "loss", "error", "message"),
    [
        (3, (SMALL, LABELS), cross_entropy, ModelError, "found int; allowed: a torch.nn.Module"),
        (nn.Linear(3, 10), (SMALL, LABELS), cross_entropy, ModelError, "raised RuntimeError"),
        (nn.Linear(4, 10), (SMALL, LABELS), "mse", ModelError, "loss: found str; allowed: a function"),
        (nn.Linear(4, 10), (SMALL, LABELS), lambda o, t: o @ t, ModelError, "the loss raised RuntimeError"),
        (nn.Linear(4, 10), (SMALL[:0], LABELS[:0]), cross_entropy, DataError, "found no example"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(model, data, loss, error, message):
    with pytest.raises(error, match=message) as caught:
        structural_floor(model, data, loss)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_no_tensor_are_refused():
    model = model_of({"name": "mlp", "widths": [6]}, SMALL)
    with pytest.raises(DataError, match="inputs and targets that are tensors"):
        structural_floor(model, ({"x": SMALL}, LABELS), cross_entropy)


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.ELU, nn.Hardtanh])
def test_activations_with_straight_pieces_are_not_taken_for_smooth_ones(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), activation(), nn.Linear(4, 10)).double()
    floor = structural_floor(model, (SMALL, LABELS), cross_entropy)
    assert (floor.complete, dict(floor.by_cause)) == (False, {"softmax shift": 5})
