"""The degeneracy of a pack's checkpoints against dense Hessians, and what it is counted by."""

import math

import numpy as np
import pytest

import lossray
from lossray.networks.losses import get_loss
from tasks.jobs import Attempt, DegeneracyJob
from tasks.measure_degeneracy import measure_degeneracy
from tests.tasks.test_analyse_checkpoint import bury, dense, frame, rows_of, run_ids, train

RELU = [{"name": "mlp", "widths": [5, 4]}]


def measure(plan, step):
    pack = plan.packs[0]
    (key,) = [one.key for one in pack.followers if (one.kind, one.step) == ("degeneracy", step)]
    measure_degeneracy(DegeneracyJob(plan.context, pack.pack, step, key, Attempt()))


def degenerate(planned, **changes):
    section = {"dense_up_to": 300, "checkpoints": "all"} | changes.pop("degeneracy", {})
    plan = planned(**{"models": RELU, "degeneracy": section, **changes})
    train(plan)
    return plan


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_counts_are_those_of_the_dense_hessian_and_of_lossray_degeneracy(planned, loss):
    plan = degenerate(planned, training={"loss": loss})
    measure(plan, 12)
    table = frame(plan, "degeneracy")
    study = lossray.open_study(plan.context.out)
    for run_id in run_ids(plan):
        exact = np.sort(np.abs(dense(plan, run_id, 12).values))
        rows = rows_of(table, run_id=run_id, operator="hessian")
        for row in rows[~rows["at_noise_floor"]].query("tau >= 1e-10").to_dict("records"):
            assert row["nullity"] == (exact <= row["tau"] * exact[-1]).sum(), row["tau"]
            assert (row["method"], row["dtype"], row["dim"]) == ("dense", "float64", len(exact))
        (floor,) = rows[rows["at_noise_floor"]].to_dict("records")
        model = study.model(run_id, 12).double()
        data = tuple(t.double() if t.is_floating_point() else t for t in study.data("train"))
        alone = lossray.degeneracy(lossray.Hessian(model, get_loss(loss), data))
        assert floor["nullity"] == alone.nullity
        assert floor["structural_nullity"] == alone.structural_nullity
        assert floor["noise_floor"] == pytest.approx(alone.noise_floor, rel=0.5)
        assert (None if math.isnan(floor["rank"]) else floor["rank"]) == alone.rank
        assert floor["symmetry_residual"] > 0


def test_the_adaptive_operator_has_the_inertia_of_the_hessian_and_counts_of_its_own(planned):
    plan = degenerate(planned)
    measure(plan, 12)
    rows = frame(plan, "degeneracy")
    floors = rows[rows["at_noise_floor"]].set_index(["run_id", "operator"])
    for run_id in run_ids(plan):
        raw, adaptive = floors.loc[(run_id, "hessian")], floors.loc[(run_id, "adaptive")]
        if not math.isnan(raw["rank"]) and not math.isnan(adaptive["rank"]):
            assert raw["rank"] == adaptive["rank"]
        assert raw["lambda_max"] != adaptive["lambda_max"]
        ggn = floors.loc[(run_id, "ggn")]
        assert ggn["nullity"] >= raw["structural_nullity"]
        assert math.isnan(ggn["excess"])  # more is forced on it than is counted


def test_a_large_network_has_coarse_counts_and_no_rank(planned):
    plan = degenerate(planned, degeneracy={"dense_up_to": 10}, curvature={"probes": 2, "steps": 8})
    measure(plan, 0)
    rows = frame(plan, "degeneracy")
    assert set(rows["method"]) == {"quadrature"}
    assert set(rows["operator"]) == {"hessian"}
    assert sorted(set(rows["tau"])) == [1e-2, 1e-1]
    assert rows["rank"].isna().all()
    assert (rows["nullity"] <= rows["dim"]).all()
    for run_id in run_ids(plan):
        exact = np.abs(dense(plan, run_id, 0).values)
        for row in rows_of(rows, run_id=run_id).to_dict("records"):
            assert row["rank_at_least"] <= (exact > 0.9 * row["threshold"]).sum()


def test_the_bias_of_the_quadrature_is_reported_where_the_truth_is_known(planned):
    plan = degenerate(planned, curvature={"probes": 2, "steps": 8})
    measure(plan, 12)
    rows = rows_of(frame(plan, "degeneracy"), operator="hessian")
    known = rows[rows["quadrature_bias"].notna()]
    assert sorted(set(known["tau"])) == [1e-2, 1e-1]
    assert (known["quadrature_bias"].abs() < known["dim"]).all()


