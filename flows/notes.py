"""What a study asks for and does not get, one line for each reason: at planning, in the run, in `claims`."""

from flows.recorded import optimizer_notes
from lossray.errors import StoreError
from lossray.storage.recordings import Recording
from lossray.storage.store import Store
from lossray.study import Study
from lossray.study.absences import absences
from lossray.training.datasets import Dataset

PATH = "notes.json"  # in the store


def notes_of(study: Study, dataset: Dataset, recordings: tuple[Recording, ...]) -> list[str]:
    """Everything that is not computed, with the reason.

    Args:
        study: checked against its data.
        dataset: its data.
        recordings: the recorded runs of its store.
    """
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
