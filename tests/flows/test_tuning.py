"""Tuned learning rates: whole grids train, grids grow beyond an edge, and only the best is analysed."""

import re

import pandas as pd
import pytest

import flows.serial
import flows.study
import flows.tuning
import lossray
from flows.estimate import dry_run
from flows.plan import make_plan
from flows.serial import run_serially
from flows.status import describe
from flows.study import run_study
from flows.tuning import round_of
from lossray.errors import StudyError
from lossray.findings.learning_rates import edges
from lossray.findings.matching import described_runs
from lossray.measures.run_rows import failed_run_rows
from lossray.storage.store import Store
from lossray.study import StudyInputs, partition, setting_of, settings_of, study_from_table
from lossray.training.update_rules import optimizer_settings
from tasks.jobs import Context
from tasks.train_pack import train_pack

# Twelve steps of SGD from 1e-3 learn too little, at 1e3 they diverge or jump far away: the best is between.
QUICK = {
    "seeds": 2,
    "curvature": {"top": 1},
    "angles": {"window": 0, "directions": [], "gauges": ["raw"]},
    "training": {"checkpoints": {"steps": [0, 12]}},
}


@pytest.fixture
def study(study_file):
    """``study(lr, ...)`` writes a study that tunes SGD from these rates."""

    def write(lr, *, models=None, tuning=None, seeds=2, **changes):
        return study_file(
            **{**QUICK, "seeds": seeds},
            models=models or [{"name": "mlp", "widths": [4]}],
            optimizers=[{"name": "sgd", "lr": lr}],
            tuning={"factor": 10.0} if tuning is None else tuning or None,
            **changes,
        )

    return write


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def run(study, out, *overrides):
    return run_study(study, out, overrides=overrides, in_process=True)


def rates(out):
    return sorted(set(lossray.open_study(out).table("runs")["lr"]))


def best(out):
    found = edges(described_runs({"runs": lossray.open_study(out).table("runs")}))
    return {row["architecture"]: (row["lr"], bool(row["inside"])) for _, row in found.iterrows()}


def analysed(out):
    tables = lossray.open_study(out)
    runs = tables.table("runs").set_index("run_id")["lr"]
    return sorted(set(runs[tables.table("curvature")["run_id"]]))


def keys(out):
    return Store(out).committed_keys()


# ---- rounds


def test_a_best_rate_inside_its_grid_is_analysed_and_no_other(study, out, capsys):
    assert run(study([1e-3, 1.0, 1e3]), out) == 0
    assert rates(out) == [1e-3, 1.0, 1e3]
    assert analysed(out) == [1.0]
    assert best(out) == {"mlp": (1.0, True)}
    said = capsys.readouterr().err
    assert "1 of 1 best learning rates are inside their grids" in said
    assert "added" not in said
    tasks = lossray.open_study(out).table("tasks")
    assert tasks.groupby("kind").size()[["training", "curvature"]].tolist() == [3, 2]
    counts = Store(out).read_json("progress.json")
    assert (counts["checkpoints"], counts["to_analyse"], counts["checkpoints_analysed"]) == (6, 2, 2)
    assert (counts["state"], counts["units"]) == ("done", counts["units_done"])
    assert "checkpoints: 6 of 6 trained, 2 of 2 analysed, 0 failed" in describe(out)


@pytest.mark.parametrize(
    ("grid", "edge", "added"),
    [([1e-3, 0.01], "upper", [0.1, 1.0, 10.0]), ([3.0, 30.0], "lower", [0.03, 0.3])],
    ids=["upward", "downward"],
)
def test_a_grid_grows_beyond_an_edge_until_the_best_is_inside(study, out, capsys, grid, edge, added):
    assert run(study(grid), out) == 0
    assert rates(out) == sorted([*grid, *added])
    (lr, inside) = best(out)["mlp"]
    assert inside
    assert analysed(out) == [lr]
    first = (max if edge == "lower" else min)(added)
    start = (min if edge == "lower" else max)(grid)
    said = capsys.readouterr().err
    assert f"sgd on mlp: best lr {start:g} at the {edge} edge; {first:g} added" in said


def test_after_as_many_rates_as_are_allowed_the_best_is_analysed_at_the_edge(study, out, capsys):
    assert run(study([1e-3, 0.01], tuning={"factor": 10.0, "extensions": 1}), out) == 0
    assert rates(out) == [1e-3, 0.01, 0.1]
    assert analysed(out) == [0.1]
    assert best(out) == {"mlp": (0.1, False)}
    said = capsys.readouterr().err
    assert "sgd on mlp: best lr 0.1 at the upper edge; no more are added" in said
    assert "0 of 1 best learning rates are inside their grids" in said


# ---- resuming and extending


