import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from lossray.errors import StoreError
from lossray.storage import lease
from lossray.storage.lease import Lease, read_holder
from lossray.storage.store import Store

HOLD = """
import sys, time
from lossray.storage.lease import Lease
from lossray.storage.store import Store

with Lease(Store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

# Waits for the starting shot, then tries once, with a long time between its look at the lease and its write.
TRY = """
import sys, time
from lossray.errors import StoreError
from lossray.storage import lease
from lossray.storage.lease import Lease
from lossray.storage.store import Store

look = lease.is_free

def look_slowly(*args):
    free = look(*args)
    time.sleep(0.2)
    return free

lease.is_free = look_slowly
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lease(store):
        print("won", flush=True)
        sys.stdin.readline()
except StoreError:
    print("lost", flush=True)
"""


def start(code, store):
    return subprocess.Popen(
        [sys.executable, "-c", code, store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "out"))


@pytest.fixture
def elsewhere(store):
    """The lease of a process on another machine; its heartbeat is `age` seconds old."""

    def write(age):
        with Lease(store):
            mine = read_holder(store)
        then = time.time() - age
        other = dataclasses.replace(
            mine, host="other.host", pid=7, token="theirs", since=then, heartbeat=then
        )
        store.write_json(lease.PATH, dataclasses.asdict(other))

    return write


def test_the_lease_names_its_process_and_goes_when_it_is_given_back(store):
    with Lease(store):
        holder = read_holder(store)
        assert holder.pid == os.getpid()
        assert holder.process_started == pytest.approx(psutil.Process().create_time(), abs=1)
        assert store.paths() == []  # nothing that a listing shows
    assert read_holder(store) is None
    with Lease(store):
        pass


def test_the_lease_is_given_back_after_an_error(store):
    with pytest.raises(ZeroDivisionError), Lease(store):
        raise ZeroDivisionError
    assert read_holder(store) is None


@pytest.mark.parametrize("url", ["local", "memory"])
def test_a_second_driver_in_this_process_is_refused(url, store, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    store = store if url == "local" else Store(f"memory://{uuid.uuid4().hex}/out")
    with Lease(store):
        before = read_holder(store)
        with (
            pytest.raises(StoreError, match=f"in use by another driver: process {os.getpid()} on"),
            Lease(store),
        ):
            pass
        assert read_holder(store) == before
    assert read_holder(store) is None


def test_another_process_is_refused_while_the_holder_lives_and_served_once_it_is_killed(store):
    process = start(HOLD, store)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=rf"process {process.pid} on \S+, since 20.* UTC\. Wait for it"):
            Lease(store).__enter__()
    finally:
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.2)  # not waited for: a zombie is dead too
    with Lease(store):
        assert read_holder(store).pid == os.getpid()
    process.communicate()


def test_a_process_id_that_was_used_again_does_not_hold_the_lease(store):
    with Lease(store):
        holder = read_holder(store)
    old = dataclasses.replace(holder, token="old", process_started=holder.process_started - 1000)
    store.write_json(lease.PATH, dataclasses.asdict(old))
    with Lease(store):
        assert read_holder(store).token != "old"


def test_of_many_drivers_that_find_a_dead_lease_exactly_one_wins(store):
    process = start(HOLD, store)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert read_holder(store) is not None
    rivals = [start(TRY, store) for _ in range(4)]
    try:
        for rival in rivals:
            assert rival.stdout.readline() == "ready\n"
        for rival in rivals:
            rival.stdin.write("go\n")
            rival.stdin.flush()
        results = [rival.stdout.readline() for rival in rivals]
    finally:
        for rival in rivals:
            rival.communicate("end\n")
    assert sorted(results) == ["lost\n"] * 3 + ["won\n"]
    assert read_holder(store) is None


def test_another_machine_is_believed_while_its_heartbeat_is_recent(store, elsewhere):
    elsewhere(age=50)
    with (
        pytest.raises(StoreError, match=r"process 7 on other\.host.*60 seconds after its last heartbeat"),
        Lease(store),
    ):
        pass
    assert read_holder(store).token == "theirs"


def test_another_machine_has_lost_the_lease_when_its_heartbeat_stopped(store, elsewhere):
    elsewhere(age=70)
    with Lease(store):
        assert read_holder(store).pid == os.getpid()


def test_the_heartbeat_is_renewed(store):
    with Lease(store, interval=0.01):
        first = read_holder(store)
        deadline = time.time() + 10
        while read_holder(store).heartbeat == first.heartbeat and time.time() < deadline:
            time.sleep(0.01)
        last = read_holder(store)
    assert last.heartbeat > first.heartbeat
    assert dataclasses.replace(last, heartbeat=0) == dataclasses.replace(first, heartbeat=0)


def test_a_driver_whose_lease_was_taken_over_notices_and_leaves_it_alone(store, elsewhere):
    with Lease(store, interval=0.01) as mine:
        mine.check()
        theirs = dataclasses.replace(read_holder(store), host="other.host", token="theirs")
        store.write_json(lease.PATH, dataclasses.asdict(theirs))
        deadline = time.time() + 10
        while not mine.lost and time.time() < deadline:
            time.sleep(0.01)
        with pytest.raises(StoreError, match=r"lost store .*other\.host"):
            mine.check()
    assert read_holder(store) == theirs


def test_a_failing_heartbeat_does_not_stop_the_study(store, monkeypatch):
    with Lease(store, interval=0.01) as mine:
        failures = []

        def full(path, value):
            failures.append(path)
            raise OSError("disk full")

        monkeypatch.setattr(store, "write_json", full)
        while len(failures) < 3:
            time.sleep(0.01)
        monkeypatch.undo()
        mine.check()
    assert read_holder(store) is None


def test_a_damaged_lease_is_named_with_the_remedy(store):
    store.write_bytes(lease.PATH, json.dumps({"host": "x"}).encode())
    with pytest.raises(StoreError, match=r"\.lease\.json is damaged.*delete it"), Lease(store):
        pass


def test_of_two_drivers_on_an_object_store_the_last_writer_keeps_it(monkeypatch):
    store = Store(f"memory://{uuid.uuid4().hex}/out")

    def rival_writes(seconds):
        theirs = dataclasses.replace(read_holder(store), host="other.host", token="theirs")
        store.write_json(lease.PATH, dataclasses.asdict(theirs))

    monkeypatch.setattr(lease.time, "sleep", rival_writes)
    with pytest.raises(StoreError, match=r"other\.host"), Lease(store):
        pass
    assert read_holder(store).token == "theirs"
