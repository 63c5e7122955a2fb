"""Task keys: changed by everything that a result depends on, and by nothing else."""

from dataclasses import replace
from typing import Annotated

import pytest

from lossray.operators.settings import CurvatureSettings
from lossray.settings import ADDED, Settings
from lossray.storage.tables import TABLES
from lossray.study import (
    StudyInputs,
    checkpoint_key,
    curvature_key,
    pair_key,
    pair_tables,
    partition,
    separations_key,
    study_from_table,
    study_inputs,
    surface_key,
    surface_members,
    training_key,
    trajectory_key,
    versions_of,
)
from lossray.study.keys import CURVATURE_VERSION, KEY_VERSION
from tasks.commit_record import versions_in, versions_text

MODEL, LOSS, DATA, OTHER = "own_model:f", "own_loss:f", "own_data:f", "own_other:f"


def study(**changes):
    table = {
        "name": "s",
        "seeds": 3,
        "data": {"source": DATA},
        "models": [{"name": MODEL, "width": 3}],
        "optimizers": [{"name": "adam"}],
        "training": {"loss": LOSS, "steps": 10},
    }
    return study_from_table(table | changes)


def inputs(data="d", **changes):
    return StudyInputs(
        data, {MODEL: "m", LOSS: "l", DATA: "s"} | {f"own_{key}:f": v for key, v in changes.items()}
    )


def keys(study, inputs, *, executor="vmap", mode="double"):
    """(training key, curvature key at step 10) of the first pack."""
    pack = partition(study, (), lambda setting: (executor, mode))[0]
    return training_key(pack, study, inputs), curvature_key(pack, 10, study, inputs)


BASE = keys(study(), inputs())


def test_keys_are_reproducible_names():
    assert keys(study(), inputs()) == BASE
    assert all(key.isalnum() for key in BASE)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"loss": LOSS, "steps": 11}},
        {"training": {"loss": LOSS, "steps": 10, "batch_size": 32}},
        {"training": {"loss": LOSS, "steps": 10, "checkpoints": {"steps": [0, 5, 10]}}},
        {"training": {"loss": LOSS, "steps": 10, "log_every": 1}},
        {"training": {"loss": LOSS, "steps": 10, "dtype": "float64"}},
        {"training": {"loss": LOSS, "steps": 10, "diverged_above": 10.0}},
        {"optimizers": [{"name": "adam", "lr": 0.01}]},
        {"optimizers": [{"name": "adamw"}]},
        {"optimizers": [{"name": "adam", "schedule": "cosine"}]},
        {"models": [{"name": MODEL, "width": 4}]},
        {"seeds": [0, 1]},
        {"seeds": [0, 1, 3]},
        {"angles": {"shadow": ["sgd"]}},
    ],
)
def test_both_keys_change_with_what_training_depends_on(changes):
    training, curvature = keys(study(**changes), inputs())
    assert training != BASE[0]
    assert curvature != BASE[1]


@pytest.mark.parametrize(
    "changed", [inputs(data="e"), inputs(model="x"), inputs(loss="x"), inputs(data="d", other="x")]
)
def test_both_keys_change_with_data_and_sources_of_the_pack(changed):
    training, curvature = keys(study(), changed)
    involved = changed != inputs(other="x")
    assert (training != BASE[0]) == (curvature != BASE[1]) == involved


@pytest.mark.parametrize(
    "changes",
    [
        {"curvature": {"top": 3}},
        {"curvature": {"tolerance": 1e-4}},
        {"curvature": {"examples": 100}},
        {"curvature": {"dtype": "float64"}},
        {"curvature": {"operators": ["ggn"]}},
        {"curvature": {"vectors": False}},
        {"angles": {"directions": ["gradient"]}},
        {"angles": {"gauges": ["raw"]}},
        {"angles": {"window": 0}},
        {"angles": {"layers": True}},
    ],
)
def test_analysis_settings_change_the_curvature_key_only(changes):
    training, curvature = keys(study(**changes), inputs())
    assert training == BASE[0]
    assert curvature != BASE[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"resources": {"pack": 16, "train": {"cpus": 2}, "curvature": {"gpus": 1}}},
        {"resources": {"wait": 5, "train": {"labels": {"zone": "in(a, b)"}, "fallback": [{"zone": "c"}]}}},
        {"claims": {"alpha": 0.1}},
        {"degeneracy": {"dense_up_to": 3}},
        {"trajectory": {}, "surfaces": {}},
        {"connectivity": {"bends": 2}, "ensembles": {"budgets": [3]}},
        {"data": {"source": DATA, "place": "elsewhere"}},
        {"models": [{"name": MODEL, "width": 3}, {"name": "mlp"}]},
        {"optimizers": [{"name": "adam"}, {"name": "sgd"}]},
    ],
)
def test_nothing_else_changes_a_key(changes):
    assert keys(study(**changes), inputs()) == BASE


