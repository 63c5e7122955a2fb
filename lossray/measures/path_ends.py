"""The ends of paths between runs: read from their checkpoints, aligned or rescaled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lossray.connectivity.jumps import jumps
from lossray.connectivity.packed_align import packed_align
from lossray.connectivity.settings import RESCALED, AlignmentKind, ConnectivitySettings
from lossray.errors import ModelError
from lossray.measures.pack_point import loss_of
from lossray.networks.batch_norm import statistics_of
from lossray.networks.nests import is_tensor, mapped
from lossray.networks.permutations import permutation_symmetry
from lossray.networks.random_gauges import random_factors
from lossray.networks.stack import Loss, Stack
from lossray.networks.symmetry import rescaling_symmetry
from lossray.seeds import stream
from lossray.storage.checkpoints import Checkpoint
from lossray.study import Pack, Study
from lossray.training.datasets import Dataset
from lossray.training.evaluation import evaluate_split, keeps_function, output_change


@dataclass(frozen=True)
class PathSite:
    """The runs of a pack that are joined, each to an earlier one or to a rescaled copy of itself.

    Attributes:
        study: the settings.
        pack: the runs.
        pairs: runs by id; the second is of this pack.
        aligned: what is done to the second of each pair first.
        stack: the models of the pack as one.
        dataset: the study's data, on the device.
        last: the last checkpoints of the pack, and of those of its setting that come before, on the device.
    """

    study: Study
    pack: Pack
    pairs: tuple[tuple[str, str], ...]
    aligned: AlignmentKind | Literal["rescaled"]
    stack: Stack
    dataset: Dataset
    last: Mapping[str, tuple[Pack, Checkpoint]]

    @property
    def settings(self) -> ConnectivitySettings:
        """Those of [connectivity]."""
        assert self.study.connectivity is not None
        return self.study.connectivity

    @property
    def loss(self) -> Loss:
        """The study's."""
        return loss_of(self.study)

    def seed(self, run_id: str) -> int:
        """The seed of a run of the pack."""
        return self.pack.seeds[self.pack.run_ids.index(run_id)]


Tensors = tuple[Tensor, dict[str, Tensor], Tensor]  # of a run: parameters [d], buffers, alive


@dataclass(frozen=True)
class PathEnds:
    """Both ends of P pairs.

    Attributes:
        a: parameters of the first runs, [P, d].
        b: those of the second, [P, d].
        alive: [P] bool: neither of the two runs has diverged.
        buffers_a: name -> [P, *shape].
        buffers_b: name -> [P, *shape].
        distance_before: [P] float64, of a and b before the alignment.
        function_change: [P] float64, by the alignment of b.
    """

    a: Tensor
    b: Tensor
    alive: Tensor
    buffers_a: Mapping[str, Tensor]
    buffers_b: Mapping[str, Tensor]
    distance_before: Tensor
    function_change: Tensor


def possible(site: PathSite) -> bool:
    """Whether the architecture has the symmetry that the alignment or the rescaling needs."""
    aligned, template = site.aligned, site.stack.template
    if not is_tensor(site.dataset.train.inputs):  # whose symmetries are not known
        return aligned == "none"
    data = (site.dataset.train.inputs, None)
    scalable = partial(rescaling_symmetry, template, site.stack.layout, data)
    permutable = partial(permutation_symmetry, template, data)
    if aligned == "both":  # either is enough
        return _exists(permutable) or _exists(scalable)
    if aligned == "permutation":
        return _exists(permutable)
    return aligned == "none" or _exists(scalable)


def _exists(symmetry: Callable[[], object]) -> bool:
    try:
        symmetry()
    except ModelError:
        return False
    return True


def joinable(site: PathSite) -> PathSite:
    """The site with those pairs alone that a path can join, which moves trainable parameters.

    Frozen ones must agree, and other buffers than batch norm's as far as the loss depends on them.
    """
    frozen = [
        name for name, parameter in site.stack.template.named_parameters() if not parameter.requires_grad
    ]
    buffers = {name for name, _ in site.stack.template.named_buffers()}
    if not frozen and buffers <= statistics_of(site.stack.template):
        return site
    ends = _as_they_are(site)
    jump = _jumps(site, ends)
    same = [
        all(torch.equal(ends.buffers_a[name][p], ends.buffers_b[name][p]) for name in frozen)
        and not bool(jump[p] & ends.alive[p])
        for p in range(len(site.pairs))
    ]
    pairs = tuple(pair for pair, is_same in zip(site.pairs, same, strict=True) if is_same)
    return replace(site, pairs=pairs)


