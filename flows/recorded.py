"""A study of recorded runs: what of them is not known."""

from collections.abc import Sequence

from lossray.storage.recordings import Recording

SHOWN_RUNS = 4  # that a line names


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
