import sys

import pytest


@pytest.fixture(autouse=True)
def _own_import_path(monkeypatch):
    """`load_study` appends the folders of a study to sys.path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
