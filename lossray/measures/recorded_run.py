"""A recorded run: its checkpoints measured as a training would have."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from lossray.measures.pack_point import converted, loss_of, stack_of
from lossray.storage.checkpoints import Checkpoint
from lossray.study import Pack, Study
from lossray.training.datasets import Dataset
from lossray.training.evaluation import evaluate
from lossray.training.log import EVALUATED, masked


def evaluated(
    study: Study, pack: Pack, dataset: Dataset, checkpoints: Iterable[tuple[Checkpoint, bool]]
) -> Iterator[Checkpoint]:
    """The checkpoints of a recorded run, on the CPU, with losses on all splits where these are asked for.

    Args:
        study: the settings.
        pack: the run.
        dataset: the study's data, on the device where to evaluate.
        checkpoints: on the CPU, each with whether it is to be evaluated.
    """
    dtype, device = getattr(torch, study.training.dtype), dataset.train.targets.device
    stack, _, _ = stack_of(pack, dataset, dtype=dtype, device=device)
    loss = loss_of(study)
    for checkpoint, asked in checkpoints:
        if not asked:
            yield checkpoint
            continue
        theta = stack.layout.join(checkpoint.parameters).to(device, dtype)
        buffers = converted(checkpoint.buffers, device, dtype)
        measures = evaluate(stack, theta, buffers, loss, dataset)
        evaluation = {name: masked(values.cpu(), checkpoint.alive) for name, values in measures.items()}
        log = {**checkpoint.log, **{name: evaluation[name][None] for name in EVALUATED}}
        yield replace(checkpoint, evaluation=evaluation, log=log)
