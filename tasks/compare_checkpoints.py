"""Compare two neighbouring checkpoints of one pack: how its leading eigenspaces turn, and how far it moved.

The displacement u = theta(later) - theta(earlier) is a direction of the *earlier* checkpoint, whose Hessian,
gradient and eigenspaces it is held against. A member that has diverged at either checkpoint has null rows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import ray
import torch
from torch import Tensor

from lossray.geometry import vectors
from lossray.geometry.directions import Reference, direction_rows, measure, share_rows
from lossray.geometry.finite_step import finite_steps
from lossray.geometry.overlaps import overlap_rows
from lossray.geometry.vectors import Name
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack, pair_tables
from tasks.analyse_checkpoint import CurvatureJob
from tasks.checkpoint_geometry import angles_in, table_row
from tasks.checkpoint_spectra import HESSIAN, Row
from tasks.commit_record import Attempt, Stopwatch
from tasks.context import Context, dataset_of, device_name, local_device, prepare_worker
from tasks.gauged_pairs import gauges_at, stored_ends
from tasks.pack_point import PackPoint, hessian_at, locate, objective_at

Spectra = dict[Name, PackedEigenPairs]  # by operator, block and end


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
        point, displacement = _displacement(job, store, device)
        _publish_displacement(job, store, point, displacement)
    if "angles" in wanted:
        store.publish("angles", job.key, _angle_rows(job, point, spectra, displacement))
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


def _displacement(job: PairJob, store: Store, device: torch.device) -> tuple[PackPoint, dict[str, Tensor]]:
    """The pack at the earlier checkpoint, and the way to the later one, [R, d] by its name."""
    before, after = (
        read_checkpoint(store, side.pack.pack_id, side.step, device) for side in (job.earlier, job.later)
    )
    point = locate(job.earlier, before, device)
    moved = point.stack.layout.join(after.parameters).to(point.theta.dtype).double() - point.theta.double()
    dead = ~(before.alive & after.alive)[:, None]
    return point, {"displacement": moved.masked_fill(dead, float("nan"))}


def _publish_displacement(
    job: PairJob, store: Store, point: PackPoint, displacement: Mapping[str, Tensor]
) -> None:
    """The displacement's rows of `directions` and `shares`."""
    hessian = hessian_at(job.earlier, point)
    measured = measure(displacement, hessian)
    reference = _reference(job.earlier, store, hessian.gradient)
    steps = finite_steps(objective_at(job.earlier, point), displacement)
    rows = direction_rows(measured, reference, steps)
    store.publish("directions", job.key, [table_row(job.earlier, asdict(row)) for row in rows])
    shares = share_rows(measured, point.stack.layout)
    store.publish("shares", job.key, [table_row(job.earlier, asdict(row)) for row in shares])


def _reference(side: CurvatureJob, store: Store, gradient: Tensor) -> Reference:
    """What the analysis of one side has found of the Hessian as a whole."""
    name, block = HESSIAN
    table = store.read_table(store.part_path("curvature", side.key), "curvature")
    rows = {
        row["run_id"]: row for row in table.to_pylist() if (row["operator"], row["block"]) == (name, block)
    }

    def column(key: str) -> Tensor:
        values = [rows[run_id][key] for run_id in side.pack.run_ids]
        return gradient.new_tensor([float("nan") if value is None else value for value in values])

    return Reference(gradient, column("trace"), column("trace_stderr"), column("lambda_max"))


def _angle_rows(
    job: PairJob, point: PackPoint, spectra: Spectra, displacement: Mapping[str, Tensor]
) -> list[Row]:
    """The displacement's rows of `angles`, in every gauge of the earlier checkpoint."""
    rows = []
    for gauge in gauges_at(job.context.study, job.pack, point).values():
        ends = stored_ends(spectra, gauge)
        if ends is not None:
            rows += angles_in(job.earlier, point, gauge, ends, displacement)
    return rows
