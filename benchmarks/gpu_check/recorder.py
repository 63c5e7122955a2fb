"""What the parts find, as JSON lines: written at once, so that a part that is stopped loses nothing."""

import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = "results.jsonl"
Row = Mapping[str, Any]  # cells by column: text, a number, or the numbers of several repeats


class Recorder:
    """Writes the records of one part.

    Args:
        folder: where the results of all parts go.
        part: its name.
        device: where it measures.
        seconds: after which no other case is begun.
    """

    def __init__(self, folder: Path, part: str, device: torch.device, seconds: float) -> None:
        self.path = folder / RESULTS
        self.part = part
        self.device = device
        self.deadline = time.monotonic() + seconds
        self.failed = False

    @property
    def small(self) -> bool:
        """Whether this is a dry run: everything is run, at sizes that say nothing of speed."""
        return self.device.type == "cpu"

    def row(self, **cells: Any) -> None:
        """One row of the part's table; rows with the same columns make one table."""
        print(" | ".join(str(cell) for cell in cells.values()), flush=True)
        self.write(row=cells)

    def failure(self, text: str) -> None:
        """Something that fails the part."""
        self.failed = True
        self.write(failure=text)

    def require(self, holds: bool, text: str) -> None:
        """A failure of this text unless it ``holds``."""
        if not holds:
            self.failure(text)

    def each(self, cases: Iterable[Any], measure: Callable[[Any], Iterable[Row]]) -> None:
        """The rows of all cases; one that fails does not stop the others, and none begins after the deadline.

        The first cases are the important ones.
        """
        for case in cases:
            if time.monotonic() > self.deadline:
                self.write(left_out=_name(case))
                continue
            try:
                for row in measure(case):
                    self.row(**row)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                self.failure(f"{_name(case)}: {type(error).__name__}: {error}")

    def write(self, **record: Any) -> None:
        """Any record of the part."""
        append(self.path, part=self.part, **record)


def append(path: Path, **record: Any) -> None:
    """One record more."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder."""
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def _name(case: Any) -> str:
    return ", ".join(str(item) for item in case) if isinstance(case, tuple) else str(case)
