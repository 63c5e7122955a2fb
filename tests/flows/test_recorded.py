"""A trajectory trained elsewhere: recorded, analysed like a trained one, extended, refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import flows
import flows.serial
import lossray
from flows.estimate import dry_run
from flows.study import run_study
from lossray.errors import StoreError, StudyError
from lossray.storage.checkpoints import dumps, read_checkpoint
from lossray.storage.store import Store
from lossray.storage.tables import TABLES
from lossray.training.data_settings import data_settings
from lossray.training.datasets import load_dataset
from tasks.analyse_checkpoint import analyse_checkpoint

DATA = {"source": "gaussians", "n": 90, "dim": 6, "classes": 3, "noise": 1.0}
STEPS = (0, 2, 5)


def net():
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def moments(optimizer):
    """The norm of Adam's first moment."""
    return float(sum(state["exp_avg"].square().sum() for state in optimizer.state.values()) ** 0.5)


def train_and_record(out, steps=STEPS, *, last=None, make=torch.optim.Adam, seed=0, **options):
    """The user's own script; the norms of Adam's moments by step."""
    split = load_dataset(data_settings({**DATA, "standardise": "none"}), dtype=torch.float32).train
    norms = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = net()
    optimizer = make(model.parameters(), lr=0.05)
    for step in range((last or max(steps)) + 1):
        if step in steps:
            lossray.record(out, model, optimizer, step, **options)
            norms[step] = moments(optimizer) if type(optimizer) is torch.optim.Adam else None
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(split.inputs), split.targets).backward()
        optimizer.step()
    return norms


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


@pytest.fixture
def recorded_study(study_file):
    """A study of what was recorded, changed; its model is the mlp that `net` is."""

    def write(**changes):
        table = {
            "source": "checkpoints",
            "seeds": None,
            "optimizers": None,
            "data": DATA,
            "models": [{"name": "mlp", "widths": [4], "activation": "tanh"}],
            "training": dict.fromkeys(("steps", "batch_size", "checkpoints", "log_every")),
        }
        return study_file(**{**table, **changes})

    return write


NETS = """
from torch import nn

def net(width=4, dtype=None, frozen=False):
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
    model[0].requires_grad_(not frozen)
    return model
"""


@pytest.fixture
def own_study(recorded_study, tmp_path, forget_modules):
    """`recorded_study` with the user's own model function."""

    def write(**changes):
        model = {"name": "recorded_nets:net", **changes.pop("model", {})}
        study = recorded_study(models=[model], **changes)
        (tmp_path / "studies" / "recorded_nets.py").write_text(NETS)
        return study

    return write


def run(study, out):
    return run_study(study, out, in_process=True)


def table(out, name):
    return lossray.open_study(out).table(name)


