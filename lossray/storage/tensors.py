"""Named tensors and a JSON header as bytes: safetensors, so that nothing in a store is ever unpickled.

The header is one entry of the file's metadata: safetensors writes several in random order.
"""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lossray.errors import StoreError


def dumps(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """The content of a file.

    Args:
        tensors: by name; they may be views, of any layout, on any device.
        header: JSON-compatible; ``format`` says what the file is, such as "checkpoint/1".
    """
    # Parameters are views of one flat tensor; safetensors refuses memory that tensors share, so copy.
    plain = {name: _plain_copy(tensor) for name, tensor in tensors.items()}
    return bytes(safetensors.torch.save(plain, metadata={"lossray": json.dumps(header)}))


def loads(data: bytes, format: str, *, name: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header in the content of a file.

    Args:
        data: what `dumps` returned.
        format: what the file must be.
        name: the file's name, for the error message.
        remedy: what to do about a damaged file, likewise.

    Raises:
        StoreError: the file is damaged, or of another format.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = _header(data)
    except (SafetensorError, ValueError) as error:
        raise StoreError(f"{name} is damaged: {error}; {remedy}") from error
    if header.get("format") != format:
        kind, stored_format = format.partition("/")[0], header.get("format")
        raise StoreError(f"{name} is no lossray {kind} file: it says {stored_format}, not {format}; {remedy}")
    return tensors, header


def _header(data: bytes) -> dict[str, Any]:
    """Our part of the metadata; empty for a foreign file. The first 8 bytes give the header's length."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    header = json.loads(metadata.get("lossray", "{}"))
    return header if isinstance(header, dict) else {}


def _plain_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
