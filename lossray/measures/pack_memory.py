"""How much memory a pack takes on a GPU: the peaks of a few steps of training, and of curvature products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lossray.measures.halving import release_memory
from lossray.measures.pack_point import loss_of, stack_of
from lossray.memory import is_out_of_memory
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.study import Pack, Study
from lossray.study.demands import pairs_needed
from lossray.training.datasets import Dataset, analysis_set
from lossray.training.evaluation import evaluate
from lossray.training.steps import TrainingTask, fresh, take_step

STEPS = 3  # of training: the first makes the optimizer's state

Meter = Callable[[Callable[[], object]], int]  # most bytes that a piece of work has held


@dataclass(frozen=True)
class PackPeaks:
    """Most bytes that a pack has held.

    Attributes:
        training: in training.
        analysis: in the analysis of a checkpoint.
    """

    training: int
    analysis: int


@dataclass(frozen=True)
class MeasuredMemory:
    """What was measured on one GPU.

    Attributes:
        gpu: bytes that it has.
        peaks: of each pack; None where it ran out of memory.
    """

    gpu: int
    peaks: tuple[PackPeaks | None, ...]


def measured_memory(
    study: Study, packs: Sequence[Pack], dataset: Dataset, device: torch.device
) -> MeasuredMemory:
    """What packs take of a GPU.

    Args:
        study: the settings.
        packs: which are trained for a few steps.
        dataset: the study's data, on the device.
        device: the GPU.
    """

    def peaks(pack: Pack) -> PackPeaks | None:
        try:
            return pack_peaks(study, pack, dataset, gpu_meter(device))
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise

    measured = tuple(map(peaks, packs))
    release_memory()
    return MeasuredMemory(torch.cuda.mem_get_info(device)[1], measured)


def pack_peaks(study: Study, pack: Pack, dataset: Dataset, meter: Meter) -> PackPeaks:
    """The peaks of a pack that the study trains.

    Args:
        study: the settings.
        pack: of as many runs as are to be measured.
        dataset: the study's data, on the device.
        meter: runs a piece of work and returns its peak.
    """
    training = meter(partial(_train, study, pack, dataset))
    return PackPeaks(training, meter(partial(_analyse, study, pack, dataset)))


def gpu_meter(device: torch.device) -> Meter:
    """Reads what torch has reserved on a GPU, which is what others cannot have."""

    def peak(work: Callable[[], object]) -> int:
        release_memory()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)

    return peak


def _train(study: Study, pack: Pack, dataset: Dataset) -> None:
    """A few steps, and the evaluation of a checkpoint."""
    assert pack.optimizer is not None  # a recorded run is not trained
    dtype, device = getattr(torch, study.training.dtype), dataset.train.targets.device
    stack, theta, buffers = stack_of(pack, dataset, dtype=dtype, device=device)
    shadow = tuple(study.angles.shadow)
    task = TrainingTask(
        stack, loss_of(study), dataset, study.training, pack.optimizer, pack.pack_id, pack.seeds, shadow
    )
    state = fresh(task, theta, buffers)
    state.initial_loss = evaluate(stack, theta, buffers, task.loss, dataset)["train_loss"]
    for step in range(STEPS):
        take_step(task, state, step)


def _analyse(study: Study, pack: Pack, dataset: Dataset) -> None:
    """Products with a block of vectors, beside a basis as a Krylov pass holds it."""
    settings, device = study.curvature, dataset.train.targets.device
    stack, theta, buffers = stack_of(pack, dataset, dtype=getattr(torch, study.training.dtype), device=device)
    examples = analysis_set(dataset, settings.examples)
    objective = PackedObjective(
        stack,
        theta,
        buffers,
        loss_of(study),
        [(examples.inputs, examples.targets)],
        dtype=getattr(torch, settings.dtype),
    )
    hessian = PackedHessian(objective, mode=pack.product_mode)
    members, dim = hessian.shape
    pairs = pairs_needed(study, dataset.n_outputs, dim)
    # The basis, the locked vectors of both ends, and the pairs that are kept: raw, and in each gauge.
    vectors = 2 * settings.steps + 2 * (pairs + 1) + (1 + len(study.angles.gauges)) * pairs
    basis = torch.zeros(members, min(vectors, dim), dim, dtype=torch.float64, device=device)
    hessian.apply(basis[:, : settings.probes])