def files(out):
    paths = [path for path in Path(out).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def stable(out):
    """All rows but for volatile columns and the gather task."""
    frames = {name: table(out, name).drop(columns=schema.volatile) for name, schema in TABLES.items()}
    frames["tasks"] = frames["tasks"].query("kind != 'gather'").reset_index(drop=True)
    return frames


def assert_same(found, expected):
    for name, frame in expected.items():
        pd.testing.assert_frame_equal(found[name], frame, check_exact=True, obj=name)


# ---- the same analysis


def test_a_recorded_run_has_every_table_that_its_training_leaves(own_study, out):
    moments_of = train_and_record(out, run="adam-0")
    assert run(own_study(), out) == 0
    (row,) = table(out, "runs").to_dict("records")
    assert (row["run_id"], row["status"], row["steps_done"]) == ("adam-0", "finished", 5)
    assert (row["model"], row["optimizer"], row["lr"]) == ("recorded_nets:net", "adam", 0.05)
    assert json.loads(row["optimizer_settings"])["betas"] == [0.9, 0.999]
    assert row["adaptive"] is True
    assert pd.isna([row[name] for name in ("seed", "batch_size", "schedule", "reason")]).all()
    assert (row["n_params"], row["dtype"]) == (6 * 4 + 4 + 4 * 3 + 3, "float32")
    counts = {name: len(table(out, name)) for name in ("checkpoints", "training", "curvature", "eigenvalues")}
    assert counts == {"checkpoints": 3, "training": 3, "curvature": 3, "eigenvalues": 3 * (10 + 1)}
    assert table(out, "training")["lr"].tolist() == [0.05] * 3
    directions = table(out, "directions").set_index(["direction", "step"])["norm"]
    assert set(directions.index) == {
        *(("gradient", step) for step in STEPS),
        *(("momentum", step) for step in STEPS[1:]),
        *(("displacement", step) for step in STEPS[:-1]),
    }
    for step in (2, 5):
        assert directions["momentum", step] == pytest.approx(moments_of[step], rel=1e-6)
    assert set(table(out, "angles")["direction"]) == {"gradient", "momentum", "displacement"}
    assert set(table(out, "tasks")["status"]) == {"done"}


@pytest.mark.slow
def test_a_trained_run_that_is_recorded_has_the_rows_that_it_had(study_file, recorded_study, out, tmp_path):
    exact = {"dtype": "float64"}
    curvature = {"top": 3, "tolerance": 1e-9, "dtype": "float64"}
    models = [{"name": "mlp", "widths": [4], "norm": "batch"}]
    trained = study_file(seeds=1, models=models, training=exact, curvature=curvature, file="trained.toml")
    first = str(tmp_path / "trained")
    assert run(trained, first) == 0
    study = lossray.open_study(first)
    for run_id in study.table("runs")["run_id"]:
        for step in (0, 5, 12):
            lossray.record(out, study.model(run_id, step), None, step, run=run_id)
    standardised = {**DATA, "standardise": "feature"}
    recorded = recorded_study(
        models=models, data=standardised, training={**exact, **NO_TRAINING}, curvature=curvature
    )
    assert run(recorded, out) == 0
    for name, keys in (("checkpoints", ["run_id", "step"]), ("curvature", ["run_id", "step"])):
        before, after = (table(o, name).set_index(keys) for o in (first, out))
        numbers = before.select_dtypes("number").drop(columns=["member", "matvecs"], errors="ignore").columns
        for column in numbers.drop(["lambda_max", "orthogonality_loss"], errors="ignore"):
            pd.testing.assert_series_equal(after[column], before[column], rtol=1e-12, obj=column)
    keys = ["run_id", "step", "index"]
    values = [table(o, "eigenvalues").set_index(keys)["eigenvalue"] for o in (first, out)]
    pd.testing.assert_series_equal(*values, rtol=0, atol=1e-6)
    common = "direction == 'gradient' and subspace == 'v1' and gauge != 'preconditioned'"
    keys = ["run_id", "step", "gauge"]
    gradients = [table(o, "angles").query(common).set_index(keys) for o in (first, out)]
    assert len(gradients[0]) == 2 * 3 * 3
    pd.testing.assert_series_equal(gradients[0]["energy"], gradients[1]["energy"], rtol=1e-6)


NO_TRAINING = dict.fromkeys(("steps", "batch_size", "checkpoints", "log_every"))


@pytest.mark.slow
@pytest.mark.ray
def test_ray_gives_the_same_rows(session_ray, own_study, out, tmp_path):
    train_and_record(out)
    other = shutil.copytree(out, tmp_path / "other")
    assert run(own_study(), out) == 0
    assert flows.run(own_study(), other) == 0
    assert_same(stable(str(other)), stable(out))


def test_models_are_read_back(own_study, out):
    train_and_record(out)
    run(own_study(), out)
    study = lossray.open_study(out)
    inputs, targets = study.data("train")
    with torch.no_grad():
        loss = nn.functional.cross_entropy(study.model("run", 5)(inputs), targets)
    rows = table(out, "checkpoints").set_index("step")
    assert float(loss) == pytest.approx(rows["train_loss"][5], rel=1e-5)
    first, last = (nn.utils.parameters_to_vector(study.model("run", s).parameters()) for s in (0, 5))
    assert float((last - first).detach().norm()) == pytest.approx(rows["distance_from_init"][5], rel=1e-5)
    assert rows["distance_from_init"][0] == 0
    with pytest.raises(StudyError, match=r"no checkpoint at step 3; it has \[0, 2, 5\]"):
        study.model("run", 3)


def test_what_only_the_optimizer_knows_is_missing_where_it_is_unknown(own_study, out, capsys):
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    train_and_record(out, make=Mine, run="mine")
    lossray.record(out, net(), None, 0, run="none")
    assert run(own_study(), out) == 0
    said = capsys.readouterr().err
    assert "note: run mine: optimizer Mine is not known: no momentum, preconditioner, threshold\n" in said
    assert "note: run none: no optimizer was recorded: no momentum, preconditioner, threshold\n" in said
    assert "note: run mine: optimizer Mine is not known" in dry_run(own_study(), out)
    runs = table(out, "runs").set_index("run_id")
    assert runs["optimizer"]["mine"] == "Mine"
    assert pd.isna(runs["optimizer"]["none"])
    assert runs["lr"]["mine"] == 0.05
    assert runs[["optimizer_settings", "adaptive", "weight_decay"]].isna().all().all()
    assert set(table(out, "directions")["direction"]) == {"gradient", "displacement"}


def test_weights_of_another_precision_are_analysed_in_that_of_the_study(own_study, out):
    for dtype in (torch.float64, torch.bfloat16):
        model = net().to(dtype)
        lossray.record(out, model, torch.optim.Adam(model.parameters()), 0, run=str(dtype)[6:])
    assert run(own_study(), out) == 0
    assert table(out, "runs")["dtype"].tolist() == ["bfloat16", "float64"]
    assert table(out, "curvature")["lambda_max"].gt(0).all()


def test_a_run_that_diverged_is_recorded_as_such_and_harms_no_other(own_study, out):
    train_and_record(out)
    model = net()
    lossray.record(out, model, None, 0, run="wild")
    with torch.no_grad():
        model[0].weight.fill_(torch.inf)
    lossray.record(out, model, None, 4, run="wild")
    assert run(own_study(), out) == 0
    wild = table(out, "runs").set_index("run_id").loc["wild"]
    assert (wild["status"], wild["diverged_at"], wild["steps_done"]) == ("diverged", 4, 4)
    assert "not finite at step 4" in wild["reason"]
    losses = table(out, "checkpoints").set_index(["run_id", "step"])["train_loss"]
    assert losses.isna().to_dict() == {("run", s): False for s in STEPS} | {
        ("wild", 0): False,
        ("wild", 4): True,
    }
    assert table(out, "curvature")["lambda_max"].isna().sum() == 1


# ---- again


def test_a_second_run_changes_no_file(own_study, out, capsys):
    train_and_record(out)
    study = own_study()
    assert run(study, out) == 0
    before = files(out)
    assert run(study, out) == 0
    assert files(out) == before
    assert "is complete: nothing to do" in capsys.readouterr().err


def test_only_what_was_recorded_since_is_analysed(own_study, out, tmp_path, monkeypatch):
    train_and_record(out, last=8)
    study = own_study()
    assert run(study, out) == 0
    train_and_record(out, (*STEPS, 8))
    train_and_record(out, (1,), seed=1, run="other")
    analysed = []
    monkeypatch.setattr(
        "tasks.run_analysis.analyse_checkpoint",
        lambda job, device=None: analysed.append((job.pack.pack_id, job.step)) or analyse_checkpoint(job),
    )
    before = files(out)
    assert run(study, out) == 0
    assert analysed == [("other", 1), ("run", 8)]
    after = files(out)
    kept = [
        name for name in before if name.startswith(("parts/curvature", "parts/checkpoints", "checkpoints"))
    ]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    at_once = str(tmp_path / "at-once")
    train_and_record(at_once, (*STEPS, 8))
    train_and_record(at_once, (1,), seed=1, run="other")
    assert run(study, at_once) == 0
    assert_same(stable(out), stable(at_once))
    assert table(out, "runs").set_index("run_id")["steps_done"].to_dict() == {"run": 8, "other": 1}


def test_the_rows_of_an_overwritten_course_are_withdrawn(own_study, out, tmp_path, capsys):
    train_and_record(out)
    study = own_study()
    assert run(study, out) == 0
    train_and_record(out, (0, 2), seed=1, overwrite=True)
    assert run(study, out) == 0
    reason = "checkpoints of the run were replaced, deleted or added"
    said = capsys.readouterr().err.splitlines()
    assert f"note: curvature of 2 checkpoints will be computed again: {reason}" in said
    assert f"note: curvature of 1 checkpoint will be withdrawn: {reason}" in said
    anew = str(tmp_path / "anew")
    train_and_record(anew, (0, 2), seed=1)
    assert run(study, anew) == 0
    assert_same(stable(out), stable(anew))


def test_a_first_checkpoint_that_comes_later_moves_the_origin_of_distances(own_study, out):
    train_and_record(out, (2, 5))
    study = own_study()
    assert run(study, out) == 0
    assert table(out, "checkpoints")["distance_from_init"].tolist()[0] == 0
    train_and_record(out, (0,), last=5)
    assert run(study, out) == 0
    distances = table(out, "checkpoints")["distance_from_init"].tolist()
    assert distances[0] == 0
    assert min(distances[1:]) > 0


def test_an_interrupted_analysis_is_resumed(own_study, out, tmp_path, monkeypatch):
    train_and_record(out)
    whole = shutil.copytree(out, tmp_path / "whole")
    study = own_study()
    assert run(study, str(whole)) == 0

    def die(job, device=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "tasks.run_analysis.analyse_checkpoint",
            lambda job, device=None: die(job) if job.step else analyse_checkpoint(job),
        )
        with pytest.raises(KeyboardInterrupt):
            run(study, out)
    assert len(table(out, "curvature")) == 1
    assert run(study, out) == 0
    assert_same(stable(out), stable(str(whole)))


def test_a_damaged_checkpoint_fails_its_run_alone_and_can_be_deleted(own_study, out):
    for name in ("good", "bad"):
        train_and_record(out, run=name)
    path = Path(out, "checkpoints/bad/2.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    study = own_study()
    assert run(study, out) == 1
    runs = table(out, "runs").set_index("run_id")
    assert runs["status"].to_dict() == {"good": "finished", "bad": "failed"}
    assert "bad/2.safetensors is damaged" in runs["reason"]["bad"]
    path.unlink()
    assert run(study, out) == 0
    assert set(table(out, "runs")["status"]) == {"finished"}
    assert set(table(out, "tasks")["status"]) == {"done"}
    assert table(out, "checkpoints").groupby("run_id")["step"].apply(list).to_dict() == {
        "bad": [0, 5],
        "good": [0, 2, 5],
    }


# ---- what is refused, before anything is written


def assert_refused(study, out, says, error=StudyError):
    before = files(out)
    with pytest.raises(error, match=says) as caught:
        run(study, out)
    assert files(out) == before
    return str(caught.value)


def test_where_nothing_is_recorded_the_remedy_is_named(own_study, out):
    assert_refused(
        own_study(), out, r"study\.toml: source: nothing is recorded in .*out: call lossray\.record\("
    )
    assert not Path(out).exists()
    with pytest.raises(StudyError, match="--out is missing: name the folder or URI that was recorded into"):
        dry_run(own_study(), None)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"width": 5}, r"0\.weight: found \[5, 6\] trainable, recorded \[4, 6\] trainable"),
        ({"frozen": True}, r"0\.weight: found \[4, 6\] not trainable, recorded \[4, 6\] trainable"),
    ],
)
def test_a_model_that_is_not_the_recorded_one_is_refused(own_study, out, model, says):
    train_and_record(out, run="adam-0")
    assert_refused(
        own_study(model=model), out, rf"models\[0\]: 'recorded_nets:net' does not build .* 'adam-0': {says}"
    )


