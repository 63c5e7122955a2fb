"""What [curvature] asks for beyond the Hessian: other operators, layers, densities and their sums."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev

import lossray
from lossray.geometry import vectors
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from lossray.study import study_from_table
from lossray.study.demands import operators_asked
from tasks.analyse_checkpoint import analyse_checkpoint
from tasks.jobs import Attempt
from tasks.planned_data import located
from tasks.train_pack import train_pack

ALL = ["hessian:layers", "ggn", "fisher", "preconditioned:layers"]
LAYERS = {"hidden1": (0, 28), "output": (28, 43)}
DOUBLE = {"training": {"dtype": "float64"}, "curvature": {"dtype": "float64", "tolerance": 1e-8, "top": 3}}


def analysed(plan, step):
    list(train_pack(plan.training_job(plan.packs[0], Attempt())))
    analyse_checkpoint(plan.curvature_job(plan.packs[0], step))
    return plan


def frame(plan, table):
    return assemble(Store(plan.context.out), table).to_pandas()


def dense(plan, run_id, step):
    """Loss surface of one run: every operator [d, d] in float64, by double backward and Jacobians."""
    study = lossray.open_study(plan.context.out)
    model = study.model(run_id, step).double()
    inputs, targets = study.data("train")
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def outputs(theta):
        pieces = torch.split(theta, [shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return functional_call(model, named, (inputs.double(),))

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(lambda t: F.cross_entropy(outputs(t), targets), theta)
    jacobian = jacrev(outputs)(theta)  # [N, C, d]
    chances = outputs(theta).softmax(dim=1)
    curves = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    ggn = torch.einsum("ncd,nce,nef->df", jacobian, curves, jacobian) / len(targets)
    slopes = chances - F.one_hot(targets, chances.shape[1])
    gradients = torch.einsum("ncd,nc->nd", jacobian, slopes)
    fisher = gradients.T @ gradients / len(targets)
    return {"hessian": hessian, "ggn": ggn, "fisher": fisher}


def scale_of(plan, step):
    """The optimizer's preconditioner [R, d], or None."""
    return located(plan.context, plan.packs[0].pack, step, torch.device("cpu")).optimizer.scale()


def test_every_operator_and_layer_against_dense_matrices(planned):
    plan = analysed(planned(**DOUBLE | {"curvature": DOUBLE["curvature"] | {"operators": ALL}}), 5)
    eigenvalues, curvature = frame(plan, "eigenvalues"), frame(plan, "curvature")
    assert eigenvalues["converged"].all()
    assert curvature["confirmed"].all()
    scale = scale_of(plan, 5)
    for r, run_id in enumerate(plan.packs[0].pack.run_ids):
        exact = dense(plan, run_id, 5)
        root = scale[r].rsqrt()
        exact["preconditioned"] = root[:, None] * exact["hessian"] * root
        expected = {(name, "all"): matrix for name, matrix in exact.items()}
        for layer, (first, last) in LAYERS.items():
            for name in ("hessian", "preconditioned"):
                expected[name, layer] = exact[name][first:last, first:last]
        rows = curvature[curvature["run_id"] == run_id].set_index(["operator", "block"])
        assert set(rows.index) == set(expected)
        for key, matrix in expected.items():
            values = torch.linalg.eigvalsh(matrix).flip(0)
            own = eigenvalues[
                (eigenvalues["run_id"] == run_id)
                & (eigenvalues["operator"] == key[0])
                & (eigenvalues["block"] == key[1])
            ].set_index("end")
            largest = own.loc["largest"]["eigenvalue"].to_numpy()
            size = float(values.abs().max())
            np.testing.assert_allclose(largest, values[: len(largest)], atol=1e-8 * size)
            assert own.loc["smallest"]["eigenvalue"] == pytest.approx(float(values[-1]), abs=1e-8 * size)
            row = rows.loc[key]
            assert row["dim"] == len(values)
            # So small an operator is diagonalised: its sums are exact.
            assert row["trace_stderr"] == 0
            assert row["trace"] == pytest.approx(float(values.sum()), rel=1e-9)
            assert row["frobenius_norm"] == pytest.approx(float(values.norm()), rel=1e-9)
            negative = float((-values).clamp(min=0).sum() / values.abs().sum())
            assert row["negative_mass"] == pytest.approx(negative, abs=1e-9)
            participation = float(values.abs().sum() ** 2 / values.square().sum())
            assert row["participation"] == pytest.approx(participation, rel=1e-9)


def test_the_layers_of_the_hessian_hold_part_of_its_frobenius_norm(planned):
    """What they lack is the cross-layer energy."""
    plan = analysed(
        planned(**DOUBLE | {"curvature": DOUBLE["curvature"] | {"operators": ["hessian:layers"]}}), 5
    )
    rows = frame(plan, "curvature").set_index(["run_id", "block"])["frobenius_norm"]
    for run_id in plan.packs[0].pack.run_ids:
        exact = dense(plan, run_id, 5)["hessian"]
        inside = sum(float(exact[a:b, a:b].square().sum()) for a, b in LAYERS.values())
        found = sum(rows[run_id, layer] ** 2 for layer in LAYERS) / rows[run_id, "all"] ** 2
        assert found == pytest.approx(inside / float(exact.square().sum()), rel=1e-8)


