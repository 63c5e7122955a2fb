"""Whole studies on the GPU, in this process: every section, and the tables that the CPU gives."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import flows
import flows.serial
import lossray
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.storage.tables import TABLES
from lossray.study.toml import toml_text
from tasks.train_pack import train_pack

IMAGES = """
import torch


def data():
    draw = torch.Generator().manual_seed(0)
    classes = torch.arange(48) % 3
    return torch.randn(48, 1, 4, 4, generator=draw) + classes[:, None, None, None], classes
"""
MLP = {"name": "mlp", "widths": [4]}
BRIEF = {
    "name": "brief",
    "seeds": 2,
    "data": {"source": "lrt_images:data", "split": [0.5, 0.25, 0.25]},
    "models": [MLP],
    "optimizers": [{"name": "adam", "lr": 0.01}],
    "training": {"steps": 3, "batch_size": 8, "checkpoints": {"steps": [0, 3]}, "dtype": "float64"},
    "curvature": {"top": 2, "tolerance": 1e-8, "probes": 1, "steps": 3, "examples": 12, "dtype": "float64"},
    "angles": {"directions": [], "window": 0},
    "resources": {"pack": 2},
}
METHODS = ["rescale_retrain", "align_curve", "lr_equivalent", "fge", "swag", "simplex", "deep_ensemble"]
WHOLE = BRIEF | {
    "name": "whole",
    "curvature": {
        **BRIEF["curvature"],
        "operators": ["hessian", "ggn:layers", "fisher", "preconditioned"],
    },
    "angles": {"shadow": ["sgd", "adagrad"], "window": 2, "layers": True},
    "degeneracy": {"dense_up_to": 100},
    "trajectory": {},
    "surfaces": {"points": 3},
    "connectivity": {
        "kinds": ["line", "polychain", "bezier"],
        "steps": 2,
        "points": 3,
        "align": ["none", "permutation", "scale", "both"],
    },
    "ensembles": {"methods": METHODS, "budgets": [2.0], "cycle": 0.5},
}
FEW = WHOLE["curvature"] | {"operators": ["hessian", "ggn", "fisher", "preconditioned"]}
STUDIES = {
    "mlp": WHOLE,
    "cnn": WHOLE
    | {
        "models": [{"name": "cnn", "channels": [3], "kernel": 3, "widths": [3], "norm": "batch"}],
        "curvature": FEW,
        "ensembles": {"methods": "all", "budgets": [2.0], "cycle": 0.5},
    },
    "resnet": WHOLE | {"models": [{"name": "resnet", "width": 1}], "curvature": FEW},
    "vit": WHOLE | {"models": [{"name": "vit", "dim": 4, "depth": 1, "heads": 2}], "curvature": FEW},
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}
BY_ROUNDING = {  # columns that rounding decides: where a Krylov space is exhausted, or a value is zero
    "density": ("node", "weight"),
    "eigenvalues": ("ipr", "gap"),
    "curvature": (
        "matvecs",
        *(
            f"{name}{suffix}"
            for name in ("frobenius_norm", "participation", "effective_dimension", "negative_mass")
            for suffix in ("", "_stderr", "_bound")
        ),
    ),
}


@dataclass(frozen=True)
class Runner:
    """Runs studies in this process.

    Attributes:
        folder: of the study files, the user's module and the stores.
    """

    folder: Path

    def __call__(self, study, out, *, code=0):
        """Run or resume a study; its tables."""
        path = self.folder / "study.toml"
        path.write_text(toml_text(study))
        (self.folder / "lrt_images.py").write_text(IMAGES)
        with mock.patch.object(sys, "path", [*sys.path, str(self.folder)]):
            assert flows.run(path, self.folder / out, in_process=True) == code
        sys.modules.pop("lrt_images", None)
        return lossray.open_study(self.folder / out)


@pytest.fixture
def run(tmp_path):
    return Runner(tmp_path)


@contextmanager
def without_gpu():
    """As on a machine that has none."""
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        yield


@pytest.fixture(scope="module")
def expected(request, tmp_path_factory):
    """The study of this name and its tables on the CPU, found before any GPU is pretended."""
    study = STUDIES[request.param]
    with without_gpu():
        return study, Runner(tmp_path_factory.mktemp("cpu"))(study, "out")


def assert_same_tables(found, wanted, names=tuple(TABLES)):
    for name in names:
        left_out = [*TABLES[name].volatile, *BY_ROUNDING.get(name, ())]
        frames = [study.table(name).drop(columns=left_out) for study in (found, wanted)]
        pd.testing.assert_frame_equal(*frames, **TOLERANCE, obj=name)


def devices(study):
    return set(study.table("tasks").query("kind != 'gather'")["device"])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in STUDIES if name != "mlp"]


@pytest.mark.parametrize("expected", ["mlp", *SLOW], indirect=True)
def test_the_tables_are_those_of_the_cpu(expected, gpu, run):
    study, on_cpu = expected
    found = run(study, "out")
    assert devices(found) == {torch.cuda.get_device_name(gpu)}
    assert devices(on_cpu) == {"cpu"}
    assert_same_tables(found, on_cpu)
    run_id = found.table("runs")["run_id"][0]
    model = found.model(run_id, 3)  # of an opened study everything is on the CPU
    assert {tensor.device.type for tensor in (*model.state_dict().values(), *found.data("test"))} == {"cpu"}


def test_a_study_half_done_on_the_cpu_is_finished_on_the_gpu(gpu, run, monkeypatch):
    study = BRIEF | {"models": [MLP | {"norm": "batch", "dropout": 0.2}]}
    whole = run(study, "whole")

    def interrupted(job):
        yield next(train_pack(job))
        raise RuntimeError("somebody pulled the plug")

    with without_gpu(), monkeypatch.context() as patch:
        patch.setattr(flows.serial, "train_pack", interrupted)
        run(study, "half", code=1)
    found = run(study, "half")
    assert devices(found) == {"cpu", torch.cuda.get_device_name(gpu)}
    assert_same_tables(found, whole)


def recorded(out, device):
    """A training of the user's own on a device, recorded."""
    torch.manual_seed(0)
    model = build_model(model_settings(MLP | {"norm": "batch"}), (1, 4, 4), 3).double().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 1, 4, 4, generator=draw, dtype=torch.float64).to(device)
    targets = (torch.arange(24) % 3).to(device)
    for step in range(4):
        if step in (0, 3):
            lossray.record(out, model, optimizer, step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def test_what_was_recorded_on_the_gpu_is_analysed_as_if_on_the_cpu(gpu, run):
    study = {
        "name": "recorded",
        "source": "checkpoints",
        "data": BRIEF["data"],
        "models": [MLP | {"norm": "batch"}],
        "training": {"dtype": "float64"},
        "curvature": BRIEF["curvature"],
        "angles": {"window": 0},
    }
    with without_gpu():
        recorded(run.folder / "cpu", torch.device("cpu"))
        on_cpu = run(study, "cpu")
    recorded(run.folder / "gpu", gpu)
    found = run(study, "gpu")
    assert devices(found) == {torch.cuda.get_device_name(gpu)}
    assert_same_tables(found, on_cpu)
