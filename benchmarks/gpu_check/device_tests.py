"""The tests in tests/device, on the real device."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu_check.recorder import Recorder

TITLE = "Tests on the device"
TEXT = "`tests/device`: where the other runs of the tests pretend to have a GPU, these have it."
FOLDER = Path(__file__).resolve().parents[2] / "tests" / "device"
PROCESSES = 4  # on one GPU, where pytest-xdist is there


class Outcomes:
    """A plugin of pytest that records every outcome as it comes."""

    def __init__(self, record: Recorder) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has one outcome: that of its call, or of a set-up or an end that is not as it should be."""
        if report.when != "call" and report.passed:
            return
        self.record.write(outcome=report.outcome)
        if report.failed:
            self.record.failure(f"{report.nodeid} ({report.when})")


def measure(record: Recorder) -> None:
    """Run them."""
    marks = "not cluster" if find_spec("ray") else "not ray and not cluster"
    options = ["-p", "no:cacheprovider", "-m", marks, "-v", "--tb=short"]
    if find_spec("xdist") and (os.cpu_count() or 1) >= 2 * PROCESSES:
        options += ["-n", str(PROCESSES)]
    code = pytest.main([str(FOLDER), *options], plugins=[Outcomes(record)])
    if code and not record.failed:
        record.failure(f"pytest ended with {code!r}")
