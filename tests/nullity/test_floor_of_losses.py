"""The floor looks at the loss, and is a lower bound whatever the scale of inputs, loss and weights is."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import lossray
from lossray.errors import LossrayError, ModelError
from lossray.nullity.counts import counts_of, dense_matrices, spectrum_of
from lossray.nullity.structural_floor import StructuralFloor, beside, null_vectors, structural_floor
from tests.nullity.test_counts import symmetric
from tests.nullity.test_output_loss import first_two, hinge, ranking, smoothed, tokens


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape, below, seed=1):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def chain(widths, activation=None, *, bias=True, seed=0):
    torch.manual_seed(seed)
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), *([activation()] if activation else [])]
    return nn.Sequential(*layers[: -1 if activation else None]).double()


def huber(outputs, targets):
    return F.huber_loss(outputs, targets, delta=0.07)


# ---- what the loss uses of a linear network's outputs


@pytest.mark.parametrize("draw", range(2))
@pytest.mark.parametrize(
    ("loss", "k"), [(F.l1_loss, 0), (hinge, None), (huber, None), (first_two, 2), (F.mse_loss, 4)]
)
def test_the_floor_of_a_linear_network_looks_at_the_loss(loss, k, draw):
    x, y = noise(50, 6), noise(50, 4, seed=2)
    y = y.sign() if loss is hinge else y
    model = chain([6, 5, 7, 4], bias=False, seed=draw)
    floor = structural_floor(model, (x, y), loss)
    found = lossray.degeneracy(lossray.Hessian(model, loss, (x, y)))
    assert floor.complete
    assert (found.nullity, found.excess) == (floor.dimension, 0)
    if k:  # theory 2.8 with the outputs that the loss uses
        q = min(k, 5)
        assert found.rank == 2 * q * 12 - 3 * q * q + q * (6 + k)
    elif loss is F.l1_loss:  # no curvature in the outputs: the part of the residual is left
        assert found.rank < 2 * 4 * 12 - 3 * 16 + 4 * (6 + 4)


# ---- shifts that a loss ignores, and those that it does not


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.output = nn.Embedding(6, 3), nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.output(torch.tanh(self.mix(self.table(x))))


def test_of_a_ranking_model_the_shift_of_the_bias_alone_is_null():
    model, data = chain([4, 5, 1], nn.Tanh), (noise(30, 9, 4), classes(30, below=9))
    found = lossray.degeneracy(lossray.Hessian(model, ranking, data))
    assert (found.rank, found.nullity, found.structural_nullity) == (30, 1, 1)
    assert found.gap > 1e6
    assert null_vectors(model, data, ranking).nonzero().tolist() == [[0, 30]]


def test_of_tokens_the_shift_is_null_at_every_place():
    torch.manual_seed(0)
    model, data = Tokens().double(), (classes(20, 3, below=6), classes(20, 3, below=5))
    found = lossray.degeneracy(lossray.Hessian(model, tokens, data))
    assert found.structural_nullity == 4 + 1
    assert found.nullity >= 5
    assert dict(structural_floor(model, data, tokens).by_cause) == {"softmax shift": 5}
    vectors = null_vectors(model, data, tokens)
    hessian = lossray.Hessian(model, tokens, data)
    assert float((hessian @ vectors.T).abs().max()) < 1e-14


def test_along_another_axis_every_bias_is_null_and_no_weight():
    model, data = chain([3, 4, 2], nn.Tanh), (noise(25, 6, 3), classes(25, 2, below=6))
    found = lossray.degeneracy(lossray.Hessian(model, F.cross_entropy, data))
    assert (found.structural_nullity, found.nullity) == (2, 2)


def test_outputs_that_the_loss_does_not_use_are_null_with_all_their_weights():
    model, data = chain([5, 4, 4], nn.Tanh), (noise(40, 5), noise(40, 4, seed=2))
    floor = structural_floor(model, data, first_two)
    assert floor.by_cause["ignored outputs"] == 2 * (4 + 1)
    found = lossray.degeneracy(lossray.Hessian(model, first_two, data))
    assert (found.nullity, found.excess) == (floor.dimension, 0)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss, F.l1_loss])
def test_the_scale_of_the_loss_does_not_matter(loss, scale):
    model, x = chain([4, 6, 3], nn.ReLU), noise(30, 4)
    y = classes(30, below=3) if loss is F.cross_entropy else noise(30, 3, seed=3)
    whole = structural_floor(model, (x, y), loss)
    assert structural_floor(model, (x, y), lambda o, t: scale * loss(o, t)) == whole
    assert whole.complete


# ---- scales of inputs


@pytest.mark.parametrize("scale", [1e-5, 255.0, 1e5])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_what_is_forced_does_not_depend_on_the_scale_of_inputs(activation, scale):
    x, y = noise(50, 6), classes(50, below=3)
    x[:, 0], x[:, 1] = 0, 3 * x[:, 2]
    model = chain([6, 5, 4, 3], activation, bias=False)  # without a bias ReLU's pattern stays
    plain = structural_floor(model, (x, y), F.cross_entropy)
    scaled = structural_floor(model, (scale * x, y), F.cross_entropy)
    assert plain.complete
    assert scaled == plain
    found = lossray.degeneracy(lossray.Hessian(model, F.cross_entropy, (scale * x, y)))
    assert found.rank is None or found.nullity >= scaled.dimension


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_columns_of_very_different_units_are_told_apart(activation):
    x, y = noise(50, 5) * torch.tensor([1e-4, 1e3, 1.0, 1e-2, 1e2], dtype=torch.float64), classes(50, below=3)
    floor = structural_floor(chain([5, 4, 3], activation), (x, y), F.cross_entropy)
    if activation is nn.Tanh:
        assert (floor.dimension, floor.complete) == (4 + 1, True)
    else:
        assert floor.complete


def test_data_that_depend_on_each_other_to_single_precision_leave_the_floor_in_doubt():
    x = noise(50, 5)
    x[:, 4] = (x[:, :4].sum(dim=1)).float().double()
    assert not structural_floor(chain([5, 4, 3], nn.Tanh), (x, classes(50, below=3)), smoothed).complete


def test_a_unit_at_its_kink_but_for_rounding_leaves_what_the_loss_ignores_alone():
    model, x = chain([3, 2, 2], nn.ReLU, bias=False), noise(20, 3)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    x[0] = 1.0  # 0.1 + 0.2 - 0.3
    floor = structural_floor(model, (x, classes(20, below=2)), F.cross_entropy)
    assert (dict(floor.by_cause), floor.complete) == ({"softmax shift": 2}, False)


# ---- what is reported


def test_a_floor_above_a_nullity_with_a_gap_is_not_reported_nor_is_the_rank():
    matrix, _ = symmetric([0.0, 0.0, 0.3, -0.5, 1.0])
    count = counts_of(spectrum_of(matrix, torch.float64))[-1]
    assert beside(StructuralFloor(2, {}, True), count).excess == 0
    assert beside(StructuralFloor(1, {}, True), count).excess == 1
    assert beside(StructuralFloor(1, {}, False), count).excess is None
    wrong = beside(StructuralFloor(3, {}, True), count)
    assert (wrong.structural_nullity, wrong.excess, wrong.rank) == (None, None, None)
    assert "3 null directions were derived and 2 found" in wrong.note
    assert StructuralFloor(3, {}, True).excess(2) is None


def test_a_floor_of_ones_own_that_cannot_be_leaves_the_rank_as_it_is():
    model, data = chain([3, 2], None), (noise(20, 3), noise(20, 2, seed=1))
    found = lossray.degeneracy(lossray.Hessian(model, F.mse_loss, data), floor=3)
    assert (found.rank, found.structural_nullity, found.excess) == (8, None, None)
    assert "3 null directions" in found.structural_note


@pytest.mark.parametrize("kind", ["pruned", "old weight norm", "new weight norm", "old spectral norm"])
def test_layers_with_other_parameters_have_a_lower_bound_or_are_refused_by_name(kind):
    model, data = chain([5, 4, 3], nn.ReLU), (noise(30, 5), classes(30, below=3))
    if kind == "pruned":
        prune.l1_unstructured(model[0], "weight", 0.5)
        prune.random_unstructured(model[2], "weight", 0.3)
    elif kind == "old weight norm":
        nn.utils.weight_norm(model[0])
    elif kind == "old spectral norm":
        nn.utils.spectral_norm(model[0])
    else:
        parametrizations.weight_norm(model[0])
    model.eval()
    found = lossray.degeneracy(lossray.Hessian(model, F.cross_entropy, data))
    if found.structural_nullity is None:  # refused, by name
        with pytest.raises(LossrayError, match="|".join(["Sequential", "Linear", "0"])):
            structural_floor(model, data, F.cross_entropy)
        return
    floor = structural_floor(model, data, F.cross_entropy)
    assert not floor.complete
    assert found.structural_nullity == floor.dimension <= found.nullity


@pytest.mark.parametrize("size", [1e-12, 1.0])
def test_a_hook_that_changes_the_outputs_is_seen(size):
    model, data = chain([5, 4, 3], nn.Tanh), (noise(30, 5), classes(30, below=3))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter *= size
    model.register_forward_hook(lambda *args: args[2] ** 2)
    floor = structural_floor(model, data, F.cross_entropy)
    assert (floor.dimension, floor.complete) == (0, False)


def test_a_model_without_one_tensor_of_outputs_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ModelError, match="needs one tensor"):
        structural_floor(Pair(3, 2), (noise(9, 3), noise(9, 2)), F.mse_loss)


# ---- random architectures, losses and scales

ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.Identity, nn.LeakyReLU, nn.SiLU]
LOSSES = ["mse", "cross_entropy", "l1", "smooth_l1", "bce", "smoothed", "part", "hinge", "log_softmax"]


class LogSoftmax(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return F.log_softmax(self.inner(x), dim=-1)


def problem(seed):
    random = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=random))]

    n, inputs, outputs = pick([5, 20, 40]), pick([1, 3, 5]), pick([2, 3])
    widths = [inputs, *(pick([1, 2, 4]) for _ in range(pick([0, 1, 1, 2]))), outputs]
    model = chain(widths, pick(ACTIVATIONS), bias=pick([True, True, False]), seed=seed)
    x = noise(n, inputs, seed=seed) * pick([1e-3, 1.0, 1.0, 30.0])
    name, values = LOSSES[seed % len(LOSSES)], noise(n, outputs, seed=seed + 1)
    labels = classes(n, below=outputs, seed=seed)
    if name == "log_softmax":
        return LogSoftmax(model), (x, labels), F.nll_loss
    targets = {"bce": (values > 0).double(), "hinge": values.sign()}
    targets |= dict.fromkeys(("cross_entropy", "smoothed"), labels)
    losses = {
        **{"mse": F.mse_loss, "cross_entropy": F.cross_entropy, "l1": F.l1_loss, "hinge": hinge},
        **{"smooth_l1": F.smooth_l1_loss, "bce": F.binary_cross_entropy_with_logits, "smoothed": smoothed},
        "part": lambda o, t: F.mse_loss(o[:, :1], t[:, :1]),
    }
    factor = pick([1.0, 1e-9, 1e9])
    return model, (x, targets.get(name, values)), lambda o, t: factor * losses[name](o, t)


@pytest.mark.parametrize("seed", range(36))
def test_the_floor_is_a_lower_bound_and_exact_where_it_is_complete(seed):
    model, data, loss = problem(seed)
    floor = structural_floor(model, data, loss)
    hessian = lossray.Hessian(model, loss, data)
    (matrix,) = dense_matrices(hessian.packed)
    count = counts_of(spectrum_of(matrix, torch.float64))[-1]
    vectors = null_vectors(model, data, loss)
    scale = float(matrix.abs().max())
    assert not len(vectors) or float((vectors @ matrix).abs().max()) <= 1e-12 * scale
    if count.rank is not None:
        assert floor.dimension <= count.nullity
        assert not floor.complete or floor.dimension == count.nullity
