"""Slices through the checkpoints of a study against its other tables, and its model point by point."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import lossray
from lossray.errors import StoreError
from lossray.networks.losses import get_loss
from lossray.storage import checkpoints
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from tasks.analyse_checkpoint import analyse_checkpoint
from tasks.evaluate_surfaces import evaluate_surfaces
from tasks.follow_runs import follow_trajectory
from tasks.jobs import Attempt, SurfaceJob, TrajectoryJob
from tasks.train_pack import train_pack

KINDS = ("v1", "eigenvectors", "pca", "random")
DOUBLE = {
    "training": {"dtype": "float64"},
    "curvature": {"dtype": "float64", "top": 4, "tolerance": 1e-9, "examples": 40},
}
BRIEF = {"directions": [], "window": 0}  # [angles]: surfaces need none


def prepare(plan):
    for pack in plan.packs:
        list(train_pack(plan.training_job(pack, Attempt())))
    for job in jobs(plan):  # no other checkpoint needs to be analysed
        analyse(plan, job.step)


def analyse(plan, step):
    for pack in plan.packs:
        analyse_checkpoint(plan.curvature_job(pack, step))


def jobs(plan, kind=SurfaceJob):
    return [job for pack in plan.packs for job in pack.further.values() if isinstance(job, kind)]


def work(plan):
    for job in jobs(plan):
        evaluate_surfaces(job)


def frame(plan, table):
    return assemble(Store(plan.context.out), table).to_pandas()


def slices(plan):
    """The rows of every slice by run, step and kind."""
    return dict(list(frame(plan, "surfaces").groupby(["run_id", "step", "kind"])))


def bury(plan, step, member):
    """The member has diverged before the checkpoint, which is analysed again."""
    store, pack = Store(plan.context.out), plan.packs[0]
    path = store.checkpoint_path(pack.pack.pack_id, step)
    checkpoint = checkpoints.loads(store.read_bytes(path))
    alive = checkpoint.alive.clone()
    alive[member] = False
    store.write_bytes(path, checkpoints.dumps(replace(checkpoint, alive=alive)))
    analyse(plan, step)


def value_at(plan, run_id, step, theta):
    """The study's loss on its analysis set at any parameters [d]."""
    study = lossray.open_study(plan.context.out)
    model = study.model(run_id, step)
    vector_to_parameters(theta.to(parameters_to_vector(model.parameters())), model.parameters())
    inputs, targets = study.data("train")
    with torch.no_grad():
        return float(get_loss(plan.study.training.loss)(model(inputs), targets))


def theta_of(plan, run_id, step):
    model = lossray.open_study(plan.context.out).model(run_id, step)
    return parameters_to_vector(model.parameters()).detach().double()


# ---- numbers


def test_the_middle_of_every_slice_is_the_checkpoint(planned):
    plan = planned(angles=BRIEF, surfaces={"points": 5, "seeds": "all", "checkpoints": "all"}, **DOUBLE)
    prepare(plan)
    work(plan)
    found = slices(plan)
    runs = plan.packs[0].pack.run_ids
    assert set(found) == {(run, step, kind) for run in runs for step in (0, 5, 12) for kind in KINDS}
    losses = frame(plan, "curvature").set_index(["run_id", "step"])["loss"]
    for (run_id, step, kind), rows in found.items():
        assert len(rows) == (5 if kind == "v1" else 25)
        assert set(rows["surface_id"]) == {f"{run_id}-{step}-{kind}"}
        (middle,) = rows[(rows["x"] == 0) & (rows["y"] == 0)].to_dict("records")
        assert (middle["i"], middle["j"]) == (2, 0 if kind == "v1" else 2)
        assert middle["loss"] == pytest.approx(losses[run_id, step], rel=1e-12)
        assert np.isfinite(rows["loss"]).all()
        assert rows["accuracy"].between(0, 1).all()
        assert rows["y_norm"].isna().all() == (kind == "v1")


def test_along_eigenvectors_the_loss_bends_as_the_eigenvalues_say(planned):
    """Second differences over a small step; the linear terms cancel."""
    surfaces = {"points": 3, "span": 1e-3, "kinds": ["v1", "eigenvectors"]}
    plan = planned(angles=BRIEF, surfaces=surfaces, **DOUBLE)
    prepare(plan)
    work(plan)
    found, run_id = slices(plan), plan.packs[0].pack.run_ids[0]
    assert {run for run, _, _ in found} == {run_id}  # of the first seed
    eigenvalues = frame(plan, "eigenvalues").query("step == 12 and end == 'largest' and block == 'all'")
    values = eigenvalues[eigenvalues["run_id"] == run_id].set_index("index")["eigenvalue"]
    line = found[run_id, 12, "v1"].set_index("i")
    plane = found[run_id, 12, "eigenvectors"].set_index(["i", "j"])

    def bend(low, middle, high, length):
        return (low - 2 * middle + high) / (1e-3 * length) ** 2

    assert bend(*line["loss"], line["x_norm"][0]) == pytest.approx(values[0], rel=1e-4)
    heights = plane["loss"]
    along_x = bend(*(heights[i, 1] for i in range(3)), plane["x_norm"][0, 0])
    along_y = bend(*(heights[1, j] for j in range(3)), plane["y_norm"][0, 0])
    assert along_x == pytest.approx(values[0], rel=1e-4)
    assert along_y == pytest.approx(values[1], rel=1e-4)
    twist = heights[0, 0] - heights[0, 2] - heights[2, 0] + heights[2, 2]
    assert abs(twist) / (4e-6 * plane["x_norm"][0, 0] * plane["y_norm"][0, 0]) < 1e-4 * values[0]


