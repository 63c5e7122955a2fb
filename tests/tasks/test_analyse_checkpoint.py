"""The analysis of one checkpoint against dense float64 Hessians, formed here from the study's own model."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

import lossray
from lossray.geometry import vectors
from lossray.networks.losses import get_loss
from lossray.storage import checkpoints
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from tasks.analyse_checkpoint import analyse_checkpoint
from tasks.jobs import Attempt
from tasks.train_pack import train_pack

MODELS = {
    "tanh": {"name": "mlp", "widths": [4], "activation": "tanh"},
    "relu": {"name": "mlp", "widths": [5]},
    "linear": {"name": "linear", "widths": [4]},
    "noisy": {"name": "mlp", "widths": [4], "activation": "tanh", "norm": "batch", "dropout": 0.2},
}
DOUBLE = {
    "training": {"dtype": "float64", "checkpoints": {"steps": [0, 1, 2, 12]}},
    "curvature": {"dtype": "float64", "top": 5, "tolerance": 1e-9},
}
TABLES = (
    "eigenvalues",
    "density",
    "curvature",
    "directions",
    "shares",
    "angles",
    "alignment",
    "sharpness",
)
PAIRS = 10  # that the window of [angles] needs, more than `top` and the subspaces of three classes
OF_ALL_MEMBERS = tuple(name for name in TABLES if name != "density")  # which has no nodes for a dead one


def train(plan):
    list(train_pack(plan.training_job(plan.packs[0], Attempt())))


def analyse(plan, *steps):
    for step in steps or plan.packs[0].curvature_keys:
        analyse_checkpoint(plan.curvature_job(plan.packs[0], step))


def frame(plan, table):
    return assemble(Store(plan.context.out), table).to_pandas()


def run_ids(plan):
    return plan.packs[0].pack.run_ids


def checkpoint_of(plan, step):
    store = Store(plan.context.out)
    path = store.checkpoint_path(plan.packs[0].pack.pack_id, step)
    return path, checkpoints.loads(store.read_bytes(path))


def parameters(plan, member, step):
    _, checkpoint = checkpoint_of(plan, step)
    return torch.cat([own[member].flatten() for own in checkpoint.parameters.values()]).double()


@dataclass
class Dense:
    """The loss surface at one checkpoint of one run, by double backward in float64."""

    loss: float
    gradient: np.ndarray  # [d]
    hessian: np.ndarray  # [d, d]

    def __post_init__(self):
        values, vectors = np.linalg.eigh(self.hessian)
        self.values, self.vectors = values[::-1], vectors.T[::-1]  # descending, rows

    def curvature(self, u):
        return u @ self.hessian @ u / (u @ u)

    def energy(self, u, k):
        """The share of u in the span of the k leading eigenvectors."""
        return float(np.square(self.vectors[:k] @ u).sum() / (u @ u))


def dense(plan, run_id, step):
    study = lossray.open_study(plan.context.out)
    model = study.model(run_id, step).double()
    inputs, targets = (t.double() if t.is_floating_point() else t for t in study.data("train"))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    loss = get_loss(plan.study.training.loss)

    def surface(theta):
        pieces = torch.split(theta, [shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return loss(functional_call(model, named, (inputs,)), targets)

    theta = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    value = surface(theta)
    (gradient,) = torch.autograd.grad(value, theta)
    hessian = torch.autograd.functional.hessian(surface, theta.detach())
    return Dense(value.item(), gradient.numpy(), hessian.numpy())


def rows_of(table, **keys):
    for column, value in keys.items():
        table = table[table[column] == value]
    return table


# ---- against dense Hessians


@pytest.mark.parametrize("model", MODELS)
def test_eigenvalues_are_those_of_the_dense_hessian(planned, model):
    plan = planned(models=[MODELS[model]], **DOUBLE)
    train(plan)
    analyse(plan, 0, 12)
    eigenvalues, curvature = frame(plan, "eigenvalues"), frame(plan, "curvature")
    assert eigenvalues["converged"].all()
    assert curvature["confirmed"].all()
    assert len(eigenvalues) == 2 * 2 * (PAIRS + 1)
    for run_id in run_ids(plan):
        for step in (0, 12):
            exact = dense(plan, run_id, step)
            (smallest,) = rows_of(eigenvalues, run_id=run_id, step=step, end="smallest")["eigenvalue"]
            np.testing.assert_allclose(smallest, exact.values[-1], rtol=1e-6, atol=1e-9)
            found = rows_of(eigenvalues, run_id=run_id, step=step, end="largest")
            assert found["index"].tolist() == list(range(PAIRS))
            np.testing.assert_allclose(found["eigenvalue"], exact.values[:PAIRS], rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(found["gap"].iloc[0], exact.values[0] - exact.values[1], rtol=1e-6)
            ipr = (exact.vectors[0] ** 4).sum()
            np.testing.assert_allclose(found["ipr"].iloc[0], ipr, rtol=1e-5)
            (row,) = rows_of(curvature, run_id=run_id, step=step).to_dict("records")
            assert row["lambda_max"] == found["eigenvalue"].iloc[0]
            assert row["lambda_min"] == smallest
            assert row["loss"] == pytest.approx(exact.loss, rel=1e-10)
            assert row["gradient_norm"] == pytest.approx(np.linalg.norm(exact.gradient), rel=1e-9)
            assert row["dim"] == len(exact.gradient)
            assert row["n_examples"] == len(lossray.open_study(plan.context.out).data("train")[1])


def test_a_float32_analysis_finds_the_same_eigenvalues_to_its_precision(planned):
    plan = planned(curvature={"tolerance": 1e-4})
    train(plan)
    analyse(plan, 12)
    for run_id in run_ids(plan):
        rows = rows_of(frame(plan, "eigenvalues"), run_id=run_id, end="largest")
        found = rows["eigenvalue"]
        assert (rows["product_error"] > 0).all()
        assert (rows["product_error"] < 1e-5 * found.iloc[0]).all()
        exact = dense(plan, run_id, 12)
        assert len(found) == PAIRS  # [curvature] asks for 3
        np.testing.assert_allclose(found, exact.values[:PAIRS], atol=2e-4 * exact.values[0])


def test_the_stored_residual_is_that_of_the_stored_vector(planned):
    plan = planned(
        data={"dim": 30},
        training={"dtype": "float64"},
        curvature={"dtype": "float64", "tolerance": 0.3, "top": 6},
        angles={"window": 0},
    )
    train(plan)
    analyse(plan, 12)
    store, pack = Store(plan.context.out), plan.packs[0].pack
    content = store.read_bytes(store.vectors_path(pack.pack_id, 12))
    stored = vectors.loads(content, key=plan.packs[0].curvature_keys[12])
    assert [name for name in stored if "@" not in name[0]] == [
        ("hessian", "all", "largest"),
        ("hessian", "all", "smallest"),
    ]
    pairs = stored["hessian", "all", "largest"]
    assert pairs.vectors.shape == (2, 6, 30 * 4 + 4 + 4 * 3 + 3)
    seen = []
    for r, run_id in enumerate(run_ids(plan)):
        exact = dense(plan, run_id, 12)
        rows = rows_of(frame(plan, "eigenvalues"), run_id=run_id, end="largest")
        basis = pairs.vectors[r].numpy()
        np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-6)
        for column, kept in {"eigenvalue": pairs.values, "residual": pairs.residuals}.items():
            assert rows[column].tolist() == kept[r].tolist()
        images = basis @ exact.hessian - rows["eigenvalue"].to_numpy()[:, None] * basis
        residuals = np.linalg.norm(images, axis=1)
        np.testing.assert_allclose(rows["residual"], residuals, rtol=1e-3, atol=1e-6)
        assert (rows["converged"] == (rows["residual"] <= 0.3 * exact.values[0])).all()
        seen += residuals.tolist()
    assert max(seen) > 1e-4  # far above the rounding of the stored vectors


@pytest.mark.parametrize("examples", ["all", 20])
def test_the_analysis_set_decides_the_hessian_and_its_fingerprint(planned, examples):
    plan = planned(**DOUBLE | {"curvature": DOUBLE["curvature"] | {"examples": examples}})
    train(plan)
    analyse(plan, 12)
    for row in frame(plan, "curvature").to_dict("records"):
        exact = dense(plan, row["run_id"], 12)
        assert row["lambda_max"] == pytest.approx(exact.values[0], rel=1e-8)
        assert row["n_examples"] == (63 if examples == "all" else 20)
    other = planned("other", **DOUBLE | {"curvature": DOUBLE["curvature"] | {"examples": 30}})
    train(other)
    analyse(other, 12)
    assert set(frame(plan, "curvature")["data_fingerprint"]).isdisjoint(
        frame(other, "curvature")["data_fingerprint"]
    )


# ---- directions


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", ["tanh", "noisy"])
def test_update_is_the_step_that_the_training_then_took(planned, model, optimizer):
    setting = {"name": optimizer, "lr": 0.05, "weight_decay": 0.1, "schedule": "cosine"}
    plan = planned(models=[MODELS[model]], optimizers=[setting], **DOUBLE)
    train(plan)
    analyse(plan, 0, 1)
    updates = rows_of(frame(plan, "directions"), direction="update")
    assert len(updates) == 4
    for row in updates.to_dict("records"):
        r, step = run_ids(plan).index(row["run_id"]), row["step"]
        taken = (parameters(plan, r, step + 1) - parameters(plan, r, step)).numpy()
        exact = dense(plan, row["run_id"], step)
        assert row["norm"] == pytest.approx(np.linalg.norm(taken), rel=1e-9)
        assert row["curvature"] == pytest.approx(exact.curvature(taken), rel=1e-7, abs=1e-9)
        cosine = taken @ exact.gradient / np.linalg.norm(taken) / np.linalg.norm(exact.gradient)
        assert row["cosine_with_gradient"] == pytest.approx(cosine, rel=1e-8)


def test_the_gradient_has_the_curvature_of_the_dense_hessian_along_it(planned):
    plan = planned(**DOUBLE)
    train(plan)
    analyse(plan, 0, 12)
    for row in rows_of(frame(plan, "directions"), direction="gradient").to_dict("records"):
        exact = dense(plan, row["run_id"], row["step"])
        assert row["norm"] == pytest.approx(np.linalg.norm(exact.gradient), rel=1e-9)
        assert row["curvature"] == pytest.approx(exact.curvature(exact.gradient), rel=1e-8)
        assert row["cosine_with_gradient"] == pytest.approx(1, abs=1e-12)


def test_with_full_batches_the_minibatch_gradient_is_the_gradient(planned):
    plan = planned(training=DOUBLE["training"] | {"batch_size": "full"}, curvature=DOUBLE["curvature"])
    train(plan)
    analyse(plan, 12)
    directions = frame(plan, "directions").set_index(["run_id", "direction"])
    for run_id in run_ids(plan):
        ours, theirs = directions.loc[(run_id, "minibatch_gradient")], directions.loc[(run_id, "gradient")]
        assert ours["cosine_with_gradient"] == pytest.approx(1, abs=1e-12)
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-10)


def test_the_minibatch_gradient_of_sgd_points_against_its_update(planned):
    plan = planned(optimizers=[{"name": "sgd", "lr": 0.05}], **DOUBLE)
    train(plan)
    analyse(plan, 2)
    directions = frame(plan, "directions").set_index(["run_id", "direction"])
    for run_id in run_ids(plan):
        update, gradient = directions.loc[(run_id, "update")], directions.loc[(run_id, "minibatch_gradient")]
        assert update["norm"] == pytest.approx(0.05 * gradient["norm"], rel=1e-9)
        assert update["cosine_with_gradient"] == pytest.approx(-gradient["cosine_with_gradient"], rel=1e-9)
        assert abs(gradient["cosine_with_gradient"]) < 0.9999  # a minibatch, not the analysis set


@pytest.mark.parametrize(
    ("optimizer", "buffer"), [("sgd", None), ("momentum", "momentum_buffer"), ("adam", "exp_avg")]
)
def test_momentum_has_rows_only_where_it_exists(planned, optimizer, buffer):
    plan = planned(optimizers=[{"name": optimizer, "lr": 0.05}], **DOUBLE)
    train(plan)
    analyse(plan, 0, 2)
    rows = rows_of(frame(plan, "directions"), direction="momentum")
    assert set(rows["step"]) == ({2} if buffer else set())
    assert "momentum" in set(frame(plan, "angles")["direction"]) or buffer is None
    for row in rows.to_dict("records"):
        state = checkpoint_of(plan, 2)[1].optimizer[buffer][run_ids(plan).index(row["run_id"])]
        assert row["norm"] == pytest.approx(float(state.norm()), rel=1e-12)


def test_only_the_directions_asked_for_are_measured(planned):
    plan = planned(angles={"directions": ["update"]})
    train(plan)
    analyse(plan, 5)
    assert set(frame(plan, "directions")["direction"]) == {"update"}
    assert set(frame(plan, "angles")["direction"]) == {"update"}


def test_angles_are_those_to_the_dense_eigenvectors(planned):
    plan = planned(**DOUBLE)
    train(plan)
    analyse(plan, 1)
    angles = frame(plan, "angles")
    assert set(angles["subspace"]) == {"v1", "top2", "top3", "top5", "top6", "vmin"}  # three classes
    assert angles["resolved"].notna().all()
    assert set(angles["gauge"]) == {"raw", "adaptive", "preconditioned"}  # tanh cannot be rescaled
    angles = angles[(angles["gauge"] == "raw") & (angles["subspace"] != "vmin")]
    for row in angles[angles["direction"].isin(["gradient", "update"])].to_dict("records"):
        exact, r = dense(plan, row["run_id"], 1), run_ids(plan).index(row["run_id"])
        taken = (parameters(plan, r, 2) - parameters(plan, r, 1)).numpy()
        energy = exact.energy(exact.gradient if row["direction"] == "gradient" else taken, row["k"])
        assert row["energy"] == pytest.approx(energy, rel=1e-6)
        assert row["cosine"] == pytest.approx(energy**0.5, rel=1e-6)
        assert row["angle_degrees"] == pytest.approx(np.degrees(np.arccos(energy**0.5)), abs=1e-3)
        assert row["null_ratio"] == pytest.approx(energy * row["dim"] / row["k"], rel=1e-6)
        assert row["null_p"] + row["null_p_lower"] == pytest.approx(1)


# ---- members that have diverged


def bury(plan, step, member, *, finite):
    """The member has diverged before the checkpoint: not alive, and NaN all over unless ``finite``."""
    path, checkpoint = checkpoint_of(plan, step)
    alive = checkpoint.alive.clone()
    alive[member] = False
    for own in (checkpoint.parameters, checkpoint.buffers, checkpoint.optimizer):
        for tensor in own.values():
            if tensor.ndim and tensor.is_floating_point() and not finite:
                tensor[member] = float("nan")
    Store(plan.context.out).write_bytes(path, checkpoints.dumps(replace(checkpoint, alive=alive)))


# What is known of a row before anything is computed; everything else is null for a diverged member.
IDENTITY = {
    *("run_id", "step", "operator", "block", "end", "index", "direction", "gauge", "subspace", "k", "dim"),
    *("n_examples", "data_fingerprint", "reg_included", "product_mode", "dtype"),
    *("dropped", "steps", "block", "lr", "batches", "threshold"),
}


def records(plan, table):
    return assemble(Store(plan.context.out), table).to_pylist()


def identity(row):
    return {name: value for name, value in row.items() if name in IDENTITY}


def computed(row):
    return {name for name, value in row.items() if value is not None} - IDENTITY


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize(("model", "dtype"), [("noisy", "float32"), ("linear", "float64")])
def test_a_diverged_member_has_null_rows_and_changes_no_bit_of_the_others(planned, model, dtype, finite):
    clean, buried = (
        planned(out, models=[MODELS[model]], curvature={"dtype": dtype}, seeds=[3, 8, 9])
        for out in ("clean", "buried")
    )
    for plan in (clean, buried):
        train(plan)
    bury(buried, 5, 1, finite=finite)
    for plan in (clean, buried):
        analyse(plan, 5)
    victim = run_ids(clean)[1]
    for table in TABLES:
        before, after = records(clean, table), records(buried, table)
        assert [row for row in after if row["run_id"] != victim] == [
            row for row in before if row["run_id"] != victim
        ]
        if table in OF_ALL_MEMBERS:
            assert list(map(identity, after)) == list(map(identity, before))
        assert all(computed(row) for row in before), table
        assert [computed(row) for row in after if row["run_id"] == victim if computed(row)] == [], table


def test_a_pack_whose_members_have_all_diverged_gives_null_rows(planned):
    plan = planned(optimizers=[{"name": "sgd", "lr": 1e12}])
    train(plan)
    analyse(plan)
    for table in OF_ALL_MEMBERS:
        late = [row for row in records(plan, table) if row["step"] > 0]
        if table == "alignment":  # there is no step to follow
            assert late == []
            continue
        assert {row["step"] for row in late} == {5, 12}
        assert [row for row in late if computed(row)] == [], table
    assert set(frame(plan, "density")["step"]) == {0}
    assert frame(plan, "curvature").query("step == 0")["lambda_max"].notna().all()


# ---- the store


def test_vectors_are_not_stored_where_the_study_does_not_want_them(planned):
    plan = planned(curvature={"vectors": False})
    train(plan)
    analyse(plan, 12)
    assert Store(plan.context.out).paths("vectors") == []
    assert frame(plan, "eigenvalues")["eigenvalue"].notna().all()


def test_an_analysis_is_invisible_until_it_is_committed_and_repeats_itself(planned, monkeypatch):
    plan = planned()
    train(plan)
    commit = Store.commit

    def die(self, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        analyse(plan, 5)
    assert {table: len(frame(plan, table)) for table in TABLES} == dict.fromkeys(TABLES, 0)
    store = Store(plan.context.out)
    written = {path: store.read_bytes(path) for table in TABLES for path in store.paths(f"parts/{table}")}
    assert len(written) == len(TABLES)
    monkeypatch.setattr(Store, "commit", commit)
    analyse(plan, 5)
    assert {path: store.read_bytes(path) for path in written} == written
    (row,) = rows_of(frame(plan, "tasks"), kind="curvature").to_dict("records")
    assert (row["step"], row["tables"]) == (5, ",".join(sorted(TABLES)))


def test_a_run_is_analysed_alike_whatever_its_pack(planned):
    pair = planned("pair", **DOUBLE)
    alone = planned("alone", seeds=[8], **DOUBLE)
    for plan in (pair, alone):
        train(plan)
        analyse(plan, 2)
    (run_id,) = run_ids(alone)
    for table in ("eigenvalues", "directions"):
        ours = rows_of(frame(pair, table), run_id=run_id).reset_index(drop=True)
        theirs = frame(alone, table)
        column = "eigenvalue" if table == "eigenvalues" else "curvature"
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-8, atol=1e-10)
