"""Registries name functions by text: each text must lead to the function that it names."""

import pytest
import torch

from lossray.ensembles.methods import METHODS
from lossray.networks.settings import LOSSES, MODELS
from lossray.references import resolve
from lossray.training.data_settings import FUNCTION, SOURCES
from lossray.training.update_rules import OPTIMIZERS

FUNCTIONS = {
    **LOSSES,
    **{name: entry.builder for name, entry in MODELS.items()},
    **{name: source.reader for name, source in SOURCES.items()},
    "package.module:function": FUNCTION.reader,
    **{name: method.recipe for name, method in METHODS.items()},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_name_leads_to_a_function(name):
    module, _, function = FUNCTIONS[name].partition(":")
    found = resolve(FUNCTIONS[name])
    assert (found.__module__, found.__name__) == (module, function)


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.optimizer])
def test_every_optimizer_is_one_of_torch_that_takes_its_keys(name):
    entry = OPTIMIZERS[name]
    settings = entry.settings()
    group = entry.build([torch.zeros(1)], settings).param_groups[0]
    assert isinstance(resolve(entry.optimizer), type)
    assert {key: group[key] for key in entry.keys} == {key: getattr(settings, key) for key in entry.keys}


@pytest.mark.parametrize("registry", [MODELS, SOURCES, OPTIMIZERS], ids=["models", "sources", "optimizers"])
def test_every_entry_stands_under_the_name_that_its_settings_have(registry):
    for name, entry in registry.items():
        field = "source" if registry is SOURCES else "name"
        assert entry.settings.model_fields[field].default == name


def test_what_is_not_there_is_an_error():
    with pytest.raises(AttributeError):
        resolve("lossray.networks.mlp:no_such_function")
    with pytest.raises(ModuleNotFoundError):
        resolve("lossray.networks.no_such_file:build_mlp")
