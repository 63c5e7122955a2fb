"""Paths between the runs of a study: which pairs, what their tables say."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import lossray
from lossray.connectivity.settings import ConnectivitySettings
from lossray.measures.path_ends import ends_of, possible
from lossray.results import StudyResults
from lossray.storage import checkpoints
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from lossray.study.demands import pairs_of
from tasks.connect_runs import connect_runs, path_site
from tasks.jobs import Attempt, ConnectivityJob
from tasks.train_pack import train_pack

RELU = [{"name": "mlp", "widths": [4, 3]}]
SECTION = {"kinds": ["line", "bezier"], "align": ["none", "both"], "points": 5, "steps": 12}


def trained(planned, **changes):
    plan = planned(**({"seeds": [3, 8, 9], "models": RELU, "connectivity": SECTION} | changes))
    for pack in plan.packs:
        list(train_pack(plan.training_job(pack, Attempt())))
    return plan


def jobs(plan):
    found = [job for pack in plan.packs for job in pack.further.values()]
    return {job.aligned: job for job in found if isinstance(job, ConnectivityJob)}


def tables(plan):
    store = Store(plan.context.out)
    return [assemble(store, name).to_pandas() for name in ("paths", "barriers")]


@pytest.fixture(scope="module")
def joined(planned_once):
    plan = trained(planned_once)
    for job in jobs(plan).values():
        connect_runs(job)
    return plan


def test_each_run_is_joined_to_the_one_before_and_to_its_rescaled_copy(joined):
    paths, barriers = tables(joined)
    (pack,) = joined.packs
    a, b, c = pack.pack.run_ids
    assert {(row.run_a, row.run_b, row.aligned, row.kind) for row in barriers.itertuples()} == {
        *(
            (*pair, aligned, kind)
            for pair in ((a, b), (b, c))
            for aligned in ("none", "both")
            for kind in ("line", "bezier")
        ),
        *((run, run, "rescaled", kind) for run in (a, b, c) for kind in ("line", "geometric")),
    }
    assert len(paths) == 5 * len(barriers)
    assert (barriers["status"] == "done").all()
    assert (barriers["bends"] == (barriers["kind"] == "bezier")).all()


def test_the_ends_of_every_path_are_the_runs(joined):
    paths, _ = tables(joined)
    runs = assemble(Store(joined.context.out), "runs").to_pandas().set_index("run_id")
    for t, side in ((0.0, "run_a"), (1.0, "run_b")):
        own = paths[(paths["t"] == t) & (paths["aligned"] == "none")]
        for name in ("train_loss", "test_loss", "test_accuracy"):
            np.testing.assert_array_equal(own[name], runs.loc[own[side], name])
    other = paths[(paths["t"] == 1) & (paths["aligned"] != "none")]
    np.testing.assert_allclose(other["train_loss"], runs.loc[other["run_b"], "train_loss"], rtol=1e-5)


def test_a_barrier_is_that_of_the_points(joined):
    paths, barriers = tables(joined)
    for row in barriers.itertuples():
        own = paths[(paths["pair_id"] == row.pair_id) & (paths["kind"] == row.kind)].sort_values("t")
        loss, t = own["train_loss"].to_numpy(), own["t"].to_numpy()
        rise = loss - ((1 - t) * loss[0] + t * loss[-1])
        assert row.barrier == pytest.approx(rise.max(), abs=1e-12)
        assert row.max_loss == loss.max()
        assert row.path_length == own["arc_length"].iloc[-1] >= row.endpoint_distance * (1 - 1e-9)


def test_the_orbit_of_the_rescaling_has_no_barrier_and_alignment_shortens_the_way(joined):
    _, barriers = tables(joined)
    orbit = barriers[barriers["kind"] == "geometric"]
    assert (orbit["barrier"].abs() < 1e-6).all()
    assert (barriers.loc[barriers["aligned"] != "none", "function_change"] < 1e-12).all()
    both = barriers[barriers["aligned"] == "both"]
    assert (both["endpoint_distance"] < both["distance_before"]).all()
    plain = barriers[(barriers["aligned"] == "none")]
    assert (plain["endpoint_distance"] == plain["distance_before"]).all()


def test_a_path_of_a_study_is_the_path_of_the_function(joined):
    """The straight line, by `lossray.connect` on the modules."""
    paths, _ = tables(joined)
    study = StudyResults(Store(joined.context.out))
    a, b, _ = joined.packs[0].pack.run_ids
    models = [study.model(run_id, 12) for run_id in (a, b)]
    line = lossray.connect(*models, torch.nn.CrossEntropyLoss(), study.data("train"), kind="line")
    own = paths[(paths["run_a"] == a) & (paths["kind"] == "line") & (paths["aligned"] == "none")]
    for row in own.itertuples():
        outputs = line.at(row.t)(study.data("train")[0])
        loss = torch.nn.functional.cross_entropy(outputs, study.data("train")[1])
        assert loss.item() == pytest.approx(row.train_loss, rel=1e-5)


def test_a_diverged_run_has_null_rows_and_the_others_are_as_before(planned):
    clean, buried = (trained(planned, out=out) for out in ("clean", "buried"))
    store, pack = Store(buried.context.out), buried.packs[0].pack
    path = store.checkpoint_path(pack.pack_id, 12)
    checkpoint = checkpoints.loads(store.read_bytes(path))
    store.write_bytes(path, checkpoints.dumps(replace(checkpoint, alive=torch.tensor([False, True, True]))))
    for plan in (clean, buried):
        for job in jobs(plan).values():
            connect_runs(job)
    before, after = (tables(plan)[1] for plan in (clean, buried))
    hurt = before["run_a"] == pack.run_ids[0]
    assert (after.loc[hurt, "status"] == "diverged").all()
    assert after.loc[hurt, ["barrier", "max_loss", "path_length"]].isna().all().all()
    pd.testing.assert_frame_equal(after[~hurt], before[~hurt])


def test_without_the_symmetry_there_are_no_rows_of_it(planned):
    smooth = [{"name": "mlp", "widths": [4], "activation": "tanh"}]
    section = SECTION | {"align": ["none", "permutation", "scale"], "kinds": ["line"]}
    plan = trained(planned, models=smooth, connectivity=section)
    for job in jobs(plan).values():
        connect_runs(job)
    assert set(tables(plan)[1]["aligned"]) == {"none", "permutation"}


def test_added_packs_add_pairs_and_change_none(planned):
    plan = planned(seeds=[3, 8, 9], models=RELU, connectivity=SECTION, resources={"pack": 1})
    packs = [pack.pack for pack in plan.packs]
    for pairs, expected in (("neighbours", [0, 1, 1]), ("all", [0, 1, 2])):
        settings = ConnectivitySettings(pairs=pairs)
        found = [pairs_of(settings, pack, packs[:i]) for i, pack in enumerate(packs)]
        assert [len(own) for own in found] == expected
        assert all(b in pack.run_ids for pack, own in zip(packs, found, strict=True) for _, b in own)
    last = plan.packs[2].further
    needs = [
        own.needs for own, job in last.items() if isinstance(job, ConnectivityJob) and job.aligned == "none"
    ]
    assert {event.pack_id for event in needs[0]} == {pack.pack_id for pack in packs[1:]}


# ---- what can be joined


def replaced(plan, member, name, change):
    """One tensor of one run's last checkpoint is another."""
    store, pack = Store(plan.context.out), plan.packs[0].pack
    path = store.checkpoint_path(pack.pack_id, 12)
    checkpoint = checkpoints.loads(store.read_bytes(path))
    change(checkpoint.parameters[name][member])
    store.write_bytes(path, checkpoints.dumps(checkpoint))


