"""Measure how much memory packs take on a GPU, before the packs of a study are decided."""

from dataclasses import dataclass

import torch

from lossray.measures.pack_memory import MeasuredMemory, measured_memory
from lossray.study import Pack
from tasks.jobs import Context
from tasks.planned_data import dataset_on


@dataclass(frozen=True)
class MemoryJob:
    """Measure some packs, which are trained for a few steps and thrown away.

    Attributes:
        context: of the study.
        packs: what is measured.
    """

    context: Context
    packs: tuple[Pack, ...]


def measure_memory(job: MemoryJob, device: torch.device) -> MeasuredMemory | None:
    """What was measured; None on a device that is no GPU."""
    if device.type != "cuda":
        return None
    return measured_memory(job.context.study, job.packs, dataset_on(job.context, device), device)
