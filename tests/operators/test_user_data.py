"""What is one batch, what a list of them, and what is refused, by its form alone."""

from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lossray
from lossray.errors import DataError
from lossray.operators.user_data import as_tensors, described, example_batch, read_data

X, Y = torch.randn(6, 3), torch.arange(6)
ITEM = {"inputs": X, "labels": Y}
USER = UserDict(ITEM)  # as tokenizers return them: a Mapping that is no dict
PAIR = (X, Y)
Named = namedtuple("Named", "inputs targets")
ONE, MANY, REFUSED = "one batch", "a list of batches", "refused"


@pytest.mark.parametrize(
    ("data", "with_loss", "with_closure"),
    [
        (PAIR, ONE, ONE),
        (Named(X, Y), ONE, ONE),
        ((ITEM, ITEM), ONE, ONE),  # inputs and targets, both mappings
        (((X, X), Y), ONE, ONE),
        (ITEM, ONE, ONE),
        (USER, ONE, ONE),
        (X, ONE, ONE),
        ([X, Y], ONE, MANY),
        ([X.numpy(), Y.numpy()], ONE, MANY),
        ([X, Y, Y], ONE, MANY),
        ([ITEM, Y], ONE, MANY),
        ([USER, Y], ONE, MANY),
        ([X, ITEM], ONE, MANY),
        ([(X, X), Y], ONE, MANY),
        ([[X, X], Y, None], ONE, MANY),
        ([ITEM, ITEM], REFUSED, MANY),
        ([ITEM], REFUSED, MANY),
        ([USER, USER, USER], REFUSED, MANY),
        ([OrderedDict(ITEM), ITEM], REFUSED, MANY),
        ([PAIR, PAIR], MANY, MANY),
        ([PAIR], MANY, MANY),
        ([[X, Y], [X, Y]], MANY, MANY),
        ([Named(X, Y), Named(X, Y), Named(X, Y)], MANY, MANY),
        ([(ITEM, Y), (ITEM, Y)], MANY, MANY),
        ([object(), object()], MANY, MANY),
        (DataLoader(TensorDataset(X, Y)), MANY, MANY),
    ],
)
def test_every_form_is_read_in_one_way(data, with_loss, with_closure):
    for closure, expected in ((False, with_loss), (True, with_closure)):
        if expected == REFUSED:
            with pytest.raises(
                DataError, match=r"one mapping needs a closure.* is a tuple \(inputs, targets\)"
            ):
                read_data(data, closure=closure)
        else:
            assert (read_data(data, closure=closure) is data) == (expected == MANY)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (ITEM, "a dict with inputs, labels"),
        (USER, "a UserDict with inputs, labels"),
        (X, r"a tensor \[6, 3\]"),
        ((X,), r"a tuple of 1 \(\[6, 3\]\)"),
        ([X, Y, Y, Y], r"a list of 4 \(\[6, 3\], \[6\], \[6\], \[6\]\)"),
        (object(), "an? object"),
        ((X, Y[:4]), r"inputs a tensor \[6, 3\] and targets a tensor \[4\]"),
        (((X, X[:2]), Y), r"inputs a tuple of 2 \(\[6, 3\], \[2, 3\]\) and targets a tensor \[6\]"),
        ((X, Y.tolist()), "targets a list of 6"),
        ((X.tolist(), Y), "inputs a list of 6"),
        ((X, torch.tensor(1)), r"targets a tensor \[\]"),
        ((object(), object()), "inputs an? object"),
    ],
)
def test_a_batch_of_another_form_is_refused_with_what_takes_it(raw, message):
    with pytest.raises(DataError, match=f"{message}.*closure="):
        example_batch(raw)


def test_a_data_set_is_read_through_a_loader():
    with pytest.raises(DataError, match="found TensorDataset; wrap it in a DataLoader"):
        read_data(TensorDataset(X, Y))


def test_arrays_of_every_kind_become_tensors():
    array = np.arange(6.0).reshape(2, 3)
    fixed = array.copy()
    fixed.setflags(write=False)
    for own in (array, array[::-1][::-1], array.astype(">f8"), np.asfortranarray(array), fixed):
        assert torch.equal(as_tensors(own), torch.arange(6.0, dtype=torch.float64).view(2, 3))
    assert torch.equal(as_tensors(array[::-1]), torch.as_tensor(array).flip(0))
    nest = as_tensors((UserDict(a=array), [array, {"b": array}], "text"))
    assert isinstance(nest[0], dict)
    assert all(isinstance(t, torch.Tensor) for t in (nest[0]["a"], nest[1][0], nest[1][1]["b"]))
    with pytest.raises(DataError, match=r"an array of <U1 \[2\]; torch has no such"):
        as_tensors(np.array(["a", "b"]))


def test_values_are_described_by_shapes_keys_and_lengths():
    assert described(()) == "a tuple of 0"
    assert described([X, "text"]) == "a list of 2"
    assert described([X] * 5) == "a list of 5"
    assert described(1.5) == "a float"


@pytest.mark.parametrize("kind", [dict, UserDict, OrderedDict])
def test_batches_of_mappings_reach_a_closure_as_they_are_but_in_the_dtype(kind):
    """Two of them are two batches, of the mean that a tuple of all examples gives."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    inputs, labels = torch.randn(7, 3), torch.arange(7) % 4
    batches = [kind(x=inputs[:5], y=labels[:5]), kind(x=inputs[5:], y=labels[5:])]
    found = []

    def closure(own, batch):
        found.append(type(batch))
        return torch.nn.functional.cross_entropy(own(batch["x"]), batch["y"]), float(len(batch["y"]))

    one = lossray.Hessian(model, closure=closure, data=batches, dtype=torch.float64)
    other = lossray.Hessian(model, torch.nn.functional.cross_entropy, (inputs, labels), dtype=torch.float64)
    vector = torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(one @ vector, other @ vector)
    assert set(found) == {kind}
    assert batches[0]["x"].dtype == torch.float32
