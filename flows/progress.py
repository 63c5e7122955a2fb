"""How far a study is: a display in the terminal (plain lines elsewhere), and OUT/progress.json."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lossray.storage.store import Store

PUBLISH_SECONDS = 2.0  # between two versions of progress.json
LINE_SECONDS = 10.0  # between two plain lines


@dataclass
class Counts:
    """What there is to do and what is done; resumed work counts as done from the start.

    Attributes:
        runs: to be trained.
        runs_done: of them, those that diverged included.
        runs_diverged: of those.
        runs_failed: of them.
        checkpoints: of packs, to be trained.
        checkpoints_trained: of them.
        to_analyse: checkpoints that are to be analysed; not all where rates are tuned.
        checkpoints_analysed: of them.
        checkpoints_failed: of them.
        pairs: of neighbouring checkpoints, to be compared.
        pairs_done: of them.
        pairs_failed: of them.
        further: other jobs, such as degeneracy, trajectories, surfaces.
        further_done: of them.
        further_failed: of them.
        units: checkpoints trained and analysed, pairs compared, and the other jobs: the measure of the time
            left.
        units_done: of them.
    """

    runs: int = 0
    runs_done: int = 0
    runs_diverged: int = 0
    runs_failed: int = 0
    checkpoints: int = 0
    checkpoints_trained: int = 0
    to_analyse: int = 0
    checkpoints_analysed: int = 0
    checkpoints_failed: int = 0
    pairs: int = 0
    pairs_done: int = 0
    pairs_failed: int = 0
    further: int = 0
    further_done: int = 0
    further_failed: int = 0
    units: int = 0
    units_done: int = 0


@dataclass
class Progress:
    """Shows and publishes the counts.

    Attributes:
        store: whose progress.json is written.
        counts: mutated by the driver, then shown by `refresh`.
        running: names what runs at this moment.
        state: such as "running", for display and file.
        waiting: what the study waits for; empty while it works.
        waited: seconds for which nothing could run; they do not count in the rate.
        started: when, on the monotonic clock.
        listener: hears what is published.
    """

    store: Store
    counts: Counts
    running: Callable[[], list[str]] = list
    state: str = "starting"
    waiting: str = ""
    waited: float = 0.0
    started: float = field(default_factory=time.monotonic)
    listener: Callable[[dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        """Choose the display: live in a terminal, lines elsewhere."""
        self._console = Console(file=sys.stderr)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._units_before = self.counts.units_done
        self._published = -PUBLISH_SECONDS
        self._printed = -LINE_SECONDS
        self._line = ""

    def __enter__(self) -> "Progress":
        """Start the display."""
        if self._live:
            self._live.start()
        self.refresh(force=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Show and publish the last state, and give the terminal back."""
        if error is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            self.state = "interrupted" if stopped else f"failed: {' '.join(str(error).split())}"
        self.refresh(force=True)
        if self._live:
            self._live.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since this driver started."""
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        """Print one line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def wait_for(self, text: str, seconds: float) -> None:
        """What is waited for now, shown at once where it is new, and for how long it was waited so far."""
        new = text != self.waiting
        self.waiting, self.waited = text, seconds
        if new:
            self.refresh(force=True)

    def refresh(self, *, force: bool = False) -> None:
        """Show the counts, and publish them where the last version is old enough."""
        now = time.monotonic()
        if force or now - self._published >= PUBLISH_SECONDS:
            self._published = now
            snapshot = self.snapshot()
            self.store.write_json("progress.json", snapshot)
            if self.listener is not None:
                self.listener(snapshot)
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif (force or now - self._printed >= LINE_SECONDS) and self._text() != self._line:
            self._printed = now
            self._line = self._text()
            self.note(self._line)

    def snapshot(self) -> dict[str, Any]:
        """What progress.json holds."""
        return {
            "state": self.state,
            **asdict(self.counts),
            "units_per_minute": self._rate(),
            "seconds_left": self._seconds_left(),
            "elapsed_seconds": round(self.elapsed, 1),
            "waited_seconds": round(self.waited, 1),
            "waiting": self.waiting,
            "running": self.running(),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _rate(self) -> float | None:
        """Units per minute since this driver started, while something could run; None before the first."""
        done, working = self.counts.units_done - self._units_before, self.elapsed - self.waited
        return round(60 * done / working, 2) if done and working > 0 else None

    def _seconds_left(self) -> float | None:
        rate = self._rate()
        return round(60 * (self.counts.units - self.counts.units_done) / rate, 1) if rate else None

    def _text(self) -> str:
        c = self.counts
        failed = f", {c.runs_failed} failed" if c.runs_failed else ""
        rate, left = self._rate(), self._seconds_left()
        return (
            (f"{self.waiting}; " if self.waiting else "")
            + f"{self.state}: runs {c.runs_done}/{c.runs}{failed}; "
            f"checkpoints trained {c.checkpoints_trained}/{c.checkpoints}"
            + (f", analysed {c.checkpoints_analysed}/{c.to_analyse}" if c.to_analyse else "")
            + (f", pairs compared {c.pairs_done}/{c.pairs}" if c.pairs else "")
            + (f", further analyses {c.further_done}/{c.further}" if c.further else "")
            + (f"; {rate:.0f} a minute" if rate else "")
            + (f"; about {duration(left)} left" if left else "")
        )

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_row(self._text())
        for name in self.running()[:8]:
            table.add_row(f"  {name}", style="dim")
        return table


def duration(seconds: float) -> str:
    """Seconds for a reader: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
