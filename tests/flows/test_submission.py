"""A study as a job: ids that stand for a store, a command that does here what it does there."""

import shlex

import pytest

from flows import submission
from flows.submission import Submission
from lossray.study import load_study

OUT = "s3://bucket/study"


@pytest.fixture
def submitted(study_file, monkeypatch, tmp_path):
    """``submitted(out=..., overrides=..., **changes)``: the small study, from the folder above its own."""

    def make(*, out=OUT, overrides=(), recompute=False, **changes):
        path = study_file(**changes)
        monkeypatch.chdir(tmp_path)
        return Submission(load_study(path, overrides), out, recompute)

    return make


def test_an_id_is_of_the_store_and_readable(submitted):
    first = submitted().base_id
    assert first.startswith("lossray-small-")
    assert submitted(overrides=["seeds=5"]).base_id == first  # a study that grows is still one study
    assert submitted(out=f"{OUT}2").base_id != first


@pytest.mark.parametrize(
    ("name", "slug"),
    [("My own: study", "my-own-study"), ("übung", "bung"), ("研究", "study"), ("x" * 99, "x" * 40)],
)
def test_any_name_of_a_study_makes_an_id(submitted, name, slug):
    assert submitted(name=name).base_id.rpartition("-")[0] == f"lossray-{slug}"


def test_no_id_is_used_twice(submitted):
    study = submitted()
    base, used = study.base_id, set()
    for expected in (base, f"{base}-2", f"{base}-3"):
        assert study.next_id(used) == expected
        used.add(expected)
    assert study.next_id({f"{base}-7", "raysubmit_abc", f"{base}x", f"{base}-a"}) == f"{base}-8"


def test_the_command_names_the_study_from_the_working_directory(submitted):
    study = submitted(file="a study.toml", overrides=["name=it's", "seeds=[0, 1]"], recompute=True)
    assert shlex.split(study.entrypoint) == [
        *("lossray", "run", "studies/a study.toml", "--out", OUT),
        *("--set", "name=it's", "--set", "seeds=[0, 1]", "--recompute"),
    ]


def test_a_ready_made_study_goes_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Submission(load_study("quick"), OUT).entrypoint == f"lossray run quick --out {OUT}"


def test_metadata_are_what_the_job_server_takes(submitted):
    metadata = submitted().metadata
    assert metadata["out"] == OUT
    assert metadata["study"] == metadata["job_name"] == "small"
    assert all(isinstance(value, str) for value in metadata.values())


def test_a_job_says_that_another_version_has_sent_it(monkeypatch):
    assert submission.version_note() == []
    monkeypatch.setenv(submission.SUBMITTED_WITH, "0.0.7")
    assert "0.0.7" in submission.version_note()[0]