def test_the_plane_of_the_trajectory_is_that_of_the_table(planned):
    """Three checkpoints span it: from the table's coordinates, every point of the grid can be rebuilt."""
    plan = planned(angles=BRIEF, surfaces={"points": 3, "kinds": ["pca"]}, trajectory={}, **DOUBLE)
    prepare(plan)
    work(plan)
    for job in jobs(plan, TrajectoryJob):
        follow_trajectory(job)
    run_id = plan.packs[0].pack.run_ids[0]
    course = frame(plan, "trajectory").query("run_id == @run_id").set_index("step")[["pc1", "pc2"]]
    thetas = {step: theta_of(plan, run_id, step) for step in (0, 5, 12)}
    moves = torch.stack([thetas[step] - thetas[12] for step in (0, 5)])  # [2, d]
    places = (course.loc[[0, 5]] - course.loc[12]).to_numpy()  # their coordinates [2, 2]
    axes = torch.from_numpy(np.linalg.inv(places)) @ moves  # [2, d] unit vectors
    rows = slices(plan)[run_id, 12, "pca"]
    assert len(rows) == 9
    for row in rows.to_dict("records"):
        move = row["x"] * row["x_norm"] * axes[0] + row["y"] * row["y_norm"] * axes[1]
        assert row["loss"] == pytest.approx(value_at(plan, run_id, 12, thetas[12] + move), rel=1e-9)
    assert (np.abs(places).max(axis=0) < [rows["x_norm"].iloc[0], rows["y_norm"].iloc[0]]).all()


def test_a_surface_repeats_itself_and_is_committed_last(planned, monkeypatch):
    plan = planned(angles=BRIEF, surfaces={"points": 3})
    prepare(plan)
    commit = Store.commit

    def die(self, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        work(plan)
    assert len(frame(plan, "surfaces")) == 0
    store, (job,) = Store(plan.context.out), jobs(plan)
    path = store.part_path("surfaces", job.key)
    written = store.read_bytes(path)
    monkeypatch.setattr(Store, "commit", commit)
    work(plan)
    assert store.read_bytes(path) == written
    (row,) = frame(plan, "tasks").query("kind == 'surfaces'").to_dict("records")
    assert (row["task_key"], row["step"], row["tables"]) == (job.key, 12, "surfaces")


def test_batch_norm_is_at_its_running_statistics(planned):
    model = {"name": "mlp", "widths": [4], "norm": "batch"}
    plan = planned(angles=BRIEF, surfaces={"points": 3}, models=[model], **DOUBLE)
    prepare(plan)
    work(plan)
    run_id = plan.packs[0].pack.run_ids[0]
    losses = frame(plan, "curvature").set_index(["run_id", "step"])["loss"]
    found = slices(plan)
    assert len(found) == len(KINDS)
    for rows in found.values():
        (middle,) = rows[(rows["x"] == 0) & (rows["y"] == 0)]["loss"]
        assert middle == pytest.approx(losses[run_id, 12], rel=1e-12)


# ---- what there is to show


def test_without_stored_vectors_the_eigenvectors_are_left_out(planned):
    plan = planned(angles=BRIEF, surfaces={"points": 3}, curvature={"vectors": False})
    prepare(plan)
    work(plan)
    assert {kind for _, _, kind in slices(plan)} == {"pca", "random"}


def test_two_checkpoints_span_no_plane(planned):
    plan = planned(angles=BRIEF, surfaces={"points": 3}, training={"checkpoints": {"steps": [0, 12]}})
    prepare(plan)
    work(plan)
    assert {kind for _, _, kind in slices(plan)} == {"v1", "eigenvectors", "random"}


def test_ends_are_the_first_and_the_last(planned):
    plan = planned(angles=BRIEF, surfaces={"points": 3, "kinds": ["random"], "checkpoints": "ends"})
    assert [job.step for job in jobs(plan)] == [0, 12]


@pytest.mark.parametrize("step", [5, 12])
def test_a_diverged_run_has_no_slices_and_changes_no_other(planned, step):
    surfaces = {"points": 3, "seeds": "all", "checkpoints": "all"}
    clean, buried = (planned(out, angles=BRIEF, surfaces=surfaces) for out in ("clean", "buried"))
    victim = clean.packs[0].pack.run_ids[1]
    for plan in (clean, buried):
        prepare(plan)
    for later in [5, 12][step == 12 :]:
        bury(buried, later, 1)
    for plan in (clean, buried):
        work(plan)
    before, after = slices(clean), slices(buried)
    assert {run for run, at, _ in after if at >= step} == {clean.packs[0].pack.run_ids[0]}
    for name, rows in after.items():
        if name[0] != victim:
            assert rows.equals(before[name])
    lost = {(at, kind) for run, at, kind in set(before) - set(after) if run == victim}
    assert {kind for at, kind in lost if at < step} == {"pca"}  # too few are left to span it


def test_eigenvectors_that_are_missing_or_of_another_analysis_are_refused(planned):
    plan = planned(angles=BRIEF, surfaces={"points": 3, "kinds": ["v1"]})
    prepare(plan)
    store, pack = Store(plan.context.out), plan.packs[0].pack
    path = store.vectors_path(pack.pack_id, 12)
    analyse(plan, 5)
    store.write_bytes(path, store.read_bytes(store.vectors_path(pack.pack_id, 5)))
    with pytest.raises(StoreError, match=f"{path} is the result of task"):
        work(plan)
    store.delete(path)
    with pytest.raises(StoreError, match=f"{path} does not exist"):
        work(plan)
    assert len(frame(plan, "surfaces")) == 0
