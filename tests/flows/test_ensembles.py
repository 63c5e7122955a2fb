"""Paths and ensembles in a study: when they run, how they resume, what extends a store."""

import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest
from scipy.special import log_softmax

import flows
import flows.serial
import lossray
from flows.costs import EVALUATIONS, _logit_bytes, _retraining_steps
from flows.freeze import decide
from flows.plan import make_plan
from flows.study import check_request
from lossray.errors import StoreError, StudyError
from lossray.study import partition
from tasks.build_ensembles import build_ensembles

METHODS = ["snapshot", "rescale_retrain", "lr_equivalent", "rescale_curve", "curve", "curve_lr_equivalent"]
SECTIONS = {
    "seeds": 3,
    "resources": {"pack": 2},
    "optimizers": [{"name": "sgd", "lr": 0.1}],
    "curvature": {"top": 1, "probes": 1, "steps": 4, "vectors": False},
    "angles": {"directions": ["gradient"], "gauges": ["raw"], "window": 0},
    "connectivity": {"align": ["none", "both"], "points": 3},
    "ensembles": {"methods": METHODS, "budgets": [1]},
}
TABLES = ("paths", "barriers", "ensembles", "members", "predictions", "rescalings", "logits")


@pytest.fixture(scope="module")
def whole(finished):
    """The store of the study when nothing happens to it, and its study file."""
    return finished(SECTIONS)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda path, out, *overrides: flows.run(str(path), out, overrides=overrides, in_process=True)


def table(out, name):
    return lossray.open_study(out).table(name)


def test_every_method_and_alignment_is_a_task_and_has_rows(whole):
    _, out = whole
    kinds = table(out, "tasks")["kind"].value_counts()
    assert kinds["connectivity"] == 2 * 3  # two packs; none, both, rescaled
    assert kinds["ensemble"] == 2 * len(METHODS)
    said = json.loads((out / "progress.json").read_text())
    assert said["further"] == said["further_done"] == 2 * (3 + len(METHODS))
    for name in TABLES:
        assert len(table(out, name)) > 0, name
    assert set(table(out, "ensembles")["method"]) == set(METHODS)
    pairs = table(out, "barriers").query("aligned == 'none'")[["run_a", "run_b"]].drop_duplicates()
    seeds = [tuple(run_id.rpartition("-s")[2] for run_id in pair) for pair in pairs.to_numpy()]
    assert sorted(seeds) == [("0", "1"), ("1", "2")]  # the second across packs


def test_claim_c_is_among_the_claims(whole):
    _, out = whole
    claims = table(out, "claims")
    assert "C" in set(claims["claim"])
    verdicts = claims[claims["claim"] == "C"].set_index("subject")["verdict"]
    identity = verdicts.index.str.endswith("rescale_retrain (C1)")  # which any number of seeds shows
    assert set(verdicts[identity]) == {"EQUIVALENT TO LEARNING RATES"}
    assert set(verdicts[~identity]) == {"UNDECIDED"}  # three seeds


def test_sections_that_are_added_extend_a_store_and_train_no_run(whole, tmp_path, run, monkeypatch, helpers):
    path, out = whole
    bare, other = tmp_path / "study.toml", tmp_path / "out"
    text = path.read_text()
    bare.write_text(text[: text.index("[connectivity]")])
    assert run(bare, other) == 0
    assert not {"connectivity", "ensemble"} & set(table(other, "tasks")["kind"])
    monkeypatch.setattr(flows.serial, "train_pack", None)
    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", None)
    assert run(path, other) == 0
    helpers.assert_same_rows(other, out)


def test_what_fails_is_tried_again_and_what_is_done_is_not(whole, tmp_path, run, monkeypatch, helpers):
    path, out = whole
    other = tmp_path / "out"

    def fail(job, device=None):
        if job.method == "curve":
            raise ValueError("no curve today")
        build_ensembles(job)

    with monkeypatch.context() as patch:
        patch.setattr("tasks.run_analysis.build_ensembles", fail)
        assert run(path, other) == 1
    done = []
    monkeypatch.setattr(
        "tasks.run_analysis.build_ensembles",
        lambda job, device=None: done.append(job.method) or build_ensembles(job),
    )
    monkeypatch.setattr(flows.serial, "train_pack", None)
    monkeypatch.setattr("tasks.run_analysis.connect_runs", None)
    assert run(path, other) == 0
    assert done == ["curve"] * 2
    helpers.assert_same_rows(other, out)


