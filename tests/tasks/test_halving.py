"""Out of memory: tasks go on with less in memory at once, and find the same."""

import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lossray.errors import ModelError, ResourceError, StudyError
from lossray.limits import most_halvings
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from lossray.storage.tables import TABLES
from tasks.halving import Halving
from tasks.jobs import Attempt
from tasks.run_analysis import run_analysis
from tasks.train_pack import train_pack

TANH = {"name": "mlp", "widths": [3], "activation": "tanh"}
NOISY = {"name": "mlp", "widths": [3], "activation": "tanh", "norm": "batch", "dropout": 0.2}
CNN = {"name": "cnn", "channels": [2], "norm": "batch"}
SMALL = {
    "seeds": [3, 8, 5],
    "data": {"source": "gaussians", "n": 60, "dim": 4, "classes": 3, "noise": 1.0},
    "training": {"dtype": "float64", "steps": 4, "batch_size": 16, "checkpoints": {"steps": [0, 4]}},
    "curvature": {"dtype": "float64", "top": 2, "tolerance": 1e-9},
    "angles": {"window": 1},
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


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore words")


def wrapped():
    error = ModelError("differentiating it twice failed")
    error.__cause__ = RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    )
    return error


# ---- what is held


@pytest.mark.parametrize(
    ("size", "sentences"),
    [
        (16, [None, "8 of 16 runs", "4 of 16 runs", "2 of 16 runs", "1 of 16 runs"]),
        (3, [None, "2 of 3 runs", "1 of 3 runs", "1 of 3 runs and 1/2 of the examples"]),
        (1, [None, "1/2 of the examples", "1/4 of the examples"]),
    ],
)
def test_what_is_held_at_once_is_said(size, sentences):
    for times, sentence in enumerate(sentences):
        expected = sentence and f"{sentence} at a time after running out of memory"
        assert Halving(size, times).reduced == expected


@pytest.mark.parametrize(
    "error",
    [
        out_of_memory(),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        ResourceError("the Krylov basis needs about 20 GB on cpu, where 3 GB can be had"),
        wrapped(),
    ],
)
def test_less_is_held_until_it_fits(error):
    def work(part):
        if len(part.members) > 1:
            raise error
        return list(part.members)

    halving = Halving(3, 0)
    assert halving.by_parts(work) == [[0], [1], [2]]
    assert halving.times == 2


def test_other_errors_are_raised_as_they_are():
    def work(part):
        raise StudyError("no such thing")

    halving = Halving(3, 0)
    with pytest.raises(StudyError, match="no such thing"):
        halving.by_parts(work)
    assert halving.reduced is None


def test_the_try_after_one_whose_worker_ran_out_of_memory_holds_half():
    attempts = [Attempt(), Attempt(2, halvings=1)]
    assert [one.next(halved=True).halvings for one in attempts] == [1, 2]
    assert [one.next(halved=False).halvings for one in attempts] == [0, 1]
    assert [one.next(halved=True).number for one in attempts] == [2, 3]


def test_an_attempt_begins_where_the_one_before_has_ended():
    assert Halving(4, 2).by_parts(lambda part: part.members) == [range(r, r + 1) for r in range(4)]


def test_with_nothing_left_to_halve_it_says_what_to_do():
    tries = []

    def work(part):
        tries.append(part)
        raise out_of_memory()

    with pytest.raises(
        ResourceError,
        match=r"with 1 of 2 runs and 1/32 of the examples.*Tried to allocate 2.00 GiB; give the task a GPU",
    ) as raised:
        Halving(2, 0).by_parts(work)
    assert "\n" not in str(raised.value)
    assert len(tries) == most_halvings(2) + 1


def test_what_does_not_fit_by_estimate_keeps_its_message():
    def work(part):
        raise ResourceError("the basis needs 20 GB; ask for fewer pairs")

    with pytest.raises(ResourceError, match=r"^the basis needs 20 GB; ask for fewer pairs$"):
        Halving(2, 0).by_parts(work)


def test_what_a_failed_try_has_held_is_free_in_the_next():
    held = []

    def work(part):
        if part.members.start == 0:  # a new try
            assert all(reference() is None for reference in held)
        tensor = torch.zeros(10)
        cycle = [tensor]
        cycle.append(cycle)
        held.append(weakref.ref(tensor))
        if len(part.members) > 1:
            raise out_of_memory()

    Halving(4, 0).by_parts(work)
    assert len(held) == 1 + 1 + 4


# ---- what is found


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
    ("model", "sections", "halvings"),
    [(TANH, OF_ONE_CHECKPOINT, 1), (TANH, OF_RETRAINED, 1), (NOISY, {}, 3)],
    ids=["analysed", "retrained", "noisy"],
)
def test_parts_give_the_same_tables(planned, model, sections, halvings):
    study = {**SMALL, **sections, "models": [model]}
    expected, unsaid = run(planned("whole", **study))
    actual, said = run(planned("parts", **study), halvings)
    assert_same_up_to_rounding(actual, expected)
    assert unsaid == {}
    assert said.pop("connectivity", Halving(2, 1, "pairs").reduced) == Halving(2, 1, "pairs").reduced
    assert set(said.values()) == {Halving(3, halvings).reduced}
