"""Whether work fits the memory that is left, asked before the work starts."""

import psutil
import torch

from lossray.errors import ResourceError

SHARE = 0.9  # of the free memory that one piece of work may take
MESSAGES = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of torch, cuBLAS and cuDNN


def available_bytes(device: torch.device | str) -> int:
    """Free bytes on ``device``: of the GPU, what torch holds and does not use included, or of main memory."""
    device = torch.device(device)
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached)


def require_bytes(needed: int, device: torch.device | str, *, what: str, remedy: str) -> None:
    """Refuse work that would not fit.

    Args:
        needed: estimated bytes.
        device: where they are needed.
        what: the work, as the subject of the message.
        remedy: what would fit.

    Raises:
        ResourceError: ``needed`` exceeds a fixed share of the free memory.
    """
    free = int(SHARE * available_bytes(device))
    if needed > free:
        raise ResourceError(
            f"{what} needs about {readable_bytes(needed)} on {device}, where {readable_bytes(free)} can be "
            f"had; {remedy}"
        )


def readable_bytes(number: int) -> str:
    """Such as "1.5 GB"."""
    size = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, of a GPU or of the machine; also where another error was raised from that."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES):
            return True
        error = error.__cause__
    return False


def fitting(bytes_each: int, device: torch.device | str) -> int:
    """How many pieces of work fit at a time; at least one."""
    return max(1, int(SHARE * available_bytes(device)) // max(1, bytes_each))
