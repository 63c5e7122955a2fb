"""The device that the tests of this folder use: the machine's GPU, or a pretended one where there is none."""

import pytest
import torch

from tests.device.pretended_gpu import GPU, pretended_gpu


@pytest.fixture
def gpu():
    """cuda:0."""
    if torch.cuda.is_available():
        yield GPU
    else:
        with pretended_gpu():
            yield GPU


@pytest.fixture
def pretended():
    """The mode of the pretended GPU, also where there is a real one."""
    with pretended_gpu() as mode:
        yield mode
