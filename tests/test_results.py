import pandas as pd
import pytest
import torch

import lossray
from lossray.errors import DataError, ModelError, StoreError, StudyError
from lossray.networks.models import build_model
from lossray.networks.stack import build_stack
from lossray.storage.checkpoints import Checkpoint, dumps
from lossray.storage.publish import publish_tables
from lossray.storage.store import Store
from lossray.storage.tables import TABLES
from lossray.study import partition, study_from_table, study_inputs
from lossray.study.manifest import new_manifest
from lossray.training.datasets import load_dataset

STUDY = {
    "name": "small",
    "seeds": [3, 5],
    "models": [{"name": "mlp", "widths": [4]}],
    "optimizers": [{"name": "sgd", "lr": 0.1}],
    "training": {"dtype": "float64"},
    "curvature": {"examples": 100},
}


@pytest.fixture
def out(tmp_path):
    """A store with a pack of two runs and its checkpoint at step 0, nothing gathered yet."""
    store, study = Store(str(tmp_path / "out")), study_from_table(STUDY)
    dataset = load_dataset(study.data, dtype=torch.float64)
    packs = partition(study, (), lambda setting: ("vmap", "vmap"))
    manifest = new_manifest(study, study_inputs(study, dataset.fingerprint), packs, folder=tmp_path)
    store.write_json("manifest.json", manifest.plain())
    pack, nothing = packs[0], torch.zeros(2)
    stack, theta, buffers = build_stack(
        lambda: build_model(pack.model, dataset.input_shape, dataset.n_outputs),
        pack.seeds,
        executor="vmap",
        dtype=torch.float64,
    )
    checkpoint = Checkpoint(
        pack.pack_id,
        0,
        pack.seeds,
        stack.layout.split(theta),
        buffers,
        {},
        nothing,
        nothing,
        nothing,
        {},
        {},
        0.0,
    )
    path = store.checkpoint_path(pack.pack_id, 0)
    store.write_bytes(path, dumps(checkpoint))
    rows = [{"run_id": run_id, "step": 0, "path": path, "test_loss": 2.0} for run_id in pack.run_ids]
    store.publish("checkpoints", "k0", rows)
    store.commit({"task_key": "k0", "kind": "checkpoint", "status": "done"})
    return store.url


def test_tables_are_the_same_before_and_after_they_are_published(out):
    study = lossray.open_study(out)
    before = study.table("checkpoints")
    assert before["step"].tolist() == [0, 0]
    publish_tables(Store(out))
    pd.testing.assert_frame_equal(study.table("checkpoints"), before)
    pd.testing.assert_frame_equal(pd.read_parquet(f"{out}/tables/checkpoints.parquet"), before)


def test_rows_appear_as_soon_as_they_are_committed(out):
    study, store = lossray.open_study(out), Store(out)
    publish_tables(store)
    run_id = study.table("checkpoints")["run_id"][0]
    store.publish("curvature", "k1", [{"run_id": run_id, "step": 0, "operator": "hessian", "block": "all"}])
    assert len(study.table("curvature")) == 0
    store.commit({"task_key": "k1", "kind": "curvature", "status": "done"})
    assert len(study.table("curvature")) == 1
    publish_tables(store)
    assert len(study.table("curvature")) == 1


def test_tables_lists_all_names_with_their_rows(out):
    study = lossray.open_study(out)
    assert study.tables == dict.fromkeys(TABLES, 0) | {"checkpoints": 2, "tasks": 1}
    publish_tables(Store(out))
    assert study.tables == dict.fromkeys(TABLES, 0) | {"checkpoints": 2, "tasks": 2}


def test_an_unknown_table_is_refused_with_the_nearest_name(out):
    with pytest.raises(StudyError, match=r"'checkpoint'.*did you mean 'checkpoints'"):
        lossray.open_study(out).table("checkpoint")


def test_a_path_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=r"is no store of a study: it has no manifest\.json"):
            lossray.open_study(path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_study_and_manifest_are_those_that_the_store_was_made_from(out):
    study = lossray.open_study(out)
    assert study.study == study_from_table(STUDY)
    assert study.manifest.packs[0].seeds == (3, 5)


@pytest.mark.parametrize("seed", [3, 5])
def test_a_model_has_the_weights_of_its_run(out, seed):
    study = lossray.open_study(out)
    pack = study.manifest.packs[0]
    run_id = pack.run_ids[pack.seeds.index(seed)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = study.model(run_id, 0)
    assert torch.get_rng_state().equal(before)
    assert not model.training
    build = lambda: build_model(pack.model, (64,), 10)  # noqa: E731
    _, theta, _ = build_stack(build, [seed], executor="loop", dtype=torch.float64)
    assert torch.nn.utils.parameters_to_vector(model.parameters()).equal(theta[0])
    inputs, _ = study.data("test")
    assert model(inputs).shape == (len(inputs), 10)


def test_a_run_or_step_that_does_not_exist_is_refused(out):
    study = lossray.open_study(out)
    run_id = study.manifest.packs[0].run_ids[0]
    with pytest.raises(StudyError, match="no checkpoint at step 10; it has \\[0\\]"):
        study.model(run_id, 10)
    with pytest.raises(StudyError, match=f"no run 'x{run_id}'; did you mean '{run_id}'"):
        study.model(f"x{run_id}", 0)


def test_a_checkpoint_of_another_architecture_is_refused(out, monkeypatch):
    study = lossray.open_study(out)
    monkeypatch.setattr("lossray.restored.build_model", lambda *args: torch.nn.Linear(64, 10))
    with pytest.raises(ModelError, match="'mlp' has changed"):
        study.model(study.manifest.packs[0].run_ids[0], 0)


def test_data_are_those_of_the_study(out):
    study = lossray.open_study(out)
    dataset = load_dataset(study.study.data, dtype=torch.float64)
    inputs, targets = study.data()
    assert inputs.shape == (100, *dataset.input_shape)
    assert targets.shape == (100,)
    assert study.data("validation")[0].equal(dataset.validation.inputs)
    assert study.data("test")[1].equal(dataset.test.targets)
    with pytest.raises(StudyError, match=r"no such split.*'validation'"):
        study.data("valid")


def test_data_beside_a_study_that_ran_as_a_job_are_read_from_the_current_directory(tmp_path, monkeypatch):
    frame = pd.DataFrame({"x": range(20), "y": [0, 1] * 10})
    frame.to_parquet(tmp_path / "d.parquet")
    data = {"source": "parquet", "path": "d.parquet", "features": ["x"], "label": "y"}
    study = study_from_table(STUDY | {"data": data})
    dataset = load_dataset(study.data, dtype=torch.float64, base=tmp_path)
    packs = partition(study, (), lambda setting: ("vmap", "vmap"))
    inputs = study_inputs(study, dataset.fingerprint)
    manifest = new_manifest(study, inputs, packs, folder=tmp_path / "of another machine")
    Store(str(tmp_path / "out")).write_json("manifest.json", manifest.plain())
    monkeypatch.chdir(tmp_path)
    read = lossray.open_study(tmp_path / "out").data("test")
    assert read[0].equal(dataset.test.inputs)


def test_changed_data_are_refused(out):
    store = Store(out)
    manifest = store.read_json("manifest.json")
    manifest["inputs"]["data_key"] = "0" * 64
    store.write_json("manifest.json", manifest)
    with pytest.raises(DataError, match="the data have changed"):
        lossray.open_study(out).data("test")
