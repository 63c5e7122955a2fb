"""Task keys: the hash of all that a task's result depends on, and of nothing else.

Equal keys mean equal rows. The study's name, [resources], [claims], [tuning] and the place of the data are in
none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lossray.plugins import load
from lossray.settings import content_hash
from lossray.source_hash import file_hash, source_hash
from lossray.storage.recordings import Recording
from lossray.storage.store import VECTORS_FORMAT
from lossray.storage.tables import TABLES
from lossray.study.packs import Pack
from lossray.study.settings import Study
from lossray.training.settings import checkpoint_steps

# What a version stands for, when it goes up, and what then happens to stores: docs/versions.md.
KEY_VERSION = 1  # of training; goes up when the same settings come to mean other numbers
TRAINING_TABLES = ("runs", "training", "checkpoints")
CURVATURE_VERSION = 4  # likewise, of an analysis
DEGENERACY_VERSION = 3
CONNECTIVITY_VERSION = 2
ENSEMBLES_VERSION = 2
PLACES_VERSION = 1  # of trajectories, separations and surfaces
CONNECTIVITY_TABLES = ("paths", "barriers")
ENSEMBLE_TABLES = ("ensembles", "members", "predictions", "rescalings", "logits")
CURVATURE_TABLES = (
    "eigenvalues",
    "density",
    "curvature",
    "directions",
    "shares",
    "angles",
    "alignment",
    "sharpness",
)
PAIR_TABLES = ("overlaps", "directions", "shares", "angles")


@dataclass(frozen=True)
class StudyInputs:
    """What a study depends on and does not contain.

    Attributes:
        data_key: content hash of the data, their `Dataset.fingerprint`.
        sources: source hash by "package.module:function".
        recordings: the recorded runs in the store; not in its manifest.
    """

    data_key: str
    sources: Mapping[str, str] = field(default_factory=dict)
    recordings: tuple[Recording, ...] = field(default=(), compare=False)

    def recorded_steps(self, pack: Pack) -> Mapping[int, str]:
        """Of a recorded run: content hash of its checkpoint by step; ascending."""
        matching = [recording.steps for recording in self.recordings if recording.run == pack.pack_id]
        return matching[0] if matching else {}


def study_inputs(
    study: Study,
    data_key: str,
    recordings: Sequence[Recording] = (),
    *,
    before: StudyInputs | None = None,
) -> StudyInputs:
    """Hash what every function of the user's is made of that the study names.

    All are imported first: a module may extend ``sys.path`` for what it imports.

    Args:
        study: the study.
        data_key: content hash of its data.
        recordings: the recorded runs of the store, where the study analyses those.
        before: what the store was made with, if there is one. Its hash of a function stays, and with it the
            keys, where it says as much as the one of now: a hash of lossray 0.1 whose files are what they
            were, and that of a function that returns the same data.

    Raises:
        StudyError: a module is not found, or its import raises.
    """
    functions = study.user_functions()
    for name in functions.values():
        load(name)
    uses = {name: [at for at, other in functions.items() if other == name] for name in functions.values()}
    sources = {}
    for name, key_paths in sorted(uses.items()):
        old_hash = before.sources.get(name) if before else None
        same_data = key_paths == [("data", "source")] and before is not None and before.data_key == data_key
        keep = old_hash is not None and (same_data or old_hash == file_hash(name))
        sources[name] = old_hash if keep and old_hash else source_hash(name)
    return StudyInputs(data_key, sources, tuple(recordings))


def versions_of(kind: str) -> dict[str, int]:
    """The versions that the keys of a kind of task hold, of what they are computed from included.

    Args:
        kind: as in the `tasks` table.

    Returns:
        By what has the version: "training", "curvature", ..., and "table eigenvalues", ...; empty for a kind
        that this version does not know.
    """
    training = {"training": KEY_VERSION, **_table_versions(TRAINING_TABLES)}
    positions = {**training, "places": PLACES_VERSION}
    form = int(VECTORS_FORMAT.rpartition("/")[2])
    curvature = {"curvature": CURVATURE_VERSION, "vectors": form, **_table_versions(CURVATURE_TABLES)}
    versions = {
        "training": training,
        "checkpoint": training,
        "curvature": {**training, **curvature},
        "pair": {**training, **curvature, **_table_versions(PAIR_TABLES)},
        "degeneracy": {**training, "degeneracy": DEGENERACY_VERSION, **_table_versions(["degeneracy"])},
        "trajectory": {**positions, **_table_versions(["trajectory"])},
        "separations": {**positions, **_table_versions(["separations"])},
        "surfaces": {**positions, **curvature, **_table_versions(["surfaces"])},
        "connectivity": {
            **training,
            "connectivity": CONNECTIVITY_VERSION,
            **_table_versions(CONNECTIVITY_TABLES),
        },
        "ensemble": {**training, "ensembles": ENSEMBLES_VERSION, **_table_versions(ENSEMBLE_TABLES)},
    }
    return versions.get(kind, {})


def _table_versions(names: Iterable[str]) -> dict[str, int]:
    return {f"table {name}": TABLES[name].version for name in names}


def training_key(pack: Pack, study: Study, inputs: StudyInputs) -> str:
    """Key of the training of a pack.

    Of the analysis sections only `angles.shadow` is in it: shadow optimizers run along with the training. A
    recorded run is not trained, but evaluated: its key holds the content of its checkpoints.
    """
    if pack.recorded is not None:
        recorded = {"run": pack.recorded.plain(), "steps": list(inputs.recorded_steps(pack).items())}
        return content_hash({"kind": "training", **recorded, **_recorded_content(pack, study, inputs)})
    return content_hash({"kind": "training", **_training_content(pack, study, inputs)})


def checkpoint_key(training_key: str, step: int) -> str:
    """Key of the segment of a training that ends with the checkpoint at `step`."""
    return content_hash({"kind": "checkpoint", "training": training_key, "step": step})


def checkpoint_keys(pack: Pack, study: Study, inputs: StudyInputs) -> dict[int, str]:
    """Key of the rows of every checkpoint of a pack, by step."""
    if pack.recorded is None:
        training = training_key(pack, study, inputs)
        return {step: checkpoint_key(training, step) for step in checkpoint_steps(study.training)}
    steps = inputs.recorded_steps(pack)
    first = next(iter(steps.values()), None)  # distances are measured from it
    shared = {"kind": "checkpoint", "first": first, **_recorded_content(pack, study, inputs)}
    return {step: content_hash({**shared, "checkpoint": content}) for step, content in steps.items()}


def curvature_key(pack: Pack, step: int, study: Study, inputs: StudyInputs) -> str:
    """Key of the analysis of a pack's checkpoint at `step`."""
    return content_hash(
        {
            "kind": "curvature",
            "version": CURVATURE_VERSION,
            "checkpoint": _origin(pack, step, study, inputs),
            "product_mode": pack.product_mode,
            "curvature": study.curvature.content(),
            "angles": study.angles.content(),
            "vectors": VECTORS_FORMAT,
            "tables": {name: TABLES[name].version for name in CURVATURE_TABLES},
        }
    )


