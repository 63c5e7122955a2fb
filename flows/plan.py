"""What a study consists of: packs, and the key of every task."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from flows.followers import Event, Follower
from lossray.connectivity.settings import RESCALED, AlignmentKind
from lossray.ensembles.methods import METHODS
from lossray.settings import content_hash
from lossray.study import (
    Pack,
    Study,
    StudyInputs,
    checkpoint_keys,
    connectivity_key,
    curvature_key,
    degeneracy_key,
    ensemble_key,
    pair_key,
    pair_tables,
    separations_key,
    surface_key,
    surface_members,
    training_key,
    trajectory_key,
)
from lossray.study.demands import needs_course, needs_eigenvectors, pairs_of
from lossray.training.settings import checkpoint_steps
from tasks.jobs import (
    AnalysisJob,
    Attempt,
    ConnectivityJob,
    Context,
    CurvatureJob,
    DegeneracyJob,
    EnsembleJob,
    FurtherJob,
    PairJob,
    SeparationsJob,
    SurfaceJob,
    TrainingJob,
    TrajectoryJob,
)


@dataclass(frozen=True)
class PackPlan:
    """The tasks of one pack; one that is only trained has no keys but those of its training.

    Attributes:
        pack: whose tasks they are.
        training_key: key of its training.
        checkpoint_keys: by step, key of the training segment that ends there.
        curvature_keys: by step, key of the checkpoint's analysis.
        pair_keys: by two neighbouring steps, key of their comparison.
        further: other jobs, which wait for several things.
    """

    pack: Pack
    training_key: str
    checkpoint_keys: Mapping[int, str]
    curvature_keys: Mapping[int, str]
    pair_keys: Mapping[tuple[int, int], str]
    further: Mapping[Follower, FurtherJob]

    @property
    def followers(self) -> Iterator[Follower]:
        """All jobs that wait for something, each with what it waits for."""
        for steps, key in self.pair_keys.items():
            yield Follower("pair", self.pack.pack_id, max(steps), key, _events("analysed", self.pack, steps))
        yield from self.further

    def tasks(self) -> Iterator[tuple[str, int | None, str]]:
        """Kind, step and key of every task."""
        yield "training", None, self.training_key
        yield from (("checkpoint", step, key) for step, key in self.checkpoint_keys.items())
        yield from (("curvature", step, key) for step, key in self.curvature_keys.items())
        yield from ((follower.kind, follower.step, follower.key) for follower in self.followers)


@dataclass(frozen=True)
class Plan:
    """All tasks of a study.

    Attributes:
        context: what all jobs share.
        packs: the tasks of each pack.
    """

    context: Context
    packs: tuple[PackPlan, ...]

    @property
    def study(self) -> Study:
        """The study's settings."""
        return self.context.study

    @property
    def only_trains(self) -> bool:
        """Whether nothing is analysed: rates are being tuned."""
        return not any(pack.curvature_keys for pack in self.packs)

    @property
    def namespace(self) -> str:
        """Ray namespace of the actors' names: two studies on one cluster do not collide."""
        return f"lossray-{self.study.name}-{content_hash(self.context.out, 8)}"

    def keys(self) -> Iterator[str]:
        """The keys of all tasks."""
        for pack in self.packs:
            yield from (key for _, _, key in pack.tasks())

    def training_job(self, plan: PackPlan, attempt: Attempt) -> TrainingJob:
        """What the training of a pack is given."""
        return TrainingJob(self.context, plan.pack, plan.training_key, plan.checkpoint_keys, attempt)

    def curvature_job(self, plan: PackPlan, step: int, attempt: Attempt | None = None) -> CurvatureJob:
        """What the analysis of a checkpoint is given."""
        return CurvatureJob(self.context, plan.pack, step, plan.curvature_keys[step], attempt or Attempt())

    def job_of(self, plan: PackPlan, follower: Follower) -> AnalysisJob:
        """What a follower is given."""
        if follower in plan.further:
            return plan.further[follower]
        steps = next(steps for steps, key in plan.pair_keys.items() if key == follower.key)
        return self.pair_job(plan, steps)

    def pair_job(self, plan: PackPlan, steps: tuple[int, int]) -> PairJob:
        """What the comparison of two neighbouring checkpoints is given."""
        earlier, later = (self.curvature_job(plan, step) for step in steps)
        return PairJob(earlier, later, plan.pair_keys[steps], Attempt())


