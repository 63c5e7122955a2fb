"""Places and addresses that cannot be: one line each, and nothing is written."""

import pytest
import ray

from flows.listing import list_tables
from flows.session import ray_session
from flows.study import run_study
from flows.verdicts import describe as claims
from lossray.errors import StoreError, StudyError


@pytest.mark.parametrize("read", [claims, list_tables])
def test_a_file_is_no_store(tmp_path, read):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file is no store of a study: Not a directory"):
        read(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("place", "says"),
    [("/proc/lossray", "cannot be written"), ("/dev/null", "cannot be a store: Not a directory")],
)
def test_a_place_that_takes_no_files_is_refused_before_the_run(study_file, place, says):
    with pytest.raises(StoreError, match=rf"^--out {place}: {says}"):
        run_study(study_file(seeds=1), place, in_process=True)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:8265", "found the address of a dashboard, which takes jobs"),
        ("HTTPS://head", "found the address of a dashboard, which takes jobs"),
        ("ray://head:10001", "found a Ray Client address"),
        ("tcp://head:1", "found a tcp address"),
    ],
)
def test_an_address_that_is_no_head_is_refused_at_once(monkeypatch, address, says):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **options: pytest.fail("tried"))
    with pytest.raises(StudyError, match=f"^--address {address}: {says}; allowed: `auto`, or HOST:PORT"):
        ray_session(address, []).__enter__()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(StudyError, match=f"^RAY_ADDRESS={address}: {says}; .*; or unset RAY_ADDRESS"):
        ray_session(None, []).__enter__()
