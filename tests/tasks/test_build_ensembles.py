"""Ensembles of a study's runs: their tables agree with the runs and with each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from lossray.ensembles.methods import METHODS
from lossray.storage import checkpoints
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from lossray.study.keys import ENSEMBLE_TABLES
from lossray.training.datasets import load_dataset
from tasks.build_ensembles import build_ensembles
from tasks.jobs import Attempt, EnsembleJob
from tasks.train_pack import train_pack

RELU = [{"name": "mlp", "widths": [4, 3]}]
METHODS_USED = ["snapshot", "rescale_retrain", "lr_equivalent", "long_run"]
SECTION = {"methods": METHODS_USED, "budgets": [1, 2], "sigma": 1.0}


def trained(planned, **changes):
    plan = planned(
        **({"models": RELU, "optimizers": [{"name": "sgd", "lr": 0.2}], "ensembles": SECTION} | changes)
    )
    for pack in plan.packs:
        list(train_pack(plan.training_job(pack, Attempt())))
    return plan


def work(plan):
    for pack in plan.packs:
        for job in pack.further.values():
            if isinstance(job, EnsembleJob):
                build_ensembles(job)
    store = Store(plan.context.out)
    return {name: assemble(store, name).to_pandas() for name in ENSEMBLE_TABLES}


@pytest.fixture(scope="module")
def found(planned_once):
    """The tables and the plan of one small study, shared by the tests that only look."""
    plan = trained(planned_once)
    return plan, work(plan)


def stacked(logits, **where):
    own = logits
    for name, value in where.items():
        own = own[own[name] == value]
    own = own.sort_values("member")
    shape = (len(own), int(own["n_examples"].iloc[0]), int(own["n_outputs"].iloc[0]))
    return np.stack(own["logits"].to_list()).reshape(shape).astype(np.float64)


def test_one_member_is_the_run_itself(found):
    """At a budget of two trainings the base is the whole run."""
    plan, tables = found
    runs = assemble(Store(plan.context.out), "runs").to_pandas().set_index("run_id")
    own = tables["ensembles"]
    own = own[(own["nominal_budget"] == 2) & (own["members"] == 1) & (own["method"] == "snapshot")]
    for split in ("validation", "test"):
        rows = own[own["split"] == split].pivot(index="base_run", columns="metric", values="value")
        np.testing.assert_allclose(rows["error"], 1 - runs.loc[rows.index, f"{split}_accuracy"], atol=1e-12)
        np.testing.assert_allclose(rows["nll"], runs.loc[rows.index, f"{split}_loss"], rtol=1e-6)
        np.testing.assert_allclose(rows["nll"], rows["member_nll"], rtol=1e-12)
        assert rows[["disagreement", "kl"]].isna().all().all()


def test_scores_follow_from_the_stored_logits(found):
    plan, tables = found
    dataset = load_dataset(plan.study.data, dtype=torch.float32)
    targets = dataset.test.targets.numpy()
    for ensemble_id, rows in tables["ensembles"].groupby("ensemble_id"):
        logits = stacked(tables["logits"], ensemble_id=ensemble_id, split="test")
        for count in range(1, len(logits) + 1):
            logs = log_softmax(logits[:count], axis=2)
            mean = logsumexp(logs, axis=0) - np.log(count)
            own = rows[(rows["members"] == count) & (rows["split"] == "test")].set_index("metric")["value"]
            assert own["nll"] == pytest.approx(-mean[np.arange(len(targets)), targets].mean(), rel=1e-5)
            assert own["error"] == pytest.approx((mean.argmax(axis=1) != targets).mean())


def test_predictions_are_the_examples_of_the_scores(found):
    _, tables = found
    whole = tables["ensembles"]
    whole = whole[whole["members"] == whole["size"]]
    scores = whole.pivot(index=["ensemble_id", "split"], columns="metric", values="value")
    predictions = tables["predictions"].set_index(["ensemble_id", "split"])
    assert set(predictions.index) == set(scores.index)
    for name in ("nll", "nll_scaled", "error"):
        means = predictions[name].map(np.mean)
        np.testing.assert_allclose(means, scores.loc[means.index, name], rtol=1e-5, atol=1e-7)


def test_rescaling_and_equivalent_rates_give_the_same_numbers(found):
    _, tables = found
    keys = ["base_run", "nominal_budget", "member", "split"]
    one, other = (
        tables["logits"][tables["logits"]["method"] == method].set_index(keys)["logits"].sort_index()
        for method in ("rescale_retrain", "lr_equivalent")
    )
    assert len(one) == len(other) > 0
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_pairs_of_members_and_budgets_are_complete(found):
    _, tables = found
    sizes = tables["ensembles"].groupby("ensemble_id")["size"].first()
    pairs = tables["members"].groupby("ensemble_id").size()
    for ensemble_id, size in sizes.items():
        assert pairs.get(ensemble_id, 0) == size * (size - 1) // 2
    assert (tables["members"]["barrier"] >= 0).all()
    assert (tables["members"]["weight_distance"] > 0).all()
    budgets = tables["ensembles"].groupby(["ensemble_id", "members"])["budget"].agg(["min", "max"])
    assert (budgets["min"] == budgets["max"]).all()
    snapshot = tables["ensembles"][tables["ensembles"]["method"] == "snapshot"]
    spent = snapshot[snapshot["members"] == snapshot["size"]].groupby("nominal_budget")["budget"].first()
    assert spent.to_dict() == {1.0: 12 * 16, 2.0: 24 * 16}


def test_rescalings_say_what_they_did(found):
    _, tables = found
    own = tables["rescalings"]
    assert set(own["method"]) == {"rescale_retrain", "lr_equivalent"}
    assert (own["function_change"] == 0).all()  # powers of two
    assert (own["distance"] > 0).mean() > 0.5  # rounded, all factors of a few units may be 1
    assert own[["sigma", "lambda_max_before", "lambda_max_after", "line_barrier"]].notna().all().all()


def test_a_diverged_run_has_null_scores_and_no_logits(planned):
    plan = trained(planned, ensembles={"methods": ["snapshot"], "budgets": [2]})
    store, pack = Store(plan.context.out), plan.packs[0].pack
    path = store.checkpoint_path(pack.pack_id, 12)
    checkpoint = checkpoints.loads(store.read_bytes(path))
    store.write_bytes(path, checkpoints.dumps(replace(checkpoint, alive=torch.tensor([True, False]))))
    tables = work(plan)
    dead, alive = (tables["ensembles"][tables["ensembles"]["seed"] == seed] for seed in (8, 3))
    assert (dead["status"] == "diverged").all()
    assert dead["value"].isna().all()
    assert (alive["status"] == "done").all()
    for name in ("logits", "predictions", "members"):
        assert set(tables[name]["base_run"]) == {pack.run_ids[0]}


def test_methods_that_cannot_be_applied_have_no_rows(planned):
    smooth = [{"name": "mlp", "widths": [4], "activation": "tanh"}]
    plan = trained(
        planned, models=smooth, ensembles={"methods": ["rescale_retrain", "long_run"], "budgets": [1]}
    )
    assert set(work(plan)["ensembles"]["method"]) == {"long_run"}


def test_every_method_runs_on_a_convolution_with_batch_norm_in_a_loop(planned):
    """Small, but through every path: refreshed statistics, alignment, rescaled norms."""
    plan = trained(
        planned,
        seeds=[3],
        data={"source": "digits", "split": [0.05, 0.05, 0.9]},
        models=[{"name": "cnn", "channels": [2], "kernel": 3, "widths": [4], "norm": "batch"}],
        training={"steps": 4, "checkpoints": {"steps": [0, 2, 4]}},
        ensembles={"methods": "all", "budgets": [1], "cycle": 0.5},
    )
    tables = work(plan)
    assert set(tables["ensembles"]["method"]) == set(METHODS)
    assert (tables["ensembles"]["status"] == "done").all()
    nll = tables["ensembles"].query("metric == 'nll'")["value"]
    assert np.isfinite(nll).all()