def site_of(job):
    return path_site(job, torch.device("cpu"))


USERS = """
from torch import nn


def frozen(input_shape, n_outputs, *, alike):
    first = nn.Linear(6, 5)
    if alike:
        nn.init.eye_(first.weight)
        nn.init.zeros_(first.bias)
    return nn.Sequential(first.requires_grad_(False), nn.ReLU(), nn.Linear(5, n_outputs))


def grouped(input_shape, n_outputs):
    hidden = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 6, 1, groups=3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*hidden, nn.Linear(6, n_outputs))
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "joined_models.py").write_text(USERS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(("alike", "expected"), [(True, {"none"}), (False, set())])
def test_runs_whose_frozen_parameters_differ_are_not_joined(planned, users, alike, expected):
    section = {"kinds": ["line"], "align": ["none", "permutation"], "points": 3, "rescaled": False}
    models = [{"name": "joined_models:frozen", "alike": alike}]
    plan = trained(planned, seeds=[3, 8], models=models, connectivity=section)
    for job in jobs(plan).values():
        connect_runs(job)
    paths, _ = tables(plan)
    assert set(paths["aligned"]) == expected  # with nothing to permute: the hidden layer is frozen


def test_both_takes_what_the_architecture_has(planned, users):
    section = {"kinds": ["line"], "align": ["permutation", "scale", "both"], "points": 3, "rescaled": False}
    plan = trained(planned, seeds=[3, 8], models=[{"name": "joined_models:grouped"}], connectivity=section)
    found = {name: possible(site_of(job)) for name, job in jobs(plan).items()}
    assert found == {"permutation": False, "scale": True, "both": True}
    for job in jobs(plan).values():
        connect_runs(job)
    _, barriers = tables(plan)
    assert set(barriers["aligned"]) == {"scale", "both"}
    assert (barriers["endpoint_distance"] < barriers["distance_before"]).all()


def test_a_weight_that_underflows_in_the_rescaled_copy_keeps_its_sign(planned):
    plan = trained(planned, connectivity=SECTION)

    def shrink(weight):
        weight[:] = torch.tensor([[1e-45], [-1e-45], [0.0], [1e-45]])

    replaced(plan, 1, "hidden1.weight", shrink)
    job = jobs(plan)["rescaled"]
    ends = ends_of(site_of(job))
    assert torch.equal(ends.a.sign(), ends.b.sign())
    assert (ends.function_change < 1e-12).all()
    connect_runs(job)
    assert (tables(plan)[1]["status"] == "done").all()
