"""The directions at one checkpoint, and the step that a pack takes next."""

from dataclasses import dataclass

from torch import Tensor

from lossray.measures.pack_point import PackPoint
from lossray.training.loop import step_gradient
from lossray.training.optimizers import PackedOptimizer
from lossray.training.replay import ReplayedStep
from lossray.training.schedules import learning_rate
from lossray.training.shadow import load_shadow_states, make_shadows
from lossray.training.update_rules import OPTIMIZERS

SHADOW = "shadow:"  # before the optimizer's name


@dataclass(frozen=True)
class NextStep:
    """What a pack does next.

    Attributes:
        lr: learning rate, after the schedule.
        gradient: [R, d] of the next minibatches, in train mode.
        update: [R, d], weight decay included.
        shadows: by optimizer: the update [R, d] that it would make.
    """

    lr: float
    gradient: Tensor
    update: Tensor
    shadows: dict[str, Tensor]


def next_step(point: PackPoint) -> NextStep | None:
    """The step after the checkpoint, not taken; None for a recorded run, whose next batch is not known."""
    pack, study = point.pack, point.study
    if (
        pack.recorded is not None
        or pack.optimizer is None
        or not isinstance(point.optimizer, PackedOptimizer)
    ):
        return None
    args = (point.stack, point.theta, point.buffers, point.loss, point.dataset)
    _, gradient = step_gradient(*args, study.training, pack.seeds, point.step)
    lr = learning_rate(pack.optimizer, point.step, study.training.steps)
    shadows = make_shadows(study.angles.shadow, point.theta, point.stack.layout)
    load_shadow_states(shadows, point.checkpoint.shadow)
    return NextStep(
        lr,
        gradient,
        point.optimizer.virtual_update(gradient, lr),
        {shadow.name: shadow.virtual_update(point.theta, gradient) for shadow in shadows},
    )


def directions_at(point: PackPoint, gradient: Tensor, following: NextStep | None) -> dict[str, Tensor]:
    """Vectors [R, d] by name; those that do not exist (momentum at step 0) are missing.

    Args:
        point: the pack at it.
        gradient: of the analysis set [R, d].
        following: the next step, where it is known.
    """
    vectors: dict[str, Tensor | None] = {"gradient": gradient}
    if following is not None:
        vectors |= {"minibatch_gradient": following.gradient, "update": following.update}
        vectors |= {SHADOW + name: update for name, update in following.shadows.items()}
    if point.optimizer is not None:
        vectors["momentum"] = point.optimizer.momentum()
        scale = point.optimizer.scale() if _is_preconditioned(point) else None
        if following is not None and scale is not None:
            vectors["preconditioned_gradient"] = following.gradient / scale
    asked = {
        *point.study.angles.directions,
        *(SHADOW + name for name in point.study.angles.shadow),
    }
    alive = point.alive[:, None]
    return {
        name: vector.double().masked_fill(~alive, float("nan"))
        for name, vector in vectors.items()
        if vector is not None and name in asked
    }


def directions_of(point: PackPoint, step: ReplayedStep) -> dict[str, Tensor]:
    """The directions [R, d] of one step of a window by name, whichever [angles] asks for; NaN once dead."""
    vectors: dict[str, Tensor | None] = {
        "minibatch_gradient": step.gradient,
        "momentum": step.momentum,
        "update": step.update,
        **{SHADOW + name: update for name, update in step.shadows.items()},
    }
    if step.scale is not None and _is_preconditioned(point):
        vectors["preconditioned_gradient"] = step.gradient / step.scale
    alive = step.alive[:, None]
    return {
        name: vector.double().masked_fill(~alive, float("nan"))
        for name, vector in vectors.items()
        if vector is not None
    }


def _is_preconditioned(point: PackPoint) -> bool:
    """Whether P^-1 g is another direction than g."""
    optimizer = point.pack.optimizer
    return optimizer is not None and callable(OPTIMIZERS[optimizer.name].scale)
