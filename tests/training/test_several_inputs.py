"""Inputs that are a tuple or a mapping: read, divided, standardised, drawn and evaluated as one tensor is."""

import sys

import pytest
import torch

from lossray.errors import DataError
from lossray.networks.nests import tensors_in
from lossray.training.batches import next_minibatch
from lossray.training.data_settings import data_settings
from lossray.training.datasets import analysis_set, load_dataset, on_device
from lossray.training.settings import TrainingSettings

MODULE = """
import numpy as np
import torch

N = 30
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(2))
Y = torch.arange(N) % 3
A, B, IDS = X[:, :3], X[:, 3:], torch.arange(2 * N).view(N, 2)

KINDS = {
    "joined": X,
    "tuple": (A, B),
    "mapping": {"b": B.numpy(), "a": A},
    "same_lengths": (A, A + 1),
    "ids": {"a": A, "ids": IDS},
    "flat": (A, torch.arange(N)),
    "single": (A,),
    "lengths": (A, B[:-1]),
    "numbers": {"a": 1.0},
    "list": [A, B],
    "keys": {0: A},
    "empty": {},
    "nan": {"a": A, "b": torch.where(B == B.max(), torch.nan, B)},
}

def data(kind, splits=False):
    inputs = KINDS[kind]
    if not splits:
        return inputs, Y
    pick = lambda part: tuple(x[part] for x in inputs)
    parts = {"train": slice(0, 15), "validation": slice(15, 21), "test": slice(21, 30)}
    return {name: (pick(part), Y[part]) for name, part in parts.items()}

def unlike():
    return {"train": ((A, B), Y), "validation": ((A, B), Y), "test": ((A, A), Y)}
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "lossray_test_several.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("lossray_test_several", None)


def load(kind, function="data", dtype=torch.float32, **table):
    arguments = {} if function != "data" else {"kind": kind}
    return load_dataset(
        data_settings({"source": f"lossray_test_several:{function}", **arguments, **table}), dtype=dtype
    )


def joined(inputs):
    return torch.cat([inputs["a"], inputs["b"]] if isinstance(inputs, dict) else list(inputs), dim=1)


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
@pytest.mark.parametrize("standardise", ["none", "feature"])
def test_divided_and_standardised_as_one_tensor(kind, standardise):
    one, several = (load(own, standardise=standardise) for own in ("joined", kind))
    assert isinstance(several.train.inputs, tuple if kind == "tuple" else dict)
    for split in ("train", "validation", "test"):
        assert torch.equal(joined(getattr(several, split).inputs), getattr(one, split).inputs)
        assert torch.equal(getattr(several, split).targets, getattr(one, split).targets)
    assert torch.equal(joined(analysis_set(several, 7).inputs), analysis_set(one, 7).inputs)
    assert torch.equal(joined(on_device(several, torch.device("cpu")).test.inputs), one.test.inputs)
    assert several.input_shape == (((3,), (2,)) if kind == "tuple" else {"a": (3,), "b": (2,)})
    assert len({one.fingerprint, several.fingerprint}) == 2


def test_the_same_contents_in_another_nest_are_other_data():
    assert load("tuple").fingerprint != load("mapping").fingerprint
    assert load("tuple").fingerprint == load("tuple", dtype=torch.float64).fingerprint


@pytest.mark.parametrize("batch_size", [4, "full"])
def test_minibatches_are_drawn_alike(batch_size):
    training = TrainingSettings(batch_size=batch_size)
    one, several = (next_minibatch(load(own), training, (3, 5), 2) for own in ("joined", "tuple"))
    assert torch.equal(torch.cat(several.inputs, dim=-1), one.inputs)
    assert torch.equal(several.targets, one.targets)


def test_integers_among_the_inputs_stay_as_they_are():
    dataset = load("ids", standardise="feature")
    assert dataset.train.inputs["ids"].dtype == torch.int64
    pairs = dataset.train.inputs["ids"]
    assert torch.equal(pairs[:, 1], pairs[:, 0] + 1)
    assert dataset.train.inputs["a"].mean(dim=0).abs().max() < 1e-6
    assert load("flat").input_shape == ((3,), ())


def test_tensors_of_one_shape_and_single_ones_are_inputs_too():
    first, second = tensors_in(load("same_lengths", standardise="none").train.inputs)
    assert torch.equal(second, first + 1)
    assert load("single").input_shape == ((3,),)


def test_splits_of_the_function_itself():
    dataset = load("tuple", splits=True, standardise="none")
    assert [len(x) for x in (*dataset.train.inputs, *dataset.test.inputs)] == [15, 15, 9, 9]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("lengths", r"inputs are a tuple of float64 \[30, 3\], float64 \[29, 2\], but there are 30 targets"),
        ("numbers", r"inputs\['a'\] are empty"),
        ("list", "inputs are ragged.*; 2 inputs of a model are a tuple or a mapping"),
        ("keys", "a mapping with the keys 0; expected names"),
        ("empty", "a mapping with the keys none"),
        ("nan", r"inputs\['b'\] are not finite in 1 of 30 examples"),
    ],
)
def test_inputs_that_cannot_be_used(kind, text):
    with pytest.raises(DataError, match=text):
        load(kind)


def test_splits_that_differ():
    with pytest.raises(DataError, match=r"test inputs are a tuple of .* \[30, 3\], .* \[30, 3\], train"):
        load("", function="unlike")
