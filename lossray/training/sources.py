"""Where examples come from: digits, gaussians, a user's function. Parquet files have their own module.

A source reads everything in float64. Casting to the training dtype comes last, so the content hash of the
data is the same whatever a study trains in.
"""

import gzip
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lossray.errors import DataError
from lossray.names import unknown_name
from lossray.networks.nests import Inputs, mapped, tensors_in
from lossray.plugins import failure, load
from lossray.seeds import generator
from lossray.training.data_settings import DigitsSettings, FunctionSettings, GaussiansSettings

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RawExamples:
    """Examples as read, before splitting and standardising.

    Attributes:
        inputs: [N, ...] float64; from a user's function also int64 (token ids), or a tuple or dict of such
            arrays.
        targets: [N, ...] int64 (classes) or float64, in the shape in which they came.
    """

    inputs: Inputs
    targets: Array


@dataclass(frozen=True)
class Parts:
    """Examples that their source has split itself.

    Attributes:
        train: the training examples.
        validation: the validation examples.
        test: the test examples.
    """

    train: RawExamples
    validation: RawExamples
    test: RawExamples


# --- digits


def read_digits(settings: DigitsSettings, base: Path | None) -> tuple[RawExamples, int]:
    """Inputs [1797, 1, 8, 8] in 0..1 (the pixels are counts from 0 to 16), ten classes."""
    table = _digits()
    inputs = table[:, :-1].reshape(-1, 1, 8, 8) / 16
    return RawExamples(inputs, table[:, -1].astype(np.int64)), 10


def _digits() -> Array:
    """scikit-learn's table of digits [1797, 65] float64: 64 pixels and the class.

    Its file is read where it lies: to import scikit-learn takes a second or two, in every worker.
    """
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            with gzip.open(path, "rt") as file:
                return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # of a version that keeps the file elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


# --- gaussians

GRID = 2.0**12  # draws are rounded to multiples of 1/GRID
HIDDEN = 16  # hidden units of the "mlp" teacher


def read_gaussians(settings: GaussiansSettings, base: Path | None) -> tuple[RawExamples, int]:
    """Teacher-student data, the same bit for bit on every machine.

    All draws lie on a grid of 2^-12, on which the teacher's sums of products are exact in float64. The
    labels therefore do not depend on the order in which a BLAS adds, and the inputs lose nothing in float32.

    Returns:
        Inputs [n, dim] float64, targets [n] int64, and the number of classes.
    """
    inputs = _normal(settings, "inputs", settings.n, settings.dim)
    if settings.teacher == "linear":
        outputs = inputs @ _unit_rows(settings, "output", settings.classes, settings.dim).T
    else:
        hidden = inputs @ _unit_rows(settings, "hidden", HIDDEN, settings.dim).T
        # A relu's mean, 1/sqrt(2 pi), would favour the class whose output weights have the largest sum.
        hidden = _on_grid(np.maximum(hidden, 0) - 1 / math.sqrt(2 * math.pi))
        outputs = hidden @ _unit_rows(settings, "output", settings.classes, HIDDEN).T
    if settings.noise:
        outputs = outputs + settings.noise * _normal(settings, "noise", settings.n, settings.classes)
    return RawExamples(inputs, outputs.argmax(axis=1).astype(np.int64)), settings.classes


def _on_grid(values: Array) -> Array:
    return np.round(values * GRID) / GRID


def _normal(settings: GaussiansSettings, purpose: str, *shape: int) -> Array:
    draws = torch.randn(
        shape, generator=generator(settings.seed, f"gaussians/{purpose}"), device="cpu", dtype=torch.float64
    )
    return _on_grid(draws.numpy())


def _unit_rows(settings: GaussiansSettings, purpose: str, *shape: int) -> Array:
    """Rows of norm 1: outputs are of order 1, and every class wins somewhere, also where dim < classes."""
    rows = _normal(settings, purpose, *shape)
    norms = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return _on_grid(rows / np.maximum(norms, 1 / GRID))


# --- package.module:function


def read_function(settings: FunctionSettings, base: Path | None) -> tuple[RawExamples | Parts, int | None]:
    """Call the function and check what it returns.

    It returns ``(inputs, targets)``, or a mapping of "train", "validation" and "test" to such pairs; tensors,
    NumPy arrays or nested lists. Inputs are [N, ...] floats, or integers (token ids) under
    ``standardise = "none"``; or a tuple of tensors or arrays (the model's arguments), or a mapping (its
    keywords). Targets are [N, ...] integers (classes; booleans are 0 and 1) or floats, and
    reach the loss in the shape in which they come.

    Raises:
        DataError: the keywords or the returned value do not fit, or the function raises.
        StudyError: there is no such function.
    """
    function = load(settings.source)
    _check_arguments(settings, function)
    try:
        returned = function(**settings.arguments)
    except (Exception, SystemExit) as error:  # a user's function may raise anything, or call exit()
        raise DataError(f"{settings.source} raised {failure(error)}") from error
    if not isinstance(returned, Mapping):
        return _examples(settings, returned, ""), None
    names = ("train", "validation", "test")
    if set(returned) != set(names):
        keys = ", ".join(repr(name) for name in returned)
        raise DataError(
            f"{settings.source} returned a mapping of {keys}; expected 'train', 'validation', 'test'"
        )
    parts = Parts(*(_examples(settings, returned[name], f"{name} ") for name in names))
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        for kind in ("inputs", "targets"):
            ours, first = getattr(part, kind), getattr(parts.train, kind)
            if _kind(ours) != _kind(first):
                raise DataError(
                    f"{settings.source}: {name} {kind} are {_describe(ours)}, train {kind} "
                    f"{_describe(first)}; examples of all splits must be alike"
                )
    return parts, None


