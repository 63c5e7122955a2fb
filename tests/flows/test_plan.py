"""The keys of a study's tasks: what they depend on, and what they do not."""

from functools import partial

import pytest
import torch

from flows.freeze import decide, study_device
from flows.plan import _pair_keys, make_plan
from lossray.study import pair_key, partition, study_from_table, study_inputs
from lossray.training.datasets import load_dataset
from tasks.jobs import Attempt, Context

TABLE = {
    "name": "small",
    "seeds": 2,
    "data": {"source": "gaussians", "n": 90, "dim": 6},
    "models": [{"name": "mlp", "widths": [4]}],
    "optimizers": [{"name": "sgd"}, {"name": "adam"}],
    "training": {"steps": 12, "checkpoints": {"steps": [0, 5, 12]}},
}


def plan_of(out="/store", frozen=(), **changes):
    study = study_from_table(TABLE | changes)
    dataset = load_dataset(study.data, dtype=torch.float32)
    packs = partition(study, frozen, partial(decide, study, dataset, "cpu"))
    context = Context(out, study, None, dataset.fingerprint)
    return make_plan(context, packs, study_inputs(study, dataset.fingerprint))


def packs_of(plan):
    return tuple(planned.pack for planned in plan.packs)


def keys(plan, kind):
    """Task keys of one kind, by (seeds, step), of the packs of sgd."""
    packs = [pack for pack in plan.packs if pack.pack.optimizer.name == "sgd"]
    if kind == "training":
        return {(pack.pack.seeds, None): pack.training_key for pack in packs}
    return {
        (pack.pack.seeds, step): key for pack in packs for step, key in getattr(pack, f"{kind}_keys").items()
    }


KINDS = ("training", "checkpoint", "curvature", "pair")


def test_every_task_has_a_key_of_its_own():
    plan = plan_of()
    found = list(plan.keys())
    assert len(found) == 2 * (1 + 3 + 3 + 2)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"resources": {"train": {"cpus": 2}}},
        {"claims": {"alpha": 0.01}},
        {"optimizers": [{"name": "sgd"}]},
    ],
)
def test_keys_do_not_depend_on_what_no_number_depends_on(changes):
    assert [keys(plan_of(**changes), kind) for kind in KINDS] == [keys(plan_of(), kind) for kind in KINDS]


def test_keys_do_not_depend_on_the_place_of_the_store():
    assert list(plan_of("/store").keys()) == list(plan_of("s3://bucket/store").keys())


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"training": TABLE["training"] | {"steps": 13}}, KINDS),
        ({"training": TABLE["training"] | {"log_every": 1}}, KINDS),
        ({"data": TABLE["data"] | {"seed": 1}}, KINDS),
        ({"angles": {"shadow": ["adam"]}}, KINDS),
        ({"curvature": {"top": 3}}, ("curvature", "pair")),
        ({"angles": {"directions": ["update"]}}, ("curvature", "pair")),
    ],
)
def test_keys_change_with_what_their_numbers_depend_on(changes, changed):
    before, after = plan_of(), plan_of(**changes)
    for kind in KINDS:
        shared = keys(before, kind).keys() & keys(after, kind).keys()
        assert shared
        same = [name for name in shared if keys(before, kind)[name] == keys(after, kind)[name]]
        assert set(same) == (set() if kind in changed else shared), kind


def test_a_seed_that_is_added_leaves_the_keys_of_the_frozen_packs():
    before = plan_of()
    after = plan_of(frozen=packs_of(before), seeds=3)
    assert set(before.keys()) < set(after.keys())
    assert [pack.pack.seeds for pack in after.packs] == [(0, 1), (0, 1), (2,), (2,)]


def test_a_pack_made_at_once_has_other_keys_than_two_packs_of_the_same_seeds():
    assert not set(plan_of(seeds=2).keys()) & set(plan_of(seeds=2, resources={"pack": 1}).keys())