def test_few_examples_give_the_gauss_newton_matrix_exactly_whatever_its_size(planned):
    plan = degenerate(planned, degeneracy={"dense_up_to": 30}, curvature={"examples": 9})
    measure(plan, 12)
    rows = rows_of(frame(plan, "degeneracy"), operator="ggn")
    assert set(rows["method"]) == {"gram"}
    floors = rows[rows["at_noise_floor"]]
    assert (floors["dim"] - floors["nullity"] <= 9 * 2).all()  # N (C - 1)


def test_a_diverged_member_has_no_rows_and_changes_none_of_the_others(planned):
    clean, buried = (
        degenerate(lambda out=out, **changes: planned(out, seeds=[3, 8, 9], **changes))
        for out in ("clean", "buried")
    )
    bury(buried, 5, 1, finite=False)
    for plan in (clean, buried):
        measure(plan, 5)
    victim = run_ids(clean)[1]
    before, after = (frame(plan, "degeneracy") for plan in (clean, buried))
    assert victim not in set(after["run_id"])
    kept = before[before["run_id"] != victim].reset_index(drop=True)
    for column in ("nullity", "structural_nullity", "rank_at_least"):
        assert kept[column].tolist() == after[column].tolist()


def test_members_are_taken_as_the_memory_allows(planned, monkeypatch):
    plan = degenerate(planned)
    measure(plan, 12)
    whole = frame(plan, "degeneracy")
    monkeypatch.setattr("lossray.measures.checkpoint_degeneracy.fitting", lambda size, device: 1)
    other = degenerate(lambda **changes: planned("other", **changes))
    measure(other, 12)
    one_by_one = frame(other, "degeneracy")
    for column in ("run_id", "operator", "nullity", "rank", "structural_nullity"):
        assert whole[column].fillna(-1).tolist() == one_by_one[column].fillna(-1).tolist()


def test_polished_points_have_rows_of_their_own_where_they_are_reached(planned):
    section = {"dense_up_to": 300, "checkpoints": "all", "polish": True}
    plan = degenerate(
        planned,
        models=[{"name": "linear", "widths": [], "bias": True}],
        training={"loss": "mse"},
        degeneracy=section,
    )
    measure(plan, 12)
    rows = frame(plan, "degeneracy")
    assert set(rows["point"]) == {"checkpoint", "polished"}
    there = rows_of(rows, point="polished", operator="hessian")
    assert (there["gradient_norm"] < 1e-8).all()
    here = rows_of(rows, point="checkpoint", operator="hessian")
    assert (here["gradient_norm"] > 1e-8).all()
    assert there["nullity"].tolist() == here["nullity"].tolist()  # the loss is a quadratic


def test_at_a_critical_point_symmetries_are_counted_beyond_the_floor(planned):
    plan = degenerate(
        planned,
        models=[{"name": "linear", "widths": [2]}],
        training={"loss": "mse"},
        degeneracy={"polish": True},
    )
    measure(plan, 12)
    rows = frame(plan, "degeneracy")
    floors = rows_of(rows[rows["at_noise_floor"]], operator="hessian").set_index("point")
    assert (floors.loc[["polished"], "symmetry_residual"] < 1e-8).all()
    assert (floors.loc[["polished"], "excess"] == 2 * 2).all()  # f = B A x = (B M^-1)(M A) x, M of 2 x 2
    assert floors.loc[["polished"], "rank"].notna().all()
    assert (floors.loc[["checkpoint"], "excess"] == 0).all()


def test_the_floor_of_a_large_network_is_a_lower_bound(planned):
    plan = degenerate(planned, degeneracy={"dense_up_to": 10}, curvature={"probes": 2, "steps": 8})
    measure(plan, 12)
    rows = frame(plan, "degeneracy")
    assert (rows["structural_nullity"] > 0).all()
    assert rows["excess"].isna().all()


def test_keys_hold_what_the_counts_depend_on(planned):
    def key(**changes):
        plan = planned("-".join(["out", *changes]), models=RELU, degeneracy={"dense_up_to": 9}, **changes)
        pack = plan.packs[0]
        return {one.step: one.key for one in pack.followers if one.kind == "degeneracy"}

    base = key()
    assert set(base) == {0, 12}  # the first and the last
    assert len(set(base.values())) == 2
    assert key(curvature={"probes": 3}) != base
    assert key(curvature={"steps": 9}) != base
    assert key(curvature={"tolerance": 0.01}) == base
    assert key(angles={"window": 3}) == base
