"""What a pack costs: products, seconds and bytes, from a few steps and products timed here."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from flows.plan import PackPlan, Plan
from lossray.connectivity.settings import RESCALED
from lossray.ensembles.methods import METHODS
from lossray.geometry.planes import LINES
from lossray.measures.pack_point import loss_of, stack_of
from lossray.networks.parameter_layers import layers
from lossray.nullity.polish import MOST_STEPS
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.operators.settings import CurvatureSettings
from lossray.spectra.analysis import TRACES_PER_PROBE
from lossray.study import Pack, Study, surface_members
from lossray.study.demands import asks_for_angles, gauge_pairs, operators_asked, pairs_needed
from lossray.training.datasets import Dataset, analysis_set
from lossray.training.loop import train
from lossray.training.update_rules import OPTIMIZERS
from tasks.jobs import ConnectivityJob, EnsembleJob

TIMED_STEPS = (0, 1, 2, 3, 8, 13)  # checkpoints of the timed training; the first step warms up
LONG_SEGMENT = 5  # steps between the last of them
TIMED_PRODUCTS = 3
# Time of paths and ensembles in that of their steps, as observed in `ensembles`.
EVALUATIONS = 1.5
# Time of an analysis in that of its products: the recurrences around them, rows and files, and other tasks
# beside it. As observed in `paper`, `quick` and `edge-of-stability`, on two cores.
OVERHEAD = 2.2
TABLE_BYTES = 100_000  # of a pack's checkpoint in parts/ and tables/: a few hundred rows in small files
SURFACE_POINT_BYTES = 50  # likewise, of a point of a slice
FORWARD = 1 / 6  # of the time of a product
DENSE_SECONDS = 1.0  # all eigenvalues of one matrix of order 3,000; grows with its cube


@dataclass(frozen=True)
class Cost:
    """Estimated cost of one pack.

    Attributes:
        n_params: d of the model.
        products: Hessian-vector products, each for all members at once.
        training_seconds: of the training's steps and evaluations.
        curvature_seconds: of the analyses and of all that follows them, retraining included.
        disk_bytes: of its results in the store.
    """

    n_params: int
    products: int
    training_seconds: float
    curvature_seconds: float
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """On one core."""
        return self.training_seconds + self.curvature_seconds


def estimate(pack_plan: PackPlan, plan: Plan, dataset: Dataset) -> Cost:
    """The cost of one pack, from a few timed steps and products."""
    study, pack, steps = plan.study, pack_plan.pack, pack_plan.checkpoint_keys
    timed = _time_training(pack, study, dataset)
    n_params = timed.n_params
    top = pairs_needed(study, dataset.n_outputs, n_params)
    spectra = list(_spectra(pack, study, dataset))
    gauges = _further_gauges(study, pack)
    products = sum(products_of(study.curvature, top, dim) for dim in spectra)
    pairs = gauge_pairs(study, dataset.n_outputs, n_params)
    products += gauges * min(n_params, search_products(pairs)) + round(_direction_products(study))
    products += _layer_products(pack, study, dataset)
    products += min(n_params, search_products(1)) * _searches_sharpness(study, pack)
    dense = sum(follower.kind == "degeneracy" for follower in pack_plan.followers)
    dense_products, dense_seconds = _dense_cost(study, pack, n_params)
    analyses = len(pack_plan.curvature_keys)
    products = analyses * products + dense * dense_products
    product_seconds = _time_product(pack, plan, dataset) if analyses else 0.0
    further = analyses * study.angles.window * timed.step_seconds + dense * dense_seconds
    surfaces = sum(follower.kind == "surfaces" for follower in pack_plan.followers)
    points = surfaces * _surface_points(study, pack)
    further += points * FORWARD * product_seconds / len(pack.seeds)
    further += timed.step_seconds * _retraining_steps(pack_plan, study)
    stored = sum(min(top, dim) * dim for dim in spectra) + gauges * pairs * n_params
    vectors = 4 * len(pack.seeds) * stored * study.curvature.vectors
    return Cost(
        n_params=n_params,
        products=products,
        training_seconds=timed.step_seconds * study.training.steps + len(steps) * timed.evaluation_seconds,
        curvature_seconds=OVERHEAD * products * product_seconds + further,
        disk_bytes=len(steps) * timed.state_bytes
        + analyses * (vectors + TABLE_BYTES)
        + points * SURFACE_POINT_BYTES
        + _logit_bytes(pack_plan, study, dataset),
    )


def products_of(settings: CurvatureSettings, top: int, dim: int) -> int:
    """About how many products the analysis of an operator of size ``dim`` takes.

    As observed from the first step to the last (the early spectra, of few outliers, take twice as many as the
    late ones): three for each pair and some sixty to find and certify them at both ends; the probes' steps,
    of which the complement of the pairs needs a sixth; and the products for the trace.
    """
    probing = settings.probes * (settings.steps // 6 + TRACES_PER_PROBE)
    return min(dim, 3 * top + 60 + probing)


def search_products(top: int) -> int:
    """About how many products it takes to find and certify the ``top`` largest pairs, as observed."""
    return 4 * top + 30


def _further_gauges(study: Study, pack: Pack) -> int:
    """Gauges in which the Hessian's eigenpairs are computed anew."""
    if not asks_for_angles(study):
        return 0
    scaled = pack.optimizer is not None and callable(OPTIMIZERS[pack.optimizer.name].scale)
    searched = {"raw": False, "balanced": True, "adaptive": True, "preconditioned": scaled}
    return sum(searched[name] for name in study.angles.gauges)


