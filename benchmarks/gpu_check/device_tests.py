"""The tests in tests/device, on the real device."""

import os
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu_check.recorder import Recorder
from benchmarks.gpu_check.time_limit import REASON, UNTIL

TITLE = "Tests on the device"
TEXT = "`tests/device`: where the other runs of the tests pretend to have a GPU, these have it."
FOLDER = Path(__file__).resolve().parents[2] / "tests" / "device"
LONGEST = 50  # seconds that a test may take
PROCESSES = 4  # on one GPU, where pytest-xdist is there


class Outcomes:
    """A plugin of pytest that records every outcome as it comes."""

    def __init__(self, record: Recorder) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has one outcome: that of its call, or of a set-up or an end that is not as it should be."""
        if report.when != "call" and report.passed:
            return
        if report.skipped and REASON in str(report.longrepr):
            self.record.write(left_out=report.nodeid)
            return
        self.record.write(outcome=report.outcome)
        if report.failed:
            self.record.failure(f"{report.nodeid} ({report.when})")


def measure(record: Recorder) -> None:
    """Run them."""
    marks = " and ".join(f"not {mark}" for mark in _left_out(record))
    os.environ[UNTIL] = str(time.time() + record.deadline - time.monotonic() - LONGEST)
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.time_limit"]
    options = [*plugins, "-m", marks, "-v", "--tb=short", "--timeout=0"]  # the part has a limit of its own
    if find_spec("xdist") and (os.cpu_count() or 1) >= 2 * PROCESSES:
        options += ["-n", str(PROCESSES)]
    code = pytest.main([str(FOLDER), *options], plugins=[Outcomes(record)])
    if code and not record.failed:
        record.failure(f"pytest ended with {code!r}")


def _left_out(record: Recorder) -> list[str]:
    """Marks of the tests that are not for this machine."""
    return ["cluster", *([] if find_spec("ray") else ["ray"]), *(["slow"] if record.small else [])]
