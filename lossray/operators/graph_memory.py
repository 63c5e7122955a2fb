"""How many bytes an autograd graph holds on to, measured while it is made; measuring never fails."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def held_bytes(build: Callable[[], object]) -> int:
    """Bytes of the distinct storages that a graph holds.

    Args:
        build: makes the graph; called once more where the first way to measure fails, as it does inside
            torch.func, which refuses hooks on what autograd saves. What is wrong with ``build`` itself is
            raised then.
    """
    try:
        return _saved_bytes(build)
    except Exception:  # of any type: a user's model turns the refusal into an error of its own
        return _living_bytes(build)


def _saved_bytes(build: Callable[[], object]) -> int:
    """Those that autograd saves."""
    kept: dict[int, tuple[int, Any]] = {}  # the tensors are held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = build()
        del graph
    return sum(size for size, _ in kept.values())


def _living_bytes(build: Callable[[], object]) -> int:
    """Those that were made for the graph and are there as long as it is."""
    made = _StoragesMade()
    with made:
        graph = build()
    size = made.living()
    del graph
    return size


class _StoragesMade(TorchDispatchMode):
    """Watches the results of every operation, those of backward passes and of torch.func included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, tuple[int, StorageWeakRef]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (storage.nbytes(), StorageWeakRef(storage))
        return results

    def living(self) -> int:
        """Bytes of the storages that still exist."""
        return sum(size for size, storage in self._seen.values() if not storage.expired())
