"""A study of a model with two inputs gives the numbers of the same model with one."""

import pandas as pd
import pytest
import torch

import flows
import lossray

MODULE = """
import torch
from torch import nn

X = torch.randn(90, 5, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] * X[:, 4] > 0).long()

def data(kind):
    return {"one": X, "tuple": (X[:, :3], X[:, 3:]), "mapping": {"b": X[:, 3:], "a": X[:, :3]}}[kind], Y

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(3, 4), nn.Linear(2, 4), nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 2)
    def forward(self, a, b):
        return self.out(torch.relu(self.norm(self.left(a) + self.right(b))))

class One(Two):
    def forward(self, x):
        return super().forward(x[:, :3], x[:, 3:])

def net(input_shape):
    return One() if input_shape == (5,) else Two()
"""
GAUSSIANS = ("n", "dim", "classes", "noise")  # keys of the study file that is changed
TABLES = ("training", "eigenvalues", "curvature", "angles", "sharpness", "surfaces", "paths", "ensembles")


@pytest.mark.slow
@pytest.mark.usefixtures("forget_modules")
def test_two_inputs_are_as_good_as_one(study_file, tmp_path):
    found = {}
    for kind in ("one", "tuple", "mapping"):
        path = study_file(
            file=f"{kind}.toml",
            data={"source": "several_mine:data", "kind": kind} | dict.fromkeys(GAUSSIANS),
            models=[{"name": "several_mine:net"}],
            optimizers=[{"name": "adam", "lr": 0.03}],
            training={"steps": 6, "checkpoints": {"steps": [0, 6]}},
            degeneracy={},
            surfaces={"points": 3},
            connectivity={"kinds": ["line", "bezier"], "steps": 4, "align": ["none"], "rescaled": False},
            ensembles={"methods": ["swa", "curve"]},
            angles={"window": 2},
        )
        (tmp_path / "studies" / "several_mine.py").write_text(MODULE)
        assert flows.run(path, tmp_path / kind, in_process=True) == 0
        found[kind] = lossray.open_study(tmp_path / kind)
    for name in TABLES:
        expected = found["one"].table(name).select_dtypes("float")
        assert len(expected)
        for kind in ("tuple", "mapping"):
            own = found[kind].table(name)[expected.columns]
            pd.testing.assert_frame_equal(own, expected, check_exact=False, rtol=1e-5, atol=1e-7)
    inputs, targets = found["mapping"].data("test")
    assert set(inputs) == {"a", "b"}
    run = found["mapping"].table("runs")["run_id"].iloc[0]
    with torch.no_grad():
        assert found["mapping"].model(run, 6)(**inputs).shape == (len(targets), 2)
