"""A module that holds other weights for a while: its own parameters, changed in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lossray.networks.as_found import plain_checkpoints, uncompiled_parts

REGISTERS = ("_parameters", "_buffers", "_modules")


@contextmanager
def holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Exchange the storages of parameters and buffers, whose objects stay: whoever refers to them sees it.

    So do tensors beside them that share their storage, such as ``weight.detach()`` in a list. That is unlike
    `call_with`, which puts other objects in the place of registered ones. Where somebody has kept a graph of
    a tensor that is to change its dtype, other objects take its place here too, in the layers' lists as well.

    Checkpointed and compiled parts are just called: a reentrant checkpoint has no gradient where its inputs
    have none, and a part would be compiled anew for each dtype. Afterwards all is as it was, also what layers
    keep beside their parameters.

    Args:
        model: whose tensors are exchanged.
        tensors: by name, of any dtype; what the module writes into buffers goes into copies.

    Yields:
        The trainable parameters among ``tensors``, in their order.
    """
    registered = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exchanged = {name: registered[name] for name in tensors if name in registered}
    named = {(tensor.data_ptr(), tensor.shape): name for name, tensor in exchanged.items()}
    pairs = [(tensor, name) for name, tensor in exchanged.items()]
    for other in _beside(model):
        name = named.get((other.data_ptr(), other.shape))
        if name is not None and other is not exchanged[name]:
            pairs.append((other, name))
    new = {name: tensors[name].detach().clone() for name in exchanged}
    placed = {
        id(tensor): _in_place_of(tensor, new[name]) for tensor, name in pairs if _in_use(tensor, new[name])
    }
    storages = [(tensor, tensor.data) for tensor, _ in pairs if id(tensor) not in placed]
    tables = _tables(model)
    try:
        for tensor, name in pairs:
            if id(tensor) not in placed:
                tensor.data = new[name]
        for table, entries in tables:
            table.update({key: _replaced(value, placed) for key, value in entries.items()})
        held = [placed.get(id(tensor), tensor) for tensor in exchanged.values()]
        with plain_checkpoints(), uncompiled_parts():
            yield [one for one in held if isinstance(one, nn.Parameter) and one.requires_grad]
    finally:
        for tensor, storage in storages:
            tensor.data = storage
        for table, entries in tables:
            table.update(entries)


def _in_use(tensor: Tensor, new: Tensor) -> bool:
    """Whether another dtype would take a tensor out of graphs that somebody has kept, or off their hooks.

    torch makes it a new node for its gradients then, which those do not know. A graph refers to the tensor
    below Python: what torch.utils.swap_tensors looks at too, by the same count.
    """
    return tensor.dtype != new.dtype and tensor._use_count() > 1  # type: ignore[attr-defined]


def _in_place_of(tensor: Tensor, new: Tensor) -> Tensor:
    """An object of its own with other numbers."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def _tables(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Where layers keep tensors, and what is there: registered ones, attributes, and lists and tables."""
    tables = []
    for module in model.modules():
        others = {key: value for key, value in module.__dict__.items() if key not in REGISTERS}
        kept = {key: value for key, value in others.items() if _tensors(value)}
        tables += [(module.__dict__, kept)]
        tables += [(table, dict(table)) for table in (module._parameters, module._buffers)]
    return tables


def _replaced(value: Any, placed: Mapping[int, Tensor]) -> Any:
    """The same with objects put in the place of others; itself where it has none of them."""
    if not any(id(leaf) in placed for leaf in _tensors(value)):
        return value
    return tree_map(lambda leaf: placed.get(id(leaf), leaf), value)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _beside(model: nn.Module) -> list[Tensor]:
    """Tensors that layers hold besides what is registered: as attributes, in lists and tables."""
    return [
        leaf
        for module in model.modules()
        for key, value in module.__dict__.items()
        if key not in REGISTERS
        for leaf in _tensors(value)
    ]


def gradient_in_place(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """The gradient [d] of a scalar by the parameters that a module holds; 0 where it depends on none."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    pieces = torch.autograd.grad(value, parameters, materialize_grads=True)
    return torch.cat([piece.to_dense().flatten() for piece in pieces])
