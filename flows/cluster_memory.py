"""Measures on a GPU of the cluster what packs take of it."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from flows.capacity import Shares, capacity, cluster_nodes
from flows.driver import WAIT_SECONDS
from flows.gpu_memory import Measure
from flows.interrupt import Interrupt
from flows.resource_wait import ResourceWait
from flows.session import is_embedded, worker_options
from lossray.measures.pack_memory import MeasuredMemory
from tasks.measure_memory import MemoryJob
from tasks.ray_tasks import memory_of_packs

PATIENCE = 120.0  # seconds for a share of a GPU that is there to be free, and for all packs
KIND_OF_GPU = "ray.io/accelerator-type"  # a label of a node


def measure_with(shares: Shares, interrupt: Interrupt, *, wait: float, say: Callable[[str], None]) -> Measure:
    """On a GPU that a training of these shares may get.

    Args:
        shares: what the study's tasks take.
        interrupt: ends the measuring.
        wait: seconds to wait for a node that has such a GPU.
        say: takes a line on what is waited for.
    """
    return partial(_measure, shares=shares, interrupt=interrupt, wait=ResourceWait(wait), say=say)


def _measure(
    job: MemoryJob, *, shares: Shares, interrupt: Interrupt, wait: ResourceWait, say: Callable[[str], None]
) -> tuple[MeasuredMemory, int] | None:
    """The packs on one GPU; the memory is that of the smallest kind of GPU.

    Raises:
        TimeoutError: no GPU was free in time.
        StudyError: no node that has one has come in time.
    """
    if is_embedded() and not torch.cuda.is_available():
        return None  # GPUs that were declared alone
    folders = [os.getcwd(), *filter(None, [job.context.folder])]
    options = shares.train.options() | worker_options(folders) | {"name": "memory"}
    tasks = [_submitted(job, options, shares.train.cpus)]
    for kind in _other_kinds(shares):
        chosen = options | {"label_selector": {KIND_OF_GPU: kind}}
        tasks.append(_submitted(replace(job, packs=()), chosen, shares.train.cpus))
    deadline = time.monotonic() + PATIENCE
    while ray.wait(tasks, num_returns=len(tasks), timeout=WAIT_SECONDS)[1]:  # they make an autoscaler act
        if interrupt.received:
            raise TimeoutError("interrupted")
        now, room = time.monotonic(), capacity(shares)
        if not room.fits("train"):
            before, deadline = wait.text, now + PATIENCE
            wait.look(now, room, ["train"], running=False, embedded=False)
            if wait.text != before:
                say(wait.text)
        elif now > deadline:  # a task that is late ends by itself
            raise TimeoutError(f"no GPU was free for {PATIENCE:g} s")
    try:
        results: list[MeasuredMemory | None] = ray.get(tasks)
    except RayTaskError as error:
        raise error.cause from None
    measured = results[0]
    if measured is None:
        return None
    smallest = min(result.gpu for result in results if result is not None)
    return replace(measured, gpu=smallest), max(1, int(sum(node.gpus for node in cluster_nodes())))


def _other_kinds(shares: Shares) -> list[str]:
    """The kinds of GPU where there are several that a task may get."""
    nodes = [node for node in cluster_nodes() if node.gpus and node.slots(shares.train)]
    kinds = sorted({node.labels[KIND_OF_GPU] for node in nodes if KIND_OF_GPU in node.labels})
    return kinds if len(kinds) > 1 and not shares.train.selectors else []


def _submitted(job: MemoryJob, options: dict[str, Any], cpus: float) -> Any:
    return memory_of_packs.options(**options).remote(job, cpus)