def _jumps(site: PathSite, ends: PathEnds) -> Tensor:
    """Whether the loss would jump at the second end, [P]."""
    train, loss = site.dataset.train, site.loss

    def losses(theta: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        return evaluate_split(site.stack, theta, buffers, loss, train)[0]

    return jumps(site.stack, ends.b, ends.buffers_a, ends.buffers_b, train.inputs, losses)


def ends_of(site: PathSite) -> PathEnds:
    """The ends of every pair, the second aligned or rescaled."""
    ends = _as_they_are(site)
    if site.aligned == "none":
        return ends
    return _rescaled(site, ends) if site.aligned == RESCALED else _aligned(site, ends)


def _as_they_are(site: PathSite) -> PathEnds:
    """The runs of each pair at their last checkpoints."""
    runs: dict[str, Tensors] = {}
    for pack, checkpoint in site.last.values():
        theta = site.stack.layout.join(checkpoint.parameters)
        for r, run_id in enumerate(pack.run_ids):
            buffers = {name: tensor[r] for name, tensor in checkpoint.buffers.items()}
            runs[run_id] = theta[r], buffers, checkpoint.alive[r]
    a, b = ([runs[pair[side]] for pair in site.pairs] for side in (0, 1))
    first, second = (torch.stack([theta for theta, _, _ in end]) for end in (a, b))
    alive = torch.stack([one[2] & other[2] for one, other in zip(a, b, strict=True)])
    distance = torch.linalg.vector_norm(first.double() - second.double(), dim=1)
    unknown = torch.full_like(distance, torch.nan)
    return PathEnds(first, second, alive, _stacked(a), _stacked(b), distance, unknown)


def _stacked(ends: Sequence[Tensors]) -> dict[str, Tensor]:
    return {name: torch.stack([buffers[name] for _, buffers, _ in ends]) for name in ends[0][1]}


def _rescaled(site: PathSite, ends: PathEnds) -> PathEnds:
    """D theta with log-normal factors."""
    data = (site.dataset.train.inputs, None)
    symmetry = rescaling_symmetry(site.stack.template, site.stack.layout, data)
    seeds = [stream(site.seed(run), "connectivity/rescaled") for _, run in site.pairs]
    sigma = torch.full((len(seeds),), site.settings.sigma, dtype=torch.float64, device="cpu")
    diagonal = symmetry.diagonal(random_factors(seeds, symmetry.units, sigma=sigma)).to(ends.b.device)
    scaled = ends.b.double() * diagonal
    rounded = scaled.to(ends.b.dtype)
    # The geometric path needs equal signs: what underflows becomes the smallest number instead of 0.
    smallest = torch.nextafter(torch.zeros_like(rounded), ends.b)
    buffers = {name: _exact(tensor) for name, tensor in ends.buffers_b.items()}
    inputs = mapped(_exact, site.dataset.train.inputs)
    change = output_change(site.stack, ends.b.double(), scaled, buffers, inputs)
    kept = keeps_function(site.stack, ends.b, scaled, buffers, inputs, eps=symmetry.seen.eps)
    for p in torch.nonzero(ends.alive & ~kept)[:, 0].tolist():
        raise ModelError(
            f"run {site.pairs[p][1]}: its outputs change by {float(change[p]):.2g} of the largest in "
            "another gauge, which is no rounding: they depend on more than its layers show; set "
            "connectivity.rescaled to false"
        )
    return replace(ends, b=rounded.where(rounded != 0, smallest), function_change=change)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _aligned(site: PathSite, ends: PathEnds) -> PathEnds:
    """The second of each pair brought close to the first."""
    kind = site.aligned
    assert kind != "none"
    assert kind != RESCALED
    alignment = packed_align(
        site.stack,
        (ends.b, ends.buffers_b),
        (ends.a, ends.buffers_a),
        site.dataset.train.inputs,
        alive=ends.alive,
        kind=kind,
        matching=site.settings.matching,
    )
    return replace(
        ends, b=alignment.theta, buffers_b=alignment.buffers, function_change=alignment.function_change
    )
