"""The ready-made study `quick`, which `make demo` runs: a first look at every table."""

import pytest

import lossray
from flows.study import run_study


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick_has_something_in_every_table(tmp_path):
    out = str(tmp_path / "quick")
    fewer = ("training.steps=300", 'training.checkpoints={count = 3, spacing = "log"}')
    assert run_study("quick", out, overrides=fewer, in_process=True) == 0
    tables = lossray.open_study(out).tables
    assert {name for name, rows in tables.items() if not rows} == set()