def test_a_tuned_study_resumes_in_its_round_and_then_has_nothing_to_do(
    study, out, tmp_path, monkeypatch, capsys
):
    whole = str(tmp_path / "whole")
    assert run(study([1e-3, 0.01]), whole) == 0
    rounds = []

    def stop(plan, ledger, interrupt):
        rounds.append([len(plan.packs), plan.only_trains])
        if len(rounds) == 3:
            return False
        return run_serially(plan, ledger, interrupt)

    monkeypatch.setattr(flows.study, "run_serially", stop)
    assert run(study([1e-3, 0.01]), out) == 130
    assert "state: interrupted" in describe(out)
    assert run(study([1e-3, 0.01]), out) == 0
    # It goes on with the fourth rate, which was added and not trained; the last round analyses.
    assert rounds == [[2, True], [3, True], [4, True], [4, True], [5, True], [5, False]]
    assert keys(out) == keys(whole)
    capsys.readouterr()
    assert run(study([1e-3, 0.01]), out) == 0
    assert len(rounds) == 6
    assert "is complete: nothing to do" in capsys.readouterr().err
    assert "1 of 1 best learning rates are inside their grids" in dry_run(study([1e-3, 0.01]), out)


def test_seeds_that_are_added_train_at_every_rate_and_nothing_analysed_is_withdrawn(study, out, monkeypatch):
    assert run(study([1e-3, 0.01], seeds=1), out) == 0
    before, tried = keys(out), rates(out)

    def other_best(runs):  # as if the second seed had changed it
        found = edges(runs)
        own = runs[runs["lr"] == 0.1].iloc[0]
        return found.assign(setting_id=own["setting_id"], lr=own["lr"])

    monkeypatch.setattr("lossray.findings.learning_rates.edges", other_best)
    assert run(study([1e-3, 0.01], seeds=2), out) == 0
    assert keys(out) > before
    assert rates(out) == tried
    assert len(lossray.open_study(out).table("runs")) == 2 * len(tried)
    assert analysed(out) == [0.1, 1.0]  # of both seeds, and of the first
    before = keys(out)
    assert run(study([1e-3, 0.01], seeds=2), out) == 0
    assert keys(out) == before


def test_a_store_may_be_tuned_later_and_keeps_what_it_has(study, out):
    assert run(study([0.3, 1.0], tuning={}), out) == 0
    before = keys(out)
    assert analysed(out) == [0.3, 1.0]
    assert run(study([0.3, 1.0]), out) == 0
    assert keys(out) > before
    assert rates(out) == [0.3, 1.0, 10.0]
    assert best(out) == {"mlp": (1.0, True)}
    assert analysed(out) == [0.3, 1.0]


def test_without_the_section_a_tuned_store_has_all_that_it_has_trained_analysed(study, out):
    assert run(study([0.3, 1.0]), out) == 0
    assert analysed(out) == [1.0]
    before = keys(out)
    assert run(study([0.3, 1.0], tuning={}), out) == 0
    assert keys(out) > before
    assert analysed(out) == rates(out) == [0.3, 1.0, 10.0]


def test_a_training_that_fails_is_no_rate_that_was_tried_and_is_tried_again(study, out, monkeypatch, capsys):
    def train(job):
        if job.pack.optimizer.lr == 30.0:
            raise RuntimeError("no such luck")
        yield from train_pack(job)

    with monkeypatch.context() as patch:
        patch.setattr(flows.serial, "train_pack", train)
        assert run(study([0.3, 1.0, 30.0]), out) == 1
    said = capsys.readouterr().err
    assert said.count("no such luck") == 1  # not in every round
    assert "best lr 1 at the upper edge; 10 added" in said
    assert analysed(out) == [1.0]
    assert run(study([0.3, 1.0, 30.0]), out) == 0
    runs = lossray.open_study(out).table("runs")
    assert "failed" not in set(runs["status"])


def test_dry_run_says_what_is_tuned(study):
    text = dry_run(study([1e-3, 0.01], tuning={"factor": 10.0, "extensions": 4}), None)
    assert "the best of each of 1 grids is analysed" in text
    assert "up to 4 rates are added, a factor of 10 each: 8 settings at most" in text
    assert "  sgd: lr 0.001, 0.01" in text


# ---- the next round, from planted runs


TABLE = {
    "name": "planted",
    "seeds": 2,
    "models": [{"name": "mlp", "widths": [4]}, {"name": "mlp", "widths": [8]}],
    "optimizers": [{"name": "adam", "lr": [0.1, 0.3]}, {"name": "sgd", "lr": 1.0}],
    "tuning": {"extensions": 2},
}


def planted_round(losses, *, extra=(), **changes):
    """The round after these validation losses, by optimizer, width and rate; what has none has diverged."""
    tuned = study_from_table(TABLE | changes)
    added = [
        setting_of(tuned, tuned.models[width == 8].alone, optimizer_settings({"name": name, "lr": lr}))
        for name, width, lr in extra
    ]
    settings = [*settings_of(tuned), *added]
    packs = partition(tuned, (), lambda setting: ("vmap", "reverse"), settings=settings)
    rows = [
        row | {"status": "diverged" if loss is None else "finished", "validation_loss": loss}
        for pack in packs
        for row in failed_run_rows(pack, tuned, "")
        for loss in [losses.get((pack.optimizer.name, pack.model.widths[0], pack.optimizer.lr))]
    ]
    tuning = round_of(tuned, packs, pd.DataFrame(rows))
    known = {pack.setting_id for pack in packs}
    new = [
        (own.optimizer.name, own.model.widths[0], own.optimizer.lr)
        for own in tuning.settings
        if own.setting_id not in known
    ]
    return tuning, sorted(new)


