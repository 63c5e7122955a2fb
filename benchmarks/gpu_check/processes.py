"""A process with a time limit, and the end of all that it has started."""

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

ROOT = Path(__file__).resolve().parents[2]


def run_limited(command: Sequence[str], seconds: float, log: BinaryIO) -> str:
    """Run it in the repository's root; what it says goes into ``log``.

    Returns:
        "passed", "failed with code N", or "stopped" where it took too long.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:
        _end(process)
    return f"failed with code {code}" if code else "passed"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and its descendants, unless it has ended."""
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()
