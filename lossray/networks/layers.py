"""What the built-in models share: the settings they have in common, activations, norms and initialisation."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import nn

from lossray.errors import ModelError
from lossray.settings import Settings

Activation = Literal["relu", "gelu", "tanh"]
Initialisation = Literal["default", "kaiming_normal", "xavier_normal", "orthogonal"]

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Widths = Annotated[tuple[Count, ...], Field(strict=False)]  # TOML has lists, strict tuples refuse them

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
GAINS = {"relu": math.sqrt(2), "gelu": math.sqrt(2), "tanh": 5 / 3, "linear": 1.0}


class ModelSettings(Settings):
    """Base of every model's settings.

    Attributes:
        name: which model.
        optimizers: names of those of the study's optimizers that train it; None: all. No part of the model.
    """

    name: str
    optimizers: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None

    @property
    def alone(self) -> Self:
        """The model, whoever trains it."""
        return self.model_copy(update={"optimizers": None})

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `optimizers` out where it says nothing: a model's settings are part of its runs' ids."""
        plain: dict[str, Any] = serialise(self)
        if self.optimizers is None:
            plain.pop("optimizers", None)
        return plain


class BuiltinSettings(ModelSettings):
    """What every built-in model takes.

    ``init`` "default" is PyTorch's own; the others draw every weight matrix and convolution kernel anew and
    set its bias to 0: "kaiming_normal" with standard deviation gain / sqrt(fan in) and "orthogonal" with the
    same gain (sqrt 2 for relu and gelu, 5/3 for tanh, 1 for linear), "xavier_normal" with standard deviation
    sqrt(2 / (fan in + fan out)). ``init_scale`` then multiplies those weights.
    """

    init: Initialisation = "default"
    init_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


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
