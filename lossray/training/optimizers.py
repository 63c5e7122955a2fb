"""Optimizers on a stack: step R members stored as one tensor [R, d]."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossray.networks.layout import Layout
from lossray.training.eager_optimizers import build_eagerly, step_eagerly
from lossray.training.update_rules import OPTIMIZERS, MuonSettings, OptimizerEntry, OptimizerSettings


@dataclass(frozen=True)
class _Part:
    """One torch optimizer on some views of theta, and how to name its state.

    `views` cuts any [R, d] tensor (theta, a gradient) into the leaves' shapes, in the leaves' order.
    `stacked` holds state that lives in per-member views of one tensor [R, ...], by full name.
    """

    optimizer: torch.optim.Optimizer
    leaves: list[Tensor]
    views: Callable[[Tensor], list[Tensor]]
    prefixes: list[str]  # of each leaf's state entries; empty where `stacked` holds them
    stacked: dict[str, Tensor]

    def state(self) -> dict[str, Tensor]:
        """Live state by name: [R, ...], or 0-dim where the members share it."""
        named = dict(self.stacked)
        for leaf, prefix in zip(self.leaves, self.prefixes, strict=False):
            named |= {prefix + key: value for key, value in self.optimizer.state[leaf].items()}
        return named

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.stacked.items():
            tensor.copy_(state[name])
        for leaf, prefix in zip(self.leaves, self.prefixes, strict=False):
            entries = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
            # 0-dim counters belong on the CPU, where torch.optim keeps and reads them.
            self.optimizer.state[leaf] = {
                key: value.detach().to(leaf.device if value.ndim else "cpu", copy=True)
                for key, value in entries.items()
            }


class PackedOptimizer:
    """One optimizer setting on all members of a pack.

    Element-wise optimizers step on the flat tensor as a whole; muon on per-member matrices (see
    `_muon_parts`). Members never influence each other.

    Args:
        settings: of one optimizer.
        theta: parameters [R, d], stepped in place.
        layout: how the last axis of `theta` divides into parameters.
    """

    def __init__(self, settings: OptimizerSettings, theta: Tensor, layout: Layout) -> None:
        self.settings = settings
        self.entry = OPTIMIZERS[settings.name]
        self.theta = theta.detach()  # shares the storage: a leaf that torch.optim accepts
        self.layout = layout
        if isinstance(settings, MuonSettings):
            self._parts = _muon_parts(settings, self.theta, layout)
        else:
            self._parts = [_whole(self.entry, settings, self.theta)]

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float, *, alive: Tensor | None = None) -> None:
        """Update theta in place.

        Args:
            gradient: [R, d] at theta.
            lr: learning rate of this step.
            alive: [R] bool; the parameters and state of the other members are left as they are, and their
                gradient is not read. None: all are alive.
        """
        if alive is None:
            self._step(gradient, lr)
            return
        dead = ~alive
        kept_theta = self.theta[dead]
        kept_state = {name: value[dead] for name, value in self._live_state().items() if value.ndim > 0}
        self._step(torch.where(alive[:, None], gradient, 0.0), lr)
        self.theta[dead] = kept_theta
        for name, value in self._live_state().items():
            if value.ndim > 0:
                value[dead] = kept_state.get(name, 0.0)  # 0 where this step has made the state

    def _step(self, gradient: Tensor, lr: float) -> None:
        for part in self._parts:
            for leaf, piece in zip(part.leaves, part.views(gradient.detach()), strict=True):
                leaf.grad = piece
            for group in part.optimizer.param_groups:
                group["lr"] = lr
            step_eagerly(part.optimizer)
            for leaf in part.leaves:
                leaf.grad = None

    def virtual_update(self, gradient: Tensor, lr: float) -> Tensor:
        """The change [R, d] that `step` would make, weight decay included; theta and state stay untouched."""
        trial = PackedOptimizer(self.settings, self.theta.clone(), self.layout)
        trial.load_state(self._live_state())
        trial.step(gradient, lr)
        return trial.theta - self.theta

    def scale(self) -> Tensor | None:
        """Diagonal [R, d] of the preconditioner P (see `update_rules`).

        The identity for sgd, momentum and nesterov (also before the first step); None for lion and muon,
        and for the others before the first step.
        """
        read = self.entry.scale
        if read == "identity":
            return torch.ones_like(self.theta)
        state = self._live_state()
        if read is None or _steps_taken(state) == 0:
            return None
        return read(state, self.settings)

    def momentum(self) -> Tensor | None:
        """The momentum buffer [R, d], not bias corrected; None where there is none or no step was taken yet.

        For muon: Muon's buffer for its matrices, AdamW's first moment for the other parameters (both are
        moving averages of the gradient).
        """
        state = self._live_state()
        if isinstance(self.settings, MuonSettings):
            return _muon_momentum(state, self.layout)
        buffer = state.get(self.entry.momentum) if self.entry.momentum else None
        return None if buffer is None else buffer.clone()

    def state(self) -> dict[str, Tensor]:
        """A copy of the state by name: [R, ...] each, or 0-dim where the members share it (step counters)."""
        return {name: value.detach().clone() for name, value in self._live_state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take on a copy of what `state` gave, on any device."""
        for part in self._parts:
            part.load(state)

    def _live_state(self) -> dict[str, Tensor]:
        return {name: value for part in self._parts for name, value in part.state().items()}