def test_rates_are_added_for_the_model_that_needs_them():
    losses = {("adam", 4, 0.1): 2.0, ("adam", 4, 0.3): 1.0, ("adam", 8, 0.1): 1.0, ("adam", 8, 0.3): 2.0}
    tuning, new = planted_round(losses | {("sgd", 4, 1.0): 1.0})
    assert new == [
        ("adam", 4, 0.9),
        ("adam", 8, 0.0333333333333),
        ("sgd", 4, 0.333333333333),
        ("sgd", 4, 3.0),
        ("sgd", 8, 0.333333333333),  # where every run has diverged, only a smaller rate can help
    ]
    assert (tuning.settled, tuning.analysed) == (False, frozenset())
    assert set(tuning.lines) == {
        "adam on mlp widths=4: best lr 0.3 at the upper edge; 0.9 added",
        "adam on mlp widths=8: best lr 0.1 at the lower edge; 0.0333333 added",
        "sgd on mlp widths=4: best lr 1 at the lower and the upper edge; 0.333333 and 3 added",
        "sgd on mlp widths=8: every run has diverged; 0.333333 added",
    }


def test_rates_that_were_added_are_tuned_as_the_others_and_counted_at_their_end():
    inside = {("adam", 8, 0.1): 1.0, ("adam", 8, 0.3): 2.0, ("sgd", 4, 1.0): 1.0, ("sgd", 8, 1.0): 1.0}
    around = [(name, width, lr) for name, width in (("sgd", 4), ("sgd", 8)) for lr in (0.5, 2.0)]
    extra = [*around, ("adam", 8, 0.05), ("adam", 4, 0.9), ("adam", 4, 2.7)]
    losses = inside | {
        ("adam", 4, 0.1): 4.0,
        ("adam", 4, 0.3): 3.0,
        ("adam", 4, 0.9): 2.0,
        ("adam", 4, 2.7): 1.0,
    }
    tuning, new = planted_round(losses, extra=extra)
    assert (new, tuning.settled) == ([], True)
    assert tuning.lines == (
        "adam on mlp widths=4: best lr 2.7 at the upper edge; no more are added",
        "3 of 4 best learning rates are inside their grids",
    )
    chosen = [own for own in tuning.settings if own.setting_id in tuning.analysed]
    found = {(own.optimizer.name, own.model.widths[0], own.optimizer.lr) for own in chosen}
    assert found == {("adam", 4, 2.7), ("adam", 8, 0.1), ("sgd", 4, 1.0), ("sgd", 8, 1.0)}


def test_what_is_tried_with_other_settings_is_another_grid():
    adam = {"name": "adam", "lr": [0.1, 0.3, 0.9], "weight_decay": [0.0, 0.5]}
    losses = {("adam", 4, lr): loss for lr, loss in ((0.1, 2.0), (0.3, 1.0), (0.9, 2.0))}
    models = TABLE["models"][:1]
    tuning, new = planted_round(losses, models=models, optimizers=[adam])
    assert (new, tuning.settled, len(tuning.analysed)) == ([], True, 1)


# ---- settings


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"factor": 1.0}, "tuning.factor: found 1.0; allowed: a number greater than 1"),
        ({"extensions": -1}, "tuning.extensions: found -1; allowed: a number of at least 0"),
        ({"extensions": 1.5}, "tuning.extensions: found 1.5; allowed: an integer"),
        (
            {"factors": 2.0},
            "tuning.factors: unknown key; allowed: factor, extensions; did you mean 'factor'?",
        ),
    ],
)
def test_a_bad_setting_is_named(study, out, tuning, message):
    with pytest.raises(StudyError, match=re.escape(message)):
        run(study([0.1, 0.3], tuning=tuning), out)


def test_recorded_runs_are_not_tuned(study_file, out):
    recorded = study_file(source="checkpoints", seeds=None, optimizers=None, tuning={"factor": 2.0})
    with pytest.raises(StudyError, match=r"tuning: found beside source = 'checkpoints'"):
        run(recorded, out)


def test_the_section_is_in_no_key():
    plain = study_from_table({key: value for key, value in TABLE.items() if key != "tuning"})
    tuned = study_from_table(TABLE)
    inputs = StudyInputs("data")
    plans = [
        make_plan(
            Context("memory://x", own, "", "data", {}),
            partition(own, (), lambda setting: ("vmap", "reverse")),
            inputs,
        )
        for own in (plain, tuned)
    ]
    assert list(plans[0].keys()) == list(plans[1].keys())
