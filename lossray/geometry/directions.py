"""Curvature along directions, as a whole and layer by layer: rows of `directions` and `shares`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.geometry.finite_step import FiniteStep
from lossray.geometry.nulls import layer_index, layer_sums
from lossray.networks.layout import Layout
from lossray.networks.parameter_layers import layers
from lossray.spectra.operator import PackedOperator

LAYERS_AT_ONCE = 16  # whose products are formed together


@dataclass(frozen=True)
class Along:
    """One direction of R members, and the Hessian along it; NaN where the direction is zero or not finite.

    Attributes:
        units: [R, d] float64, u / |u|.
        norms: [R] float64, |u|.
        products: [R, d] H u / |u|.
    """

    units: Tensor
    norms: Tensor
    products: Tensor


@dataclass(frozen=True)
class Reference:
    """What the curvature along a direction is held against.

    Attributes:
        gradient: [R, d] of the loss over the analysis set.
        trace: [R] of the Hessian; NaN where it is not known.
        trace_stderr: [R] its standard error.
        lambda_max: [R] the largest eigenvalue.
    """

    gradient: Tensor
    trace: Tensor
    trace_stderr: Tensor
    lambda_max: Tensor


@dataclass(frozen=True)
class DirectionRow:
    """One direction u of one member; NaN for a dead member, and where u = 0 leaves it undefined.

    Attributes:
        member: index of the member in the pack.
        direction: its name.
        norm: |u|.
        curvature: u'Hu / u'u.
        finite_step_curvature: from losses at theta and a step to both sides of it, see `FiniteStep`.
        finite_step_curvature_noise: estimate of its rounding error.
        step_norm: length of that step.
        relative_curvature: curvature over trace / d.
        relative_curvature_stderr: its standard error, from that of the trace.
        sharpness_share: curvature over lambda_max.
        cosine_with_gradient: cosine of the angle to the gradient of the analysis set.
    """

    member: int
    direction: str
    norm: float
    curvature: float
    finite_step_curvature: float
    finite_step_curvature_noise: float
    step_norm: float
    relative_curvature: float
    relative_curvature_stderr: float
    sharpness_share: float
    cosine_with_gradient: float


@dataclass(frozen=True)
class ShareRow:
    """One layer's part of one direction u of one member.

    Attributes:
        member: index of the member in the pack.
        direction: its name.
        block: name of the layer.
        energy_share: |u_l|^2 / |u|^2.
        curvature_part: u_l'(Hu)_l / u'u.
        dim: number of parameters of the layer.
        curvature_within: u_l'H u_l / u'u; NaN where it was not asked for.
        curvature_across: u_l'H (u - u_l) / u'u, what of the part other layers bring; NaN likewise.
    """

    member: int
    direction: str
    block: str
    energy_share: float
    curvature_part: float
    dim: int
    curvature_within: float = math.nan
    curvature_across: float = math.nan


def measure(directions: Mapping[str, Tensor], operator: PackedOperator) -> dict[str, Along]:
    """Apply the members' Hessians to directions [R, d] by name: one product for each."""
    along = {}
    for name, vectors in directions.items():
        units, norms = unit_vectors(vectors)
        # Unit vectors do not overflow in float32; zeros for NaN keep it from spreading.
        products = operator.apply(torch.nan_to_num(units, nan=0.0))
        along[name] = Along(units, norms, products)
    return along


def direction_rows(
    measured: Mapping[str, Along], reference: Reference, steps: Mapping[str, FiniteStep]
) -> list[DirectionRow]:
    """One row per direction and member.

    Args:
        measured: from `measure`.
        reference: of the same members.
        steps: finite-step curvature by direction; those that are missing are NaN.
    """
    along = unit_vectors(reference.gradient)[0]
    mean = reference.trace / along.shape[1]
    rows = []
    for name, one in measured.items():
        curvature = (one.units * one.products).sum(dim=1)
        relative = curvature / mean
        unknown = torch.full_like(curvature, torch.nan)
        step = steps.get(name, FiniteStep(unknown, unknown, unknown))
        columns = (
            one.norms,
            curvature,
            step.curvature,
            step.noise,
            step.norm,
            relative,
            (relative * reference.trace_stderr / reference.trace).abs(),  # to first order
            curvature / reference.lambda_max,
            (one.units * along).sum(dim=1).clamp(-1, 1),
        )
        values = zip(*(column.tolist() for column in columns), strict=True)
        rows += [DirectionRow(r, name, *numbers) for r, numbers in enumerate(values)]
    return rows


def curvature_within_layers(
    measured: Mapping[str, Along], operator: PackedOperator, layout: Layout
) -> dict[str, Tensor]:
    """The curvature u_l'H u_l / u'u [R, layers] of every direction: one product for each of its layers."""
    index = layer_index(layout).to(operator.device)
    numbers = torch.arange(len(layers(layout)), device=operator.device)
    within = {}
    for name, one in measured.items():
        sums = []
        for some in numbers.split(LAYERS_AT_ONCE):
            pieces = one.units[:, None] * (index == some[:, None])  # [R, layers, d]
            products = operator.apply(torch.nan_to_num(pieces, nan=0.0))
            sums.append((pieces * products).sum(dim=2))
        within[name] = torch.cat(sums, dim=1)
    return within


def share_rows(
    measured: Mapping[str, Along], layout: Layout, within: Mapping[str, Tensor] | None = None
) -> list[ShareRow]:
    """One row per direction, layer and member.

    Args:
        measured: from `measure`.
        layout: how d divides into parameters; a layer is the module that owns them.
        within: from `curvature_within_layers`; None where that was not asked for.
    """
    index, names = layer_index(layout), list(layers(layout))
    sizes = torch.bincount(index).tolist()
    rows = []
    for direction, one in measured.items():
        index = index.to(one.units.device)
        energies = layer_sums(one.units.square(), index, len(names)).tolist()
        parts = layer_sums(one.units * one.products, index, len(names))
        blocks = torch.full_like(parts, math.nan) if within is None else within[direction]
        part, inside, across = parts.tolist(), blocks.tolist(), (parts - blocks).tolist()
        rows += [
            ShareRow(r, direction, block, energies[r][i], part[r][i], sizes[i], inside[r][i], across[r][i])
            for r in range(len(one.units))
            for i, block in enumerate(names)
        ]
    return rows


def unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length 1, float64, and their lengths [R]; NaN for a row that is zero or not finite.

    Scaled by the largest entry first, so that no square overflows or vanishes.
    """
    vectors = vectors.to(torch.float64)
    largest = vectors.abs().amax(dim=1, keepdim=True)
    scaled = vectors / largest
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    norms = torch.where(largest == 0, torch.zeros_like(largest), largest * lengths)
    return scaled / lengths, norms[:, 0]
