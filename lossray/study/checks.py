"""What of a study can be checked only against its data, before anything is written."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lossray.errors import LossrayError, ModelError, StudyError
from lossray.networks.layout import tensors_of
from lossray.networks.losses import get_loss, ignores_one_logit, one_logit
from lossray.networks.models import build_model, require_outputs, try_model
from lossray.networks.nests import rows
from lossray.networks.settings import LOSSES
from lossray.operators.objectives import example_losses
from lossray.plugins import failure
from lossray.storage.recordings import Recording
from lossray.study.problems import Problem
from lossray.study.settings import Study
from lossray.study.sizes import allocations_that_fit, require_memory
from lossray.training.datasets import Dataset, Split

TRIED_EXAMPLES = 8  # on which models and the loss are tried


def check_against_data(study: Study, dataset: Dataset, origin: str = "") -> None:
    """Refuse sizes, losses and models that do not fit the data. Builds each model once.

    Args:
        study: from `load_study`.
        dataset: the study's data, in its training dtype.
        origin: put before each line of an error, such as the study file.

    Raises:
        StudyError: one line for each problem.
    """
    outputs, unfit = _models(study, dataset)
    problems = [
        *_sizes(study, dataset),
        *_loss(study, dataset, outputs),
        *unfit,
        *_ensembles(study, dataset, outputs),
    ]
    if problems:
        raise StudyError("\n".join(problem.line(origin) for problem in problems))


def check_recordings(
    study: Study, dataset: Dataset, recordings: Sequence[Recording], origin: str = "", *, out: str
) -> None:
    """Refuse recorded runs that the study's model does not fit. Builds the model once.

    Args:
        study: with `source = "checkpoints"`.
        dataset: the study's data.
        recordings: the recorded runs of the store.
        origin: put before the error, such as the study file.
        out: the store, for the message.

    Raises:
        StudyError: nothing is recorded, or the model has other parameters than a run.
    """
    if not recordings:
        text = (
            f"nothing is recorded in {out}: call lossray.record(OUT, model, optimizer, step) in your training"
        )
        raise StudyError(Problem(("source",), text).line(origin))
    with torch.random.fork_rng(devices=[]):
        model = build_model(study.models[0], dataset.input_shape, dataset.n_outputs)
    for recording in recordings:
        difference = _difference(model, recording)
        if difference:
            text = (
                f"{study.models[0].name!r} does not build the module of run {recording.run!r}: {difference}"
            )
            raise StudyError(Problem(("models", 0), text).line(origin))


def _difference(model: nn.Module, recording: Recording) -> str | None:
    """The first tensor that a model and a recording do not have alike."""
    parameters, buffers = tensors_of(model)
    built = {name: ("trainable", list(tensor.shape)) for name, tensor in parameters.items()}
    built |= {name: ("not trainable", list(tensor.shape)) for name, tensor in buffers.items()}
    recorded = {name: ("trainable", list(shape)) for name, shape in recording.parameters.items()}
    recorded |= {name: ("not trainable", list(shape)) for name, shape in recording.buffers.items()}
    for name in [*recorded, *built]:
        if recorded.get(name) != built.get(name):
            built_text, recorded_text = (
                f"{tensors[name][1]} {tensors[name][0]}" if name in tensors else "none"
                for tensors in (built, recorded)
            )
            return f"{name}: found {built_text}, recorded {recorded_text}"
    if list(parameters) != list(recording.parameters):
        return f"found its parameters in the order {', '.join(parameters)}, recorded in another"
    return None


def _sizes(study: Study, dataset: Dataset) -> list[Problem]:
    n = len(dataset.train.targets)
    problems = []
    batch_size, examples = study.training.batch_size, study.curvature.examples
    # The default takes the whole split where that is smaller; a number that was written means what it says.
    if batch_size != "full" and batch_size > n and "batch_size" in study.training.model_fields_set:
        text = f"found {batch_size}; allowed: at most {n}, the training examples, or 'full'"
        problems.append(Problem(("training", "batch_size"), text))
    if examples != "all" and examples > n:
        text = f"found {examples}; allowed: at most {n}, the training examples, or 'all'"
        problems.append(Problem(("curvature", "examples"), text))
    return problems


def _loss(study: Study, dataset: Dataset, outputs: Mapping[int, Tensor]) -> list[Problem]:
    """Try the loss on what the models return, or on numbers in place of it where none could be tried."""
    key_path, name = ("training", "loss"), study.training.loss
    targets = _few(dataset).targets
    unfit = _targets_of_named(study, dataset)
    if unfit is not None:
        return [Problem(key_path, unfit)]
    size = len(targets) * dataset.n_outputs
    tried = {tuple(values.shape): values for values in outputs.values()}
    for values in tried.values() or [torch.linspace(-1, 1, size).view(-1, dataset.n_outputs)]:
        problem = _trial(name, values.to(getattr(torch, study.training.dtype)), targets)
        if problem is not None:
            return [Problem(key_path, problem)]
    return []


def _targets_of_named(study: Study, dataset: Dataset) -> str | None:
    """Targets that a loss by name would read as something else."""
    name, targets = study.training.loss, dataset.train.targets
    if name not in LOSSES:
        return None
    if targets.is_floating_point():
        if name != "cross_entropy":
            return None
        whole = bool((targets == targets.round()).all()) and targets.ndim == 1
        kind = "floats, though whole numbers: make them integers if they are classes" if whole else "floats"
        return f"found 'cross_entropy', but the targets of the data are {kind}; allowed: 'mse' or a function"
    mismatch = f"found {name!r} and integer targets {list(targets.shape)}"
    splits = (dataset.train, dataset.validation, dataset.test)
    smallest = min(int(split.targets.min()) for split in splits)
    largest = max(int(split.targets.max()) for split in splits)
    if targets.ndim == 1 and smallest == 0:
        return None
    remedy = "a function of your own as loss, which reads them as you mean them"
    if targets.ndim == 1 and smallest > 0:
        remedy = f"subtract {smallest}, or {remedy}"
    return f"{mismatch} from {smallest} to {largest}; allowed: classes 0..C-1 of shape [N], or {remedy}"


def _trial(name: str, outputs: Tensor, targets: Tensor) -> str | None:
    """What is wrong with the loss on a few outputs [B, ...] and targets [B, ...]."""
    shapes = f"outputs {list(outputs.shape)} and targets {list(targets.shape)}"
    try:
        loss = get_loss(name)
        once, twice = loss(outputs, targets), loss(torch.cat([outputs] * 2), torch.cat([targets] * 2))
        if ignores_one_logit(lambda changed: loss(changed, targets), outputs):
            return f"{name!r}: {one_logit(outputs)}"
        columns = _one_column(outputs) and _one_column(targets) and outputs.ndim != targets.ndim
        each = example_losses(loss, outputs, targets) if columns else once
    except LossrayError as error:
        return str(error)
    except Exception as error:  # a user's loss may raise anything
        return f"{name!r} on {shapes}: {failure(error)}"
    if not torch.allclose(once, twice, rtol=1e-3, atol=0, equal_nan=True):
        return (
            f"{name!r} gives {float(once):.4g} for a few examples and {float(twice):.4g} for the same "
            "twice; allowed: the mean over examples"
        )
    if not torch.allclose(once, each.mean(), rtol=1e-3, equal_nan=True):
        return (
            f"{name!r} on {shapes} gives {float(once):.4g}, but {float(each.mean()):.4g} on average over the "
            "examples alone; where it subtracts one from the other, they broadcast to [B, B]: give both one "
            "shape, such as outputs.squeeze(-1)"
        )
    return None


def _one_column(values: Tensor) -> bool:
    return values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)


def _few(dataset: Dataset) -> Split:
    """A few training examples from all of the split: data are often sorted by their targets."""
    n = len(dataset.train.targets)
    few = min(n, TRIED_EXAMPLES)
    index = torch.arange(few) * (n - 1) // max(1, few - 1)
    return Split(rows(dataset.train.inputs, index), dataset.train.targets[index])


def _models(study: Study, dataset: Dataset) -> tuple[dict[int, Tensor], list[Problem]]:
    """The outputs of every model on a few examples, by its index, and what is wrong with the others."""
    examples, outputs, problems = _few(dataset), {}, []
    for i, model in enumerate(study.models):
        try:
            require_memory(model, dataset.input_shape, dataset.n_outputs)
            with allocations_that_fit(model.name):
                _, model_outputs = try_model(model, examples.inputs, dataset.n_outputs)
            if study.training.loss in LOSSES and model_outputs.shape != examples.targets.shape:
                require_outputs(model.name, model_outputs, len(examples.targets), dataset.n_outputs)
            outputs[i] = model_outputs
        except (ModelError, StudyError) as error:
            problems.append(Problem(("models", i), str(error)))
    return outputs, problems


def _ensembles(study: Study, dataset: Dataset, outputs: Mapping[int, Tensor]) -> list[Problem]:
    if study.ensembles is None:
        return []
    targets = dataset.train.targets
    if targets.is_floating_point() or targets.ndim != 1 or int(targets.min()) < 0:
        kind = "floats" if targets.is_floating_point() else "no classes 0..C-1 of shape [N]"
        text = f"found targets that are {kind}; allowed: classes, whose probabilities an ensemble averages"
        return [Problem(("ensembles",), text)]
    problems = []
    for i, model_outputs in outputs.items():
        try:
            require_outputs(study.models[i].name, model_outputs, len(model_outputs), dataset.n_outputs)
        except ModelError as error:
            text = f"{error}: an ensemble averages the probabilities of classes"
            problems.append(Problem(("ensembles",), text))
    return problems
