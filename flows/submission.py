"""A study that is to run as a job: its command, its ids, what its page in the dashboard says."""

import hashlib
import os
import re
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

from lossray import __version__
from lossray.study import LoadedStudy

SUBMITTED_WITH = "LOSSRAY_SUBMITTED_WITH"  # in a job: the version of lossray that sent it


@dataclass(frozen=True)
class Submission:
    """One study that is to be run as a job.

    Attributes:
        loaded: the study, as read here.
        out: its store: a URI, or the absolute path of a folder.
        recompute: as for `lossray run`.
    """

    loaded: LoadedStudy
    out: str
    recompute: bool = False

    @property
    def base_id(self) -> str:
        """What the ids of its jobs begin with: one for each store and name of a study."""
        name = re.sub(r"[^a-z0-9]+", "-", self.loaded.study.name.lower()).strip("-")[:40] or "study"
        return f"lossray-{name}-{hashlib.sha256(self.out.encode()).hexdigest()[:8]}"

    @property
    def entrypoint(self) -> str:
        """The command of the job, in a working directory that is the current one here."""
        loaded = self.loaded
        here = Path.cwd().resolve()
        study = loaded.path.stem if loaded.ready_made else str(loaded.path.resolve().relative_to(here))
        command = ["lossray", "run", study, "--out", self.out]
        for override in loaded.overrides:
            command += ["--set", override]
        return shlex.join([*command, "--recompute"] if self.recompute else command)

    @property
    def metadata(self) -> dict[str, str]:
        """What stands beside the command."""
        return {
            "job_name": self.loaded.study.name,  # which the dashboard shows as the job's name
            "study": self.loaded.study.name,
            "out": self.out,
            "lossray": __version__,
            "submitted_from": socket.gethostname(),
        }

    def owns(self, submission_id: str) -> bool:
        """Whether an id is of this study and store."""
        return re.fullmatch(re.escape(self.base_id) + r"(-\d+)?", submission_id) is not None

    def next_id(self, used: set[str]) -> str:
        """An id that no job has had: Ray refuses one again even after the job's end."""
        ids = [submission_id for submission_id in used if self.owns(submission_id)]
        numbers = [int(one.removeprefix(f"{self.base_id}-")) if one != self.base_id else 1 for one in ids]
        return f"{self.base_id}-{max(numbers) + 1}" if numbers else self.base_id


def version_note() -> list[str]:
    """In a job: a line where another version of lossray has sent it."""
    version = os.environ.get(SUBMITTED_WITH, __version__)
    return [] if version == __version__ else [f"submitted by lossray {version}, run by {__version__}"]