def test_a_model_with_other_names_is_refused(recorded_study, out):
    train_and_record(out)
    assert_refused(recorded_study(models=[{"name": "linear"}]), out, r"models\[0\]: 'linear' does not build")


def test_a_study_that_trains_is_refused_where_runs_are_recorded(study_file, own_study, out):
    train_and_record(out)
    assert_refused(
        study_file(file="trained.toml"), out, "found files that are no store of lossray's", StoreError
    )
    assert run(own_study(), out) == 0
    assert_refused(study_file(file="trained.toml"), out, "source: the store has 'checkpoints'", StoreError)


def test_recorded_runs_in_the_store_of_a_study_that_trains_are_not_there(study_file, own_study, out):
    assert run(study_file(file="trained.toml"), out) == 0
    assert_refused(own_study(), out, "nothing is recorded in")
    with pytest.raises(StoreError, match="is the store of study 'small'"):
        train_and_record(out)


def test_a_changed_setting_is_refused_once_there_are_rows(own_study, out):
    train_and_record(out)
    assert run(own_study(), out) == 0
    assert_refused(own_study(curvature={"top": 4}), out, r"curvature\.top: the store has 3", StoreError)


def test_a_dry_run_counts_the_checkpoints_and_writes_nothing(own_study, out):
    train_and_record(out)
    train_and_record(out, (0, 1), seed=1, run="other")
    before = files(out)
    text = dry_run(own_study(), out)
    assert files(out) == before
    assert "2 packs, 2 runs, 2 to 3 checkpoints each" in text
    assert "about 0 s of training" in text


