"""What a task needs to know of its study, and what it takes from the machine it runs on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch

from lossray.errors import DataError
from lossray.imports import worker_setup
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.stack import Loss, Stack, build_stack, stack_models
from lossray.source_hash import check_imported
from lossray.study import Pack, Study
from lossray.training.datasets import Dataset, load_dataset


@dataclass(frozen=True)
class Context:
    """The same for all tasks of a study, and small: tasks pass paths, never tensors."""

    out: str  # URL of the store
    study: Study
    folder: str | None  # of the study file: relative data paths start there
    data_key: str  # content hash of the data when the study was planned
    sources: Mapping[str, str] = field(
        default_factory=dict
    )  # source hashes of the user's functions, likewise


_datasets: dict[tuple[str, torch.dtype], Dataset] = {}  # the one in use, so that a worker reads its data once


def dataset_of(context: Context, dtype: torch.dtype) -> Dataset:
    """The study's data, as planned; every task asks for them before it computes anything.

    Raises:
        DataError: the data have changed since the study was planned.
        StudyError: the source of a user's function has.
    """
    check_imported(context.sources)
    name = (context.data_key, dtype)
    if name not in _datasets:
        folder = Path(context.folder) if context.folder else None
        dataset = load_dataset(context.study.data, dtype=dtype, base=folder)
        if dataset.fingerprint != context.data_key:
            raise DataError(
                f"data: found content hash {dataset.fingerprint[:12]}, but {context.data_key[:12]} when "
                "the study was planned; restore the data (a function must return the same at every call), or "
                "run into another --out"
            )
        _datasets.clear()
        _datasets[name] = dataset
    return _datasets[name]


def loss_of(context: Context) -> Loss:
    """The study's loss."""
    return get_loss(context.study.training.loss)


def stack_of(
    pack: Pack, dataset: Dataset, *, dtype: torch.dtype, device: torch.device
) -> tuple[Stack, torch.Tensor, dict[str, torch.Tensor]]:
    """A freshly initialised pack: stack, theta [R, d], buffers {name: [R, *shape]}.

    A recorded run's initialisation is replaced by what was recorded: its function may seed torch as it likes.
    """
    if pack.recorded is not None:
        with torch.random.fork_rng(devices=[]):
            model = build_model(pack.model, dataset.input_shape, dataset.n_outputs)
        return stack_models([model], executor=pack.executor, dtype=dtype, device=device)
    return build_stack(
        lambda: build_model(pack.model, dataset.input_shape, dataset.n_outputs),
        pack.seeds,
        executor=pack.executor,
        dtype=dtype,
        device=device,
    )


def prepare_worker(cpus: float) -> torch.device:
    """Set this process up for one task: import order, threads, device.

    A reused worker keeps the thread count of its last task, and a task without GPUs still sees those of its
    node: both are set from what Ray has given to this task.
    """
    worker_setup()
    torch.set_num_threads(max(1, int(cpus)))
    if ray.get_gpu_ids() and torch.cuda.is_available():
        return torch.device("cuda:0")
    return torch.device("cpu")


def local_device() -> torch.device:
    """The device of a study that runs without Ray."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """For the tables: "cpu", or the kind of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
