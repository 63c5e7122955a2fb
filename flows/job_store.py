"""Whether a job sees the store that --out names: on every node, not only on this machine."""

import socket
from collections.abc import Sequence
from typing import Any

import fsspec

from lossray.errors import StudyError
from lossray.names import nearest
from lossray.storage.store import Store

NEAREST = "a URI such as s3://bucket/study"


def job_store(out: str) -> str:
    """The store as a job has to name it: a URI, or the absolute path of a folder.

    Raises:
        StudyError: no other process would see it, or its protocol is unknown.
    """
    scheme, colons, _ = out.partition("://")
    if not colons or scheme in ("file", "local"):
        return Store(out).url
    if scheme == "memory":
        raise StudyError(f"--out {out}: every process has memory of its own; allowed: {NEAREST}")
    if "::" not in scheme and scheme not in (protocols := fsspec.available_protocols()):
        guess = nearest(scheme, protocols)
        hint = f"; did you mean {guess}://?" if guess else ""
        raise StudyError(f"--out {out}: unknown protocol {scheme!r}; allowed: {NEAREST}{hint}")
    return out.rstrip("/")


def check_seen_by_all(out: str, nodes: Sequence[Any], *, shared: bool) -> None:
    """A folder is seen by all nodes where all of them are on this machine, or the user says so.

    Args:
        out: as `job_store` gives it.
        nodes: of the cluster, as Ray's State API has them.
        shared: whether the user says that all nodes share the folder.

    Raises:
        StudyError: it is a folder of this machine alone.
    """
    if shared or "://" in out:
        return
    elsewhere = [node.node_ip for node in nodes if not _is_here(node.node_ip)]
    if nodes and not elsewhere:
        return
    node = (
        f"the cluster's node {elsewhere[0]} is another one" if elsewhere else "the cluster lists no nodes yet"
    )
    raise StudyError(
        f"--out {out}: found a folder of this machine, and {node}; allowed: {NEAREST}, or with --shared a "
        "folder that all nodes mount at this path"
    )


def _is_here(address: str) -> bool:
    """Whether this machine has an IP address: one can listen at one's own only."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
            one.bind((address, 0))
    except OSError:
        return False
    return True
