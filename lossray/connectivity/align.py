"""One model brought close to another without changing its function: `align`.

Hidden units are permuted (Git Re-Basin, arXiv 2209.04836) and, in ReLU networks, rescaled. With both, units
are also matched in the balanced gauge of each model, which is blind to scale, before they take the other's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lossray.connectivity.activations import activation_matching
from lossray.connectivity.scaling import nearest_factors
from lossray.connectivity.weight_matching import Permutations, weight_matching
from lossray.errors import DataError, ModelError, StudyError
from lossray.names import unknown_name
from lossray.networks.as_found import copied
from lossray.networks.copies import double_copy
from lossray.networks.function_change import require_kept
from lossray.networks.layout import Layout, layout_of, require_module, tensors_of, uncompiled
from lossray.networks.permutations import PermutationSymmetry, permutation_symmetry, permuted
from lossray.networks.symmetry import RescalingSymmetry, rescaled, rescaling_symmetry
from lossray.operators.finite import require_finite_inputs
from lossray.operators.user_data import as_tensors, described, read_data

Kind = Literal["permutation", "scale", "both"]
Matching = Literal["weights", "activations"]

EXAMPLES_AT_ONCE = 1024  # in a forward pass
NEEDED = "allowed: two models of one architecture"
INPUTS = "allowed: inputs [B, ...], (inputs, targets), or a list of such pairs"


@dataclass(frozen=True)
class Alignment:
    """What was done to a model to bring it close to another.

    `permute` by the permutations and then `rescale` by the factors do the same.

    Attributes:
        model: a new one, in the mode of the model that was aligned.
        permutations: what channel became channel 0, 1, ... of each group, [count] int64; empty if they were
            not to be permuted, or cannot be.
        factors: of the units of each hidden layer, after the permutation, [count] float64; empty if they were
            not to be scaled, or cannot be.
        distance_before: Euclidean distance of the trainable parameters from the other model's, in float64.
        distance: the same afterwards; never larger.
        function_change: largest |f - f'| over largest |f| on the data, in float64, before the weights are
            rounded to the model's own precision. None without data.
    """

    model: nn.Module
    permutations: dict[str, Tensor]
    factors: dict[str, Tensor]
    distance_before: float
    distance: float
    function_change: float | None


def align(
    model: nn.Module, to: nn.Module, data: Any = None, *, kind: Kind = "both", matching: Matching = "weights"
) -> nn.Module:
    """A model of the same function whose hidden units are permuted and scaled to lie close to another.

    Args:
        model: left as it is.
        to: a model of the same architecture, left as it is.
        data: inputs [B, ...], (inputs, targets), or a list of such pairs: on them it is checked that the
            function stays; without them on inputs that fit the model's layers and are made up.
        kind: "permutation", "scale" (ReLU networks), or "both": what the architecture allows of the two.
        matching: units are matched by their "weights", or by their "activations" on the data.

    Returns:
        A new model in the same mode, never farther from ``to`` than ``model`` is: a match that would not
        bring it closer is not used.

    Raises:
        ModelError: the architectures differ or have no such symmetry, weights are not finite, the function
            changes by more than rounding, or no inputs are known on which to see that.
        DataError: no data for the activations, or data without inputs.
        StudyError: an unknown kind or matching.

    Example:
        Two networks that differ in the order and the scale of their hidden units are one function.

        >>> import copy, lossray, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> other = copy.deepcopy(lossray.rescale(model, {"0": [2.0, 0.5]}))
        >>> for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        ...     other.get_parameter(name).data = other.get_parameter(name).data.flip(axis)
        >>> same = lossray.align(other, to=model)
        >>> all(torch.allclose(a, b, atol=1e-5) for a, b in zip(same.parameters(), model.parameters()))
        True
    """
    return aligned(model, to, data, kind=kind, matching=matching).model


def aligned(
    model: nn.Module, to: nn.Module, data: Any = None, *, kind: Kind = "both", matching: Matching = "weights"
) -> Alignment:
    """As `align`, with what was done and how near it brought the model."""
    for what, name, allowed in (("kind", kind, get_args(Kind)), ("matching", matching, get_args(Matching))):
        if name not in allowed:
            raise StudyError(f"align, {what}: {unknown_name(str(name), allowed)}")
    _require_same_architecture(model, to)
    model, to = uncompiled(model), uncompiled(to)
    inputs = () if data is None else tuple(_inputs(data, next(model.parameters()).device))
    if matching == "activations" and not inputs:
        raise DataError(f"align, matching 'activations': found no data; {INPUTS}")
    task = _Task.of(model, to, kind, inputs[0] if inputs else None)
    best = min((task.placed(p) for p in _candidates(task, inputs, matching)), key=lambda one: one.distance)
    before = _distance(model, to)
    new = task.changed(model, best)
    distance = _distance(new, to)
    if distance > before:  # by the rounding of the weights
        best, new, distance = task.unmoved, copied(model), before
    change = task.function_change(best, inputs)
    return Alignment(new, best.permutations, best.factors, before, distance, change if inputs else None)


@dataclass(frozen=True)
class _Candidate:
    """One way to align."""

    distance: float
    permutations: Permutations
    factors: dict[str, Tensor]


@dataclass(frozen=True)
class _Task:
    """Two models, and what their architecture and ``kind`` allow."""

    model: nn.Module
    to: nn.Module
    layout: Layout
    source: Tensor  # trainable parameters of the model, [d] float64 on the CPU
    target: Tensor  # those of the other, likewise
    channels: PermutationSymmetry | None
    units: RescalingSymmetry | None

    @staticmethod
    def of(model: nn.Module, to: nn.Module, kind: Kind, inputs: Any) -> "_Task":
        """Of two models of one architecture; with "both", one symmetry is enough."""
        data = None if inputs is None else (inputs, None)
        layout = layout_of(model)
        channels, units = None, None
        if kind != "scale":
            try:
                channels = permutation_symmetry(model, data)
            except ModelError:
                if kind == "permutation":
                    raise
        if kind != "permutation":
            try:
                units = rescaling_symmetry(model, layout, data)
            except ModelError:
                if channels is None:
                    raise
        return _Task(model, to, layout, _flat(model), _flat(to), channels, units)

    @property
    def unmoved(self) -> _Candidate:
        """The model as it is."""
        groups = {} if self.channels is None else self.channels.groups
        units = {} if self.units is None else self.units.groups
        return _Candidate(
            distance=float((self.source - self.target).norm()),
            permutations={name: torch.arange(count, device="cpu") for name, count in groups.items()},
            factors={
                n: torch.ones(s.stop - s.start, dtype=torch.float64, device="cpu") for n, s in units.items()
            },
        )

    def placed(self, permutations: Permutations) -> _Candidate:
        """The model after these permutations, scaled to lie as near as it can."""
        theta = self.source
        if self.channels is not None:
            theta = self._joined(self.channels.apply(self.layout.split(theta), permutations))
        factors = {}
        if self.units is not None:
            alpha = nearest_factors(self.units, theta, self.target)
            theta = self.units.diagonal(alpha) * theta
            factors = {name: alpha[units] for name, units in self.units.groups.items()}
        return _Candidate(float((theta - self.target).norm()), permutations, factors)

    def compared(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The weights of both, to be matched: as they are, and balanced where the units can be scaled."""
        thetas = torch.stack([self.source, self.target])
        yield self.layout.split(thetas[0]), self.layout.split(thetas[1])
        if self.units is not None:
            thetas = thetas * self.units.diagonal(self.units.balance_factors(thetas))
            yield self.layout.split(thetas[0]), self.layout.split(thetas[1])

    def changed(self, model: nn.Module, candidate: _Candidate) -> nn.Module:
        """The model, or its copy in another dtype, after a candidate."""
        new = model
        if self.channels is not None:
            new = permuted(new, self.channels, candidate.permutations)
        if self.units is not None:
            new = rescaled(
                new, self.units, torch.cat([candidate.factors[name] for name in self.units.groups])
            )
        return new

    def function_change(self, candidate: _Candidate, inputs: Sequence[Any]) -> float:
        """Largest |f - f'| over largest |f|, in eval mode and float64; without inputs on made-up ones.

        Raises:
            ModelError: it is more than rounding, or the model cannot take the inputs.
        """
        symmetry = self.channels or self.units
        assert symmetry is not None
        seen = symmetry.seen
        double = double_copy(self.model)
        other = self.changed(double, candidate)
        try:
            return require_kept(double, other, inputs or seen.batches, eps=seen.eps)
        except ModelError as error:
            raise ModelError(f"align: {error}") from error

    def _joined(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].reshape(-1) for name in self.layout.names])


