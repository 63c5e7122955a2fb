"""Recorded runs: trajectories whose checkpoints somebody's own training script has put into a store.

OUT/checkpoints/<run>/<step>.safetensors are ordinary checkpoints of one member; OUT/recorded/<run>.json says
what they have in common. What is on disk *is* the recording: a checkpoint that is deleted is not part of it.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lossray.errors import StoreError
from lossray.seeds import stream
from lossray.storage.files import keyed
from lossray.storage.store import Store

FOLDER = "recorded"
FORMAT = "recording/2"
READABLE = ("recording/1", FORMAT)  # the first had no `kind`, `exact`, `adaptive` and `notes`


@dataclass(frozen=True)
class Recording:
    """What the checkpoints of one recorded run have in common.

    Attributes:
        run: its name, which is its run_id.
        parameters: shapes of the trainable parameters, in the order of a stack.
        buffers: shapes of the buffers and the frozen parameters.
        optimizer: its name, or that of its class where lossray does not know it; None: not given.
        settings: what decides its step but for rate and schedule, if known.
        lr: learning rate before any schedule, at the first checkpoint; None where groups differ.
        steps: step -> sha256 of the checkpoint's content.
        kind: the optimizer's class.
        exact: whether `settings` are those of an optimizer that a study file can name.
        adaptive: see `OptimizerEntry`.
        notes: what of the optimizer is not known, one line each.
    """

    run: str
    parameters: Mapping[str, list[int]]
    buffers: Mapping[str, list[int]]
    optimizer: str | None
    settings: Mapping[str, Any] | None
    lr: float | None
    steps: Mapping[int, str] = field(default_factory=dict)
    kind: str | None = None
    exact: bool = True
    adaptive: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Names the random vectors of the run's analysis; of the seed of its training nothing is known."""
        return stream(0, f"recorded/{self.run}")

    def plain(self) -> dict[str, Any]:
        """As JSON-compatible values, without the steps."""
        fields = dataclasses.asdict(self)
        del fields["steps"]
        return {"format": FORMAT, **fields}


def recording_path(run: str) -> str:
    """Where a run's description lies, relative to the store."""
    return f"{FOLDER}/{run}.json"


def read_recording(store: Store, run: str) -> Recording | None:
    """The description of one run, without its steps; None where it was never recorded.

    Raises:
        StoreError: its file is damaged.
    """
    path = recording_path(run)
    if not store.exists(path):
        return None
    where, plain = f"{store.url}/{path}", store.read_json(path)
    if not isinstance(plain, dict) or plain.get("format") not in READABLE:
        raise StoreError(f"{where} is no recording of this version of lossray, {FORMAT}: record the run anew")
    try:
        fields = {key: value for key, value in plain.items() if key != "format"}
        return Recording(**fields | {"notes": tuple(fields.get("notes", ()))})
    except TypeError as error:
        raise StoreError(f"{where} is damaged: {error}; record the run anew") from error


def read_recordings(store: Store) -> tuple[Recording, ...]:
    """Every run that has a checkpoint, by name, with the hashes of its checkpoints: all files are read.

    Raises:
        StoreError: a description is damaged.
    """
    descriptions = [read_recording(store, run) for run in sorted(keyed(store.paths(FOLDER)))]
    complete = [
        dataclasses.replace(recording, steps=_content(store, recording.run))
        for recording in descriptions
        if recording
    ]
    return tuple(recording for recording in complete if recording.steps)


def _content(store: Store, run: str) -> dict[int, str]:
    paths = {step: store.checkpoint_path(run, step) for step in store.checkpoint_steps(run)}
    return {step: hashlib.sha256(store.read_bytes(path)).hexdigest() for step, path in paths.items()}
