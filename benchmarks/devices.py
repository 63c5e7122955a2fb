"""What a clock and a comparison need of a device that works while Python goes on."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

REPEATS = 5
LEAST_SECONDS = 0.05  # of one repeat: what is shorter is repeated inside it


def wait_for(device: torch.device) -> None:
    """Until all that a GPU was given is done; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of one call, in several repeats, after one that warms up."""
    function()
    once = _timed(function, device, 1)
    times = max(1, round(LEAST_SECONDS / once))
    return [_timed(function, device, times) for _ in range(REPEATS)]


def _timed(function: Callable[[], object], device: torch.device, times: int) -> float:
    wait_for(device)
    clock = time.perf_counter()
    for _ in range(times):
        function()
    wait_for(device)
    return (time.perf_counter() - clock) / times


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 is float32: a GPU's convolutions are in TF32 otherwise."""
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
