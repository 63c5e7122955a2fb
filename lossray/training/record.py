"""Recording a trajectory in one's own training loop, for a study with ``source = "checkpoints"``."""

import operator
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lossray.errors import ModelError, StoreError, StudyError
from lossray.networks.layout import tensors_of, uncompiled
from lossray.plugins import failure
from lossray.storage.checkpoints import Checkpoint, dumps, loads
from lossray.storage.recordings import FOLDER, Recording, read_recording, recording_path
from lossray.storage.store import Store
from lossray.training.readings import ENTRIES, RATE, Reading, read_optimizer
from lossray.training.recognise import base_rate, rate
from lossray.training.update_rules import OPTIMIZERS

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"  # becomes the name of a folder


def record(
    out: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    *,
    run: str = "run",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of one's own training, which a study with ``source = "checkpoints"`` analyses.

    Call it in the training loop, before the first step (step 0) and whenever the trajectory is to be looked
    at. The model and the optimizer are left as they are. A model wrapped by torch.compile, DataParallel or
    DistributedDataParallel is recorded as the module inside.

    Of an optimizer that lossray knows (torch.optim's Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam,
    RMSprop and SGD, with all their options, and subclasses that leave the step alone) momentum, the diagonal
    of the preconditioner, the threshold of stability and the rate are recorded, whatever its weight decay
    and its parameter groups are. Groups with rates of their own are taken into the preconditioner (see
    `lossray.training.readings`). Of any other optimizer only the name is; the directions that need its state
    are then missing. What is not known is a line in the output of ``lossray run``.

    A script that is run again into the same store and comes to the same weights changes nothing. Other
    weights at a recorded step are an error, since rows of two trajectories would mix. `overwrite` takes them
    for the trajectory's new course instead: this checkpoint is replaced, and what the run has from this step
    on is dropped, here and, when the study is run the next time, in the tables.

    Parameters that are not finite are recorded: the run counts as diverged at that step.

    Args:
        out: the store, a folder or a URI; made where it does not exist.
        model: any module with a trainable parameter.
        optimizer: what steps it; None if there is none, or none of torch's kind.
        step: optimizer steps taken so far.
        run: name of the trajectory, which becomes its run_id; several may be recorded into one store.
        overwrite: whether other weights may replace those that the run has at this step.

    Raises:
        StudyError: `model`, `optimizer`, `step` or `run` is not what it must be.
        ModelError: the model has no trainable parameter, or is not the one that the optimizer steps.
        StoreError: nothing can be written there; the store belongs to a study that trains, or has the run
            with other parameters, another optimizer, or other weights at this step.

    Example:
        >>> import lossray, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for step in range(3):
        ...     lossray.record("out/own", model, optimizer, step)
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> import pathlib
        >>> sorted(path.name for path in pathlib.Path("out/own/checkpoints/run").iterdir())
        ['0.safetensors', '1.safetensors', '2.safetensors']
    """
    step, run = _checked_step(step), _checked_name(run)
    model = _unwrapped(model)
    _check_model(model, optimizer)
    store = _opened(out)
    try:
        _record(store, model, optimizer, step, run, overwrite=overwrite)
    except OSError as error:
        raise StoreError(f"{store.url}: cannot be written: {error.strerror or error}") from error


def _record(
    store: Store,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    run: str,
    *,
    overwrite: bool,
) -> None:
    before = _before(store, run, step, overwrite=overwrite)
    reading = None
    if optimizer is not None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        reading = read_optimizer(optimizer, trainable, step)
    recording = _recording(run, model, optimizer, reading)
    checkpoint = _checkpoint(recording, model, step, optimizer, reading)
    _write(store, before, recording, checkpoint, overwrite=overwrite)


# ---- what is refused


def _opened(out: Any) -> Store:
    """The store at ``out``, which must be a place for one."""
    if not isinstance(out, str | os.PathLike) or not str(out):
        raise StudyError(f"out: found {out!r}; allowed: a folder, or a URI such as s3://bucket/runs")
    store = Store(str(out))
    try:
        store.paths()
    except OSError as error:
        raise StoreError(f"{store.url}: cannot be a store: {error.strerror or error}") from error
    except Exception as error:  # an object store's own: no credentials, no such bucket
        raise StoreError(f"{store.url}: cannot be a store: {failure(error)}") from error
    return store


def _checked_step(step: Any) -> int:
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise StudyError(f"step: found {step!r}; allowed: a whole number from 0, the optimizer steps taken")
    return number


def _checked_name(run: Any) -> str:
    if not isinstance(run, str) or not re.fullmatch(NAME, run):
        raise StudyError(
            f"run: found {run!r}; allowed: up to 100 letters, digits, '-', '_' and '.', such as 'adam-0'"
        )
    return run


def _check_model(model: Any, optimizer: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise StudyError(f"model: found {name}; allowed: a torch.nn.Module")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise StudyError(f"optimizer: found {kind}; allowed: a torch.optim.Optimizer, or None")
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        raise ModelError(
            f"{name} has lazy layers without a shape yet: record it after its first forward pass"
        )
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trainable:
        raise ModelError(f"{name} has no trainable parameter: nothing to analyse")
    if optimizer is None:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not trainable & stepped:
        raise ModelError(
            f"{type(optimizer).__name__} steps none of the parameters of this {name}: "
            "record the model that it was made for"
        )


def _check_store(store: Store) -> None:
    """A run's first checkpoint must not go into the store of a study that trains, or among other files."""
    if store.exists("manifest.json"):
        manifest = store.read_json("manifest.json")
        study = manifest.get("study", {}) if isinstance(manifest, dict) else {}
        if study.get("source") != "checkpoints":
            raise StoreError(
                f"{store.url} is the store of study {study.get('name')!r}, which trains its runs itself: "
                "record into another folder"
            )
        return
    strangers = [path for path in store.paths() if not path.startswith((f"{FOLDER}/", "checkpoints/"))]
    if strangers or (store.paths("checkpoints") and not store.paths(FOLDER)):
        example = strangers[0] if strangers else "checkpoints/"
        raise StoreError(
            f"{store.url}: found files that lossray.record has not written, such as {example}; "
            "allowed: a new or empty folder, or one that is recorded into"
        )


# ---- what is written


def _before(store: Store, run: str, step: int, *, overwrite: bool) -> Recording | None:
    """What the run's checkpoints so far have in common; None where this one begins it, or begins it anew."""
    before = read_recording(store, run)
    if before is None:
        _check_store(store)
    elif overwrite and all(other >= step for other in store.checkpoint_steps(run)):
        return None
    return before


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's or DistributedDataParallel's."""
    inner = uncompiled(model)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(inner.module)
    return inner if inner is model else _unwrapped(inner)


def _recording(
    run: str, model: nn.Module, optimizer: torch.optim.Optimizer | None, reading: Reading | None
) -> Recording:
    parameters, buffers = tensors_of(model)
    recognised = reading is not None and reading.settings is not None
    return Recording(
        run=run,
        parameters={name: list(tensor.shape) for name, tensor in parameters.items()},
        buffers={name: list(tensor.shape) for name, tensor in buffers.items()},
        optimizer=reading.name if reading else None,
        settings=reading.settings if reading else None,
        lr=base_rate(optimizer) if optimizer is not None else None,
        kind=reading.kind if reading else None,
        exact=reading is None or reading.exact,
        adaptive=OPTIMIZERS[reading.name].adaptive if recognised and reading else None,
        notes=reading.notes if reading else (),
    )


def _checkpoint(
    recording: Recording,
    model: nn.Module,
    step: int,
    optimizer: torch.optim.Optimizer | None,
    reading: Reading | None,
) -> Checkpoint:
    parameters, buffers = tensors_of(model)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in parameters.values())
    state = dict(reading.state) if reading else {}
    lr = rate(optimizer) if optimizer is not None else None
    rates = torch.tensor(
        [torch.nan if lr is None else state.get(RATE, lr)], dtype=torch.float64, device="cpu"
    )
    return Checkpoint(
        pack_id=recording.run,
        step=step,
        seeds=(recording.seed,),
        parameters={name: tensor[None] for name, tensor in parameters.items()},
        buffers={name: tensor[None] for name, tensor in buffers.items()},
        optimizer=state,
        alive=torch.tensor([finite], device="cpu"),
        diverged_at=torch.tensor([-1 if finite else step], device="cpu"),
        initial_loss=torch.tensor([torch.nan], dtype=torch.float64, device="cpu"),
        evaluation={},
        log={"step": torch.tensor([step], device="cpu"), "lr": rates},
        seconds=0.0,
    )


def _write(
    store: Store, before: Recording | None, recording: Recording, checkpoint: Checkpoint, *, overwrite: bool
) -> None:
    run, step = recording.run, checkpoint.step
    path, data = store.checkpoint_path(run, step), dumps(checkpoint)
    if store.exists(path):
        there = store.read_bytes(path)
        if _same(there, data, path):
            return
        if not overwrite:
            raise StoreError(f"{store.url}/{path}: {_difference(there, data, path)}")
    if before is not None:
        _check_same_run(store, before, recording)
    for later in store.checkpoint_steps(run) if overwrite else ():
        if later >= step:
            store.delete(store.checkpoint_path(run, later))
    described = _described(before, recording)
    if described != before:
        store.write_json(recording_path(run), described.plain())
    store.write_bytes(path, data)


def _described(before: Recording | None, now: Recording) -> Recording:
    """The run's description once this checkpoint is there: notes of any of them are its notes."""
    if before is None or (before.optimizer is None and now.optimizer is not None):
        return now
    notes = tuple(dict.fromkeys([*before.notes, *now.notes]))
    return replace(before, notes=notes, kind=before.kind or now.kind) if notes != before.notes else before


def _same(there: bytes, data: bytes, path: str) -> bool:
    """Whether a recorded checkpoint is this one, as an older version wrote it, which kept the raw state."""
    if there == data:
        return True
    old, new = loads(there, name=path), loads(data)
    raw = bool(old.optimizer) and not set(old.optimizer) <= set(ENTRIES)
    return raw and _equal(old.parameters, new.parameters) and _equal(old.buffers, new.buffers)


def _difference(there: bytes, data: bytes, path: str) -> str:
    old, new = loads(there, name=path), loads(data)
    kinds = {"parameters": "weights", "buffers": "buffers", "optimizer": "optimizer state", "log": "lr"}
    differing = [
        word for group, word in kinds.items() if not _equal(getattr(old, group), getattr(new, group))
    ]
    return (
        f"step {new.step} of run {new.pack_id!r} is recorded already, with other "
        f"{' and '.join(differing) or 'content'}: record another trajectory under another name (run=...) or "
        "into another folder, or pass overwrite=True, which drops what the run has from this step on"
    )


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.shape == other[name].shape
        and torch.allclose(tensor, other[name].to(tensor.dtype), rtol=0, atol=0, equal_nan=True)
        for name, tensor in one.items()
    )


def _check_same_run(store: Store, before: Recording, now: Recording) -> None:
    """The checkpoints of a run have the same parameters, and were made by the same optimizer."""
    remedy = f"{store.url} has run {now.run!r} with others: record this one under another name (run=...)"
    for kind in ("parameters", "buffers"):
        old, new = getattr(before, kind), getattr(now, kind)
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if changed:
            name = changed[0]
            new_shape, old_shape = (
                f"{shape}" if shape is not None else "none" for shape in (new.get(name), old.get(name))
            )
            raise StoreError(f"{kind}: found {name} {new_shape}, before {old_shape}; {remedy}")
    if None not in (before.optimizer, now.optimizer) and not _of_one_kind(before, now):
        raise StoreError(f"optimizer: found {now.optimizer}, before {before.optimizer}; {remedy}")


def _of_one_kind(before: Recording, now: Recording) -> bool:
    """Whether both are of one class: what it is called may change, with its momentum or with lossray."""
    same_name = before.optimizer in (now.optimizer, now.kind)
    return same_name if before.kind is None else before.kind == now.kind
