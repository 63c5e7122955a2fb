"""The study file: read and checked, expanded into packs of runs, and hashed into task keys."""

from lossray.study.checks import check_against_data, check_recordings
from lossray.study.file import LoadedStudy, load_study, ready_made_studies
from lossray.study.keys import (
    StudyInputs,
    checkpoint_key,
    checkpoint_keys,
    connectivity_key,
    curvature_key,
    degeneracy_key,
    ensemble_key,
    involved_sources,
    pair_key,
    pair_tables,
    separations_key,
    study_inputs,
    surface_key,
    surface_members,
    training_key,
    trajectory_key,
    versions_of,
)
from lossray.study.packs import Pack, RecordedRun, Setting, partition, runs_of, settings_of
from lossray.study.settings import ClaimsSettings, Resources, Study, TaskResources
from lossray.study.table import study_from_table

__all__ = [
    "ClaimsSettings",
    "LoadedStudy",
    "Pack",
    "RecordedRun",
    "Resources",
    "Setting",
    "Study",
    "StudyInputs",
    "TaskResources",
    "check_against_data",
    "check_recordings",
    "checkpoint_key",
    "checkpoint_keys",
    "connectivity_key",
    "curvature_key",
    "degeneracy_key",
    "ensemble_key",
    "involved_sources",
    "load_study",
    "pair_key",
    "pair_tables",
    "partition",
    "ready_made_studies",
    "runs_of",
    "separations_key",
    "settings_of",
    "study_from_table",
    "study_inputs",
    "surface_key",
    "surface_members",
    "training_key",
    "trajectory_key",
    "versions_of",
]
