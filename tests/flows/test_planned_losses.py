"""Losses that are no mean over examples, and wrong derivatives, are refused before anything is written."""

import pytest

import flows
from lossray.errors import LossrayError

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn

def data():
    x = torch.randn(240, 3, generator=torch.Generator().manual_seed(5))
    labels = (x[:, 1] > 1.2).long().sort().values
    train, rest = (x[:200], labels[40:]), (x[200:], labels[:40])
    return {"train": train, "validation": rest, "test": rest}

def ignoring():
    found = data()
    found["validation"][1][7] = -100
    return found

def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

class Kept(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.held = [self.weight]

    def forward(self, x):
        return torch.tanh(x @ self.held[0].T + self.bias)

def past():
    return Kept()

def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 6.0]).to(outputs))

class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward((x - x.mean(dim=0)) / (1 + x.var(dim=0, correction=0)))

def mixing():
    return Mixing(3, 2)

def plain(outputs, targets):
    return F.cross_entropy(outputs, targets)
"""

CASES = {
    "class weights": ("data", "net", "weighted", "train"),
    "batch statistics by hand": ("data", "mixing", "plain", "train"),
    "an ignored target of another split": ("ignoring", "net", "plain", "validation"),
}


@pytest.mark.usefixtures("forget_modules")
@pytest.mark.parametrize("case", CASES)
def test_refused_with_nothing_written(case, study_file, tmp_path):
    data, net, loss, split = CASES[case]
    message = rf"no mean over examples.* the loss over the {split} split"
    refused(study_file, tmp_path, data, net, loss, message)


@pytest.mark.usefixtures("forget_modules")
def test_weights_that_are_read_past_their_module(study_file, tmp_path):
    refused(study_file, tmp_path, "data", "past", "plain", "differs from a finite difference")


def refused(study_file, tmp_path, data, net, loss, message):
    path = study_file(
        data={"source": f"planned_losses:{data}", "n": None, "dim": None, "classes": None, "noise": None},
        models=[{"name": f"planned_losses:{net}"}],
        training={"loss": f"planned_losses:{loss}", "steps": 4, "checkpoints": {"steps": [0, 4]}},
    )
    (tmp_path / "studies" / "planned_losses.py").write_text(MODULE)
    with pytest.raises(LossrayError, match=message):
        flows.run(path, tmp_path / "out", in_process=True)
    assert not (tmp_path / "out").exists()
