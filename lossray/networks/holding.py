"""A module that holds other weights for a while: its own parameters, changed in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lossray.networks.as_found import plain_checkpoints, uncompiled_parts


@contextmanager
def holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Exchange the storages of parameters and buffers, whose objects stay: whoever refers to them sees it.

    So do tensors beside them that share their storage, such as ``weight.detach()`` in a list. That is unlike
    `call_with`, which puts other objects in the place of registered ones. Checkpointed and compiled parts
    are just called: a reentrant checkpoint has no gradient where its inputs have none, and a part would be
    compiled anew for each dtype. Afterwards all is as it was, also what layers keep beside their parameters.

    Args:
        model: whose tensors are exchanged.
        tensors: by name, of any dtype; what the module writes into buffers goes into copies.

    Yields:
        The trainable parameters among ``tensors``, in their order.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exchanged = {name: own[name] for name in tensors if name in own}
    named = {(tensor.data_ptr(), tensor.shape): name for name, tensor in exchanged.items()}
    pairs = [(tensor, name) for name, tensor in exchanged.items()]
    for other in _beside(model):
        name = named.get((other.data_ptr(), other.shape))
        if name is not None and other is not exchanged[name]:
            pairs.append((other, name))
    storages = [(tensor, tensor.data) for tensor, _ in pairs]
    attributes = [
        (module.__dict__, key, value)
        for module in model.modules()
        for key, value in module.__dict__.items()
        if isinstance(value, Tensor)
    ]
    try:
        new = {name: tensors[name].detach().clone() for name in exchanged}
        for tensor, name in pairs:
            tensor.data = new[name]
        with plain_checkpoints(), uncompiled_parts():
            yield [own for own in exchanged.values() if isinstance(own, nn.Parameter) and own.requires_grad]
    finally:
        for tensor, storage in storages:
            tensor.data = storage
        for table, key, value in attributes:
            table[key] = value


def _beside(model: nn.Module) -> list[Tensor]:
    """Tensors that layers hold besides what is registered: as attributes, in lists and tables."""
    return [
        leaf
        for module in model.modules()
        for key, value in module.__dict__.items()
        if key not in ("_parameters", "_buffers", "_modules")
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor)
    ]


def gradient_in_place(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """The gradient [d] of a scalar by the parameters that a module holds; 0 where it depends on none."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    pieces = torch.autograd.grad(value, parameters, materialize_grads=True)
    return torch.cat([piece.to_dense().flatten() for piece in pieces])
