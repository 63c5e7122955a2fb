"""A model called with the user's inputs, and with other tensors in place of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from lossray.networks.as_found import as_found, custom_parts


def call_model(model: nn.Module, inputs: Any) -> Any:
    """What the model returns for the inputs of a batch.

    The entries of a mapping are keywords, those of a tuple or list the arguments in order; anything else is
    the one argument. A model that takes a tuple as one argument needs ``(inputs,)``.

    Args:
        model: any module.
        inputs: as the user's data hold them.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    """What the model returns for ``args``, with ``tensors`` in place of its parameters and buffers.

    As `torch.func.functional_call`, which however leaves the given tensors in a layer that the model has
    under two names (torch 2.13); here each place is exchanged once.

    Args:
        model: left as it was.
        tensors: by name; tied ones under the first of their names.
        *args: of the model's ``forward``.
    """
    named = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    exchanged = {}
    for prefix, module in model.named_modules():  # each layer once, whatever its names
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = named.get(id(tensor), "")
            if name in tensors:
                exchanged[f"{prefix}.{key}" if prefix else key] = tensors[name]
    with as_found(custom_parts(model)):
        try:
            return functional_call(model, exchanged, args, tie_weights=False)
        except RuntimeError:
            if torch.is_grad_enabled():
                raise
        with torch.enable_grad():  # a model that differentiates something itself
            outputs = functional_call(model, exchanged, args, tie_weights=False)
        return tree_map_only(Tensor, Tensor.detach, outputs)
