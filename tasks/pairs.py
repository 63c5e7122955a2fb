"""Compare two neighbouring checkpoints of one pack: how its leading eigenspaces turn, and how far it moved.

The displacement u = theta(later) - theta(earlier) is a direction of the *earlier* checkpoint, whose Hessian,
gradient and eigenspaces it is held against. A member that has diverged at either checkpoint has null rows.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import ray
import torch
from torch import Tensor

from lossray.curvature.operators import PackedHessian
from lossray.curvature.pairs import EigenPairs
from lossray.geometry import vectors
from lossray.geometry.angles import angle_rows
from lossray.geometry.directions import direction_rows
from lossray.geometry.overlaps import overlap_rows
from lossray.geometry.vectors import Name
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack, pair_tables
from tasks.context import Context, dataset_of, device_name, local_device, prepare_worker
from tasks.curvature import CurvatureJob, table_row
from tasks.point import hessian_at, locate
from tasks.record import Attempt, Stopwatch
from tasks.spectra import HESSIAN, Row

Spectra = dict[Name, EigenPairs]  # by operator, block and end


@dataclass(frozen=True)
class PairJob:
    """Compare two checkpoints of a pack, both of them analysed."""

    earlier: CurvatureJob
    later: CurvatureJob
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "pair"

    @property
    def context(self) -> Context:
        """What the task needs to know of its study."""
        return self.later.context

    @property
    def pack(self) -> Pack:
        """The pack."""
        return self.later.pack

    @property
    def step(self) -> int:
        """Of the later checkpoint."""
        return self.later.step


def compare_checkpoints(job: PairJob, device: torch.device | None = None) -> None:
    """Compare, publish the rows, and commit.

    Args:
        job: what to compare.
        device: where; None takes this machine's GPU if it has one.

    Raises:
        StoreError: a checkpoint, or the eigenvectors of one, are missing or damaged.
    """
    device = device or local_device()
    store, study = Store(job.context.out), job.context.study
    watch = Stopwatch(job.attempt, device_name(device))
    n_outputs = dataset_of(job.context, getattr(torch, study.training.dtype)).n_outputs
    wanted = pair_tables(study)
    spectra: Spectra = {}  # of the earlier checkpoint
    if "overlaps" in wanted:
        spectra = _read_spectra(store, job.earlier, device)
        rows = _overlap_rows(job, spectra, _read_spectra(store, job.later, device), n_outputs)
        store.publish("overlaps", job.key, rows)
    if "directions" in wanted:
        displacement, operator = _displacement(job, store, device)
        found = direction_rows(displacement, operator, operator.gradient)
        store.publish("directions", job.key, [table_row(job.earlier, asdict(row)) for row in found])
    if "angles" in wanted:
        angles = angle_rows(displacement, spectra[*HESSIAN, "largest"], n_outputs=n_outputs)
        store.publish("angles", job.key, [table_row(job.earlier, asdict(row)) for row in angles])
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def pair(job: PairJob, cpus: float) -> None:
    """`compare_checkpoints` as a Ray task; what it finds is in the store."""
    compare_checkpoints(job, prepare_worker(cpus))


def _read_spectra(store: Store, side: CurvatureJob, device: torch.device) -> Spectra:
    """The eigenpairs that the analysis of one side has left."""
    path = store.vectors_path(side.pack.pack_id, side.step)
    return vectors.loads(store.read_bytes(path), key=side.key, device=device, name=f"{store.url}/{path}")


def _overlap_rows(job: PairJob, earlier: Spectra, later: Spectra, n_outputs: int) -> list[Row]:
    top = job.context.study.curvature.top
    return [
        table_row(job.later, asdict(row))
        | {"previous_step": job.earlier.step, "operator": operator, "block": block}
        for (operator, block, end), pairs in earlier.items()
        if end == "largest" and "@" not in operator
        for row in overlap_rows(pairs, later[operator, block, end], n_outputs=n_outputs, top=top)
    ]


def _displacement(
    job: PairJob, store: Store, device: torch.device
) -> tuple[dict[str, Tensor], PackedHessian]:
    """The way to the later checkpoint, [R, d] by its name, and the Hessians at the earlier one."""
    before, after = (
        read_checkpoint(store, side.pack.pack_id, side.step, device) for side in (job.earlier, job.later)
    )
    point = locate(job.earlier, before, device)
    moved = point.stack.layout.join(after.parameters).to(point.theta.dtype).double() - point.theta.double()
    dead = ~(before.alive & after.alive)[:, None]
    return {"displacement": moved.masked_fill(dead, float("nan"))}, hessian_at(job.earlier, point)
