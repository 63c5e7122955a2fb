"""A study small enough to train in a fraction of a second, planned into a store of its own."""

from functools import partial

import pytest
import torch

from flows.freeze import decide
from flows.plan import make_plan
from lossray.storage.store import Store
from lossray.study import partition, study_from_table, study_inputs
from lossray.study.manifest import new_manifest
from lossray.training.datasets import load_dataset
from tasks.jobs import Context

TABLE = {
    "name": "small",
    "seeds": [3, 8],
    "data": {"source": "gaussians", "n": 90, "dim": 6, "classes": 3, "noise": 1.0},
    "models": [{"name": "mlp", "widths": [4], "activation": "tanh"}],
    "optimizers": [{"name": "adam", "lr": 0.03}],
    "training": {"steps": 12, "batch_size": 16, "checkpoints": {"steps": [0, 5, 12]}, "log_every": 3},
    "curvature": {"top": 3},
}


@pytest.fixture
def planned(tmp_path):
    """``planned(out, section={...})``: the small study's plan, some keys changed; its manifest is written."""
    return planner(tmp_path)


@pytest.fixture(scope="module")
def planned_once(tmp_path_factory):
    """The same for a study that the tests of a module share."""
    return planner(tmp_path_factory.mktemp("shared"))


def planner(tmp_path):
    def make(out="out", **changes):
        merged = {
            key: {**TABLE[key], **value}
            if isinstance(value, dict) and key in TABLE and "source" not in value
            else value
            for key, value in changes.items()
        }
        study = study_from_table(TABLE | merged)
        dataset = load_dataset(study.data, dtype=getattr(torch, study.training.dtype))
        inputs = study_inputs(study, dataset.fingerprint)
        packs = partition(study, (), partial(decide, study, dataset, "cpu"))
        store = Store(str(tmp_path / out))
        store.write_json("manifest.json", new_manifest(study, inputs, packs, folder=tmp_path).plain())
        context = Context(store.url, study, str(tmp_path), dataset.fingerprint, inputs.sources)
        return make_plan(context, packs, inputs)

    return make
