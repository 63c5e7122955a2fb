"""Models that no memory holds, refused before they are made: the allocator's own words name no setting."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lossray.errors import ModelError
from lossray.memory import SHARE, available_bytes, readable_bytes
from lossray.networks.models import build_model
from lossray.networks.settings import MODELS, ModelSettings

COPIES = 6  # of four bytes a parameter: weights, gradient, and in float64 the two vectors of a product


def require_memory(settings: ModelSettings, input_shape: tuple[int, ...], n_outputs: int) -> None:
    """Refuse a built-in model whose weights, gradient and one product do not fit into main memory.

    Its parameters are counted without being allocated. A user's function is not called, since it may keep
    what it makes; see `allocations_that_fit`.

    Raises:
        ModelError: naming the parameters, and the bytes needed and available.
    """
    if settings.name not in MODELS:
        return
    count = _count(settings, input_shape, n_outputs)
    needed, free = COPIES * 4 * count, int(SHARE * available_bytes("cpu"))
    if needed > free:
        shown = f"{count:,}" if math.isfinite(count) else "more than 2^63"
        bytes_needed = (
            f"about {readable_bytes(int(needed))}" if math.isfinite(count) else "more bytes than that"
        )
        raise ModelError(
            f"{settings.name!r} has {shown} parameters, which need {bytes_needed} for the weights, a "
            f"gradient and one product; {readable_bytes(free)} can be had here: make it smaller"
        )


@contextmanager
def allocations_that_fit(name: str) -> Iterator[None]:
    """Refuse any tensor that the block asks for and that does not fit into main memory.

    Args:
        name: of the model, for the message.

    Raises:
        ModelError: naming the tensor's shape, and the bytes needed and available.
    """
    with _Guard(name):
        yield


def _count(settings: ModelSettings, input_shape: tuple[int, ...], n_outputs: int) -> float:
    """Parameters of a built-in model; infinite where one tensor has more entries than torch can count."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_model(settings, input_shape, n_outputs)
    except (RuntimeError, OverflowError):  # what else can be wrong with it is found when it is built
        return math.inf if _overflows(settings) else 0
    return sum(parameter.numel() for parameter in model.parameters())


def _overflows(settings: ModelSettings) -> bool:
    """Whether products of neighbouring sizes leave 63 bits."""
    numbers = [value for value in settings.plain().values() if isinstance(value, list | tuple)]
    sizes = [abs(n) for values in numbers for n in values if isinstance(n, int)]
    sizes += [abs(n) for n in settings.plain().values() if type(n) is int]
    return bool(sizes) and max(sizes) ** 2 * 64 > 2**63


class _Guard(TorchDispatchMode):
    """Sees the sizes of tensors that are made from nothing before they are allocated."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.free = name, int(SHARE * available_bytes("cpu"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing compiled runs within it (see `try_model`), and the skipping loads torch._dynamo."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if args and isinstance(args[0], list | tuple) and all(type(n) is int for n in args[0]):
            self._check(list(args[0]), options)
        return func(*args, **options)

    def _check(self, shape: list[int], options: Mapping[str, Any]) -> None:
        if torch.device(options.get("device") or "cpu").type != "cpu":
            return
        dtype = options.get("dtype") or torch.get_default_dtype()
        needed = math.prod(shape) * dtype.itemsize
        if needed > self.free:
            raise ModelError(
                f"{self.name!r} asks for a tensor {shape} of {math.prod(shape):,} numbers, which need "
                f"{readable_bytes(needed)}; {readable_bytes(self.free)} can be had here: make it smaller"
            )
