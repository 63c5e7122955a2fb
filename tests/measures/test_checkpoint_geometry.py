"""Gauges, windows, shadows and sharpness of a checkpoint, against dense Hessians and the training itself."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from lossray.measures.pack_point import stack_of
from lossray.networks.symmetry import rescaling_symmetry
from lossray.storage import checkpoints
from lossray.storage.store import Store
from lossray.study.demands import V1_PAIRS
from lossray.training.optimizers import PackedOptimizer
from tasks.planned_data import dataset_of
from tests.tasks.test_analyse_checkpoint import (
    DOUBLE,
    analyse,
    dense,
    frame,
    parameters,
    rows_of,
    run_ids,
    train,
)

RELU = [{"name": "mlp", "widths": [5]}]
EVERY_STEP = {"dtype": "float64", "checkpoints": {"steps": list(range(13))}}


def relu(planned, optimizer="adam", **changes):
    setting = {"name": optimizer, "lr": 0.05}
    return planned(models=RELU, optimizers=[setting], **{**DOUBLE, **changes})


def point_of(plan, step):
    """Stack, theta [R, d] and optimizer of the pack at a step."""
    store, pack = Store(plan.context.out), plan.packs[0].pack
    checkpoint = checkpoints.loads(store.read_bytes(store.checkpoint_path(pack.pack_id, step)))
    dataset = dataset_of(plan.context)
    stack, _, _ = stack_of(pack, dataset, dtype=torch.float64, device=torch.device("cpu"))
    theta = stack.layout.join(checkpoint.parameters)
    optimizer = PackedOptimizer(pack.optimizer, theta, stack.layout)
    optimizer.load_state(checkpoint.optimizer)
    return stack, theta, optimizer


def scales(plan, step):
    """S [R, d] of every gauge, as theory 2.6 defines it."""
    stack, theta, optimizer = point_of(plan, step)
    symmetry = rescaling_symmetry(stack.template, stack.layout)
    return {
        "raw": torch.ones_like(theta),
        "adaptive": theta.abs(),
        "balanced": 1 / symmetry.diagonal(symmetry.balance_factors(theta)),
        "preconditioned": optimizer.scale().rsqrt(),
    }


def leading(hessian, scale):
    """Eigenvectors of S H S as rows, leading first."""
    scale = scale.numpy()
    return np.linalg.eigh(scale[:, None] * hessian * scale)[1].T[::-1]


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_angles_in_every_gauge_are_those_to_the_dense_eigenvectors(planned, optimizer):
    plan = relu(planned, optimizer)
    train(plan)
    analyse(plan, 1)
    angles = frame(plan, "angles")
    assert set(angles["gauge"]) == {"raw", "balanced", "adaptive", "preconditioned"}
    known = scales(plan, 1)
    for r, run_id in enumerate(run_ids(plan)):
        exact = dense(plan, run_id, 1)
        taken = (parameters(plan, r, 2) - parameters(plan, r, 1)).numpy()
        for gauge, scale in known.items():
            basis, own = leading(exact.hessian, scale[r]), scale[r].numpy()
            for direction, u in (("gradient", own * exact.gradient), ("update", taken / own)):
                rows = rows_of(angles, run_id=run_id, gauge=gauge, direction=direction)
                assert set(rows["subspace"]) == {"v1", "top2", "top3", "top5", "top6", "vmin"}
                for row in rows.to_dict("records"):
                    space = basis[-1:] if row["subspace"] == "vmin" else basis[: row["k"]]
                    energy = np.square(space @ u).sum() / (u @ u)
                    assert row["energy"] == pytest.approx(energy, rel=1e-4, abs=1e-9), (
                        gauge,
                        row["subspace"],
                    )
                    flips = (np.square(u) * np.square(space).sum(axis=0)).sum() / (u @ u)
                    assert row["sign_flip_null"] == pytest.approx(flips, rel=1e-4, abs=1e-9)
                    assert (row["dim"], row["dropped"]) == (len(u), 0)


def test_for_plain_descent_the_preconditioned_gauge_is_the_raw_one(planned):
    plan = relu(planned, "sgd")
    train(plan)
    analyse(plan, 1)
    for table in ("angles", "alignment"):
        rows = frame(plan, table).drop(columns="gauge")
        raw = frame(plan, table)["gauge"] == "raw"
        same = frame(plan, table)["gauge"] == "preconditioned"
        assert raw.sum() == same.sum() > 0
        assert rows[raw].reset_index(drop=True).equals(rows[same].reset_index(drop=True))


@pytest.mark.parametrize("directions", [[], ["gradient"]])
def test_for_plain_descent_the_preconditioned_sharpness_is_lambda_max(planned, directions):
    plan = relu(planned, "sgd", angles={"window": 0, "directions": directions})
    train(plan)
    analyse(plan, 1)
    rows = frame(plan, "sharpness")
    assert rows["lambda_max"].notna().all()
    assert rows["preconditioned_lambda_max"].equals(rows["lambda_max"].rename("preconditioned_lambda_max"))
    assert rows["preconditioned_lr"].equals(rows["lambda_max_lr"].rename("preconditioned_lr"))


def test_a_window_is_the_training_that_followed(planned):
    plan = relu(planned, training=EVERY_STEP, angles={"window": 9})
    train(plan)
    analyse(plan, 3)
    alignment = frame(plan, "alignment")
    assert set(alignment["direction"]) == {
        "minibatch_gradient",
        "momentum",
        "update",
        "preconditioned_gradient",
    }
    known = scales(plan, 3)
    for r, run_id in enumerate(run_ids(plan)):
        hessian = dense(plan, run_id, 3).hessian
        for gauge, scale in known.items():
            v1, inside, total = leading(hessian, scale[r])[0], 0.0, 0.0
            for step in range(3, 12):
                u = (parameters(plan, r, step + 1) - parameters(plan, r, step)).numpy() / scale[r].numpy()
                inside, total = inside + (v1 @ u) ** 2, total + u @ u
            (row,) = rows_of(
                alignment, run_id=run_id, gauge=gauge, direction="update", subspace="v1"
            ).to_dict("records")
            assert row["log_energy"] == pytest.approx(math.log(inside / total), rel=1e-4, abs=1e-5)
            assert row["steps"] == 9
            null = placebo(plan, r, range(3, 12), v1, scale[r].numpy())
            assert row["isotropic_null"] == pytest.approx(null, abs=0.12)


def placebo(plan, member, steps, v1, scale, draws=4_000):
    """Mean of S over random turns of the updates: their Gram matrix kept, gaussian directions."""
    moves = torch.stack(
        [parameters(plan, member, step + 1) - parameters(plan, member, step) for step in steps]
    )
    values, vectors = np.linalg.eigh((moves @ moves.T).numpy())
    root = vectors * np.sqrt(values.clip(min=0))
    z = np.random.default_rng(0).normal(size=(draws, len(moves), len(scale)))
    turned = root @ z / scale
    return np.log(np.square(turned @ v1).sum(axis=1) / np.square(turned).sum(axis=(1, 2))).mean()


def test_of_v1_alone_two_pairs_are_computed_and_its_rows_are_those_of_all(planned):
    rows, pairs = [], []
    for name in ("all", "v1"):
        plan = relu(
            partial(planned, name),
            training=EVERY_STEP,
            curvature={**DOUBLE["curvature"], "top": 1},
            angles={"window": 5, "subspaces": name},
        )
        train(plan)
        analyse(plan, 3)
        rows.append({table: frame(plan, table) for table in ("angles", "alignment")})
        pairs.append(frame(plan, "eigenvalues").groupby("run_id").size().max())
    assert pairs[1] == V1_PAIRS + 1 < pairs[0]  # and the smallest
    for table, energy in (("angles", "energy"), ("alignment", "log_energy")):
        of_all, own = (found[table] for found in rows)
        assert {"v1"} < set(own["subspace"]) < set(of_all["subspace"]) or table == "alignment"
        keys = ["run_id", "direction", "gauge", "subspace"]
        both = own.merge(of_all, on=keys, validate="1:1")
        assert len(both) == len(own)
        assert (own["subspace"] == "v1").sum() == (of_all["subspace"] == "v1").sum() > 0
        known = both[(both["resolved_x"] == True) & (both["resolved_y"] == True)]  # noqa: E712
        assert len(known) > 0
        assert known[f"{energy}_x"].to_numpy() == pytest.approx(known[f"{energy}_y"].to_numpy(), rel=1e-2)


def test_momentum_in_a_window_is_the_buffer_after_each_step(planned):
    plan = relu(planned, "momentum", training=EVERY_STEP, angles={"window": 4})
    train(plan)
    analyse(plan, 5)
    v1 = {run_id: dense(plan, run_id, 5).vectors[0] for run_id in run_ids(plan)}
    buffers = [point_of(plan, step)[2].momentum() for step in (6, 7, 8, 9)]
    rows = rows_of(frame(plan, "alignment"), direction="momentum", gauge="raw", subspace="v1")
    for row in rows.to_dict("records"):
        own = [buffer[run_ids(plan).index(row["run_id"])].numpy() for buffer in buffers]
        ratio = sum((v1[row["run_id"]] @ m) ** 2 for m in own) / sum(m @ m for m in own)
        assert row["log_energy"] == pytest.approx(math.log(ratio), rel=1e-6)


def test_no_window_no_alignment_and_without_directions_no_angles(planned):
    plan = relu(planned, angles={"window": 0})
    train(plan)
    analyse(plan, 1)
    assert len(frame(plan, "alignment")) == 0
    assert len(frame(plan, "angles")) > 0
    bare = relu(lambda **changes: planned("bare", **changes), angles={"window": 0, "directions": []})
    train(bare)
    analyse(bare, 1)
    assert len(frame(bare, "angles")) == len(frame(bare, "directions")) == 0
    assert frame(bare, "sharpness")["preconditioned_lambda_max"].notna().all()


def test_a_shadow_of_the_same_optimizer_has_the_update_of_the_run(planned):
    plan = planned(
        models=RELU, optimizers=[{"name": "adam", "lr": 1e-3}], **DOUBLE, angles={"shadow": ["adam", "sgd"]}
    )
    train(plan)
    analyse(plan, 0, 2)
    for table, columns in (("directions", ["norm", "curvature"]), ("alignment", ["log_energy"])):
        rows = frame(plan, table)
        own = rows_of(rows, direction="update").reset_index(drop=True)
        shadow = rows_of(rows, direction="shadow:adam").reset_index(drop=True)
        assert len(own) == len(shadow) > 0
        for column in columns:
            np.testing.assert_allclose(shadow[column], own[column], rtol=1e-9)
    assert set(rows_of(frame(plan, "angles"), direction="shadow:sgd")["gauge"]) >= {"raw", "balanced"}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sharpness_is_that_of_the_dense_hessians(planned, optimizer):
    plan = relu(planned, optimizer)
    train(plan)
    analyse(plan, 1)
    scale = scales(plan, 1)["preconditioned"]
    for row in frame(plan, "sharpness").to_dict("records"):
        exact = dense(plan, row["run_id"], 1)
        own = scale[run_ids(plan).index(row["run_id"])].numpy()
        largest = np.linalg.eigvalsh(own[:, None] * exact.hessian * own)[-1]
        assert row["lambda_max_lr"] == pytest.approx(0.05 * exact.values[0], rel=1e-6)
        assert row["preconditioned_lr"] == pytest.approx(0.05 * largest, rel=1e-6)
        assert row["threshold"] == pytest.approx(2 if optimizer == "sgd" else 38)
        assert (row["lr"], row["batches"]) == (0.05, 16)
        assert row["batch_sharpness_stderr"] > 0


def test_with_full_batches_the_batch_sharpness_is_the_curvature_along_the_gradient(planned):
    plan = relu(planned, "sgd", training={**DOUBLE["training"], "batch_size": "full"})
    train(plan)
    analyse(plan, 1)
    curvature = rows_of(frame(plan, "directions"), direction="gradient")["curvature"].to_numpy()
    rows = frame(plan, "sharpness")
    np.testing.assert_allclose(rows["batch_sharpness"], curvature, rtol=1e-9)
    assert rows["batch_sharpness_stderr"].tolist() == [0, 0]
    assert rows["batches"].tolist() == [1, 1]


def test_before_the_first_step_there_is_no_preconditioned_gauge_and_for_muon_never(planned):
    plan = relu(planned)
    train(plan)
    analyse(plan, 0)
    assert set(frame(plan, "angles")["gauge"]) == {"raw", "balanced", "adaptive"}
    assert frame(plan, "sharpness")["preconditioned_lr"].isna().all()
    muon = relu(lambda **changes: planned("muon", **changes), "muon")
    train(muon)
    analyse(muon, 1)
    assert "preconditioned" not in set(frame(muon, "angles")["gauge"])
    assert frame(muon, "sharpness")["threshold"].isna().all()


def test_shares_say_what_lies_within_and_across_layers(planned):
    plan = relu(planned, angles={"layers": True, "window": 0})
    train(plan)
    analyse(plan, 1)
    rows = frame(plan, "shares").query("direction == 'gradient'")
    sizes = [7 * 5, 6 * 3]
    for run_id, own in rows.groupby("run_id"):
        exact = dense(plan, run_id, 1)
        g, start = exact.gradient, 0
        for row, size in zip(own.sort_values("block").to_dict("records"), sizes, strict=True):
            part = slice(start, start + size)
            block = g[part] @ exact.hessian[part, part] @ g[part] / (g @ g)
            assert row["curvature_within"] == pytest.approx(block, rel=1e-9)
            assert row["curvature_within"] + row["curvature_across"] == pytest.approx(row["curvature_part"])
            start += size
    other = relu(lambda **changes: planned("without", **changes), angles={"window": 0})
    train(other)
    analyse(other, 1)
    without = frame(other, "shares")
    added = ["curvature_within", "curvature_across"]
    assert without[added].isna().all(axis=None)
    assert without.drop(columns=added).equals(frame(plan, "shares").drop(columns=added))


def test_shares_add_up_to_the_whole(planned):
    plan = relu(planned)
    train(plan)
    analyse(plan, 1)
    shares = frame(plan, "shares").groupby(["run_id", "direction"])
    directions = frame(plan, "directions").set_index(["run_id", "direction"])
    assert set(frame(plan, "shares")["block"]) == {"hidden1", "output"}
    np.testing.assert_allclose(shares["energy_share"].sum(), 1, rtol=1e-12)
    parts = shares["curvature_part"].sum()
    np.testing.assert_allclose(parts, directions["curvature"].loc[parts.index], rtol=1e-9)
