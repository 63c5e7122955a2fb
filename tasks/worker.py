"""What a task takes from the machine it runs on: import order, threads, device."""

import gc

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
    if ray.get_gpu_ids() and torch.cuda.is_available():
        return torch.device("cuda:0")
    return torch.device("cpu")
