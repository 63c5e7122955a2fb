"""A recorded run: its checkpoints read in place of a training, and measured as a training would have."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch

from lossray.storage.checkpoints import Checkpoint, read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack
from lossray.training.datasets import on_device
from lossray.training.evaluation import evaluate
from lossray.training.log import EVALUATED, masked
from tasks.context import Context, dataset_of, loss_of, stack_of


def recorded_checkpoints(
    context: Context, pack: Pack, steps: Collection[int], unknown: Collection[int], device: torch.device
) -> Iterator[Checkpoint]:
    """The checkpoints of a recorded run, in order of their steps, on the CPU.

    Args:
        context: of the study.
        pack: the run.
        steps: of all its checkpoints, ascending.
        unknown: the steps to evaluate on all splits; the others have no evaluation.
        device: where to evaluate.

    Raises:
        StoreError: a checkpoint is missing or damaged.
    """
    dtype = getattr(torch, context.study.training.dtype)
    dataset = on_device(dataset_of(context, dtype), device)
    stack, _, _ = stack_of(pack, dataset, dtype=dtype, device=device)
    store, loss = Store(context.out), loss_of(context)
    for step in steps:
        checkpoint = read_checkpoint(store, pack.pack_id, step)
        if step not in unknown:
            yield checkpoint
            continue
        theta = stack.layout.join(checkpoint.parameters).to(device, dtype)
        buffers = converted(checkpoint.buffers, device, dtype)
        measures = evaluate(stack, theta, buffers, loss, dataset)
        evaluation = {name: masked(values.cpu(), checkpoint.alive) for name, values in measures.items()}
        log = {**checkpoint.log, **{name: evaluation[name][None] for name in EVALUATED}}
        yield replace(checkpoint, evaluation=evaluation, log=log)


def converted(
    tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors on a device, those of floating point in a dtype."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
