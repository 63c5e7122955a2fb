"""The gauges that [angles] asks for at one checkpoint, and the Hessian's eigenpairs in each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lossray.errors import ModelError
from lossray.geometry import gauges
from lossray.geometry.gauges import Gauge
from lossray.geometry.vectors import Name
from lossray.measures.pack_point import PackPoint
from lossray.networks.symmetry import rescaling_symmetry
from lossray.operators.transforms import PackedScaled, PointOperator
from lossray.seeds import stream
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import Wanted
from lossray.training.evaluation import keeps_function

RAW = "raw"


@dataclass(frozen=True)
class GaugeEnds:
    """The eigenpairs of one operator at both ends.

    Attributes:
        largest: the leading pairs.
        smallest: the pair of the smallest eigenvalue.
    """

    largest: PackedEigenPairs
    smallest: PackedEigenPairs


def gauges_at(point: PackPoint) -> dict[str, Gauge]:
    """The gauges by name, those that do not exist left out.

    `balanced` needs a network whose units can be rescaled, `preconditioned` an optimizer with a
    preconditioner that has taken a step. For sgd and momentum it is the identity, and so the same as `raw`.
    """
    by_name: dict[str, Gauge] = {}
    for name in point.study.angles.gauges:
        gauge = _gauge(name, point)
        if gauge is not None:
            by_name[name] = gauge
    return by_name


def operator_name(gauge: str) -> str:
    """Under which the eigenpairs of a gauge are stored."""
    return "hessian" if gauge == RAW else f"hessian@{gauge}"


def stored_name(gauge: str, end: str) -> Name:
    """Of the eigenpairs of a gauge in the file of eigenvectors."""
    return (operator_name(gauge), "all", end)


def eigenpairs_in(point: PackPoint, gauge: Gauge, hessian: PointOperator, *, top: int) -> GaugeEnds:
    """The leading pairs and the smallest one of S H S.

    Args:
        point: the pack at the checkpoint.
        gauge: S.
        hessian: H.
        top: pairs at the large end.
    """
    operator = PackedScaled(hessian, gauge.scale)
    largest, smallest = packed_eigenpairs(
        operator,
        [Wanted("largest", top), Wanted("smallest", 1, confirm=False)],
        seeds=[stream(seed, operator_name(gauge.name), point.step) for seed in point.pack.seeds],
        tolerance=point.study.curvature.tolerance,
        alive=point.alive,
    )
    return GaugeEnds(largest, smallest)


def stored_ends(spectra: Mapping[Name, PackedEigenPairs], gauge: Gauge) -> GaugeEnds | None:
    """The pairs of a gauge in a file of eigenvectors; those of `raw` where the gauge is the identity."""
    for name in (gauge.name, *((RAW,) if gauge.identity else ())):
        if stored_name(name, "largest") in spectra:
            return GaugeEnds(spectra[stored_name(name, "largest")], spectra[stored_name(name, "smallest")])
    return None


def _gauge(name: str, point: PackPoint) -> Gauge | None:
    if name == RAW:
        return gauges.raw(point.theta)
    if name == "adaptive":
        return gauges.adaptive(point.theta)
    if name == "balanced":
        return _balanced(point)
    scale = point.optimizer.scale() if point.optimizer else None
    return (
        None if scale is None else gauges.preconditioned(scale.masked_fill(~point.alive[:, None], torch.nan))
    )


def _balanced(point: PackPoint) -> Gauge | None:
    """None where no rescaling leaves the function of every run as it is, which is measured."""
    inputs = point.dataset.train.inputs
    try:
        symmetry = rescaling_symmetry(point.stack.template, point.stack.layout, (inputs, None))
    except ModelError:
        return None
    diagonal = symmetry.diagonal(symmetry.balance_factors(point.theta))
    scaled = point.theta.double() * diagonal
    eps = symmetry.seen.eps
    kept = keeps_function(point.stack, point.theta, scaled, point.buffers, inputs, eps=eps)
    return gauges.balanced(diagonal) if bool((kept | ~point.alive).all()) else None