def described(job: AnalysisJob) -> str:
    """What a job does, for a reader: "ensemble snapshot of PACK at step 100"."""
    match job:
        case EnsembleJob():
            detail = f" {job.method}"
        case ConnectivityJob():
            detail = f" {job.aligned}"
        case _:
            detail = ""
    return f"{job.kind}{detail} of {job.pack.pack_id} at step {job.step}"


def make_plan(
    context: Context,
    packs: tuple[Pack, ...],
    inputs: StudyInputs,
    *,
    analysed: Collection[str] | None = None,
) -> Plan:
    """Name every task of the packs.

    Args:
        context: of the tasks.
        packs: all of the study.
        inputs: what it depends on.
        analysed: ids of the settings whose packs are analysed, the others are trained only; None: all are.
    """
    plans = [
        _plan_pack(pack, packs[:i], context, inputs)
        if analysed is None or pack.setting_id in analysed
        else _plan_training(pack, context.study, inputs)
        for i, pack in enumerate(packs)
    ]
    return Plan(context, tuple(plans))


def _plan_training(pack: Pack, study: Study, inputs: StudyInputs) -> PackPlan:
    checkpoints = checkpoint_keys(pack, study, inputs)
    return PackPlan(pack, training_key(pack, study, inputs), checkpoints, {}, {}, {})


def _plan_pack(pack: Pack, before: Sequence[Pack], context: Context, inputs: StudyInputs) -> PackPlan:
    study = context.study
    checkpoints = checkpoint_keys(pack, study, inputs)
    curvature = {step: curvature_key(pack, step, study, inputs) for step in checkpoints}
    further = [
        *_degeneracy(context, pack, tuple(checkpoints), inputs),
        *_trajectory(context, pack, before, tuple(checkpoints), inputs),
        *_surfaces(context, pack, curvature, inputs),
        *_connectivity(context, pack, before, inputs),
        *_ensembles(context, pack, inputs),
    ]
    return PackPlan(
        pack,
        training_key(pack, study, inputs),
        checkpoints,
        curvature,
        _pair_keys(curvature, study),
        dict(further),
    )


def _degeneracy(
    context: Context, pack: Pack, steps: Sequence[int], inputs: StudyInputs
) -> Iterator[tuple[Follower, FurtherJob]]:
    """Where [degeneracy] asks for it: as soon as a checkpoint is on disk."""
    settings = context.study.degeneracy
    for step in _chosen(steps, settings.checkpoints) if settings is not None else ():
        key = degeneracy_key(pack, step, context.study, inputs)
        job = DegeneracyJob(context, pack, step, key, Attempt())
        yield Follower(job.kind, pack.pack_id, step, key, _events("trained", pack, [step])), job


def _trajectory(
    context: Context, pack: Pack, before: Sequence[Pack], steps: tuple[int, ...], inputs: StudyInputs
) -> Iterator[tuple[Follower, FurtherJob]]:
    """Where [trajectory] asks for it: once all checkpoints are on disk, those of earlier packs included."""
    study, recorded = context.study, pack.recorded is not None
    if study.trajectory is None or not steps:
        return
    events = _events("trained", pack, steps)
    axes = TrajectoryJob(context, pack, steps, trajectory_key(pack, study, inputs), Attempt())
    yield Follower(axes.kind, pack.pack_id, axes.step, axes.key, events), axes
    earlier = tuple(other for other in before if other.setting_id == pack.setting_id)
    if study.trajectory.between_seeds and not recorded and (earlier or len(pack.seeds) > 1):
        key = separations_key(pack, earlier, study, inputs)
        job = SeparationsJob(context, pack, earlier, steps, key, Attempt())
        needs = events.union(*(_events("trained", other, steps) for other in earlier))
        yield Follower(job.kind, pack.pack_id, job.step, key, needs), job


