"""The losses by name: functions of outputs and targets that return the mean over examples."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lossray.errors import ModelError
from lossray.names import unknown_name
from lossray.networks.settings import LOSSES
from lossray.plugins import is_spec, load
from lossray.references import resolve
from lossray.seeds import generator

Loss = Callable[[Tensor, Tensor], Tensor]
Value = TypeVar("Value")


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross entropy in nats, mean over examples.

    Args:
        outputs: logits [B, C].
        targets: classes [B], int64.

    Raises:
        ModelError: the targets are not classes, or the shapes are others.
    """
    if targets.is_floating_point():  # torch would take them for class probabilities
        raise ModelError(f"loss 'cross_entropy' needs classes (int64), found {targets.dtype}; use 'mse'")
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
        raise ModelError(
            f"loss 'cross_entropy': found outputs {list(outputs.shape)} and targets {list(targets.shape)}; "
            "allowed: logits [B, C] and classes [B], or a function of your own as loss"
        )
    if outputs.shape[1] < 2:
        raise ModelError(f"loss 'cross_entropy': {one_logit(outputs)}")
    return F.cross_entropy(outputs, targets)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error summed over outputs, mean over examples (theory 2.8).

    `torch.nn.MSELoss` is `mse_mean`.

    Args:
        outputs: [B, ...]; [B, C] with classes as targets.
        targets: floats of the outputs' shape, where [B] and [B, 1] are the same; or classes [B] (integers),
            which become one-hot vectors.

    Raises:
        ModelError: targets of another shape than the outputs (broadcasting would hide it).
    """
    shapes = f"outputs {list(outputs.shape)} and targets {list(targets.shape)}"
    if not targets.is_floating_point():
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or outputs.shape[1] < 2:
            raise ModelError(
                f"loss 'mse': found {shapes} of {targets.dtype}; allowed: classes [B] with outputs [B, C], "
                "C at least 2, or float targets of the outputs' shape"
            )
        classes = torch.arange(outputs.shape[-1], device=targets.device)
        targets = (targets.unsqueeze(-1) == classes).to(outputs.dtype)
    outputs, targets = _as_rows(outputs), _as_rows(targets)
    if targets.shape != outputs.shape:
        raise ModelError(f"loss 'mse': {shapes} do not match; allowed: targets of the outputs' shape")
    return 0.5 * (outputs - targets).square().flatten(1).sum(dim=-1).mean()


def mse_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error as `torch.nn.MSELoss` has it: mean over examples and outputs.

    Its Hessian is that of `mse` times 2/C for C outputs. Arguments and errors as of `mse`.
    """
    per_example = outputs[:1].numel()
    return mse(outputs, targets) * (2 / max(per_example, 1))


def _as_rows(values: Tensor) -> Tensor:
    """One number for each example as a column: [B] as [B, 1]."""
    return values.unsqueeze(-1) if values.ndim == 1 else values


def loss_name(loss: object) -> str:
    """What a loss or closure is called in messages: a function's name, or the class of anything else."""
    if isinstance(loss, partial):
        return loss_name(loss.func)
    name: str = getattr(loss, "__name__", type(loss).__name__)
    return "lambda" if name == "<lambda>" else name


class SameDtype(TorchFunctionMode):
    """Within it every floating tensor that a function is given is in one dtype, such as class weights.

    Attributes:
        converted: whether one was not.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.converted = dtype, False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map(self._convert, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def _convert(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dtype == self.dtype:
            return leaf
        self.converted = True
        return leaf.to(self.dtype)


def in_dtype_of_outputs(loss: Loss) -> Loss:
    """The loss with what it holds itself, such as class weights, in the dtype of the outputs.

    A model is analysed in float64 too, and a loss that holds float32 tensors may refuse its outputs then.

    Args:
        loss: ``loss(outputs, targets)``: a function or a module, which is left as it is.
    """

    def converted(outputs: Tensor, targets: Tensor) -> Tensor:
        dtype = outputs.dtype if isinstance(outputs, Tensor) else None
        return in_one_dtype(partial(loss, outputs, targets), dtype)

    converted.__name__ = loss_name(loss)
    return converted


def in_one_dtype(call: Callable[[], Value], dtype: torch.dtype | None) -> Value:
    """The value of a call; where it fails as it is, with all floating tensors in ``dtype``."""
    try:
        return call()
    except (RuntimeError, TypeError):
        if dtype is None or not dtype.is_floating_point:
            raise
        mode = SameDtype(dtype)
        try:
            with mode:
                value = call()
        except Exception:  # the user's code may raise anything; what it raised first tells more
            mode.converted = False
        if not mode.converted:
            raise
        return value


def ignores_one_logit(loss: Callable[[Tensor], Tensor], outputs: object) -> bool:
    """Whether a loss is exactly 0 at outputs [B, 1, ...], and still is when all of them are others.

    Args:
        loss: of outputs alone.
        outputs: for anything but a floating tensor [B, 1, ...] the answer is no.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or not is_one_logit(outputs):
        return False
    random = torch.randn(outputs.shape, generator=generator(0, "outputs"), device="cpu", dtype=torch.float64)
    with torch.no_grad():
        changed = outputs + (10 * (1 + outputs.abs().max()) * random.to(outputs.device)).to(outputs.dtype)
        return bool(loss(outputs) == 0) and bool(loss(changed) == 0)


def one_logit(outputs: Tensor) -> str:
    """What is wrong with a softmax over one output, and what helps."""
    return (
        f"found outputs {list(outputs.shape)}: a softmax over one output is 1, and its loss 0, whatever "
        "the weights; return two outputs, or use binary_cross_entropy_with_logits with float targets"
    )


def is_one_logit(outputs: object) -> bool:
    """Whether there is one output [B, 1, ...] for each example."""
    return isinstance(outputs, Tensor) and outputs.ndim > 1 and outputs.shape[1] == 1


def get_loss(name: str) -> Loss:
    """The loss called ``name``, or the user's function ``package.module:function``.

    Returns:
        ``loss(outputs, targets) -> scalar``, the mean over examples.

    Raises:
        ModelError: there is no such loss; or, when called, a user's function returns no scalar tensor.
        StudyError: a user's function is not found.
    """
    if name in LOSSES:
        named: Loss = resolve(LOSSES[name])
        return named
    if not is_spec(name):
        raise ModelError(f"loss: {unknown_name(name, [*LOSSES, 'package.module:function'])}")
    function = load(name)

    @wraps(function)
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = function(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim != 0:
            returned = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"loss {name!r} returns {returned} where a scalar tensor, the mean, is needed")
        return value

    return in_dtype_of_outputs(loss)
