"""Task keys: the hash of all that a task's result depends on, and of nothing else.

Equal keys mean equal rows. The study's name, [resources], [claims] and the place of the data are in none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lossray.curvature import vectors
from lossray.plugins import source_hash
from lossray.settings import content_hash
from lossray.storage.tables import TABLES
from lossray.study.packs import Pack
from lossray.study.settings import Study

KEY_VERSION = 1  # goes up when the same settings come to mean other numbers
TRAINING_TABLES = ("runs", "training", "checkpoints")
CURVATURE_TABLES = ("eigenvalues", "curvature", "directions", "angles")


@dataclass(frozen=True)
class StudyInputs:
    """What a study depends on and does not contain."""

    data_key: str  # content hash of the data: `Dataset.fingerprint`
    sources: Mapping[str, str] = field(default_factory=dict)  # source hash by "package.module:function"


def study_inputs(study: Study, data_key: str) -> StudyInputs:
    """Hash the source of every user module that the study names.

    Raises:
        StudyError: a module is not found.
    """
    names = sorted(set(study.user_functions().values()))
    return StudyInputs(data_key, {name: source_hash(name) for name in names})


def training_key(pack: Pack, study: Study, inputs: StudyInputs) -> str:
    """Key of the training of a pack.

    Of the analysis sections only `angles.shadow` is in it: shadow optimizers run along with the training.
    """
    return content_hash({"kind": "training", **_training_content(pack, study, inputs)})


def checkpoint_key(training_key: str, step: int) -> str:
    """Key of the segment of a training that ends with the checkpoint at `step`."""
    return content_hash({"kind": "checkpoint", "training": training_key, "step": step})


def curvature_key(pack: Pack, step: int, study: Study, inputs: StudyInputs) -> str:
    """Key of the analysis of a pack's checkpoint at `step`."""
    return content_hash(
        {
            "kind": "curvature",
            "checkpoint": checkpoint_key(training_key(pack, study, inputs), step),
            "product_mode": pack.product_mode,
            "curvature": study.curvature.plain(),
            "angles": study.angles.plain(),
            "vectors": vectors.FORMAT,
            "tables": {name: TABLES[name].version for name in CURVATURE_TABLES},
        }
    )


def pair_key(earlier: str, later: str, study: Study) -> str:
    """Key of the comparison of two neighbouring checkpoints, from those of their analyses."""
    tables = {name: TABLES[name].version for name in pair_tables(study)}
    return content_hash({"kind": "pair", "curvature": [earlier, later], "tables": tables})


def pair_tables(study: Study) -> tuple[str, ...]:
    """The tables that a comparison writes; none where the study asks for nothing of it.

    Overlaps and angles need the eigenvectors that `curvature.vectors` keeps.
    """
    vectors = study.curvature.vectors
    displacement = "displacement" in study.angles.directions
    wanted = {"overlaps": vectors, "directions": displacement, "angles": vectors and displacement}
    return tuple(name for name, asked in wanted.items() if asked)


def _training_content(pack: Pack, study: Study, inputs: StudyInputs) -> dict[str, Any]:
    involved = {pack.model.name, study.training.loss, study.data.source}
    return {
        "version": KEY_VERSION,
        "tables": {name: TABLES[name].version for name in TRAINING_TABLES},
        "model": pack.model.plain(),
        "optimizer": pack.optimizer.plain(),
        "seeds": list(pack.seeds),
        "executor": pack.executor,
        "training": study.training.plain(),
        "shadow": list(study.angles.shadow),
        "data": inputs.data_key,
        "sources": {name: value for name, value in inputs.sources.items() if name in involved},
    }
