"""What models and optimizers do not allow is said once, with the reason and all that it takes away."""

import pytest
import torch

from lossray.networks.nests import SEVERAL_INPUTS
from lossray.study import study_from_table
from lossray.study.absences import absences
from lossray.training.data_settings import data_settings
from lossray.training.datasets import load_dataset
from tests.user_code import write

DATA = {"source": "gaussians", "n": 60, "dim": 5, "classes": 3}
RELU, TANH = {"name": "mlp", "widths": [4]}, {"name": "mlp", "widths": [4], "activation": "tanh"}
EVERYTHING = {
    "angles": {"directions": ["gradient", "update"]},
    "degeneracy": {},
    "trajectory": {},
    "surfaces": {},
    "connectivity": {"align": ["none", "permutation", "scale", "both"]},
    "ensembles": {},
}


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(data_settings(DATA), dtype=torch.float32)


def lines(dataset, models=(RELU,), optimizers=("sgd",), seeds=2, **sections):
    table = {
        "name": "s",
        "seeds": seeds,
        "data": DATA,
        "models": list(models),
        "optimizers": [{"name": name} for name in optimizers],
        "training": {"steps": 2},
        **sections,
    }
    return absences(study_from_table(table), dataset)


def test_where_all_is_possible_nothing_is_said(dataset):
    assert lines(dataset, **EVERYTHING) == []


def test_tanh_networks_have_no_rescaling(dataset):
    (line,) = lines(dataset, [TANH, RELU, {**TANH, "widths": [5]}], **EVERYTHING)
    assert line.startswith("models[0], models[2]: no gauge 'balanced'; no paths to rescaled copies; ")
    assert "no paths aligned by 'scale'; no ensembles rescaled_copies, rescale_retrain," in line
    assert "tanh" in line.partition(": ")[2].lower()
    assert "align_curve" not in line  # its units can be permuted


def test_what_is_not_asked_for_is_not_missed(dataset):
    assert lines(dataset, [TANH], angles={"directions": ["gradient"], "gauges": ["raw"]}) == []


def test_optimizers_without_preconditioner_or_momentum(dataset):
    angles = {"directions": ["update", "momentum", "preconditioned_gradient"]}
    curvature = {"operators": ["hessian", "preconditioned:layers"]}
    said = lines(dataset, optimizers=["sgd", "lion", "muon", "adam"], angles=angles, curvature=curvature)
    assert said == [
        "optimizer sgd: no direction 'momentum': it keeps none",
        "optimizers lion, muon: no threshold, no gauge 'preconditioned', no operator 'preconditioned', "
        "no direction 'preconditioned_gradient': its step has no diagonal preconditioner",
        "optimizer sgd: no direction 'preconditioned_gradient': it is the gradient itself",
    ]


def test_rates_that_equal_a_rescaling(dataset):
    asked = {"ensembles": {"methods": ["snapshot", "lr_equivalent"]}, "angles": {"directions": ["update"]}}
    assert lines(dataset, optimizers=["adam", "adadelta"], **asked) == [
        "optimizer adadelta: no ensembles lr_equivalent: no learning rates are equal to a rescaling"
    ]


def test_dimensions_above_dense_up_to(dataset):
    asked = {"degeneracy": {"dense_up_to": 38}, "angles": {"directions": ["update"]}}
    (line,) = lines(dataset, [RELU, {"name": "linear", "widths": [1]}], **asked)  # d = 39 and 8
    assert line.startswith("models[0]: no rank and no exact nullity: its d = 39 is above")


def test_one_seed_has_no_partner(dataset):
    asked = {name: {} for name in ("connectivity", "trajectory")}
    (line,) = lines(dataset, seeds=1, angles={"directions": ["update"]}, **asked)
    assert line == "seeds: no paths between runs, no separations: there is one run of each setting"


def test_no_window_and_no_directions(dataset):
    angles = {"directions": ["update"], "window": 0}
    assert lines(dataset, angles=angles) == ["angles.window = 0: no alignment, on which claim A rests"]
    (line,) = lines(dataset, angles={"directions": []})
    assert line.startswith("angles.directions = []: no directions")


def test_defaults_that_recorded_runs_do_not_allow(dataset):
    table = {"name": "s", "source": "checkpoints", "models": [RELU], "data": DATA}
    assert absences(study_from_table(table), dataset) == [
        "'minibatch_gradient', 'update': not computed, since the next batch of a recorded run is not known",
        "alignment: not computed, since the steps of a recorded run are not known",
    ]


def test_models_of_several_inputs_have_no_copies_and_no_floor(folder):
    write(
        folder,
        lrt_two="import torch\n"
        "from torch import nn\n"
        "def data(): return (torch.ones(30, 3), torch.ones(30, 2)), torch.arange(30) % 2\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)\n"
        "    def forward(self, x, y): return self.c(torch.relu(self.a(x) + self.b(y)))\n"
        "def net(): return Two()\n",
    )
    pairs = load_dataset(data_settings({"source": "lrt_two:data"}), dtype=torch.float32)
    found = lines(pairs, [{"name": "lrt_two:net"}], **EVERYTHING)
    assert all(line.startswith("models[0]: no ") and line.endswith(SEVERAL_INPUTS) for line in found)
    text = "\n".join(found)
    assert "gauge 'balanced'" not in text  # it has that symmetry
    for lost in (
        "rescaled copies",
        "'scale'",
        "'permutation'",
        "'both'",
        "align_curve",
        "structural nullity",
    ):
        assert lost in text
