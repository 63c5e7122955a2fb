"""What a task takes from the machine it runs on: import order, threads, device."""

import gc
import os

import ray
import torch

from lossray.imports import worker_setup


def prepare_worker(cpus: float) -> torch.device:
    """Set this process up for one task: import order, threads, device.

    A reused worker keeps the thread count of its last task, and a task without GPUs still sees those of its
    node: both are set from what Ray has given to this task.
    """
    worker_setup()
    gc.enable()  # which `worker_started` has put off
    torch.set_num_threads(max(1, int(cpus)))
    given = ray.get_gpu_ids()
    if not given or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    device = torch.device("cuda", gpu_index(given[0], visible=visible, count=torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def gpu_index(given: int | str, *, visible: str, count: int) -> int:
    """Which of the GPUs that this process sees is the one that Ray has given to the task.

    A process stays with the GPUs that it saw when it first used one, and Ray gives a worker another one with
    the next task. So workers see all GPUs of their node (`flows.session`), and each task takes its own.

    Args:
        given: its id for Ray: a number, or a name as in ``visible``.
        visible: CUDA_VISIBLE_DEVICES, empty where it is not set.
        count: GPUs that the process sees.
    """
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(count)]
    return names.index(str(given)) if str(given) in names[:count] else 0
