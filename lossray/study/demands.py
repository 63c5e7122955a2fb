"""What the settings of a study demand of its tasks: operators, eigenpairs, checkpoints, pairs of runs."""

from collections.abc import Sequence

from lossray.connectivity.settings import ConnectivitySettings
from lossray.geometry.settings import EIGENVECTOR_KINDS
from lossray.geometry.subspaces import subspaces
from lossray.study.packs import Pack
from lossray.study.settings import Study

WINDOW_PAIRS = 10  # of the largest subspace of the window statistic
V1_PAIRS = 2  # the second one's value tells how well the first is known


def operators_asked(study: Study) -> dict[str, bool]:
    """Operators to analyse, each with whether its layers are asked for too.

    The Hessian comes first, and always where there are angles: they are held against its eigenvectors.
    """
    asked: dict[str, bool] = {"hessian": False} if study.angles.directions else {}
    for entry in study.curvature.operators:
        name, _, blocks = entry.partition(":")
        asked[name] = asked.get(name, False) or blocks == "layers"
    return dict(sorted(asked.items(), key=lambda item: item[0] != "hessian"))


def asks_for_angles(study: Study) -> bool:
    """Whether eigenvectors are needed in the gauges."""
    return bool(study.angles.directions or study.angles.window)


def pairs_needed(study: Study, n_outputs: int, dim: int) -> int:
    """As many eigenpairs as [curvature] asks for, and as the subspaces of [angles] need; d at most."""
    return min(max(study.curvature.top, gauge_pairs(study, n_outputs, dim)), dim)


def gauge_pairs(study: Study, n_outputs: int, dim: int) -> int:
    """As many as the subspaces of [angles] need; d at most."""
    if study.angles.subspaces == "v1":
        return min(V1_PAIRS, dim)
    needed = list(subspaces(n_outputs, dim).values()) if study.angles.directions else []
    return min(max([*needed, WINDOW_PAIRS if study.angles.window else 1]), dim)


def needs_course(study: Study) -> bool:
    """Whether a slice lies in the plane of the trajectory, of which all checkpoints must then be there."""
    return study.surfaces is not None and "pca" in study.surfaces.kinds


def needs_eigenvectors(study: Study) -> bool:
    """Whether a slice lies along eigenvectors, which the analysis of the checkpoint leaves."""
    kinds = study.surfaces.kinds if study.surfaces is not None else ()
    return study.curvature.vectors and bool(set(EIGENVECTOR_KINDS) & set(kinds))


def pairs_of(settings: ConnectivitySettings, pack: Pack, earlier: Sequence[Pack]) -> list[tuple[str, str]]:
    """The pairs whose second run is of this pack: with packs added, pairs are added and none changes."""
    runs = [run_id for other in (*earlier, pack) for run_id in other.run_ids]
    pairs = []
    for b in range(len(runs)):
        first = max(0, b - 1) if settings.pairs == "neighbours" else 0
        pairs += [(runs[a], runs[b]) for a in range(first, b) if runs[b] in pack.run_ids]
    return pairs
