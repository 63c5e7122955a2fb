"""The eigenpairs of a pack at one step as bytes: the content of OUT/vectors/<pack>/<step>.safetensors.

Tensor keys are "<operator>/<block>/<field>", for example "hessian/all/values"; the fields are those of
`EigenPairs`. The vectors are rounded to float32, all else is kept as computed.
"""

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from lossray.curvature.pairs import EigenPairs
from lossray.errors import StoreError
from lossray.storage import tensors as files

FORMAT = "eigenpairs/1"
REMEDY = "delete it and run the study again"  # where it is still needed the checkpoint is analysed again
FIELDS = tuple(field.name for field in fields(EigenPairs))
Spectra = Mapping[tuple[str, str], EigenPairs]  # by operator and block, such as ("hessian", "all")


def dumps(spectra: Spectra, *, key: str) -> bytes:
    """The content of the file.

    Args:
        spectra: eigenpairs by operator and block.
        key: of the task that has computed them.
    """
    tensors = {
        f"{operator}/{block}/{field}": _stored(field, getattr(pairs, field))
        for (operator, block), pairs in spectra.items()
        for field in FIELDS
    }
    return files.dumps(tensors, {"format": FORMAT, "key": key, "spectra": [list(name) for name in spectra]})


def loads(
    data: bytes, *, key: str, device: str | torch.device = "cpu", name: str = "vectors"
) -> dict[tuple[str, str], EigenPairs]:
    """The eigenpairs in the content of a file; vectors in float64, with the rounding of float32.

    Args:
        data: what `dumps` returned.
        key: of the task whose result it must be.
        device: where to put the tensors.
        name: the file's name, for the error message.

    Raises:
        StoreError: the file is damaged, of another format, or the result of another task.
    """
    tensors, header = files.loads(data, FORMAT, name=name, remedy=REMEDY)
    if header.get("key") != key:
        raise StoreError(f"{name} is the result of task {header.get('key')}, not of {key}; {REMEDY}")
    try:
        return {
            (operator, block): _pairs(tensors, f"{operator}/{block}", device)
            for operator, block in header["spectra"]
        }
    except KeyError as error:
        raise StoreError(f"{name} is damaged: {error} is missing; {REMEDY}") from error


def _stored(field: str, tensor: Tensor) -> Tensor:
    return tensor.float() if field == "vectors" else tensor


def _pairs(tensors: Mapping[str, Tensor], prefix: str, device: str | torch.device) -> EigenPairs:
    own = {field: tensors[f"{prefix}/{field}"].to(device) for field in FIELDS}
    return EigenPairs(**own | {"vectors": own["vectors"].double()})
