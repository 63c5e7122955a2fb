"""A LeNet-like convolutional network for images of any size."""

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from torch import nn

from lossray.networks.layers import (
    ACTIVATIONS,
    Activation,
    BuiltinSettings,
    Count,
    Probability,
    Widths,
    image_shape,
    initialise,
    norm2d,
)


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"found {kernel}; a kernel has an odd side, so that the image keeps its size")
    return kernel


class CnnSettings(BuiltinSettings):
    """Convolutions that keep the image size, each followed by pooling, then fully connected layers."""

    name: Literal["cnn"] = "cnn"
    channels: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = (6, 16)
    kernel: Annotated[Count, AfterValidator(_odd)] = 5
    widths: Widths = (120, 84)  # of the fully connected layers; may be empty
    activation: Activation = "relu"
    norm: Literal["none", "batch", "group"] = "none"  # after each convolution
    dropout: Probability = 0.0  # after each fully connected layer


def build_cnn(settings: CnnSettings, input_shape: tuple[int, ...], n_outputs: int) -> nn.Module:
    """LeNet-5's plan (LeCun et al. 1998), with same-size padding so that small images survive.

    Pooling is the average over 2 x 2, which keeps the network smooth where the activation is; it leaves a
    side of one pixel alone and drops the last row or column of an odd side.

    Raises:
        ModelError: the inputs are not images.
    """
    fan_in, height, width = image_shape("cnn", input_shape)
    activation = ACTIVATIONS[settings.activation]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, channels in enumerate(settings.channels, start=1):
        biased = settings.norm == "none"  # the norm has a shift of its own
        layers[f"conv{i}"] = nn.Conv2d(
            fan_in, channels, settings.kernel, padding=settings.kernel // 2, bias=biased
        )
        if settings.norm != "none":
            layers[f"norm{i}"] = norm2d(settings.norm, channels)
        layers[f"activation{i}"] = activation()
        window = (min(height, 2), min(width, 2))
        layers[f"pool{i}"] = nn.AvgPool2d(window)
        fan_in, height, width = channels, height // window[0], width // window[1]
    layers["flatten"] = nn.Flatten()
    fan_in = fan_in * height * width
    for i, units in enumerate(settings.widths, start=1):
        layers[f"hidden{i}"] = nn.Linear(fan_in, units)
        layers[f"hidden{i}_activation"] = activation()
        if settings.dropout:
            layers[f"dropout{i}"] = nn.Dropout(settings.dropout)
        fan_in = units
    layers["output"] = nn.Linear(fan_in, n_outputs)
    model = nn.Sequential(layers)
    initialise(model, settings, settings.activation)
    return model
