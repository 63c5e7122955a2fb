"""Chains of layers, and their activation patterns on data: what the structural floor is derived from.

Known are linear layers, two-dimensional convolutions, elementwise activations, average pools and flattens,
one after the other, such as lossray's linear, mlp and cnn without norm.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lossray.networks.architecture import Node, graph_of
from lossray.networks.functional import call_with
from lossray.networks.layout import layout_of, uncompiled

STRAIGHT = 1e-12  # second difference of a straight line, at steps of 0.01; gelu's at -4 is a million times it
AT_KINK = 1e-13  # share of its terms that a sum is told from zero by
SAME_OUTPUTS = 1e-9  # relative difference of a model's outputs and those of its chain


@dataclass(frozen=True)
class Layer:
    """A layer with weights, and what follows it up to the next one.

    Attributes:
        node: of the model's graph.
        module: the layer itself.
        channelwise: activations and pools behind it, on [N, C, ...].
        reshaping: what follows, from the first flatten on.
    """

    node: Node
    module: nn.Linear | nn.Conv2d
    channelwise: tuple[Node, ...]
    reshaping: tuple[Node, ...]

    @property
    def is_convolution(self) -> bool:
        """Whether its units stand at many positions."""
        return self.node.kind == "conv"

    @property
    def columns(self) -> int:
        """Incoming weights of a unit, and its bias."""
        return self.module.weight[0].numel() + (self.module.bias is not None)


@dataclass
class Pattern:
    """The activation pattern of one network on the data.

    Attributes:
        gates: node -> slope of each activation, [N, C, ...].
        sharp: whether no unit is at its kink but for rounding, which would decide on its gate.
        needed: layer -> what of its output counts, [N, C, ...].
    """

    gates: dict[str, Tensor] = field(default_factory=dict)
    sharp: bool = True
    needed: dict[str, Tensor] = field(default_factory=dict)

    def pick(self, index: Tensor) -> "Pattern":
        """That of some examples."""
        return Pattern(
            {name: gate[index] for name, gate in self.gates.items()},
            self.sharp,
            {name: needed[index] for name, needed in self.needed.items()},
        )


def chain_of(model: nn.Module, inputs: Tensor, outputs: Tensor) -> list[Layer] | None:
    """The layers in order; None where the model is no chain of what is understood, or has other parameters.

    Args:
        model: the model, in any mode.
        inputs: a few examples, float64.
        outputs: the model's for them, in eval mode and float64.

    Raises:
        ModelError: torch.fx cannot trace the model.
    """
    layers = _layers(graph_of(model))
    if layers is None or sum(p.numel() for p in _parameters(layers)) != layout_of(uncompiled(model)).dim:
        return None
    try:
        chain_outputs = _run(layers, inputs, Pattern())
    except RuntimeError:  # a linear layer along one of several axes
        return None
    same = chain_outputs.shape == outputs.shape
    same = same and bool((chain_outputs - outputs).abs().max() <= SAME_OUTPUTS * outputs.abs().max())
    return layers if same else None


def _layers(nodes: Sequence[Node]) -> list[Layer] | None:
    layers: list[list[Any]] = []
    uses = uses_of(nodes)
    previous = None
    for node in nodes:
        if previous is not None and node.inputs != (previous,):
            return None
        previous = node.name
        if node.kind in ("linear", "conv"):
            if not _is_plain(node, uses):
                return None
            layers.append([node, [], []])
        elif node.kind in ("input", "output", "dropout") or isinstance(node.module, nn.Identity):
            continue
        elif node.kind == "smooth" and not _bends(node):
            return None
        elif node.kind in ("flatten", "homogeneous", "smooth", "pool"):
            if node.module is not None and next(node.module.parameters(), None) is not None:
                return None  # PReLU
            if layers:
                reshaped = node.kind == "flatten" or bool(layers[-1][2])
                layers[-1][2 if reshaped else 1].append(node)
            elif node.kind != "flatten":
                return None  # something on the inputs
        else:
            return None
    chain = [Layer(node, node.module, tuple(after), tuple(rest)) for node, after, rest in layers]
    ordered = all(len([n for n in layer.channelwise if n.kind != "pool"]) <= 1 for layer in chain)
    plain = all(node.kind == "flatten" for layer in chain for node in layer.reshaping)
    ends = bool(chain) and chain[-1].node.kind == "linear" and not chain[-1].channelwise
    return chain if ordered and plain and ends else None


def _bends(node: Node) -> bool:
    """Whether an activation is nowhere a straight line, as tanh and gelu; random weights then show all.

    One with straight pieces, such as ReLU6 or ELU, may be flat or linear at random weights and not here.
    """
    points = torch.linspace(-4, 4, 801, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        straight = node.function(points).diff(n=2).abs() < STRAIGHT
    return not bool((straight[1:] & straight[:-1]).any())


def _is_plain(node: Node, uses: Counter[int]) -> bool:
    """A layer whose weights act once, on zero-padded inputs, and are all trained."""
    module = node.module
    if not is_bare(module):
        return False
    if not all(p.requires_grad and uses[id(p)] == 1 for p in module.parameters()):  # type: ignore[union-attr]
        return False
    if node.kind == "linear":
        return True
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"


def is_bare(module: nn.Module | None) -> bool:
    """Whether a layer's weights are its own parameters and it does nothing else: no hook, no other form."""
    if module is None or module._forward_hooks or module._forward_pre_hooks:
        return False
    return {name for name, _ in module.named_parameters()} <= {
        "weight",
        "bias",
    } and "weight" in module._parameters


