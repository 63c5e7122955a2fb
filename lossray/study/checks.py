"""What of a study can be checked only against its data, before anything is written."""

import torch

from lossray.errors import LossrayError, ModelError, StudyError
from lossray.networks.losses import get_loss
from lossray.networks.models import check_model
from lossray.plugins import failure
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
    problems = [*_sizes(study, dataset), *_loss(study, dataset), *_models(study, dataset)]
    if problems:
        raise StudyError("\n".join(problem.line(origin) for problem in problems))


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