def test_a_recorded_checkpoint_is_never_changed(own_study, out):
    train_and_record(out)
    before = Path(out, "checkpoints/run/5.safetensors").read_bytes()
    run(own_study(), out)
    assert Path(out, "checkpoints/run/5.safetensors").read_bytes() == before
    assert read_checkpoint(Store(out), "run", 5).evaluation == {}


# ---- parameter groups


def by_decay(parameters):
    """AdamW as it is mostly used, with no decay of biases; here with a rate of their own too."""
    own = list(parameters)
    matrices, biases = [p for p in own if p.ndim > 1], [p for p in own if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "lr": 0.02, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups)


def test_groups_of_an_optimizer_have_momentum_preconditioner_and_threshold(own_study, out):
    made = []

    def make(parameters, lr):
        made.append(by_decay(parameters))
        made[-1].param_groups[0]["lr"] = lr
        return made[-1]

    train_and_record(out, make=make, run="adamw-0")
    study = own_study(
        training={**NO_TRAINING, "dtype": "float64"},
        curvature={"top": 3, "tolerance": 1e-10, "dtype": "float64", "operators": ["preconditioned"]},
    )
    assert run(study, out) == 0
    (row,) = table(out, "runs").to_dict("records")
    assert (row["optimizer"], row["adaptive"]) == ("adamw", True)
    assert json.loads(row["optimizer_settings"])["lr"] == [0.05, 0.02]
    directions = set(table(out, "directions")["direction"])
    assert directions == {"gradient", "momentum", "displacement"}
    sharpness = table(out, "sharpness").set_index("step")
    assert sharpness["threshold"].tolist() == pytest.approx([38.0] * 3)
    assert sharpness["lr"].tolist() == [0.05] * 3
    assert sharpness["lambda_max_lr"].isna().all()  # no one rate is the run's
    for step in STEPS[1:]:  # at 0 there is no preconditioner yet
        expected = stability(out, step, "adamw-0")
        assert sharpness["preconditioned_lr"][step] == pytest.approx(expected, rel=1e-7)
    spectra = table(out, "curvature").query("operator == 'preconditioned'").set_index("step")
    assert spectra["lambda_max"][5] * 0.05 == pytest.approx(stability(out, 5, "adamw-0"), rel=1e-7)


