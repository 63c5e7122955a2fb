"""A LeNet-like convolutional network for images of any size."""

from collections import OrderedDict

from torch import nn

from lossray.networks.layers import ACTIVATIONS, image_shape, initialise, norm2d
from lossray.networks.settings import CnnSettings


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
