"""How to write a loss that is no mean over examples, so that it can be used: the end of a message."""

import torch
from torch import nn

from lossray.operators.objectives import Objective, leaves_of

ONE_BATCH = "return the mean over the examples (reduction='mean'), or pass all of them as one batch"
DIVIDED = "where it divides by class weights or by a count (weight=, ignore_index=)"
CLOSURE = "closure=lambda model, batch: (loss(model(batch[0]), batch[1]), {divisor})"
# What has no closure: training, and paths.
PLAIN = (
    "return the mean over the examples; class weights w, divided by their mean over the training examples, "
    "enter as (w[targets] * cross_entropy(outputs, targets, reduction='none')).mean(), which is the same "
    "loss; ignored targets enter as ones of weight 0"
)


def remedy(objective: Objective, *, closure: bool) -> str:
    """What to do, by what is known of the loss.

    Args:
        objective: whose loss is no mean over examples.
        closure: whether one can be passed where the objective is used.
    """
    if not closure:
        return PLAIN
    loss = getattr(objective, "loss", None)
    if getattr(loss, "reduction", "mean") == "sum":
        return ONE_BATCH
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return f"{DIVIDED}, pass {CLOSURE.format(divisor='divisor of the batch')}; otherwise {ONE_BATCH}"
    ignored = _ignores(objective, loss.ignore_index)
    if loss.weight is None:
        count = f"(batch[1] != {loss.ignore_index}).sum()"
        return f"it divides by the number of counted targets: pass {CLOSURE.format(divisor=count)}"
    if ignored:
        sums = f"loss.weight[batch[1][batch[1] != {loss.ignore_index}]].sum()"
        return f"it divides by the weights of the counted targets: pass {CLOSURE.format(divisor=sums)}"
    closure_text = CLOSURE.format(divisor="loss.weight[batch[1]].sum()")
    return (
        f"it divides by the weights of the classes: pass {closure_text}, or data (inputs, targets, weights) "
        "with each example's weight, and a loss without weights"
    )


def whole(*, closure: bool) -> str:
    """What to do where model or loss take batches of one size alone."""
    text = CLOSURE.format(divisor="len(batch[1])")
    return f"; if they take batches of one size alone, pass {text}" if closure else ""


def _ignores(objective: Objective, index: int) -> bool:
    """Whether any target is the ignored one."""
    return any(
        bool((leaf == index).any())
        for batch in objective.batches()
        for leaf in leaves_of(batch.targets)
        if not torch.is_floating_point(leaf)
    )
