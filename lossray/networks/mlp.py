"""Fully connected networks: the deep linear network and the multilayer perceptron."""

import math
from collections import OrderedDict
from itertools import pairwise

from torch import nn

from lossray.networks.layers import ACTIVATIONS, initialise
from lossray.networks.settings import LinearSettings, MlpSettings


def build_linear(settings: LinearSettings, input_shape: tuple[int, ...], n_outputs: int) -> nn.Module:
    """The deep linear network of theory 2.8 (no biases by default); flattens its input."""
    widths = (math.prod(input_shape), *settings.widths, n_outputs)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (fan_in, fan_out) in enumerate(pairwise(widths[:-1]), start=1):
        layers[f"hidden{i}"] = nn.Linear(fan_in, fan_out, bias=settings.bias)
    layers["output"] = nn.Linear(widths[-2], widths[-1], bias=settings.bias)
    model = nn.Sequential(layers)
    initialise(model, settings, "linear")
    return model


def build_mlp(settings: MlpSettings, input_shape: tuple[int, ...], n_outputs: int) -> nn.Module:
    """The multilayer perceptron; flattens its input."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    fan_in = math.prod(input_shape)
    for i, width in enumerate(settings.widths, start=1):
        layers[f"hidden{i}"] = nn.Linear(fan_in, width, bias=settings.bias)
        if settings.norm != "none":
            layers[f"norm{i}"] = nn.BatchNorm1d(width) if settings.norm == "batch" else nn.LayerNorm(width)
        layers[f"activation{i}"] = ACTIVATIONS[settings.activation]()
        if settings.dropout:
            layers[f"dropout{i}"] = nn.Dropout(settings.dropout)
        fan_in = width
    layers["output"] = nn.Linear(fan_in, n_outputs, bias=settings.bias)
    model = nn.Sequential(layers)
    initialise(model, settings, settings.activation)
    return model
