"""Is one model's curvature singular? `lossray.degeneracy`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.errors import LossrayError, ModelError, StudyError
from lossray.nullity.counts import counts_of, dense_matrices, spectrum_of
from lossray.nullity.structural_floor import StructuralFloor, beside, null_vectors, structural_floor
from lossray.operators.modules import ModuleObjective
from lossray.operators.packed import PackedHessian
from lossray.operators.transforms import PointOperator
from lossray.spectra.operator import SingleOperator


@dataclass(frozen=True)
class Degeneracy:
    """The eigenvalues of one operator that are zero, and those that architecture and data force to be."""

    eigenvalues: Tensor  # [d] float64, ascending
    noise_floor: float  # an eigenvalue of this size or less cannot be told from zero
    nullity: int  # how many there are
    rank: int | None  # the others; None where no gap supports it, and for products in float32
    gap: float  # smallest |eigenvalue| above the noise floor over the largest below; inf where these are 0
    structural_nullity: int | None  # a lower bound where `excess` is None; None where nothing is known
    excess: int | None  # nullity beyond it; None without a rank, and where more might be forced
    structural_note: str | None  # why there is no structural nullity
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
    known, vectors, note = _forced(packed)
    forced = StructuralFloor(floor, {}, True) if isinstance(floor, int) else floor or known
    (matrix,) = dense_matrices(packed)
    spectrum = spectrum_of(matrix, packed.dtype, vectors)
    if spectrum is None:
        raise ModelError("the Hessian has entries that are not finite: are the parameters?")
    counts = counts_of(spectrum)
    at_floor = counts[-1]
    compared = beside(forced, at_floor, note)
    return Degeneracy(
        eigenvalues=spectrum.values.sort().values,
        noise_floor=spectrum.noise_floor,
        nullity=int(at_floor.nullity),
        rank=at_floor.rank if isinstance(floor, int) else compared.rank,
        gap=at_floor.gap,
        structural_nullity=compared.structural_nullity,
        excess=compared.excess,
        structural_note=compared.note,
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


def _forced(packed: PointOperator) -> tuple[StructuralFloor | None, Tensor | None, str | None]:
    """What is forced on a plain Hessian, vectors that are null for certain, and why there is nothing."""
    objective = getattr(packed, "objective", None)
    if not isinstance(packed, PackedHessian) or not isinstance(objective, ModuleObjective):
        return None, None, "known for the Hessian of a model's loss alone"
    source = objective.source
    if source is None:
        return None, None, "not known with a closure or in train mode"
    model, loss, data = source
    try:
        floor = structural_floor(model, data, loss, dense_up_to=packed.shape[1])
        vectors = null_vectors(model, data, loss).to(packed.device, torch.float64)
    except (LossrayError, TypeError, ValueError, RuntimeError) as error:  # it takes no single tensor
        return None, None, str(error)
    return floor, vectors, None
