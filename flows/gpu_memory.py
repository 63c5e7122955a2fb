"""Measures what packs take of a GPU, before new ones are frozen."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from flows.gpu_packs import GpuPacks, GpuRoom, PackMemory, decided, kind_of, pack_size
from flows.request import Request, Rule, plan_of
from lossray.errors import StudyError
from lossray.measures.pack_memory import MeasuredMemory
from lossray.study import Pack, runs_of
from tasks.devices import local_device
from tasks.measure_memory import MemoryJob, measure_memory

TRIALS = {"vmap": (2, 4), "loop": (1, 2)}  # runs of the two packs; one alone is not computed as a stack

# What was measured, and how many GPUs there are; None where they are no GPUs of torch's.
Measure = Callable[[MemoryJob], tuple[MeasuredMemory, int] | None]


def gpu_packs(request: Request, rule: Rule, measure: Measure, *, sharing: bool) -> GpuPacks:
    """How large new packs are, and how many share a GPU; nothing is measured that the study decides itself.

    Args:
        request: for the study, which trains on a GPU.
        rule: executor and product mode of each setting.
        measure: where the study will run.
        sharing: whether tasks may share a GPU.

    Raises:
        StudyError: no GPU has come in time.
    """
    study = request.loaded.study
    resources = study.resources
    packs = _packs(request, rule)
    kinds = {kind_of(pack): pack for pack in packs}
    new = {kind_of(pack) for pack in packs if pack.executor == "vmap" and pack not in request.frozen}
    sized = new if resources.pack == "auto" else set()
    shared = sharing and "auto" in (resources.train.gpus, resources.curvature.gpus)
    if study.source == "checkpoints" or not (sized or shared):
        return GpuPacks()
    trials = [trial for pack in kinds.values() for trial in _trials(pack)]
    try:
        result = measure(MemoryJob(request.context, tuple(trials)))
    except StudyError:
        raise
    except Exception as error:  # a user's model may raise anything on a GPU; its tasks will say more
        first_line = str(error).strip().partition("\n")[0]
        return GpuPacks(notes=(f"the memory that packs take of a GPU was not measured: {first_line}",))
    if result is None:
        return GpuPacks()
    measured, gpus = result
    room, memory = GpuRoom(measured.gpu, gpus), _memory(kinds, measured)
    sizes = {kind: pack_size(memory.get(kind), room, len(runs_of(study))) for kind in sized}
    return decided(_packs(replace(request, gpu=GpuPacks(sizes)), rule), memory, sizes, room)


def measure_here(job: MemoryJob) -> tuple[MeasuredMemory, int] | None:
    """In this process, which uses one GPU."""
    measured = measure_memory(job, local_device())
    return None if measured is None else (measured, 1)


def _packs(request: Request, rule: Rule) -> list[Pack]:
    return [pack.pack for pack in plan_of(request, rule).packs]


def _trials(pack: Pack) -> list[Pack]:
    """The two packs of its kind that are measured."""
    return [replace(pack, seeds=tuple(range(runs))) for runs in TRIALS[pack.executor]]


def _memory(kinds: Mapping[str, Pack], measured: MeasuredMemory) -> dict[str, PackMemory]:
    """By kind, of those whose two packs have fitted."""
    pairs = zip(measured.peaks[::2], measured.peaks[1::2], strict=True)
    return {
        kind: PackMemory(TRIALS[pack.executor], (small, large))
        for (kind, pack), (small, large) in zip(kinds.items(), pairs, strict=True)
        if small is not None and large is not None
    }