def _check_arguments(settings: FunctionSettings, function: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none; the call itself will tell
        return
    try:
        signature.bind(**settings.arguments)
    except TypeError as error:
        unknown = [name for name in settings.arguments if name not in signature.parameters]
        problem = unknown_name(unknown[0], signature.parameters) if unknown else str(error)
        raise DataError(f"{settings.source}{signature} does not fit the keys of [data]: {problem}") from None


def _examples(settings: FunctionSettings, pair: object, name: str) -> RawExamples:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        drawn = hasattr(pair, "__getitem__") or hasattr(pair, "__iter__")  # a Dataset or a DataLoader
        remedy = " as whole tensors" if drawn and not isinstance(pair, tuple | list) else ""
        raise DataError(
            f"{settings.source} returned {type(pair).__name__} for {name or 'its '}data; expected (inputs, "
            f"targets){remedy}, or a mapping of 'train', 'validation' and 'test' to such pairs"
        )
    inputs = _inputs(pair[0], f"{settings.source}: {name}inputs")
    targets = _array(pair[1], f"{settings.source}: {name}targets")
    if not isinstance(inputs, np.ndarray):
        lengths = {len(array) for array in tensors_in(inputs)}
        if lengths != {len(targets)}:
            raise DataError(
                f"{settings.source}: {name}inputs are {_describe(inputs)}, but there are {len(targets)} "
                f"{name}targets; every tensor of the inputs has one row for each"
            )
        return RawExamples(inputs, targets)
    if inputs.ndim < 2:
        raise DataError(f"{settings.source}: {name}inputs are {_describe(inputs)}; expected [N, ...]")
    if len(inputs) != len(targets):
        raise DataError(f"{settings.source}: {len(inputs)} {name}inputs, but {len(targets)} {name}targets")
    if inputs.dtype == np.int64 and settings.standardise != "none":
        raise DataError(
            f"{settings.source}: {name}inputs are integers, which standardise = '{settings.standardise}' "
            "cannot take; return floats, or set standardise = 'none' to keep integers (token ids)"
        )
    return RawExamples(inputs, targets)


def _inputs(value: object, what: str) -> Inputs:
    """One array, or a tuple or dict of arrays: of tensors, arrays or tables, not of numbers or lists."""
    if isinstance(value, Mapping):
        if not value or not all(isinstance(name, str) for name in value):
            keys = ", ".join(repr(name) for name in value) or "none"
            raise DataError(
                f"{what} are a mapping with the keys {keys}; expected names, the model's keywords"
            )
        return {name: _array(part, f"{what}[{name!r}]") for name, part in sorted(value.items())}
    if isinstance(value, tuple) and value and all(getattr(part, "ndim", 0) > 0 for part in value):
        return tuple(_array(part, f"{what}[{i}]") for i, part in enumerate(value))
    return _array(value, what)


def _array(value: object, what: str) -> Array:
    """A finite, non-empty int64 or float64 array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.to_dense() if value.layout != torch.strided else value
        value = (value.double() if value.is_floating_point() else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        several = isinstance(value, list) and all(getattr(part, "ndim", 0) > 0 for part in value)
        remedy = f"; {len(value)} inputs of a model are a tuple or a mapping" if several else ""  # type: ignore[arg-type]
        raise DataError(f"{what} are ragged: every example must have the same shape{remedy}") from None
    if array.ndim == 0 or array.size == 0:
        raise DataError(f"{what} are empty ({_describe(array)})")
    if array.dtype.kind in "bui":
        return np.array(array, dtype=np.int64, order="C")  # a copy: the function may keep and change its own
    if array.dtype.kind != "f":
        words = array.dtype.kind in "UO" and what.endswith("targets")
        remedy = ", such as np.unique(labels, return_inverse=True)[1]" if words else ""
        raise DataError(f"{what} have dtype {array.dtype}; expected floats or integers{remedy}")
    array = np.array(array, dtype=np.float64, order="C")
    bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    if len(bad):
        raise DataError(
            f"{what} are not finite in {len(bad)} of {len(array)} examples, first in example {bad[0]}"
        )
    return array


def _kind(inputs: Inputs) -> object:
    """What the inputs or targets of all splits have in common."""
    return mapped(lambda array: (array.dtype, array.shape[1:]), inputs)


def _describe(inputs: Inputs) -> str:
    if isinstance(inputs, dict):
        return f"a mapping of {', '.join(f'{name!r}: {_describe(part)}' for name, part in inputs.items())}"
    if isinstance(inputs, tuple):
        return f"a tuple of {', '.join(_describe(part) for part in inputs)}"
    return f"{inputs.dtype} {list(inputs.shape)}"
