"""manifest.json: what a store was made from, and which studies may extend it."""

import json
from dataclasses import replace

import pytest

from lossray.errors import StoreError
from lossray.study import StudyInputs, partition, study_from_table
from lossray.study.manifest import Manifest, check_extension, edited_packs, extended, new_manifest

OWN = "own_model:f"
INPUTS = StudyInputs("d" * 64, {OWN: "source"})


def study(**changes):
    table = {
        "name": "s",
        "seeds": 4,
        "models": [{"name": "mlp"}, {"name": OWN}],
        "optimizers": [{"name": "sgd"}, {"name": "adam", "lr": [1e-3, 3e-3]}],
        "training": {"steps": 1000},
    }
    return study_from_table(table | changes)


def packs_of(study, frozen=()):
    return partition(study, frozen, lambda setting: ("vmap", "double"))


@pytest.fixture
def manifest(tmp_path):
    return new_manifest(
        study(), INPUTS, packs_of(study()), folder=tmp_path, arguments=["lossray", "run", "s.toml"]
    )


def test_json_round_trip(manifest):
    text = json.dumps(manifest.plain(), allow_nan=False)
    again = Manifest.from_plain(json.loads(text))
    assert again == manifest
    assert study_from_table(again.study) == study()


def test_records_versions_place_and_time(manifest, tmp_path):
    assert set(manifest.versions) == {"python", "torch", "ray", "lossray"}
    assert manifest.versions["torch"].startswith("2.")
    assert manifest.folder == str(tmp_path.resolve())
    assert manifest.arguments == ("lossray", "run", "s.toml")
    assert manifest.git_revision is None  # a temporary folder is no repository
    assert manifest.created.endswith("+00:00")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda plain: [], "format version None"),
        (lambda plain: plain | {"format_version": 99}, "format version 99"),
        (lambda plain: plain | {"format_version": "1"}, "format version 1"),
        (lambda plain: plain | {"format_version": 0}, "format version 0"),
        (lambda plain: {key: value for key, value in plain.items() if key != "packs"}, "damaged"),
        (lambda plain: plain | {"surprise": 1}, "damaged"),
        (lambda plain: plain | {"packs": [{}]}, "damaged"),
        (lambda plain: plain | {"packs": [plain["packs"][0] | {"optimizer": {"name": "sdg"}}]}, "damaged"),
    ],
)
def test_damaged_manifest_is_named(manifest, damage, says):
    with pytest.raises(StoreError, match=r"OUT/manifest\.json") as caught:
        Manifest.from_plain(damage(manifest.plain()), "OUT/manifest.json")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# Extension


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seeds": 9},
        {"seeds": [3, 2, 1, 0, 17]},
        {"models": [{"name": "cnn"}, {"name": OWN}, {"name": "mlp"}]},
        {"optimizers": [{"name": "adam", "lr": [1e-2, 3e-3, 1e-3]}, {"name": "lion"}, {"name": "sgd"}]},
        {"degeneracy": {"dense_up_to": 10}},
        {"trajectory": {}, "surfaces": {"seeds": "all"}},
        {"connectivity": {}, "ensembles": {"budgets": [3]}},
        {"resources": {"pack": 1, "train": {"cpus": 2}}},
        {"claims": {"alpha": 0.01}},
        {"training": {"steps": 1000, "batch_size": 64}},  # the default, written out
    ],
)
def test_additions_resources_and_claims_are_accepted(manifest, changes):
    check_extension(manifest, study(**changes), INPUTS)


def test_optimizers_of_a_model_may_be_added_and_not_taken_away():
    def asked(*names):
        models = [{"name": "mlp"}, {"name": OWN, "optimizers": list(names)}]
        return study(models=models, optimizers=[{"name": "sgd"}, {"name": "adam"}, {"name": "lion"}])

    first = asked("sgd", "adam")
    manifest = new_manifest(first, INPUTS, packs_of(first), folder=".")
    check_extension(manifest, asked("sgd", "adam", "lion"), INPUTS)
    with pytest.raises(StoreError, match=r"optimizers: the store has \[\"adam\"\], which the study lacks"):
        check_extension(manifest, asked("sgd"), INPUTS)


def test_a_section_that_was_added_stays_as_it_is(manifest):
    dense = study(degeneracy={"dense_up_to": 10})
    made = new_manifest(dense, INPUTS, packs_of(dense), folder=".")
    check_extension(made, study(), INPUTS)  # left out again: its rows stay
    with pytest.raises(StoreError, match=r"degeneracy.dense_up_to: the store has 10, the study says 20"):
        check_extension(made, study(degeneracy={"dense_up_to": 20}), INPUTS)
    without = extended(made, study(), INPUTS, made.packs)
    assert without == made  # else the section could come back with other settings
    added = extended(made, study(trajectory={}), INPUTS, made.packs)
    assert study_from_table(added.study) == study(trajectory={}, degeneracy={"dense_up_to": 10})


