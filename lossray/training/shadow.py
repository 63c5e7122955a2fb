"""Shadow optimizers: what other optimizers would do, fed the gradients of a run since its first step.

They tell the optimizer's own step from the places that it visits (theory 5A, the 2 x 2 attribution).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lossray.networks.layout import Layout
from lossray.training.optimizers import PackedOptimizer
from lossray.training.update_rules import optimizer_settings


class Shadow:
    """One optimizer, with its default settings, that never moves the parameters.

    Its state advances with the gradients of the run; the parameters are the run's own at every step, so that
    decoupled weight decay acts on what is there.

    Args:
        name: of the optimizer.
        theta: parameters [R, d]; only shape, dtype and device count.
        layout: how d divides into parameters.
    """

    def __init__(self, name: str, theta: Tensor, layout: Layout) -> None:
        self.name = name
        self._theta = theta.detach().clone()
        self._optimizer = PackedOptimizer(optimizer_settings({"name": name}), self._theta, layout)

    @torch.no_grad()
    def step(self, theta: Tensor, gradient: Tensor, *, alive: Tensor | None = None) -> Tensor:
        """Take a gradient in.

        Args:
            theta: the run's parameters [R, d], before its own step.
            gradient: the run's, [R, d].
            alive: [R] bool; the others' state stays as it is.

        Returns:
            The update [R, d] that this optimizer would make.
        """
        self._theta.copy_(theta)
        self._optimizer.step(gradient, self._lr, alive=alive)
        return self._theta - theta

    def virtual_update(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """The update [R, d] that `step` would return, without taking the gradient in."""
        self._theta.copy_(theta)
        return self._optimizer.virtual_update(gradient, self._lr)

    def state(self) -> dict[str, Tensor]:
        """A copy of the state by name."""
        return self._optimizer.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take on a copy of what `state` gave, on any device."""
        self._optimizer.load_state(state)

    @property
    def _lr(self) -> float:
        return self._optimizer.settings.lr


def make_shadows(names: Sequence[str], theta: Tensor, layout: Layout) -> list[Shadow]:
    """One shadow for each name."""
    return [Shadow(name, theta, layout) for name in names]


def shadow_states(shadows: Sequence[Shadow]) -> dict[str, Tensor]:
    """The state of all, as a checkpoint holds it: by "<optimizer>/<entry>"."""
    return {f"{shadow.name}/{name}": value for shadow in shadows for name, value in shadow.state().items()}


def load_shadow_states(shadows: Sequence[Shadow], states: Mapping[str, Tensor]) -> None:
    """Inverse of `shadow_states`."""
    for shadow in shadows:
        prefix = f"{shadow.name}/"
        state = {
            name.removeprefix(prefix): value for name, value in states.items() if name.startswith(prefix)
        }
        shadow.load_state(state)
