"""Ctrl-C and SIGTERM: the first asks the driver to drain, the second ends at once."""

import signal
import threading
from types import FrameType
from typing import Any

DRAIN_SECONDS = {signal.SIGINT: 10.0, signal.SIGTERM: 2.0}  # `ray job stop` kills 3 seconds after SIGTERM


class Interrupt:
    """A flag that signals set; the driver looks at it between its calls to Ray.

    Use it as a context manager, entered after ``ray.init``, which installs a SIGTERM handler of its own.
    Outside the main thread, where Python takes no signal handlers, it never fires.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in DRAIN_SECONDS}
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the handlers found."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def drain_seconds(self) -> float:
        """How long work in flight may take to finish."""
        return DRAIN_SECONDS[self.received] if self.received else 0.0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
