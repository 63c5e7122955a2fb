"""Run one analysis of any kind."""

import torch

from tasks.analyse_checkpoint import analyse_checkpoint
from tasks.build_ensembles import build_ensembles
from tasks.commit_record import Record
from tasks.compare_checkpoints import compare_checkpoints
from tasks.connect_runs import connect_runs
from tasks.evaluate_surfaces import evaluate_surfaces
from tasks.follow_runs import compare_runs, follow_trajectory
from tasks.jobs import (
    AnalysisJob,
    ConnectivityJob,
    CurvatureJob,
    DegeneracyJob,
    EnsembleJob,
    PairJob,
    SeparationsJob,
    SurfaceJob,
    TrajectoryJob,
)
from tasks.measure_degeneracy import measure_degeneracy


def run_analysis(job: AnalysisJob, device: torch.device | None = None) -> Record:
    """Do what a job asks for; its rows are then committed.

    Args:
        job: of any kind but training.
        device: where; None takes this machine's GPU if it has one.

    Returns:
        What was committed.
    """
    match job:
        case CurvatureJob():
            return analyse_checkpoint(job, device)
        case PairJob():
            return compare_checkpoints(job, device)
        case DegeneracyJob():
            return measure_degeneracy(job, device)
        case TrajectoryJob():
            return follow_trajectory(job, device)
        case SeparationsJob():
            return compare_runs(job, device)
        case SurfaceJob():
            return evaluate_surfaces(job, device)
        case ConnectivityJob():
            return connect_runs(job, device)
        case EnsembleJob():
            return build_ensembles(job, device)
