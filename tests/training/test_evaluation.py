"""How much the outputs of a pack change between two sets of parameters."""

import pytest
import torch
from torch import nn

from lossray.networks.stack import stack_models
from lossray.training.evaluation import output_change


def linear(weight):
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([weight], dtype=torch.float64)
    return model


@pytest.mark.parametrize("chunk", [1, 4096])
def test_the_largest_difference_over_the_largest_output(monkeypatch, chunk):
    monkeypatch.setattr("lossray.training.evaluation.CHUNK", chunk)
    stack, theta, buffers = stack_models(
        [linear([1.0, 0.0]), linear([0.0, 0.0])], executor="loop", dtype=torch.float64
    )
    inputs = torch.tensor([[4.0, 0.0], [-8.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    moved = theta + torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    change = output_change(stack, theta, moved, buffers, inputs)
    assert change.tolist() == [3.0 / 8.0, 0.0]  # not of one example; 0 where all outputs are 0
    assert change.dtype == torch.float64


def test_a_dead_member_is_nan_and_says_nothing_of_the_other():
    stack, theta, buffers = stack_models(
        [linear([1.0, 0.0]), linear([2.0, 0.0])], executor="vmap", dtype=torch.float64
    )
    theta[0] = torch.nan
    change = output_change(stack, theta, theta, buffers, torch.ones(3, 2, dtype=torch.float64))
    assert change[0].isnan()
    assert change[1] == 0
