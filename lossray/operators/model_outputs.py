"""Which part of what a model returns is its outputs: all of it, an entry by name or place, or a function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.names import nearest
from lossray.networks.functional import call_model
from lossray.operators.user_data import described

Outputs = str | int | Callable[[Any], Any]  # an attribute or key, a place in a tuple, or a function


def calling(outputs: Outputs | None) -> Callable[[nn.Module, Any], Any]:
    """A function (model, inputs) that calls the model and gives its outputs.

    Raises:
        ModelError: ``outputs`` is nothing of the kind; when called, there is no such part.
    """
    if outputs is None:
        return call_model
    if not callable(outputs) and (isinstance(outputs, bool) or not isinstance(outputs, str | int)):
        raise ModelError(
            f"outputs: found {type(outputs).__name__}; allowed: an attribute or key of what the model "
            "returns, the number of an entry, or a function of it"
        )
    return lambda model, inputs: _part(call_model(model, inputs), outputs, type(model).__name__)


def remedy(returned: Any, n: int | None) -> str:
    """What helps where one tensor of outputs is needed: ``outputs=``, with the parts that would do.

    Args:
        returned: by the model, or what ``outputs=`` made of it.
        n: number of examples.
    """
    fitting = [name for name, part in _parts(returned).items() if _is_tensor(part, n)]
    if not fitting:
        return "pass outputs=, a function that takes what the model returns to that tensor"
    others = " or ".join(f"{name!r}" for name in fitting)
    return f"pass outputs={others}, and a loss of that tensor and the targets"


def _part(returned: Any, outputs: Outputs, model: str) -> Any:
    if callable(outputs):
        return outputs(returned)
    parts = _parts(returned)
    if outputs in parts:
        return parts[outputs]
    if not parts:
        raise ModelError(
            f"outputs: found {outputs!r}, and {model} returns {described(returned)}, which has no parts; "
            "leave outputs out, or pass a function"
        )
    guess = nearest(outputs, [str(name) for name in parts]) if isinstance(outputs, str) else None
    hint = f"; did you mean {guess!r}?" if guess else ""
    raise ModelError(
        f"outputs: found {outputs!r}; {model} returns a {type(returned).__name__} with "
        f"{', '.join(map(str, parts))}{hint}"
    )


def _parts(returned: Any) -> dict[str | int, Any]:
    """The parts by key or attribute, of a tuple also by place; none of a tensor."""
    if isinstance(returned, Tensor):
        return {}
    if isinstance(returned, Mapping):
        return dict(returned)
    named = dict(getattr(returned, "__dict__", {}))
    if isinstance(returned, Sequence) and not isinstance(returned, str):
        fields: Sequence[str] = getattr(returned, "_fields", ())
        named |= dict(zip(fields, returned, strict=False))
        return {**named, **dict(enumerate(returned))}
    return named


def _is_tensor(part: Any, n: int | None) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 0 and len(part) == n
