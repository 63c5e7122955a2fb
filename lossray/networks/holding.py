"""A module that holds other weights for a while: its own parameters, changed in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Exchange the storages of parameters and buffers, whose objects stay: whoever refers to them sees it.

    That is unlike `call_with`, which puts other objects in the place of registered ones. Afterwards all is as
    it was, also tensors that layers keep beside their parameters.

    Args:
        model: whose tensors are exchanged.
        tensors: by name, of any dtype; what the module writes into buffers goes into copies.

    Yields:
        The parameters among ``tensors``, in their order.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exchanged = {name: own[name] for name in tensors if name in own}
    storages = {name: tensor.data for name, tensor in exchanged.items()}
    beside = [
        (module.__dict__, key, value)
        for module in model.modules()
        for key, value in module.__dict__.items()
        if isinstance(value, Tensor)
    ]
    try:
        for name, tensor in exchanged.items():
            tensor.data = tensors[name].detach().clone()
        yield [tensor for tensor in exchanged.values() if isinstance(tensor, nn.Parameter)]
    finally:
        for name, tensor in exchanged.items():
            tensor.data = storages[name]
        for table, key, value in beside:
            table[key] = value


def gradient_in_place(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """The gradient [d] of a scalar by the parameters that a module holds; 0 where it depends on none."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    pieces = torch.autograd.grad(value, parameters, materialize_grads=True)
    return torch.cat([piece.flatten() for piece in pieces])
