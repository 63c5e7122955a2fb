"""Recorded runs in a study: a pack for each, and keys that hold the content of what was recorded."""

from dataclasses import replace

import pytest

from lossray.storage.recordings import Recording
from lossray.study import (
    Pack,
    StudyInputs,
    checkpoint_keys,
    curvature_key,
    partition,
    runs_of,
    settings_of,
    study_from_table,
    training_key,
)

ADAM = {"name": "adam", "weight_decay": 0.0, "betas": [0.9, 0.99], "eps": 1e-8}
FIRST = Recording("adam-0", {"w": [2]}, {}, "adam", ADAM, 0.01, {0: "a", 5: "b"})
SECOND = replace(FIRST, run="adam-1")
OTHER = Recording("own", {"w": [2]}, {}, "Mine", None, None, {3: "c"})
RUNS = (FIRST, SECOND, OTHER)


def study(**changes):
    return study_from_table(
        {"name": "s", "source": "checkpoints", "models": [{"name": "my.nets:build"}]} | changes
    )


def packs(*recordings, frozen=(), asked=None):
    def decide(setting):
        if asked is not None:
            asked.append(setting.setting_id)
        return "loop", "retained"

    return partition(study(), frozen, decide, recordings)


def keys(recording, **changes):
    """Training key, checkpoint keys and curvature keys of one run."""
    (pack,), one = packs(recording), study(**changes)
    inputs = StudyInputs("d", {"my.nets:build": "m"}, (SECOND, recording))
    curvature = {step: curvature_key(pack, step, one, inputs) for step in recording.steps}
    return training_key(pack, one, inputs), checkpoint_keys(pack, one, inputs), curvature


def test_each_run_is_a_pack_of_its_own_and_settings_are_shared():
    asked = []
    first, second, other = packs(*RUNS, asked=asked)
    assert [pack.run_ids for pack in (first, second, other)] == [("adam-0",), ("adam-1",), ("own",)]
    assert runs_of(study(), RUNS) == {"adam-0", "adam-1", "own"}
    assert first.setting_id == second.setting_id != other.setting_id
    assert asked == [setting.setting_id for setting in settings_of(study(), RUNS)]
    assert (first.optimizer.name, first.optimizer.lr, first.optimizer.betas) == ("adam", 0.01, (0.9, 0.99))
    assert (other.optimizer, other.recorded.optimizer, other.recorded.lr) == (None, "Mine", None)
    assert len({pack.seeds for pack in (first, second, other)}) == 3


def test_frozen_decisions_stay_and_what_is_no_longer_recorded_goes():
    frozen = [replace(pack, product_mode="recompute") for pack in packs(*RUNS)]
    asked = []
    again = packs(FIRST, OTHER, frozen=frozen, asked=asked)
    assert [(pack.pack_id, pack.product_mode) for pack in again] == [
        ("adam-0", "recompute"),
        ("own", "recompute"),
    ]
    assert asked == []


@pytest.mark.parametrize("recording", RUNS)
def test_packs_survive_a_manifest(recording):
    (pack,) = packs(recording)
    assert Pack.from_plain(pack.plain()) == pack


def test_a_warm_up_from_rate_zero_is_a_setting_too():
    (pack,) = packs(replace(FIRST, lr=0.0))
    assert (pack.recorded.lr, pack.optimizer.lr) == (0.0, 0.001)


def test_a_further_step_changes_the_key_of_the_run_alone():
    before, after = keys(FIRST), keys(replace(FIRST, steps={**FIRST.steps, 9: "z"}))
    assert after[0] != before[0]
    assert {step: after[1][step] for step in (0, 5)} == before[1]
    assert {step: after[2][step] for step in (0, 5)} == before[2]


def test_other_content_changes_what_depends_on_it():
    before = keys(FIRST)
    for step in (0, 5):
        training, checkpoints, curvature = keys(replace(FIRST, steps={**FIRST.steps, step: "z"}))
        assert training != before[0]
        assert {s for s in (0, 5) if curvature[s] != before[2][s]} == {step}
        # Distances are measured from the first checkpoint.
        assert {s for s in (0, 5) if checkpoints[s] != before[1][s]} == ({0, 5} if step == 0 else {5})


def test_runs_of_equal_content_have_keys_of_their_own():
    found = [key for recording in (FIRST, SECOND) for part in keys(recording)[1:] for key in part.values()]
    assert len(set(found)) == len(found) == 8


def test_settings_change_the_keys_of_what_they_decide():
    before = keys(FIRST)
    loss, analysis = keys(FIRST, training={"loss": "mse"}), keys(FIRST, curvature={"top": 3})
    assert all(one != other for one, other in zip(loss, before, strict=True))
    assert analysis[:2] == before[:2]
    assert analysis[2] != before[2]
    assert keys(replace(FIRST, settings={**ADAM, "eps": 1e-3}))[2] != before[2]
