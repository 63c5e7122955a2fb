"""A whole study, without Ray: what it leaves, resuming it, extending it, and what it refuses."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import ray
import torch

import flows
import flows.serial
import flows.study
import lossray
from flows.study import run_study
from lossray.errors import DataError, ModelError, StoreError, StudyError
from lossray.storage.files import LocalFiles
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from lossray.storage.tables import TABLES
from tasks.analyse_checkpoint import analyse_checkpoint

SGD, ADAM = {"name": "sgd", "lr": 0.1}, {"name": "adam", "lr": 0.03}


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def run(study, out, *overrides):
    return run_study(study, out, overrides=overrides, in_process=True)


def files(out):
    """Every file below a folder, hidden ones too: when it was written, and its bytes."""
    paths = [path for path in Path(out).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def table(out, name):
    return lossray.open_study(out).table(name)


def stable_rows(out, name):
    """Rows of a table but for volatile columns, and for the row of the gather task."""
    if name == "claims":  # computed from the others
        return pa.Table.from_pandas(table(out, name)).to_pylist()
    rows = assemble(Store(out), name).drop_columns(TABLES[name].volatile).to_pylist()
    return [row for row in rows if row.get("kind") != "gather"]


def all_stable_rows(out):
    return {name: stable_rows(out, name) for name in TABLES}


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "out"


@pytest.fixture
def finished(study_file, _finished, out):
    """The store of the small study, which is run once: every test has a copy of its own at ``out``."""
    if not _finished.exists():
        assert run(study_file(), str(_finished)) == 0
    shutil.copytree(_finished, out)
    return out


@pytest.fixture
def undisturbed(study_file, _finished, tmp_path):
    """All rows of the small study, run once without a disturbance."""
    if not _finished.exists():
        assert run(study_file(), str(_finished)) == 0
    return all_stable_rows(str(_finished))


@pytest.fixture
def no_ray(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)


# ---- from one file to tables


def test_a_study_leaves_every_table_complete(study_file, out, no_ray):
    study = study_file()
    assert run(study, out) == 0
    runs = table(out, "runs")
    assert sorted(zip(runs["optimizer"], runs["seed"], strict=True)) == [
        ("adam", 0),
        ("adam", 1),
        ("sgd", 0),
        ("sgd", 1),
    ]
    assert set(runs["status"]) == {"finished"}
    tables = lossray.open_study(out).tables
    assert {name: tables[name] for name in ("checkpoints", "curvature", "eigenvalues")} == {
        "checkpoints": 4 * 3,
        "curvature": 4 * 3,
        "eigenvalues": 4 * 3 * (10 + 1),  # a window needs ten; and the smallest
    }
    assert set(table(out, "eigenvalues")["run_id"]) == set(runs["run_id"])
    tasks = table(out, "tasks")
    assert set(tasks["status"]) == {"done"}
    assert tasks.groupby("kind").size().to_dict() == {
        "checkpoint": 2 * 3,
        "curvature": 2 * 3,
        "pair": 2 * 2,
        "training": 2,
        "gather": 1,
    }
    assert set(files(out)) >= {f"tables/{name}.parquet" for name in TABLES} | {
        "manifest.json",
        "progress.json",
    }
    assert Path(out, "study.toml").read_bytes() == Path(study).read_bytes()
    assert not Path(out, ".lease.json").exists()


def test_flows_run_is_the_same_for_a_notebook(study_file, out):
    assert flows.run(Path(study_file()), Path(out), overrides=["seeds=1"], in_process=True) == 0
    assert table(out, "runs")["seed"].tolist() == [0, 0]


def test_a_checkpoint_is_analysed_before_the_training_of_its_pack_ends(study_file, out):
    run(study_file(), out)
    tasks = table(out, "tasks")
    for _, pack in tasks.groupby("pack_id"):
        first = pack[pack["kind"] == "curvature"]["finished"].min()
        assert first < pack[pack["kind"] == "training"]["finished"].iloc[0]


def test_an_overridden_study_is_kept_as_it_ran(study_file, out):
    assert run(study_file(), out, "training.steps=6", "training.checkpoints.steps=[0, 6]") == 0
    assert set(table(out, "checkpoints")["step"]) == {0, 6}
    assert lossray.open_study(out).study.training.steps == 6
    assert run(str(Path(out, "study.toml")), out) == 0  # the copy in the store is the study that was run


# ---- again


def test_a_second_run_changes_no_file_and_starts_no_ray(study_file, finished, no_ray, capsys):
    study, out = study_file(), finished
    before = files(out)
    for in_process in (True, False):
        assert run_study(study, out, in_process=in_process) == 0
    assert files(out) == before
    assert "is complete: nothing to do" in capsys.readouterr().err


def test_a_ready_made_study_may_be_run_again_from_anywhere(study_file, out, tmp_path, monkeypatch):
    study_file()  # an empty folder elsewhere is the current directory
    small = ("seeds=1", "training.steps=2", "training.checkpoints.count=2", "curvature.top=1")
    assert run("edge-of-stability", out, *small) == 0
    before = files(out)
    monkeypatch.chdir(tmp_path)
    assert run("edge-of-stability", out, *small) == 0
    assert files(out) == before


def test_two_runs_of_a_study_give_the_same_rows(study_file, out, undisturbed):
    run(study_file(), out)
    assert all_stable_rows(out) == undisturbed


def test_tables_that_were_deleted_are_gathered_again_without_computing(study_file, finished):
    study, out = study_file(), finished
    before = files(out)
    for path in Path(out, "tables").iterdir():
        path.unlink()
    assert run(study, out) == 0
    after = files(out)
    same = [name for name in before if name.startswith(("parts/", "checkpoints/", "vectors/"))]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert set(before) == set(after)


class Killed(BaseException):
    """Nothing that the driver does survives it."""


FEW, MORE = (2, 24), (1, 7, 22, 26, 48, 86)


@pytest.mark.parametrize("write", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_a_driver_killed_at_a_write_ends_with_the_same_rows(study_file, out, undisturbed, monkeypatch, write):
    original, written = LocalFiles.write, []

    def die(self, path, data):
        if path in ("progress.json", ".lease.json"):
            return original(self, path, data)
        written.append(path)
        if len(written) >= write:
            raise Killed
        return original(self, path, data)

    monkeypatch.setattr(LocalFiles, "write", die)
    with pytest.raises(Killed):
        run(study_file(), out)
    monkeypatch.setattr(LocalFiles, "write", original)
    assert run(study_file(), out) == 0
    assert all_stable_rows(out) == undisturbed
    assert {name: len(table(out, name)) for name in TABLES if name != "tasks"} == {
        name: len(rows) for name, rows in undisturbed.items() if name != "tasks"
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_says_so_and_resumes(study_file, out, undisturbed, monkeypatch, number):
    analysed = []

    def analyse_and_interrupt(job, device=None):
        analyse_checkpoint(job)
        analysed.append(job)
        if len(analysed) == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", analyse_and_interrupt)
    assert run(study_file(), out) == 130
    assert signal.getsignal(number) is before
    assert len(analysed) == 2  # what was in progress is finished, and nothing after it started
    assert json.loads(Path(out, "progress.json").read_text())["state"] == "interrupted"
    assert len(table(out, "curvature")) == 4
    assert run(study_file(), out) == 0
    assert len(analysed) == 6
    assert all_stable_rows(out) == undisturbed


def test_curvature_left_undone_is_done_without_training(study_file, out, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tasks.run_analysis.analyse_checkpoint", lambda job, device=None: 1 / 0)
        assert run(study_file(), out) == 1
    before = files(out)
    monkeypatch.setattr(flows.serial, "train_pack", None)
    assert run(study_file(), out) == 0
    after = files(out)
    assert {n: after[n] for n in before if n.startswith("checkpoints/")} == {
        n: before[n] for n in before if n.startswith("checkpoints/")
    }
    assert all_stable_rows(out) == undisturbed


def test_a_second_driver_is_refused_while_the_first_is_at_work(study_file, out, monkeypatch):
    from lossray.storage.lease import Lease

    study = study_file()
    with Lease(Store(out)):
        before = files(out)
        with pytest.raises(StoreError, match="is in use by another driver: process"):
            run(study, out)
        assert files(out) == before


def test_a_store_that_another_study_has_taken_meanwhile_is_refused(study_file, out, monkeypatch):
    try_settings = flows.study.try_settings

    def be_overtaken(request, device):
        monkeypatch.undo()
        assert run(study_file(file="other.toml", training={"steps": 13}), out) == 0
        return try_settings(request, device)

    monkeypatch.setattr(flows.study, "try_settings", be_overtaken)
    with pytest.raises(StoreError, match=r"training\.steps: the store has 13, the study says 12"):
        run(study_file(), out)
    assert lossray.open_study(out).study.training.steps == 13


def test_a_driver_that_has_lost_its_lease_stops_and_records_no_failure(study_file, out, monkeypatch):
    def steal(job, device=None):
        holder = json.loads(Path(out, ".lease.json").read_text())
        Path(out, ".lease.json").write_text(json.dumps(holder | {"token": "another"}))
        analyse_checkpoint(job)

    def lost(self):
        if json.loads(Path(self.store.url, ".lease.json").read_text())["token"] == "another":
            raise StoreError("this driver has lost its store")

    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", steal)
    monkeypatch.setattr("lossray.storage.lease.Lease.check", lost)
    with pytest.raises(StoreError, match="lost its store"):
        run(study_file(), out)
    assert Store(out).failed_keys() == set()
    assert len(table(out, "checkpoints")) == 2  # of the first pack, at step 0


# ---- what goes wrong in a run


def test_a_learning_rate_that_diverges_is_a_result_and_harms_no_other_run(study_file, out, undisturbed):
    assert run(study_file(optimizers=[SGD, {"name": "momentum", "lr": 1e12}, ADAM]), out) == 0
    runs = table(out, "runs").set_index("optimizer")
    assert set(runs.loc["momentum"]["status"]) == {"diverged"}
    assert runs.loc["momentum"]["diverged_at"].between(1, 5).all()
    assert set(runs.loc[["sgd", "adam"]]["status"]) == {"finished"}
    diverged = set(runs.loc["momentum"]["run_id"])
    for name in set(TABLES) - {"tasks", "claims"}:
        kept = [row for row in stable_rows(out, name) if row["run_id"] not in diverged]
        assert kept == undisturbed[name], name
    assert len(table(out, "curvature")) == 6 * 3
    before = files(out)
    study = study_file(optimizers=[SGD, {"name": "momentum", "lr": 1e12}, ADAM])
    assert run(study, out) == 0
    assert files(out) == before  # not tried again
    pairs, store = table(out, "tasks").query("kind == 'pair'"), Store(out)
    store.delete(store.part_path("tasks", pairs["task_key"].iloc[0]))
    assert store.read_json("progress.json")["runs_diverged"] == len(diverged)
    assert run(study, out) == 0
    assert store.read_json("progress.json")["runs_diverged"] == len(diverged)  # of an earlier driver


HASTY_NETS = """
from torch import nn

