"""Tasks that hold a part of their pack at a time find the same, and say so."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lossray.measures.halving import Halving
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from lossray.storage.tables import TABLES
from tasks.jobs import Attempt
from tasks.run_analysis import run_analysis
from tasks.train_pack import train_pack

TANH = {"name": "mlp", "widths": [3], "activation": "tanh"}
NOISY = {"name": "mlp", "widths": [3], "activation": "tanh", "norm": "batch", "dropout": 0.2}
SMALL = {
    "seeds": [3, 8, 5],
    "data": {"source": "gaussians", "n": 60, "dim": 4, "classes": 3, "noise": 1.0},
    "training": {"dtype": "float64", "steps": 4, "batch_size": 16, "checkpoints": {"steps": [0, 4]}},
    "curvature": {"dtype": "float64", "top": 2, "tolerance": 1e-9},
    "angles": {"window": 1},
    "resources": {"pack": 3},
}
OF_ONE_CHECKPOINT = {
    "degeneracy": {"polish": False},
    "trajectory": {},
    "surfaces": {"points": 3, "kinds": ["eigenvectors"]},
}
OF_RETRAINED = {
    "connectivity": {"kinds": ["line", "bezier"], "points": 3, "steps": 2},
    "ensembles": {"methods": ["snapshot"], "budgets": [1]},
}
SPENT = ("matvecs", "orthogonality_loss", "gap")  # how a result was reached; a ratio of rounding errors
ROUNDING = ("residual", "error", "_bound", "stderr", "change")


def test_the_try_after_one_whose_worker_ran_out_of_memory_holds_half():
    attempts = [Attempt(), Attempt(2, halvings=1)]
    assert [one.next(halved=True).halvings for one in attempts] == [1, 2]
    assert [one.next(halved=False).halvings for one in attempts] == [0, 1]
    assert [one.next(halved=True).number for one in attempts] == [2, 3]


def jobs_of(plan):
    """Every analysis job of a plan of one pack, in an order in which they can run."""
    (pack,) = plan.packs
    yield from (plan.curvature_job(pack, step) for step in pack.curvature_keys)
    yield from (plan.pair_job(pack, steps) for steps in pack.pair_keys)
    yield from pack.further.values()


def run(plan, halvings=0):
    """The plan's tables, without the volatile columns, and what the tasks have said by kind."""
    (pack,) = plan.packs
    list(train_pack(plan.training_job(pack, Attempt(halvings=halvings))))
    for job in jobs_of(plan):
        run_analysis(replace(job, attempt=Attempt(halvings=halvings)))
    tables = {name: assemble(Store(plan.context.out), name).to_pandas() for name in TABLES}
    reduced = tables["tasks"].set_index("kind")["reduced"].dropna().to_dict()
    return {name: frame.drop(columns=TABLES[name].volatile) for name, frame in tables.items()}, reduced


def assert_same_up_to_rounding(actual, expected):
    """Residuals and estimates of errors are themselves rounding."""
    for name, frame in expected.items():
        small = [
            column for column in frame.select_dtypes("float64") if any(word in column for word in ROUNDING)
        ]
        numbers = frame.drop(columns=[*small, *(column for column in SPENT if column in frame)])
        pd.testing.assert_frame_equal(
            actual[name][numbers.columns], numbers, rtol=1e-5, atol=1e-7, check_exact=False, obj=name
        )
        for column in small:
            np.testing.assert_allclose(
                actual[name][column], frame[column], rtol=1e-2, atol=1e-6, err_msg=f"{name}.{column}"
            )


@pytest.mark.parametrize(
    ("model", "sections", "executor", "halvings"),
    [
        (TANH, OF_ONE_CHECKPOINT, "vmap", 1),
        (TANH, OF_RETRAINED, "vmap", 1),
        (NOISY, {}, "vmap", 1),
        (NOISY, {}, "loop", 3),
    ],
    ids=["analysed", "retrained", "noisy", "looped"],
)
def test_parts_give_the_same_tables(planned, monkeypatch, model, sections, executor, halvings):
    monkeypatch.setattr("flows.freeze.choose_executor", lambda *args, **options: executor)
    study = {**SMALL, **sections, "models": [model]}
    expected, unsaid = run(planned("whole", **study))
    actual, said = run(planned("parts", **study), halvings)
    assert_same_up_to_rounding(actual, expected)
    assert unsaid == {}
    at_once = len(SMALL["seeds"]) if executor == "vmap" else 1
    assert said.pop("training") == said.pop("checkpoint") == Halving(at_once, halvings).reduced
    assert said.pop("connectivity", Halving(2, 1, "pairs").reduced) == Halving(2, 1, "pairs").reduced
    assert set(said.values()) == {Halving(3, halvings).reduced}