def stability(out, step, run_id):
    """The largest eigenvalue of rate / P times H, from the recorded state and a dense Hessian."""
    study = lossray.open_study(out)
    inputs, targets = study.data("train")
    model = study.model(run_id, step).double()
    state = read_checkpoint(Store(out), run_id, step).optimizer
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(theta):
        named, start = {}, 0
        for name, parameter in model.named_parameters():
            named[name] = theta[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        outputs = torch.func.functional_call(model, named, (inputs.double(),))
        return nn.functional.cross_entropy(outputs, targets)

    hessian = torch.autograd.functional.hessian(loss, theta)
    rates = (state["rate"] / state["scale"][0].double()).sqrt()
    return float(torch.linalg.eigvalsh(rates[:, None] * hessian * rates)[-1])


def test_a_group_that_does_not_move_is_dropped_from_the_preconditioned_gauge(own_study, out):
    def make(parameters, lr):
        first, *others = list(parameters)
        return torch.optim.Adam([{"params": [first], "lr": 0.0}, {"params": others}], lr=lr)

    train_and_record(out, make=make)
    assert run(own_study(), out) == 0
    angles = table(out, "angles").query("gauge == 'preconditioned' and step == 2")
    assert set(angles["dropped"]) == {6 * 4}
    assert set(angles["dim"]) == {4 + 4 * 3 + 3}
    assert angles["energy"].between(0, 1).all()


def test_what_an_older_version_recorded_is_analysed_as_before(own_study, out):
    train_and_record(out)
    older = str(Path(out).parent / "older")
    shutil.copytree(out, older)
    store = Store(older)
    plain = store.read_json("recorded/run.json")
    own = {key: value for key, value in plain.items() if key not in ("kind", "exact", "adaptive", "notes")}
    store.write_json("recorded/run.json", {**own, "format": "recording/1"})
    moment = read_checkpoint(store, "run", 5).optimizer
    square = (moment["scale"] - 1e-8).square() * (1 - 0.999**5)
    state = {"exp_avg": moment["momentum"], "exp_avg_sq": square, "step": torch.tensor(5.0)}
    checkpoint = replace(read_checkpoint(store, "run", 5), optimizer=state)
    store.write_bytes("checkpoints/run/5.safetensors", dumps(checkpoint))
    for where in (out, older):
        assert run(own_study(), where) == 0
    for name in ("angles", "sharpness", "directions"):
        before, now = table(older, name), table(out, name)
        numbers = now.select_dtypes("float").columns
        pd.testing.assert_frame_equal(before[numbers], now[numbers], rtol=2e-3, atol=1e-5, obj=name)