def _searches_sharpness(study: Study, pack: Pack) -> bool:
    """Whether the preconditioned sharpness takes a search of its own, which the angles have not done."""
    scaled = pack.optimizer is not None and callable(OPTIMIZERS[pack.optimizer.name].scale)
    return scaled and not (asks_for_angles(study) and "preconditioned" in study.angles.gauges)


def _direction_products(study: Study) -> float:
    """What directions and sharpness take at a checkpoint, forward passes counted as products."""
    directions = len(study.angles.directions) + len(study.angles.shadow)
    searched = 30 * FORWARD  # for the critical learning rate
    return directions * (1 + 2 * FORWARD) + searched


def _layer_products(pack: Pack, study: Study, dataset: Dataset) -> int:
    """One for each direction and layer, where [angles] asks for it."""
    if not study.angles.layers:
        return 0
    dtype = getattr(torch, study.training.dtype)
    stack, _, _ = stack_of(pack, dataset, dtype=dtype, device=torch.device("cpu"))
    return len(layers(stack.layout)) * (len(study.angles.directions) + len(study.angles.shadow))


def _dense_cost(study: Study, pack: Pack, dim: int) -> tuple[int, float]:
    """Products (for all members at once) and further seconds of one degeneracy task, at most."""
    settings = study.degeneracy
    if settings is None:
        return 0, 0.0
    if dim > settings.dense_up_to:
        return study.curvature.probes * study.curvature.steps, 0.0
    # Solves: raw, in the adaptive gauge, Gauss-Newton, and of a generic point; the same where polishing has
    # led to, each step of which takes a Hessian and a solve. Products in float64 take twice as long.
    products, solves = (6 + MOST_STEPS, 8 + MOST_STEPS) if settings.polish else (3, 4)
    return products * dim, solves * len(pack.seeds) * DENSE_SECONDS * (dim / 3000) ** 3


def _retraining_steps(pack_plan: PackPlan, study: Study) -> float:
    """Steps of the pack's training in paths and ensembles, and as steps what is evaluated beside them."""
    steps = 0.0
    for job in pack_plan.further.values():
        if isinstance(job, ConnectivityJob) and study.connectivity is not None and job.aligned != RESCALED:
            curves = sum(kind != "line" for kind in study.connectivity.kinds)
            curve_steps = study.connectivity.steps or study.training.steps
            steps += curves * curve_steps * len(job.pairs) / len(pack_plan.pack.seeds)
        elif isinstance(job, EnsembleJob) and study.ensembles is not None:
            budgets = [study.ensembles.budget(b, study.training.steps) for b in study.ensembles.budgets]
            steps += sum(METHODS[job.method].steps(budget) for budget in budgets)
    return EVALUATIONS * steps


