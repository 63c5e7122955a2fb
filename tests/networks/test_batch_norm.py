"""Recomputed batch norm statistics equal torch's cumulative averages, and change nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lossray.networks import batch_norm
from lossray.networks.batch_norm import has_statistics, refresh_statistics
from lossray.networks.stack import Stack, stack_models


def net() -> nn.Module:
    """Dropout before the second norm: its statistics would tell if it were active."""
    return nn.Sequential(
        nn.Flatten(),
        nn.BatchNorm1d(6, momentum=0.4),
        nn.Linear(6, 5),
        nn.Dropout(0.5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.Linear(5, 2),
    )


def filters() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))


def lone_norm() -> nn.Module:
    return nn.BatchNorm2d(1)


def shared() -> nn.Module:
    """One norm at two places, whose inputs differ: its statistics are averages over both."""
    norm = nn.BatchNorm1d(6)
    return nn.Sequential(nn.Flatten(), norm, nn.Linear(6, 6), nn.ReLU(), norm, nn.Linear(6, 2))


BUILDS = {"net": net, "filters": filters, "lone_norm": lone_norm, "shared": shared}


def make(name: str, executor: str) -> tuple[list[nn.Module], Stack, Tensor, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        models = [BUILDS[name]().double() for _ in range(3)]
    for model in models:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(1, 2)
    stack, theta, buffers = stack_models(copy.deepcopy(models), executor=executor, dtype=torch.float64)
    return models, stack, theta, buffers


def examples(n: int) -> Tensor:
    return torch.randn(n, 1, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1


def cumulative(model: nn.Module, chunks: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What torch.optim.swa_utils.update_bn does, dropout left out."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        for chunk in chunks:
            model(chunk)
    return dict(model.named_buffers())


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("name", BUILDS)
def test_statistics_are_torchs_cumulative_averages(name, executor, monkeypatch):
    monkeypatch.setattr(batch_norm, "CHUNK", 4)
    models, stack, theta, buffers = make(name, executor)
    found = refresh_statistics(stack, theta, buffers, examples(12))
    for r, model in enumerate(models):
        expected = cumulative(model, torch.split(examples(12), 4))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key][r], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_chunks_of_unequal_sizes_count_by_their_examples(executor, monkeypatch):
    monkeypatch.setattr(batch_norm, "CHUNK", 4)
    _, stack, theta, buffers = make("net", executor)
    inputs = examples(10)  # 4 + 3 + 3
    found = refresh_statistics(stack, theta, buffers, inputs)
    parts = [inputs[:4], inputs[4:7], inputs[7:]]
    variance = sum(len(part) / 10 * part.flatten(1).var(dim=0) for part in parts)
    torch.testing.assert_close(found["1.running_mean"], inputs.flatten(1).mean(dim=0).expand(3, -1))
    torch.testing.assert_close(found["1.running_var"], variance.expand(3, -1))
    assert found["1.num_batches_tracked"].tolist() == [3, 3, 3]


def test_the_statistics_of_a_member_do_not_depend_on_its_pack(monkeypatch):
    monkeypatch.setattr(batch_norm, "CHUNK", 4)
    _, stack, theta, buffers = make("filters", "vmap")
    together = refresh_statistics(stack, theta, buffers, examples(10))
    alone = refresh_statistics(
        stack, theta[1:2], {name: own[1:2] for name, own in buffers.items()}, examples(10)
    )
    for name, own in alone.items():
        torch.testing.assert_close(together[name][1:2], own, rtol=1e-12, atol=1e-12)


def test_what_is_not_finite_in_the_old_statistics_is_forgotten():
    _, stack, theta, buffers = make("net", "loop")
    expected = refresh_statistics(stack, theta, buffers, examples(8))
    buffers["4.running_var"].fill_(torch.nan)
    found = refresh_statistics(stack, theta, buffers, examples(8))
    assert torch.equal(found["4.running_var"], expected["4.running_var"])


@pytest.mark.parametrize("train", [True, False])
def test_template_and_given_tensors_stay_as_they_were(train):
    _, stack, theta, buffers = make("net", "loop")
    stack.template.train(train)
    stack.template[4].training = not train
    before = (theta.clone(), {name: own.clone() for name, own in buffers.items()})
    own = {name: tensor.clone() for name, tensor in stack.template.state_dict().items()}
    refresh_statistics(stack, theta, buffers, examples(8))
    assert torch.equal(theta, before[0])
    assert all(torch.equal(buffers[name], tensor) for name, tensor in before[1].items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in stack.template.state_dict().items())
    assert [layer.training for layer in stack.template] == [train] * 4 + [not train] + [train] * 3
    assert [stack.template[i].momentum for i in (1, 4)] == [0.4, 0.1]


def test_template_is_set_back_after_an_error():
    _, stack, theta, buffers = make("net", "loop")
    with pytest.raises(RuntimeError):
        refresh_statistics(stack, theta, buffers, examples(8)[:, :, :1])
    assert all(layer.training for layer in stack.template)
    assert stack.template[1].momentum == 0.4


def test_models_without_statistics_get_copies():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).double()
    model.register_buffer("shift", torch.ones(2, dtype=torch.float64))
    stack, theta, buffers = stack_models([model], executor="loop", dtype=torch.float64)
    found = refresh_statistics(stack, theta, buffers, torch.zeros(4, 3, dtype=torch.float64))
    assert torch.equal(found["shift"], buffers["shift"])
    assert found["shift"] is not buffers["shift"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(2, 2), False),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), False),
        (nn.BatchNorm1d(2, track_running_stats=False), False),
        (nn.Sequential(nn.Sequential(nn.BatchNorm1d(2))), True),
        (nn.InstanceNorm1d(2), False),
        (nn.InstanceNorm1d(2, track_running_stats=True), True),
    ],
)
def test_which_models_keep_statistics(model, expected):
    assert has_statistics(model) is expected