def degeneracy_key(pack: Pack, step: int, study: Study, inputs: StudyInputs) -> str:
    """Key of the count of small eigenvalues at a pack's checkpoint."""
    assert study.degeneracy is not None
    settings = study.curvature
    return content_hash(
        {
            "kind": "degeneracy",
            "version": DEGENERACY_VERSION,
            "checkpoint": _origin(pack, step, study, inputs),
            "product_mode": pack.product_mode,
            "dense_up_to": study.degeneracy.dense_up_to,
            "polish": study.degeneracy.polish,
            "examples": settings.examples,
            "quadrature": [settings.probes, settings.steps, settings.dtype],
            "tables": {"degeneracy": TABLES["degeneracy"].version},
        }
    )


def trajectory_key(pack: Pack, study: Study, inputs: StudyInputs) -> str:
    """Key of the principal axes of a pack's checkpoints."""
    return content_hash({"kind": "trajectory", **_places(pack, study, inputs, "trajectory")})


def separations_key(pack: Pack, earlier: Sequence[Pack], study: Study, inputs: StudyInputs) -> str:
    """Key of the comparison of a pack's runs with each other and with those of earlier packs."""
    others = [_places(other, study, inputs, "separations") for other in earlier]
    this_pack = _places(pack, study, inputs, "separations")
    return content_hash({"kind": "separations", "earlier": others, **this_pack})


def surface_key(pack: Pack, step: int, study: Study, inputs: StudyInputs) -> str:
    """Key of the slices through a pack's checkpoint at `step`; for the plane of its trajectory, of all."""
    settings = study.surfaces
    assert settings is not None
    return content_hash(
        {
            "kind": "surfaces",
            "curvature": curvature_key(pack, step, study, inputs),
            "members": list(surface_members(pack, study)),
            "grid": [list(settings.kinds), settings.points, settings.span],
            "course": list(checkpoint_keys(pack, study, inputs).items()) if "pca" in settings.kinds else None,
            "table": TABLES["surfaces"].version,
            "version": PLACES_VERSION,
        }
    )


