"""Is one model's curvature singular? `lossray.degeneracy`."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossray.errors import LossrayError, ModelError, StudyError
from lossray.nullity.counts import counts_of, dense_matrices, spectrum_of
from lossray.nullity.structural_floor import StructuralFloor, beside, null_vectors, structural_floor
from lossray.operators.modules import ModuleObjective
from lossray.operators.packed import PackedHessian
from lossray.operators.transforms import PointOperator
from lossray.spectra.operator import SingleOperator
from lossray.spectra.summary import Summarised

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Degeneracy(Summarised):
    """The zero eigenvalues of one operator, and those that are forced to be zero; it prints as a few lines.

    Attributes:
        eigenvalues: [d] float64, ascending.
        noise_floor: an eigenvalue of this size or less cannot be told from zero.
        nullity: how many there are.
        rank: the others; None where no gap supports it, and for products in float32.
        gap: smallest |eigenvalue| above the noise floor over the largest below; inf where these are 0.
        structural_nullity: a lower bound where ``excess`` is None; None where nothing is known.
        excess: nullity beyond it; None without a rank, and where more might be forced.
        structural_note: why there is no structural nullity.
        counts: threshold -> eigenvalues with |lambda| <= threshold; descending, the noise floor last.
        dim: d.
        method: "dense".
    """

    eigenvalues: Tensor
    noise_floor: float
    nullity: int
    rank: int | None
    gap: float
    structural_nullity: int | None
    excess: int | None
    structural_note: str | None
    counts: dict[float, int]
    dim: int
    method: str

    @property
    def lambda_max(self) -> float:
        """|lambda|max."""
        return float(self.eigenvalues.abs().max())

    def summary(self) -> str:
        """Nullity and rank, what of it is forced, and the thresholds at which the count changes."""
        rank = "no gap supports a rank" if self.rank is None else f"rank {self.rank:,}"
        lines = [
            f"nullity {self.nullity:,} of {self.dim:,} at the noise floor {self.noise_floor:.2g}, with a "
            f"gap of {self.gap:.2g} above it; {rank}",
            f"forced by architecture, data and loss: {self._forced()}",
            "eigenvalues up to a share of |lambda|max:",
        ]
        before = self.dim
        for threshold, count in self.counts.items():
            if count < before:
                lines.append(f"{threshold / (self.lambda_max or 1):12.2g} {count:8,}")
            before = count
        return "\n".join(lines)

    def to_frame(self) -> "pd.DataFrame":
        """One row per threshold, with columns of the table `degeneracy`.

        Excess, gap and rank are those at the noise floor, the last row, and missing in the others.
        """
        import pandas as pd

        tested, above = list(self.counts.items()), [None] * (len(self.counts) - 1)
        return pd.DataFrame(
            {
                "method": self.method,
                "tau": [threshold / (self.lambda_max or 1) for threshold, _ in tested],
                "threshold": [threshold for threshold, _ in tested],
                "at_noise_floor": [False for _ in above] + [True],
                "nullity": [count for _, count in tested],
                "structural_nullity": self.structural_nullity,
                "structural_note": self.structural_note,
                "excess": [*above, self.excess],
                "gap": [*above, self.gap if math.isfinite(self.gap) else None],
                "noise_floor": self.noise_floor,
                "rank": [*above, self.rank],
                "rank_at_least": [self.dim - count for _, count in tested],
                "dim": self.dim,
                "lambda_max": self.lambda_max,
            }
        )

    def _forced(self) -> str:
        if self.structural_nullity is None:
            return f"not known ({self.structural_note})"
        if self.excess is None:
            return f"{self.structural_nullity:,} or more"
        return f"{self.structural_nullity:,}, so that {self.excess:,} are in excess"


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
        ModelError: the products are not finite, or not those of the model.

    Example:
        f(x) = b max(0, a x) is the same function where a is doubled and b is halved. At a minimum of the loss
        that makes an eigenvalue zero. Away from it nothing is zero: it is in excess of what is forced.

        >>> import lossray, torch
        >>> a, b = (torch.nn.Linear(1, 1, bias=False) for _ in "ab")
        >>> _ = torch.nn.init.ones_(a.weight), torch.nn.init.ones_(b.weight)
        >>> model, data = torch.nn.Sequential(a, torch.nn.ReLU(), b), (torch.ones(1, 1), torch.ones(1, 1))
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, data, dtype=torch.float64)
        >>> zeros = lossray.degeneracy(H)
        >>> zeros.rank, zeros.nullity, zeros.structural_nullity, zeros.excess
        (1, 1, 0, 1)
    """
    packed: PointOperator | None = getattr(operator, "packed", None)
    if packed is None:
        raise StudyError(
            f"operator: found {type(operator).__name__}; allowed: lossray.Hessian(model, loss, data), "
            "GaussNewton, EmpiricalFisher, or one of these Restricted, Scaled or Preconditioned"
        )
    _check_floor(floor, packed.shape[1])
    derived, vectors, note = _forced(packed)
    forced = StructuralFloor(floor, {}, True) if isinstance(floor, int) else floor or derived
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
    shown = floor if isinstance(floor, int | float | str) else type(floor).__name__
    raise StudyError(
        f"floor: found {shown!r}; allowed: what lossray.structural_floor gives, or an integer from 0 to {dim}"
    )


def _forced(packed: PointOperator) -> tuple[StructuralFloor | None, Tensor | None, str | None]:
    """What is forced on a plain Hessian, vectors that are null for certain, and why there is nothing."""
    objective = getattr(packed, "objective", None)
    if not isinstance(packed, PackedHessian) or not isinstance(objective, ModuleObjective):
        return None, None, "known for the Hessian of a model's loss alone"
    source = objective.source
    if source is None:
        return None, None, "not known with a closure, with outputs= or in train mode"
    model, loss, data = source
    try:
        floor = structural_floor(model, data, loss, dense_up_to=packed.shape[1])
        vectors = null_vectors(model, data, loss).to(packed.device, torch.float64)
    except (LossrayError, TypeError, ValueError, RuntimeError) as error:  # it takes no single tensor
        return None, None, str(error)
    return floor, vectors, None
