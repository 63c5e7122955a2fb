"""What a study consists of: packs, and the key of every task."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lossray.settings import content_hash
from lossray.study import Pack, Study, StudyInputs, checkpoint_keys, curvature_key, training_key
from tasks.context import Context
from tasks.curvature import CurvatureJob
from tasks.record import Attempt
from tasks.training import TrainingJob


@dataclass(frozen=True)
class PackPlan:
    """The tasks of one pack."""

    pack: Pack
    training_key: str
    checkpoint_keys: Mapping[int, str]  # step -> key of the training segment that ends there
    curvature_keys: Mapping[int, str]  # step -> key of the checkpoint's analysis


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

    def training_job(self, plan: PackPlan, attempt: Attempt) -> TrainingJob:
        """What the training of a pack is given."""
        return TrainingJob(self.context, plan.pack, plan.training_key, plan.checkpoint_keys, attempt)

    def curvature_job(self, plan: PackPlan, step: int, attempt: Attempt | None = None) -> CurvatureJob:
        """What the analysis of a checkpoint is given."""
        return CurvatureJob(self.context, plan.pack, step, plan.curvature_keys[step], attempt or Attempt())


def make_plan(context: Context, packs: tuple[Pack, ...], inputs: StudyInputs) -> Plan:
    """Name every task of the packs."""
    return Plan(context, tuple(_plan_pack(pack, context.study, inputs) for pack in packs))


def _plan_pack(pack: Pack, study: Study, inputs: StudyInputs) -> PackPlan:
    checkpoints = checkpoint_keys(pack, study, inputs)
    return PackPlan(
        pack,
        training_key(pack, study, inputs),
        checkpoints,
        {step: curvature_key(pack, step, study, inputs) for step in checkpoints},
    )