class Net(nn.Linear):
    def forward(self, x):
        if self.training and len(x) > 4:
            raise ValueError("too many examples")
        return super().forward(x)

def net():
    return Net(6, 3)
"""

MOVED_DATA = """
import numpy as np

def data():
    inputs = np.random.default_rng(0).normal(size=(90, 6))
    return inputs, (inputs[:, 0] > 0).astype(int)
"""

USER_MODEL = """
import os
import torch
from torch import nn

class Fragile(nn.Module):
    '''Fails in training while the file is there.'''

    def __init__(self, flag):
        super().__init__()
        self.flag, self.layer = flag, nn.Linear(6, 3)

    def forward(self, x):
        if os.path.exists(self.flag) and self.training and len(x) > 4:
            raise ValueError("the user's model is broken")
        return self.layer(x)

def fragile(flag):
    return Fragile(flag)
"""


def test_a_model_that_fails_in_training_fails_its_pack_alone_and_is_tried_again(
    study_file, out, tmp_path, capsys, forget_modules
):
    flag = tmp_path / "broken"
    models = [{"name": "mlp", "widths": [4]}, {"name": "fragile_nets:fragile", "flag": str(flag)}]
    study = study_file(models=models, optimizers=[SGD])
    (tmp_path / "studies" / "fragile_nets.py").write_text(USER_MODEL)
    flag.touch()
    assert run(study, out) == 1
    assert "tasks failed: `lossray status" in capsys.readouterr().err
    runs = table(out, "runs").set_index("model")
    failed = runs.loc[["fragile_nets:fragile"]]
    assert set(failed["status"]) == {"failed"}
    assert len(failed) == 2
    assert failed["reason"].str.contains("ValueError: the user's model is broken").all()
    assert set(runs.loc[["mlp"]]["status"]) == {"finished"}
    tasks = table(out, "tasks")
    for task in tasks[tasks["status"] == "failed"].to_dict("records"):
        assert "ValueError" in task["error"]
        log = Path(out, "logs", f"{task['task_key']}.log").read_text()
        assert "Traceback" in log
        assert "fragile_nets.py" in log
    assert set(tasks[tasks["status"] == "failed"]["kind"]) >= {"training"}
    before = files(out)

    flag.unlink()
    assert run(study, out) == 0
    assert set(table(out, "runs")["status"]) == {"finished"}
    assert set(table(out, "tasks")["status"]) == {"done"}
    assert len(table(out, "curvature")) == 4 * 3
    after = files(out)
    mlp = [name for name in before if name.startswith(("checkpoints/mlp", "vectors/mlp", "parts/tasks/"))]
    assert mlp
    assert {name: after[name] for name in mlp} == {name: before[name] for name in mlp}
    done = files(out)
    assert run(study, out) == 0
    assert files(out) == done


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "if self.training: raise ValueError('no training')",
            r"ValueError: no training \(unfit_nets\.py:\d+\)",
        ),
        ("x = x.detach()", "RuntimeError: .*does not require grad"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_written(
    study_file, out, forget_modules, body, says
):
    study = study_file(models=[{"name": "unfit_nets:Net"}])
    Path(study).with_name("unfit_nets.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(6, 3)\n"
        "    def forward(self, x):\n"
        "        x = self.layer(x)\n"
        f"        {body}\n"
        "        return x\n"
    )
    with pytest.raises(ModelError, match=f"unfit_nets:Net.*: a trial of training .* failed: {says}"):
        run(study, out)
    assert not Path(out).exists()


# ---- the user's own functions


def test_modules_in_the_current_directory_and_beside_the_study_are_found(study_file, out, forget_modules):
    study = study_file(
        data={"source": "beside_data:blobs", "n": 90} | dict.fromkeys(("dim", "classes", "noise")),
        models=[{"name": "here_nets:net", "width": 5}],
        optimizers=[SGD],
        training={"loss": "beside_data:squared"},
    )
    Path(study).with_name("beside_data.py").write_text(
        "import torch\n"
        "def blobs(n):\n"
        "    inputs = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))\n"
        "    return inputs, (inputs[:, 0] > 0).long()\n"
        "def squared(outputs, targets):\n"
        "    return (outputs - torch.nn.functional.one_hot(targets, 2)).square().sum(1).mean()\n"
    )
    Path("here_nets.py").write_text(  # the current directory
        "from torch import nn\n"
        "def net(width, input_shape, n_outputs):\n"
        "    return nn.Sequential(nn.Linear(*input_shape, width), nn.Tanh(), nn.Linear(width, n_outputs))\n"
    )
    assert run(study, out) == 0
    runs = table(out, "runs")
    assert set(runs["n_params"]) == {6 * 5 + 5 + 5 * 2 + 2}
    assert set(runs["model"]) == {"here_nets:net"}
    assert set(runs["loss"]) == {"beside_data:squared"}
    assert table(out, "curvature")["lambda_max"].gt(0).all()


def test_an_edited_module_of_the_users_is_refused(study_file, out, tmp_path, forget_modules):
    study = study_file(models=[{"name": "edited_nets:net"}], optimizers=[SGD])
    module = Path(study).with_name("edited_nets.py")
    module.write_text("from torch import nn\ndef net():\n    return nn.Linear(6, 3)\n")
    assert run(study, out) == 0
    before = files(out)
    run_id = table(out, "runs")["run_id"][0]
    module.write_text("from torch import nn\ndef net():\n    return nn.Linear(6, 3, bias=False)\n")
    assert lossray.open_study(out).model(run_id, 12)  # by the code that this process has imported
    with pytest.raises(StudyError, match="edited_nets:net': this Python process has imported other source"):
        run(study, str(tmp_path / "other"))  # numbers of the old source must not pass for those of the new
    assert not (tmp_path / "other").exists()
    forget_modules()
    with pytest.raises(
        StoreError, match=r"edited_nets:net: its source.* has changed since the store was made"
    ):
        run(study, out)
    assert files(out) == before


def test_a_model_whose_source_has_changed_loads_with_a_warning(study_file, out, forget_modules, recwarn):
    study = study_file(models=[{"name": "warned_nets:net"}], optimizers=[SGD])
    module = Path(study).with_name("warned_nets.py")
    source = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(6, 3), nn.Identity())\n"
    module.write_text(source)
    assert run(study, out) == 0
    run_id = table(out, "runs")["run_id"][0]
    weight = lossray.open_study(out).model(run_id, 12)[0].weight
    assert not recwarn
    forget_modules()
    module.write_text(source.replace("nn.Identity", "nn.Tanh"))
    with pytest.warns(UserWarning, match="'warned_nets:net': its source.* is not what the study ran with"):
        edited = lossray.open_study(out).model(run_id, 12)
    assert torch.equal(edited[0].weight, weight)
    forget_modules()
    module.write_text(source.replace("nn.Linear(6, 3)", "nn.Linear(6, 3, bias=False)"))
    with (
        pytest.warns(UserWarning, match="warned_nets:net"),
        pytest.raises(ModelError, match=r"'warned_nets:net' has changed"),
    ):
        lossray.open_study(out).model(run_id, 12)


def test_comments_and_other_functions_of_the_file_change_no_key(study_file, out, forget_modules):
    study = study_file(models=[{"name": "kept_nets:net"}], optimizers=[SGD])
    module = Path(study).with_name("kept_nets.py")
    source = "from torch import nn\ndef net():\n    return nn.Linear(6, 3)\ndef later(): pass\n"
    module.write_text(source)
    assert run(study, out) == 0
    before = files(out)
    forget_modules()
    module.write_text(
        "# mine\n" + source.replace("def later(): pass", "def later():\n    return nn.Linear(1, 1)")
    )
    assert run(study, out) == 0
    assert files(out) == before


def test_a_module_edited_while_the_study_runs_fails_what_is_left(
    study_file, out, monkeypatch, forget_modules
):
    study = study_file(models=[{"name": "moving_nets:net"}], optimizers=[SGD], resources={"pack": 1})
    module = Path(study).with_name("moving_nets.py")
    source = "from torch import nn\ndef net():\n    return nn.Linear(6, 3)\n"
    module.write_text(source)
    train_pack = flows.serial.train_pack

    def edit_before_the_second_pack(job, device=None):
        if job.pack.seeds == (1,):
            module.write_text(source.replace("(6, 3)", "(6, 3, bias=False)"))
            forget_modules()  # as a worker that starts now has not imported it
        return train_pack(job)

    monkeypatch.setattr(flows.serial, "train_pack", edit_before_the_second_pack)
    assert run(study, out) == 1
    runs = table(out, "runs").set_index("seed")
    assert runs["status"].to_dict() == {0: "finished", 1: "failed"}
    assert "a file was edited meanwhile" in runs.loc[1, "reason"]


def test_a_module_that_changes_the_directory_moves_no_store(study_file, out, monkeypatch, forget_modules):
    study = study_file(models=[{"name": "wandering_nets:net"}], optimizers=[SGD])
    module = Path(study).with_name("wandering_nets.py")
    module.write_text(
        f"import os\nos.chdir({out!r})\nfrom torch import nn\ndef net():\n    return nn.Linear(6, 3)\n"
    )
    here = Path.cwd()
    Path(out).mkdir()
    assert run(study, "relative") == 0
    assert Path.cwd() == here
    assert len(table(str(here / "relative"), "runs")) == 2
    assert not files(out)


def test_a_mistake_of_the_users_can_be_mended_while_nothing_depends_on_it(study_file, out, forget_modules):
    study = study_file(models=[{"name": "hasty_nets:net"}], optimizers=[SGD])
    module = Path(study).with_name("hasty_nets.py")
    module.write_text(HASTY_NETS)
    assert run(study, out) == 1
    assert set(table(out, "runs")["status"]) == {"failed"}
    forget_modules()
    module.write_text(HASTY_NETS.replace("self.training and len(x) > 4", "False"))
    assert run(study, out) == 0
    assert set(table(out, "runs")["status"]) == {"finished"}
    assert set(table(out, "tasks")["status"]) == {"done"}


# ---- extension


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({"seeds": 3}, 6),
        ({"seeds": [0, 1, 7]}, 6),
        ({"optimizers": [SGD, {"name": "lion", "lr": 1e-3}, ADAM]}, 6),
        ({"models": [{"name": "mlp", "widths": [4]}, {"name": "linear", "widths": [3]}]}, 8),
    ],
)
def test_what_is_added_extends_a_store_and_recomputes_nothing(
    study_file, finished, undisturbed, changes, runs
):
    out, before = finished, files(finished)
    assert run(study_file(**changes), out) == 0
    after = files(out)
    kept = [name for name in before if name.startswith(("parts/", "checkpoints/", "vectors/"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert len(table(out, "runs")) == runs
    assert len(table(out, "curvature")) == 3 * runs
    old = {row["run_id"] for row in undisturbed["runs"]}
    for name in ("runs", "eigenvalues", "angles", "overlaps"):
        assert [row for row in stable_rows(out, name) if row["run_id"] in old] == undisturbed[name]
    done = files(out)
    assert run(study_file(**changes), out) == 0
    assert files(out) == done


def test_resources_and_claims_may_change_without_recomputing(study_file, finished):
    out, before = finished, files(finished)
    study = study_file(resources={"pack": 1}, claims={"alpha": 0.01})
    assert run(study, out) == 0
    after = files(out)
    recorded, made_anew = {"manifest.json", "study.toml"}, {"tables/manifest.json", "tables/claims.parquet"}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {*recorded, *made_anew, "progress.json"}
    assert set(after) == set(before)
    assert lossray.open_study(out).study.claims.alpha == 0.01
    assert run(study, out) == 0
    assert files(out) == after


def test_a_study_that_has_moved_is_found_where_it_is_now(
    study_file, out, tmp_path, no_ray, monkeypatch, forget_modules
):
    study = Path(
        study_file(data={"source": "moved_data:data", "n": None, "dim": None, "classes": None, "noise": None})
    )
    study.with_name("moved_data.py").write_text(MOVED_DATA)
    assert run(str(study), out) == 0
    moved = shutil.move(study.parent, tmp_path / "moved")
    forget_modules()  # as another process has not imported it
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(study.parent)])
    assert run_study(str(moved / study.name), out) == 0  # no Ray either
    assert lossray.open_study(out).manifest.folder == str(moved)


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training": {"steps": 13}}, r"training\.steps: the store has 12, the study says 13"),
        ({"training": {"batch_size": 8}}, r"training\.batch_size: the store has 16, the study says 8"),
        ({"data": {"seed": 1}}, r"data\.seed: the store has 0, the study says 1"),
        ({"data": {"noise": 0.0}}, r"data\.noise: the store has 1\.0, the study says 0\.0"),
        ({"curvature": {"top": 4}}, r"curvature\.top: the store has 3, the study says 4"),
        ({"models": [{"name": "mlp", "widths": [5]}]}, r"widths"),
        ({"optimizers": [SGD]}, "adam.*which the study lacks"),
        ({"seeds": 1}, r"seeds: the store has 1, which the study lacks|seeds: the store has \[1\]"),
        ({"name": "another"}, "name: the store has 'small', the study says 'another'"),
    ],
)
def test_a_changed_input_of_existing_rows_is_refused_naming_it(study_file, finished, changes, says, no_ray):
    out, before = finished, files(finished)
    for in_process in (True, False):
        with pytest.raises(StoreError, match=says) as caught:
            run_study(study_file(**changes), out, in_process=in_process)
        assert "another --out" in str(caught.value)
    assert files(out) == before


def test_a_data_file_with_other_content_is_refused(study_file, out):
    columns = [f"x{i}" for i in range(4)]
    frame = pd.DataFrame(
        {name: [float((i + 3) * j % 17) for j in range(60)] for i, name in enumerate(columns)}
    )
    frame["label"] = [j % 3 for j in range(60)]
    parquet = {"source": "parquet", "path": "mine.parquet", "label": "label", "features": columns}
    study = study_file(data=dict.fromkeys(("n", "dim", "classes", "noise")) | parquet, optimizers=[SGD])
    place = Path(study).with_name("mine.parquet")
    frame.to_parquet(place)
    assert run(study, out) == 0
    before = files(out)
    assert run(study, out) == 0
    frame.loc[0, "x1"] += 1
    frame.to_parquet(place)
    with pytest.raises(StoreError, match=r"data: the store has content .*, the study finds"):
        run(study, out)
    assert files(out) == before


@pytest.mark.parametrize("foreign", ["thesis.tex", "study.toml", "tables/runs.parquet"])
def test_a_folder_with_foreign_files_is_refused_and_left_alone(study_file, out, foreign):
    Path(out, foreign).parent.mkdir(parents=True)
    Path(out, foreign).write_text("mine")
    before = files(out)
    with pytest.raises(StoreError, match=f"found files that are no store of lossray's, such as {foreign}"):
        run(study_file(), out)
    assert files(out) == before


def test_a_store_without_its_copy_of_the_study_gets_it_back(study_file, finished):
    """Its driver was killed between manifest.json and study.toml."""
    study = study_file(seeds=3)
    Path(finished, "study.toml").unlink()
    assert run(study, finished) == 0
    assert Path(finished, "study.toml").read_bytes() == Path(study).read_bytes()


def test_an_empty_folder_is_taken_as_a_store(study_file, out):
    Path(out).mkdir()
    assert run(study_file(), out, "seeds=1") == 0


@pytest.mark.parametrize("place", ["out", "out/below"])
def test_an_out_that_is_a_file_or_below_one_is_refused(study_file, out, tmp_path, place):
    Path(out).write_text("mine")
    with pytest.raises(StoreError, match=f"--out .*{place}: cannot be a store: Not a directory"):
        run(study_file(), str(tmp_path / place))
    assert Path(out).read_text() == "mine"


def test_an_out_that_cannot_be_written_is_refused(study_file, out, monkeypatch):
    def deny(*args, **options):
        raise PermissionError(13, "Permission denied")

    study = study_file()
    monkeypatch.setattr(os, "makedirs", deny)
    with pytest.raises(StoreError, match="cannot be written: Permission denied"):
        run(study, out)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"training": {"batch_size": 64}}, StudyError, r"training\.batch_size: found 64"),
        ({"models": [{"name": "nowhere_nets:net"}]}, StudyError, "module 'nowhere_nets' not found"),
        ({"models": [{"name": "cnn"}]}, StudyError, r"models\[0\]"),
        ({"data": {"n": 4, "split": [0.9, 0.05, 0.05]}}, DataError, "too few"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(study_file, out, changes, error, says):
    with pytest.raises(error, match=says):
        run(study_file(**changes), out)
    assert not Path(out).exists()
