"""What of a study can be checked only against its data, before anything is written."""

from collections.abc import Sequence

import torch
from torch import nn

from lossray.errors import LossrayError, ModelError, StudyError
from lossray.networks.layout import tensors_of
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model, check_model
from lossray.plugins import failure
from lossray.storage.recordings import Recording
from lossray.study.problems import Problem
from lossray.study.settings import Study
from lossray.training.datasets import Dataset


def check_against_data(study: Study, dataset: Dataset, origin: str = "") -> None:
    """Refuse sizes, losses and models that do not fit the data. Builds each model once.

    Args:
        study: from `load_study`.
        dataset: the study's data, in its training dtype.
        origin: put before each line of an error, such as the study file.

    Raises:
        StudyError: one line for each problem.
    """
    problems = [
        *_sizes(study, dataset),
        *_loss(study, dataset),
        *_models(study, dataset),
        *_ensembles(study, dataset),
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
            found, allowed = (
                f"{own[name][1]} {own[name][0]}" if name in own else "none" for own in (built, recorded)
            )
            return f"{name}: found {found}, recorded {allowed}"
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


def _loss(study: Study, dataset: Dataset) -> list[Problem]:
    place, name = ("training", "loss"), study.training.loss
    targets = dataset.train.targets[:2]
    if name == "cross_entropy" and targets.is_floating_point():
        text = "found 'cross_entropy', but the targets of the data are floats; allowed: 'mse' or a function"
        return [Problem(place, text)]
    size = len(targets) * dataset.n_outputs
    outputs = torch.linspace(-1, 1, size, dtype=getattr(torch, study.training.dtype)).view(
        -1, dataset.n_outputs
    )
    try:
        loss = get_loss(name)
        once, twice = loss(outputs, targets), loss(torch.cat([outputs] * 2), torch.cat([targets] * 2))
    except LossrayError as error:
        return [Problem(place, str(error))]
    except Exception as error:  # a user's loss may raise anything
        text = (
            f"{name!r} on outputs {list(outputs.shape)} and targets {list(targets.shape)}: {failure(error)}"
        )
        return [Problem(place, text)]
    if not torch.allclose(once, twice, rtol=1e-3, equal_nan=True):
        text = (
            f"{name!r} gives {float(once):.4g} for two examples and {float(twice):.4g} for the same examples "
            "twice; allowed: the mean over examples"
        )
        return [Problem(place, text)]
    return []


def _models(study: Study, dataset: Dataset) -> list[Problem]:
    problems = []
    for i, model in enumerate(study.models):
        try:
            check_model(model, dataset.train.inputs[:2], dataset.n_outputs)
        except (ModelError, StudyError) as error:
            problems.append(Problem(("models", i), str(error)))
    return problems


def _ensembles(study: Study, dataset: Dataset) -> list[Problem]:
    if study.ensembles is not None and dataset.train.targets.is_floating_point():
        text = "found targets that are floats; allowed: classes, whose probabilities an ensemble averages"
        return [Problem(("ensembles",), text)]
    return []
