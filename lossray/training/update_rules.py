"""The optimizers by name: the keys of each, how to build it, and what its state says about its step.

A new optimizer is one settings class and one entry of OPTIMIZERS; nothing here loads torch. Defaults other
than `lr` are those of torch.optim, except that weight decay is 0 for all but adamw.

`scale` is the diagonal P with which an update reads -lr P^-1 m, where P is held fixed and m is the (bias
corrected) momentum, or the gradient where there is none (theory 2.10). Each formula follows the source of
torch.optim; which of them are bias corrected, and where eps stands, differs between optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from lossray.names import unknown_name
from lossray.references import resolve
from lossray.training.schedules import NonNegativeFloat, PositiveFloat, ScheduleSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]  # not strict: TOML has lists, not tuples
State: TypeAlias = "Mapping[str, Tensor]"


# ---- settings


class OptimizerSettings(ScheduleSettings):
    """What every optimizer takes.

    Attributes:
        name: which optimizer.
        weight_decay: times the parameters is added to the gradient (L2), unless the optimizer says otherwise.
    """

    name: str
    weight_decay: NonNegativeFloat = 0.0


class SGDSettings(OptimizerSettings):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1


class MomentumSettings(OptimizerSettings):
    """Heavy-ball momentum, as torch.optim.SGD has it: buffer <- momentum buffer + g; step -lr buffer.

    Attributes:
        momentum: share of the buffer that stays.
    """

    name: Literal["momentum"] = "momentum"
    lr: PositiveFloat = 0.05
    momentum: Beta = 0.9


class NesterovSettings(OptimizerSettings):
    """Nesterov momentum, as torch.optim.SGD has it: step -lr (g + momentum buffer).

    Attributes:
        momentum: share of the buffer that stays.
    """

    name: Literal["nesterov"] = "nesterov"
    lr: PositiveFloat = 0.05
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9  # torch refuses Nesterov without momentum


class AdagradSettings(OptimizerSettings):
    """Adagrad.

    Attributes:
        eps: added to the root of the sum of squared gradients.
    """

    name: Literal["adagrad"] = "adagrad"
    lr: PositiveFloat = 1e-2
    eps: PositiveFloat = 1e-10


class AdadeltaSettings(OptimizerSettings):
    """Adadelta; its step is in the units of the parameters, so lr is near 1.

    Attributes:
        rho: decay of the averages of squared gradients and squared steps.
        eps: added to both averages.
    """

    name: Literal["adadelta"] = "adadelta"
    lr: PositiveFloat = 1.0
    rho: Beta = 0.9
    eps: PositiveFloat = 1e-6


class RMSpropSettings(OptimizerSettings):
    """RMSprop, neither centred nor with momentum.

    Attributes:
        alpha: decay of the average of squared gradients.
        eps: added to its root.
    """

    name: Literal["rmsprop"] = "rmsprop"
    lr: PositiveFloat = 1e-3
    alpha: Beta = 0.99
    eps: PositiveFloat = 1e-8


class AdamFamilySettings(OptimizerSettings):
    """The keys that the Adam family shares.

    Attributes:
        betas: decays of the averages of gradients and of squared gradients.
        eps: added to the root of the second average.
    """

    lr: PositiveFloat = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class AdamSettings(AdamFamilySettings):
    """Adam."""

    name: Literal["adam"] = "adam"


class AMSGradSettings(AdamFamilySettings):
    """Adam with the running maximum of its second moment."""

    name: Literal["amsgrad"] = "amsgrad"


class AdamWSettings(AdamFamilySettings):
    """Adam with decoupled weight decay: theta <- (1 - lr weight_decay) theta before the step.

    Attributes:
        weight_decay: decoupled: no part of the gradient.
    """

    name: Literal["adamw"] = "adamw"
    weight_decay: NonNegativeFloat = 0.01


class AdamaxSettings(AdamFamilySettings):
    """Adam with the infinity norm.

    Attributes:
        betas: decays of the average of gradients and of the largest gradient.
        eps: added to the gradient's size before the largest is taken.
    """

    name: Literal["adamax"] = "adamax"
    lr: PositiveFloat = 2e-3


class NAdamSettings(AdamFamilySettings):
    """Adam with Nesterov momentum.

    Attributes:
        momentum_decay: how fast the momentum rises to betas[0].
    """

    name: Literal["nadam"] = "nadam"
    lr: PositiveFloat = 2e-3
    momentum_decay: NonNegativeFloat = 4e-3


class RAdamSettings(AdamFamilySettings):
    """Rectified Adam."""

    name: Literal["radam"] = "radam"


class MuonSettings(OptimizerSettings):
    """Muon for hidden matrices and convolution kernels, AdamW for the rest; decoupled weight decay in both.

    The rate of Muon's part is scaled to AdamW's root-mean-square step (torch's "match_rms_adamw"), so that
    one `lr` serves both parts.

    Attributes:
        weight_decay: decoupled: no part of the gradient.
        momentum: of Muon's part.
        betas: of the AdamW part.
        eps: of the AdamW part.
    """

    name: Literal["muon"] = "muon"
    lr: PositiveFloat = 1e-3
    momentum: Beta = 0.95
    betas: Betas = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class LionSettings(OptimizerSettings):
    """Lion, which steps by the sign of an interpolated momentum.

    Attributes:
        weight_decay: decoupled: no part of the gradient.
        betas: shares of the momentum in the step, and of what stays of it.
    """

    name: Literal["lion"] = "lion"
    lr: PositiveFloat = 3e-4
    betas: Betas = (0.9, 0.99)


# ---- preconditioners read from the state of torch.optim, after at least one step


def _root(moment: str) -> Callable[[State, Any], Tensor]:
    """Of sqrt(moment) + eps, without bias correction: RMSprop and Adagrad."""
    return lambda state, settings: state[moment].sqrt() + settings.eps


def _corrected_root(moment: str) -> Callable[[State, Any], Tensor]:
    """Of sqrt(moment / (1 - beta2^t)) + eps: Adam, AdamW, NAdam; AMSGrad with the maximum of raw moments."""

    def scale(state: State, settings: Any) -> Tensor:
        correction = 1 - settings.betas[1] ** float(state["step"])
        root: Tensor = (state[moment] / correction).sqrt() + settings.eps
        return root

    return scale


def _adadelta_scale(state: State, settings: AdadeltaSettings) -> Tensor:
    return ((state["square_avg"] + settings.eps) / (state["acc_delta"] + settings.eps)).sqrt()


def _adamax_scale(state: State, settings: AdamaxSettings) -> Tensor:
    return state["exp_inf"].clone()  # eps is already inside it


def _radam_scale(state: State, settings: RAdamSettings) -> Tensor:
    """Of (sqrt(v) + eps) / (rectification sqrt(1 - beta2^t)); the identity while rho_t <= 5 (1908.03265)."""
    beta2, step = settings.betas[1], float(state["step"])
    correction = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction  # rho_t, of the approximated moving average
    if length <= 5:
        return state["exp_avg_sq"].new_ones(state["exp_avg_sq"].shape)
    rectification = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    scale: Tensor = (state["exp_avg_sq"].sqrt() + settings.eps) / (correction * rectification) ** 0.5
    return scale


# ---- stability thresholds, each the root at -1 of the characteristic polynomial (theory 2.10)


def _of_descent(settings: OptimizerSettings, step: int) -> float:
    """Where x <- x - lr P^-1 g."""
    return 2.0


def _of_heavy_ball(settings: MomentumSettings, step: int) -> float:
    """Where b <- beta b + g; x <- x - lr b."""
    return 2 + 2 * settings.momentum


def _of_nesterov(settings: NesterovSettings, step: int) -> float:
    """Where b <- beta b + g; x <- x - lr (g + beta b)."""
    beta = settings.momentum
    return (2 + 2 * beta) / (1 + 2 * beta)


def _of_moving_average(settings: AdamFamilySettings, step: int) -> float:
    """Where m <- beta m + (1 - beta) g; x <- x - lr P^-1 m: Adam and its kin."""
    beta = settings.betas[0]
    return (2 + 2 * beta) / (1 - beta)


def _of_nadam(settings: NAdamSettings, step: int) -> float:
    """Where m <- beta m + (1 - beta) g; x <- x - lr P^-1 (mu m + (1 - mu) g).

    The schedule of mu = beta (1 - 0.96^(step momentum_decay) / 2) is slow: at the default settings mu is
    0.52 after 1000 steps and 0.81 after 10000. At its limit, beta, this is
    (2 + 2 beta) / ((1 - beta) (1 + 2 beta)); without momentum_decay it stays at beta / 2.
    """
    beta = settings.betas[0]
    decayed: float = 0.96 ** ((step + 1) * settings.momentum_decay)
    mu = beta * (1 - decayed / 2)
    return (2 + 2 * beta) / (1 + beta - 2 * mu * beta)


# ---- the registry


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer.

    Attributes:
        settings: its keys.
        optimizer: "module:class" of the torch optimizer, imported when one is built; None for muon, which is
            made of two.
        keys: the settings that the class takes, beside `lr` and `weight_decay`.
        fixed: what else it is given.
        adaptive: whether its step is scaled per parameter by statistics of past gradients. Not so for lion
            (all steps have one size) and muon (it scales singular directions, not parameters).
        elementwise: whether it acts on each number alone, so that stacked members step as one tensor.
        scale: reads the diagonal of P from its state; "identity" where there is no preconditioner by
            definition; None where the step is not of that form.
        momentum: the state entry that holds its momentum, or None.
        threshold: largest lr times an eigenvalue of P^-1/2 H P^-1/2 at which it is stable on a quadratic, P
            held fixed, bias corrections over and no decay (theory 2.10), by its settings and the steps
            taken, which count for nadam only; None where there is no P.
    """

    settings: type[OptimizerSettings]
    optimizer: str | None
    keys: tuple[str, ...]
    fixed: Mapping[str, Any]
    adaptive: bool
    elementwise: bool
    scale: Callable[[State, Any], Tensor] | Literal["identity"] | None
    momentum: str | None
    threshold: Callable[[Any, int], float] | None

    def build(self, leaves: list[Tensor], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """The torch optimizer of a list of leaves."""
        from lossray.training.eager_optimizers import build_eagerly  # here: it loads torch

        assert self.optimizer is not None
        chosen = {key: getattr(settings, key) for key in ("lr", "weight_decay", *self.keys)}
        return build_eagerly(resolve(self.optimizer), leaves, **chosen, **self.fixed)


def _plain(
    settings: type[OptimizerSettings], *keys: str, threshold: Callable[[Any, int], float], **fixed: Any
) -> OptimizerEntry:
    """SGD with or without momentum."""
    return OptimizerEntry(
        settings=settings,
        optimizer="torch.optim:SGD",
        keys=keys,
        fixed={"foreach": False, **fixed},
        adaptive=False,
        elementwise=True,
        scale="identity",
        momentum="momentum_buffer" if keys else None,
        threshold=threshold,
    )


def _adaptive(
    settings: type[OptimizerSettings],
    optimizer: str,
    *keys: str,
    scale: Callable[[State, Any], Tensor],
    momentum: str | None = "exp_avg",
    threshold: Callable[[Any, int], float] = _of_moving_average,
    **fixed: Any,
) -> OptimizerEntry:
    """An optimizer with a diagonal preconditioner.

    foreach=False: one tensor needs no fused lists, and the arithmetic is then the same on every device.
    """
    return OptimizerEntry(
        settings=settings,
        optimizer=optimizer,
        keys=keys,
        fixed={"foreach": False, **fixed},
        adaptive=True,
        elementwise=True,
        scale=scale,
        momentum=momentum,
        threshold=threshold,
    )


_ADAM = ("betas", "eps")
_SECOND_MOMENT = _corrected_root("exp_avg_sq")

OPTIMIZERS: dict[str, OptimizerEntry] = {
    "sgd": _plain(SGDSettings, threshold=_of_descent),
    "momentum": _plain(MomentumSettings, "momentum", threshold=_of_heavy_ball),
    "nesterov": _plain(NesterovSettings, "momentum", threshold=_of_nesterov, nesterov=True),
    "adagrad": _adaptive(
        AdagradSettings,
        "torch.optim:Adagrad",
        "eps",
        scale=_root("sum"),
        momentum=None,
        threshold=_of_descent,
    ),
    "adadelta": _adaptive(
        AdadeltaSettings,
        "torch.optim:Adadelta",
        "rho",
        "eps",
        scale=_adadelta_scale,
        momentum=None,
        threshold=_of_descent,
    ),
    "rmsprop": _adaptive(
        RMSpropSettings,
        "torch.optim:RMSprop",
        "alpha",
        "eps",
        scale=_root("square_avg"),
        momentum=None,
        threshold=_of_descent,
    ),
    "adam": _adaptive(AdamSettings, "torch.optim:Adam", *_ADAM, scale=_SECOND_MOMENT),
    "amsgrad": _adaptive(
        AMSGradSettings, "torch.optim:Adam", *_ADAM, scale=_corrected_root("max_exp_avg_sq"), amsgrad=True
    ),
    "adamw": _adaptive(AdamWSettings, "torch.optim:AdamW", *_ADAM, scale=_SECOND_MOMENT),
    "adamax": _adaptive(AdamaxSettings, "torch.optim:Adamax", *_ADAM, scale=_adamax_scale),
    "nadam": _adaptive(
        NAdamSettings,
        "torch.optim:NAdam",
        *_ADAM,
        "momentum_decay",
        scale=_SECOND_MOMENT,
        threshold=_of_nadam,
    ),
    "radam": _adaptive(RAdamSettings, "torch.optim:RAdam", *_ADAM, scale=_radam_scale),
    "muon": OptimizerEntry(
        settings=MuonSettings,
        optimizer=None,
        keys=(),
        fixed={},
        adaptive=False,
        elementwise=False,
        scale=None,
        momentum="momentum_buffer",
        threshold=None,
    ),
    "lion": OptimizerEntry(
        settings=LionSettings,
        optimizer="lossray.training.lion:Lion",
        keys=("betas",),
        fixed={},
        adaptive=False,
        elementwise=True,
        scale=None,
        momentum="exp_avg",
        threshold=None,
    ),
}


def optimizer_settings(table: Mapping[str, object]) -> OptimizerSettings:
    """The settings in one concrete table, such as {"name": "adam", "lr": 1e-3}; no lists (see `expand_grid`).

    Raises:
        pydantic.ValidationError: an unknown name or key (the nearest is named), a wrong type, an impossible
            value. `loc` is relative to the table.
    """
    name = table.get("name")
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise _refusal("name", name, unknown_name(str(name), OPTIMIZERS))
    schema = OPTIMIZERS[name].settings
    for key, value in table.items():
        if key not in schema.model_fields:
            raise _refusal(key, value, unknown_name(key, schema.model_fields))
    return schema.model_validate(dict(table))


def _refusal(key: str, value: object, message: str) -> ValidationError:
    error = InitErrorDetails(type=PydanticCustomError("unknown_name", message), loc=(key,), input=value)
    return ValidationError.from_exception_data("optimizer", [error])