def test_data_may_move_as_long_as_the_content_is_the_same():
    parquet = {"source": "parquet", "label": "y", "features": ["x"]}
    here, there = study(data=parquet | {"path": "here"}), study(data=parquet | {"path": "there"})
    manifest = new_manifest(here, INPUTS, packs_of(here), folder=".")
    check_extension(manifest, there, INPUTS)
    with pytest.raises(StoreError, match=r"data.path: the store has 'here', the study says 'there'"):
        check_extension(manifest, there, replace(INPUTS, data_key="e" * 64))


def test_a_setting_that_the_store_is_older_than_counts_as_its_default(manifest):
    plain = json.loads(json.dumps(manifest.plain()))
    del plain["study"]["curvature"]["tolerance"], plain["study"]["training"]["log_every"]
    del plain["study"]["models"][0]["dropout"]
    older = Manifest.from_plain(plain)
    check_extension(older, study(), INPUTS)
    with pytest.raises(StoreError, match=r"curvature\.tolerance: the store has 0\.001, the study says 0\.01"):
        check_extension(older, study(curvature={"tolerance": 0.01}), INPUTS)


def test_a_source_that_only_a_new_model_uses_may_be_anything(manifest):
    more = study(models=[{"name": "mlp"}, {"name": OWN}, {"name": "own_new:f"}])
    check_extension(manifest, more, StudyInputs(INPUTS.data_key, {OWN: "source", "own_new:f": "new"}))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"name": "t"}, "name: the store has 's', the study says 't'"),
        ({"training": {"steps": 200}}, "training.steps: the store has 1000, the study says 200"),
        (
            {"training": {"steps": 1000, "checkpoints": {"count": 3}}},
            "training.checkpoints.count: the store has 12, the study says 3",
        ),
        (
            {"training": {"steps": 1000, "checkpoints": {"steps": [0, 5]}}},
            "training.checkpoints.steps: the store has nothing, the study says [0, 5]",
        ),
        ({"curvature": {"top": 3}}, "curvature.top: the store has 10, the study says 3"),
        ({"angles": {"window": 0}}, "angles.window: the store has 50, the study says 0"),
        ({"angles": {"shadow": ["adam"]}}, 'angles.shadow: the store has [], the study says ["adam"]'),
        ({"seeds": 2}, "seeds: the store has [2, 3], which the study lacks"),
        ({"models": [{"name": OWN}]}, "models: the store has name = 'mlp'"),
        (
            {"models": [{"name": "mlp", "widths": [3]}, {"name": OWN}]},
            "models (mlp).widths: the store has [64, 64], the study says [3]",
        ),
        ({"optimizers": [{"name": "adam", "lr": [1e-3, 3e-3]}]}, "optimizers: the store has lr = 0.1"),
        (
            {"optimizers": [{"name": "sgd"}, {"name": "adam", "lr": [1e-3, 2e-3]}]},
            "optimizers (adam).lr: the store has 0.003, the study says 0.002",
        ),
    ],
)
def test_a_changed_input_is_refused_by_name_with_the_remedy(manifest, changes, difference):
    with pytest.raises(StoreError) as caught:
        check_extension(manifest, study(**changes), INPUTS)
    message = str(caught.value)
    assert message.startswith(difference)
    assert "another --out" in message
    assert "\n" not in message


def test_changed_content_of_the_data_is_refused(manifest):
    with pytest.raises(
        StoreError, match=r"data: the store has content dddddddddddd, the study finds eeeeeeeeeeee"
    ):
        check_extension(manifest, study(), replace(INPUTS, data_key="e" * 64))


def test_packs_know_the_edited_functions_that_they_depend_on(manifest):
    assert edited_packs(manifest, study(), INPUTS) == {}
    edited = edited_packs(manifest, study(), replace(INPUTS, sources={OWN: "edited"}))
    assert edited == {pack.pack_id: [OWN] for pack in manifest.packs if pack.model.name == OWN}
    assert edited
    check_extension(manifest, study(), replace(INPUTS, sources={OWN: "edited"}))


def test_every_difference_has_a_line(manifest):
    with pytest.raises(StoreError) as caught:
        check_extension(manifest, study(name="t", seeds=1, training={"steps": 2}), INPUTS)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["name", "training.steps", "seeds"]
    assert "another --out" in lines[3]


def test_extended_keeps_the_origin_and_equals_itself_when_nothing_changed(manifest):
    assert extended(manifest, study(), INPUTS, packs_of(study(), manifest.packs)) == manifest
    more = study(seeds=6)
    longer = extended(manifest, more, INPUTS, packs_of(more, manifest.packs))
    assert (longer.created, longer.host, longer.folder) == (manifest.created, manifest.host, manifest.folder)
    assert longer.packs[: len(manifest.packs)] == manifest.packs
    assert study_from_table(longer.study) == more


def test_extended_follows_a_study_that_moved(manifest, tmp_path):
    moved = extended(manifest, study(), INPUTS, manifest.packs, folder=tmp_path / "elsewhere")
    assert moved.folder == str((tmp_path / "elsewhere").resolve())
    assert extended(manifest, study(), INPUTS, manifest.packs, folder=tmp_path) == manifest
