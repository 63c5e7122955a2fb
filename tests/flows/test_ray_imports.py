"""On Ray: the user's own modules are found by the workers, and never stand in for lossray's."""

import os

import pytest

import lossray

pytestmark = pytest.mark.ray

STUDY = """
name = "own"
seeds = 1
models = [{name = "my_nets:net"}]
optimizers = [{name = "sgd", lr = 0.1}]

[data]
source = "my_data:data"

[training]
loss = "my_losses:loss"
steps = 4
batch_size = 16
checkpoints = {steps = [0, 4]}

[curvature]
top = 3
"""


@pytest.mark.slow
def test_own_modules_are_found_and_decoys_are_not(lossray_run, tmp_path):
    """A model where the command is given, a loss and data beside the study, both with decoys."""
    here, studies = tmp_path / "here", tmp_path / "studies"
    for folder in (here, studies):
        folder.mkdir()
        for decoy in ("tasks", "flows"):
            (folder / f"{decoy}.py").write_text(f"raise SystemExit('the decoy {decoy}.py of {folder.name}')")
    (here / "my_nets.py").write_text(
        "import torch, my_widths\n"
        "def net(input_shape, n_outputs):\n"
        "    return torch.nn.Linear(my_widths.INPUTS, n_outputs)\n"
    )
    (studies / "my_widths.py").write_text("INPUTS = 6\n")
    (studies / "my_losses.py").write_text(
        "import torch\n"
        "def loss(outputs, targets):\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)\n"
    )
    (studies / "my_data.py").write_text(
        "import numpy as np\n"
        "def data():\n"
        "    inputs = np.random.default_rng(0).normal(size=(90, 6))\n"
        "    return inputs, (inputs[:, 0] > 0).astype(int)\n"
    )
    (studies / "own.toml").write_text(STUDY)
    path = os.pathsep.join([str(here), str(studies), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = lossray_run("../studies/own.toml", "--out", tmp_path / "out", cwd=here, PYTHONPATH=path)
    assert run.result() == 0, run.said
    assert "decoy" not in run.said
    study = lossray.open_study(tmp_path / "out")
    runs = study.table("runs")
    assert runs[["status", "model", "loss"]].to_numpy().tolist() == [
        ["finished", "my_nets:net", "my_losses:loss"]
    ]
    assert len(study.table("curvature")) == 2
