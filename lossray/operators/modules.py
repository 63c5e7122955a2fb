"""One module of the user's as an objective: any nn.Module, any loss, any data; nothing of them is changed."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lossray.errors import DataError, LossrayError, ModelError
from lossray.limits import WHOLE
from lossray.networks.ambient import seeded
from lossray.networks.functional import call_with
from lossray.networks.holding import gradient_in_place, holding
from lossray.networks.layout import layout_of, require_module, uncompiled
from lossray.networks.losses import (
    Loss,
    ignores_one_logit,
    in_dtype_of_outputs,
    in_one_dtype,
    is_one_logit,
    loss_name,
    one_logit,
)
from lossray.networks.recurrent import is_recurrent
from lossray.networks.weight_norm import twice_differentiable
from lossray.operators.example_mean import is_example_mean, require_example_mean
from lossray.operators.finite import require_finite_inputs, require_finite_loss
from lossray.operators.model_outputs import Outputs, calling, remedy
from lossray.operators.objectives import Batch, converted, example_losses
from lossray.operators.user_data import described, example_batch, read_data
from lossray.plugins import failure
from lossray.seeds import stream

Closure = Callable[[nn.Module, Any], tuple[Tensor, float]]

CHECKED_EXAMPLES = 64  # of each batch, evaluated twice in search of randomness
SAME_LOSS = 1e-5  # relative difference of two evaluations, nondeterministic kernels included


class ModuleObjective:
    """The mean loss of one module, R = 1.

    The module is evaluated functionally: its weights are copied once, its mode is set for each evaluation
    and set back. Tied parameters count once, frozen ones not at all.

    Args:
        model: any module; its trainable parameters are theta, in ``named_parameters()`` order.
        loss: ``loss(outputs, targets)``, the mean over the examples of a batch; None with a closure.
        data: see `read_data`; how the model gets the inputs: `call_model`.
        closure: ``closure(model, batch) -> (mean loss, weight)``, in place of a loss.
        train: evaluate in train mode rather than in eval mode.
        dtype: of the products, float32 or float64; by default that of the parameters.
        outputs: which part of what the model returns the loss gets; None: all of it. See `calling`.

    Raises:
        ModelError: no trainable parameter, a random model, batch norm over several batches, a loss that is no
            mean over examples.
        DataError: data that cannot be read, or only once, or that differ from one reading to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        data: Any,
        *,
        closure: Closure | None = None,
        train: bool = False,
        dtype: torch.dtype | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        _check_arguments(model, loss, data, closure, outputs)
        model = uncompiled(model)  # a compiled graph can be differentiated once only
        self.layout = layout_of(model)
        self._parameters = [p.detach().clone() for p in _trainable(model, self.layout.names)]
        self.device = self._parameters[0].device
        self.loss, self.closure, self.train = loss, closure, train
        self._loss = loss if loss is None else in_dtype_of_outputs(loss)
        self.coupled = tuple(_coupled_layers(model, train=train))
        self.recurrent = is_recurrent(model)
        self.names: Mapping[str, str] = {
            "model": type(model).__name__,
            "loss": loss_name(loss or closure),
        }
        self.dead = torch.zeros(1, dtype=torch.bool, device=self.device)
        self.may_diverge = False
        self.limits = WHOLE
        self._model = model
        self._outputs = outputs
        self._called = _Called(model, closure or calling(outputs))
        self._derivatives = twice_differentiable(model)
        self._state = {
            **{n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad},
            **{n: b.detach().clone() for n, b in model.named_buffers()},
        }
        self._convert(dtype or _default_dtype(self._parameters))
        self._data: Iterable[Any] = read_data(data, closure=closure is not None)
        self._pass = 0  # counts readings while the data are checked
        self._total = 1.0
        self._sizes: list[int | None] = []
        self._check_data()

    @property
    def source(self) -> tuple[nn.Module, Loss, Iterable[Any]] | None:
        """Model and data as given, and the loss for any dtype.

        None with a closure, in train mode, or where the loss gets a part of what the model returns.
        """
        if self._loss is None or self.train or self._outputs is not None:
            return None
        return self._model, self._loss, self._data

    @property
    def model(self) -> nn.Module:
        """The module; it may have been trained on since its weights were copied."""
        return self._model

    def live_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the module as they are now, in order."""
        return [self._model.get_parameter(name) for name in self.layout.names]

    def over(self, data: Any) -> "ModuleObjective":
        """The same loss over other data, at the weights that the module has now."""
        return ModuleObjective(
            self._model,
            self.loss,
            data,
            closure=self.closure,
            train=self.train,
            dtype=self.dtype,
            outputs=self._outputs,
        )

    @cached_property
    def divisible(self) -> bool:
        """Whether the loss of a batch is the mean over its parts; False where that is open."""
        return self.closure is None and not self.coupled and is_example_mean(self)

    def some_inputs(self) -> Any:
        """Inputs of the model as data, (inputs, None); None with a closure, whose batches may be anything."""
        return None if self.closure is not None else (next(self.batches()).inputs, None)

    def to(self, dtype: torch.dtype) -> "ModuleObjective":
        """The same objective in another dtype, from the original parameters and data."""
        other = copy.copy(self)
        other._convert(dtype)
        return other

    def member(self, r: int) -> "ModuleObjective":
        """Itself: there is one member."""
        return self

    @property
    def sizes(self) -> list[int | None]:
        """Examples in each batch; None for the batches of a closure."""
        return self._sizes

    def batches(self) -> Iterator[Batch]:
        """The batches, on the device and in the dtype, read anew."""
        for batch in self._read():
            share = batch.share / self._total
            if share > 0:
                yield converted(
                    Batch(batch.inputs, batch.targets, share, batch.weights), self.device, self.dtype
                )

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """Mean loss over ``batch``, [1]."""
        if self.closure is not None:
            return self._closure_value(theta, batch)[0][None]
        return self._mean(self._evaluate(theta, batch), batch)[None]

    def outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        """Outputs of the module, [1, B, ...].

        Raises:
            ModelError: the outputs are no tensor with one entry for each example.
        """
        outputs = self._evaluate(theta, batch)
        n = batch.size
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != n:
            raise ModelError(
                f"{self.names['model']} returns {described(outputs)} where Gauss-Newton and Fisher "
                f"need one tensor [{n}, ...]; {remedy(outputs, n)}"
            )
        return outputs[None]

    def losses_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean loss of ``outputs`` [1, B, ...], [1]."""
        return self._mean(outputs[0], batch)[None]

    def example_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Loss of each example alone, [1, B]."""
        assert self._loss is not None
        return example_losses(self._loss, outputs[0], batch.targets)[None]

    def plain_gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        """Gradient [1, d] of the loss over ``batch``; see `Objective`."""
        with self._held(theta) as parameters:
            result = self._called.function(self._model, batch.inputs)
            value: Tensor = self._mean(result, batch) if self.closure is None else result[0]
            return gradient_in_place(value, parameters)[None]

    def plain_outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        """Outputs [1, B, ...]; see `Objective`."""
        with self._held(theta), torch.no_grad():
            outputs: Tensor = self._called.function(self._model, batch.inputs)[None]
        return outputs

    @contextmanager
    def _held(self, theta: Tensor) -> Iterator[list[Tensor]]:
        """The module itself in its mode and with the weights ``theta`` [1, d]."""
        tensors = {**self.layout.split(theta[0]), **self._converted_state}
        with _mode(self._model, self.train), holding(self._model, tensors) as held:
            yield held[: len(self.layout.names)]

    # The model and the loss.

    def _mean(self, outputs: Any, batch: Batch) -> Tensor:
        assert self._loss is not None
        if batch.weights is not None:
            each = example_losses(self._loss, outputs, batch.targets)
            return (each * batch.weights).sum() / batch.weights.sum()
        try:
            value = self._loss(outputs, batch.targets)
        except (LossrayError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a user's loss may raise anything
            raise ModelError(
                f"loss {self.names['loss']!r} raised {failure(error)}; it was given {described(outputs)} and "
                f"targets {described(batch.targets)}{_dtypes(outputs, batch.targets)}"
                f"{_hint(outputs, batch)}"
            ) from error
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise ModelError(
                f"loss {self.names['loss']!r} returns {described(value)} where a scalar tensor, the "
                "mean over the examples, is needed"
            )
        return value

    def _closure_value(self, theta: Tensor, batch: Batch) -> tuple[Tensor, float]:
        result = self._evaluate(theta, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ModelError(
                f"closure {self.names['loss']!r} returns {described(result)}; needed: (mean loss, weight)"
            )
        value, weight = result
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise ModelError(
                f"closure {self.names['loss']!r}: the mean loss is {described(value)}; needed: a scalar "
                "tensor"
            )
        weight = float(weight)
        if not 0 < weight < float("inf"):
            raise ModelError(f"closure {self.names['loss']!r}: found the weight {weight}; allowed: above 0")
        return value, weight

    def _evaluate(self, theta: Tensor, batch: Batch) -> Any:
        """What the model, or the closure, returns with the weights ``theta`` [1, d]."""
        weights = {**self.layout.split(theta[0]), **self._converted_state}
        for name in self._buffer_names:  # the model may write into them
            weights[name] = weights[name].clone()
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        try:
            with _mode(self._model, self.train), self._derivatives():
                call = partial(call_with, self._called, tensors, batch.inputs)
                return call() if self.closure is None else in_one_dtype(call, self.dtype)
        except (LossrayError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a user's forward may raise anything
            given = "" if self.closure is not None else f"; it was given {_given(batch.inputs)}"
            raise ModelError(f"{self.names['model']} raised {failure(error)}{given}") from error

    def _convert(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ModelError(f"dtype: found {dtype}; allowed: torch.float32, torch.float64")
        self.dtype = dtype
        flat = torch.cat([p.detach().reshape(-1).to(dtype) for p in self._parameters])
        self.theta = flat[None].clone().requires_grad_()
        self._converted_state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self._state.items()
        }
        self._buffer_names = [name for name, _ in self._model.named_buffers()]

    # The data.

    def _read(self) -> Iterator[Batch]:
        """The batches as given, their shares not yet divided by the total.

        A DataLoader draws from torch's global generator whenever it is read, shuffled or not: that is
        seeded for each batch, and set back.
        """
        count = 0
        with seeded(stream(self._pass, "reading"), self.device):
            iterator = iter(self._data)
        while True:
            with seeded(stream(self._pass, "data", count), self.device):
                try:
                    raw = next(iterator)
                except StopIteration:
                    return
            count += 1
            if self.closure is None:
                batch = example_batch(raw)
                if batch.size:  # an empty last batch counts for nothing
                    yield batch
            else:
                # The weight is known once the closure has been evaluated.
                yield Batch(raw, None, self._weights.get(count, 1.0))

    def _check_data(self) -> None:
        """Read everything twice: sizes and weights, and whether model and data are the same both times."""
        self._weights: dict[int, float] = {}
        self._pass = 1
        first, sizes, weights = self._survey()
        if sum(weights) <= 0:
            raise DataError("data: found no example with a positive weight; at least one is needed")
        self._total = sum(weights)
        self._sizes = [size for size, weight in zip(sizes, weights, strict=True) if weight > 0]
        if self.coupled and len(self._sizes) > 1:
            raise ModelError(
                f"batch norm in train mode ({', '.join(self.coupled)}) makes the loss of a batch depend on "
                f"which examples share it, so that {len(self._sizes)} batches have no common mean loss: pass "
                "one batch, or train=False"
            )
        for loss in first:
            require_finite_loss(self, torch.tensor(loss, device="cpu"))
        self._pass = 2
        second, _, _ = self._survey()
        self._pass = 0
        self._compare(first, second)
        if self.closure is None and not any(first):
            self._require_effect()
        if self.closure is not None:
            self._weights = dict(enumerate(weights, start=1))
            return
        weighted = any(batch.weights is not None for batch in self._read())
        if not self.coupled and (weighted or len(self._sizes) > 1):
            purpose = "a weighted mean" if weighted else "the mean over several batches"
            require_example_mean(self, purpose=purpose, alone=weighted)

    def _survey(self) -> tuple[list[float], list[int | None], list[float]]:
        """Losses (over a few examples where that may be), sizes and weights of all batches, read once."""
        losses: list[float] = []
        sizes: list[int | None] = []
        weights: list[float] = []
        for i, raw in enumerate(self._read()):
            if self._pass == 1 and self.closure is None:
                require_finite_inputs(raw.inputs, i)
            batch = converted(raw, self.device, self.dtype)
            loss, weight = self._sample(batch, stream(self._pass, "model", i))
            losses.append(loss)
            sizes.append(batch.size if self.closure is None else None)
            weights.append(weight)
        return losses, sizes, weights

    def _sample(self, batch: Batch, seed: int) -> tuple[float, float]:
        """Loss of a batch, or of its first examples, and its weight, with torch's generators seeded."""
        with seeded(seed, self.device), torch.enable_grad():
            if self.closure is not None:
                value, weight = self._closure_value(self.theta, batch)
                return float(value.detach()), weight
            part = batch if self.coupled else batch.pick(slice(0, CHECKED_EXAMPLES))
            part = replace(part, weights=None)
            try:
                loss = float(self._mean(self._evaluate(self.theta, part), part).detach())
            except ModelError:  # a model may take batches of one size alone
                if part.size == batch.size:
                    raise
                loss = math.nan
            if not math.isfinite(loss):  # the first examples may be ignored targets alone
                loss = float(self._mean(self._evaluate(self.theta, batch), batch).detach())
            return loss, batch.share

    def _compare(self, first: list[float], second: list[float]) -> None:
        """Refuse losses that differ from one evaluation to the next."""
        a, b = torch.tensor(first, device="cpu"), torch.tensor(second, device="cpu")
        if a.shape == b.shape and torch.allclose(a, b, rtol=SAME_LOSS, atol=0, equal_nan=True):
            return
        layers = _random_layers(self._model, train=self.train)
        batch = converted(next(iter(self._read())), self.device, self.dtype)
        again = [self._sample(batch, seed)[0] for seed in (1, 2)]
        if layers or abs(again[0] - again[1]) > SAME_LOSS * abs(again[0]):
            source = f": {', '.join(layers)} drop units in train mode" if layers else ""
            part = self._random_part(batch)
            in_loss = part.startswith("loss")
            remedy = "pass train=False, set p to 0, or draw only if self.training"
            remedy = "pass one without random numbers" if in_loss else remedy
            raise ModelError(
                f"{part} is random{source}: two evaluations on the same examples gave "
                f"different losses, which have no Hessian; {remedy}"
            )
        raise DataError(
            "the data differ from one reading to the next, and every product reads all of them: pass "
            "shuffle=False, take out random augmentation, or pass a list of the batches"
        )

    def _require_effect(self) -> None:
        """Refuse a softmax over one output: its loss is 0 whatever the weights."""
        batch = converted(next(iter(self._read())), self.device, self.dtype)
        part = batch if self.coupled else replace(batch.pick(slice(0, CHECKED_EXAMPLES)), weights=None)
        with torch.no_grad():
            outputs = self._evaluate(self.theta, part)
        if ignores_one_logit(lambda changed: self._mean(changed, part), outputs):
            raise ModelError(f"loss {self.names['loss']!r} of {self.names['model']}: {one_logit(outputs)}")

    def _random_part(self, batch: Batch) -> str:
        """The model, or the loss if the model's outputs stay."""
        if self.closure is not None:
            return f"closure {self.names['loss']!r} (or {self.names['model']})"
        runs = []
        for seed in (1, 2):
            with seeded(seed, self.device), torch.no_grad():
                part = batch if self.coupled else batch.pick(slice(0, CHECKED_EXAMPLES))
                runs.append(tree_leaves(self._evaluate(self.theta, part)))
        stays = all(
            not isinstance(a, Tensor) or bool((a - b).norm() <= SAME_LOSS * a.norm())
            for a, b in zip(*runs, strict=True)
        )
        return f"loss {self.names['loss']!r}" if stays else self.names["model"]