def _logit_bytes(pack_plan: PackPlan, study: Study, dataset: Dataset) -> int:
    """Of all ensembles' members on the validation and test splits, in parts/ and in tables/."""
    if study.ensembles is None or not study.ensembles.logits:
        return 0
    methods = sum(isinstance(job, EnsembleJob) for job in pack_plan.further.values())
    budgets = [study.ensembles.budget(b, study.training.steps) for b in study.ensembles.budgets]
    members = methods * len(pack_plan.pack.seeds) * sum(budget.size for budget in budgets)
    examples = len(dataset.validation.targets) + len(dataset.test.targets)
    return 2 * 4 * members * examples * dataset.n_outputs


def _surface_points(study: Study, pack: Pack) -> int:
    """Points of all slices through one checkpoint, each for one member."""
    settings = study.surfaces
    if settings is None:
        return 0
    each = sum(settings.points if kind in LINES else settings.points**2 for kind in settings.kinds)
    return len(surface_members(pack, study)) * each


def _spectra(pack: Pack, study: Study, dataset: Dataset) -> Iterator[int]:
    """The sizes of all operators and blocks that are analysed at a checkpoint."""
    dtype = getattr(torch, study.training.dtype)
    stack, _, _ = stack_of(pack, dataset, dtype=dtype, device=torch.device("cpu"))
    blocks = layers(stack.layout)
    sizes = dict(zip(stack.layout.names, stack.layout.sizes, strict=True))
    for with_layers in operators_asked(study).values():
        yield stack.dim
        for names in blocks.values() if with_layers else ():
            yield sum(sizes[name] for name in names)


@dataclass(frozen=True)
class _Timed:
    """What a few steps of training have told."""

    n_params: int
    step_seconds: float
    evaluation_seconds: float  # at a checkpoint
    state_bytes: int  # of a checkpoint


def _time_training(pack: Pack, study: Study, dataset: Dataset) -> _Timed:
    """Train a few steps; a recorded run is trained and on disk."""
    dtype = getattr(torch, study.training.dtype)
    stack, theta, buffers = stack_of(pack, dataset, dtype=dtype, device=torch.device("cpu"))
    if pack.recorded is not None or pack.optimizer is None:
        return _Timed(stack.dim, 0.0, 0.0, 0)
    few = {"steps": TIMED_STEPS[-1], "checkpoints": {"steps": list(TIMED_STEPS)}}
    training = type(study.training).model_validate({**study.training.plain(), **few})
    names: dict[str, Any] = {"pack_id": pack.pack_id, "seeds": pack.seeds}
    segments = list(train(stack, theta, buffers, pack.optimizer, training, dataset, **names))
    last = segments[-1]
    groups = (last.parameters, last.buffers, last.optimizer)
    size = sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())
    # Each is so many steps and an evaluation. The quickest of several counts, since a hiccup of the machine
    # is many steps long.
    short, long = (
        min(after.seconds for before, after in pairwise(segments[1:]) if after.step - before.step == steps)
        for steps in (1, LONG_SEGMENT)
    )
    per_step = max(long - short, 0.0) / (LONG_SEGMENT - 1)
    return _Timed(stack.dim, per_step, max(short - per_step, 0.0), size)


def _time_product(pack: Pack, plan: Plan, dataset: Dataset) -> float:
    """Seconds of a Hessian-vector product for all members."""
    settings = plan.study.curvature
    dtype = getattr(torch, settings.dtype)
    stack, theta, buffers = stack_of(pack, dataset, dtype=dtype, device=torch.device("cpu"))
    examples = analysis_set(dataset, settings.examples)
    batch = (examples.inputs, examples.targets)
    hessian = PackedHessian(
        PackedObjective(stack, theta, buffers, loss_of(plan.context.study), [batch], dtype=dtype),
        mode=pack.product_mode,
    )
    hessian.apply(theta)
    return min(_seconds(partial(hessian.apply, theta)) for _ in range(TIMED_PRODUCTS))


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
