"""Layers and losses of torch: the Hessian of each is that of difference quotients of its gradient.

A kernel of torch may have a wrong second derivative (weight norm has, with torch 2.13): nothing else notices.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations as normed

import lossray

STEP = 1e-5  # of the difference quotients


def after_tanh(layer: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer, nn.Linear(width, 3))


class OfSequences(nn.Module):
    """A layer of sequences [B, T, 4], and a classifier of what it gives."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        attends = isinstance(self.layer, nn.MultiheadAttention)
        outputs = self.layer(x, x, x) if attends else self.layer(x)
        return self.head((outputs[0] if isinstance(outputs, tuple) else outputs).mean(dim=1))


class OfImages(nn.Module):
    """A convolution of images [B, 1, 6, 6], a layer, and a classifier of its means."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer, self.head = nn.Conv2d(1, 4, 3), layer, nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.conv(x))).flatten(1))


HIDDEN = {
    **{
        kind.__name__: lambda kind=kind: after_tanh(kind(), 6)
        for kind in (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.Softplus, nn.Sigmoid, nn.LogSigmoid, nn.PReLU)
    },
    "softmax": lambda: after_tanh(nn.Softmax(dim=-1), 6),
    "glu": lambda: after_tanh(nn.GLU(), 3),
    "layer norm": lambda: after_tanh(nn.LayerNorm(6), 6),
    "rms norm": lambda: after_tanh(nn.RMSNorm(6), 6),
    "group norm": lambda: after_tanh(nn.GroupNorm(2, 6), 6),
    "batch norm": lambda: after_tanh(nn.BatchNorm1d(6), 6),
    "weight norm": lambda: after_tanh(normed.weight_norm(nn.Linear(6, 4)), 4),
    "spectral norm": lambda: after_tanh(normed.spectral_norm(nn.Linear(6, 4)), 4),
    "orthogonal": lambda: after_tanh(normed.orthogonal(nn.Linear(6, 6)), 6),
}
SEQUENCES = {
    "rnn": lambda: OfSequences(nn.RNN(4, 3, batch_first=True), 3),
    "gru": lambda: OfSequences(nn.GRU(4, 3, batch_first=True), 3),
    "lstm": lambda: OfSequences(nn.LSTM(4, 3, batch_first=True), 3),
    "attention": lambda: OfSequences(nn.MultiheadAttention(4, 2, batch_first=True), 4),
    "transformer": lambda: OfSequences(nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True), 4),
}
IMAGES = {
    "max pooling": lambda: OfImages(nn.MaxPool2d(2)),
    "average pooling": lambda: OfImages(nn.AvgPool2d(2)),
    "power pooling": lambda: OfImages(nn.LPPool2d(2, 4)),
    "instance norm": lambda: OfImages(nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.AvgPool2d(2))),
    "grouped convolution": lambda: OfImages(nn.Conv2d(4, 2, 3, groups=2)),
    "dilated convolution": lambda: OfImages(nn.Conv2d(4, 2, 2, dilation=2)),
    "circular convolution": lambda: OfImages(nn.Conv2d(4, 1, 3, padding=1, padding_mode="circular")),
}
LOSSES = {
    "huber": (F.huber_loss, lambda r: r),
    "poisson": (F.poisson_nll_loss, lambda r: r.abs()),
    "logits": (F.binary_cross_entropy_with_logits, lambda r: (r > 0).double()),
    "soft targets": (F.cross_entropy, lambda r: r.softmax(dim=-1)),
    "smoothed": (lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1), lambda r: r.argmax(dim=-1)),
    "cosine": (lambda z, t: (1 - F.cosine_similarity(z, t)).mean(), lambda r: r),
    "distance": (lambda z, t: F.pairwise_distance(z, t).mean(), lambda r: r),
}


def assert_is_the_hessian(model, loss, data):
    hessian = lossray.Hessian(model, loss, data)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    directions = torch.randn(hessian.shape[0], 3, dtype=torch.float64)

    def gradient(theta):
        nn.utils.vector_to_parameters(theta, model.parameters())
        value = loss(model(data[0]), data[1])
        return nn.utils.parameters_to_vector(torch.autograd.grad(value, list(model.parameters())))

    model.eval()
    quotients = [
        (gradient(weights + STEP * v) - gradient(weights - STEP * v)) / (2 * STEP) for v in directions.T
    ]
    expected = torch.stack(quotients, dim=1)
    nn.utils.vector_to_parameters(weights, model.parameters())
    assert float((hessian @ directions - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        *(pytest.param(make, (6,), id=name) for name, make in HIDDEN.items()),
        *(pytest.param(make, (5, 4), id=name) for name, make in SEQUENCES.items()),
        *(pytest.param(make, (1, 6, 6), id=name) for name, make in IMAGES.items()),
    ],
)
def test_layers(make, shape):
    inputs, targets = torch.randn(8, *shape, dtype=torch.float64), torch.randint(0, 3, (8,))
    model = make().double()
    model(inputs)  # lazy layers get their shapes
    assert_is_the_hessian(model, F.cross_entropy, (inputs, targets))


@pytest.mark.parametrize(("loss", "targets_of"), LOSSES.values(), ids=LOSSES.keys())
def test_losses(loss, targets_of):
    model = after_tanh(nn.Identity(), 6).double()
    inputs, raw = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    assert_is_the_hessian(model, loss, (inputs, targets_of(raw)))
