"""A user's vectors in parameter space as flat tensors, in the order of ``model.parameters()``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lossray.errors import StudyError
from lossray.names import nearest
from lossray.networks.layout import Layout
from lossray.operators.user_data import described

Vector = Tensor | NDArray[Any] | Iterable[Tensor | None] | Mapping[str, Tensor]


def flat_vector(given: Vector, model: nn.Module, layout: Layout, *, name: str) -> Tensor:
    """A vector [d], float64, on the device of the model.

    Args:
        given: a tensor or array [d]; or a tensor for each parameter, such as
            ``[p.grad for p in model.parameters()]``, where None stands for zeros; or a mapping from the names
            of the parameters, in which buffers and frozen parameters are left out.
        model: whose vector it is.
        layout: how d divides into its trainable parameters.
        name: of the vector, for messages.

    Raises:
        StudyError: another form, shape or name, or numbers that are not finite.
    """
    device = next(model.parameters()).device
    pieces = _pieces(given, model, layout, name)
    vector = torch.cat([piece.detach().to_dense().reshape(-1).to(device, torch.float64) for piece in pieces])
    if not bool(torch.isfinite(vector).all()):
        raise StudyError(f"{name}: found values that are not finite; allowed: finite numbers")
    return vector


def _pieces(given: Any, model: nn.Module, layout: Layout, name: str) -> list[Tensor]:
    if isinstance(given, Mapping):
        return _by_name(given, model, layout, name)
    whole = isinstance(given, Tensor | np.ndarray)
    if whole and given.shape == (layout.dim,):
        return [torch.as_tensor(given)]
    if whole or isinstance(given, str) or not isinstance(given, Iterable):
        shown = f"the shape {list(given.shape)}" if whole else type(given).__name__
        raise StudyError(
            f"{name}: found {shown}; allowed: a tensor [{layout.dim}] in the order of model.parameters(), "
            "or a list or dict with a tensor for each parameter"
        )
    return _in_order(list(given), model, layout, name)


def _by_name(given: Mapping[str, Tensor], model: nn.Module, layout: Layout, name: str) -> list[Tensor]:
    others = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    others |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    for key in given:
        if key not in layout.names and key not in others:
            guess = nearest(str(key), layout.names)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise StudyError(f"{name}: found {key!r}, which is no parameter of the model{hint}")
    for key in layout.names:
        if key not in given:
            raise StudyError(f"{name}: parameter {key!r} is missing; pass zeros where it does not move")
    return [
        _checked(given[key], shape, f"{name}: {key!r}")
        for key, shape in zip(layout.names, layout.shapes, strict=True)
    ]


def _in_order(given: Sequence[Any], model: nn.Module, layout: Layout, name: str) -> list[Tensor]:
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    if len(given) == len(trainable):
        given = [piece for piece, moves in zip(given, trainable, strict=True) if moves]
    if len(given) != len(layout.names):
        raise StudyError(
            f"{name}: found {len(given)} entries; allowed: one for each of {len(layout.names)} trainable "
            "parameters"
        )
    if all(piece is None for piece in given):
        raise StudyError(f"{name}: found nothing but None; call backward() first")
    return [
        torch.zeros(shape, device="cpu") if piece is None else _checked(piece, shape, f"{name}: {key!r}")
        for piece, key, shape in zip(given, layout.names, layout.shapes, strict=True)
    ]


def _checked(piece: Any, shape: torch.Size, name: str) -> Tensor:
    if not isinstance(piece, Tensor | np.ndarray) or tuple(piece.shape) != tuple(shape):
        raise StudyError(f"{name}: found {described(piece)}; allowed: a tensor {list(shape)}")
    return torch.as_tensor(piece)
