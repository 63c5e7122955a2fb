"""What a study asks for and does not get, one line for each reason: at planning, in the run, in `claims`."""

from flows.recorded import optimizer_notes
from lossray.storage.recordings import Recording
from lossray.study import Study


def notes_of(study: Study, recordings: tuple[Recording, ...]) -> list[str]:
    """Everything that is not computed, with the reason."""
    return [*study.not_computed(), *optimizer_notes(recordings)]
