"""Models built from their settings for given inputs and outputs, and tried on a few examples."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lossray.errors import ModelError
from lossray.networks.as_found import uncompiled_parts
from lossray.networks.functional import call_model
from lossray.networks.nests import Inputs, count, described, shapes, tensors_in
from lossray.networks.settings import MODELS, ModelSettings, UserModelSettings
from lossray.plugins import failure, load

SAME_OUTPUTS = 1e-5  # difference of two evaluations, as a share of the largest output


def build_model(settings: ModelSettings, input_shape: Any, n_outputs: int) -> nn.Module:
    """A freshly initialised model, in float32 on the CPU.

    Draws from torch's global generator: the caller forks and seeds it.

    Args:
        settings: from `model_settings`.
        input_shape: shape of one input, without the batch axis; a tuple or dict of shapes where the model
            takes several.
        n_outputs: number of classes, or of regression outputs.

    Raises:
        ModelError: the model does not fit the inputs, or a user's function fails or returns no model.
        StudyError: a user's function is not found.
    """
    if isinstance(settings, UserModelSettings):
        return _build_user_model(settings, input_shape, n_outputs)
    if isinstance(input_shape, dict) or not all(isinstance(size, int) for size in input_shape):
        kind = "mapping" if isinstance(input_shape, dict) else "tuple"
        raise ModelError(
            f"model {settings.name!r} takes one tensor, but the inputs are a {kind} of {len(input_shape)} of "
            f"the shapes {input_shape}; allowed: a model of your own, package.module:function"
        )
    return MODELS[settings.name].build(settings, input_shape, n_outputs)


def check_model(settings: ModelSettings, inputs: Inputs, n_outputs: int) -> int:
    """Build a model, run it twice, and return its number of trainable parameters.

    For the driver, so that a model that does not fit the data is refused before anything is written. Leaves
    torch's global generator as it was.

    Args:
        settings: from `model_settings`.
        inputs: a few of the data's inputs, [B, ...], or a nest of them.
        n_outputs: number of classes, or of regression outputs.

    Raises:
        ModelError: the model cannot be built for these inputs, cannot take them, is random in eval mode, or
            its outputs are not [B, n_outputs].
        StudyError: a user's function is not found.
    """
    model, outputs = try_model(settings, inputs, n_outputs)
    require_outputs(settings.name, outputs, count(inputs), n_outputs)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def try_model(settings: ModelSettings, inputs: Inputs, n_outputs: int) -> tuple[nn.Module, Tensor]:
    """A freshly initialised model in eval mode, and its outputs [B, ...], of any shape.

    Arguments and errors as for `check_model`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = build_model(settings, shapes(inputs), n_outputs).eval()
        floats = [tensor.dtype for tensor in tensors_in(inputs) if tensor.is_floating_point()]
        if floats:
            model = model.to(floats[0])
        try:
            with uncompiled_parts():
                outputs, again = call_model(model, inputs), call_model(model, inputs)
        except Exception as error:  # a user's forward may raise anything
            raise ModelError(
                f"model {settings.name!r} on inputs {described(inputs)}: {failure(error)}"
            ) from error
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != (count(inputs),):
        returned = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ModelError(
            f"model {settings.name!r} returns {returned} where a tensor [{count(inputs)}, {n_outputs}] is "
            "needed"
        )
    if not outputs.is_floating_point():
        raise ModelError(f"model {settings.name!r} returns {outputs.dtype} where floats are needed")
    largest = outputs.abs().amax()
    if not bool(((outputs - again).abs() <= SAME_OUTPUTS * largest).all() | largest.isnan()):
        raise ModelError(
            f"model {settings.name!r} is random in eval mode: the same inputs gave outputs that differ by "
            f"{float((outputs - again).abs().max()):.2g}; its loss has no Hessian: draw only if self.training"
        )
    return model, outputs


def require_outputs(name: str, outputs: Tensor, n_examples: int, n_outputs: int) -> None:
    """Refuse outputs that are not [n_examples, n_outputs].

    Raises:
        ModelError: naming the model.
    """
    if outputs.shape != (n_examples, n_outputs):
        raise ModelError(
            f"model {name!r} returns {list(outputs.shape)} where a tensor {[n_examples, n_outputs]} is needed"
        )


def _build_user_model(settings: UserModelSettings, input_shape: Any, n_outputs: int) -> nn.Module:
    """Call the user's function; ``input_shape`` and ``n_outputs`` are passed if its signature names them."""
    function = load(settings.name)
    try:
        signature: inspect.Signature | None = inspect.signature(function)
    except ValueError:  # a builtin without one
        signature = None
    parameters = signature.parameters if signature is not None else {}
    sizes = {"input_shape": input_shape, "n_outputs": n_outputs}
    arguments = {key: value for key, value in sizes.items() if key in parameters} | settings.arguments
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ModelError(
                f"model {settings.name!r}: {error}; found {', '.join(arguments) or 'no keys'}, "
                f"the function takes {signature}"
            ) from None
    try:
        model = function(**arguments)
    except (Exception, SystemExit) as error:  # a user's function may raise anything, or call exit()
        raise ModelError(f"model {settings.name!r} raised {failure(error)}") from error
    return _checked(settings.name, model)


def _checked(name: str, model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} returned {type(model).__name__} instead of a torch.nn.Module")
    parameters = list(model.parameters())
    if any(isinstance(parameter, UninitializedParameter) for parameter in parameters):
        raise ModelError(f"model {name!r} returned lazy layers, whose parameters have no shape yet")
    if not any(parameter.requires_grad and parameter.is_floating_point() for parameter in parameters):
        raise ModelError(
            f"model {name!r} returned {type(model).__name__} without a trainable floating-point parameter"
        )
    return model
