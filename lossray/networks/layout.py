"""The parameters and buffers of a model by name, and the trainable ones as one flat vector theta [d]."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lossray.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """How the last axis of ``theta`` divides into the trainable parameters (``named_parameters()`` order).

    Attributes:
        names: of the parameters.
        shapes: of each.
        roles: "matrix", "kernel" (of a convolution), "embedding" or "other".
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    roles: tuple[str, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def dim(self) -> int:
        """Number of trainable parameters d."""
        return sum(self.sizes)

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of ``theta`` [..., d] by name, each [..., *shape]; one node of the autograd graph."""
        pieces = torch.split(theta, list(self.sizes), dim=-1)
        lead = theta.shape[:-1]
        return {
            name: piece.view((*lead, *shape))
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Inverse of `split`: tensors [R, *shape] by name to one [R, d]."""
        return torch.cat([tensors[name].flatten(1) for name in self.names], dim=1)


def layout_of(model: nn.Module) -> Layout:
    """How theta divides into the trainable parameters of ``model``.

    Raises:
        ModelError: there are none, or it is no module.
    """
    require_module(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ModelError(f"{type(model).__name__} has no trainable parameter: nothing to train or to analyse")
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    return Layout(
        names=tuple(name for name, _ in trainable),
        shapes=tuple(p.shape for _, p in trainable),
        roles=tuple(_role(owners[id(p)], p) for _, p in trainable),
    )


def _role(owner: nn.Module, parameter: Tensor) -> str:
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(owner, nn.modules.conv._ConvNd) and parameter.ndim > 2:
        return "kernel"
    # A 2-D parameter of a module made of others, such as a transformer's position table, maps nothing.
    maps = isinstance(owner, nn.MultiheadAttention) or not any(owner.children())
    return "matrix" if parameter.ndim == 2 and maps else "other"


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's trainable parameters, and its buffers (frozen parameters among them), as a stack has them.

    By name, in order, detached; tied ones once. They share the model's memory.
    """
    parameters = dict(model.named_parameters())
    trainable = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    buffers = {name: tensor.detach() for name, tensor in model.named_buffers()}
    return trainable, buffers | {n: p.detach() for n, p in parameters.items() if not p.requires_grad}


def require_module(model: object) -> None:
    """Refuse what is no module, and modules whose parameters cannot be read or exchanged.

    Raises:
        ModelError: it is something else, has lazy layers or parameters on the meta device, or holds a
            TorchScript module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: found {type(model).__name__}; allowed: a torch.nn.Module")
    name = type(model).__name__
    for path, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            where = f"layer {path!r} of {name}" if path else f"model: {name}"
            raise ModelError(
                f"{where} is a TorchScript module, whose weights cannot be exchanged: pass the "
                "torch.nn.Module that it was made from"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(f"{name} has lazy layers, whose parameters have no shape: run it once")
        if tensor.is_meta:
            raise ModelError(
                f"{path!r} of {name} is on the meta device and holds no numbers: call "
                "model.to_empty(device='cpu') and load_state_dict first"
            )


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped, or the model itself."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner
