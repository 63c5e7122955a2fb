"""Weights from a file into a model: safetensors, or a state dict that loads without unpickling objects."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.names import nearest

NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict of the model
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DataParallel and torch.compile


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights in a file into a model, in place.

    Args:
        model: any module; every parameter and buffer of its state dict is needed, and no other.
        path: a safetensors file, or a state dict saved by ``torch.save``, also under one of the keys in
            NESTED. Prefixes of torch.compile and DataParallel are taken off.

    Raises:
        ModelError: the file cannot be read, needs unpickling, or does not fit the model.
    """
    needed, stored = model.state_dict(), _state_dict(Path(path))
    # safetensors writes tied weights once.
    pointers = {needed[name].data_ptr() for name in stored if name in needed}
    missing = [name for name in needed if name not in stored and needed[name].data_ptr() not in pointers]
    if missing:
        guess = nearest(missing[0], stored)
        hint = f"; did you mean its {guess!r}?" if guess else ""
        raise ModelError(f"{path}: {missing[0]!r} of {type(model).__name__} is missing{hint}")
    for name, tensor in stored.items():
        if name not in needed:
            raise ModelError(f"{path}: found {name!r}, which {type(model).__name__} does not have")
        if tensor.shape != needed[name].shape:
            shapes = f"found {list(tensor.shape)}, needed {list(needed[name].shape)}"
            raise ModelError(f"{path}: {name!r} of {type(model).__name__}: {shapes}")
    model.load_state_dict(stored, strict=False)  # what it would check is checked


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; allowed: a safetensors file, or a state dict")
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(
            f"{path}: found {type(content).__name__} and no state dict; "
            "save one with torch.save(model.state_dict(), path)"
        )
    tensors = dict(content)
    for prefix in (*WRAPPERS, *WRAPPERS):  # either may be outside
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load(path.read_bytes())
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error


def _torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        content = f"objects such as {needed[1]}" if needed else "what is no state dict"
        raise ModelError(
            f"{path}: found {content}, and nothing is unpickled, since that may run code from the file; "
            "allowed: tensors alone, saved with torch.save(model.state_dict(), path) or safetensors"
        ) from error
    except Exception as error:  # torch.load raises what it likes on a damaged file
        raise ModelError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
