"""Following a job: its log as it grows, over lost connections, to the job's end."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp

SILENT_SECONDS = 30.0  # without a line of the log: look whether job and connection are still there
RETRY_SECONDS = 2.0
LOST_SECONDS = 600.0  # without an answer: give up
INTERRUPTED = 130


class JobLog:
    """The log of one job, each part of it written once.

    Attributes:
        printed: characters written so far; a connection that is made anew starts at the log's beginning.
    """

    def __init__(
        self, client: Any, submission_id: str, *, write: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        """Nothing is read yet.

        Args:
            client: Ray's client of the job server.
            submission_id: of the job.
            write: takes parts of the log.
            say: takes a line about the job.
        """
        self.printed = 0
        self._client, self._id, self._write, self._say = client, submission_id, write, say
        self._answered = time.monotonic()
        self._lost = self._told_waiting = False

    def follow(self) -> Any:
        """Write the log until the job has ended; the job's details.

        Raises:
            ConnectionError: the cluster answers no longer, or no longer knows the job.
        """
        while True:
            try:
                self._read()
                job = self._client.get_job_info(self._id)
            except (OSError, RuntimeError) as error:
                self._note_lost(error)
                time.sleep(RETRY_SECONDS)
                continue
            self._note_answer(job)
            if job.status.is_terminal():
                return job

    def _read(self) -> None:
        """Write what is new, as it comes; where a proxy lets no stream through, what there is by now."""
        try:
            asyncio.run(self._stream())
        except (OSError, RuntimeError, aiohttp.ClientError):
            time.sleep(RETRY_SECONDS)
            self._show(self._client.get_job_logs(self._id), start=0)

    async def _stream(self) -> None:
        start = 0
        parts = self._client.tail_job_logs(self._id)
        while True:
            try:
                text = await asyncio.wait_for(anext(parts), SILENT_SECONDS)
            except (StopAsyncIteration, TimeoutError):
                return
            self._show(text, start=start)
            start += len(text)

    def _show(self, text: str, *, start: int) -> None:
        """Write what is new in a part that begins at a character of the log."""
        if new := text[max(0, self.printed - start) :]:
            self._write(new)
            self.printed = start + len(text)

    def _note_lost(self, error: Exception) -> None:
        if "does not exist" in str(error):
            raise ConnectionError(
                f"the cluster no longer knows job {self._id}: its head is a new one"
            ) from error
        if time.monotonic() - self._answered > LOST_SECONDS:
            raise ConnectionError(
                f"no answer from the cluster for {LOST_SECONDS:g} seconds: {error}"
            ) from error
        if not self._lost:
            self._say("the connection to the cluster is lost; trying again")
        self._lost = True

    def _note_answer(self, job: Any) -> None:
        if self._lost:
            self._say("connected again")
        self._answered, self._lost = time.monotonic(), False
        if job.status.name == "PENDING" and not self._told_waiting:
            self._say("the job is PENDING: it waits for a node with room for its driver")
            self._told_waiting = True


def exit_code(job: Any) -> int:
    """The exit code of an ended job's command; 130 of a stopped job, 1 where the command has none."""
    code = job.driver_exit_code
    if code is None:
        return INTERRUPTED if job.status.name == "STOPPED" else 1
    return int(code) if code >= 0 else 128 - int(code)  # ended by a signal: as a shell gives it
