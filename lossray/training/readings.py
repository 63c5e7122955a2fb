"""What the state of a user's own optimizer says at one checkpoint: momentum, preconditioner, threshold, rate.

Its step reads -lr P^-1 m, as in `update_rules`, whatever its weight decay is. Where parameter groups have
rates of their own, lr is the largest of them, and P is divided by a group's share of it: a group at half the
rate has P twice as large. So P^-1/2 H P^-1/2 times lr is what the optimizer meets, and its largest eigenvalue
is to be compared with the threshold; a multiple of one group's rate alone would not be. What no step moves
(rate 0, or no gradient so far) has an infinite P.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lossray.training.recognise import Group, group_rate, parent_of, plain_group, recognise, state_name
from lossray.training.update_rules import OPTIMIZERS

MOMENTUM, SCALE, THRESHOLD, RATE = "momentum", "scale", "threshold", "rate"  # entries of a recorded state
ENTRIES = (MOMENTUM, SCALE, THRESHOLD, RATE)
ALIKE = 1e-9  # thresholds that differ by no more, relatively, are one


@dataclass(frozen=True)
class Reading:
    """What an optimizer says of itself at one checkpoint.

    Attributes:
        name: of OPTIMIZERS, or of its class where lossray does not know it.
        kind: name of its class.
        settings: see `Recognised`; None where lossray does not know the optimizer.
        exact: whether ``settings`` say all of its rule.
        state: of ENTRIES those that exist, by name.
        notes: what is not known, one line each.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] | None = None
    exact: bool = False
    state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordedOptimizer:
    """The optimizer of a recorded checkpoint: what a `PackedOptimizer` of one member would say.

    Attributes:
        state: of the member, by name of the entry, as in `Reading`.
    """

    state: Mapping[str, Tensor]

    def scale(self) -> Tensor | None:
        """Diagonal [1, d] of the preconditioner P, infinite where nothing moves; None if it is not known."""
        return self.state.get(SCALE)

    def momentum(self) -> Tensor | None:
        """The momentum buffer [1, d], not bias corrected; None where it is not known."""
        return self.state.get(MOMENTUM)

    @property
    def threshold(self) -> float | None:
        """Largest rate times an eigenvalue of P^-1/2 H P^-1/2 at which it is stable."""
        return float(self.state[THRESHOLD]) if THRESHOLD in self.state else None

    @property
    def rate(self) -> float | None:
        """The learning rate to which P belongs: the largest of the groups'."""
        return float(self.state[RATE]) if RATE in self.state else None


@dataclass(frozen=True)
class _Piece:
    """One parameter, and what of the optimizer belongs to it."""

    name: str
    parameter: Parameter
    group: Group
    state: Mapping[str, Any]
    entry: str  # of OPTIMIZERS: whose state this is

    @property
    def steps(self) -> float:
        """Taken with this parameter, where the optimizer counts them."""
        return float(self.state.get("step", 0))

    @property
    def settings(self) -> Any:
        """The keys of the group as attributes."""
        return SimpleNamespace(**plain_group(self.group))


def read_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter], step: int
) -> Reading:
    """Momentum, preconditioner, threshold and rate as they stand; the optimizer is not touched.

    Args:
        optimizer: any of torch's kind.
        parameters: the trainable parameters of the model by name, in order.
        step: optimizer steps taken so far.
    """
    kind, recognised = type(optimizer).__name__, recognise(optimizer)
    if recognised is None:
        return Reading(kind, kind, notes=(_unknown(optimizer),))
    where = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    strangers = [name for name, parameter in parameters.items() if id(parameter) not in where]
    if strangers:
        text = (
            f"no momentum, preconditioner, threshold: {_some(strangers, parameters)} in no group of the "
            "optimizer; requires_grad_(False) leaves out what is not trained"
        )
        return Reading(recognised.name, kind, recognised.settings, recognised.exact, notes=(text,))
    parent = parent_of(optimizer)
    assert parent is not None  # or it would not be known
    pieces = [
        _Piece(name, p, where[id(p)], optimizer.state.get(p, {}), state_name(parent, where[id(p)]))
        for name, p in parameters.items()
    ]
    state, notes = _read(pieces, step)
    return Reading(recognised.name, kind, recognised.settings, recognised.exact, state, notes)


