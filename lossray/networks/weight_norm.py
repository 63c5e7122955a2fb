"""Weight normalisation that can be differentiated twice: torch's own kernel has a wrong second derivative.

With torch 2.13 the Hessian of a model with weight norm is not even symmetric; `gradgradcheck` refutes it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The weights g v / |v|, of elementary operations that are differentiated rightly however often.

    Args:
        v: directions, of any shape.
        g: magnitudes: of each slice along ``dim``, or a scalar.
        dim: whose slices have a norm each; -1 for one norm of all, as torch has it.
    """
    others = [axis for axis in range(v.ndim) if dim == -1 or axis != dim]
    weights: Tensor = v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))
    return weights


class ElementaryWeightNorm(TorchFunctionMode):
    """Within it `weight_norm` takes the place of torch's."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        function = weight_norm if func is torch._weight_norm else func
        return function(*args, **(kwargs or {}))


def twice_differentiable(model: nn.Module) -> Callable[[], AbstractContextManager[object]]:
    """What to evaluate the model in, if its second derivatives are to be right; made anew for each call."""
    parts = [
        part for module in model.modules() for part in (module, *module._forward_pre_hooks.values())
    ]  # the older of torch's two implementations is a hook
    normed = any(type(part).__name__ in ("_WeightNorm", "WeightNorm") for part in parts)
    return ElementaryWeightNorm if normed else nullcontext