def test_executor_changes_training_and_product_mode_curvature():
    training, curvature = keys(study(), inputs(), executor="loop")
    # "auto" packs of the loop executor hold one seed, so compare packs of the same seeds.
    one = study(resources={"pack": 3})
    assert keys(one, inputs(), executor="loop")[0] != BASE[0]
    assert keys(one, inputs(), mode="graph")[0] == BASE[0]
    assert keys(one, inputs(), mode="graph")[1] != BASE[1]
    assert training != BASE[0]
    assert curvature != BASE[1]


def test_the_key_of_a_pair_is_made_of_those_of_its_two_analyses(monkeypatch):
    base = pair_key("a", "b", study())
    assert pair_key("a", "b", study(name="other", seeds=9)) == base
    assert (
        len({base, pair_key("b", "a", study()), pair_key("a", "c", study()), pair_key("c", "b", study())})
        == 4
    )
    for name in pair_tables(study()):
        with monkeypatch.context() as patch:
            patch.setitem(TABLES, name, replace(TABLES[name], version=TABLES[name].version + 1))
            assert pair_key("a", "b", study()) != base


@pytest.mark.parametrize(
    ("changes", "tables"),
    [
        ({}, ("overlaps", "directions", "shares", "angles")),
        ({"curvature": {"vectors": False}}, ("directions", "shares")),
        ({"angles": {"directions": ["update"]}}, ("overlaps",)),
        ({"curvature": {"vectors": False}, "angles": {"directions": ["update"]}}, ()),
    ],
)
def test_a_pair_writes_what_the_study_asks_for(changes, tables):
    assert pair_tables(study(**changes)) == tables


def test_keys_of_steps_and_kinds_differ():
    one = study()
    pack = partition(one, (), lambda setting: ("vmap", "double"))[0]
    found = [training_key(pack, one, inputs())]
    found += [checkpoint_key(found[0], step) for step in (0, 10)]
    found += [curvature_key(pack, step, one, inputs()) for step in (0, 10)]
    assert len(set(found)) == 5


class Younger(CurvatureSettings):
    added: Annotated[bool, ADDED] = False


def test_an_added_setting_is_in_keys_where_it_is_set_alone():
    one = study()
    left, given = (
        one.model_copy(update={"curvature": Younger(**dict(one.curvature), **own)})
        for own in ({}, {"added": True})
    )
    assert left.curvature.plain() == {**one.curvature.plain(), "added": False}
    assert keys(left, inputs()) == BASE
    assert keys(given, inputs())[0] == BASE[0]
    assert keys(given, inputs())[1] != BASE[1]


def test_an_added_setting_of_a_section_within_a_section_counts_likewise():
    class Outer(Settings):
        own: int = 1
        inner: Younger = Younger()

    assert Outer(inner=Younger(added=True)).content() == Outer(inner=Younger(added=True)).plain()
    assert Outer().content() == {"own": 1, "inner": CurvatureSettings().plain()}


def test_the_versions_of_a_kind_are_those_that_its_key_holds():
    kinds = ("training", "checkpoint", "curvature", "pair", "degeneracy", "trajectory", "separations")
    for kind in (*kinds, "surfaces", "connectivity", "ensemble"):
        found = versions_of(kind)
        assert found["training"] == KEY_VERSION
        assert versions_in(versions_text(found)) == found
    assert versions_of("pair")["curvature"] == versions_of("surfaces")["curvature"] == CURVATURE_VERSION
    assert versions_of("unheard of") == {}


