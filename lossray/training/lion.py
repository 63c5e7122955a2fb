"""Lion, which torch.optim does not have."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Lion: sign of an interpolated momentum, decoupled weight decay (Chen et al., 2302.06675, alg. 2).

    With momentum m (0 at the start), gradient g and decay w:
    theta <- (1 - lr w) theta - lr sign(beta1 m + (1 - beta1) g), then m <- beta2 m + (1 - beta2) g.
    It acts on each element alone, so stacked members do not touch each other.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients in `.grad`; no closure is supported."""
        if closure is not None:
            raise ValueError("closure: Lion evaluates no closure; set .grad and call step()")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, self.state[parameter], group)

    @staticmethod
    def _step_one(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        direction = torch.lerp(parameter.grad, state["exp_avg"], beta1).sign_()  # type: ignore[arg-type]
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        state["exp_avg"].lerp_(parameter.grad, 1 - beta2)  # type: ignore[arg-type]