def test_seeds_and_methods_that_are_added_change_no_row(whole, tmp_path, run):
    path, out = whole
    other = shutil.copytree(out, tmp_path / "out")
    assert run(path, other, "seeds=4", f"ensembles.methods={json.dumps([*METHODS, 'swa'])}") == 0
    for name, keys in (("barriers", ["pair_id"]), ("ensembles", ["ensemble_id"])):
        before, after = table(out, name), table(other, name)
        kept = after.merge(before[keys].drop_duplicates(), on=keys)
        assert kept.equals(before), name
    assert set(table(other, "ensembles")["method"]) == {*METHODS, "swa"}


def test_a_changed_setting_of_them_is_refused(whole, run):
    path, out = whole
    with pytest.raises(StoreError, match=r"ensembles.cycle: the store has 0.25, the study says 0.5"):
        run(path, out, "ensembles.cycle=0.5")
    with pytest.raises(StoreError, match=r"connectivity.points: the store has 3, the study says 5"):
        run(path, out, "connectivity.points=5")


def test_ensembles_of_a_regression_are_refused(whole, tmp_path, run):
    path, _ = whole
    (tmp_path / "regression.py").write_text(
        "import torch\ndef data():\n    x = torch.linspace(0, 1, 60).view(-1, 1)\n    return x, x.clone()\n"
    )
    text = path.read_text()
    start, end = text.index("[data]"), text.index("[[models]]")
    own = tmp_path / "study.toml"
    loss = text[end:].replace("[training]\n", '[training]\nloss = "mse"\n')
    own.write_text(text[:start] + '[data]\nsource = "regression:data"\n' + loss)
    with pytest.raises(StudyError, match=r"ensembles: found targets that are floats"):
        run(own, tmp_path / "out")


def test_the_estimate_counts_their_training_and_their_logits(whole):
    """By hand: steps of a pack of two runs, and bytes of its members' outputs."""
    path, _ = whole
    request = check_request(str(path), "memory://estimate", ["seeds=2"])
    study = request.loaded.study
    packs = partition(study, (), partial(decide, study, request.dataset, "cpu"))
    (pack,) = make_plan(request.context, packs, request.inputs).packs
    curves = 2 * 12 / 2  # none and both: one Bezier curve of 12 steps each, one pair for two runs
    ensembles = len(METHODS) * 6  # at a budget of one training: half of it beyond the base
    assert _retraining_steps(pack, study) == EVALUATIONS * (curves + ensembles)
    n = len(request.dataset.validation.targets) + len(request.dataset.test.targets)
    members = len(METHODS) * 2 * 3  # two runs, the base and two cycles
    assert _logit_bytes(pack, study, request.dataset) == 2 * 4 * members * n * 3


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_the_rows_are_those_without_it(session_ray, whole, tmp_path, helpers):
    path, out = whole
    background = helpers.Background(path, tmp_path / "out")
    assert background.result() == 0
    helpers.assert_same_rows(tmp_path / "out", out)


def test_the_logits_of_an_ensemble_are_an_array(whole):
    _, out = whole
    study = lossray.open_study(out)
    row = study.table("ensembles").query("members == size and metric == 'error' and split == 'test'").iloc[0]
    logits = study.logits(row["ensemble_id"])
    targets = study.data("test")[1].numpy()
    assert logits.shape == (row["size"], len(targets), 3)
    mean = np.exp(log_softmax(logits, axis=2)).mean(axis=0)
    assert (mean.argmax(axis=1) != targets).mean() == pytest.approx(row["value"])
    with pytest.raises(StudyError, match="did you mean"):
        study.logits(row["ensemble_id"][:-1])
