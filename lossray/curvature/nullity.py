"""Is one model's curvature singular? `lossray.degeneracy`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.curvature.degeneracy import counts_of, dense_matrices, spectrum_of
from lossray.curvature.floor import StructuralFloor, shift_vectors, structural_floor
from lossray.curvature.modules import ModuleObjective
from lossray.curvature.operators import PackedHessian
from lossray.curvature.single import SingleOperator
from lossray.curvature.transforms import PointOperator
from lossray.errors import LossrayError, ModelError, StudyError


@dataclass(frozen=True)
class Degeneracy:
    """The eigenvalues of one operator that are zero, and those that architecture and data force to be."""

    eigenvalues: Tensor  # [d] float64, ascending
    noise_floor: float  # an eigenvalue of this size or less cannot be told from zero
    nullity: int  # how many there are
    rank: int | None  # the others; None where no gap supports it, and for products in float32
    gap: float  # smallest |eigenvalue| above the noise floor over the largest below; inf where these are 0
    structural_nullity: int | None  # a lower bound where `excess` is None; None where nothing is known
    excess: int | None  # nullity beyond it; None where more might be forced
    counts: dict[float, int]  # threshold -> eigenvalues with |lambda| <= threshold, descending
    dim: int
    method: str  # "dense"


def degeneracy(operator: SingleOperator, floor: StructuralFloor | int | None = None) -> Degeneracy:
    """Count the zero eigenvalues of a matrix that is formed, and compare them with what is forced.

    Args:
        operator: such as ``lossray.Hessian(model, loss, data, dtype=torch.float64)``, of size d: d products,
            and an eigensolve of about a second for d = 3,000. Products in float32 support no rank.
        floor: the forced nullity. By default that of `structural_floor` for the Hessian of a model that takes
            one tensor; none for anything else.

    Raises:
        StudyError: no operator of lossray's, or a floor that cannot be.
        ResourceError: the matrix does not fit the memory.
        ModelError: the products are not finite.
    """
    packed: PointOperator | None = getattr(operator, "packed", None)
    if packed is None:
        raise StudyError(
            f"operator: found {type(operator).__name__}; allowed: lossray.Hessian(model, loss, data), "
            "GaussNewton, EmpiricalFisher, or one of these Restricted, Scaled or Preconditioned"
        )
    _check_floor(floor, packed.shape[1])
    known, null_vectors = _forced(packed)
    forced = StructuralFloor(floor, {}, True) if isinstance(floor, int) else floor or known
    (matrix,) = dense_matrices(packed)
    spectrum = spectrum_of(matrix, packed.dtype, null_vectors)
    if spectrum is None:
        raise ModelError("the Hessian has entries that are not finite: are the parameters?")
    counts = counts_of(spectrum)
    at_floor = counts[-1]
    nullity = int(at_floor.nullity)
    excess = forced.excess(nullity) if forced else None
    return Degeneracy(
        eigenvalues=spectrum.values.sort().values,
        noise_floor=spectrum.noise_floor,
        nullity=nullity,
        rank=at_floor.rank,
        gap=at_floor.gap,
        structural_nullity=forced.dimension if forced else None,
        excess=None if excess is None else int(excess),
        counts={count.threshold: int(count.nullity) for count in counts},
        dim=len(spectrum.values),
        method="dense",
    )


def _check_floor(floor: object, dim: int) -> None:
    if floor is None or isinstance(floor, StructuralFloor) or (type(floor) is int and 0 <= floor <= dim):
        return
    found = floor if isinstance(floor, int | float | str) else type(floor).__name__
    raise StudyError(
        f"floor: found {found!r}; allowed: what lossray.structural_floor gives, or an integer from 0 to {dim}"
    )


def _forced(packed: PointOperator) -> tuple[StructuralFloor | None, Tensor | None]:
    """What is forced on a plain Hessian, and vectors that are null for certain."""
    objective = getattr(packed, "objective", None)
    if not isinstance(packed, PackedHessian) or not isinstance(objective, ModuleObjective):
        return None, None
    source = objective.source
    if source is None:
        return None, None
    model, loss, data = source
    try:
        floor = structural_floor(model, data, loss, dense_up_to=packed.shape[1])
    except (LossrayError, TypeError, ValueError, RuntimeError):  # a model that takes no single tensor
        return None, None
    shifts = floor.by_cause.get("softmax shift", 0) > 0
    vectors = shift_vectors(model).to(packed.device, torch.float64) if shifts else None
    return floor, vectors
