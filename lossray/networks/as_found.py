"""What the evaluation of a user's module would leave behind on it, set back."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

KNOWN = ("torch.nn.modules.", "lossray.networks.")  # whose forward passes leave nothing behind


def custom_parts(model: nn.Module) -> list[nn.Module]:
    """The modules whose evaluation needs `as_found`: with hooks, with sparse gradients, or not known."""
    return [
        module
        for module in model.modules()
        if module._forward_pre_hooks
        or module._forward_hooks
        or getattr(module, "sparse", False)
        or not type(module).__module__.startswith(KNOWN)
    ]


@contextmanager
def as_found(custom: Sequence[nn.Module]) -> Iterator[None]:
    """Within it a model can be differentiated twice if it can at all; afterwards it is as it was.

    Args:
        custom: the model's `custom_parts`.
    """
    if not custom:
        yield
        return
    with plain_tensors_kept(custom), dense_embeddings(custom), plain_checkpoints(), uncompiled_parts():
        yield


@contextmanager
def plain_tensors_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Tensors that are plain attributes, neither parameters nor buffers, are afterwards what they were.

    The hooks of pruning, `weight_norm` and `spectral_norm` set such a ``weight``; made of other tensors than
    the model's own, it would have their dtype and hold their graph.
    """
    kept = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, before in zip(modules, kept, strict=True):
            now = vars(module)
            names = [
                n for table in (before, dict(now)) for n, value in table.items() if isinstance(value, Tensor)
            ]
            for name in names:
                now.pop(name, None)
            now.update({name: before[name] for name in names if name in before})


@contextmanager
def dense_embeddings(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Embeddings with dense gradients: sparse ones cannot be differentiated again."""
    sparse = [m for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    try:
        for module in sparse:
            module.sparse = False
        yield
    finally:
        for module in sparse:
            module.sparse = True


def uncompiled_parts() -> AbstractContextManager[object]:
    """Functions and layers under torch.compile as they were written: compiled ones are differentiated once.

    Nothing where nothing has been compiled, since what compiles takes seconds to import.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Within it `torch.utils.checkpoint.checkpoint` calls its function.

    What it computes again in a backward pass it would compute with the model's own weights: of the weights
    that stand in for them a second derivative would not know.
    """
    inner = torch.utils.checkpoint
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    kept = {name: getattr(inner, name) for name in names if hasattr(inner, name)}
    plain = {"CheckpointFunction": _Called, "_checkpoint_without_reentrant_generator": _nothing_kept}
    try:
        vars(inner).update({name: plain[name] for name in kept})
        yield
    finally:
        vars(inner).update(kept)


class _Called:
    """In place of the function that keeps nothing but its inputs."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_kept(*_: Any, **__: Any) -> Iterator[None]:
    """In place of what surrounds the function's call."""
    yield


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Plain tensors that hang on a graph, which torch does not copy, are copied without it."""
    loose = [tensor for module in model.modules() for tensor in _plain_tensors(module).values()]
    memo = {id(tensor): tensor.detach().clone() for tensor in loose if not tensor.is_leaf}
    return copy.deepcopy(model, memo)


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.__dict__.items() if isinstance(value, Tensor)}
