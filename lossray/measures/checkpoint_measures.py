"""Everything that is measured at one checkpoint: the spectra of [curvature], and geometry from the Hessian.

All members are analysed at once. One that has diverged is left out of every computation; its rows are null.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lossray.geometry.vectors import Name
from lossray.measures.cells import Row
from lossray.measures.checkpoint_geometry import geometry_at
from lossray.measures.checkpoint_spectra import HESSIAN, Named, operators_of, spectrum_rows
from lossray.measures.pack_point import PackPoint, objective_at
from lossray.seeds import stream
from lossray.spectra.analysis import PackedAnalysis, packed_analysis
from lossray.spectra.certified_pairs import PackedEigenPairs, joined, missing
from lossray.study.demands import pairs_needed
from lossray.study.keys import CURVATURE_TABLES


@dataclass(frozen=True)
class CheckpointMeasures:
    """What is measured at one checkpoint.

    Attributes:
        rows: by table.
        spectra: the eigenpairs by operator, block and end.
        members: of the pack.
    """

    rows: dict[str, list[Row]]
    spectra: dict[Name, PackedEigenPairs]
    members: int


def measure_checkpoint(point: PackPoint) -> CheckpointMeasures:
    """The spectra of every operator that [curvature] asks for, and the geometry of the directions."""
    rows: dict[str, list[Row]] = {name: [] for name in CURVATURE_TABLES}
    spectra: dict[Name, PackedEigenPairs] = {}
    scale = point.optimizer.scale() if point.optimizer else None
    objective, mode = objective_at(point), point.pack.product_mode
    for named in operators_of(point.study, objective, mode=mode, scale=scale):
        analysis = _analysis(point, named)
        spectra[*named.key, "largest"] = analysis.pairs
        spectra[*named.key, "smallest"] = analysis.smallest
        for table, entries in spectrum_rows(point, named, analysis).items():
            rows[table] += entries
        if named.key == HESSIAN:
            geometry = geometry_at(point, named.operator, analysis)
            rows |= geometry.rows
            spectra |= geometry.spectra
    return CheckpointMeasures(rows, spectra, len(point.theta))


def joined_measures(parts: Sequence[CheckpointMeasures]) -> CheckpointMeasures:
    """What is measured of several parts of a pack, in the order of its members.

    The eigenpairs of an operator that a part does not have, as where a preconditioner has zeros, are missing.
    """
    if len(parts) == 1:
        return parts[0]
    rows = {table: [row for part in parts for row in part.rows[table]] for table in parts[0].rows}
    examples = {name: pairs for part in parts for name, pairs in part.spectra.items()}
    spectra = {
        name: joined(
            [
                part.spectra[name] if name in part.spectra else missing(part.members, like=pairs)
                for part in parts
            ]
        )
        for name, pairs in examples.items()
    }
    return CheckpointMeasures(rows, spectra, sum(part.members for part in parts))


def _analysis(point: PackPoint, named: Named) -> PackedAnalysis:
    """Each member's from random vectors of its own; those of the angles' operator as many as they need."""
    study, dim = point.study, named.operator.shape[1]
    settings = study.curvature
    top = min(settings.top, dim)
    if named.key == HESSIAN:
        top = pairs_needed(study, point.dataset.n_outputs, dim)
    return packed_analysis(
        named.operator,
        top=top,
        tolerance=settings.tolerance,
        probes=settings.probes,
        steps=settings.steps,
        seeds=[stream(seed, f"{named.name}/{named.block}", point.step) for seed in point.pack.seeds],
        alive=point.alive,
    )
