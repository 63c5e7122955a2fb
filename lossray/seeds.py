"""Counter-based randomness: every draw of a run comes from a generator named by (seed, purpose, counter).

A run's random state is thus the pair (seed, step). It depends on the run's seed alone, not on its pack,
needs nothing in a checkpoint but the step, and lets any task recompute the batch or the dropout mask of any
step.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stream(seed: int, purpose: str, counter: int = 0) -> int:
    """The 63-bit seed of one named stream; different names give independent streams.

    torch's CPU generator takes the low 32 bits: of 100,000 streams about one pair is the same.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{counter}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, counter: int = 0) -> "torch.Generator":
    """A CPU generator at the start of the stream (CPU, so that draws are the same on every device)."""
    import torch  # here: names of streams are needed where torch is not

    return torch.Generator().manual_seed(stream(seed, purpose, counter))
