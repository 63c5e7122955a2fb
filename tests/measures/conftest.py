"""Measures are tested on the small study of the tasks."""

from tests.tasks.conftest import planned, planned_once

__all__ = ["planned", "planned_once"]
