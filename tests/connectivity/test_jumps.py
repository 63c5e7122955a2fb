"""No jump of the loss, where buffers differ between the ends of a path, is counted as a barrier."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

import lossray
from lossray.connectivity.connect import Connection
from lossray.connectivity.jumps import differing, jumps
from lossray.errors import ModelError
from lossray.networks.stack import stack_models


class Scaled(nn.Module):
    """Divides by an average that it keeps, and counts its calls; another average it only keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.output = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("average", torch.rand(6) + 0.5)
        self.register_buffer("idle", torch.rand(2))
        self.register_buffer("calls", torch.randint(0, 9, ()))
        self.average: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.fc(x) / self.average))


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(n, 5, generator=draw), torch.randint(0, 3, (n,), generator=draw)


def straight(a: nn.Module, b: nn.Module) -> Connection:
    return lossray.connect(a, b, cross_entropy, data(), kind="line")


def test_other_buffers_that_the_loss_depends_on_are_refused_by_name():
    torch.manual_seed(0)
    a, b = Scaled(), Scaled()
    with pytest.raises(ModelError, match=r"the buffers 'average', 'idle', 'calls' differ .* jump at t = 1"):
        straight(a, b)
    b.average.copy_(a.average)  # the others do not matter
    path = straight(a, b)
    near = path.losses([0.0, 1e-6, 1 - 1e-6, 1.0])
    torch.testing.assert_close(near[[0, 3]], near[[1, 2]], rtol=1e-4, atol=0)


def test_the_vectors_of_a_spectral_norm_are_such_buffers():
    torch.manual_seed(0)
    ends = []
    for _ in range(2):
        normed = parametrizations.spectral_norm(nn.Linear(5, 7))
        model = nn.Sequential(normed, nn.ReLU(), nn.Linear(7, 3)).train()
        for _ in range(20):
            model(data()[0])
        ends.append(model.eval())
    with pytest.raises(ModelError, match=r"buffers '0\.parametrizations\.weight\.0\._u', .*_v' differ"):
        straight(*ends)
    other = copy.deepcopy(ends[0])
    other[2].weight.data += 0.3
    assert straight(ends[0], other).barrier >= 0


def test_ends_with_stale_batch_statistics_have_no_barrier_from_that():
    torch.manual_seed(1)
    a = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    b = copy.deepcopy(a)
    b[3].bias.data += 1e-3
    for model in (a, b):  # statistics that no data have
        model[1].running_var.mul_(9.0)
    path = straight(a, b)
    losses = path.losses([0.0, 1e-6, 1 - 1e-6, 1.0])
    assert abs(float(losses[0] - losses[1])) > 1e-2  # the ends are the models as they are
    frame = path.evaluate(points=7)
    assert list(frame.columns) == ["t", "loss", "arc_length", "recomputed"]
    assert frame["recomputed"].tolist()[1:-1] == frame["loss"].tolist()[1:-1]
    assert abs(frame["recomputed"][0] - frame["recomputed"][1]) < 1e-3
    assert path.barrier < 1e-5


def test_members_are_told_apart():
    torch.manual_seed(0)
    models = [Scaled() for _ in range(3)]
    stack, theta, buffers = stack_models(
        [copy.deepcopy(m) for m in models], executor="loop", dtype=torch.float64
    )
    others = {name: own.clone() for name, own in buffers.items()}
    others["average"][1] *= 1.5
    inputs, targets = data()
    found = jumps(
        stack,
        theta,
        buffers,
        others,
        inputs.double(),
        lambda weights, own: stack.losses(weights, own, inputs.double(), targets, cross_entropy),
    )
    assert found.tolist() == [False, True, False]
    assert differing(stack, buffers, others) == ["average"]
