"""How singular the Hessian of a pack is at one checkpoint: the table `degeneracy` (theory 5B)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossray.errors import DataError, ModelError
from lossray.measures.cells import Row, finite
from lossray.measures.pack_point import PackPoint, model_of
from lossray.memory import fitting, is_out_of_memory
from lossray.networks.nests import rows
from lossray.networks.symmetry import RescalingSymmetry, rescaling_symmetry
from lossray.nullity.counts import (
    MATRICES,
    Count,
    MatrixOperator,
    Spectrum,
    counts_of,
    dense_matrices,
    gram_counts,
    quadrature_counts,
    spectrum_of,
)
from lossray.nullity.polish import polish
from lossray.nullity.structural_floor import StructuralFloor, beside, null_vectors, structural_floor
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedGaussNewton, PackedHessian
from lossray.seeds import stream

UNITS_AT_ONCE = 64  # of which K_j theta is formed


@dataclass(frozen=True)
class LivingRun:
    """One living run at the checkpoint.

    Attributes:
        index: in the pack.
        theta: [d] float64.
        floor: what architecture, data and loss force.
        note: why there is none.
        null_vectors: [n, d] that are null for certain.
    """

    index: int
    theta: Tensor
    floor: StructuralFloor | None
    note: str | None
    null_vectors: Tensor | None


def degeneracy_rows(point: PackPoint) -> list[Row]:
    """Rows of `degeneracy` at a checkpoint; a diverged member has none."""
    settings = point.study.degeneracy
    assert settings is not None
    dim, limit = point.stack.dim, settings.dense_up_to
    device = point.theta.device
    rows: list[Row] = []
    at_once = fitting(MATRICES * 8 * dim**2, device) if dim <= limit else len(point.theta)
    for members in _chunks(point, at_once):
        if dim <= limit:
            rows += _dense_rows(point, members, "checkpoint")
            if settings.polish:
                rows += _polished_rows(point, members)
        else:
            rows += _quadrature_rows(point, members)
            if len(point.examples.targets) * _outputs_of_one(point) <= limit:
                rows += _gram_rows(point, members)
    return rows


def _chunks(point: PackPoint, at_once: int) -> Iterator[list[LivingRun]]:
    """The living members, as many at a time as fit the memory."""
    living = point.alive.nonzero().flatten().tolist()
    for start in range(0, len(living), at_once):
        yield [_member(point, r) for r in living[start : start + at_once]]


@torch.no_grad()
def _outputs_of_one(point: PackPoint) -> int:
    """How many numbers the model returns for one example."""
    first = {name: tensor[:1] for name, tensor in point.buffers.items()}
    return point.stack.outputs(point.theta[:1], first, rows(point.examples.inputs, slice(1))).numel()


def _member(point: PackPoint, r: int) -> LivingRun:
    assert point.study.degeneracy is not None
    limit, loss = point.study.degeneracy.dense_up_to, point.loss
    model, data = model_of(point, r), (point.examples.inputs, point.examples.targets)
    floor, note, vectors = None, None, None
    try:
        floor = structural_floor(model, data, loss, dense_up_to=limit)
        vectors = null_vectors(model, data, loss).to(point.theta.device)
    except (DataError, ModelError, TypeError, ValueError, RuntimeError) as error:
        # A user's model that cannot be traced, or that takes several inputs.
        if is_out_of_memory(error):
            raise
        note = str(error)
    return LivingRun(r, point.theta[r].double(), floor, note, vectors)


def _objective(point: PackPoint, members: Sequence[LivingRun], dtype: torch.dtype) -> PackedObjective:
    index, examples = [member.index for member in members], point.examples
    return PackedObjective(
        point.stack,
        point.theta[index],
        {name: tensor[index] for name, tensor in point.buffers.items()},
        point.loss,
        [(examples.inputs, examples.targets)],
        dtype=dtype,
    )


def _polished_rows(point: PackPoint, members: Sequence[LivingRun]) -> list[Row]:
    """The same at the critical points that are reached from the checkpoint."""
    reached = polish(_objective(point, members, torch.float64))
    theta = point.theta.double()
    theta[[member.index for member in members]] = reached
    there = replace(point, theta=theta)
    kept = [member.index for member, end in zip(members, reached, strict=True) if torch.isfinite(end).all()]
    moved = [_with_symmetry(there, _member(there, r)) for r in kept]
    return _dense_rows(there, moved, "polished") if moved else []


def _with_symmetry(point: PackPoint, member: LivingRun) -> LivingRun:
    """At a critical point K theta of every unit is null for certain too (theory 2.1)."""
    symmetry = _symmetry(point)
    if symmetry is None:
        return member
    (vectors,) = symmetry.kernel_vectors(member.theta[None])
    vectors = vectors[vectors.norm(dim=1) > 0]
    null_directions = vectors if member.null_vectors is None else torch.cat([member.null_vectors, vectors])
    return replace(member, null_vectors=null_directions)


def _symmetry(point: PackPoint) -> RescalingSymmetry | None:
    """How units can be rescaled; None where they cannot."""
    try:
        data = (point.dataset.train.inputs, None)
        return rescaling_symmetry(point.stack.template, point.stack.layout, data)
    except ModelError:
        return None


def _dense_rows(point: PackPoint, members: Sequence[LivingRun], where: str) -> list[Row]:
    """All eigenvalues of the Hessian, raw and in the adaptive gauge, and of the Gauss-Newton matrix."""
    objective = _objective(point, members, torch.float64)
    hessian = PackedHessian(objective, mode=point.pack.product_mode)
    matrices, norms = dense_matrices(hessian), hessian.gradient.norm(dim=1).tolist()
    del hessian
    rows: list[Row] = []
    residuals = _symmetry_residuals(point, members, matrices)
    spectra = [
        spectrum_of(matrix, torch.float64, member.null_vectors)
        for matrix, member in zip(matrices, members, strict=True)
    ]
    quadratures = _quadratures(point, MatrixOperator(matrices), members, spectra)
    for i, member in enumerate(members):
        extra: Row = {"gradient_norm": norms[i], "symmetry_residual": residuals[i]}
        hessian_rows = _rows(point, member, "hessian", "dense", _counts(spectra[i]), extra)
        rows += _with_bias(hessian_rows, quadratures[i])
        rows += _adaptive_rows(point, member, matrices[i], extra)
    del matrices
    ggn = dense_matrices(PackedGaussNewton(objective, mode=point.pack.product_mode))
    for i, member in enumerate(members):
        extra = {"gradient_norm": norms[i], "symmetry_residual": None}
        spectrum = spectrum_of(ggn[i], torch.float64, member.null_vectors)
        rows += _rows(point, member, "ggn", "dense", _counts(spectrum), extra)
    shared: Row = {"n_examples": len(point.examples.targets), "dtype": "float64", "point": where}
    return [row | shared for row in rows]


def _adaptive_rows(point: PackPoint, member: LivingRun, matrix: Tensor, extra: Row) -> list[Row]:
    """Counts of |theta| o H o |theta|, without the coordinates that are zero."""
    kept = member.theta != 0
    whole = bool(kept.all())
    scale = member.theta[kept].abs()
    scaled = scale[:, None] * matrix[kept][:, kept] * scale
    vectors = member.null_vectors / scale if member.null_vectors is not None and whole else None
    counts = _counts(spectrum_of(scaled, torch.float64, vectors))
    if not whole:
        member = replace(
            member, floor=None, note="coordinates that are zero drop out, and the floor's with them"
        )
    return _rows(point, member, "adaptive", "dense", counts, extra)


def _counts(spectrum: Spectrum | None) -> list[Count]:
    return counts_of(spectrum) if spectrum is not None else []


def _quadrature_rows(point: PackPoint, members: Sequence[LivingRun]) -> list[Row]:
    """Coarse counts for a Hessian that is too large to be formed."""
    dtype = point.study.curvature.dtype
    objective = _objective(point, members, getattr(torch, dtype))
    hessian = PackedHessian(objective, mode=point.pack.product_mode)
    rows: list[Row] = []
    for i, counts in enumerate(_quadratures(point, hessian, members)):
        extra: Row = {"gradient_norm": float(hessian.gradient[i].norm()), "symmetry_residual": None}
        rows += _rows(point, members[i], "hessian", "quadrature", counts, extra, dim=hessian.shape[1])
    return [row | {"n_examples": len(point.examples.targets), "dtype": dtype} for row in rows]


def _gram_rows(point: PackPoint, members: Sequence[LivingRun]) -> list[Row]:
    """The Gauss-Newton matrix exactly, from the Gram matrix of its factors."""
    objective = _objective(point, members, torch.float64)
    rows: list[Row] = []
    for member, counts in zip(members, gram_counts(objective), strict=True):
        rows += _rows(point, member, "ggn", "gram", counts, {}, dim=point.stack.dim)
    return [row | {"n_examples": len(point.examples.targets), "dtype": "float64"} for row in rows]


def _quadratures(
    point: PackPoint,
    operator: MatrixOperator | PackedHessian,
    members: Sequence[LivingRun],
    spectra: Sequence[Spectrum | None] | None = None,
) -> list[list[Count]]:
    """What the quadrature of [curvature] finds, at shares of the exact |lambda|max where it is known."""
    settings = point.study.curvature
    scales, alive = None, None
    if spectra is not None:
        scales = [spectrum.scale if spectrum is not None else math.nan for spectrum in spectra]
        alive = torch.tensor([spectrum is not None for spectrum in spectra], device="cpu")
    seeds = [point.pack.seeds[member.index] for member in members]
    return quadrature_counts(
        operator,
        probes=settings.probes,
        steps=settings.steps,
        seeds=[stream(seed, "degeneracy", point.step) for seed in seeds],
        scales=scales,
        alive=alive,
    )


def _with_bias(rows: list[Row], quadrature: Sequence[Count]) -> list[Row]:
    """The rows, with what the quadrature counts more at the same thresholds."""
    nullities = {count.tau: count.nullity for count in quadrature}
    return [
        row | {"quadrature_bias": nullities[row["tau"]] - row["nullity"]} if row["tau"] in nullities else row
        for row in rows
    ]


def _rows(
    point: PackPoint,
    member: LivingRun,
    operator: str,
    method: str,
    counts: Sequence[Count],
    extra: Row,
    dim: int | None = None,
) -> list[Row]:
    """Rows of one operator of one member.

    What is forced on the Hessian is null for the Gauss-Newton matrix too, which has more at every point:
    mixing and rescaling. There it is a lower bound, and an excess is not known.
    """
    noise_floor = next((count.threshold for count in counts if count.at_noise_floor), None)
    rows: list[Row] = []
    for count in counts:
        compared = beside(member.floor, count, member.note)
        row: Row = {
            "run_id": point.pack.run_ids[member.index],
            "step": point.step,
            "operator": operator,
            "point": "checkpoint",
            "method": method,
            "tau": count.tau,
            "threshold": count.threshold,
            "at_noise_floor": count.at_noise_floor,
            "nullity": count.nullity,
            "nullity_stderr": finite(count.stderr),
            "structural_nullity": compared.structural_nullity,
            "structural_note": compared.note,
            "excess": compared.excess if operator != "ggn" else None,
            "gap": finite(count.gap),
            "noise_floor": noise_floor,
            "rank": compared.rank,
            "rank_at_least": count.rank_at_least,
            "dim": dim if dim is not None else int(count.nullity) + count.rank_at_least,
            "lambda_max": count.threshold / count.tau if count.tau else None,
        }
        rows.append(row | extra)
    return rows


def _symmetry_residuals(
    point: PackPoint, members: Sequence[LivingRun], matrices: Tensor
) -> list[float | None]:
    """Largest |H K_j theta| over the units that can be rescaled; None where there is no such unit."""
    symmetry = _symmetry(point)
    if symmetry is None:
        return [None] * len(members)
    residuals: list[float | None] = []
    for member, matrix in zip(members, matrices, strict=True):
        largest = 0.0
        for start in range(0, symmetry.units, UNITS_AT_ONCE):
            units = slice(start, start + UNITS_AT_ONCE)
            (vectors,) = symmetry.kernel_vectors(member.theta[None], units)
            largest = max(largest, float(torch.linalg.vector_norm(vectors @ matrix.T, dim=1).max()))
        residuals.append(largest if math.isfinite(largest) else None)
    return residuals
