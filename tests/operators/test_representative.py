"""Distinct examples with every value that their targets have."""

import torch

from lossray.operators.objectives import Batch
from lossray.operators.representative import representative, representatives


def _batch(inputs: torch.Tensor, targets: torch.Tensor) -> Batch:
    return Batch(inputs, targets, 1.0)


def test_every_value_of_integer_targets_is_there() -> None:
    labels = torch.zeros(5000, dtype=torch.int64)
    labels[4321], labels[17], labels[2000:3000] = 7, -100, 2
    picked = representative(_batch(torch.randn(5000, 2), labels), 20)
    assert picked.size in range(12, 21)
    assert set(picked.targets.tolist()) == {-100, 0, 2, 7}
    assert picked.targets.tolist() == sorted(picked.targets.tolist())


def test_a_value_in_one_pixel_is_found() -> None:
    masks = torch.randint(0, 3, (300, 5, 4), generator=torch.Generator().manual_seed(0))
    masks[211, 4, 0] = 255
    assert bool((representative(_batch(torch.randn(300, 1), masks), 8).targets == 255).any())


def test_floats_are_spread_over_their_order_with_both_ends() -> None:
    values = torch.randn(900, 1, dtype=torch.float64)
    picked = representative(_batch(torch.randn(900, 3), values), 12).targets.flatten()
    assert (picked[0], picked[-1]) == (values.min(), values.max())
    assert torch.equal(picked, picked.sort().values)


def test_copies_are_left_out_unless_there_is_little_else() -> None:
    inputs = torch.arange(40.0).repeat_interleave(25)[:, None]
    assert len(representative(_batch(inputs, torch.ones(1000)), 60).inputs.unique()) == 40
    alike = representative(_batch(torch.ones(1000, 1), torch.ones(1000)), 16)
    assert alike.size == 16


def test_batches_of_one_shape_are_joined_and_others_apart() -> None:
    sizes = [(3, 4), (5, 4), (6, 9)]
    batches = [_batch(torch.randn(n, width), torch.arange(n)) for n, width in sizes]
    sets = representatives(batches, 3, 100)
    assert [(own.size, own.inputs.shape[1]) for own in sets] == [(8, 4), (6, 9)]


def test_nests_and_weights() -> None:
    weights = torch.rand(30)
    batch = Batch({"a": torch.randn(30, 2), "b": "text"}, (torch.arange(30),), 1.0, weights)
    picked = representative(batch, 10)
    assert picked.weights is None
    assert picked.inputs["b"] == "text"
    assert picked.inputs["a"].shape == (10, 2)
