"""Losses that are a mean over examples may be split; whatever is none is seen, wherever it hides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossray
from lossray.errors import ModelError
from lossray.networks.stack import stack_models
from lossray.operators.example_mean import differences, is_example_mean, require_example_mean
from lossray.operators.modules import ModuleObjective
from lossray.operators.objectives import PackedObjective

N = 300


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, FLOATS = _random(N, 3), _random(N, 4, seed=1)
LABELS = torch.arange(N) % 4
RARE = torch.zeros(N, dtype=torch.int64).index_fill(0, torch.tensor(211), 2)
IGNORING = LABELS.index_fill(0, torch.tensor(150), -100)
WEIGHTS = torch.tensor([1.0, 2.0, 7.0, 1.0])


def _net(head: float = 1.0, outputs: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, outputs))
    with torch.no_grad():
        model[2].weight.mul_(head)
        model[2].bias.mul_(head)
    return model


TEACHER = _net()
TAUGHT = TEACHER(X).detach()


class Standardised(nn.Module):
    """Batch statistics by hand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - x.mean(dim=0)) / x.std(dim=0))


class Single(nn.Module):
    """A layer that pins float32, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _net()

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x).float() @ torch.eye(4)).to(x.dtype)


def _weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=WEIGHTS.to(outputs))


def _mean_of_weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return (WEIGHTS.to(outputs)[targets] * F.cross_entropy(outputs, targets, reduction="none")).mean()


def _contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    rows = F.normalize(outputs, dim=1)
    return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)).roll(1))


def _by_mass(outputs: Tensor, targets: Tensor) -> Tensor:
    each = targets.abs() * (outputs - targets).square()
    return each.sum() / targets.abs().sum()


Loss = Callable[[Tensor, Any], Tensor]
MEANS: dict[str, tuple[nn.Module, Loss, Tensor]] = {
    "plain": (_net(), F.cross_entropy, LABELS),
    "zero head": (_net(0.0), F.cross_entropy, LABELS),
    "nothing lost": (TEACHER, F.mse_loss, TAUGHT),
    "nothing lost, no curvature": (TEACHER, F.l1_loss, TAUGHT),
    "hinge": (_net(), lambda o, t: F.relu(1 - o * t.sign()).mean(), FLOATS),
    "tiny": (_net(1e-9), lambda o, t: F.mse_loss(o, 1e-9 * t), FLOATS),
    "far from zero": (_net(), lambda o, t: 1e7 + F.mse_loss(o, t), FLOATS),
    "weights in the loss": (_net(), _mean_of_weighted, LABELS),
    "one rare label": (_net(), F.cross_entropy, RARE),
    "float32 inside": (Single(), F.cross_entropy, LABELS),
}
OTHERS: dict[str, tuple[nn.Module, Loss, Tensor]] = {
    "class weights": (_net(), _weighted, LABELS),
    "class weights, zero head": (_net(0.0), _weighted, LABELS),
    "class weights, sorted": (_net(0.0), _weighted, LABELS.sort().values),
    "class weights, one rare label": (_net(0.0), _weighted, RARE),
    "one ignored target": (_net(0.0), F.cross_entropy, IGNORING),
    "sum, nothing lost": (TEACHER, nn.MSELoss(reduction="sum"), TAUGHT),
    "sum, nothing lost, no curvature": (TEACHER, nn.L1Loss(reduction="sum"), TAUGHT),
    "tiny sum": (_net(), lambda o, t: 1e-25 * F.mse_loss(o, t, reduction="sum"), FLOATS),
    "contrastive": (_net(), _contrastive, LABELS),
    "batch statistics by hand": (Standardised(_net()), F.cross_entropy, LABELS),
    "batch statistics by hand, zero head": (Standardised(_net(0.0)), F.cross_entropy, LABELS),
    "mass of the targets": (_net(), _by_mass, FLOATS),
    "root of the mean": (_net(), lambda o, t: F.mse_loss(o, t).sqrt(), FLOATS),
    "largest": (_net(), lambda o, t: F.mse_loss(o, t, reduction="none").amax(), FLOATS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MEANS)
def test_means_may_be_split(name: str, dtype: torch.dtype) -> None:
    model, loss, targets = MEANS[name]
    objective = ModuleObjective(model, loss, (X, targets), dtype=dtype)
    assert is_example_mean(objective)
    require_example_mean(objective, purpose="nothing", anywhere=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_mean_is_seen(name: str, dtype: torch.dtype) -> None:
    model, loss, targets = OTHERS[name]
    assert not is_example_mean(ModuleObjective(model, loss, (X, targets), dtype=dtype))
    for split in (20, 151):
        halves = [(X[:split], targets[:split]), (X[split:], targets[split:])]
        with pytest.raises(ModelError, match="is no mean over examples"):
            ModuleObjective(model, loss, halves, dtype=dtype)


@pytest.mark.parametrize("name", ["plain", "class weights, zero head"])
def test_packs(name: str) -> None:
    model, loss, targets = (MEANS | OTHERS)[name]
    stack, theta, buffers = stack_models([_net(), model], executor="vmap", dtype=torch.float32)
    theta[0] = float("nan")  # of a member that has diverged nothing can be told
    objective = PackedObjective(stack, theta, buffers, loss, [(X, targets)])
    assert is_example_mean(objective) == (name in MEANS)


def test_what_says_nothing_is_not_split_but_may_have_several_batches() -> None:
    """All lose the same, and would under any weights."""

    def flat(outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 + F.relu(outputs.square() - 1e6).mean()

    objective = ModuleObjective(_net(), flat, (X, LABELS))
    assert not is_example_mean(objective)
    assert not any(one.informative for one in differences(objective))
    ModuleObjective(_net(), flat, [(X[:9], LABELS[:9]), (X[9:], LABELS[9:])])


def test_a_loss_that_fails_on_parts_is_not_split() -> None:
    def fixed(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(targets) % 24:
            raise ValueError("a multiple of 24")
        return F.cross_entropy(outputs, targets)

    stack, theta, buffers = stack_models([_net()], executor="loop", dtype=torch.float32)
    objective = PackedObjective(stack, theta, buffers, fixed, [(X, LABELS)])
    assert not is_example_mean(objective)
    with pytest.raises(ModelError, match="fails on a part of the examples: ValueError: a multiple of 24"):
        require_example_mean(objective, purpose="nothing")


def test_examples_whose_own_losses_are_not_their_shares() -> None:
    """A mean over batches of several, of which one example alone is none."""

    def centred(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets) if len(targets) > 1 else outputs.square().sum()

    with pytest.raises(ModelError, match="the gradient of each example"):
        lossray.EmpiricalFisher(_net(), centred, (X, FLOATS))
    with pytest.raises(ModelError, match="a weighted mean"):
        lossray.Hessian(_net(), centred, (X, FLOATS, torch.ones(N)))
    assert lossray.EmpiricalFisher(_net(), F.mse_loss, (X, FLOATS)).shape == (60, 60)


REMEDIES = {
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "counted targets": nn.CrossEntropyLoss(ignore_index=3),
    "both": nn.NLLLoss(weight=WEIGHTS, ignore_index=3),
}
DIVISORS: dict[str, Callable[[Any, Any], Tensor]] = {
    "class weights": lambda loss, batch: loss.weight[batch[1]].sum(),
    "counted targets": lambda loss, batch: (batch[1] != 3).sum(),
    "both": lambda loss, batch: loss.weight[batch[1][batch[1] != 3]].sum(),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_the_message_names_a_closure_that_gives_the_loss_of_all(name: str) -> None:
    loss, divisor = REMEDIES[name], DIVISORS[name]
    batches = [(X[:77], LABELS[:77]), (X[77:], LABELS[77:])]
    with pytest.raises(
        ModelError, match=rf"{type(loss).__name__}.*pass closure=lambda model, batch"
    ) as error:
        lossray.Hessian(_net(), loss, batches)
    source = str(error.value).partition("closure=")[2].partition(", or data")[0]
    closure = eval(source, {"loss": loss})
    found = lossray.Hessian(_net(), closure=closure, data=batches)
    assert closure(_net(), batches[0])[1] == divisor(loss, batches[0])
    assert found.loss == pytest.approx(float(loss(_net()(X), LABELS).detach()), rel=1e-6)


def test_the_message_names_weights_in_the_data_that_give_the_loss_of_all() -> None:
    loss = nn.CrossEntropyLoss(weight=WEIGHTS)
    parts = [(X[rows], LABELS[rows], WEIGHTS[LABELS[rows]]) for rows in (slice(0, 50), slice(50, N))]
    found = lossray.Hessian(_net(), nn.CrossEntropyLoss(), parts)
    assert found.loss == pytest.approx(float(loss(_net()(X), LABELS).detach()), rel=1e-6)
