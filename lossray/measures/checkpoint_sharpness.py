"""Rows of the `sharpness` table at one checkpoint."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lossray.geometry import gauges
from lossray.geometry.step_sharpness import batch_sharpness, critical_sharpness
from lossray.measures.cells import Row, finite
from lossray.measures.checkpoint_directions import NextStep
from lossray.measures.gauged_pairs import GaugeEnds
from lossray.measures.pack_point import PackPoint, objective_at
from lossray.networks.nests import rows
from lossray.operators.objectives import PackedObjective
from lossray.operators.transforms import PackedScaled, PointOperator
from lossray.seeds import generator, stream
from lossray.spectra.analysis import PackedAnalysis
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import Wanted
from lossray.training.batches import takes_all
from lossray.training.readings import RecordedOptimizer
from lossray.training.update_rules import OPTIMIZERS

BATCHES = 16  # over which batch sharpness is averaged


def sharpness_rows(
    point: PackPoint,
    hessian: PointOperator,
    analysis: PackedAnalysis,
    following: NextStep | None,
    ends: Mapping[str, GaugeEnds],
) -> list[Row]:
    """One row per member.

    Args:
        point: the pack at it.
        hessian: the members' Hessians.
        analysis: theirs.
        following: the next step, where it is known.
        ends: eigenpairs by gauge, of which the preconditioned ones are used where they are there.
    """
    settings = point.study.training
    preconditioned = _preconditioned(point, hessian, analysis, ends)
    batches = list(_batches(point))
    full = takes_all(len(point.dataset.train.targets), settings.batch_size)
    batch = batch_sharpness(batches, mode=point.pack.product_mode, full=full)
    critical: Tensor | None = None
    if following is not None and following.lr > 0:
        critical = critical_sharpness(objective_at(point), following.update, following.lr)
    lr = following.lr if following is not None else _recorded_rate(point)
    values = {
        "lambda_max": analysis.pairs.values[:, 0],
        "lambda_max_residual": analysis.pairs.residuals[:, 0],
        "batch_sharpness": batch.value,
        "batch_sharpness_stderr": batch.stderr,
    }
    if critical is not None:
        values["critical_sharpness"] = critical
    if preconditioned is not None:
        values["preconditioned_lambda_max"] = preconditioned.values[:, 0]
        values["preconditioned_lambda_max_residual"] = preconditioned.residuals[:, 0]
    if lr is not None and _has_one_rate(point):
        values["lambda_max_lr"] = lr * values["lambda_max"]
    if lr is not None and preconditioned is not None:
        values["preconditioned_lr"] = lr * preconditioned.values[:, 0]
    columns = {name: value.masked_fill(~point.alive, torch.nan).tolist() for name, value in values.items()}
    shared: Row = {"step": point.step, "lr": lr, "batches": len(batches), "threshold": _threshold(point)}
    return [
        {"run_id": run_id, **shared, **{name: finite(column[r]) for name, column in columns.items()}}
        for r, run_id in enumerate(point.pack.run_ids)
    ]


def _preconditioned(
    point: PackPoint,
    hessian: PointOperator,
    analysis: PackedAnalysis,
    ends: Mapping[str, GaugeEnds],
) -> PackedEigenPairs | None:
    """The leading pairs of P^-1/2 H P^-1/2; None where there is no P."""
    if "preconditioned" in ends:
        return ends["preconditioned"].largest
    scale = point.optimizer.scale() if point.optimizer else None
    if scale is None:
        return None
    gauge = gauges.preconditioned(scale.masked_fill(~point.alive[:, None], torch.nan))
    if gauge.identity:
        return analysis.pairs
    (pairs,) = packed_eigenpairs(
        PackedScaled(hessian, gauge.scale),
        [Wanted("largest", 1)],
        seeds=[stream(seed, "sharpness", point.step) for seed in point.pack.seeds],
        tolerance=point.study.curvature.tolerance,
        alive=point.alive,
    )
    return pairs


def _batches(point: PackPoint) -> Iterator[PackedObjective]:
    """The members' losses on minibatches of the training split, the same for all members."""
    train, settings = point.dataset.train, point.study.training
    n = len(train.targets)
    if takes_all(n, settings.batch_size):
        drawn = [torch.arange(n, device="cpu")]
    else:
        size = int(settings.batch_size)
        draws = [generator(0, "batch sharpness", i) for i in range(BATCHES)]
        drawn = [torch.randperm(n, generator=draw, device="cpu")[:size] for draw in draws]
    for index in drawn:
        chosen = index.to(train.targets.device)
        yield PackedObjective(
            point.stack,
            point.living,
            point.buffers,
            point.loss,
            [(rows(train.inputs, chosen), train.targets[chosen])],
            dtype=getattr(torch, point.study.curvature.dtype),
        )


def _recorded_rate(point: PackPoint) -> float | None:
    """The rate of a recorded run's next step; the largest where its parameter groups differ in theirs."""
    if isinstance(point.optimizer, RecordedOptimizer):
        return point.optimizer.rate
    rate = float(point.checkpoint.log["lr"][-1]) if "lr" in point.checkpoint.log else math.nan
    return None if math.isnan(rate) else rate


def _has_one_rate(point: PackPoint) -> bool:
    """Whether a rate times an eigenvalue of H means something: not where parameter groups differ."""
    recorded = isinstance(point.optimizer, RecordedOptimizer)
    return not recorded or not bool(torch.isnan(point.checkpoint.log["lr"]).any())


def _threshold(point: PackPoint) -> float | None:
    if isinstance(point.optimizer, RecordedOptimizer):
        return point.optimizer.threshold
    optimizer = point.pack.optimizer
    threshold = OPTIMIZERS[optimizer.name].threshold if optimizer else None
    return threshold(optimizer, point.step) if threshold else None
