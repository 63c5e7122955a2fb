"""Running statistics of batch norm, recomputed: averages of weights need those of their own activations."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lossray.networks.nests import Inputs, count, rows
from lossray.networks.stack import Members, Stack

# Examples per forward pass at most. Chunks count in the statistics (each has a variance about its own mean):
# they depend on the number of examples alone, never on how many members there are.
CHUNK = 1024


def has_statistics(model: nn.Module) -> bool:
    """Whether any batch norm (or instance norm) of the model keeps running statistics."""
    return bool(_layers(model))


def statistics_of(model: nn.Module) -> set[str]:
    """The names of what `refresh_statistics` recomputes."""
    statistics = [
        (layer.running_mean, layer.running_var, layer.num_batches_tracked) for layer in _layers(model)
    ]
    kept = {id(tensor) for tensors in statistics for tensor in tensors}
    return {name for name, tensor in model.named_buffers() if id(tensor) in kept}


@torch.no_grad()
def refresh_statistics(stack: Stack, theta: Tensor, buffers: Members, inputs: Inputs) -> dict[str, Tensor]:
    """The buffers with the running statistics that ``inputs`` have at ``theta``.

    Means and variances are averages over chunks of the inputs, each weighted by its number of examples, and
    over the calls of a layer: what torch accumulates with ``momentum=None`` where all chunks have one size.
    Layers without running statistics are in eval mode, so that dropout is not active.

    Args:
        stack: the architecture; its template is left as it was.
        theta: parameters [R, d].
        buffers: by name, [R, *shape]; not changed.
        inputs: examples [N, ...] shared by the members.

    Returns:
        A copy of ``buffers``; all but running means, variances and ``num_batches_tracked`` as given.
    """
    refreshed = {name: tensor.detach().clone() for name, tensor in buffers.items()}
    layers = _layers(stack.template)
    if not layers:
        return refreshed
    _reset(stack.template, layers, refreshed)
    with _refreshing(stack.template, layers), _averaging(stack.template, layers) as average:
        numbers = torch.arange(count(inputs), device=theta.device)
        for index in numbers.tensor_split(math.ceil(len(numbers) / CHUNK)):
            average.begin(len(index))
            chunk = rows(inputs, slice(int(index[0]), int(index[-1]) + 1))
            # The root's flag names the mode, so that the stack leaves the layers' own flags as they are.
            stack.losses(theta, refreshed, chunk, index, _nothing, train=stack.template.training)
    return refreshed


def _layers(model: nn.Module) -> list[_NormBase]:
    return [
        layer for layer in model.modules() if isinstance(layer, _NormBase) and layer.running_mean is not None
    ]


def _reset(template: nn.Module, layers: list[_NormBase], buffers: dict[str, Tensor]) -> None:
    """Start the statistics anew in ``buffers``: what is not finite in them would outlive a factor of 0."""
    names = {id(tensor): name for name, tensor in template.named_buffers()}
    for layer in layers:
        statistics = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        for tensor, start in zip(statistics, (0, 1, 0), strict=True):
            if tensor is not None:
                buffers[names[id(tensor)]].fill_(start)


@contextmanager
def _refreshing(template: nn.Module, layers: list[_NormBase]) -> Iterator[None]:
    """These layers alone in train mode; modes and momenta are set back."""
    modes = [(module, module.training) for module in template.modules()]
    momenta = [layer.momentum for layer in layers]
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers:
            layer.training = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


class _Average:
    """Momenta that make cumulative averages; vmap cannot take momentum=None.

    A layer that a forward pass calls several times averages over all of its calls.
    """

    def __init__(self) -> None:
        self.before, self.size = 0, 0  # examples of earlier chunks, and of this one
        self.calls: Counter[_NormBase] = Counter()  # so far in this forward pass
        self.each: Counter[_NormBase] = Counter()  # in one of an earlier chunk

    def begin(self, size: int) -> None:
        """The next chunk has so many examples."""
        self.before, self.size, self.each = self.before + self.size, size, self.calls.copy()

    def start(self, *_: object) -> None:
        """A forward pass starts."""
        self.calls.clear()

    def weigh(self, layer: _NormBase, *_: object) -> None:
        """A layer is about to be called."""
        self.calls[layer] += 1
        layer.momentum = self.size / (self.before * self.each[layer] + self.size * self.calls[layer])


@contextmanager
def _averaging(template: nn.Module, layers: list[_NormBase]) -> Iterator[_Average]:
    average = _Average()
    hooks = [template.register_forward_pre_hook(average.start)]
    hooks += [layer.register_forward_pre_hook(average.weigh) for layer in layers]
    try:
        yield average
    finally:
        for hook in hooks:
            hook.remove()


def _nothing(outputs: object, inputs: Tensor) -> Tensor:
    """In place of a loss: only the statistics count."""
    return torch.zeros((), device=inputs.device)
