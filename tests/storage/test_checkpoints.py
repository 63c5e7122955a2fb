import dataclasses
import json

import pytest
import safetensors.torch
import torch

from lossray.errors import StoreError
from lossray.storage.checkpoints import GROUPS, SINGLE, Checkpoint, dumps, loads

MEMBERS = 3


@pytest.fixture
def checkpoint():
    """Tensors of every dtype and layout that training produces: views of one flat tensor, empty, 0-d, NaN."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(MEMBERS, 10, generator=generator)
    return Checkpoint(
        pack_id="mlp-adam-12-p0",
        step=20,
        seeds=(4, 0, 2**40),
        parameters={"z.weight": theta[:, :6].view(MEMBERS, 2, 3), "a.bias": theta[:, 6:]},
        buffers={
            "norm.running_mean": torch.randn(2, MEMBERS, generator=generator, dtype=torch.float64).T,
            "norm.num_batches_tracked": torch.arange(MEMBERS),
            "same": torch.ones(1, 4).expand(MEMBERS, 4),
            "a/b": torch.zeros(MEMBERS, 0),
        },
        optimizer={"exp_avg": theta, "step": torch.tensor(20), "rng": torch.arange(256, dtype=torch.uint8)},
        alive=torch.tensor([True, False, True]),
        diverged_at=torch.tensor([-1, 13, -1]),
        initial_loss=torch.tensor([2.3, torch.inf, 2.5], dtype=torch.float64),
        evaluation={"train_loss": torch.tensor([1.0, torch.nan, -0.0], dtype=torch.float64)},
        log={"step": torch.tensor([10, 20]), "train_loss": torch.full((2, MEMBERS), torch.nan).double()},
        seconds=1.25,
        training_key="ab12",
        versions={"torch": "2.9"},
    )


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


def test_a_round_trip_is_exact_to_the_bit_and_keeps_the_order_of_names(checkpoint):
    copy = loads(dumps(checkpoint))
    for group in GROUPS:
        saved, read = getattr(checkpoint, group), getattr(copy, group)
        assert list(saved) == list(read)
        assert {name: bits(t) for name, t in saved.items()} == {name: bits(t) for name, t in read.items()}
    for name in SINGLE:
        assert bits(getattr(checkpoint, name)) == bits(getattr(copy, name))
    for name in ("pack_id", "step", "seeds", "seconds", "training_key", "versions"):
        assert getattr(checkpoint, name) == getattr(copy, name)


def test_every_field_is_covered():
    plain = {"pack_id", "step", "seeds", "seconds", "training_key", "versions"}
    assert {field.name for field in dataclasses.fields(Checkpoint)} == {*GROUPS, *SINGLE, *plain}


def test_empty_groups_survive(checkpoint):
    bare = dataclasses.replace(checkpoint, buffers={}, optimizer={}, evaluation={}, log={})
    assert loads(dumps(bare)).optimizer == {}


def test_what_was_read_can_be_changed_without_changing_its_neighbours(checkpoint):
    copy = loads(dumps(checkpoint))
    copy.parameters["z.weight"].zero_()
    assert copy.parameters["a.bias"].equal(checkpoint.parameters["a.bias"])
    assert copy.optimizer["exp_avg"].equal(checkpoint.optimizer["exp_avg"])


def test_parameters_that_require_gradients_are_saved_as_plain_tensors(checkpoint):
    theta = torch.ones(MEMBERS, 2, requires_grad=True)
    copy = loads(dumps(dataclasses.replace(checkpoint, parameters={"w": theta})))
    assert copy.parameters["w"].equal(theta)
    assert not copy.parameters["w"].requires_grad


def test_equal_checkpoints_give_equal_files(checkpoint):
    data = dumps(checkpoint)
    assert all(dumps(loads(data)) == data for _ in range(5))


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(checkpoint, cut):
    with pytest.raises(StoreError, match=r"checkpoints/p/20\.safetensors is damaged"):
        loads(dumps(checkpoint)[:cut], name="checkpoints/p/20.safetensors")


def test_a_foreign_file_is_named():
    tensor = {"w": torch.ones(2)}
    for data in (
        safetensors.torch.save(tensor),
        safetensors.torch.save(tensor, metadata={"format": "pt"}),
        safetensors.torch.save(tensor, metadata={"lossray": "[1]"}),
        safetensors.torch.save(tensor, metadata={"lossray": json.dumps({"format": "checkpoint/99"})}),
    ):
        with pytest.raises(StoreError, match=r"x\.safetensors is no lossray checkpoint"):
            loads(data, name="x.safetensors")
    with pytest.raises(StoreError, match=r"x\.safetensors is damaged"):
        loads(b"PK\x03\x04 a pickled file of torch.save", name="x.safetensors")


def test_a_file_that_lacks_a_tensor_is_named(checkpoint):
    data = dumps(checkpoint)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = safetensors.torch.load(data)
    del tensors["optimizer/exp_avg"]
    with pytest.raises(StoreError, match="is damaged: 'optimizer/exp_avg' is missing"):
        loads(safetensors.torch.save(tensors, metadata=metadata))
