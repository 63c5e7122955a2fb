"""Dropout whose masks come from each member's own generator, under vmap as in a loop.

vmap's own dropout draws all members from one generator, so that a member's masks would depend on its pack.
Here the masks are drawn before the forward pass and handed to the layers through a tape, in call order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Call = tuple[torch.Size, float]  # shape of the mask, drop probability


class NoiseTape:
    """Carries the masks of one forward pass to the dropout layers of one template."""

    def __init__(self) -> None:
        self._masks: list[Tensor] = []
        self._calls: list[Call] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """The layers note the masks that they would need, and drop nothing."""
        self._calls = []
        try:
            yield self._calls
        finally:
            self._calls = None

    @contextmanager
    def playing(self, masks: Sequence[Tensor]) -> Iterator[None]:
        """The layers multiply by these masks, in call order."""
        self._masks = list(reversed(masks))
        try:
            yield
        finally:
            self._masks = []

    def draw(self, calls: Sequence[Call], key: int, dtype: torch.dtype) -> list[Tensor]:
        """The masks of one member: Bernoulli(1 - p) / (1 - p), from a CPU generator seeded with ``key``."""
        generator = torch.Generator().manual_seed(key)
        masks = [
            (torch.empty(shape, device="cpu").bernoulli_(1 - p, generator=generator), p) for shape, p in calls
        ]
        return [mask.to(dtype) / (1 - p) if p < 1 else mask.to(dtype) for mask, p in masks]

    def apply(self, x: Tensor, shape: torch.Size, p: float) -> Tensor:
        """Drop out ``x`` by the next mask."""
        if self._calls is not None:
            self._calls.append((shape, p))
            return x
        return x * self._masks.pop()


class TapeDropout(nn.Module):
    """Stands in for torch's dropout layers; whole channels are dropped where ``channels``."""

    def __init__(self, p: float, tape: NoiseTape, *, channels: bool) -> None:
        super().__init__()
        self.p = p
        self.tape = tape
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in eval mode; ``x`` times a mask in train mode."""
        if not self.training or self.p == 0:
            return x
        shape = torch.Size((*x.shape[:2], *(1 for _ in x.shape[2:]))) if self.channels else x.shape
        return self.tape.apply(x, shape, self.p)


def replace_dropout(model: nn.Module, tape: NoiseTape) -> None:
    """Replace every ``nn.Dropout`` and ``nn.Dropout1d/2d/3d`` of ``model`` in place."""
    channelwise = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout or isinstance(child, channelwise):
                setattr(module, name, TapeDropout(child.p, tape, channels=isinstance(child, channelwise)))
