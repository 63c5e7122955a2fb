"""The check of a GPU: what it makes of its records, how it stops, and that it needs neither Ray nor peers."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import benchmarks.report
from benchmarks.gpu_check import check, document, requirements, time_limit
from benchmarks.gpu_check.device_tests import Outcomes
from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.processes import run_limited
from benchmarks.gpu_check.recorder import Recorder, append, read

CPU = torch.device("cpu")
PROGRAM = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def records_of(folder, *, device="cuda", ends=("passed", "passed")):
    """Of a check of two parts; the second has a table, a case left out, and a failure."""
    append(folder / "results.jsonl", device=device, parts=["machine", "packs"], not_installed=["ray is not"])
    append(folder / "results.jsonl", part="machine", machine="a machine")
    record = Recorder(folder, "packs", CPU, 60)
    record.row(model="mlp", seconds=[3.0, 1.0, 2000.0], difference=1e-7)
    record.write(left_out="cnn, 256")
    record.failure("mlp, 4: a | b")
    for part, end in zip(("machine", "packs"), ends, strict=False):
        append(folder / "results.jsonl", part=part, end=end, seconds=1.0)
    return read(folder)


def measure(case):
    """Cases below zero fail, in one of two ways."""
    yield {"case": case}
    if case == -1:
        raise ValueError("wrong")
    if case == -2:
        raise SystemExit("differs")


def test_the_whole_check_is_below_eight_minutes():
    assert sum(part.limit("cuda") for part in PARTS.values()) < 480


@pytest.mark.parametrize("name", PARTS)
def test_every_part_can_be_shown_without_ray_and_peers(name, monkeypatch):
    for missing in ("ray", "pyhessian", "hessian_eigenthings", "curvlinops"):
        monkeypatch.setitem(sys.modules, missing, None)
    for module in [module for module in sys.modules if module.startswith("benchmarks.gpu_check.")]:
        monkeypatch.delitem(sys.modules, module)
    module = importlib.import_module(f"benchmarks.gpu_check.{name}")
    assert module.TITLE
    assert module.TEXT
    assert callable(module.measure)


def test_a_case_that_fails_stops_no_other(tmp_path):
    record = Recorder(tmp_path, "packs", CPU, 60)
    record.each([-1, 1, -2, 2], measure)
    records = read(tmp_path)
    assert [line["row"]["case"] for line in records if "row" in line] == [-1, 1, -2, 2]
    failures = [line["failure"] for line in records if "failure" in line]
    assert failures == ["-1: ValueError: wrong", "-2: SystemExit: differs"]
    assert record.failed


def test_no_case_begins_after_the_deadline(tmp_path):
    record = Recorder(tmp_path, "packs", CPU, -1)
    record.each([("mlp", 4), -1], measure)
    assert [line["left_out"] for line in read(tmp_path)] == ["mlp, 4", "-1"]
    assert not record.failed


def test_a_part_that_takes_too_long_ends_with_all_that_it_started(tmp_path, helpers):
    import psutil

    with (tmp_path / "log").open("wb") as log:
        assert run_limited([sys.executable, "-c", PROGRAM], 3, log) == "stopped"
        assert run_limited([sys.executable, "-c", "raise SystemExit(3)"], 60, log) == "failed with code 3"
        assert run_limited([sys.executable, "-c", ""], 60, log) == "passed"
    child = int((tmp_path / "log").read_text())
    assert not psutil.pid_exists(child) or not helpers.running([psutil.Process(child)])


def test_what_did_not_pass_is_named_and_so_is_what_never_began(tmp_path):
    records = records_of(tmp_path, ends=("passed", "stopped"))
    assert document.failed(records) == ["packs"]
    assert document.failed(records[:-1]) == ["packs"]
    assert document.failed(records[:1]) == ["machine", "packs"]


def test_records_become_a_section(tmp_path):
    text = document.body(records_of(tmp_path))
    assert "| mlp | 3 (1 to 2,000) | 1e-07 |" in text
    assert "Left out for lack of time:\n\n- cnn, 256" in text
    assert "Failed:\n\n- mlp, 4: a | b" in text
    assert "- ray is not" in text


def test_results_of_a_gpu_replace_their_section_alone(tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- packs -->\n## Packs\n<!-- /packs -->\n")
    monkeypatch.setattr(benchmarks.report, "DOCUMENT", page)
    records_of(tmp_path)
    for _ in range(2):
        assert check.write(tmp_path) == 0
        assert page.read_text().count("`make gpu-check` on a machine.") == 1
    assert "## Packs\n" in page.read_text()


def test_a_dry_run_is_put_into_no_document(tmp_path, monkeypatch, capsys):
    page = tmp_path / "benchmarks.md"
    monkeypatch.setattr(benchmarks.report, "DOCUMENT", page)
    records = records_of(tmp_path, device="cpu")
    assert check.write(tmp_path) == 2
    assert "a dry run" in capsys.readouterr().out
    assert not page.exists()
    assert document.dry_section(records).startswith("## Dry run")


def test_without_a_gpu_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.run_all("cuda", tmp_path / "out", list(PARTS)) == 2
    assert "DEVICE=cpu" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_a_line_each(monkeypatch):
    assert requirements.lacking() == []
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in ("pydantic", "ray") else name)
    (line,) = requirements.lacking()
    assert line.startswith("pydantic is missing: ")
    assert requirements.left_out() == ["ray is not installed: the study runs in one process"]


def test_no_test_begins_past_the_moment(monkeypatch):
    monkeypatch.setenv(time_limit.UNTIL, "0")
    with pytest.raises(pytest.skip.Exception, match=time_limit.REASON):
        time_limit.pytest_runtest_setup(None)
    monkeypatch.setenv(time_limit.UNTIL, "inf")
    time_limit.pytest_runtest_setup(None)


def test_a_test_has_one_outcome(tmp_path):
    record = Recorder(tmp_path, "device_tests", CPU, 60)
    reports = [
        ("setup", "passed", ""),
        ("call", "passed", ""),
        ("teardown", "passed", ""),
        ("setup", "skipped", f"Skipped: {time_limit.REASON}"),
        ("setup", "failed", "an error"),
    ]
    for when, outcome, text in reports:
        flags = {name: name == outcome for name in ("passed", "skipped", "failed")}
        report = SimpleNamespace(nodeid="t", when=when, outcome=outcome, longrepr=text, **flags)
        Outcomes(record).pytest_runtest_logreport(report)
    ends = [{"part": "device_tests", "end": "passed", "seconds": 1.0}]
    assert "| 1 passed, 1 failed, 1 left out for lack of time |" in document.summary(read(tmp_path) + ends)
    assert [line["failure"] for line in read(tmp_path) if "failure" in line] == ["t (setup)"]
