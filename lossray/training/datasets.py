"""Data sets: what the [data] section of a study file loads.

The steps are read (float64), split, standardise, fingerprint, cast; only the last depends on the training
dtype. The statistics of standardisation are sums that NumPy takes in a fixed order, so a fingerprint is the
same on every machine that decodes the same files.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lossray.errors import DataError
from lossray.networks.nests import Inputs, described, mapped, rows, shapes, tensors_in
from lossray.training.data_settings import DataSettings, source_of
from lossray.training.sources import Array, Parts, RawExamples
from lossray.training.splits import exact_sizes, partition


@dataclass(frozen=True)
class Split:
    """Examples of one split.

    Attributes:
        inputs: [N, ...], or a tuple or dict of tensors that share the first axis.
        targets: [N, ...] int64 (classes) or floats, in the shape in which the source gave them.
    """

    inputs: Inputs
    targets: Tensor


@dataclass(frozen=True)
class Standardisation:
    """What was applied to the inputs of all splits: ``(inputs - mean) * scale``, from the training split.

    Attributes:
        kind: whether each feature has numbers of its own, or all share them.
        mean: [*input_shape] for "feature", [] for "global"; float64.
        scale: of the same shape, 1 / standard deviation; 0 where the training split is constant.
    """

    kind: Literal["feature", "global"]
    mean: Tensor
    scale: Tensor

    def apply(self, inputs: Tensor) -> Tensor:
        """Standardise raw inputs [N, *input_shape] in float64."""
        return (inputs.double() - self.mean) * self.scale

    def summary(self) -> dict[str, str | int | float]:
        """A few numbers for a record: the kind, the range of means and deviations, how many are constant."""
        deviations = 1 / self.scale[self.scale > 0]
        return {
            "kind": self.kind,
            "mean_smallest": float(self.mean.min()),
            "mean_largest": float(self.mean.max()),
            "std_smallest": float(deviations.min()) if len(deviations) else 0.0,
            "std_largest": float(deviations.max()) if len(deviations) else 0.0,
            "constant": int((self.scale == 0).sum()),
        }


@dataclass(frozen=True)
class Dataset:
    """A loaded data set, split, standardised and cast.

    Attributes:
        train: the training split.
        validation: the validation split.
        test: the test split.
        n_outputs: number of classes; of float targets [N, C, ...] it is C, of [N] it is 1.
        fingerprint: sha256 of all splits in float64 after standardisation, the same for every training dtype.
        input_shape: of one example: a tuple of numbers, or a nest of them like the inputs.
        standardisation: a `Standardisation`, or a nest of them like the inputs; None where they are as read.
    """

    train: Split
    validation: Split
    test: Split
    n_outputs: int
    fingerprint: str
    input_shape: Any
    standardisation: Any = None


# --- loading


def load_dataset(settings: DataSettings, *, dtype: torch.dtype, base: Path | None = None) -> Dataset:
    """Read, split and standardise a data set.

    Args:
        settings: from :func:`data_settings`.
        dtype: of inputs and of regression targets. Integer inputs (token ids) stay int64.
        base: the study file's folder, to which relative paths refer; the current directory if None.

    Raises:
        DataError: the data cannot be read, or do not make three non-empty splits of one kind.
    """
    raw, n_classes = source_of(settings).read(settings, base)
    parts = raw if isinstance(raw, Parts) else _split(raw, settings)
    n_outputs = _n_outputs(parts, n_classes, settings.source)
    standardisation = mapped(lambda array: _fit(array, settings.standardise), parts.train.inputs)
    splits = [_as_split(part, standardisation) for part in (parts.train, parts.validation, parts.test)]
    train, validation, test = (_cast(split, dtype, settings.source) for split in splits)
    return Dataset(
        train=train,
        validation=validation,
        test=test,
        n_outputs=n_outputs,
        fingerprint=_fingerprint(splits, n_outputs),
        input_shape=shapes(parts.train.inputs),
        standardisation=standardisation,
    )


def load_whole(settings: DataSettings, *, dtype: torch.dtype, base: Path | None = None) -> Dataset:
    """All examples of a source as its training split; of one that splits itself, the training part.

    For the analysis of one's own model: nothing is split or standardised, and validation and test are empty.

    Args:
        settings: from :func:`data_settings`; `split` and `standardise` do not count.
        dtype: of inputs and of regression targets.
        base: the folder to which relative paths refer; the current directory if None.

    Raises:
        DataError: the data cannot be read.
    """
    raw, n_classes = source_of(settings).read(settings, base)
    examples = raw.train if isinstance(raw, Parts) else raw
    nothing = RawExamples(rows(examples.inputs, slice(0)), examples.targets[:0])
    n_outputs = _n_outputs(Parts(examples, examples, examples), n_classes, settings.source)
    whole, empty = (_as_split(part, None) for part in (examples, nothing))
    train, none = (_cast(split, dtype, settings.source) for split in (whole, empty))
    return Dataset(
        train=train,
        validation=none,
        test=none,
        n_outputs=n_outputs,
        fingerprint=_fingerprint([whole, empty, empty], n_outputs),
        input_shape=shapes(examples.inputs),
    )


def content_key(settings: DataSettings, base: Path | None) -> str:
    """The content hash of the data, which goes into the key of every task: the data set's ``fingerprint``.

    It depends on the contents of all splits after standardisation and on the number of outputs; not on the
    training dtype, the place of the files, or settings that leave the contents as they are.
    """
    return load_dataset(settings, dtype=torch.float64, base=base).fingerprint


def _split(examples: RawExamples, settings: DataSettings) -> Parts:
    sizes = exact_sizes(len(examples.targets), settings.split)
    for name, size in zip(("train", "validation", "test"), sizes, strict=True):
        if size == 0:
            raise DataError(
                f"{len(examples.targets)} examples are too few for split = {list(settings.split)}: "
                f"the {name} split is empty"
            )
    parts = partition(examples.targets, sizes, settings.split_seed)
    return Parts(*(RawExamples(rows(examples.inputs, part), examples.targets[part]) for part in parts))


def _n_outputs(parts: Parts, n_classes: int | None, source: str) -> int:
    """Classes, one more than the largest id (ids below 0 are no classes); of floats [N, C, ...] it is C."""
    targets = [part.targets for part in (parts.train, parts.validation, parts.test)]
    if targets[0].dtype != np.int64:
        return targets[0].shape[1] if targets[0].ndim > 1 else 1
    largest, n = max(int(ids.max()) for ids in targets), sum(ids.size for ids in targets)
    n_outputs = n_classes if n_classes is not None else largest + 1
    smallest = min(int(ids.min()) for ids in targets)
    if n_outputs < 2 and smallest < 0:
        raise DataError(
            f"{source}: the targets are integers from {smallest} to {largest}; expected class ids 0..C-1, at "
            "least two of them (ids below 0 are no classes), or floats"
        )
    if n_outputs < 2:
        raise DataError(f"{source}: all {n} examples are of one class; a classifier needs at least two")
    if n_outputs > n:
        raise DataError(f"{source}: class ids go up to {largest} in {n} examples; expected 0..C-1")
    return n_outputs


def _fit(inputs: Array, kind: Literal["none", "feature", "global"]) -> Standardisation | None:
    """Mean and scale of the training inputs [N, ...].

    NumPy adds up rows along axis 0 one after the other, and ``fsum`` rounds correctly: no threads, no
    machine-dependent order.
    """
    if kind == "none" or inputs.dtype.kind != "f":
        return None
    flat = np.ascontiguousarray(inputs).reshape(len(inputs), -1)
    if kind == "feature":
        mean = flat.sum(axis=0) / len(flat)
        std = np.sqrt(((flat - mean) ** 2).sum(axis=0) / len(flat))
        constant = flat.min(axis=0) == flat.max(axis=0)
        shape = inputs.shape[1:]
    else:
        mean = np.array(math.fsum(flat.sum(axis=0)) / flat.size)
        std = np.array(math.sqrt(math.fsum(((flat - mean) ** 2).sum(axis=0)) / flat.size))
        constant = np.array(flat.min() == flat.max())
        shape = ()
    # The mean of a constant is rounded, so its deviation need not be exactly 0: hence min == max.
    constant = constant | (std == 0)
    scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, std))
    return Standardisation(
        kind, torch.from_numpy(mean.reshape(shape)), torch.from_numpy(scale.reshape(shape))
    )


def _as_split(examples: RawExamples, standardisation: Any) -> Split:
    inputs = mapped(lambda array: torch.from_numpy(np.ascontiguousarray(array)), examples.inputs)
    if isinstance(inputs, Tensor):
        inputs = _standardised(inputs, standardisation)
    elif standardisation is not None:
        inputs = tree_map(_standardised, inputs, standardisation)
    return Split(inputs, torch.from_numpy(np.ascontiguousarray(examples.targets)))


def _standardised(inputs: Tensor, standardisation: Standardisation | None) -> Tensor:
    return inputs if standardisation is None else standardisation.apply(inputs)


def _cast(split: Split, dtype: torch.dtype, source: str) -> Split:
    def cast(values: Tensor, what: str) -> Tensor:
        if not values.is_floating_point():
            return values
        converted = values.to(dtype)
        if not bool(converted.isfinite().all()):
            raise DataError(f"{source}: {what} of up to {float(values.abs().max()):.1e} do not fit {dtype}")
        return converted

    inputs = mapped(lambda values: cast(values, "inputs"), split.inputs)
    return Split(inputs, cast(split.targets, "targets"))


def _fingerprint(splits: list[Split], n_outputs: int) -> str:
    digest = hashlib.sha256(f"outputs={n_outputs}".encode())
    for split in splits:
        if not isinstance(split.inputs, Tensor):
            digest.update(f";{described(rows(split.inputs, slice(0)))}".encode())
        for values in (*tensors_in(split.inputs), split.targets):
            array = values.numpy()
            digest.update(f";{array.dtype.name}{list(array.shape)};".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).data)
    return digest.hexdigest()


# --- the analysis set


def analysis_set(dataset: Dataset, examples: int | Literal["all"]) -> Split:
    """The examples on which curvature is defined: the training split, or a fixed stratified part of it.

    Args:
        dataset: any.
        examples: how many, or "all".

    Raises:
        DataError: more than the training split has.
    """
    if examples == "all":
        return dataset.train
    chosen = torch.from_numpy(_chosen(dataset, examples))
    return Split(rows(dataset.train.inputs, chosen), dataset.train.targets[chosen])


def analysis_fingerprint(dataset: Dataset, examples: int | Literal["all"]) -> str:
    """Identifies the analysis set: sha256 of the data set's fingerprint and the indices chosen.

    Like the fingerprint it does not depend on the dtype, so rows of two precisions say that they are about
    the same examples.
    """
    chosen = _chosen(dataset, examples)
    return hashlib.sha256(dataset.fingerprint.encode() + chosen.astype("<i8").tobytes()).hexdigest()


def _chosen(dataset: Dataset, examples: int | Literal["all"]) -> np.ndarray[Any, np.dtype[np.int64]]:
    n = len(dataset.train.targets)
    if examples == "all":
        return np.arange(n)
    if not 1 <= examples <= n:
        raise DataError(
            f"found {examples} examples for the analysis set; allowed: 1 to {n}, the training split"
        )
    return partition(dataset.train.targets.cpu().numpy(), [examples, n - examples], seed=0)[0]


def on_device(dataset: Dataset, device: torch.device) -> Dataset:
    """The data with every split on ``device``."""

    def moved(split: Split) -> Split:
        return Split(mapped(lambda tensor: tensor.to(device), split.inputs), split.targets.to(device))

    train, validation, test = moved(dataset.train), moved(dataset.validation), moved(dataset.test)
    return replace(dataset, train=train, validation=validation, test=test)