def _surfaces(
    context: Context, pack: Pack, curvature: Mapping[int, str], inputs: StudyInputs
) -> Iterator[tuple[Follower, FurtherJob]]:
    """Where [surfaces] asks for it: once the checkpoint in the centre and what its slices need are there."""
    study = context.study
    settings, steps = study.surfaces, tuple(curvature)
    if settings is None or not steps:
        return
    members = surface_members(pack, study)
    for step in _chosen(steps, settings.checkpoints) if members else ():
        key = surface_key(pack, step, study, inputs)
        job = SurfaceJob(context, pack, step, members, steps, curvature[step], key, Attempt())
        needs = _events("trained", pack, steps if needs_course(study) else [step])
        if needs_eigenvectors(study):
            needs |= _events("analysed", pack, [step])
        yield Follower(job.kind, pack.pack_id, step, key, needs), job


def _connectivity(
    context: Context, pack: Pack, before: Sequence[Pack], inputs: StudyInputs
) -> Iterator[tuple[Follower, FurtherJob]]:
    """Where [connectivity] asks for it: once the runs that a pair joins have made their last step."""
    study, settings = context.study, context.study.connectivity
    if settings is None or pack.recorded is not None:
        return
    step = study.training.steps
    earlier = tuple(other for other in before if other.setting_id == pack.setting_id)
    pairs = tuple(pairs_of(settings, pack, earlier))
    pairs_by_alignment: dict[AlignmentKind | Literal["rescaled"], tuple[tuple[str, str], ...]]
    pairs_by_alignment = {name: pairs for name in settings.align if pairs}
    if settings.rescaled:
        pairs_by_alignment[RESCALED] = tuple((run_id, run_id) for run_id in pack.run_ids)
    for aligned, run_pairs in pairs_by_alignment.items():
        needed = {run_id for pair in run_pairs for run_id in pair}
        packs = [other for other in (*earlier, pack) if not needed.isdisjoint(other.run_ids)]
        key = connectivity_key(packs, run_pairs, aligned, study, inputs)
        job = ConnectivityJob(context, pack, tuple(packs[:-1]), run_pairs, aligned, step, key, Attempt())
        events: frozenset[Event] = frozenset().union(*(_events("trained", other, [step]) for other in packs))
        yield Follower(job.kind, pack.pack_id, step, key, events), job


def _ensembles(context: Context, pack: Pack, inputs: StudyInputs) -> Iterator[tuple[Follower, FurtherJob]]:
    """Where [ensembles] asks for it: one job a method, the longest first, once the base runs are trained."""
    study, settings = context.study, context.study.ensembles
    if settings is None or pack.recorded is not None:
        return
    steps = checkpoint_steps(study.training)
    largest = settings.budget(max(settings.budgets), study.training.steps)
    for method in sorted(settings.methods, key=lambda name: -METHODS[name].steps(largest)):
        key = ensemble_key(pack, method, study, inputs)
        job = EnsembleJob(context, pack, method, steps, key, Attempt())
        yield Follower(job.kind, pack.pack_id, steps[-1], key, _events("trained", pack, steps)), job


def _chosen(steps: Sequence[int], which: str) -> list[int]:
    """The steps that "last", "ends" or "all" names."""
    if which == "all":
        return list(steps)
    return list(dict.fromkeys([steps[0], steps[-1]] if which == "ends" else steps[-1:]))


def _events(what: Literal["trained", "analysed"], pack: Pack, steps: Iterable[int]) -> frozenset[Event]:
    return frozenset(Event(what, pack.pack_id, step) for step in steps)


def _pair_keys(curvature: Mapping[int, str], study: Study) -> dict[tuple[int, int], str]:
    """The comparisons of neighbouring steps, where the study asks for something of them."""
    pairs = pairwise(sorted(curvature)) if pair_tables(study) else ()
    return {(a, b): pair_key(curvature[a], curvature[b], study) for a, b in pairs}
