"""Measures are tested on the small study of the tasks."""

import sys

import pytest

import flows
from tests.tasks.conftest import planned, planned_once

__all__ = ["planned", "planned_once"]


@pytest.fixture(scope="session")
def charted(study_path, tmp_path_factory):
    """The store of the small study with trajectories and surfaces, without Ray."""
    folder = tmp_path_factory.mktemp("charted")
    path = folder / "charted.toml"
    text = study_path.read_text().replace("seeds = 2", "seeds = 1")
    path.write_text(f"{text}\n[trajectory]\n\n[surfaces]\npoints = 5\n\n[angles]\nwindow = 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        assert flows.run(path, folder / "out", in_process=True) == 0
    return folder / "out"
