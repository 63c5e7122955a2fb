"""What the built-in models share: activations, norms and initialisation."""

import math

from torch import nn

from lossray.errors import ModelError
from lossray.networks.settings import BuiltinSettings

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
GAINS = {"relu": math.sqrt(2), "gelu": math.sqrt(2), "tanh": 5 / 3, "linear": 1.0}


def group_count(channels: int) -> int:
    """Groups of a group norm: the largest divisor up to 8 that leaves 4 channels a group, otherwise 1.

    A group of one channel at one pixel would be normalised to zero.
    """
    return max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 4))


def norm2d(norm: str, channels: int) -> nn.Module:
    """The norm layer after a convolution: "batch", "group" or "none"."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(group_count(channels), channels) if norm == "group" else nn.Identity()


def initialise(model: nn.Module, settings: BuiltinSettings, activation: str) -> None:
    """Apply ``init`` and ``init_scale`` to every linear and convolution layer of a fresh model, in place.

    Draws from torch's global generator: the caller forks and seeds it.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if settings.init == "kaiming_normal":
                nn.init.normal_(layer.weight, std=GAINS[activation] / math.sqrt(layer.weight[0].numel()))
            elif settings.init == "xavier_normal":
                nn.init.xavier_normal_(layer.weight)
            elif settings.init == "orthogonal":
                nn.init.orthogonal_(layer.weight, gain=GAINS[activation])
            if settings.init != "default" and layer.bias is not None:
                nn.init.zeros_(layer.bias)
            layer.weight.data.mul_(settings.init_scale)


def image_shape(model: str, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width of one input.

    Raises:
        ModelError: the inputs are not images.
    """
    if len(input_shape) != 3:
        raise ModelError(
            f"model {model!r} needs images [channels, height, width], found inputs of shape "
            f"{list(input_shape)}; models for flat inputs: linear, mlp"
        )
    channels, height, width = input_shape
    return channels, height, width
