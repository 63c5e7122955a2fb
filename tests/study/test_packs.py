"""Expansion into settings and packs: all runs once, stable under resume and extension."""

import re

import pytest

from lossray.study import Pack, partition, settings_of, study_from_table


def study(**changes):
    table = {
        "name": "s",
        "seeds": 5,
        "models": [{"name": "mlp"}, {"name": "mlp", "widths": [3]}],
        "optimizers": [{"name": "sgd"}, {"name": "adam", "lr": [1e-3, 3e-3]}],
    }
    return study_from_table(table | changes)


def vmap(setting):
    return "vmap", "double"


def never(setting):
    raise AssertionError(f"{setting.setting_id} was decided again")


def runs(packs):
    return [run for pack in packs for run in pack.run_ids]


def test_a_model_may_name_the_optimizers_that_train_it():
    named = [{"name": "mlp", "optimizers": ["adam"]}, {"name": "mlp", "widths": [3]}]
    everyone = {(s.model.widths, s.optimizer.name, s.setting_id) for s in settings_of(study())}
    found = [(s.model.widths, s.optimizer.name, s.setting_id) for s in settings_of(study(models=named))]
    assert [entry[:2] for entry in found] == [
        ((64, 64), "adam"),
        ((64, 64), "adam"),
        ((3,), "sgd"),
        ((3,), "adam"),
        ((3,), "adam"),
    ]
    assert set(found) < everyone  # the same runs, under the same names


def test_settings_are_models_times_optimizers_with_distinct_ids():
    settings = settings_of(study())
    assert [(s.model.widths, s.optimizer.name) for s in settings[:4]] == [
        ((64, 64), "sgd"),
        ((64, 64), "adam"),
        ((64, 64), "adam"),
        ((3,), "sgd"),
    ]
    assert len({s.setting_id for s in settings}) == 6
    assert all(re.fullmatch(r"mlp-(sgd|adam)-[0-9a-f]{8}", s.setting_id) for s in settings)


def test_id_of_a_users_model_is_fit_for_file_names():
    own = study(models=[{"name": "my.nets:build_it", "depth": 3}])
    assert re.fullmatch(r"build_it-sgd-[0-9a-f]{8}", settings_of(own)[0].setting_id)


def test_ids_do_not_depend_on_how_a_value_is_written():
    one = study(optimizers=[{"name": "sgd", "lr": 1}])
    other = study(optimizers=[{"lr": 1.0, "name": "sgd", "weight_decay": 0.0}])
    assert settings_of(one)[0].setting_id == settings_of(other)[0].setting_id


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"steps": 7}},
        {"training": {"dtype": "float64"}},
        {"training": {"loss": "mse"}},
        {"training": {"batch_size": "full"}},
        {"models": [{"name": "mlp", "activation": "tanh"}]},
        {"optimizers": [{"name": "sgd", "weight_decay": 0.1}]},
    ],
)
def test_ids_change_with_what_changes_training(changes):
    assert settings_of(study(**changes))[0].setting_id != settings_of(study())[0].setting_id


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"seeds": [9]},
        {"data": {"source": "parquet", "path": "x", "label": "y", "features": ["a"]}},
        {"curvature": {"top": 3}},
        {"angles": {"window": 0}},
        {"claims": {"alpha": 0.1}},
        {"resources": {"pack": 1}},
    ],
)
def test_ids_do_not_change_with_anything_else(changes):
    assert settings_of(study(**changes)) == settings_of(study())


def test_packs_hold_every_run_once():
    packs = partition(study(resources={"pack": 2}), (), vmap)
    assert len(set(runs(packs))) == len(runs(packs)) == 6 * 5
    assert [pack.seeds for pack in packs[:3]] == [(0, 1), (2, 3), (4,)]
    assert len({pack.pack_id for pack in packs}) == len(packs)
    assert packs[0].run_ids == (f"{packs[0].setting_id}-s0", f"{packs[0].setting_id}-s1")


@pytest.mark.parametrize(("executor", "size"), [("vmap", 16), ("loop", 1)])
def test_automatic_size_depends_on_the_executor(executor, size):
    packs = partition(study(seeds=33), (), lambda setting: (executor, "double"))
    own = [len(pack.seeds) for pack in packs if pack.setting_id == packs[0].setting_id]
    assert own == [size] * (33 // size) + ([33 % size] if 33 % size else [])


def test_decides_once_for_each_setting():
    asked = []
    partition(
        study(resources={"pack": 1}),
        (),
        lambda setting: asked.append(setting.setting_id) or ("vmap", "double"),
    )
    assert asked == [setting.setting_id for setting in settings_of(study())]


def test_resume_keeps_packs_and_decisions_with_other_resources():
    packs = partition(study(), (), vmap)
    again = study(resources={"pack": 1, "train": {"cpus": 2}})
    assert partition(again, packs, never) == packs


def test_added_seeds_make_new_packs_of_the_same_executor():
    packs = partition(study(), (), lambda setting: ("loop", "graph"))
    more = partition(study(seeds=[7, 3, 0, 1, 2, 4, 6], resources={"pack": 8}), packs, never)
    added = more[len(packs) :]
    assert more[: len(packs)] == packs
    assert [pack.seeds for pack in added] == [(7, 6)] * 6
    assert {(pack.executor, pack.product_mode) for pack in added} == {("loop", "graph")}
    assert len(set(runs(more))) == len(runs(more)) == 6 * 7


def test_added_optimizers_and_models_make_new_packs_only_for_themselves():
    packs = partition(study(), (), vmap)
    wider = study(
        models=[{"name": "linear"}, {"name": "mlp"}, {"name": "mlp", "widths": [3]}],
        optimizers=[{"name": "adam", "lr": [1e-3, 3e-3, 1e-2]}, {"name": "sgd"}],
    )
    asked = []
    more = partition(wider, packs, lambda setting: asked.append(setting) or ("loop", "graph"))
    assert more[: len(packs)] == packs
    assert len(asked) == 12 - 6
    assert not {pack.setting_id for pack in packs} & {setting.setting_id for setting in asked}


def test_pack_round_trip():
    for pack in partition(study(models=[{"name": "my.nets:build", "depth": [1]}, {"name": "cnn"}]), (), vmap):
        assert Pack.from_plain(pack.plain()) == pack
