"""A model's graph seen at work: the shapes of all values, which the operations alone do not tell.

Whether an axis holds channels, tokens or examples depends on what a model is given. So its graph is run on
inputs, those of the user or made-up ones, and what it computes is compared with what the model does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.networks.ambient import seeded
from lossray.networks.architecture import Node, graph_of
from lossray.networks.copies import double_copy
from lossray.networks.function_change import (
    EPS,
    LARGEST_CHANGE,
    ROUNDINGS,
    distance,
    flat,
    generic,
    outputs_of,
    require_kept,
)
from lossray.networks.hooks import require_no_hooks
from lossray.networks.layout import uncompiled
from lossray.networks.sampling import plausible_inputs, sample_of
from lossray.plugins import failure

REMEDY = "pass data=, some inputs of the model"


@dataclass(frozen=True)
class Observed:
    """The operations of a model, and what they have been seen to do.

    Attributes:
        graph: of the model itself.
        batches: inputs, each of another shape: those of the user, or made-up ones; none if none was found.
        shapes: of the value of each node, by its name, for each of the batches; None for what is no tensor.
        eps: of the coarsest floating-point values, in a model whose weights are float64.
    """

    graph: tuple[Node, ...]
    batches: tuple[Any, ...]
    shapes: Mapping[str, tuple[torch.Size | None, ...]]
    eps: float = EPS

    def rank(self, name: str) -> int | None:
        """Number of axes of a node's value; None where it is not known, or not always the same."""
        ranks = {None if shape is None else len(shape) for shape in self.shapes[name]}
        return next(iter(ranks)) if len(ranks) == 1 else None

    def flattens(self, node: Node) -> bool:
        """Whether a node makes [B, ...] into [B, n]; true where nothing has been seen."""
        pairs = zip(self.shapes[node.inputs[0]], self.shapes[node.name], strict=True)
        return all(
            before is not None and after is not None and len(after) == 2 and before[0] == after[0]
            for before, after in pairs
        )

    def require_kept(
        self, model: nn.Module, change: Callable[[nn.Module], nn.Module], *, as_it_is: bool = False
    ) -> float:
        """Refuse a change of the weights that changes the function; see `require_kept`.

        Args:
            model: the model.
            change: makes another of a model, which it leaves alone.
            as_it_is: with the model's own weights; otherwise with others, see `generic`.

        Returns:
            The relative change of the outputs, in eval mode and float64.

        Raises:
            ModelError: it is more than rounding, or no inputs are known.
        """
        if not self.batches:
            raise ModelError(
                f"{type(model).__name__}: no inputs were found that it takes, on which to check that its "
                f"function stays; {REMEDY}"
            )
        twin = double_copy(model)
        twin = twin if as_it_is else generic(twin)
        return require_kept(twin, change(twin), self.batches, eps=self.eps)


def observe(model: nn.Module, data: Any = None) -> Observed:
    """Run a model's graph.

    Args:
        model: left as it is.
        data: see `sample_of`; None: inputs are made up.

    Raises:
        ModelError: the model has hooks, cannot be traced, cannot take the data, or computes something else
            than its operations do.
        DataError: no inputs.
    """
    graph = graph_of(model)
    model = uncompiled(model)
    require_no_hooks(model)
    twin = double_copy(model)
    device = next(twin.parameters(), torch.empty(0)).device
    twin_graph = graph_of(twin)
    batches = plausible_inputs(twin, twin_graph) if data is None else (sample_of(data, device),)
    runs = [_run(twin_graph, twin, inputs) for inputs in batches]
    shapes = {node.name: tuple(run[node.name][0] for run in runs) for node in graph}
    return Observed(graph, batches, shapes, max(map(_coarsest, runs), default=EPS))


def values_of(graph: Sequence[Node], inputs: Any) -> Iterator[tuple[Node, Any]]:
    """Every node and its value, while that is fresh: a later node may change it in place.

    Args:
        graph: of a model.
        inputs: as `call_model` takes them.
    """
    given = _arguments(graph, inputs)
    values: dict[str, Any] = {}
    for node in graph:
        operands = (given[node.name],) if node.name in given else tuple(values[name] for name in node.inputs)
        values[node.name] = node.function(*operands)
        yield node, values[node.name]


def _arguments(graph: Sequence[Node], inputs: Any) -> dict[str, Any]:
    """The values of the input nodes that are given."""
    names = [node.name for node in graph if node.kind == "input"]
    if isinstance(inputs, Mapping):  # fx puts a number behind what is a name of Python's
        return {n: inputs[key] for n in names for key in (n, n.rpartition("_")[0]) if key in inputs}
    return dict(zip(names, inputs if isinstance(inputs, tuple | list) else (inputs,), strict=False))


def _coarsest(seen: "Seen") -> float:
    """The eps of the coarsest floating-point value."""
    return max((torch.finfo(dtype).eps for _, dtype in seen.values() if dtype is not None), default=EPS)


Seen = dict[str, tuple[torch.Size | None, torch.dtype | None]]


@torch.no_grad()
def _run(graph: Sequence[Node], model: nn.Module, inputs: Any) -> Seen:
    """Shape and dtype of every value; the dtype None where it is no floating-point tensor."""
    expected = outputs_of(model, inputs)
    seen: Seen = {}
    name = type(model).__name__
    value: Any = None
    device = next(model.parameters(), torch.empty(0)).device
    try:
        with seeded(0, device):
            for node, value in values_of(graph, inputs):
                floating = isinstance(value, Tensor) and value.is_floating_point()
                shape = value.shape if isinstance(value, Tensor) else None
                seen[node.name] = (shape, value.dtype if floating else None)
    except Exception as error:  # any operation may raise anything
        raise ModelError(f"{name}: its operations cannot be run one by one: {failure(error)}") from error
    actual = flat(value, name)
    if not distance(expected, actual) <= max(LARGEST_CHANGE, ROUNDINGS * _coarsest(seen)):
        raise ModelError(
            f"{name} computes something else than its operations: they depend on more than its layers show"
        )
    return seen