def uses_of(nodes: Sequence[Node]) -> Counter[int]:
    """In how many places each parameter acts, by its id: tied weights, and layers that are called twice."""
    uses: Counter[int] = Counter()
    for node in nodes:
        if node.module is not None:
            uses.update(id(p) for p in node.module.parameters())
        elif node.kind == "other" and not node.inputs:
            uses[id(node.function())] += 1  # a parameter that a function is given
    return uses


def _parameters(layers: Sequence[Layer]) -> list[nn.Parameter]:
    return [p for layer in layers for p in layer.module.parameters()]


def pattern_of(layers: Sequence[Layer], inputs: Tensor) -> Pattern:
    """Gates at the model's own weights, and which outputs of every layer have a way to the model's."""
    pattern = Pattern()
    _run(layers, inputs, pattern)
    _find_needed(layers, inputs, pattern)
    return pattern


def _run(layers: Sequence[Layer], inputs: Tensor, pattern: Pattern) -> Tensor:
    """Outputs of the chain at its own weights, without a graph; the gates go into ``pattern``."""
    x = inputs
    with torch.no_grad():
        for layer in layers:
            weights = {name: p.detach().double() for name, p in layer.module.named_parameters()}
            z = call_with(layer.module, weights, shaped(layer, x))
            for node in layer.channelwise:
                if node.kind == "homogeneous":
                    pattern.gates[node.name] = _slope(node, z)
                    terms = _terms(layer, weights, x) if node is layer.channelwise[0] else z.abs()
                    pattern.sharp &= not bool(((z.abs() <= AT_KINK * terms) & (terms > 0)).any())
                z = node.function(z)
            x = through(layer.reshaping, z)
    return x


def _terms(layer: Layer, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The sums of the sizes of what is added up to the layer's results."""
    sizes = {name: weight.abs() for name, weight in weights.items()}
    sums: Tensor = call_with(layer.module, sizes, shaped(layer, x.abs()))
    return sums


def _slope(node: Node, z: Tensor) -> Tensor:
    """Slope of a piecewise linear activation, [N, C, ...]; 0 at the kink of ReLU, as autograd has it."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(node.function(leaf.clone()).sum(), leaf)  # it may work in place
    return slope.detach()


def _find_needed(layers: Sequence[Layer], inputs: Tensor, pattern: Pattern) -> None:
    """With all weights positive and the gates fixed, an output counts if the model's outputs depend on it."""
    with torch.enable_grad():
        x = torch.ones_like(inputs)
        ends: dict[str, Tensor] = {}
        for layer in layers:
            weights = {name: torch.ones_like(p).double() for name, p in layer.module.named_parameters()}
            weights["weight"] /= weights["weight"][0].numel()
            z = call_with(layer.module, weights, shaped(layer, x))
            for node in layer.channelwise:
                if node.kind == "homogeneous":
                    z = z * (pattern.gates[node.name] != 0)
                elif node.kind == "pool":
                    z = node.function(z)
            z = z.requires_grad_() if not z.requires_grad else z
            ends[layer.node.name] = z
            x = through(layer.reshaping, z)
        slopes = torch.autograd.grad(x.sum(), list(ends.values()), allow_unused=True)
    for name, slope, end in zip(ends, slopes, ends.values(), strict=True):
        pattern.needed[name] = torch.zeros_like(end) if slope is None else (slope.detach() > 0).double()


def shaped(layer: Layer, x: Tensor) -> Tensor:
    """Inputs as the layer takes them: a linear one flattens what came before it."""
    return x if layer.is_convolution else x.flatten(1)


def through(nodes: Sequence[Node], x: Tensor) -> Tensor:
    """``x`` after the operations of ``nodes``."""
    for node in nodes:
        x = node.function(x)
    return x
