"""A checkpoint as bytes.

Tensor keys are "<group>/<name>", for example "parameters/0.weight", or the field's name alone. The rest is in
the file's header (see `lossray.storage.tensors`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lossray.errors import StoreError
from lossray.storage import tensors as files
from lossray.storage.store import Store

FORMAT = "checkpoint/1"
REMEDY = "delete it and run the study again"  # what is still needed of it is trained again, bit for bit
GROUPS = ("parameters", "buffers", "optimizer", "evaluation", "log", "shadow")
SINGLE = ("alive", "diverged_at", "initial_loss")


@dataclass(frozen=True)
class Checkpoint:
    """A pack of R runs at one step: all that training needs to go on bit by bit, and what it measured.

    Attributes:
        pack_id: the pack.
        step: steps taken.
        seeds: of the R runs.
        parameters: name -> [R, *shape].
        buffers: name -> [R, *shape].
        optimizer: the state of the PackedOptimizer.
        alive: [R] bool.
        diverged_at: [R] int64, -1 where alive.
        initial_loss: [R] float64.
        evaluation: "train_loss", "test_accuracy", ... -> [R] float64; NaN where diverged.
        log: since the checkpoint before: "step" [n] int64, "lr" [n], others [n, R] float64.
        seconds: training time of this segment; the one thing that differs between two executions.
        shadow: "<optimizer>/<entry>" -> its state.
        training_key: key of the training; None: recorded, or from before they carried it.
        versions: of lossray and torch, where it has a key.
    """

    pack_id: str
    step: int
    seeds: tuple[int, ...]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    alive: Tensor
    diverged_at: Tensor
    initial_loss: Tensor
    evaluation: dict[str, Tensor]
    log: dict[str, Tensor]
    seconds: float
    shadow: dict[str, Tensor] = field(default_factory=dict)
    training_key: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def of(self, members: Sequence[int]) -> "Checkpoint":
        """The same of some of the runs, by their indices in the pack."""
        if len(members) == len(self.seeds):
            return self
        index = list(members)

        def chosen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[index] if tensor.ndim else tensor for name, tensor in tensors.items()}

        fields: dict[str, Any] = {name: chosen(getattr(self, name)) for name in GROUPS if name != "log"}
        fields |= chosen({name: getattr(self, name) for name in SINGLE})
        log = {name: tensor[:, index] if tensor.ndim > 1 else tensor for name, tensor in self.log.items()}
        return replace(self, seeds=tuple(self.seeds[r] for r in index), **fields | {"log": log})


def dumps(checkpoint: Checkpoint) -> bytes:
    """The content of a checkpoint file; tensors may be views, of any layout, on any device."""
    groups: dict[str, dict[str, Tensor]] = {name: getattr(checkpoint, name) for name in GROUPS}
    tensors = {
        f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()
    }
    tensors |= {name: getattr(checkpoint, name) for name in SINGLE}
    header = {
        "format": FORMAT,
        "pack_id": checkpoint.pack_id,
        "step": checkpoint.step,
        "seeds": list(checkpoint.seeds),
        "seconds": checkpoint.seconds,
        "names": {group: list(members) for group, members in groups.items()},  # safetensors sorts its tensors
    }
    if checkpoint.training_key is not None:  # of a recorded one: its file is the same for every version
        header |= {"training_key": checkpoint.training_key, "versions": dict(checkpoint.versions)}
    return files.dumps(tensors, header)


def loads(data: bytes, device: str | torch.device = "cpu", *, name: str = "checkpoint") -> Checkpoint:
    """The checkpoint in the content of a file, tensors on `device`, equal bit by bit to those saved.

    Args:
        data: what `dumps` returned.
        device: where to put the tensors.
        name: the file's name, for the error message.

    Raises:
        StoreError: the file is damaged, or is no checkpoint of this version of lossray.
    """
    tensors, header = files.loads(data, FORMAT, name=name, remedy=REMEDY)
    try:
        return _checkpoint(header, {key: tensor.to(device) for key, tensor in tensors.items()})
    except KeyError as error:
        raise StoreError(f"{name} is damaged: {error} is missing; {REMEDY}") from error


def read_checkpoint(store: Store, pack_id: str, step: int, device: str | torch.device = "cpu") -> Checkpoint:
    """The checkpoint of a pack at a step.

    Args:
        store: where it lies.
        pack_id: the pack.
        step: the step.
        device: where to put the tensors.

    Raises:
        StoreError: there is none, or its file is damaged or holds another one.
    """
    path = store.checkpoint_path(pack_id, step)
    checkpoint = loads(store.read_bytes(path), device, name=f"{store.url}/{path}")
    if (checkpoint.pack_id, checkpoint.step) != (pack_id, step):
        raise StoreError(
            f"{store.url}/{path} holds step {checkpoint.step} of pack {checkpoint.pack_id}; {REMEDY}"
        )
    return checkpoint


def _checkpoint(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    fields: dict[str, Any] = {name: tensors[name] for name in SINGLE}
    names = {"shadow": [], **header["names"]}  # files of an older version have no shadows
    for group in GROUPS:
        fields[group] = {name: tensors[f"{group}/{name}"] for name in names[group]}
    return Checkpoint(
        pack_id=header["pack_id"],
        step=header["step"],
        seeds=tuple(header["seeds"]),
        seconds=header["seconds"],
        training_key=header.get("training_key"),
        versions=header.get("versions", {}),
        **fields,
    )
