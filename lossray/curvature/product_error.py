"""How far products are from those in float64."""

from typing import Protocol

import torch
from torch import Tensor

from lossray.errors import ModelError


class Comparable(Protocol):
    """An operator that can be compared with itself in float64."""

    def difference(self, vectors: Tensor) -> Tensor:
        """Products minus those in float64, [R, d] or [R, b, d]."""


def error_norms(operator: Comparable, vectors: Tensor) -> Tensor:
    """Lengths [R] of the differences to the products in float64; NaN where a model refuses float64.

    A forward pass may pin a dtype of its own.
    """
    try:
        errors: Tensor = torch.linalg.vector_norm(operator.difference(vectors), dim=-1)
    except ModelError:
        errors = torch.full(vectors.shape[:1], float("nan"), dtype=torch.float64, device=vectors.device)
    return errors
