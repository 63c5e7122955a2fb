"""The comparison of two checkpoints against dense float64 Hessians, and against the update of one step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

import lossray
from lossray.errors import StoreError
from lossray.networks.losses import get_loss
from lossray.storage import checkpoints
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from tasks.analyse_checkpoint import analyse_checkpoint
from tasks.compare_checkpoints import compare_checkpoints
from tasks.jobs import Attempt
from tasks.train_pack import train_pack

DOUBLE = {
    "training": {"dtype": "float64", "checkpoints": {"steps": [0, 1, 2, 12]}},
    "curvature": {"dtype": "float64", "top": 7, "tolerance": 1e-9},
}
SIZES = [1, 2, 3, 5, 6, 7, 10]  # three classes, `top`, 5 and 10


def prepare(plan):
    """Train the one pack of a plan and analyse its checkpoints."""
    list(train_pack(plan.training_job(plan.packs[0], Attempt())))
    for step in plan.packs[0].curvature_keys:
        analyse_checkpoint(plan.curvature_job(plan.packs[0], step))


def compare(plan, *pairs):
    for steps in pairs or plan.packs[0].pair_keys:
        compare_checkpoints(plan.pair_job(plan.packs[0], steps))


def frame(plan, table):
    return assemble(Store(plan.context.out), table).to_pandas()


def records(plan, table):
    return assemble(Store(plan.context.out), table).to_pylist()


def displaced(plan, table):
    return [row for row in records(plan, table) if row["direction"] == "displacement"]


def run_ids(plan):
    return plan.packs[0].pack.run_ids


def checkpoint_of(plan, step):
    store = Store(plan.context.out)
    path = store.checkpoint_path(plan.packs[0].pack.pack_id, step)
    return path, checkpoints.loads(store.read_bytes(path))


def vectors_path(plan, step):
    store = Store(plan.context.out)
    return store.vectors_path(plan.packs[0].pack.pack_id, step)


def parameters(plan, run_id, step):
    _, checkpoint = checkpoint_of(plan, step)
    own = [tensor[run_ids(plan).index(run_id)].flatten() for tensor in checkpoint.parameters.values()]
    return torch.cat(own).double()


def surface(plan, run_id, step):
    """Gradient [d], Hessian [d, d] by double backward, and its eigenvectors as rows, leading first."""
    study = lossray.open_study(plan.context.out)
    model = study.model(run_id, step).double()
    inputs, targets = (t.double() if t.is_floating_point() else t for t in study.data("train"))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    loss = get_loss(plan.study.training.loss)

    def value(theta):
        pieces = torch.split(theta, [shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return loss(functional_call(model, named, (inputs,)), targets)

    theta = parameters(plan, run_id, step).requires_grad_()
    (gradient,) = torch.autograd.grad(value(theta), theta)
    hessian = torch.autograd.functional.hessian(value, theta.detach())
    _, vectors = torch.linalg.eigh(hessian)
    return gradient.numpy(), hessian.numpy(), vectors.T.flip(0).numpy()


# ---- against dense Hessians


def test_overlaps_are_those_of_the_dense_eigenvectors(planned):
    plan = planned(**DOUBLE)
    prepare(plan)
    compare(plan)
    overlaps = records(plan, "overlaps")
    assert len(overlaps) == 2 * 3 * len(SIZES)
    bases = {(r, step): surface(plan, r, step)[2] for r in run_ids(plan) for step in (0, 1, 2, 12)}
    for row in overlaps:
        k, run_id = row["k"], row["run_id"]
        before, after = bases[run_id, row["previous_step"]], bases[run_id, row["step"]]
        expected = np.square(before[:k] @ after[:k].T).sum() / k
        assert row["subspace_overlap"] == pytest.approx(expected, abs=2e-6)  # the vectors are float32
        assert row["chance"] == k / row["dim"] == k / before.shape[1]
        assert (row["operator"], row["block"]) == ("hessian", "all")
    assert {(row["previous_step"], row["step"]) for row in overlaps} == {(0, 1), (1, 2), (2, 12)}
    assert {row["k"] for row in overlaps} == set(SIZES)
    far = [row["subspace_overlap"] for row in overlaps if row["step"] == 12 and row["k"] == 1]
    assert max(far) < 0.999  # it does turn
    assert all(row["resolved"] for row in overlaps if row["k"] == 1)


def test_the_displacement_is_held_against_the_surface_at_its_start(planned):
    plan = planned(**DOUBLE)
    prepare(plan)
    compare(plan, (2, 12))
    directions, angles = displaced(plan, "directions"), displaced(plan, "angles")
    assert [(row["run_id"], row["step"]) for row in directions] == [(r, 2) for r in run_ids(plan)]
    assert {row["subspace"] for row in angles} == {"v1", "top2", "top3", "top5", "top6", "vmin"}
    angles = [row for row in angles if row["gauge"] == "raw" and row["subspace"] != "vmin"]
    for row in directions:
        run_id = row["run_id"]
        u = (parameters(plan, run_id, 12) - parameters(plan, run_id, 2)).numpy()
        gradient, hessian, vectors = surface(plan, run_id, 2)
        assert row["norm"] == pytest.approx(np.linalg.norm(u), rel=1e-12)
        assert row["curvature"] == pytest.approx(u @ hessian @ u / (u @ u), rel=1e-9)
        cosine = u @ gradient / np.linalg.norm(u) / np.linalg.norm(gradient)
        assert row["cosine_with_gradient"] == pytest.approx(cosine, rel=1e-9)
        own = [angle for angle in angles if angle["run_id"] == run_id]
        assert len(own) == 5
        for angle in own:
            energy = np.square(vectors[: angle["k"]] @ u).sum() / (u @ u)
            assert angle["energy"] == pytest.approx(energy, rel=1e-5)
            assert (angle["step"], angle["gauge"]) == (2, "raw")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_over_one_step_the_displacement_is_the_update(planned, optimizer):
    plan = planned(optimizers=[{"name": optimizer, "lr": 0.05, "weight_decay": 0.1}], **DOUBLE)
    prepare(plan)
    compare(plan)
    numbers = {
        "directions": ["norm", "curvature", "cosine_with_gradient"],
        "angles": ["cosine", "energy", "null_ratio", "null_p", "k", "dim", "resolved"],
    }
    for table, columns in numbers.items():
        rows = frame(plan, table).query("step in (0, 1)")
        ours = rows[rows["direction"] == "displacement"].reset_index(drop=True)
        theirs = rows[rows["direction"] == "update"].reset_index(drop=True)
        assert len(ours) == len(theirs) > 0
        for column in columns:
            expected, found = theirs[column].astype(float), ours[column].astype(float)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9, err_msg=column)


# ---- what the study asks for


def test_without_stored_vectors_there_is_the_displacement_and_nothing_else(planned):
    plain, bare = planned("plain"), planned("bare", curvature={"vectors": False})
    for plan in (plain, bare):
        prepare(plan)
        compare(plan)
    assert len(frame(bare, "overlaps")) == 0
    assert displaced(bare, "angles") == []
    assert displaced(bare, "directions") == displaced(plain, "directions") != []
    kinds = frame(bare, "tasks").set_index("kind")["tables"]
    assert set(kinds["pair"]) == {"directions,shares"}


def test_without_the_displacement_there_are_overlaps_and_no_hessian_is_formed(planned, monkeypatch):
    plan = planned(angles={"directions": ["update"]})
    prepare(plan)
    monkeypatch.setattr("lossray.measures.neighbours.hessian_at", None)
    compare(plan)
    assert displaced(plan, "directions") == displaced(plan, "angles") == []
    assert len(frame(plan, "overlaps")) > 0


# ---- members that have diverged


def bury(plan, step, member):
    """The member has diverged before the checkpoint, where it keeps its last finite parameters."""
    path, checkpoint = checkpoint_of(plan, step)
    alive = checkpoint.alive.clone()
    alive[member] = False
    Store(plan.context.out).write_bytes(path, checkpoints.dumps(replace(checkpoint, alive=alive)))
    analyse_checkpoint(plan.curvature_job(plan.packs[0], step))


KNOWN = {  # whatever becomes of the member
    *("run_id", "step", "previous_step", "operator", "block", "k", "dim", "chance"),
    *("direction", "gauge", "subspace", "dropped"),
}


def known(table, *, alive_at_first):
    """What a row of a dead member holds; the earlier subspaces of `angles` are as resolved as they were."""
    return KNOWN | {"resolved"} if table == "angles" and alive_at_first else KNOWN


@pytest.mark.parametrize("step", [0, 5])
def test_a_member_that_is_dead_at_either_end_has_null_rows_and_changes_no_bit_of_the_others(planned, step):
    clean, buried = (planned(out, seeds=[3, 8, 9]) for out in ("clean", "buried"))
    for plan in (clean, buried):
        prepare(plan)
    bury(buried, step, 1)
    for plan in (clean, buried):
        compare(plan, (0, 5))
    victim = run_ids(clean)[1]
    for table in ("overlaps", "directions", "angles"):
        before, after = (
            [row for row in records(plan, table) if row.get("direction", "displacement") == "displacement"]
            for plan in (clean, buried)
        )
        assert len(before) == len(after) > 0
        for old, new in zip(before, after, strict=True):
            if old["run_id"] == victim:
                kept = known(table, alive_at_first=step == 5)
                assert new == {name: value if name in kept else None for name, value in old.items()}
            else:
                assert new == old


def test_a_pack_whose_members_have_all_diverged_gives_null_rows(planned):
    plan = planned(optimizers=[{"name": "sgd", "lr": 1e12}])
    prepare(plan)
    compare(plan)
    tables = {"overlaps": records(plan, "overlaps")}
    tables |= {name: displaced(plan, name) for name in ("directions", "angles")}
    for name, rows in tables.items():
        assert len(rows) > 0
        for row in rows:
            held = {column for column, value in row.items() if value is not None}
            assert held <= known(name, alive_at_first=row["step"] == 0)


# ---- the store


def test_a_comparison_is_invisible_until_it_is_committed_and_repeats_itself(planned, monkeypatch):
    plan = planned()
    prepare(plan)
    commit = Store.commit

    def die(self, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        compare(plan, (5, 12))
    assert len(frame(plan, "overlaps")) == len(displaced(plan, "directions")) == 0
    store, key = Store(plan.context.out), plan.packs[0].pair_keys[5, 12]
    paths = [store.part_path(table, key) for table in ("angles", "directions", "overlaps", "shares")]
    written = {path: store.read_bytes(path) for path in paths}
    monkeypatch.setattr(Store, "commit", commit)
    compare(plan, (5, 12))
    assert {path: store.read_bytes(path) for path in paths} == written
    (row,) = frame(plan, "tasks").query("kind == 'pair'").to_dict("records")
    assert (row["task_key"], row["step"], row["tables"]) == (key, 12, "angles,directions,overlaps,shares")


@pytest.mark.parametrize("side", [0, 5])
def test_vectors_that_are_missing_damaged_or_not_those_of_the_step_are_refused(planned, side):
    plan = planned()
    prepare(plan)
    store, path = Store(plan.context.out), vectors_path(plan, side)
    sound = store.read_bytes(path)
    for content, says in (
        (None, "does not exist"),
        (sound[:-8], "is damaged: .*; delete it and run the study again"),
        (store.read_bytes(vectors_path(plan, 12)), "is the result of task .*; delete it and run the study"),
    ):
        store.delete(path)
        if content is not None:
            store.write_bytes(path, content)
        with pytest.raises(StoreError, match=f"{path} {says}"):
            compare(plan, (0, 5))
    assert len(frame(plan, "overlaps")) == 0
    store.write_bytes(path, sound)
    compare(plan, (0, 5))
    assert len(frame(plan, "overlaps")) > 0
