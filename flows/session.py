"""Ray for one study: an embedded one, or a connection to a cluster."""

import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from lossray.errors import StudyError
from lossray.imports import USER_FOLDERS_VARIABLE

DRIVER_VARIABLE = "LOSSRAY_DRIVER"  # in workers: which driver they belong to
EVERY_GPU = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}  # is seen by a worker; see tasks/worker.py
SCHEMES = {
    "ray": "a Ray Client address",
    "http": "the address of a dashboard, which takes jobs",
    "https": "the address of a dashboard, which takes jobs",
}
CONNECT_SECONDS = 5.0  # Ray itself keeps trying for many minutes to reach a head that is not there


@contextmanager
def ray_session(
    address: str | None, user_folders: Sequence[str], *, dashboard: bool = False
) -> Iterator[None]:
    """Start or join Ray, and leave it at the end.

    A Ray that is already initialised (a notebook's) is used and left running.

    Args:
        address: of a cluster; "auto" finds it; None starts an embedded Ray, unless a job or the environment
            (``RAY_ADDRESS``) names a cluster.
        user_folders: appended to the workers' import path.
        dashboard: whether an embedded Ray has a dashboard.

    Raises:
        StudyError: no Ray at ``address``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        yield
        return
    said = f"--address {address}" if address else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address, said)
    options: dict[str, Any] = {}
    if address == "local":
        options = {"include_dashboard": dashboard}
        # Ray starts a worker a core ahead, set up otherwise than ours: no task of ours would run in them.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    environment = {
        "env_vars": {USER_FOLDERS_VARIABLE: os.pathsep.join(user_folders), **EVERY_GPU},
        "worker_process_setup_hook": "lossray.imports.worker_started",
    }
    try:
        ray.init(
            address,
            namespace="lossray",
            runtime_env=environment,
            log_to_driver=False,
            logging_level="ERROR",
            **options,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_ray(address, said, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def worker_options(user_folders: Sequence[str]) -> dict[str, Any]:
    """What a task or actor needs as ``.options`` to find the user's modules, beside its share of the cluster.

    Nothing where `ray_session` has started this session, whose workers are all set up alike. In a session
    that somebody else has started (a notebook) the tasks bring their set-up along. It is new for each driver,
    so that no worker goes on with a user's module that it had imported before the user edited it.
    """
    if USER_FOLDERS_VARIABLE in (ray.get_runtime_context().runtime_env.get("env_vars") or {}):
        return {}
    folders = os.pathsep.join(user_folders)
    variables = {USER_FOLDERS_VARIABLE: folders, DRIVER_VARIABLE: uuid.uuid4().hex, **EVERY_GPU}
    return {"runtime_env": {"env_vars": variables}}


def has_gpus() -> bool:
    """Whether the cluster has GPUs."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def is_embedded() -> bool:
    """Whether the Ray in use was started by this process: it neither grows nor has other users."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def _check_reachable(address: str, said: str) -> None:
    """Find out at once that nobody listens at HOST:PORT; other forms of address are Ray's to judge."""
    scheme, colons, _ = address.partition("://")
    if colons:
        kind = SCHEMES.get(scheme.lower(), f"a {scheme} address")
        raise StudyError(
            f"{said}: found {kind}; allowed: `auto`, or HOST:PORT of the head as `ray start --head` prints it"
            + ("" if said.startswith("--") else "; or unset RAY_ADDRESS for a Ray of this machine")
        )
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_ray(address, said, error) from error


def _no_ray(address: str, said: str, error: Exception) -> StudyError:
    if address == "local":
        return StudyError(f"Ray cannot start on this machine: {error}")
    return StudyError(f"{said}: no Ray cluster answers there ({error}); start one with `ray start --head`")