def connectivity_key(
    packs: Sequence[Pack],
    pairs: Sequence[tuple[str, str]],
    aligned: str,
    study: Study,
    inputs: StudyInputs,
) -> str:
    """Key of the paths between the runs of some packs.

    Args:
        packs: that hold them, the last the one of each pair's second run.
        pairs: of runs.
        aligned: what is done to the second one first.
        study: the study.
        inputs: what it depends on.
    """
    assert study.connectivity is not None
    settings = study.connectivity.content()
    relevant = ("sigma",) if aligned == "rescaled" else ("kinds", "bends", "steps", "matching")
    return content_hash(
        {
            "kind": "connectivity",
            "version": CONNECTIVITY_VERSION,
            "training": [training_key(pack, study, inputs) for pack in packs],
            "pairs": [list(pair) for pair in pairs],
            "aligned": aligned,
            "settings": {name: settings[name] for name in ("points", *relevant)},
            "tables": {name: TABLES[name].version for name in CONNECTIVITY_TABLES},
        }
    )


def ensemble_key(pack: Pack, method: str, study: Study, inputs: StudyInputs) -> str:
    """Key of the ensembles of one method on the runs of a pack."""
    assert study.ensembles is not None
    settings = study.ensembles.content()
    del settings["methods"]
    return content_hash(
        {
            "kind": "ensemble",
            "version": ENSEMBLES_VERSION,
            "training": training_key(pack, study, inputs),
            "method": method,
            "settings": settings,
            "tables": {name: TABLES[name].version for name in ENSEMBLE_TABLES},
        }
    )


def surface_members(pack: Pack, study: Study) -> tuple[int, ...]:
    """Indices of a pack's runs that have surfaces: those of the study's first seeds; every recorded run."""
    assert study.surfaces is not None
    if study.surfaces.seeds == "all" or pack.recorded is not None:
        return tuple(range(len(pack.seeds)))
    first = study.seeds[: study.surfaces.seeds]
    return tuple(r for r, seed in enumerate(pack.seeds) if seed in first)


def _places(pack: Pack, study: Study, inputs: StudyInputs, table: str) -> dict[str, Any]:
    """All checkpoints of a pack, and the table that is made of them."""
    steps = checkpoint_keys(pack, study, inputs)
    return {"checkpoints": list(steps.items()), "table": TABLES[table].version, "version": PLACES_VERSION}


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
    demands = {
        "overlaps": vectors,
        "directions": displacement,
        "shares": displacement,
        "angles": vectors and displacement,
    }
    return tuple(name for name, asked in demands.items() if asked)


def _origin(pack: Pack, step: int, study: Study, inputs: StudyInputs) -> Any:
    """All that a checkpoint and the loss at it depend on."""
    if pack.recorded is None:
        return checkpoint_key(training_key(pack, study, inputs), step)
    return {"content": inputs.recorded_steps(pack)[step], **_recorded_content(pack, study, inputs)}


def _recorded_content(pack: Pack, study: Study, inputs: StudyInputs) -> dict[str, Any]:
    """What the evaluation of a recorded run depends on, its checkpoints apart."""
    return {
        "version": KEY_VERSION,
        "tables": {name: TABLES[name].version for name in TRAINING_TABLES},
        "run_id": pack.run_ids[0],
        "model": pack.model.content(),
        "optimizer": pack.optimizer.content() if pack.optimizer else None,
        "loss": study.training.loss,
        "dtype": study.training.dtype,
        "data": inputs.data_key,
        "sources": involved_sources(pack, study, inputs),
    }


def involved_sources(pack: Pack, study: Study, inputs: StudyInputs) -> dict[str, str]:
    """Source hashes of the user's functions that a pack needs."""
    names = {pack.model.name, study.training.loss, study.data.source}
    return {name: value for name, value in inputs.sources.items() if name in names}


def _training_content(pack: Pack, study: Study, inputs: StudyInputs) -> dict[str, Any]:
    assert pack.optimizer is not None  # only a recorded run's may be unknown
    return {
        "version": KEY_VERSION,
        "tables": {name: TABLES[name].version for name in TRAINING_TABLES},
        "model": pack.model.content(),
        "optimizer": pack.optimizer.content(),
        "seeds": list(pack.seeds),
        "executor": pack.executor,
        "training": study.training.content(),
        "shadow": list(study.angles.shadow),
        "data": inputs.data_key,
        "sources": involved_sources(pack, study, inputs),
    }
