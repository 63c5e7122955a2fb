"""The models, weights and examples on which the curvature engines are compared.

The weights are trained for a few hundred steps, so that the spectra have outliers, as in practice.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.seeds import generator, stream
from lossray.training.data_settings import DataSettings
from lossray.training.datasets import Dataset, load_dataset

BATCH = 64


@dataclass(frozen=True)
class Setting:
    """How to make one problem."""

    name: str
    model: Mapping[str, object]  # as in [[models]]
    examples: int
    steps: int = 400  # of Adam
    dense: bool = False  # small enough for all its eigenvalues
    repeats: int = 3  # of the reports, each with a seed of its own


@dataclass(frozen=True)
class Problem:
    """A trained model in eval mode, and the examples that define its loss."""

    name: str
    model: nn.Module
    inputs: Tensor  # [N, 1, 8, 8] float32
    targets: Tensor  # [N] int64
    loss: nn.Module  # mean over examples
    dense: bool
    repeats: int = 1

    def to(self, device: torch.device) -> "Problem":
        """The same on a device; this one stays where it is."""
        model = copy.deepcopy(self.model).to(device)
        return replace(self, model=model, inputs=self.inputs.to(device), targets=self.targets.to(device))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.targets.device

    @property
    def dim(self) -> int:
        """Number of parameters d."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def gradient(self) -> tuple[Tensor, ...]:
        """The gradient over all examples: the unit in which products are measured."""
        loss = self.loss(self.model(self.inputs), self.targets)
        return torch.autograd.grad(loss, list(self.model.parameters()))


SETTINGS = (
    Setting("mlp", {"name": "mlp", "widths": [128, 128]}, 1000),
    Setting("cnn", {"name": "cnn"}, 1000, repeats=2),
    Setting("resnet-20", {"name": "resnet", "depth": 20}, 128, steps=150, repeats=1),
    Setting("vit", {"name": "vit"}, 256, repeats=2),
    Setting("small mlp", {"name": "mlp", "widths": [32]}, 1000, dense=True, repeats=5),
    Setting(
        "small tanh mlp", {"name": "mlp", "widths": [64], "activation": "tanh"}, 1000, dense=True, repeats=5
    ),
    Setting("small cnn", {"name": "cnn", "channels": [6, 12], "widths": [32]}, 128, dense=True, repeats=5),
    Setting("small vit", {"name": "vit", "dim": 16, "depth": 1}, 128, dense=True, repeats=5),
)
TINY = (  # of dry runs
    Setting("tiny mlp", {"name": "mlp", "widths": [8]}, 100, steps=50, dense=True),
    Setting("tiny cnn", {"name": "cnn", "channels": [2], "widths": [4]}, 50, steps=50, dense=True),
)


def setting_of(name: str) -> Setting:
    """The setting of this name."""
    return next(setting for setting in (*SETTINGS, *TINY) if setting.name == name)


def make_problem(setting: Setting) -> Problem:
    """Build and train the model on digits; the analysis set is the first part of the training split."""
    dataset = load_dataset(DataSettings(source="digits"), dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(0, "initialisation"))
        model = build_model(model_settings(setting.model), dataset.input_shape, dataset.n_outputs)
    _train(model, dataset, setting.steps)
    inputs, targets = dataset.train.inputs[: setting.examples], dataset.train.targets[: setting.examples]
    return Problem(
        setting.name, model.eval(), inputs, targets, nn.CrossEntropyLoss(), setting.dense, setting.repeats
    )


def _train(model: nn.Module, dataset: Dataset, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    random = generator(0, "benchmark")
    for _ in range(steps):
        batch = torch.randint(len(dataset.train.targets), (BATCH,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(dataset.train.inputs[batch]), dataset.train.targets[batch]).backward()
        optimizer.step()
    model.zero_grad()
