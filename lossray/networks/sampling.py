"""A few inputs of a model: from the user's data, or such as the model's layers can take."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lossray.errors import DataError
from lossray.networks.ambient import seeded
from lossray.networks.architecture import Node
from lossray.networks.functional import call_model
from lossray.seeds import generator

EXAMPLES = 64  # of the user's data that are looked at
ROWS = 3  # examples of inputs that are made up
MORE = 6  # shapes that are tried once one is found
FEATURES = 8  # sizes of layers that are tried
FIRST = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)  # layers that tell a size
SIZES = (8, 16, 28, 32, 4, 12, 14, 20, 24, 48, 64, 2, 1, 96, 128, 224)  # of images, the usual ones first
MORE_SIZES = tuple(size for size in range(1, 65) if size not in SIZES)
NEEDED = "allowed: inputs [B, ...], (inputs, targets), or a list of such pairs"


def sample_of(data: Any, device: torch.device, *, count: int = EXAMPLES) -> Any:
    """The first inputs of the user's data, floats in float64.

    Args:
        data: inputs [B, ...] (a tensor, or a mapping of keywords), (inputs, targets), or a list of such.
        device: where to.
        count: examples, at most.

    Raises:
        DataError: there are no inputs.
    """
    inputs = _first(data)
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    inputs = tree_map(lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, inputs)
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors or any(leaf.ndim == 0 or len(leaf) == 0 for leaf in tensors):
        raise DataError(f"data: found no inputs with examples; {NEEDED}")
    return tree_map(lambda leaf: _moved(leaf[:count], device) if isinstance(leaf, Tensor) else leaf, inputs)


def _first(data: Any) -> Any:
    """The inputs of the first batch."""
    if isinstance(data, Tensor | np.ndarray | Mapping):
        return data
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise DataError(f"data: found {type(data).__name__}; {NEEDED}")
    first = next(iter(data), None)
    if isinstance(data, tuple) or not isinstance(first, tuple | list):
        return first
    return first[0] if first else None


def _moved(inputs: Tensor, device: torch.device) -> Tensor:
    return inputs.to(device, torch.float64 if inputs.is_floating_point() else inputs.dtype)


# ---- inputs that are made up


def plausible_inputs(model: nn.Module, graph: Sequence[Node]) -> tuple[Tensor, ...]:
    """Random inputs of all numbers of axes that the model can take, some of each; none if none is found.

    They are found by trying sizes that fit the first layer and others that the model has. A model takes
    inputs if every tensor that it returns has one entry for each example.

    Args:
        model: in eval mode and float64; not changed.
        graph: its operations.
    """
    if [node.kind for node in graph].count("input") != 1:
        return ()
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    draw = generator(0, "made up inputs")
    accepted: list[Tensor] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for shapes, highest in _candidates(model, graph):
            accepted += _taken(
                model, (_made(shape, highest, draw, device) for shape in dict.fromkeys(shapes))
            )
    return tuple(accepted)


def _taken(model: nn.Module, tried: Iterator[Tensor]) -> list[Tensor]:
    """The first that the model takes; not many more are tried once there is one."""
    accepted: list[Tensor] = []
    for inputs in tried:
        if _takes(model, inputs):
            accepted.append(inputs)
        if accepted:
            tried = itertools.islice(tried, MORE)
            return [*accepted, *(inputs for inputs in tried if _takes(model, inputs))]
    return accepted


def _takes(model: nn.Module, inputs: Tensor) -> bool:
    try:
        with seeded(0, inputs.device):
            outputs = tree_leaves(call_model(model, inputs))
    except Exception:  # a user's forward may raise anything on inputs that are not its own
        return False
    tensors = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
    return bool(tensors) and all(leaf.ndim > 0 and len(leaf) == ROWS for leaf in tensors)


def _made(shape: tuple[int, ...], highest: int | None, draw: torch.Generator, device: torch.device) -> Tensor:
    if highest is not None:
        return torch.randint(0, highest, (ROWS, *shape), generator=draw, device="cpu").to(device)
    return torch.randn(ROWS, *shape, generator=draw, device="cpu", dtype=torch.float64).to(device)


Shapes = Iterable[tuple[int, ...]]  # of one example


def _candidates(model: nn.Module, graph: Sequence[Node]) -> Iterator[tuple[Shapes, int | None]]:
    """Shapes of one example by their number of axes; for integers with the number above the highest."""
    first = next((n.module for n in graph if isinstance(n.module, FIRST)), None)
    if isinstance(first, nn.Embedding | nn.EmbeddingBag):
        yield [(size,) for size in (*_features(model), *SIZES[:6])], first.num_embeddings
        yield [()], first.num_embeddings
    elif isinstance(first, nn.modules.conv._ConvNd):
        axes = first.weight.ndim - 2
        sizes = (*SIZES, *MORE_SIZES) if axes < 3 else SIZES[:8]
        yield ((first.in_channels, *[size] * axes) for size in sizes), None
    else:
        features = _features(model)
        last = (first.in_features,) if isinstance(first, nn.Linear) else features
        rows = (*features, 4)
        yield ((size,) for size in last), None
        yield itertools.product(rows, last), None
        yield itertools.chain(((c, s, s) for c in (1, 3) for s in SIZES[:6]), _pairs(rows, last)), None


def _pairs(rows: Sequence[int], last: Sequence[int]) -> Shapes:
    """Images whose last axis a linear layer takes."""
    return ((c, s, size) for size in last for s in (size, *rows) for c in (1, 3, *rows))


def _features(model: nn.Module) -> tuple[int, ...]:
    """The sizes that layers take along one axis, each once."""
    names = ("in_features", "num_features", "num_channels", "num_parameters", "embed_dim", "input_size")
    sizes = [getattr(layer, name, None) for layer in model.modules() for name in names]
    shapes = [getattr(layer, "normalized_shape", ()) for layer in model.modules()]
    sizes += [size for shape in shapes if isinstance(shape, tuple) for size in shape]
    return tuple(dict.fromkeys(size for size in sizes if isinstance(size, int)))[:FEATURES]
