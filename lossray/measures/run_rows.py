"""What a training says of its runs: the tables `training`, `checkpoints` and `runs`."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lossray.measures.cells import Row, measured
from lossray.storage.checkpoints import Checkpoint
from lossray.study import Pack, Study
from lossray.training.schedules import ScheduleSettings
from lossray.training.update_rules import OPTIMIZERS


def training_rows(pack: Pack, checkpoint: Checkpoint) -> list[Row]:
    """Rows of the `training` table from one segment's log."""
    log = {name: column.numpy() for name, column in checkpoint.log.items()}
    shared = ("step", "lr", "examples_seen")
    return [
        {
            "run_id": run_id,
            **{name: measured(log[name][i] if name in shared else log[name][i, r]) for name in log},
        }
        for r, run_id in enumerate(pack.run_ids)
        for i in range(len(log["step"]))
    ]


def checkpoint_rows(
    pack: Pack, checkpoint: Checkpoint, initial: Mapping[str, Tensor], path: str
) -> list[Row]:
    """Rows of `checkpoints`.

    Args:
        pack: the runs.
        checkpoint: of theirs.
        initial: parameters at step 0, [R, *shape].
        path: of the checkpoint in the store.
    """
    norms, distances = _norms(checkpoint.parameters), _norms(checkpoint.parameters, initial)
    rows = []
    for r, run_id in enumerate(pack.run_ids):
        alive = bool(checkpoint.alive[r])
        row = {
            "run_id": run_id,
            "step": checkpoint.step,
            "pack_id": pack.pack_id,
            "member": r,
            "path": path,
            "alive": alive,
            "parameter_norm": norms[r] if alive else None,
            "distance_from_init": distances[r] if alive else None,
        }
        rows.append(row | {name: measured(values[r]) for name, values in checkpoint.evaluation.items()})
    return rows


def _norms(parameters: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None = None) -> list[float]:
    """Euclidean norm of every member's parameters, or their distance from ``origin``, in float64."""
    squares = sum(
        (tensor.double() - (origin[name].double() if origin else 0)).flatten(1).square().sum(1)
        for name, tensor in parameters.items()
    )
    return [float(square) ** 0.5 for square in torch.as_tensor(squares)]


def run_rows(
    study: Study, pack: Pack, last: Checkpoint, *, data_key: str, seconds: float, device: str
) -> list[Row]:
    """Rows of `runs` once a training has ended.

    Args:
        study: the settings.
        pack: the runs.
        last: their last checkpoint.
        data_key: content hash of the data.
        seconds: that the training took.
        device: on which.
    """
    shared: Row = {
        "n_params": sum(tensor[0].numel() for tensor in last.parameters.values()),
        "data_fingerprint": data_key,
        "wall_seconds": seconds,
        "device": device,
    }
    if pack.recorded is not None:  # how it was trained is not known, but for the number format
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in last.parameters.values()}
        shared |= {"wall_seconds": None, "device": None, "dtype": ", ".join(sorted(dtypes))}
    rows = []
    for r, row in enumerate(_described(pack, study)):
        diverged_at = None if last.alive[r] else int(last.diverged_at[r])
        outcome: Row = {"status": "finished", "steps_done": last.step}
        if diverged_at is not None:
            causes = "parameters" if pack.recorded else "loss, gradient or parameters"
            also = "" if pack.recorded else ", or loss too high,"
            reason = f"{causes} not finite{also} at step {diverged_at}"
            outcome = {
                "status": "diverged",
                "steps_done": diverged_at,
                "diverged_at": diverged_at,
                "reason": reason,
            }
        measures = {name: measured(values[r]) for name, values in last.evaluation.items()}
        rows.append(row | shared | outcome | measures)
    return rows


def failed_run_rows(pack: Pack, study: Study, reason: str) -> list[Row]:
    """The `runs` rows of a pack whose training failed."""
    return [row | {"status": "failed", "reason": reason} for row in _described(pack, study)]


def _described(pack: Pack, study: Study) -> list[Row]:
    """What is known of every run before it starts."""
    row: Row = {
        "pack_id": pack.pack_id,
        "setting_id": pack.setting_id,
        "model": pack.model.name,
        "activation": getattr(pack.model, "activation", None),
        "norm": getattr(pack.model, "norm", None),
        "model_settings": json.dumps(pack.model.plain()),
        "loss": study.training.loss,
        "executor": pack.executor,
        **_described_optimizer(pack),
    }
    if pack.recorded is not None:
        return [row | {"run_id": pack.recorded.run_id}]
    batch_size = None if study.training.batch_size == "full" else study.training.batch_size
    row |= {"batch_size": batch_size, "dtype": study.training.dtype}
    return [
        row | {"run_id": run_id, "seed": seed} for run_id, seed in zip(pack.run_ids, pack.seeds, strict=True)
    ]


def _described_optimizer(pack: Pack) -> Row:
    """Of a recorded run the schedule is not known, and of an optimizer of the user's own only the name."""
    optimizer, recorded = pack.optimizer, pack.recorded
    row: Row = {"optimizer": recorded.optimizer, "lr": recorded.lr} if recorded else {}
    if recorded and recorded.settings is not None:
        decay = json.loads(recorded.settings).get("weight_decay")
        return row | {
            "weight_decay": decay if isinstance(decay, float) else None,
            "optimizer_settings": recorded.settings,
            "adaptive": recorded.adaptive,
        }
    if optimizer is None:
        return row
    settings = optimizer.plain()
    if recorded:
        unscheduled = {
            key: value for key, value in settings.items() if key not in ScheduleSettings.model_fields
        }
        settings = unscheduled | {"lr": recorded.lr}
    return {
        "optimizer": optimizer.name,
        "lr": optimizer.lr,
        "weight_decay": getattr(optimizer, "weight_decay", 0.0),
        "schedule": None if recorded else optimizer.schedule,
        "optimizer_settings": json.dumps(settings),
        "adaptive": OPTIMIZERS[optimizer.name].adaptive,
        **row,
    }
