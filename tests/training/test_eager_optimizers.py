"""Optimizers without torch._dynamo: the same bits as torch's own, and the compiler stays unloaded."""

import subprocess
import sys

import pytest
import torch

from lossray.references import resolve
from lossray.training.eager_optimizers import build_eagerly, step_eagerly
from lossray.training.update_rules import OPTIMIZERS

ENTRIES = {name: entry for name, entry in OPTIMIZERS.items() if entry.optimizer}
TRAINING = """
import sys, torch
from functools import partial
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.training.data_settings import data_settings
from lossray.training.datasets import load_dataset
from lossray.training.loop import train
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings

dataset = load_dataset(data_settings({"source": "gaussians", "n": 40}), dtype=torch.float32)
training = TrainingSettings(steps=2, batch_size=8)
model = model_settings({"name": "mlp", "widths": [4], "norm": "batch", "dropout": 0.1})
build = partial(build_model, model, dataset.input_shape, dataset.n_outputs)
for executor in ("vmap", "loop"):
    stack, theta, buffers = build_stack(build, (0, 1), executor=executor, dtype=torch.float32)
    for name in OPTIMIZERS:
        settings = optimizer_settings({"name": name})
        names = {"pack_id": "p", "seeds": (0, 1), "shadow": ("adam",)}
        list(train(stack, theta, buffers, settings, training, dataset, **names))
print([name for name in ("torch._dynamo", "scipy", "sklearn", "pandas") if name in sys.modules])
"""


def gradients(n):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, 5, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", ENTRIES)
def test_steps_are_those_of_torch_bit_for_bit(name):
    entry = ENTRIES[name]
    settings = entry.settings(weight_decay=0.1)
    keys = {key: getattr(settings, key) for key in ("lr", "weight_decay", *entry.keys)} | entry.fixed
    ours, theirs = (torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5) for _ in range(2))
    kind = resolve(entry.optimizer)
    eager, plain = build_eagerly(kind, [ours], **keys), kind([theirs], **keys)
    for gradient in gradients(7):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        step_eagerly(eager)
        plain.step()
    assert torch.equal(ours, theirs)
    state, expected = eager.state[ours], plain.state[theirs]
    assert state.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(expected[key])) for key in state)


def test_the_optimizer_is_an_ordinary_one_afterwards():
    leaf, later = torch.ones(3), torch.ones(2)
    optimizer = build_eagerly(torch.optim.SGD, [leaf], lr=0.5)
    assert type(optimizer) is torch.optim.SGD
    assert vars(optimizer).keys() == vars(torch.optim.SGD([leaf], lr=0.5)).keys()
    optimizer.add_param_group({"params": [later]})
    later.grad = torch.ones(2)
    optimizer.step()
    assert later.tolist() == [0.5, 0.5]


def test_what_torch_refuses_is_refused():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        build_eagerly(torch.optim.SGD, [torch.ones(1)], lr=-1.0)


def test_methods_without_decorators_are_called_as_they_are():
    class Plain(torch.optim.Optimizer):
        def __init__(self, leaves):
            super().__init__(leaves, {})

        def add_param_group(self, group):
            self.param_groups.append({"params": list(group["params"])})

        def step(self):
            for leaf in self.param_groups[0]["params"]:
                leaf.sub_(leaf.grad)

    leaf = torch.zeros(2, requires_grad=True)
    leaf.grad = torch.ones(2)
    step_eagerly(build_eagerly(Plain, [leaf]))
    assert leaf.tolist() == [-1, -1]


def test_the_step_of_every_optimizer_and_the_data_load_no_compiler_and_no_statistics():
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout.splitlines()[-1]) == []
