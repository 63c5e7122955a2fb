"""Targets keep the shape in which a source gives them, and so reach the loss."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lossray.errors import DataError
from lossray.limits import WHOLE
from lossray.training.data_settings import data_settings
from lossray.training.datasets import analysis_set, load_dataset, load_whole
from lossray.training.evaluation import evaluate_split

MODULE = """
import numpy as np
import pandas as pd
import torch

N = 24
X = np.random.default_rng(5).standard_normal((N, 3))
VALUES = np.arange(N) / 4

def shaped(kind, shape=(), splits=False):
    y = np.broadcast_to(VALUES.reshape(N, *[1] * len(shape)), (N, *shape))
    y = {
        "float64": lambda: y + 0.1,
        "float32": lambda: torch.tensor(y + 0.1).float(),
        "int32": lambda: (4 * y).astype(np.int32) % 3,
        "bool": lambda: torch.tensor(y > 2),
        "list": lambda: (y + 0.1).tolist(),
        "pandas": lambda: pd.Series(y + 0.1) if y.ndim == 1 else pd.DataFrame(y + 0.1),
    }[kind]()
    pair = (pd.DataFrame(X) if kind == "pandas" else X), y
    if not splits:
        return pair
    return {name: (X[part], y[part]) for name, part in
            {"train": slice(0, 12), "validation": slice(12, 18), "test": slice(18, 24)}.items()}

def labels(ids):
    return X, np.resize(ids, N)
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "lossray_test_targets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("lossray_test_targets", None)


def load(function, dtype=torch.float32, reader=load_dataset, **arguments):
    return reader(data_settings({"source": f"lossray_test_targets:{function}", **arguments}), dtype=dtype)


@pytest.mark.parametrize("kind", ["float64", "float32", "int32", "bool", "list", "pandas"])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 2)])
def test_targets_keep_their_shape(kind, shape):
    if kind == "pandas" and len(shape) > 1:
        return
    floats = kind not in ("int32", "bool")
    for splits in (False, True) if kind != "pandas" else (False,):
        dataset = load("shaped", kind=kind, shape=list(shape), splits=splits)
        for split in (dataset.train, dataset.validation, dataset.test):
            assert split.targets.shape == (len(split.inputs), *shape)
            assert split.targets.dtype == (torch.float32 if floats else torch.int64)
        assert dataset.n_outputs == ((shape[0] if shape else 1) if floats else 3 if kind == "int32" else 2)
        assert analysis_set(dataset, 5).targets.shape == (5, *shape)
    whole = load("shaped", reader=load_whole, kind=kind, shape=list(shape))
    assert whole.train.targets.shape == (24, *shape)


def test_float_columns_of_parquet_are_one_number_an_example(tmp_path):
    values = np.arange(40) / 8
    pq.write_table(pa.table({"x": values, "y": values**2}), tmp_path / "a.parquet")
    table = {"source": "parquet", "path": "a.parquet", "features": ["x"], "label": "y"}
    dataset = load_dataset(
        data_settings({**table, "standardise": "none"}), dtype=torch.float64, base=tmp_path
    )
    assert dataset.train.targets.shape == (28,)
    assert torch.equal(dataset.train.targets, dataset.train.inputs[:, 0] ** 2)


def test_the_shape_is_part_of_the_content():
    flat, column = (load("shaped", kind="float64", shape=shape) for shape in ([], [1]))
    assert torch.equal(flat.train.targets, column.train.targets[:, 0])
    assert flat.fingerprint != column.fingerprint


def test_ids_below_zero_are_no_classes():
    assert load("labels", ids=[0, 1, -100, 3]).n_outputs == 4
    with pytest.raises(DataError, match="integers from -7 to 0; expected class ids"):
        load("labels", ids=[0, -7])


class Outputs:
    """In place of a stack: the same outputs for every member."""

    limits = WHOLE

    def __init__(self, values):
        self.values = values

    def outputs(self, theta, buffers, inputs):
        return self.values[None].expand(len(theta), *self.values.shape)


@pytest.mark.parametrize(
    ("outputs", "targets", "accuracy"),
    [
        ([[2.0, 1.0], [0.0, 3.0], [0.0, 1.0]], [0, 0, 1], 2 / 3),
        ([[2.0, 1.0], [0.0, 3.0], [0.0, 1.0]], [0, 0, -100], 1 / 2),  # what is no class does not count
        ([[2.0], [0.0], [0.0]], [0, 0, 1], None),  # one logit: the largest output says nothing
        ([2.0, 0.0, 0.0], [0, 0, 1], None),
        ([[[2.0, 1.0]], [[0.0, 3.0]], [[0.0, 1.0]]], [0, 0, 1], None),
        ([[2.0], [0.0], [0.0]], [0.0, 0.0, 1.0], None),
    ],
)
def test_accuracy_is_of_classes_and_their_outputs(outputs, targets, accuracy):
    shapes = set()

    def loss(outputs, targets):
        shapes.add((tuple(outputs.shape), tuple(targets.shape)))
        return outputs.mean()

    class Examples:
        inputs = torch.zeros(3, 1)

    Examples.targets = torch.tensor(targets)
    _, found = evaluate_split(Outputs(torch.tensor(outputs)), torch.zeros(2, 1), {}, loss, Examples)
    assert found.tolist() == pytest.approx([torch.nan if accuracy is None else accuracy] * 2, nan_ok=True)
    assert shapes == {(torch.tensor(outputs).shape, (3,))}


def test_words_and_data_loaders_are_told_what_to_return(tmp_path):
    (tmp_path / "lossray_test_targets.py").write_text(
        MODULE + "def words():\n    return X, np.resize(['u', 'v'], N)\n"
        "def loader():\n"
        "    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.arange(N) % 2)\n"
        "    return torch.utils.data.DataLoader(data)\n"
    )
    sys.modules.pop("lossray_test_targets", None)
    with pytest.raises(DataError, match=r"targets have dtype <U1; .* np\.unique\(labels, return_"):
        load("words")
    with pytest.raises(DataError, match=r"returned DataLoader .*\(inputs, targets\) as whole tensors"):
        load("loader")
