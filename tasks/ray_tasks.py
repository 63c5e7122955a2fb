"""All that Ray runs: the training actor, the analysis of any kind, the warm-up, and gathering.

Tasks are generators: the first thing that a task says is that it has left the queue. Their names, which group
them in the dashboard, are given by the driver.
"""

import socket
from collections.abc import Iterator

import ray

from lossray.measures.pack_memory import MeasuredMemory
from lossray.storage.publish import publish_tables
from lossray.storage.store import Store
from tasks.events import Finished, Published, Started
from tasks.jobs import AnalysisJob, Context, TrainingJob
from tasks.measure_memory import MemoryJob, measure_memory
from tasks.planned_data import dataset_of
from tasks.run_analysis import run_analysis
from tasks.train_pack import train_pack
from tasks.worker import prepare_worker


@ray.remote(num_cpus=1, max_restarts=0)
class TrainingActor:
    """Trains packs in turn, and analyses when none is left; the driver starts a new actor where one dies."""

    def fit(self, job: TrainingJob, cpus: float) -> Iterator[Started | Published | Finished]:
        """`train_pack` as a Ray generator."""
        yield Started(socket.gethostname())
        yield from train_pack(job, prepare_worker(cpus))

    def analyse(self, job: AnalysisJob, cpus: float) -> Iterator[Started | Finished]:
        """`run_analysis` as a Ray generator, once nothing is left to train."""
        yield Started(socket.gethostname())
        yield Finished(run_analysis(job, prepare_worker(cpus)))


@ray.remote(num_cpus=1, max_retries=0)
def analysis(job: AnalysisJob, cpus: float) -> Iterator[Started | Finished]:
    """`run_analysis` as a Ray generator; what it finds is in the store."""
    yield Started(socket.gethostname())
    yield Finished(run_analysis(job, prepare_worker(cpus)))


@ray.remote(num_cpus=1, max_retries=0)
def warm_up(context: Context) -> None:
    """Make a worker ready: import what an analysis needs, and read the data."""
    prepare_worker(1)
    dataset_of(context)


@ray.remote(num_cpus=1, num_gpus=1, max_retries=1)
def memory_of_packs(job: MemoryJob, cpus: float) -> MeasuredMemory | None:
    """`measure_memory` as a Ray task."""
    return measure_memory(job, prepare_worker(cpus))


@ray.remote(num_cpus=1, max_retries=3)
def gather(out: str) -> dict[str, int]:
    """Publish one file per table of the store at ``out``; returns the rows of each."""
    prepare_worker(1)
    return publish_tables(Store(out))
