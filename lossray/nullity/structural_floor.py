"""The structural floor: null directions of the Hessian that architecture, data and loss force.

Two kinds. A direction that leaves the function unchanged for *all* weights with the same activation pattern
is null, off the kinks, at every such point. In a chain of layers such a direction belongs to one unit: a
change of its incoming weights that no example can see. Which ones these are follows from a network whose
gates are fixed at the present activation pattern and whose earlier layers are random: what vanishes there
vanishes for all weights, and for generic weights nothing else does. In the last layer it is also what changes
the outputs in a way that the loss ignores: output_loss.py.

The other kind, "mixing", combines the weights of several units and turns with them: more units of one
activation pattern than the next layer tells apart, features that depend on each other, fewer examples than
weights. Its dimension is what a generic point with the same activation pattern has in addition: mixing.py.

Either way the floor is a lower bound for the nullity of every point with this pattern. A loss that is
analytic only in pieces (L1, Huber's, a hinge) is replaced by the quadratic that agrees with it at the model's
own outputs, whose Hessian is the same there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossray.errors import DataError, ModelError
from lossray.networks.ambient import seeded
from lossray.networks.architecture import Node, graph_of
from lossray.networks.functional import call_with
from lossray.networks.losses import Loss
from lossray.nullity.chains import Layer, chain_of, is_bare, pattern_of, uses_of
from lossray.nullity.counts import Count
from lossray.nullity.loss_pieces import in_one_piece, taylor_loss
from lossray.nullity.mixing import generic_nullity
from lossray.nullity.output_loss import (
    MOST_OUTPUTS,
    Ignored,
    OutputLoss,
    ignored_directions,
    natural_scale,
    random_outputs,
)
from lossray.nullity.unit_conditions import (
    DOUBTFUL,
    RANK_TOLERANCE,
    first_basis,
    layer_nullity,
    measured_rank,
)
from lossray.operators.finite import require_finite_inputs
from lossray.operators.objectives import converted
from lossray.operators.user_data import described, example_batch, read_data
from lossray.plugins import failure
from lossray.spectra.summary import Summarised

if TYPE_CHECKING:
    import pandas as pd

SAME_OUTPUTS = 1e-9  # relative difference of a model's outputs and those of its last layer
TESTED_EXAMPLES = 32
AT_ONCE = 4096  # examples in a forward pass


@dataclass(frozen=True, repr=False)
class StructuralFloor(Summarised):
    """How many null directions are forced; it prints as a few lines.

    Attributes:
        dimension: their number, a lower bound for the nullity of every point with this activation pattern.
        by_cause: "first layer", "later layers", "softmax shift" (of all outputs alike), "ignored outputs"
            (other changes of the outputs that the loss ignores), "mixing", "linear network".
        complete: whether these are all: whether a generic point with this pattern has no others. False for
            an architecture that is not understood, where "mixing" is not counted, and wherever in doubt.
    """

    dimension: int
    by_cause: Mapping[str, int]
    complete: bool

    def summary(self) -> str:
        """Their number, by cause."""
        what = "there are no others" if self.complete else "there may be others"
        lines = [f"{self.dimension:,} null directions are forced; at a generic point {what}"]
        return "\n".join([*lines, *(f"{count:8,} {cause}" for cause, count in self.by_cause.items())])

    def to_frame(self) -> "pd.DataFrame":
        """One row per cause: cause and dimension."""
        import pandas as pd

        return pd.DataFrame({"cause": list(self.by_cause), "dimension": list(self.by_cause.values())})

    def excess(self, nullity: float) -> float | None:
        """What a nullity has beyond the floor; None where more might be forced, or less than it was found."""
        beyond = nullity - self.dimension
        return beyond if beyond == 0 or (self.complete and beyond > 0) else None


@dataclass(frozen=True)
class BesideFloor:
    """A counted nullity beside the floor.

    Attributes:
        structural_nullity: the floor's dimension; None where nothing is known.
        excess: nullity beyond it; None without a rank, and where more might be forced.
        rank: where the count has one.
        note: why there is no structural nullity.
    """

    structural_nullity: int | None
    excess: int | None
    rank: int | None
    note: str | None


def beside(floor: StructuralFloor | None, count: Count, note: str | None = None) -> BesideFloor:
    """What is reported of a floor beside a count, and of the count beside the floor.

    A nullity that a gap supports and that is below the floor refutes one of the two: neither is reported.

    Args:
        floor: None where there is none.
        count: at the noise floor, or below a threshold.
        note: why there is none.
    """
    if floor is None:
        return BesideFloor(None, None, count.rank, note)
    if count.rank is None:
        return BesideFloor(floor.dimension, None, None, None)
    if count.nullity < floor.dimension:
        contradiction = (
            f"{floor.dimension} null directions were derived and {count.nullity:.0f} found: one is wrong"
        )
        return BesideFloor(None, None, None, contradiction)
    excess = floor.excess(count.nullity)
    return BesideFloor(floor.dimension, None if excess is None else int(excess), count.rank, None)


def structural_floor(model: nn.Module, data: Any, loss: Loss, *, dense_up_to: int = 2500) -> StructuralFloor:
    """Count the null directions that architecture, data and loss force on the Hessian of the mean loss.

    Known are chains of layers; see chains.py. Of other models what the loss ignores of the outputs is
    counted, in the last layer. Losses are told by trying: nothing is assumed of them.

    Args:
        model: evaluated in eval mode, in float64, and left as it was.
        data: as for `lossray.Hessian`.
        loss: ``loss(outputs, targets)``, the mean over examples.
        dense_up_to: largest number of parameters at which "mixing" is counted, which takes all eigenvalues of
            a matrix of that size.

    Raises:
        DataError: the data cannot be read, are empty, or their inputs are no tensors.
        ModelError: torch.fx cannot trace the model, or the model or the loss fails on the data.
        ResourceError: that matrix does not fit.

    Example:
        Cross entropy ignores what is added to all outputs alike, by their biases or by the weights of one
        input: 2 directions here. The weights of an input that is always zero do nothing: 2 more.

        >>> import lossray, torch
        >>> inputs, targets = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
        >>> model = torch.nn.Linear(2, 2)  # 6 parameters
        >>> floor = lossray.structural_floor(model, (inputs, targets), torch.nn.functional.cross_entropy)
        >>> floor.dimension, floor.by_cause["first layer"], floor.by_cause["softmax shift"], floor.complete
        (4, 2, 2, True)
    """
    nodes = graph_of(model)
    inputs, output_loss = _examples(model, data, loss)
    outputs = _outputs(model, inputs)
    output_loss.gradient(outputs)  # what fails here fails for every use
    ignored = ignored_directions(output_loss, outputs)
    layers = chain_of(model, inputs[:TESTED_EXAMPLES], outputs[:TESTED_EXAMPLES])
    pattern = None if layers is None else pattern_of(layers, inputs)
    if layers is None or pattern is None or not pattern.sharp:
        return _of_unknown(model, nodes, inputs, outputs, ignored)
    small = sum(layer.columns * len(layer.module.weight) for layer in layers) <= dense_up_to
    linear = _is_linear_network(layers)
    smooth = (small or linear) and in_one_piece(output_loss, outputs, random_outputs(output_loss, outputs))
    if linear and smooth and _is_full(output_loss, outputs, ignored):
        return _of_linear_network(layers, inputs, ignored)
    nullities = [layer_nullity(layers, i, inputs, pattern) for i in range(len(layers))]
    causes = {"first layer": nullities[0][0], "later layers": sum(total for total, _ in nullities[1:])}
    causes |= _ignored_causes(ignored, features=nullities[-1][1], bias=False)
    forced = sum(causes.values())
    if not small:
        return StructuralFloor(forced, causes, False)
    analytic, exact = (output_loss, True) if smooth else _surrogate(output_loss, outputs)
    if analytic is None:
        return StructuralFloor(forced, causes, False)
    basis, certain = first_basis(layers, inputs, pattern)
    scale = natural_scale(analytic, outputs)
    whole = generic_nullity(layers, pattern, basis, analytic, scale=scale, at_least=forced)
    if whole is None:
        return StructuralFloor(forced, causes, False)
    return StructuralFloor(whole, causes | {"mixing": whole - forced}, certain and exact)


def null_vectors(model: nn.Module, data: Any, loss: Loss) -> Tensor:
    """Directions of the last layer along which the loss provably does not change: [n, d], float64.

    Under cross entropy one change of all output biases, and of all weights of a feature. None, n = 0, where
    the last layer is no linear one, or the loss ignores nothing. Arguments and errors as for
    `structural_floor`.
    """
    inputs, output_loss = _examples(model, data, loss)
    outputs = _outputs(model, inputs)
    ignored = ignored_directions(output_loss, outputs)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    dim = sum(p.numel() for _, p in trainable)
    last = _last_linear(graph_of(model))
    rows = [torch.zeros(0, dim, dtype=torch.float64, device="cpu")]
    if last is None or not _gives(model, last, inputs, outputs):
        return rows[0]
    start = 0
    for _, parameter in trainable:
        if parameter is last.bias:
            directions = ignored.common.cpu()
        elif parameter is last.weight:
            features = torch.eye(parameter.shape[1], dtype=torch.float64, device="cpu")
            directions = torch.einsum("uc,ij->uicj", ignored.each.cpu(), features).reshape(
                -1, parameter.numel()
            )
        else:
            directions = rows[0][:, : parameter.numel()]
        rows.append(F.pad(directions, (start, dim - start - parameter.numel())))
        start += parameter.numel()
    return torch.cat(rows)


def _last_linear(nodes: Sequence[Node]) -> nn.Linear | None:
    """The linear layer whose outputs are the model's, and whose weights act nowhere else."""
    by_name = {node.name: node for node in nodes}
    node = nodes[-1]
    while node.kind in ("output", "dropout") or isinstance(node.module, nn.Identity):
        if len(node.inputs) != 1:
            return None
        node = by_name[node.inputs[0]]
    if not isinstance(node.module, nn.Linear) or not is_bare(node.module):
        return None
    uses = uses_of(nodes)
    return node.module if all(uses[id(p)] == 1 for p in node.module.parameters()) else None


