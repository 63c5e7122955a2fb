"""What is decided once per setting and frozen in the manifest: executor, product mode, partition."""

from functools import partial

import torch

from lossray.errors import LossrayError, ModelError
from lossray.measures.checkpoint_spectra import operators_of
from lossray.networks.executor import choose_executor
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.nests import rows
from lossray.networks.stack import build_stack, stack_models
from lossray.operators.example_mean import require_example_mean
from lossray.operators.modes import choose_product_mode
from lossray.operators.objectives import PackedObjective
from lossray.operators.settings import ProductMode
from lossray.plugins import failure
from lossray.study import Setting, Study
from lossray.study.packs import AUTO_SIZE
from lossray.training.datasets import Dataset, analysis_set

TRIAL_EXAMPLES = 4


def study_device(study: Study, *, gpus: bool) -> str:
    """Where the study will train: "cuda" where it asks for GPUs, with "auto" where there are some."""
    asked = study.resources.train.gpus
    return "cuda" if (gpus if asked == "auto" else asked) else "cpu"


def decide(study: Study, dataset: Dataset, device: str, setting: Setting) -> tuple[str, ProductMode]:
    """Executor and product mode of a setting, by rules that do not measure time: every machine decides alike.

    Args:
        study: the study's settings.
        dataset: in the training dtype.
        device: "cpu" or "cuda", where the study will train.
        setting: a model with an optimizer.

    Raises:
        ModelError: the model, or the loss, cannot be differentiated twice.
    """
    try:
        return _decided(study, dataset, device, setting)
    except LossrayError:
        raise
    except Exception as error:  # a user's model may raise anything
        raise ModelError(
            f"model {setting.model.name!r} with loss {study.training.loss!r}: a trial of training and of a "
            f"Hessian-vector product failed: {failure(error)}"
        ) from error


def _decided(study: Study, dataset: Dataset, device: str, setting: Setting) -> tuple[str, ProductMode]:
    build = partial(build_model, setting.model, dataset.input_shape, dataset.n_outputs)
    loss = get_loss(study.training.loss)
    batch = study.training.batch_size  # batch norm takes no batch of one
    n = TRIAL_EXAMPLES if batch == "full" else min(batch, TRIAL_EXAMPLES)
    few = (rows(dataset.train.inputs, slice(n)), dataset.train.targets[:n])
    recorded = study.source == "checkpoints"  # a pack of one, which is never trained
    executor = "loop" if recorded else choose_executor(build, *few, loss, device=device)
    size = AUTO_SIZE[executor] if study.resources.pack == "auto" else study.resources.pack
    dtype = getattr(torch, study.curvature.dtype)
    if recorded:
        with torch.random.fork_rng(devices=[]):
            stack, theta, buffers = stack_models([build()], executor=executor, dtype=dtype)
    else:
        stack, theta, buffers = build_stack(build, study.seeds[:size], executor=executor, dtype=dtype)
    for split in ("train", "validation", "test"):
        examples = getattr(dataset, split)
        if len(examples.targets):
            whole = PackedObjective(
                stack, theta, buffers, loss, [(examples.inputs, examples.targets)], dtype=dtype
            )
            require_example_mean(whole, purpose=f"the loss over the {split} split", anywhere=True)
    n_examples = len(analysis_set(dataset, study.curvature.examples).targets)
    mode = choose_product_mode(stack, theta, buffers, loss, few, n_examples=n_examples, dtype=dtype)
    objective = PackedObjective(stack, theta, buffers, loss, [few], dtype=dtype)
    for named in operators_of(study, objective, mode=mode, scale=torch.ones_like(theta)):
        if named.block == "all":
            named.operator.apply(theta)
    return executor, mode