def test_the_preconditioned_operator_is_missing_where_the_preconditioner_is(planned):
    plan = analysed(planned(curvature={"operators": ["preconditioned"]}), 0)
    assert set(frame(plan, "curvature")["operator"]) == {"hessian"}  # adam has taken no step yet
    plain = analysed(
        planned("sgd", curvature={"operators": ["preconditioned"]}, optimizers=[{"name": "sgd", "lr": 0.1}]),
        5,
    )
    values = frame(plain, "curvature").set_index(["run_id", "operator"])["lambda_max"]
    for run_id in plain.packs[0].pack.run_ids:  # sgd divides by nothing
        assert values[run_id, "preconditioned"] == pytest.approx(values[run_id, "hessian"], rel=1e-5)


def test_the_hessian_is_analysed_where_angles_rest_on_it_alone():
    table = {
        "name": "s",
        "seeds": 1,
        "models": [{"name": "mlp"}],
        "optimizers": [{"name": "sgd"}],
        "curvature": {"operators": ["ggn:layers", "fisher", "hessian:layers"]},
    }
    assert operators_asked(study_from_table(table)) == {"hessian": True, "ggn": True, "fisher": False}
    only = table | {"curvature": {"operators": ["ggn"]}}
    assert operators_asked(study_from_table(only)) == {"hessian": False, "ggn": False}
    alone = only | {"angles": {"directions": []}}
    assert operators_asked(study_from_table(alone)) == {"ggn": False}


def test_density_of_a_larger_model(planned):
    """Weights sum to 1, nodes lie inside the spectrum, and the sums agree with the dense ones."""
    plan = analysed(planned(data={"dim": 30}, models=[{"name": "mlp", "widths": [8]}], **DOUBLE), 12)
    density, curvature = frame(plan, "density"), frame(plan, "curvature").set_index("run_id")
    for run_id in plan.packs[0].pack.run_ids:
        values = torch.linalg.eigvalsh(dense(plan, run_id, 12)["hessian"]).numpy()
        own = density[density["run_id"] == run_id]
        assert sorted(set(own["probe"])) == [0, 1, 2, 3]
        np.testing.assert_allclose(own.groupby("probe")["weight"].sum(), 1, atol=1e-12)
        assert own["node"].min() >= values[0] - 1e-9
        assert own["node"].max() <= values[-1] + 1e-9
        row = curvature.loc[run_id]
        for name, exact in {"trace": values.sum(), "frobenius_norm": np.linalg.norm(values)}.items():
            assert abs(row[name] - exact) <= 6 * row[f"{name}_stderr"] + 1e-6 * abs(exact), name
            assert row[f"{name}_stderr"] > 0
        assert row["effective_dimension_regulariser"] == pytest.approx(0.01 * np.abs(values).max(), rel=1e-6)
        assert row["matvecs"] < 3 * len(values)


def test_vectors_of_every_operator_and_block_are_stored(planned):
    plan = analysed(planned(curvature={"operators": ["hessian:layers", "ggn"]}), 5)
    store, own = Store(plan.context.out), plan.packs[0]
    content = store.read_bytes(store.vectors_path(own.pack.pack_id, 5))
    stored = vectors.loads(content, key=own.curvature_keys[5])
    plain = {name for name in stored if "@" not in name[0]}
    asked = {("hessian", "all"), ("ggn", "all"), *(("hessian", layer) for layer in LAYERS)}
    assert plain == {(*name, end) for name in asked for end in ("largest", "smallest")}
    for (_, block, _), pairs in stored.items():
        first, last = LAYERS.get(block, (0, 43))
        assert pairs.vectors.shape[2] == last - first


def test_a_diverged_member_has_null_rows_and_no_density(planned):
    plan = planned(curvature={"operators": ALL}, optimizers=[{"name": "adam", "lr": 1e18}])
    analysed(plan, 12)
    assert frame(plan, "density").empty
    rows = frame(plan, "curvature")
    assert rows[["lambda_max", "lambda_min", "trace", "loss", "matvecs"]].isna().all().all()
    assert {"hessian", "ggn", "fisher"} <= set(rows["operator"])


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad"])
def test_the_preconditioner_is_the_diagonal_by_which_the_optimizer_divides(planned, optimizer):
    plan = analysed(
        planned(
            curvature={"operators": ["preconditioned"], "dtype": "float64", "tolerance": 1e-8},
            optimizers=[{"name": optimizer, "lr": 0.01}],
            training={"dtype": "float64"},
        ),
        5,
    )
    values = frame(plan, "curvature").query("operator == 'preconditioned'").set_index("run_id")["lambda_max"]
    scale = scale_of(plan, 5)
    for r, run_id in enumerate(plan.packs[0].pack.run_ids):
        root = scale[r].rsqrt()
        matrix = root[:, None] * dense(plan, run_id, 5)["hessian"] * root
        assert values[run_id] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-8)
