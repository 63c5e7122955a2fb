"""An optimizer of the user's own loop: whose rule it steps by, and how its groups differ."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lossray.training.lion import Lion
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings

Group = Mapping[str, Any]  # a parameter group

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
STEPPING = ("step", "_init_group")  # what a subclass must leave alone to step as its parent does


@dataclass(frozen=True)
class Recognised:
    """An optimizer whose state lossray can read.

    Attributes:
        name: of OPTIMIZERS, the one that it is most like.
        settings: its name, and the keys that decide its step, as JSON-compatible values; those in which the
            parameter groups differ are lists with one entry a group, their rates among them.
        exact: whether `optimizer_settings` can say all of it.
    """

    name: str
    settings: dict[str, Any]
    exact: bool


def parent_of(optimizer: torch.optim.Optimizer) -> type | None:
    """The class of `NAMES` by whose rule it steps: its own, or that of which it leaves the step alone."""
    for kind in type(optimizer).__mro__:
        if kind in NAMES:
            same = all(_unwrapped(type(optimizer), name) is _unwrapped(kind, name) for name in STEPPING)
            return kind if same else None
    return None


def state_name(kind: type, group: Group) -> str:
    """The optimizer of OPTIMIZERS whose momentum, preconditioner and threshold a group's state gives."""
    return "amsgrad" if group.get("amsgrad") else NAMES[kind](group)


def recognise(optimizer: torch.optim.Optimizer) -> Recognised | None:
    """What it is called, and what decides its step; None for an optimizer that lossray does not know.

    The rule is compared with that of a twin that lossray builds: AMSGrad is told from Adam, and a momentum
    with dampening from one without.
    """
    kind = parent_of(optimizer)
    if kind is None:
        return None
    groups = [group for group in optimizer.param_groups if group["params"]]
    name = max((NAMES[kind](group) for group in groups), key=list(OPTIMIZERS).index)
    if _is_ours(name, groups):
        ours = OPTIMIZERS[name].settings.model_fields
        values = {key: _json(value) for key, value in _rule(groups[0]).items() if key in ours}
        return Recognised(name, {"name": name, **values}, exact=True)
    return Recognised(name, {"name": name, **_described(kind, groups)}, exact=False)


def rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate of the next step; None where the parameter groups differ."""
    return _common([group_rate(group) for group in optimizer.param_groups])


def base_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate before the schedule, where one of torch's schedulers has noted it; else `rate`."""
    return _common([group_rate(group, "initial_lr") for group in optimizer.param_groups])


def group_rate(group: Group, key: str = "lr") -> float:
    """The learning rate of a group."""
    return float(group.get(key, group["lr"]))


def plain_group(group: Group) -> dict[str, Any]:
    """The keys of a group as plain values: a tensor of one element is its number."""
    return {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}


# ---- names


def _sgd(group: Group) -> str:
    if not group["momentum"]:
        return "sgd"
    return "nesterov" if group["nesterov"] else "momentum"


def _adam(group: Group) -> str:
    if group.get("decoupled_weight_decay"):
        return "adamw"
    return "amsgrad" if group["amsgrad"] else "adam"


def _always(name: str) -> Callable[[Group], str]:
    return lambda group: name


NAMES: dict[type, Callable[[Group], str]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adagrad: _always("adagrad"),
    torch.optim.Adadelta: _always("adadelta"),
    torch.optim.RMSprop: _always("rmsprop"),
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _always("adamw"),
    torch.optim.Adamax: _always("adamax"),
    torch.optim.NAdam: _always("nadam"),
    torch.optim.RAdam: _always("radam"),
    torch.optim.Muon: _always("muon"),
    Lion: _always("lion"),
}


# ---- rules


def _is_ours(name: str, groups: Sequence[Group]) -> bool:
    """Whether all groups have one rate, and the rule of the optimizer that lossray builds under that name."""
    entry = OPTIMIZERS[name]
    if entry.optimizer is None or len({group_rate(group) for group in groups}) != 1:  # muon is two of torch's
        return False
    rules = [_rule(group) for group in groups]
    values = {key: rules[0][key] for key in entry.settings.model_fields if key in rules[0]}
    try:
        settings = optimizer_settings({"name": name, **values})
    except ValidationError:  # a value that ours does not take
        return False
    expected = _rule(entry.build([torch.zeros(1)], settings).param_groups[0])
    return all(expected == {key: rule.get(key) for key in expected} for rule in rules)


def _described(kind: type, groups: Sequence[Group]) -> dict[str, Any]:
    """The keys that ours has, those that stand otherwise than by default, and those that differ."""
    rules = [_rule(group) for group in groups]
    name = NAMES[kind](groups[0])
    defaults = {} if kind is Lion else _rule(kind([torch.zeros(1, 1)]).param_groups[0])
    ours, described = OPTIMIZERS[name].settings.model_fields, {}
    for key in dict.fromkeys(key for rule in rules for key in rule):
        values = [_json(rule.get(key)) for rule in rules]
        alike = all(value == values[0] for value in values)
        if key in ours or not alike or rules[0].get(key) != defaults.get(key):
            described[key] = values[0] if alike else values
    rates = [group_rate(group) for group in groups]
    return described | ({"lr": rates} if len(set(rates)) > 1 else {})


def _rule(group: Group) -> dict[str, Any]:
    """The keys of a parameter group that decide the step, as plain values."""
    return {key: value for key, value in plain_group(group).items() if key not in NOT_THE_RULE}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return float(value) if type(value) is int else value


def _json(value: Any) -> Any:
    """Tuples as lists, and what JSON has no form for by its name."""
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value if isinstance(value, bool | int | float | str) or value is None else repr(value)


def _unwrapped(kind: type, name: str) -> object:
    """A method without what torch wraps around it when an optimizer of the class is made."""
    method: Callable[..., Any] | None = getattr(kind, name, None)
    return method if method is None else inspect.unwrap(method)


def _common(rates: Sequence[float]) -> float | None:
    return rates[0] if rates and len(set(rates)) == 1 else None
