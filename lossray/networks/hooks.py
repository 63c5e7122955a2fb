"""Hooks of a user's modules: what they do is not in the model's operations."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lossray.errors import ModelError

KINDS = {  # attribute of a module -> what it holds
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}
MAKERS = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm", BasePruningMethod: "pruning"}


def require_no_hooks(model: nn.Module) -> None:
    """Refuse a model with hooks, which may compute anything.

    Those by which the older weight norm, spectral norm and pruning make a layer's weights are known.

    Raises:
        ModelError: a module, or torch for all modules, has a hook; the message names it.
    """
    for where, kind, hook in (*_of_modules(model), *_of_all_modules()):
        if not isinstance(hook, tuple(MAKERS)):
            raise ModelError(
                f"{type(model).__name__}: {where} has {kind} ({_name(hook)}), which may change what the "
                "model computes: its symmetries are not known; remove it, or make it a part of forward"
            )


def made_by(module: nn.Module) -> str | None:
    """What makes a layer's weights from other tensors, such as "weight_norm"; None if nothing does."""
    if parametrize.is_parametrized(module):
        return "a parametrization"
    for hook in module._forward_pre_hooks.values():
        for kind, name in MAKERS.items():
            if isinstance(hook, kind):
                return name
    return None


def _of_modules(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for name, module in model.named_modules():
        for attribute, kind in KINDS.items():
            for hook in getattr(module, attribute).values():
                yield (repr(name) if name else "it"), kind, hook


def _of_all_modules() -> Iterator[tuple[str, str, Any]]:
    """The global ones, which torch calls for every module."""
    for attribute, kind in KINDS.items():
        for hook in getattr(torch_module, f"_global{attribute}").values():
            yield "every module", kind, hook


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