def _gives(model: nn.Module, last: nn.Linear, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether the outputs are this layer's own, hooks of the model and of its parts included."""
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        some = _outputs(model, inputs[:TESTED_EXAMPLES])
    finally:
        handle.remove()
    if len(seen) != 1 or some.shape[-1] != last.out_features:
        return False
    bias = None if last.bias is None else last.bias.detach().double()
    layer_outputs = F.linear(seen[0], last.weight.detach().double(), bias)
    return layer_outputs.shape == some.shape and bool(
        (layer_outputs - some).abs().max() <= SAME_OUTPUTS * some.abs().max()
    )


# ---- special cases


def _of_unknown(
    model: nn.Module, nodes: Sequence[Node], inputs: Tensor, outputs: Tensor, ignored: Ignored
) -> StructuralFloor:
    """What the loss ignores by itself: of the bias and of every feature, whether they vanish or not."""
    last = _last_linear(nodes)
    causes: dict[str, int] = {}
    if last is not None and _gives(model, last, inputs, outputs):
        features = last.in_features if last.weight.requires_grad else 0
        bias = last.bias is not None and last.bias.requires_grad
        causes = _ignored_causes(ignored, features=features, bias=bias)
    return StructuralFloor(sum(causes.values()), causes, False)


def _ignored_causes(ignored: Ignored, *, features: int, bias: bool) -> dict[str, int]:
    """Null directions of the last layer: a change of the outputs times a feature, and of the bias."""
    shift = features * ignored.equal_shift(ignored.each) + bias * ignored.equal_shift(ignored.common)
    total = features * len(ignored.each) + bias * len(ignored.common)
    causes = {"softmax shift": shift, "ignored outputs": total - shift}
    return {cause: count for cause, count in causes.items() if count}


def _surrogate(output_loss: OutputLoss, outputs: Tensor) -> tuple[OutputLoss | None, bool]:
    """The quadratic in place of a loss made of pieces, and whether the loss is that quadratic nearby."""
    quadratic = taylor_loss(output_loss, outputs)
    if quadratic is None:
        return None, False
    even = quadratic.evened()
    return OutputLoss(even, even.targets), even.quadratic


def _is_linear_network(layers: Sequence[Layer]) -> bool:
    matrices = all(isinstance(layer.module, nn.Linear) and layer.module.bias is None for layer in layers)
    return matrices and len(layers) > 1 and not any(layer.channelwise for layer in layers)


def _is_full(output_loss: OutputLoss, outputs: Tensor, ignored: Ignored) -> bool:
    """Whether every example curves the loss in all that it does not ignore, as the formula below takes it."""
    classes = outputs.shape[1]
    if classes > MOST_OUTPUTS:
        return False
    values = torch.linalg.eigvalsh(output_loss.blocks(random_outputs(output_loss, outputs))).abs()
    seen = values.sort(dim=1).values[:, len(ignored.each) :]
    return bool((seen > RANK_TOLERANCE * values.max()).all()) and seen.numel() > 0


def _of_linear_network(layers: Sequence[Layer], inputs: Tensor, ignored: Ignored) -> StructuralFloor:
    """At generic parameters, d minus the rank 2 q M - L q^2 + q (r + k) of Singh et al., arXiv 2106.16225."""
    widths = [len(layer.module.weight) for layer in layers[:-1]]
    k = len(layers[-1].module.weight) - len(ignored.each)
    r, smallest = measured_rank(inputs.flatten(1))
    q = min([r, k, *widths])
    dim = sum(layer.module.weight.numel() for layer in layers)
    rank = min(2 * q * sum(widths) - len(layers) * q * q + q * (r + k), dim)
    return StructuralFloor(dim - rank, {"linear network": dim - rank}, smallest > DOUBTFUL)


# ---- data and loss


def _examples(model: nn.Module, data: Any, loss: Loss) -> tuple[Tensor, OutputLoss]:
    """All inputs [N, ...] and the loss on all targets, on the model's device; what is floating in float64."""
    with seeded(0, torch.device("cpu")):  # a DataLoader draws whenever it is read
        batches = [example_batch(raw) for raw in read_data(data, closure=False)]
    if not all(isinstance(b.inputs, Tensor) and isinstance(b.targets, Tensor) for b in batches):
        raise DataError("the structural floor needs inputs and targets that are tensors")
    for number, batch in enumerate(batches):
        require_finite_inputs(batch.inputs, number)
    if not sum(len(batch.inputs) for batch in batches):
        raise DataError("data: found no example; at least one is needed")
    device = next(model.parameters()).device
    batches = [converted(batch, device, torch.float64) for batch in batches]
    kept = [slice(None) if batch.weights is None else batch.weights > 0 for batch in batches]
    inputs = torch.cat([batch.inputs[rows] for batch, rows in zip(batches, kept, strict=True)])
    targets = torch.cat([batch.targets[rows] for batch, rows in zip(batches, kept, strict=True)])
    weights = None
    if any(batch.weights is not None for batch in batches):
        each = [inputs.new_ones(len(b.inputs)) if b.weights is None else b.weights for b in batches]
        weights = torch.cat([w[rows].double() for w, rows in zip(each, kept, strict=True)])
    alike = weights is None or bool((weights == weights[0]).all())
    return inputs, OutputLoss(loss, targets, None if alike else weights)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs in eval mode and float64; the model stays as it was."""
    flags = [(module, module.training) for module in model.modules()]
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in _tensors(model).items()}
    try:
        for module, _ in flags:
            module.training = False
        parts = [call_with(model, tensors, part) for part in inputs.split(AT_ONCE)]
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{type(model).__name__} raised {failure(error)}") from error
    finally:
        for module, flag in flags:
            module.training = flag
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        raise ModelError(
            f"{type(model).__name__} returns {described(parts[0])}: the structural floor needs one tensor "
            "of floating-point numbers"
        )
    return torch.cat(parts)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
