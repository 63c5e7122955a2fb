"""A study whose packs do not fit the memory runs to its end, with the same tables, and says so in `tasks`."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import flows
import flows.study
from flows.status import describe
from lossray.networks.stack import Stack

STUDY = """
name = "tight"
seeds = 4

[data]
source = "gaussians"
n = 60
dim = 4

[[models]]
name = "mlp"
widths = [3]
activation = "tanh"

[[optimizers]]
name = "sgd"
lr = 2.0

[training]
steps = 6
batch_size = 16
checkpoints = {steps = [0, 3, 6]}
log_every = 3
dtype = "float64"
diverged_above = 1.05

[curvature]
top = 2
dtype = "float64"
tolerance = 1e-9

[angles]
window = 1

[resources]
pack = 4
"""
SAID = "2 of 4 runs at a time after running out of memory"
COMPARED = {
    "runs": ("run_id", ["status", "diverged_at", "train_loss", "test_accuracy"]),
    "training": (["run_id", "step"], ["train_loss", "gradient_norm", "update_norm"]),
    "checkpoints": (["run_id", "step"], ["alive", "parameter_norm", "distance_from_init"]),
    "curvature": (["run_id", "step", "operator", "block"], ["lambda_max", "lambda_min", "trace"]),
    "eigenvalues": (["run_id", "step", "operator", "block", "end", "index"], ["eigenvalue"]),
}


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tight.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def most_members(monkeypatch):
    """``most_members(n, train=...)``: tasks run out of memory where they evaluate more than n at once."""
    run, evaluator = flows.study.run_serially, Stack._evaluator

    def patch(most, *, train=None):
        def tight(stack, function, theta, *others):
            if len(theta) > most and train in (None, stack.template.training):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return evaluator(stack, function, theta, *others)

        def run_tightly(*arguments):
            with monkeypatch.context() as patched:  # not while the study is planned
                patched.setattr(Stack, "_evaluator", tight)
                return run(*arguments)

        monkeypatch.setattr(flows.study, "run_serially", run_tightly)

    return patch


def tables(out):
    names = [*COMPARED, "tasks"]
    return {name: pd.read_parquet(Path(out) / "tables" / f"{name}.parquet") for name in names}


def test_a_study_that_runs_out_of_memory_ends_with_the_same_tables(study, tmp_path, most_members):
    assert flows.run(study, tmp_path / "free", in_process=True) == 0
    most_members(2)
    assert flows.run(study, tmp_path / "tight", in_process=True) == 0
    expected, actual = tables(tmp_path / "free"), tables(tmp_path / "tight")
    assert set(expected["runs"]["status"]) == {"finished", "diverged"}
    for name, (keys, columns) in COMPARED.items():
        left, right = (frames[name].set_index(keys)[columns] for frames in (actual, expected))
        pd.testing.assert_frame_equal(left, right, rtol=1e-7, atol=1e-9, check_exact=False, obj=name)
    assert expected["tasks"]["reduced"].isna().all()
    said = actual["tasks"].set_index("kind")["reduced"]
    assert set(said[["training", "checkpoint", "curvature"]]) == {SAID}
    assert set(actual["tasks"]["task_key"]) == set(expected["tasks"]["task_key"])
    assert f"reduced: {(said == SAID)['curvature'].sum()} curvature tasks: {SAID}" in describe(
        str(tmp_path / "tight")
    )
    assert "reduced" not in describe(str(tmp_path / "free"))


def test_memory_that_runs_out_in_training_costs_the_steps_since_the_last_checkpoint(
    study, tmp_path, most_members
):
    """Only gradients are too much."""
    most_members(1, train=True)
    assert flows.run(study, tmp_path / "tight", in_process=True) == 0
    tasks = tables(tmp_path / "tight")["tasks"].sort_values(["kind", "step"]).set_index("kind")["reduced"]
    assert tasks["checkpoint"].isna().tolist() == [True, False, False]
    assert tasks["training"] == "1 of 4 runs at a time after running out of memory"


def test_a_pack_of_which_not_even_one_run_fits_fails_with_a_remedy(study, tmp_path, most_members, capfd):
    most_members(0, train=True)
    assert flows.run(study, tmp_path / "tight", in_process=True) == 1
    runs, tasks = (tables(tmp_path / "tight")[name] for name in ("runs", "tasks"))
    assert set(runs["status"]) == {"failed"}
    (error,) = tasks.loc[tasks["kind"] == "training", "error"]
    assert error.startswith("ResourceError: out of memory with 1 of 4 runs")
    assert "CUDA out of memory" in error
    assert "training.batch_size" in error
