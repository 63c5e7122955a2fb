"""An optimizer of the user's own loop: which of ours it is, and its state as a stack of one would have it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lossray.training.optimizers import OPTIMIZERS, OptimizerSettings, optimizer_settings

# Of a parameter group: what it holds, its rate (see `base_rate`), and keys that change no number.
NOT_THE_RULE = (
    "params",
    "param_names",
    "lr",
    "initial_lr",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)
# Settings that may change on the way without changing what a state means.
ON_A_SCHEDULE = ("lr", "weight_decay", "momentum")
COUNTERS = ("step", "mu_product")  # state that torch keeps once for each parameter


def recognised(optimizer: torch.optim.Optimizer) -> OptimizerSettings | None:
    """The settings, at lossray's default rate, of the optimizer that steps by the same rule; None for others.

    The rule is compared with a twin that lossray builds, so that AMSGrad is told from Adam, and a momentum
    with dampening from one without. All parameter groups must have the same rule.
    """
    rules = [_rule(group) for group in optimizer.param_groups]
    if len({_rate(group, "lr") for group in optimizer.param_groups}) != 1:
        return None
    for name, entry in OPTIMIZERS.items():
        own = {key: rules[0][key] for key in entry.settings.model_fields if key in rules[0]}
        try:
            settings = optimizer_settings({"name": name, **own})
        except ValidationError:  # a value that ours does not take
            continue
        if entry.build is None:  # muon, which is two optimizers of torch's
            continue
        twin = entry.build([torch.zeros(1)], settings)
        if type(twin) is type(optimizer):
            expected = _rule(twin.param_groups[0])
            if all(expected == {key: rule.get(key) for key in expected} for rule in rules):
                return settings
    return None


def same_meaning(one: OptimizerSettings, other: OptimizerSettings) -> bool:
    """Whether a state means the same under both settings: schedules of lr, decay and momentum are free."""

    def meaning(settings: OptimizerSettings) -> dict[str, Any]:
        plain = {key: value for key, value in settings.plain().items() if key not in ON_A_SCHEDULE}
        return plain | ({"betas": plain["betas"][1:]} if "betas" in plain else {})

    return meaning(one) == meaning(other)


def rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate of the next step; None where the parameter groups differ."""
    return _common([_rate(group, "lr") for group in optimizer.param_groups])


def base_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate before the schedule, where one of torch's schedulers has noted it; else `rate`."""
    return _common([_rate(group, "initial_lr") for group in optimizer.param_groups])


def stacked_state(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> dict[str, Tensor]:
    """What `StackOptimizer.state` would give for a pack of one: [1, d] each, or 0-dim counters.

    A parameter that has never had a gradient has zeros, as in a stack. Counters that differ between
    parameters are left out, since a stack has one for all. Empty before the first step.

    Args:
        optimizer: one that is `recognised`; its state is not touched.
        parameters: the trainable parameters of the model, in order.
    """
    states: list[Mapping[str, Any]] = [optimizer.state.get(parameter, {}) for parameter in parameters]
    entries = {key for state in states for key, value in state.items() if isinstance(value, Tensor)}
    stacked = {}
    for key in sorted(entries):
        if key in COUNTERS:
            counts = [state[key].detach() for state in states if key in state]
            if all(bool(count == counts[0]) for count in counts):
                stacked[key] = counts[0].clone()
            continue
        pieces = [
            torch.zeros_like(parameter) if state.get(key) is None else state[key].detach()
            for state, parameter in zip(states, parameters, strict=True)
        ]
        stacked[key] = torch.cat([piece.reshape(-1) for piece in pieces])[None]
    return stacked


def _rule(group: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a parameter group that decide the step, as plain values."""
    return {key: _plain(value) for key, value in group.items() if key not in NOT_THE_RULE}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return float(value) if type(value) is int else value


def _rate(group: Mapping[str, Any], key: str) -> float:
    return float(group.get(key, group["lr"]))


def _common(rates: Sequence[float]) -> float | None:
    return rates[0] if rates and len(set(rates)) == 1 else None
