"""A study hands targets [N] to the loss as [N] wherever it evaluates it, and so gives them to a reader."""

import pytest
import torch

import flows
import lossray

MODULE = """
import torch
from torch import nn

def data():
    x = torch.randn(90, 3, generator=torch.Generator().manual_seed(1))
    return x, x[:, 0] - 0.5 * x[:, 2]

def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))

def loss(outputs, targets):
    assert targets.ndim == 1 and outputs.shape == (len(targets), 1), (outputs.shape, targets.shape)
    return (outputs.squeeze(-1) - targets).abs().add(1).log().mean()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("forget_modules")
def test_targets_reach_every_loss_as_they_came(study_file, tmp_path):
    path = study_file(
        seeds=2,
        data={"source": "targets_mine:data", "n": None, "dim": None, "classes": None, "noise": None},
        models=[{"name": "targets_mine:net"}],
        optimizers=[{"name": "sgd", "lr": 0.05}],
        training={"loss": "targets_mine:loss", "steps": 4, "checkpoints": {"steps": [0, 4]}},
        degeneracy={},
        surfaces={"points": 3},
        connectivity={"kinds": ["line"]},
        angles={"window": 2},
    )
    (tmp_path / "studies" / "targets_mine.py").write_text(MODULE)
    assert flows.run(path, tmp_path / "out", in_process=True) == 0
    study = lossray.open_study(tmp_path / "out")
    inputs, targets = study.data("train")
    assert targets.shape == (63,)
    run = study.table("runs")["run_id"].iloc[0]
    model, curvature = study.model(run, 4), study.table("curvature").query(f"run_id == '{run}' and step == 4")
    with torch.no_grad():
        own = (model(inputs).squeeze(-1) - targets).abs().add(1).log().mean()
    assert float(curvature["loss"].iloc[0]) == pytest.approx(float(own), rel=1e-6)
    assert study.table("runs")["test_accuracy"].isna().all()
    assert len(study.table("surfaces"))
    assert len(study.table("barriers"))
