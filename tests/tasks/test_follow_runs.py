"""Trajectories and separations of a study's runs against numpy on their checkpoints."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from lossray.geometry.principal_axes import random_walk_shares
from lossray.storage import checkpoints
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from tasks.follow_runs import compare_runs, follow_trajectory
from tasks.jobs import Attempt, SeparationsJob, TrajectoryJob
from tasks.train_pack import train_pack

SECTION = {"trajectory": {}, "seeds": [3, 8, 9]}
STEPS = (0, 2, 5, 12)
TRAINING = {"checkpoints": {"steps": list(STEPS)}}


def train(plan):
    for pack in plan.packs:
        list(train_pack(plan.training_job(pack, Attempt())))


def jobs(plan, kind):
    return [job for pack in plan.packs for job in pack.further.values() if isinstance(job, kind)]


def work(plan):
    for job in jobs(plan, TrajectoryJob):
        follow_trajectory(job)
    for job in jobs(plan, SeparationsJob):
        compare_runs(job)


def records(plan, table):
    return assemble(Store(plan.context.out), table).to_pylist()


def courses(plan):
    """Parameters [T, d] of every run."""
    store, found = Store(plan.context.out), {}
    for pack in plan.packs:
        points = []
        for step in STEPS:
            checkpoint = checkpoints.loads(store.read_bytes(store.checkpoint_path(pack.pack.pack_id, step)))
            points.append(torch.cat([p.double().flatten(1) for p in checkpoint.parameters.values()], dim=1))
        found |= zip(pack.pack.run_ids, torch.stack(points, dim=1).numpy(), strict=True)
    return found


def bury(plan, run_id, step):
    """The run has diverged before the checkpoint."""
    store = Store(plan.context.out)
    pack = next(pack.pack for pack in plan.packs if run_id in pack.pack.run_ids)
    path = store.checkpoint_path(pack.pack_id, step)
    checkpoint = checkpoints.loads(store.read_bytes(path))
    alive = checkpoint.alive.clone()
    alive[pack.run_ids.index(run_id)] = False
    store.write_bytes(path, checkpoints.dumps(replace(checkpoint, alive=alive)))


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


# ---- trajectories


def test_a_trajectory_is_the_svd_of_its_checkpoints(planned):
    plan = planned(**SECTION, training=TRAINING)
    train(plan)
    work(plan)
    rows = records(plan, "trajectory")
    assert len(rows) == 3 * len(STEPS)
    for run_id, points in courses(plan).items():
        own = [row for row in rows if row["run_id"] == run_id]
        assert [row["step"] for row in own] == list(STEPS)
        left, sizes, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
        coordinates = np.array([[row[f"pc{a}"] for a in (1, 2, 3)] for row in own])
        np.testing.assert_allclose(np.abs(coordinates), np.abs(left * sizes)[:, :3], atol=1e-9)
        assert (coordinates[0] < 0).all()
        for row in own:
            shares = [row[f"explained{a}"] for a in (1, 2, 3)]
            np.testing.assert_allclose(shares, (sizes**2 / (sizes**2).sum())[:3], rtol=1e-9)
            walk = [row[f"random_walk{a}"] for a in (1, 2, 3)]
            np.testing.assert_allclose(walk, random_walk_shares(STEPS), rtol=1e-12)
            assert row["dim"] == points.shape[1]


def test_two_checkpoints_have_one_axis(planned):
    plan = planned(**SECTION, training={"checkpoints": {"steps": [0, 12]}})
    train(plan)
    work(plan)
    for row in records(plan, "trajectory"):
        assert row["explained1"] == row["random_walk1"] == pytest.approx(1)
        assert row["pc1"] is not None
        assert {row[f"{name}{a}"] for name in ("pc", "explained", "random_walk") for a in (2, 3)} == {None}


def test_a_run_that_diverges_has_null_rows_from_there_and_changes_no_other(planned):
    clean, buried = (planned(out, **SECTION, training=TRAINING) for out in ("clean", "buried"))
    victim = clean.packs[0].pack.run_ids[1]
    for plan in (clean, buried):
        train(plan)
    bury(buried, victim, 12)
    for plan in (clean, buried):
        work(plan)
    numbers = [f"{name}{a}" for name in ("pc", "explained", "random_walk") for a in (1, 2)]
    for old, new in zip(records(clean, "trajectory"), records(buried, "trajectory"), strict=True):
        if old["run_id"] != victim:
            assert new == old
        elif old["step"] == 12:
            assert {value for name, value in new.items() if name not in ("run_id", "step", "dim")} == {None}
        else:
            assert None not in [new[name] for name in numbers]
            assert (new["pc3"] is None) == (new["random_walk3"] is None) is True  # three are left
    for old, new in zip(records(clean, "separations"), records(buried, "separations"), strict=True):
        if old["step"] == 12 and victim in (old["run_a"], old["run_b"]):
            assert {new[name] for name in ("distance", "cosine", "displacement_cosine")} == {None}
            assert new["dim"] == old["dim"]
        else:
            assert new == old


# ---- separations


@pytest.mark.parametrize("size", [1, 2, 16])
def test_every_two_runs_of_a_setting_are_compared_once_however_they_are_packed(planned, size):
    optimizers = [{"name": "adam", "lr": 0.03}, {"name": "sgd", "lr": 0.1}]
    plan = planned(**SECTION, training=TRAINING, resources={"pack": size}, optimizers=optimizers)
    train(plan)
    work(plan)
    points, rows = courses(plan), records(plan, "separations")
    settings = {pack.pack.setting_id: [] for pack in plan.packs}
    for pack in plan.packs:
        settings[pack.pack.setting_id] += pack.pack.run_ids
    expected = [
        (a, b, step) for runs in settings.values() for a, b in combinations(runs, 2) for step in STEPS
    ]
    assert sorted((row["run_a"], row["run_b"], row["step"]) for row in rows) == sorted(expected)
    for row in rows:
        place = STEPS.index(row["step"])
        a, b = points[row["run_a"]], points[row["run_b"]]
        assert row["distance"] == pytest.approx(np.linalg.norm(a[place] - b[place]), rel=1e-12)
        assert row["cosine"] == pytest.approx(cosine(a[place], b[place]), rel=1e-10)
        if place == 0:
            assert row["displacement_cosine"] is None
        else:
            moved = cosine(a[place] - a[0], b[place] - b[0])
            assert row["displacement_cosine"] == pytest.approx(moved, rel=1e-10)
        assert row["dim"] == a.shape[1]


def test_seeds_that_are_added_add_jobs_and_change_no_key(planned):
    small = planned("small", trajectory={}, seeds=[3, 8], resources={"pack": 1})
    large = planned("large", trajectory={}, seeds=[3, 8, 9], resources={"pack": 1})
    before, after = (
        [(job.kind, job.key) for job in (*jobs(plan, TrajectoryJob), *jobs(plan, SeparationsJob))]
        for plan in (small, large)
    )
    assert set(before) < set(after)
    assert sorted(kind for kind, _ in set(after) - set(before)) == ["separations", "trajectory"]


def test_runs_are_not_compared_where_the_study_says_so(planned):
    plan = planned(seeds=[3, 8], trajectory={"between_seeds": False})
    assert len(jobs(plan, TrajectoryJob)) == 1
    assert jobs(plan, SeparationsJob) == []


def test_both_are_committed_under_their_kinds(planned):
    plan = planned(**SECTION, training=TRAINING)
    train(plan)
    work(plan)
    rows = {row["kind"]: row for row in records(plan, "tasks")}
    for kind in ("trajectory", "separations"):
        assert (rows[kind]["step"], rows[kind]["tables"], rows[kind]["status"]) == (12, kind, "done")
