import os
import pickle
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from lossray.errors import StoreError
from lossray.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out")


def test_bytes_and_json_round_trip(store):
    store.write_bytes("logs/a.log", b"\x00one")
    store.write_bytes("logs/a.log", b"two")
    store.write_json("progress.json", {"done": 1, "names": ["å"]})
    assert store.read_bytes("logs/a.log") == b"two"
    assert store.read_json("progress.json") == {"done": 1, "names": ["å"]}
    assert store.exists("logs/a.log")
    assert not store.exists("logs")
    assert not store.exists("logs/b.log")


def test_paths_lists_one_folder_and_nothing_temporary(store):
    for path in ("a/2", "a/1", "a/deep/3", "a/.tmp-1", "a/.hidden/4", "ab/5", ".lease.json"):
        store.write_bytes(path, b"")
    assert store.paths("a") == ["a/1", "a/2", "a/deep/3"]
    assert store.paths() == ["a/1", "a/2", "a/deep/3", "ab/5"]
    assert store.paths("nothing") == []


def test_delete_is_idempotent(store):
    store.write_bytes("a/1", b"")
    store.delete("a/1")
    store.delete("a/1")
    assert not store.exists("a/1")
    assert store.paths("a") == []


def test_a_missing_file_is_named(store):
    with pytest.raises(StoreError, match=r"out/nowhere\.json does not exist"):
        store.read_json("nowhere.json")


def test_damaged_json_is_named(store):
    store.write_bytes("manifest.json", b"{")
    with pytest.raises(StoreError, match=r"out/manifest\.json is damaged"):
        store.read_json("manifest.json")


def test_a_store_can_be_sent_to_a_worker(store):
    store.write_bytes("a", b"1")
    other = pickle.loads(pickle.dumps(store))
    assert other.url == store.url
    assert other.read_bytes("a") == b"1"


def test_a_relative_path_is_the_same_store_in_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("out")
    monkeypatch.chdir("/")
    store.write_bytes("a", b"1")
    assert (tmp_path / "out" / "a").read_bytes() == b"1"
    assert store.url == str(tmp_path / "out")
    assert Store(f"file://{tmp_path}/out").url == store.url


def test_an_unknown_protocol_is_refused():
    with pytest.raises(StoreError, match="nosuch"):
        Store("nosuch://bucket/study")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write_bytes("a", b"old")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        store.write_bytes("a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


KILLED_WRITE = """
import os, signal, sys
from lossray.storage.store import Store

def kill(source, target):
    os.kill(os.getpid(), signal.SIGKILL)

os.replace = kill
Store(sys.argv[1]).write_bytes("parts/a", b"new")
"""


def test_a_writer_killed_before_the_rename_leaves_the_old_file_and_a_hidden_one(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("parts/a", b"old")
    done = subprocess.run([sys.executable, "-c", KILLED_WRITE, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert len(os.listdir(tmp_path / "parts")) == 2  # the temporary file was left behind
    assert store.read_bytes("parts/a") == b"old"
    assert store.paths() == ["parts/a"]


def test_a_reader_sees_whole_files_only_while_a_writer_replaces_them(store):
    contents = [bytes([i]) * 200_000 for i in range(20)]
    store.write_bytes("a", contents[0])
    writer = threading.Thread(target=lambda: [store.write_bytes("a", content) for content in contents])
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(store.read_bytes("a"))
        assert store.paths() == ["a"]
    writer.join()
    assert all(content in contents for content in seen)
    assert store.read_bytes("a") == contents[-1]


def test_a_folder_that_cannot_be_listed_is_an_error_not_an_empty_folder(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(f"denied: {path}")

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError):
        Store(str(tmp_path)).paths("parts")


def test_checkpoint_steps_are_numbers_in_order(store):
    for step in (100, 20, 3):
        store.write_bytes(store.checkpoint_path("p", step), b"")
    store.write_bytes(store.checkpoint_path("p2", 7), b"")
    assert store.checkpoint_steps("p") == [3, 20, 100]
    assert Path(store.checkpoint_path("p", 3)).name == "3.safetensors"