def _candidates(task: _Task, inputs: Sequence[Any], matching: Matching) -> Iterator[Permutations]:
    """Permutations to choose from."""
    yield task.unmoved.permutations
    if task.channels is None:
        return
    if matching == "activations":
        yield activation_matching(task.channels, task.model, task.to, inputs)
    else:
        for source, target in task.compared():
            yield weight_matching(task.channels, source, target)


def _inputs(data: Any, device: torch.device) -> Iterator[Any]:
    """The inputs of every batch, in float64 where they are floats, in parts."""
    for number, raw in enumerate(read_data(data)):
        inputs = as_tensors(raw[0] if isinstance(raw, tuple | list) and raw else raw)
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not tensors or any(leaf.ndim == 0 or len(leaf) == 0 for leaf in tensors):
            raise DataError(f"align, data: found {described(inputs)}; {INPUTS}")
        require_finite_inputs(inputs, number)
        for start in range(0, len(tensors[0]), EXAMPLES_AT_ONCE):
            yield _part(inputs, slice(start, start + EXAMPLES_AT_ONCE), device)


def _part(inputs: Any, rows: slice, device: torch.device) -> Any:
    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[rows].to(device, torch.float64 if leaf.is_floating_point() else leaf.dtype)

    return tree_map(moved, inputs)


def _require_same_architecture(model: nn.Module, to: nn.Module) -> None:
    for module in (model, to):
        require_module(module)
    one, other = _tensors(uncompiled(model)), _tensors(uncompiled(to))
    for name in [*one, *other]:
        shapes = [str(side[name]) if name in side else "nothing" for side in (one, other)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"align: {name!r} is {shapes[0]} in model and {shapes[1]} in to; {NEEDED}")
    for what, module in (("model", model), ("to", to)):
        if not bool(_flat(uncompiled(module)).isfinite().all()):
            raise ModelError(f"align: {what} has weights that are not finite")


def _tensors(model: nn.Module) -> dict[str, str]:
    """What has to be the same in both."""
    trainable, others = tensors_of(model)
    shapes = {name: str(list(tensor.shape)) for name, tensor in trainable.items()}
    return shapes | {name: f"{list(tensor.shape)} (not trained)" for name, tensor in others.items()}


def _flat(model: nn.Module) -> Tensor:
    """The trainable parameters, [d] float64 on the CPU."""
    layout_of(model)  # refuses a model without any
    return torch.cat([tensor.reshape(-1).double().cpu() for tensor in tensors_of(model)[0].values()])


def _distance(model: nn.Module, to: nn.Module) -> float:
    return float((_flat(model) - _flat(to)).norm())