def _steps_taken(state: Mapping[str, Tensor]) -> float:
    return float(state["step"]) if "step" in state else 0.0


def _whole(entry: OptimizerEntry, settings: Any, theta: Tensor) -> _Part:
    """An element-wise optimizer: one leaf, the whole of theta."""
    return _Part(entry.build([theta], settings), [theta], lambda flat: [flat], [""], {})


# ---- muon


def muon_names(layout: Layout) -> tuple[str, ...]:
    """The parameters that Muon updates: hidden matrices and convolution kernels.

    These are all of role "matrix" or "kernel" but the output layer, which is the last matrix in layout order
    (the last kernel of a model without matrices). Biases, norms, embeddings and the output layer are left
    to AdamW, as Muon's author advises (kellerjordan.github.io/posts/muon).
    """
    roles = dict(zip(layout.names, layout.roles, strict=True))
    matrices = [name for name, role in roles.items() if role == "matrix"]
    kernels = [name for name, role in roles.items() if role == "kernel"]
    output = (matrices or kernels)[-1:]
    return tuple(name for name, role in roles.items() if role in ("matrix", "kernel") and name not in output)


def _muon_parts(settings: MuonSettings, theta: Tensor, layout: Layout) -> list[_Part]:
    """Muon on each member's hidden matrices and kernels ([out, in * height * width]), AdamW on the rest.

    torch's Muon orthogonalises in bfloat16 whatever the dtype of the parameters is: its steps carry about
    three significant digits, in float64 too.
    """
    hidden = muon_names(layout)
    rest = tuple(name for name in layout.names if name not in hidden)

    def matrices(flat: Tensor) -> list[Tensor]:
        pieces = layout.split(flat)
        return [member.flatten(1) for name in hidden for member in pieces[name]]

    def others(flat: Tensor) -> list[Tensor]:
        pieces = dict(zip(layout.names, torch.split(flat, list(layout.sizes), dim=-1), strict=True))
        return [pieces[name] for name in rest]

    leaves = others(theta)
    adamw = build_eagerly(
        torch.optim.AdamW,
        leaves,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
    )
    parts = [_Part(adamw, leaves, others, [f"adamw/{name}/" for name in rest], {})]
    if hidden:
        parts.append(_muon_part(settings, matrices, theta, hidden))
    return parts


def _muon_part(
    settings: MuonSettings, matrices: Callable[[Tensor], list[Tensor]], theta: Tensor, hidden: tuple[str, ...]
) -> _Part:
    leaves = matrices(theta)
    muon = build_eagerly(
        torch.optim.Muon,
        leaves,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    members = len(theta)
    stacked = {}
    for i, name in enumerate(hidden):
        member_leaves = leaves[i * members : (i + 1) * members]
        # What Muon would make at its first step, but as views of one tensor.
        buffer = torch.zeros(members, *member_leaves[0].shape, dtype=theta.dtype, device=theta.device)
        for leaf, view in zip(member_leaves, buffer, strict=True):
            muon.state[leaf]["momentum_buffer"] = view
        stacked[f"muon/{name}/momentum_buffer"] = buffer
    return _Part(muon, leaves, matrices, [], stacked)


def _muon_momentum(state: Mapping[str, Tensor], layout: Layout) -> Tensor | None:
    hidden = muon_names(layout)
    keys = [f"muon/{n}/momentum_buffer" if n in hidden else f"adamw/{n}/exp_avg" for n in layout.names]
    if any(key not in state for key in keys):  # AdamW has no moments before the first step
        return None
    return torch.cat([state[key].flatten(1) for key in keys], dim=1)
