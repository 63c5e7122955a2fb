"""A plugin of pytest, for pytest-xdist's workers too: slow tests come last, and none begins past a moment."""

import os
import time

import pytest

UNTIL = "LOSSRAY_GPU_CHECK_UNTIL"  # in the environment: the moment, as `time.time()` has it
REASON = "no time left"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The sort is stable."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture."""
    if time.time() > float(os.environ[UNTIL]):
        pytest.skip(REASON)
