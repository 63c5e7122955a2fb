"""Packs are trained on the GPU as on the CPU, by every optimizer, and without waiting more than needed."""

import pytest
import torch

from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.training.data_settings import data_settings
from lossray.training.datasets import load_dataset
from lossray.training.loop import train
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings
from tests.device.pretended_gpu import GPU

STEPS = 4
BFLOAT16 = 1e-3  # what muon, which rounds to it, may be off by after so few steps
DATA = load_dataset(data_settings({"source": "gaussians", "n": 60, "dim": 5}), dtype=torch.float64)
MLP = model_settings({"name": "mlp", "widths": [4], "dropout": 0.2})


def trained(device, rule, *, executor="loop", steps=STEPS, resume=None, shadow=("sgd", "adagrad"), **options):
    """The checkpoints of a pack of two."""
    settings = TrainingSettings(
        **{"steps": steps, "batch_size": 16, "log_every": 2, "dtype": "float64", **options}
    )
    stack, theta, buffers = build_stack(
        lambda: build_model(MLP, DATA.input_shape, DATA.n_outputs),
        (0, 1),
        executor=executor,
        dtype=torch.float64,
        device=device,
    )
    return list(
        train(
            stack,
            theta,
            buffers,
            rule,
            settings,
            DATA,
            pack_id="p",
            seeds=(0, 1),
            shadow=shadow,
            resume=resume,
        )
    )


def tensors(checkpoint):
    named = {"alive": checkpoint.alive, "diverged_at": checkpoint.diverged_at}
    for table in ("parameters", "buffers", "optimizer", "shadow", "evaluation", "log"):
        named |= {f"{table} {name}": tensor for name, tensor in getattr(checkpoint, table).items()}
    return named


def assert_same(found, expected, *, atol=1e-9):
    named = tensors(found)
    assert list(named) == list(tensors(expected))
    for name, tensor in tensors(expected).items():
        torch.testing.assert_close(
            named[name].cpu(), tensor.cpu(), rtol=1e-7, atol=atol, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(gpu, name):
    rule = optimizer_settings({"name": name})
    checkpoints = trained(gpu, rule)
    for found, expected in zip(checkpoints, trained("cpu", rule), strict=True):
        assert_same(found, expected, atol=BFLOAT16 if name == "muon" else 1e-9)
        assert {tensor.device for tensor in found.parameters.values()} == {gpu}
    again = trained(gpu, rule, resume=checkpoints[1])  # whose tensors are on the GPU
    assert_same(again[-1], checkpoints[-1], atol=BFLOAT16 if name == "muon" else 1e-9)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_a_member_that_diverges_is_frozen(gpu, executor):
    rule = optimizer_settings({"name": "sgd", "lr": 1e12})
    found, expected = (trained(device, rule, executor=executor)[-1] for device in (gpu, "cpu"))
    assert not found.alive.any()
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["momentum", "adam", "lion", "muon"])
def test_a_step_waits_twice_for_the_device(pretended, name):
    """To learn whether a member diverges at it, by its gradient and by its parameters."""
    waits = []
    for steps in (4, 10):
        pretended.waits.clear()
        ends = {"log_every": 100, "checkpoints": {"count": 2}}
        trained(GPU, optimizer_settings({"name": name}), steps=steps, **ends)
        waits.append(pretended.waits.total())
    assert waits[1] - waits[0] == 2 * (10 - 4), pretended.waits
