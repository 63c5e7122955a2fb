"""What a study consists of: packs, and the key of every task."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from flows.followers import Event, Follower
from lossray.settings import content_hash
from lossray.study import (
    Pack,
    Study,
    StudyInputs,
    checkpoint_keys,
    curvature_key,
    pair_key,
    pair_tables,
    training_key,
)
from tasks.context import Context
from tasks.curvature import CurvatureJob
from tasks.pairs import PairJob
from tasks.record import Attempt
from tasks.training import TrainingJob

AnalysisJob = CurvatureJob | PairJob


@dataclass(frozen=True)
class PackPlan:
    """The tasks of one pack."""

    pack: Pack
    training_key: str
    checkpoint_keys: Mapping[int, str]  # step -> key of the training segment that ends there
    curvature_keys: Mapping[int, str]  # step -> key of the checkpoint's analysis
    pair_keys: Mapping[tuple[int, int], str]  # two neighbouring steps -> key of their comparison

    @property
    def followers(self) -> Iterator[Follower]:
        """All further jobs of the pack, each with what it waits for."""
        name = self.pack.pack_id
        for steps, key in self.pair_keys.items():
            both = frozenset(Event("analysed", name, step) for step in steps)
            yield Follower("pair", name, max(steps), key, both)


@dataclass(frozen=True)
class Plan:
    """All tasks of a study."""

    context: Context
    packs: tuple[PackPlan, ...]

    @property
    def study(self) -> Study:
        """The study's settings."""
        return self.context.study

    @property
    def namespace(self) -> str:
        """Ray namespace of the actors' names: two studies on one cluster do not collide."""
        return f"lossray-{self.study.name}-{content_hash(self.context.out, 8)}"

    def keys(self) -> Iterator[str]:
        """The keys of all tasks."""
        for pack in self.packs:
            yield pack.training_key
            yield from pack.checkpoint_keys.values()
            yield from pack.curvature_keys.values()
            yield from (follower.key for follower in pack.followers)

    def training_job(self, plan: PackPlan, attempt: Attempt) -> TrainingJob:
        """What the training of a pack is given."""
        return TrainingJob(self.context, plan.pack, plan.training_key, plan.checkpoint_keys, attempt)

    def curvature_job(self, plan: PackPlan, step: int, attempt: Attempt | None = None) -> CurvatureJob:
        """What the analysis of a checkpoint is given."""
        return CurvatureJob(self.context, plan.pack, step, plan.curvature_keys[step], attempt or Attempt())

    def job_of(self, plan: PackPlan, follower: Follower) -> AnalysisJob:
        """What a follower is given."""
        steps = next(steps for steps, key in plan.pair_keys.items() if key == follower.key)
        return self.pair_job(plan, steps)

    def pair_job(self, plan: PackPlan, steps: tuple[int, int]) -> PairJob:
        """What the comparison of two neighbouring checkpoints is given."""
        earlier, later = (self.curvature_job(plan, step) for step in steps)
        return PairJob(earlier, later, plan.pair_keys[steps], Attempt())


def make_plan(context: Context, packs: tuple[Pack, ...], inputs: StudyInputs) -> Plan:
    """Name every task of the packs."""
    return Plan(context, tuple(_plan_pack(pack, context.study, inputs) for pack in packs))


def _plan_pack(pack: Pack, study: Study, inputs: StudyInputs) -> PackPlan:
    checkpoints = checkpoint_keys(pack, study, inputs)
    curvature = {step: curvature_key(pack, step, study, inputs) for step in checkpoints}
    return PackPlan(
        pack,
        training_key(pack, study, inputs),
        checkpoints,
        curvature,
        _pair_keys(curvature, study),
    )


def _pair_keys(curvature: Mapping[int, str], study: Study) -> dict[tuple[int, int], str]:
    """The comparisons of neighbouring steps, where the study asks for something of them."""
    pairs = pairwise(sorted(curvature)) if pair_tables(study) else ()
    return {(a, b): pair_key(curvature[a], curvature[b], study) for a, b in pairs}
