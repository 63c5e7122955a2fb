"""What a study asks for and does not get, one line for each reason: at planning, in the run, in `claims`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lossray.errors import StoreError
from lossray.storage.recordings import Recording
from lossray.storage.store import Store
from lossray.study import Study

if TYPE_CHECKING:
    from lossray.training.datasets import Dataset

PATH = "notes.json"  # in the store
SHOWN_RUNS = 4  # that a line names


def notes_of(study: Study, dataset: "Dataset", recordings: tuple[Recording, ...]) -> list[str]:
    """Everything that is not computed, with the reason.

    Args:
        study: checked against its data.
        dataset: its data.
        recordings: the recorded runs of its store.
    """
    from lossray.study.absences import absences  # here: it loads torch, which who reads notes does not need

    return [*study.not_computed(), *absences(study, dataset), *optimizer_notes(recordings)]


def keep_notes(store: Store, notes: list[str]) -> None:
    """Write them into the store, for those who read it; nothing where it has the same."""
    if kept_notes(store) != notes:
        store.write_json(PATH, notes)


def kept_notes(store: Store) -> list[str]:
    """Those of the store's last run; none in a store of an older version, or a damaged one."""
    try:
        notes = store.read_json(PATH) if store.exists(PATH) else []
    except StoreError:
        return []
    return [str(note) for note in notes] if isinstance(notes, list) else []


def optimizer_notes(recordings: Sequence[Recording]) -> list[str]:
    """One line for each thing that is not known of the runs' optimizers, with the runs of which it is not."""
    runs: dict[str, list[str]] = {}
    for recording in recordings:
        for note in recording.notes or _older(recording):
            runs.setdefault(note, []).append(recording.run)
    return [f"{_named(names)}: {note}" for note, names in runs.items()]


def _older(recording: Recording) -> tuple[str, ...]:
    """What is not noted where no optimizer was given, or an older version of lossray has recorded."""
    if recording.optimizer is None:
        return ("no optimizer was recorded: no momentum, preconditioner, threshold",)
    if recording.settings is None and recording.kind is None:
        return (f"optimizer {recording.optimizer} is not known: no momentum, preconditioner, threshold",)
    return ()


def _named(runs: Sequence[str]) -> str:
    if len(runs) == 1:
        return f"run {runs[0]}"
    more = len(runs) - SHOWN_RUNS
    return f"runs {', '.join(runs[:SHOWN_RUNS])}" + (f" and {more} more" if more > 0 else "")