class _Called(nn.Module):
    """A function of the model and a batch as a module, so that `call_with` can exchange the weights."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


@contextmanager
def _mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Every layer in train or eval mode. Flags alone: a model's own ``train()`` may do other things."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = train
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _given(inputs: Any) -> str:
    """How a model was called, for messages."""
    if isinstance(inputs, tuple | list):
        return f"{len(inputs)} arguments, as the inputs are {described(inputs)}{_dtypes(*inputs)}"
    return f"{described(inputs)}{_dtypes(inputs)}"


def _hint(outputs: Any, batch: Batch) -> str:
    """What helps where classes meet one output, or a loss something else than a tensor."""
    if not isinstance(outputs, Tensor):
        return f"; {remedy(outputs, batch.size)}"
    classes = isinstance(batch.targets, Tensor) and not batch.targets.is_floating_point()
    return f"; {one_logit(outputs)}" if classes and is_one_logit(outputs) else ""


def _dtypes(*values: Any) -> str:
    """The dtypes of those values that are tensors."""
    names = [str(value.dtype).removeprefix("torch.") for value in values if isinstance(value, Tensor)]
    return f" of {', '.join(names)}" if names else ""


def _check_arguments(model: Any, loss: Any, data: Any, closure: Any, outputs: Any) -> None:
    require_module(model)
    if closure is not None and outputs is not None:
        raise ModelError("found both closure and outputs; a closure takes its outputs from the model itself")
    if (loss is None) == (closure is None):
        given = "neither" if loss is None else "both"
        raise ModelError(
            f"found {given} of loss and closure; pass one: Hessian(model, loss, data), or closure="
        )
    function, name = (loss, "loss") if closure is None else (closure, "closure")
    if not callable(function):
        raise ModelError(f"{name}: found {type(function).__name__}; allowed: a function")
    if data is None:
        raise DataError("data: found None; pass (inputs, targets) or a list of such batches")


def _trainable(model: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """The trainable parameters, checked: real, finite, on one device."""
    parameters: list[Tensor] = [model.get_parameter(name) for name in names]
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise ModelError(
            f"{type(model).__name__} has parameters on {', '.join(devices)}; one device is needed"
        )
    for name, parameter in zip(names, parameters, strict=True):
        if not parameter.is_floating_point():
            raise ModelError(f"parameter {name!r} is {parameter.dtype}; real floating-point ones are needed")
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"parameter {name!r} has values that are not finite: the loss has no curvature there"
            )
    return parameters


def _default_dtype(parameters: list[Tensor]) -> torch.dtype:
    """float64 where all parameters are; float32 otherwise: half precision says nothing about curvature."""
    double = all(parameter.dtype == torch.float64 for parameter in parameters)
    return torch.float64 if double else torch.float32


def _coupled_layers(model: nn.Module, *, train: bool) -> list[str]:
    """Batch norm that normalises with the batch's own statistics."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (train or module.running_mean is None)
    ]


def _random_layers(model: nn.Module, *, train: bool) -> list[str]:
    """Layers that drop units; those of torch and those named after them."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if train and "drop" in type(module).__name__.lower() and getattr(module, "p", 1) != 0
    ]
