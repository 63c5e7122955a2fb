"""The study's data as they were when it was planned, and what a task reads from its store."""

from pathlib import Path

import torch

from lossray.errors import DataError
from lossray.geometry import vectors
from lossray.geometry.vectors import Name
from lossray.measures.halving import Part, whole
from lossray.measures.pack_point import PackPoint, locate
from lossray.source_hash import check_imported
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack
from lossray.training.datasets import Dataset, load_dataset, on_device
from tasks.jobs import Context

_datasets: dict[tuple[str, torch.dtype], Dataset] = {}  # the one in use, so that a worker reads its data once


def dataset_of(context: Context) -> Dataset:
    """The study's data in the training dtype, as planned; every task asks for them before it computes.

    Raises:
        DataError: the data have changed since the study was planned.
        StudyError: the source of a user's function has.
    """
    check_imported(context.sources)
    dtype = getattr(torch, context.study.training.dtype)
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


def dataset_on(context: Context, device: torch.device) -> Dataset:
    """The same on a device."""
    return on_device(dataset_of(context), device)


def located(
    context: Context, pack: Pack, step: int, device: torch.device, part: Part | None = None
) -> PackPoint:
    """The pack, or a part of it, at the checkpoint of a step.

    Raises:
        StoreError: the checkpoint is missing or damaged.
    """
    part = part or whole(pack)
    checkpoint = read_checkpoint(Store(context.out), pack.pack_id, step, device).of(part.members)
    return locate(context.study, part.of(pack), checkpoint, dataset_on(context, device), part.limits)


def stored_spectra(
    store: Store, pack: Pack, step: int, part: Part, *, key: str, device: torch.device
) -> dict[Name, PackedEigenPairs]:
    """The eigenpairs of a part that the analysis of a checkpoint, with this task key, has left.

    Raises:
        StoreError: they are missing or damaged, or of another analysis.
    """
    path = store.vectors_path(pack.pack_id, step)
    spectra = vectors.loads(store.read_bytes(path), key=key, device=device, name=f"{store.url}/{path}")
    return {name: pairs.of(part.members) for name, pairs in spectra.items()}