def _read(pieces: Sequence[_Piece], step: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes = [_maximising()] if any(piece.group.get("maximize") for piece in pieces) else []
    state = {RATE: torch.tensor(max(_rates(pieces, "lr")), dtype=torch.float64, device="cpu")}
    for name, value in ((MOMENTUM, _momentum(pieces)), (SCALE, _scale(pieces))):
        if isinstance(value, str):
            notes.append(value)
        elif value is not None:
            state[name] = value
    threshold = _threshold(pieces, step)
    if isinstance(threshold, str):
        notes.append(threshold)
    elif threshold is not None:
        state[THRESHOLD] = torch.tensor(threshold, dtype=torch.float64, device="cpu")
    waiting = [piece.name for piece in pieces if not piece.state]
    if SCALE in state and 0 < len(waiting) < len(pieces) and callable(OPTIMIZERS[pieces[0].entry].scale):
        notes.append(f"{_some(waiting, pieces)} without a step so far, and counted as not moved")
    return state, tuple(notes)


# ---- momentum


def _momentum(pieces: Sequence[_Piece]) -> Tensor | str | None:
    """[1, d] with zeros where no step was taken yet; None before the first and where there is none."""
    with_one = [bool(_buffer_name(piece)) for piece in pieces]
    if not any(with_one):
        return None
    if not all(with_one):
        return "no momentum: some of the parameter groups have none"
    buffers = [_buffer(piece) for piece in pieces]
    if all(buffer is None for buffer in buffers):
        return None
    filled = [
        torch.zeros_like(piece.parameter) if buffer is None else buffer
        for piece, buffer in zip(pieces, buffers, strict=True)
    ]
    return _flat(filled)


def _buffer_name(piece: _Piece) -> str | None:
    if piece.entry == "rmsprop" and piece.group["momentum"]:
        return "momentum_buffer"
    return OPTIMIZERS[piece.entry].momentum


def _buffer(piece: _Piece) -> Tensor | None:
    """The buffer, in units of a gradient: RMSprop's own is preconditioned already."""
    buffer: Tensor | None = piece.state.get(_buffer_name(piece) or "")
    if buffer is None or piece.entry != "rmsprop":
        return buffer
    diagonal = _diagonal(piece)
    return None if diagonal is None else buffer * diagonal.to(buffer)


# ---- preconditioner


def _scale(pieces: Sequence[_Piece]) -> Tensor | str | None:
    """P [1, d] in float32 or more; None before the first step."""
    without = sorted({piece.entry for piece in pieces if OPTIMIZERS[piece.entry].scale is None})
    if without:
        return f"no preconditioner and threshold: {', '.join(without)} has none"
    diagonals = [_diagonal(piece) for piece in pieces]
    if all(diagonal is None for diagonal in diagonals):
        return None
    shared = [
        torch.full_like(piece.parameter, torch.inf, dtype=torch.float64)
        if diagonal is None or share == 0
        else diagonal / share
        for piece, diagonal, share in zip(pieces, diagonals, _shares(pieces), strict=True)
    ]
    flat = _flat(shared).to(torch.promote_types(torch.float32, pieces[0].parameter.dtype))
    if not bool((flat > 0).all()):
        return "no preconditioner: it is zero or not a number somewhere (eps = 0 where no gradient was)"
    return flat


def _diagonal(piece: _Piece) -> Tensor | None:
    """P of one parameter in float64, as if its group had the reference rate; None before its first step."""
    read = OPTIMIZERS[piece.entry].scale
    if read == "identity":
        return torch.ones_like(piece.parameter, dtype=torch.float64)
    if not callable(read) or not piece.steps:
        return None
    state = {key: _exact(value) for key, value in piece.state.items() if isinstance(value, Tensor)}
    if piece.entry == "rmsprop" and piece.group["centered"]:
        state["square_avg"] = (state["square_avg"] - state["grad_avg"].square()).clamp(min=0)
    return read(state, piece.settings)


def _shares(pieces: Sequence[_Piece]) -> list[float]:
    """Each parameter's rate over the largest; while all are zero, before a warm-up, of those it leads to."""
    for key in ("lr", "initial_lr"):
        rates = _rates(pieces, key)
        if max(rates) > 0:
            return [rate / max(rates) for rate in rates]
    return [1.0] * len(pieces)


def _rates(pieces: Sequence[_Piece], key: str) -> list[float]:
    """The rate of the next step for each parameter; Adagrad divides its group's by its own `lr_decay`."""
    return [
        group_rate(piece.group, key) / (1 + piece.steps * float(piece.group.get("lr_decay", 0)))
        for piece in pieces
    ]


# ---- threshold


def _threshold(pieces: Sequence[_Piece], step: int) -> float | str | None:
    """That of all parameters, where they have one."""
    thresholds = {_threshold_of(piece, int(piece.steps) or step) for piece in pieces}
    numbers = {number for number in thresholds if number is not None}
    if not numbers:
        return None
    if len(numbers) < len(thresholds) or max(numbers) > min(numbers) * (1 + ALIKE):
        return "no threshold: the parameter groups differ in momentum, and so in theirs"
    return max(numbers)


def _threshold_of(piece: _Piece, step: int) -> float | None:
    """Where the gradient enters the buffer by 1 - dampening, the buffer is smaller by that factor."""
    entry = OPTIMIZERS[piece.entry]
    if piece.entry == "rmsprop":
        return 2 + 2 * float(piece.group["momentum"])
    if entry.threshold is None:
        return None
    dampening = float(piece.group.get("dampening", 0)) if piece.entry == "momentum" else 0.0
    return entry.threshold(piece.settings, step) / (1 - dampening) if dampening < 1 else None


# ---- words


def _unknown(optimizer: torch.optim.Optimizer) -> str:
    return f"optimizer {type(optimizer).__name__} is not known: no momentum, preconditioner, threshold"


def _maximising() -> str:
    return (
        "its optimizer maximises: momentum and threshold are those of descent on minus the objective, "
        "which the study's loss has to be"
    )


def _some(names: Sequence[str], out_of: Sequence[Any] | Mapping[str, Any]) -> str:
    """How many of the parameters, and one of them by name."""
    verb = "is" if len(names) == 1 else "are"
    return f"{len(names)} of {len(out_of)} trainable parameters (such as {names[0]}) {verb}"


# ---- tensors


def _exact(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """[1, d], on the CPU."""
    return torch.cat([tensor.detach().reshape(-1).cpu() for tensor in tensors])[None]