def test_study_inputs_hash_the_users_modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "lossray_test_inputs.py"
    module.write_text("def f():\n    return 1\n")
    one = study(
        data={"source": "digits"}, models=[{"name": "lossray_test_inputs:f"}], training={"loss": "mse"}
    )
    before = study_inputs(one, "d")
    assert before == study_inputs(one, "d")
    assert list(before.sources) == ["lossray_test_inputs:f"]
    module.write_text("def f():\n    return 2\n")
    after = study_inputs(one, "d")
    assert after.sources != before.sources
    assert keys(one, before)[0] != keys(one, after)[0]


# ---- trajectories and surfaces


def packs_of(study):
    return partition(study, (), lambda setting: ("loop", "double"))  # one seed each


def places(study, given=None):
    """(trajectory key, separations key, surface key at step 10) of the second seed of three."""
    earlier, pack = packs_of(study)[:2]
    given = given or inputs()
    return (
        trajectory_key(pack, study, given),
        separations_key(pack, [earlier], study, given),
        surface_key(pack, 10, study, given),
    )


def drawn(**changes):
    return study(**{"trajectory": {}, "surfaces": {"seeds": "all"}} | changes)


def test_keys_of_places_are_three_and_reproducible():
    assert places(drawn()) == places(drawn())
    assert len(set(places(drawn()))) == 3


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"name": "other", "claims": {"alpha": 0.1}}, (False, False, False)),
        ({"seeds": [0, 1, 2, 5]}, (False, False, False)),
        ({"trajectory": {"between_seeds": False}}, (False, False, False)),
        ({"surfaces": {"seeds": 2}}, (False, False, False)),  # the second seed has surfaces either way
        ({"surfaces": {"seeds": "all", "checkpoints": "all"}}, (False, False, False)),
        ({"surfaces": {"seeds": 1}}, (False, False, True)),
        ({"surfaces": {"seeds": "all", "points": 5}}, (False, False, True)),
        ({"surfaces": {"seeds": "all", "span": 2.0}}, (False, False, True)),
        ({"surfaces": {"seeds": "all", "kinds": ["pca"]}}, (False, False, True)),
        ({"curvature": {"examples": 50}}, (False, False, True)),
        ({"curvature": {"vectors": False}}, (False, False, True)),
        ({"training": {"loss": LOSS, "steps": 10, "checkpoints": {"steps": [0, 5, 10]}}}, (True, True, True)),
        ({"optimizers": [{"name": "adam", "lr": 0.01}]}, (True, True, True)),
    ],
)
def test_keys_of_places_change_with_what_their_rows_depend_on(changes, changed):
    before, after = places(drawn()), places(drawn(**changes))
    assert tuple(old != new for old, new in zip(before, after, strict=True)) == changed


def test_keys_of_places_change_with_the_data_the_sources_and_their_tables(monkeypatch):
    before = places(drawn())
    for given in (inputs(data="e"), inputs(model="x"), inputs(loss="x")):
        assert not set(before) & set(places(drawn(), given))
    for i, name in enumerate(("trajectory", "separations", "surfaces")):
        with monkeypatch.context() as patch:
            patch.setitem(TABLES, name, replace(TABLES[name], version=TABLES[name].version + 1))
            after = places(drawn())
        assert [old != new for old, new in zip(before, after, strict=True)] == [i == j for j in range(3)]


def test_the_key_of_separations_holds_every_pack_they_are_taken_from():
    one = drawn()
    first, second, third = packs_of(one)
    found = [
        separations_key(third, earlier, one, inputs())
        for earlier in ([first, second], [second, first], [first], [])
    ]
    assert len(set(found)) == 4
    assert separations_key(second, [first], one, inputs()) not in found


def test_surfaces_are_those_of_the_first_seeds_of_the_study():
    def members(order, **surfaces):
        one = drawn(seeds=order, surfaces=surfaces, resources={"pack": 2})
        packs = partition(one, (), lambda setting: ("vmap", "double"))
        return [surface_members(pack, one) for pack in packs]

    assert members([7, 3, 5]) == [(0,), ()]
    assert members([7, 3, 5], seeds=2) == [(0, 1), ()]
    assert members([7, 3, 5], seeds=9) == members([7, 3, 5], seeds="all") == [(0, 1), (0,)]
