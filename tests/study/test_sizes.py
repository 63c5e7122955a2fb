"""Models that no memory holds are refused in a line, before they are made."""

import pytest
import torch
from torch import nn

from lossray.errors import ModelError, StudyError
from lossray.networks.models import try_model
from lossray.networks.settings import model_settings
from lossray.study import study_from_table
from lossray.study.checks import check_against_data
from lossray.study.sizes import allocations_that_fit, require_memory
from lossray.training.data_settings import data_settings
from lossray.training.datasets import load_dataset
from tests.user_code import write

DATA = {"source": "gaussians", "n": 60, "dim": 5, "classes": 3}


@pytest.mark.parametrize(
    ("table", "count"),
    [
        ({"name": "mlp", "widths": [10**11]}, f"{9 * 10**11 + 3:,}"),
        ({"name": "linear", "widths": [10**7, 10**8]}, f"{10**15 + 5 * 10**7 + 3 * 10**8:,}"),
        ({"name": "mlp", "widths": [10**10, 10**10]}, r"more than 2\^63"),
    ],
)
def test_the_parameters_are_counted_and_not_made(table, count):
    with pytest.raises(
        ModelError, match=f"{table['name']}' has {count} parameters, which need .* can be had"
    ):
        require_memory(model_settings(table), (5,), 3)


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "resnet", "vit"])
def test_models_of_common_sizes_are_let_through(name):
    before = torch.get_rng_state()
    require_memory(model_settings({"name": name}), (1, 8, 8), 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_study_with_such_a_model_is_refused_with_its_place():
    table = {"name": "s", "seeds": 1, "data": DATA, "optimizers": [{"name": "sgd"}]}
    study = study_from_table(table | {"models": [{"name": "mlp"}, {"name": "mlp", "widths": [10**12]}]})
    with pytest.raises(StudyError, match=r"^models\[1\]: 'mlp' has 9,000,000,000,003 parameters"):
        check_against_data(study, load_dataset(data_settings(DATA), dtype=torch.float32))


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(10**7, 10**9), lambda: torch.zeros((10**8, 10**8)), lambda: torch.empty(10**16)],
)
def test_a_users_function_is_stopped_before_the_allocation(make):
    refused = pytest.raises(ModelError, match=r"'mine:net' asks for a tensor \[.*can be had here")
    with refused, allocations_that_fit("mine:net"):
        make()


def test_a_block_that_fits_is_left_alone():
    with allocations_that_fit("mine:net"):
        values = nn.Linear(3, 2)(torch.ones(1, 3))
        meta = torch.empty(10**16, device="meta")
    assert values.shape == (1, 2)
    assert meta.numel() == 10**16


def test_a_compiled_model_is_tried_as_it_was_written(tmp_path, monkeypatch):
    """Within the guard nothing compiled runs: its own frames would be compiled with it."""
    write(tmp_path, lrt_compiled=COMPILED)
    monkeypatch.syspath_prepend(tmp_path)
    with allocations_that_fit("lrt_compiled:net"):
        model, outputs = try_model(model_settings({"name": "lrt_compiled:net"}), torch.ones(2, 3), 4)
    assert outputs.shape == (2, 4)
    assert not model.compiled_graphs


COMPILED = """
import torch

graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

def net():
    model = torch.compile(torch.nn.Linear(3, 4), backend=backend, fullgraph=True)
    model.compiled_graphs = graphs
    return model
"""
