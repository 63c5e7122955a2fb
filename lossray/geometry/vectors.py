"""The eigenpairs of a pack at one step as bytes: the content of OUT/vectors/<pack>/<step>.safetensors.

Tensor keys are "<operator>/<block>/<end>/<field>", for example "hessian/all/largest/values"; the fields are
those of `PackedEigenPairs`. The Hessian in another gauge (theory 2.6) is an operator of its own, such as
"hessian@adaptive". The vectors are rounded to float32, all else is kept as computed.
"""

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from lossray.errors import StoreError
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage import tensors as files
from lossray.storage.store import VECTORS_FORMAT

REMEDY = "delete it and run the study again"  # where it is still needed the checkpoint is analysed again
FIELDS = tuple(field.name for field in fields(PackedEigenPairs))
Name = tuple[str, str, str]  # operator, block and end, such as ("hessian", "all", "largest")
Spectra = Mapping[Name, PackedEigenPairs]


def dumps(spectra: Spectra, *, key: str) -> bytes:
    """The content of the file.

    Args:
        spectra: eigenpairs by operator, block and end.
        key: of the task that has computed them.
    """
    tensors = {
        f"{'/'.join(name)}/{field}": _stored(field, getattr(pairs, field))
        for name, pairs in spectra.items()
        for field in FIELDS
    }
    return files.dumps(
        tensors, {"format": VECTORS_FORMAT, "key": key, "spectra": [list(name) for name in spectra]}
    )


def loads(
    data: bytes, *, key: str, device: str | torch.device = "cpu", name: str = "vectors"
) -> dict[Name, PackedEigenPairs]:
    """The eigenpairs in the content of a file; vectors in float64, with the rounding of float32.

    Args:
        data: what `dumps` returned.
        key: of the task whose result it must be.
        device: where to put the tensors.
        name: the file's name, for the error message.

    Raises:
        StoreError: the file is damaged, of another format, or the result of another task.
    """
    tensors, header = files.loads(data, VECTORS_FORMAT, name=name, remedy=REMEDY)
    if header.get("key") != key:
        raise StoreError(f"{name} is the result of task {header.get('key')}, not of {key}; {REMEDY}")
    try:
        return {
            (operator, block, end): _pairs(tensors, f"{operator}/{block}/{end}", device)
            for operator, block, end in header["spectra"]
        }
    except KeyError as error:
        raise StoreError(f"{name} is damaged: {error} is missing; {REMEDY}") from error


def _stored(field: str, tensor: Tensor) -> Tensor:
    return tensor.float() if field == "vectors" else tensor


def _pairs(tensors: Mapping[str, Tensor], prefix: str, device: str | torch.device) -> PackedEigenPairs:
    entries = {field: tensors[f"{prefix}/{field}"].to(device) for field in FIELDS}
    return PackedEigenPairs(**entries | {"vectors": entries["vectors"].double()})