def test_jobs_carry_their_keys_and_attempts():
    plan = plan_of()
    training = plan.training_job(plan.packs[0], Attempt(3))
    assert (training.key, training.attempt.number) == (plan.packs[0].training_key, 3)
    assert training.checkpoint_keys == plan.packs[0].checkpoint_keys
    curvature = plan.curvature_job(plan.packs[1], 5)
    assert (curvature.key, curvature.step) == (plan.packs[1].curvature_keys[5], 5)
    assert curvature.attempt.number == 1
    pair = plan.pair_job(plan.packs[1], (5, 12))
    assert (pair.key, pair.step, pair.attempt.number) == (plan.packs[1].pair_keys[5, 12], 12, 1)
    assert (pair.earlier.step, pair.earlier.key) == (5, curvature.key)
    assert (pair.later.step, pair.later.key) == (12, plan.packs[1].curvature_keys[12])


def test_neighbours_are_compared_and_one_checkpoint_has_none():
    study = study_from_table(TABLE)
    found = _pair_keys({12: "c", 0: "a", 5: "b"}, study)
    assert found == {(0, 5): pair_key("a", "b", study), (5, 12): pair_key("b", "c", study)}
    assert _pair_keys({7: "a"}, study) == {}


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({"curvature": {"vectors": False}, "angles": {"directions": ["update"]}}, 0),
        ({"curvature": {"vectors": False}}, 2),
        ({"angles": {"directions": []}}, 2),
    ],
)
def test_pairs_are_compared_where_there_is_something_to_compare(changes, pairs):
    assert {len(pack.pair_keys) for pack in plan_of(**changes).packs} == {pairs}


def test_two_stores_of_one_study_have_namespaces_of_their_own():
    names = {plan_of(out).namespace for out in ("/one", "/other")}
    assert len(names) == 2
    assert all("small" in name for name in names)


def test_the_executor_and_the_mode_are_decided_by_rules():
    (pack, *_) = packs_of(plan_of())
    assert (pack.executor, pack.product_mode) == ("vmap", "retained")
    images = {"data": {"source": "digits"}, "models": [{"name": "cnn"}]}
    (cnn, *_) = packs_of(plan_of(**images))
    assert cnn.executor == "loop"  # large convolutions on a CPU
    assert cnn.seeds == (0,)  # a loop gains nothing from company
    small = images | {"models": [{"name": "cnn", "channels": [8], "kernel": 3}]}
    (cnn, *_) = packs_of(plan_of(**small))
    assert (cnn.executor, cnn.seeds) == ("vmap", (0, 1))


@pytest.mark.parametrize(
    ("asked", "gpus", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), (0, True, "cpu"), (1, True, "cuda")],
)
def test_a_study_trains_on_gpus_where_there_are_some_and_it_wants_them(asked, gpus, device):
    study = study_from_table(TABLE | {"resources": {"train": {"gpus": asked}}})
    assert study_device(study, gpus=gpus) == device


@pytest.mark.parametrize(
    ("kinds", "curvature", "trained", "analysed"),
    [
        (["random"], {}, {12}, set()),
        (["pca"], {}, {0, 5, 12}, set()),
        (["v1", "random"], {}, {12}, {12}),
        (["eigenvectors", "pca"], {}, {0, 5, 12}, {12}),
        (["random", "v1"], {"vectors": False}, {12}, set()),  # there are no eigenvectors to wait for
    ],
)
def test_slices_wait_for_what_they_need_only(kinds, curvature, trained, analysed):
    plan = plan_of(surfaces={"kinds": kinds, "checkpoints": "last"}, curvature=curvature)
    followers = [own for pack in plan.packs for own in pack.followers if own.kind == "surfaces"]
    assert len(followers) == 2
    for own in followers:
        assert {need.step for need in own.needs if need.what == "trained"} == trained
        assert {need.step for need in own.needs if need.what == "analysed"} == analysed
