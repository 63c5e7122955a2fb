"""What needs torch of an opened study: its data, and a run's model with the weights of a checkpoint."""

from pathlib import Path

import torch
from torch import nn

from lossray.errors import DataError, ModelError
from lossray.networks.models import build_model
from lossray.plugins import add_user_folders
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack, Study
from lossray.study.manifest import Manifest
from lossray.training.datasets import Dataset, load_dataset


def study_data(study: Study, manifest: Manifest, url: str) -> Dataset:
    """The data of a study, in the dtype of its training.

    Where the folder of the study is not on this machine (it ran as a job), the current one stands for it.

    Args:
        study: its settings.
        manifest: of its store.
        url: of the store, for the error message.

    Raises:
        DataError: the data cannot be read, or have changed since the study ran.
    """
    folder = Path(manifest.folder)
    add_user_folders([Path.cwd(), folder])
    dtype = getattr(torch, study.training.dtype)
    dataset = load_dataset(study.data, dtype=dtype, base=folder if folder.is_dir() else Path.cwd())
    if dataset.fingerprint != manifest.inputs.data_key:
        raise DataError(f"the data have changed since {url} was made: restore them")
    return dataset


def model_at(store: Store, pack: Pack, member: int, step: int, dataset: Dataset, dtype: str) -> nn.Module:
    """The model of one member of a pack at a checkpoint: on the CPU, in eval mode.

    Args:
        store: where the checkpoint lies.
        pack: the member's.
        member: its index.
        step: of the checkpoint.
        dataset: for the shapes of inputs and outputs.
        dtype: of the parameters, such as "float32".

    Raises:
        StoreError: the checkpoint is damaged.
        ModelError: the user's model function now makes another model.
    """
    checkpoint = read_checkpoint(store, pack.pack_id, step)
    with torch.random.fork_rng(devices=[]):  # building draws an initialisation, which is then replaced
        model = build_model(pack.model, dataset.input_shape, dataset.n_outputs)
    model = model.to(getattr(torch, dtype))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = {**checkpoint.parameters, **checkpoint.buffers}
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape[1:] for n, t in saved.items()}:
        path = store.checkpoint_path(pack.pack_id, step)
        raise ModelError(f"model {pack.model.name!r} has changed: {path} holds other parameters")
    with torch.no_grad():
        for name, stacked in saved.items():
            tensors[name].copy_(stacked[member])
    return model.eval()
