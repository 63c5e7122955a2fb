"""Functions of the user's that are edited after a study has run: what depended on them, and nothing else."""

from pathlib import Path

import pandas as pd
import pytest

import lossray
from flows.estimate import dry_run
from flows.study import run_study
from lossray.errors import StoreError

OWN_DATA = {"source": "editable_data:points", **dict.fromkeys(("n", "dim", "classes", "noise"))}
SGD = {"name": "sgd", "lr": 0.05}
NETS = """
from torch import nn

def small():
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

def large():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
"""
DATA = """
import torch

def points():
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(80, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(1)
"""


def run(study, out, **options):
    return run_study(study, out, in_process=True, **options)


def rows(out, name):
    return lossray.open_study(out).table(name)


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


@pytest.fixture
def project(study_file, out, forget_modules):
    """A finished study of two models and data of the user's; edits a file as a new process would see it."""
    models = [{"name": "editable_nets:small"}, {"name": "editable_nets:large"}]
    study = study_file(
        models=models,
        optimizers=[SGD],
        data={"source": "editable_data:points", "n": None, "dim": None, "classes": None, "noise": None},
    )
    folder = Path(study).parent
    (folder / "editable_nets.py").write_text(NETS)
    (folder / "editable_data.py").write_text(DATA)
    assert run(study, out) == 0

    def edit(module, old, new):
        path = folder / f"{module}.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        forget_modules()

    return study, edit


def by_model(frame, runs):
    models = runs.set_index("run_id")["model"]
    return {name: part.reset_index(drop=True) for name, part in frame.groupby(frame["run_id"].map(models))}


def test_only_what_depended_on_the_edited_function_is_refused_and_computed_again(project, out, capsys):
    study, edit = project
    before = by_model(rows(out, "eigenvalues"), rows(out, "runs"))
    edit("editable_nets", "(5, 3))", "(5, 3, bias=False))")
    for attempt in (lambda: run(study, out), lambda: dry_run(study, out)):
        with pytest.raises(StoreError) as refused:
            attempt()
        assert str(refused.value).startswith("editable_nets:large: its source")
        assert "curvature of 3 checkpoints" in str(refused.value)
        assert "--recompute" in str(refused.value)
        assert "small" not in str(refused.value)
    capsys.readouterr()
    assert run(study, out, recompute=True) == 0
    assert "curvature of 3 checkpoints will be computed again: editable_nets:large was edited" in (
        capsys.readouterr().err
    )
    runs = rows(out, "runs")
    assert runs.groupby("model")["n_params"].first().to_dict() == {
        "editable_nets:large": 6 * 5 + 5 + 5 * 3,
        "editable_nets:small": 6 * 4 + 4 + 4 * 3 + 3,
    }
    after = by_model(rows(out, "eigenvalues"), runs)
    pd.testing.assert_frame_equal(after["editable_nets:small"], before["editable_nets:small"])
    assert not after["editable_nets:large"].equals(before["editable_nets:large"])
    assert len(after["editable_nets:large"]) == len(before["editable_nets:large"])
    capsys.readouterr()
    assert run(study, out) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_mended_function_is_run_without_a_word_where_nothing_depended_on_it(
    study_file, out, forget_modules, capsys
):
    models = [{"name": "broken_nets:good"}, {"name": "broken_nets:bad"}]
    study = study_file(models=models, optimizers=[SGD])
    module = Path(study).with_name("broken_nets.py")
    source = (
        "from torch import nn\nimport torch\n"
        "def good():\n    return nn.Linear(6, 3)\n"
        "class Bad(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(6, 3)\n"
        "    def forward(self, x):\n"
        "        if self.training and len(x) > 4: raise RuntimeError('a mistake of mine')\n"
        "        return self.layer(x)\n"
        "bad = Bad\n"
    )
    module.write_text(source)
    assert run(study, out) == 1
    good = rows(out, "eigenvalues")
    assert len(good)
    forget_modules()
    module.write_text(source.replace("if self.training", "if False"))
    assert run(study, out) == 0
    after = by_model(rows(out, "eigenvalues"), rows(out, "runs"))
    pd.testing.assert_frame_equal(after["broken_nets:good"], good)
    assert set(rows(out, "runs")["status"]) == {"finished"}
    assert len(after["broken_nets:bad"]) == len(good)


def test_a_data_function_that_returns_the_same_data_may_be_edited(project, out, capsys):
    study, edit = project
    before = rows(out, "eigenvalues")
    edit("editable_data", "inputs[:, :3].argmax(1)", "inputs[:, :3].max(1).indices")
    capsys.readouterr()
    assert run(study, out) == 0
    assert "nothing to do" in capsys.readouterr().err
    pd.testing.assert_frame_equal(rows(out, "eigenvalues"), before)
    edit("editable_data", "manual_seed(5)", "manual_seed(6)")
    with pytest.raises(StoreError, match="data: the store has content"):
        run(study, out, recompute=True)
