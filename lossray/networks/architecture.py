"""A model's operations as a graph: what the rescaling symmetry and the structural floor are derived from.

The graph comes from torch.fx. A part of the model that fx cannot trace becomes one node of kind "other".
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lossray.errors import ModelError
from lossray.networks.as_found import copied
from lossray.networks.dropout import TapeDropout
from lossray.networks.layout import require_module, uncompiled
from lossray.plugins import failure

KINDS = (
    "input",
    "linear",
    "conv",
    "norm",
    "homogeneous",  # f(a x) = a f(x) for a > 0, elementwise
    "smooth",  # any other elementwise activation
    "pool",  # averages over the spatial axes
    "maxpool",
    "flatten",  # [B, C, ...] to [B, C ...]
    "dropout",
    "add",
    "shape",  # a size that is read, no tensor
    "output",
    "other",
)

_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "norm": (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
    ),
    "homogeneous": (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity),
    "smooth": (
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.Hardshrink,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.LogSigmoid,
        nn.Mish,
        nn.ReLU6,
        nn.SELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Softshrink,
        nn.Softsign,
        nn.Tanh,
        nn.Tanhshrink,
        nn.Threshold,
    ),
    "pool": (
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
    ),
    "maxpool": (
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.MaxPool3d,
        nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d,
        nn.AdaptiveMaxPool3d,
    ),
    "flatten": (nn.Flatten,),
    "dropout": (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, TapeDropout),
}

_CALLS = {  # names of functions of torch and of methods of tensors
    "homogeneous": ("relu", "relu_", "leaky_relu", "leaky_relu_"),
    "smooth": (
        "celu",
        "elu",
        "gelu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "logsigmoid",
        "mish",
        "relu6",
        "selu",
        "silu",
        "sigmoid",
        "sigmoid_",
        "softplus",
        "softshrink",
        "softsign",
        "tanh",
        "tanh_",
        "tanhshrink",
        "threshold",
    ),
    "pool": tuple(f"{name}avg_pool{n}d" for name in ("", "adaptive_") for n in (1, 2, 3)),
    "maxpool": tuple(f"{name}max_pool{n}d" for name in ("", "adaptive_") for n in (1, 2, 3)),
    "dropout": ("dropout", "dropout1d", "dropout2d", "dropout3d"),
    "add": ("add", "add_", "iadd"),
    "flatten": ("flatten", "view", "reshape"),
    "mean": ("mean",),
    "shape": ("size", "dim"),
}
_METHODS = {name: kind for kind, names in _CALLS.items() for name in names}
_FUNCTIONS: dict[Callable[..., Any], str] = {
    getattr(home, name): kind
    for name, kind in _METHODS.items()
    for home in (torch, F, operator)
    if hasattr(home, name)
}


@dataclass(frozen=True)
class Node:
    """One operation of a model.

    Attributes:
        name: of the layer (``conv1``), or of the call (``add``); unique in the graph. The second call of a
            layer is ``layer#2``.
        kind: one of `KINDS`.
        module: the layer of the user's own model; None for a call.
        inputs: names of the nodes whose values it takes, in order.
        function: gives the node's value from those of ``inputs``; a call keeps the mode (``self.training``)
            that the model had when the graph was made. An input gives its default.
        pooled: of a pool, how many spatial axes it averages over.
    """

    name: str
    kind: str
    module: nn.Module | None
    inputs: tuple[str, ...]
    function: Callable[..., Any]
    pooled: int = 0


def graph_of(model: nn.Module) -> tuple[Node, ...]:
    """The operations of ``model`` in topological order.

    Nodes whose value nobody uses stay in the graph: they may work in place. The model is left as found.

    Raises:
        ModelError: torch.fx cannot trace the model's own ``forward``, or it is no module.
    """
    require_module(model)
    root = uncompiled(model)
    if not list(root.children()):
        root = nn.Sequential(root)  # fx would look inside a layer that is the whole model
    traced, constants = _traced(root)
    names = _names(traced)
    modules = dict(root.named_modules(remove_duplicate=False))
    spatial: dict[str, int] = {}  # name -> number of spatial axes of the value, where it is known
    nodes: list[Node] = []
    for node in traced.nodes:
        for new in _nodes(node, names, modules, constants, spatial):
            nodes.append(new)
            names[node] = new.name
            spatial[new.name] = _spatial(new, spatial)
    used = {name for node in nodes for name in node.inputs}
    while idle := [node for node in nodes if node.kind == "shape" and node.name not in used]:
        nodes = [node for node in nodes if node not in idle]
        used = {name for node in nodes for name in node.inputs}
    return tuple(nodes)


class _Tracer(fx.Tracer):
    """Its leaves are layers, and modules that cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children()) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        inner = uncompiled(m)
        if inner is not m:
            return inner(*args, **kwargs)
        before, depth = set(self.graph.nodes), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # a user's forward may raise anything
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            for node in reversed(self.graph.nodes):
                if node not in before:
                    self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _traced(root: nn.Module) -> tuple[fx.Graph, nn.Module]:
    """The graph of a copy, as a forward pass may change its module, and the copy, which holds constants."""
    try:
        with torch.random.fork_rng(devices=[]):
            twin = copied(root)
            return _Tracer().trace(twin), twin
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(
            f"the operations of {type(root).__name__} cannot be found: torch.fx cannot trace its forward: "
            f"{failure(error)}; what depends on the values of tensors belongs into a submodule"
        ) from error


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A layer's path, or fx's own name for a call; numbered from the second call on."""
    calls: Counter[str] = Counter()
    names = {}
    for node in graph.nodes:
        name = str(node.target) if node.op in ("call_module", "get_attr") else node.name
        name = name.replace("._orig_mod", "")
        calls[name] += 1
        names[node] = name if calls[name] == 1 else f"{name}#{calls[name]}"
    return names


def _nodes(
    node: fx.Node,
    names: dict[fx.Node, str],
    modules: dict[str, nn.Module],
    constants: nn.Module,
    spatial: dict[str, int],
) -> Iterator[Node]:
    """Ours for one of fx: a mean that drops the spatial axes is a pool and a flatten."""
    name, operands = names[node], _operands(node)
    inputs = tuple(names[operand] for operand in operands)
    if node.op == "call_module":
        module = modules[str(node.target)]
        kind = _kind_of_layer(module) if len(inputs) == 1 and not node.kwargs else "other"
        yield Node(name, kind, module, inputs, _call_of(node, module), _pooled(kind, type(module).__name__))
    elif node.op == "placeholder":
        yield Node(name, "input", None, inputs, _given(node))
    elif node.op == "output":
        yield Node(name, "output", None, inputs, _identity)
    elif node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        tensor = getattr(modules[owner], attribute, None)
        if tensor is None:
            tensor = getattr(constants, attribute)  # one that the forward pass makes
        yield Node(name, "other", None, (), lambda: tensor)
    else:
        kind = _kind_of_call(node, operands)
        if kind == "flatten":
            call = _call_of(node, None) if len(inputs) == 1 else _flatten
            yield Node(name, kind, None, inputs[:1], call)
        elif kind == "mean" and _is_spatial_mean(node, spatial.get(inputs[0], 0)):
            dims = tuple(range(2, 2 + spatial[inputs[0]]))
            yield Node(name, "pool", None, inputs, lambda x: x.mean(dim=dims, keepdim=True), len(dims))
            if not _argument(node, 2, "keepdim", False):
                yield Node(f"{name}.flatten", "flatten", None, (name,), _flatten)
        else:
            kind, called = "other" if kind == "mean" else kind, getattr(node.target, "__name__", "")
            yield Node(name, kind, None, inputs, _call_of(node, None), _pooled(kind, called))


def _pooled(kind: str, name: str) -> int:
    """The spatial axes of a pool that is named "AvgPool2d" or "avg_pool2d"."""
    return int(name[-2]) if kind in ("pool", "maxpool") and name[-1:] == "d" and name[-2:-1].isdigit() else 0


def _given(node: fx.Node) -> Callable[..., Any]:
    """The value of an input, or its default."""
    return lambda *values: values[0] if values else next(iter(node.args), None)


def _kind_of_layer(module: nn.Module) -> str:
    """By the forward that it runs: a subclass or a module with one of its own may do anything."""
    for kind, classes in _MODULES.items():
        for base in classes:
            if isinstance(module, base) and type(module).forward is base.forward:
                part = isinstance(module, nn.Flatten) and [module.start_dim, module.end_dim] != [1, -1]
                pair = kind == "maxpool" and getattr(module, "return_indices", False)
                custom = "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__
                return "other" if part or pair or custom or not _holds_its_weights(module) else kind
    return "other"


def _holds_its_weights(module: nn.Module) -> bool:
    """Whether weight and bias are parameters, and not made from others when they are needed."""
    made = [name for name in ("weight", "bias") if isinstance(vars(module).get(name), Tensor)]
    return not made and not parametrize.is_parametrized(module)


def _kind_of_call(node: fx.Node, operands: tuple[fx.Node, ...]) -> str:
    if node.op == "call_method":
        kind = _METHODS.get(str(node.target), "other")
    elif node.target is getattr:
        kind = "shape" if node.args[1] == "shape" else "other"
    else:
        kind = _FUNCTIONS.get(node.target, "other")  # type: ignore[arg-type]
    if operands and node.op == "call_function" and all(map(_is_shape, operands)):
        return "shape"  # arithmetic on sizes
    if kind == "flatten":
        return kind if _keeps_batch(node) else "other"
    if kind == "add" and len(operands) != 2:
        return "other"
    return kind if kind == "add" or len(operands) == 1 else "other"


def _is_shape(node: fx.Node) -> bool:
    return (
        node.op.startswith("call_")
        and node.op != "call_module"
        and (_kind_of_call(node, _operands(node)) == "shape")
    )


def _keeps_batch(node: fx.Node) -> bool:
    """flatten(1), view(x.size(0), -1), or view(-1, n)."""
    if "flatten" in (node.target, getattr(node.target, "__name__", "")):
        return [_argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)] == [1, -1]
    shape = node.args[1:]
    if len(shape) == 1 and isinstance(shape[0], tuple | list):
        shape = tuple(shape[0])
    if len(shape) != 2:
        return False
    rows, columns = shape
    return bool(rows == -1 and isinstance(columns, int)) or bool(columns == -1 and _is_batch_size(rows))


def _is_batch_size(size: object) -> bool:
    """x.size(0), x.size()[0] or x.shape[0]."""
    if not isinstance(size, fx.Node) or not _is_shape(size):
        return False
    reads = size.target in ("size", operator.getitem)
    return reads and len(size.args) == 2 and bool(size.args[1] == 0)


def _is_spatial_mean(node: fx.Node, spatial: int) -> bool:
    """Whether it averages over all spatial axes and no other."""
    dims = _argument(node, 1, "dim", None)
    dims = (dims,) if isinstance(dims, int) else dims
    if spatial == 0 or not isinstance(dims, tuple | list):
        return False
    return sorted(dim % (2 + spatial) for dim in dims) == list(range(2, 2 + spatial))


def _spatial(node: Node, spatial_axes: dict[str, int]) -> int:
    """Number of axes after the channels of the node's value; 0 where there are none or it is unknown."""
    if isinstance(node.module, nn.modules.conv._ConvNd):
        return node.module.weight.ndim - 2
    if node.kind in ("norm", "homogeneous", "smooth", "pool", "maxpool", "dropout", "add"):
        return spatial_axes[node.inputs[0]]
    return 0


def _argument(node: fx.Node, position: int, name: str, default: object) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes among the arguments, in order and as often as they occur."""
    operands: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda operand: operands.append(operand))
    return tuple(operands)


def _call_of(node: fx.Node, module: nn.Module | None) -> Callable[..., Any]:
    """The call as a function of its operands alone."""

    def call(*values: Any) -> Any:
        rest = iter(values)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: next(rest))
        if module is not None:
            return module(*args, **kwargs)
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    return call


def _identity(*values: Any) -> Any:
    return values[0] if len(values) == 1 else values


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(1)
