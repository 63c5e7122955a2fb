"""What a loss ignores of the outputs, and in how many pieces it is made, against what is known of losses."""

import pytest
import torch
import torch.nn.functional as F

from lossray.errors import ModelError
from lossray.nullity.loss_pieces import in_one_piece, taylor_loss
from lossray.nullity.output_loss import OutputLoss, ignored_directions, random_outputs


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape, below=4):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


def first_two(outputs, targets):
    return F.mse_loss(outputs[:, :2], targets[:, :2])


def among_three(outputs, targets):
    return F.cross_entropy(outputs[:, :3], targets)


def ranking(scores, best):
    return F.cross_entropy(scores.squeeze(-1), best)


def tokens(outputs, targets):
    return F.cross_entropy(outputs.transpose(1, 2), targets)


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.2)


N, C = 30, 4
# Shape of the outputs, targets, loss, directions that are ignored at each position, and at all alike.
IGNORED = {
    "cross entropy": ((N, C), classes(N), F.cross_entropy, 1, 1),
    "label smoothing": ((N, C), classes(N), smoothed, 1, 1),
    "mse": ((N, C), noise(N, C), F.mse_loss, 0, 0),
    "l1": ((N, C), noise(N, C), F.l1_loss, 0, 0),
    "log likelihood of probabilities": ((N, C), classes(N), F.nll_loss, 0, 0),
    "several labels": ((N, C), (noise(N, C) > 0).double(), F.binary_cross_entropy_with_logits, 0, 0),
    "two of the outputs": ((N, C), noise(N, C), first_two, 2, 2),
    "three of the classes": ((N, C), classes(N, below=3), among_three, 2, 2),
    "one of seven candidates": ((N, 7, 1), classes(N, below=7), ranking, 0, 1),
    "tokens": ((N, 3, C), classes(N, 3), tokens, 1, 1),
    "classes along another axis": ((N, 5, C), classes(N, C, below=5), F.cross_entropy, 0, C),
    "values of tokens": ((N, 3, C), noise(N, 3, C), F.mse_loss, 0, 0),
}


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("name", IGNORED)
def test_what_a_loss_ignores_is_found_at_any_size_of_the_outputs_and_the_loss(name, size):
    shape, targets, loss, each, common = IGNORED[name]
    for scale in (1e-10, 1.0, 1e10):
        own = OutputLoss(lambda o, t, scale=scale: scale * loss(o, t), targets)
        found = ignored_directions(own, size * noise(*shape, seed=2))
        assert (len(found.each), len(found.common)) == (each, common)


def test_the_equal_shift_is_one_of_them_where_it_is():
    for name, each, common in (
        ("three of the classes", 1, 1),
        ("one of seven candidates", 0, 1),
        ("mse", 0, 0),
    ):
        shape, targets, loss, *_ = IGNORED[name]
        found = ignored_directions(OutputLoss(loss, targets), noise(*shape))
        assert (found.equal_shift(found.each), found.equal_shift(found.common)) == (each, common)


def hinge(outputs, targets):
    return F.relu(1 - outputs * targets).mean()


def squared_hinge(outputs, targets):
    return F.relu(1 - outputs * targets).square().mean()


def clipped(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none").clamp(max=1.5).mean()


LABELS, VALUES, SIGNS = classes(N), noise(N, C, seed=5), noise(N, C, seed=6).sign()
SMOOTH = {"mse": (F.mse_loss, VALUES), "ce": (F.cross_entropy, LABELS), "ls": (smoothed, LABELS)}
PIECES = {
    "l1": (F.l1_loss, VALUES),
    "huber": (F.huber_loss, VALUES),
    "hinge": (hinge, SIGNS),
    "squared hinge": (squared_hinge, SIGNS),
    "clipped": (clipped, LABELS),
}


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("name", [*SMOOTH, *PIECES])
def test_losses_of_pieces_are_told_from_analytic_ones(name, size):
    loss, targets = (SMOOTH | PIECES)[name]
    own = OutputLoss(loss, targets)
    outputs = size * noise(N, C, seed=7)
    assert in_one_piece(own, outputs, random_outputs(own, outputs)) == (name in SMOOTH)


@pytest.mark.parametrize("name", [*SMOOTH, *PIECES])
def test_the_quadratic_has_the_gradient_and_the_curvature_of_the_loss(name):
    loss, targets = (SMOOTH | PIECES)[name]
    own, outputs = OutputLoss(loss, targets), noise(N, C, seed=7)
    quadratic = taylor_loss(own, outputs)
    like = OutputLoss(quadratic, quadratic.targets)
    torch.testing.assert_close(like.gradient(outputs), own.gradient(outputs), rtol=1e-12, atol=1e-15)
    vectors = noise(N, C, seed=8)
    torch.testing.assert_close(
        like.product(outputs, vectors), own.product(outputs, vectors), rtol=1e-12, atol=1e-15
    )
    assert quadratic.quadratic == (name in ("mse", "l1", "huber", "hinge", "squared hinge"))


def test_a_loss_that_couples_examples_has_no_quadratic_of_its_own():
    own = OutputLoss(lambda o, t: (o - o.roll(1, 0)).square().mean(), LABELS)
    assert taylor_loss(own, noise(N, C)) is None


def test_weights_of_examples_count():
    weights = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = OutputLoss(F.mse_loss, VALUES, weights)
    outputs = noise(N, C)
    expected = 2 * (outputs - VALUES) * weights[:, None] / weights.sum() / C
    torch.testing.assert_close(own.gradient(outputs), expected)


def test_a_loss_that_takes_no_random_outputs_ignores_nothing_and_has_a_quadratic():
    own = OutputLoss(F.binary_cross_entropy, (VALUES > 0).double())
    outputs = noise(N, C).sigmoid()
    assert len(ignored_directions(own, outputs).common) == 0
    assert not in_one_piece(own, outputs, random_outputs(own, outputs))
    quadratic = taylor_loss(own, outputs)
    assert not quadratic.quadratic


def test_a_loss_that_cannot_be_differentiated_twice_is_refused_in_a_line():
    own = OutputLoss(F.multi_margin_loss, LABELS)
    with pytest.raises(ModelError, match="cannot be differentiated twice") as caught:
        own.product(noise(N, C), noise(N, C))
    assert "\n" not in str(caught.value)
