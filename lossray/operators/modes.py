"""How products are formed, and what they need: a rule of shapes alone, so that every machine decides alike.

Three modes:

- "retained" keeps the graph of the gradient (of Gauss-Newton and Fisher: of the outputs) and pays one
  backward pass per product;
- "linearized" keeps the linearised gradient (`torch.func.linearize`) instead;
- "recompute" keeps nothing and builds the graph anew for every batch; a block of vectors shares it.

"auto" is "retained" where the estimated graph over all examples has at most RETAINED_BYTES, otherwise
"recompute", whose price is the gradient anew for every product, or for every block of them.

It is never "linearized". In units of one gradient of 1,000 examples (256 for the last), on one CPU thread in
float32, a product costs

    model             mlp 26k   cnn 21k   vit 26k   ResNet-8 78k   ResNet-20 272k
    retained, whole      1.6       2.1       2.3         2.2            2.1
    retained, pieces     1.6       1.9       1.7         2.1            2.1
    linearized           1.7       1.5       1.9         1.8            2.1
    to linearise it      510        27        34          32             76

(medians on a shared machine, good to 10 per cent), and the report of one checkpoint is 100 to 150 products:
over 120 of them only the cnn and ResNet-8 gain, 4 to 9 per cent, and with fewer examples the tracing is
dearer still. What pays more is the size of the pieces: on a CPU a batch whose graph exceeds CACHED_BYTES is
split into parts of at most PIECE_EXAMPLES, whose activations are still in the cache when they are read again
(a pack of 16 small mlps: 1.2 to 1.5 times faster). That is exact where the loss is a mean over examples,
which is checked; what mixes the examples of a batch (batch norm in train mode) is left whole.

No time is measured: two machines would decide differently, and the rows of a study would depend on which of
them ran it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lossray.errors import ModelError
from lossray.memory import readable_bytes, require_bytes
from lossray.networks.losses import Loss
from lossray.networks.stack import Stack
from lossray.operators.exact_products import exact_products
from lossray.operators.example_mean import is_example_mean
from lossray.operators.graph_memory import held_bytes
from lossray.operators.objectives import Batch, Objective, PackedObjective
from lossray.operators.products import PieceMaker, hessian_piece
from lossray.operators.settings import ProductMode

MODES = ("auto", "retained", "linearized", "recompute")

RETAINED_BYTES = 2**30  # largest graph that "auto" keeps, and largest piece of a batch that may be split
CACHED_BYTES = 2**22  # graphs up to this size are not split: their activations stay in the cache
PIECE_EXAMPLES = 500  # smaller pieces make the matrix products slower than the cache makes them faster


@dataclass(frozen=True)
class GraphBytes:
    """Estimated bytes of the graph of one piece: ``fixed`` plus ``example`` for each example.

    Attributes:
        fixed: bytes however many examples there are.
        example: bytes for each of them.
    """

    fixed: int
    example: float

    def of(self, n_examples: int) -> int:
        """Bytes of the graph over ``n_examples``."""
        return int(self.fixed + self.example * n_examples)


@dataclass(frozen=True)
class ProductPlan:
    """How an operator forms its products.

    Attributes:
        mode: "retained", "linearized" or "recompute".
        piece: most examples in a piece; None: every batch whole.
    """

    mode: ProductMode
    piece: int | None


def plan_products(objective: Objective, mode: str, make_piece: PieceMaker) -> ProductPlan:
    """Decide on mode and pieces, and refuse what does not fit.

    Args:
        objective: what is differentiated.
        mode: "auto", or the mode that the caller wants.
        make_piece: the operator's products of one batch.

    Raises:
        ValueError: an unknown mode.
        ResourceError: not even "recompute" fits, or the wanted mode does not.
    """
    if mode not in MODES:
        raise ValueError(f"mode: found {mode!r}; allowed: {', '.join(MODES)}")
    first = next(iter(objective.batches()))
    if None in objective.sizes:
        return _plan_whole(objective, mode, make_piece, first)
    try:
        cost = graph_bytes(objective, first, make_piece)
    except ModelError:  # a model may take batches of one size alone; what fails on these too is raised there
        return _plan_whole(objective, mode, make_piece, first)
    sizes = [size or 0 for size in objective.sizes]
    limit = objective.limits.portion(RETAINED_BYTES)
    affordable = _piece_examples(cost, max(sizes), objective.device, limit)
    splits = not objective.coupled and max(sizes) > affordable and is_example_mean(objective)
    piece = affordable if splits else None
    total = sum(cost.fixed + int(cost.example * size) for size in sizes)
    chosen = _choose(mode, total, limit)
    largest = min(affordable, max(sizes)) if splits else max(sizes)
    fits = int((limit - cost.fixed) / max(cost.example, 1.0))
    _require(
        objective, chosen, mode, total, cost.of(largest), f"batches of {max(1, fits)} examples would fit"
    )
    return ProductPlan(chosen, piece)


def graph_bytes(objective: Objective, batch: Batch, make_piece: PieceMaker) -> GraphBytes:
    """Estimate from two and four examples (repeats of the batch's first two), continued as a line."""
    size = min(2, batch.size or 1)
    two, four = (
        _piece_bytes(objective, batch.pick(torch.arange(n, device=objective.device) % size), make_piece)
        for n in (2, 4)
    )
    return GraphBytes(max(0, 2 * two - four), (four - two) / 2)


def choose_product_mode(
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    batch: tuple[Tensor, Tensor],
    *,
    n_examples: int,
    dtype: torch.dtype = torch.float32,
    limit: int = RETAINED_BYTES,
) -> ProductMode:
    """The mode of a setting: "retained" where the gradient's graph over all examples fits ``limit`` bytes.

    Args:
        stack: the architecture.
        theta: parameters [R, d] of a pack of the size that will be analysed.
        buffers: buffers by name.
        loss: mean loss over the examples of a batch.
        batch: at least one example (inputs, targets); two are measured.
        n_examples: size of the analysis set.
        dtype: of the products.
        limit: bytes.
    """
    estimate = retained_bytes(stack, theta, buffers, loss, batch, n_examples=n_examples, dtype=dtype)
    return "retained" if estimate <= limit else "recompute"


def retained_bytes(
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    batch: tuple[Tensor, Tensor],
    *,
    n_examples: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Estimated bytes of the gradient's graph over ``n_examples``; arguments as in `choose_product_mode`."""
    objective = PackedObjective(stack, theta, buffers, loss, [batch], dtype=dtype)
    first = next(objective.batches())
    return graph_bytes(objective, first, hessian_piece).of(n_examples)


def _piece_examples(cost: GraphBytes, n_examples: int, device: torch.device, limit: int) -> int:
    """Most examples in a piece: what the cache favours on a CPU, and what a limit in bytes allows."""
    fits = max(1, int((limit - cost.fixed) / max(cost.example, 1.0)))
    cached = device.type == "cpu" and cost.example * n_examples > CACHED_BYTES
    return min(fits, PIECE_EXAMPLES) if cached else fits


def _plan_whole(objective: Objective, mode: str, make_piece: PieceMaker, first: Batch) -> ProductPlan:
    """The plan for batches that cannot be divided; the first one is measured whole."""
    measured = _piece_bytes(objective, first, make_piece)
    total = int(measured / first.share)
    chosen = _choose(mode, total, objective.limits.portion(RETAINED_BYTES))
    _require(objective, chosen, mode, total, measured, "smaller batches would fit")
    return ProductPlan(chosen, None)


def _choose(mode: str, total: int, limit: int) -> ProductMode:
    """The mode; one that keeps graphs is left to the rule where memory has run out before."""
    if mode == "auto" or limit < RETAINED_BYTES:
        return "retained" if total <= limit else "recompute"
    chosen: ProductMode = mode  # type: ignore[assignment]
    return chosen


def _require(
    objective: Objective, chosen: ProductMode, asked: str, total: int, piece: int, smaller: str
) -> None:
    """Refuse what does not fit the free memory."""
    if chosen == "recompute":
        require_bytes(piece, objective.device, what="the graph of one batch", remedy=smaller)
        return
    remedy = f"mode='recompute' needs about {readable_bytes(piece)}"
    what = f"mode {chosen!r}" if asked != "auto" else "the graph of all batches"
    require_bytes(total, objective.device, what=what, remedy=remedy)


def _piece_bytes(objective: Objective, batch: Batch, make_piece: PieceMaker) -> int:
    """Bytes that the graph of ``batch`` holds on to."""
    with exact_products(objective.device, recurrent=objective.recurrent):
        return held_bytes(partial(make_piece, objective, batch))
