"""The lease of a store: one driver at a time.

OUT/.lease.json says who drives the study: host, process, and a heartbeat that a thread renews. The lease of a
process that has died on this machine is free at once. Of a process on another machine nothing is known but
its heartbeat, so its lease is free when that has been silent for `silence` seconds (the machines' clocks must
agree to well below that).

On a local or shared file system every look at the lease and every change to it happens under a file lock, so
of two drivers that find the same dead lease one wins. The system drops that lock when its holder dies. Object
stores have no locks: there a driver writes the lease, waits a moment and keeps it if it is still its own.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from types import TracebackType

import psutil

from lossray.errors import StoreError
from lossray.storage.files import LocalFiles
from lossray.storage.store import Store

PATH = ".lease.json"
LOCK = ".lease.lock"
SETTLE_SECONDS = 1.0  # on an object store: longer than the time between another driver's look and its write


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        host: name of the machine.
        boot_id: tells machines of one name apart; empty where the system has none.
        pid: process id.
        process_started: seconds since the epoch: a process id may be used again.
        token: of this lease, not of its process: one process may want two.
        since: seconds since the epoch.
        heartbeat: the last one, in seconds since the epoch.
    """

    host: str
    boot_id: str
    pid: int
    process_started: float
    token: str
    since: float
    heartbeat: float

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(self.since, datetime.UTC)
        return f"process {self.pid} on {self.host}, since {since:%Y-%m-%d %H:%M:%S} UTC"


def read_holder(store: Store) -> Holder | None:
    """Who holds the lease of a store, dead or alive; None where nobody does.

    Raises:
        StoreError: the lease file is damaged.
    """
    try:
        return Holder(**json.loads(store.files.read(PATH)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{store.url}/{PATH} is damaged ({error}): delete it if no driver works on this store"
        ) from error


def is_free(holder: Holder | None, silence: float) -> bool:
    """Whether a lease can be taken: nobody has it, its process is dead, or its heartbeat has stopped."""
    if holder is None:
        return True
    if (holder.host, holder.boot_id) == (socket.gethostname(), _boot_id()):
        return not _process_alive(holder)
    return time.time() - holder.heartbeat > silence


class Lease:
    """``with Lease(store): ...`` keeps other drivers off the store while the block runs."""

    def __init__(self, store: Store, *, silence: float = 60.0, interval: float = 10.0):
        """Prepare a lease; entering the context takes it.

        Args:
            store: the store to drive.
            silence: seconds without a heartbeat after which another machine's lease is free.
            interval: seconds between heartbeats.
        """
        self.store = store
        self.silence = silence
        self.interval = interval
        self.lost = False  # whether another driver has taken the lease over
        self._stop = threading.Event()

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            StoreError: another driver has it, naming who, since when, and the remedy; or the store cannot be
                written.
        """
        now = time.time()
        started = psutil.Process().create_time()
        self._holder = Holder(
            socket.gethostname(), _boot_id(), os.getpid(), started, uuid.uuid4().hex, now, heartbeat=now
        )
        try:
            with _locked(self.store):
                self._refuse_if_held()
                self._write(self._holder)
        except OSError as error:
            problem = error.strerror or error
            raise StoreError(f"store {self.store.url} cannot be written: {problem}") from error
        if not isinstance(self.store.files, LocalFiles):
            time.sleep(SETTLE_SECONDS)
            self._refuse_if_held()
        self._thread = threading.Thread(target=self._beat, name="lossray-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back, unless another driver has taken it over."""
        self._stop.set()
        self._thread.join()
        with _locked(self.store):
            if self._is_mine():
                self.store.delete(PATH)

    def check(self) -> None:
        """Raise StoreError if another driver has taken the lease over, as after a long suspension."""
        if self.lost:
            now = read_holder(self.store) or "nobody: its lease file was deleted"
            raise StoreError(f"this driver has lost store {self.store.url}; it now belongs to {now}")

    def _refuse_if_held(self) -> None:
        holder = read_holder(self.store)
        if holder is not None and holder.token == self._holder.token:
            return
        if not is_free(holder, self.silence):
            raise StoreError(
                f"store {self.store.url} is in use by another driver: {holder}. Wait for it, stop it, or use "
                f"another store. If it is gone: on this machine its lease is free at once, on another "
                f"{self.silence:g} seconds after its last heartbeat"
            )

    def _beat(self) -> None:
        """Renew the heartbeat until the lease is given back or lost."""
        while not self._stop.wait(self.interval):
            # A beat that fails (disk full, network) is tried again; whatever its cause, the study goes on.
            with contextlib.suppress(Exception), _locked(self.store):
                if not self._is_mine():
                    self.lost = True
                    return
                self._write(dataclasses.replace(self._holder, heartbeat=time.time()))

    def _is_mine(self) -> bool:
        holder = read_holder(self.store)
        return holder is not None and holder.token == self._holder.token

    def _write(self, holder: Holder) -> None:
        self.store.write_json(PATH, dataclasses.asdict(holder))


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[None]:
    """Hold the file lock of a local store for a moment; no lock exists on an object store."""
    if not isinstance(store.files, LocalFiles):
        yield
        return
    os.makedirs(store.files.root, exist_ok=True)
    # The lock file stays: one that is removed could be locked by two processes, under its old and new self.
    with open(store.files.absolute(LOCK), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _process_alive(holder: Holder) -> bool:
    """Whether the holder's process runs on this machine; another one may have got its process id."""
    try:
        process = psutil.Process(holder.pid)
        same = abs(process.create_time() - holder.process_started) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _boot_id() -> str:
    """Identifies this boot of this machine, on Linux."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
