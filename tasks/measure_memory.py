"""Measure how much memory packs take on a GPU, before the packs of a study are decided."""

from dataclasses import dataclass

import torch

from lossray.measures.pack_memory import PackPeaks, gpu_meter, pack_peaks
from lossray.memory import is_out_of_memory
from lossray.study import Pack
from lossray.training.datasets import Dataset
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


@dataclass(frozen=True)
class MeasuredMemory:
    """What was measured on one GPU.

    Attributes:
        gpu: bytes that it has.
        peaks: of each pack; None where it ran out of memory.
    """

    gpu: int
    peaks: tuple[PackPeaks | None, ...]


def measure_memory(job: MemoryJob, device: torch.device) -> MeasuredMemory | None:
    """What was measured; None on a device that is no GPU."""
    if device.type != "cuda":
        return None
    dataset = dataset_on(job.context, device)
    peaks = tuple(_peaks(job, pack, dataset, device) for pack in job.packs)
    return MeasuredMemory(torch.cuda.mem_get_info(device)[1], peaks)


def _peaks(job: MemoryJob, pack: Pack, dataset: Dataset, device: torch.device) -> PackPeaks | None:
    try:
        return pack_peaks(job.context.study, pack, dataset, gpu_meter(device))
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise
