"""What models and optimizers do not allow: each reason once, for all that it keeps from being computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lossray.ensembles.methods import METHODS
from lossray.ensembles.rescaling import equivalent_rates
from lossray.errors import ModelError
from lossray.geometry.direction_kinds import OF_NEXT_BATCH
from lossray.networks.layout import layout_of
from lossray.networks.models import build_model
from lossray.networks.nests import SEVERAL_INPUTS, is_tensor
from lossray.networks.permutations import permutation_symmetry
from lossray.networks.settings import ModelSettings
from lossray.networks.symmetry import rescaling_symmetry
from lossray.study.settings import Study
from lossray.training.datasets import Dataset
from lossray.training.update_rules import OPTIMIZERS, OptimizerSettings


@dataclass(frozen=True)
class _Built:
    """One model of the study, and why it lacks a symmetry; None where it has it."""

    key: str  # in the file
    name: str
    dim: int
    no_rescaling: str | None
    no_permutation: str | None
    several: str | None  # why copies in another gauge or order are left out although there are symmetries
    optimizers: tuple[OptimizerSettings, ...]


def absences(study: Study, dataset: Dataset) -> list[str]:
    """One line for each reason why some of what the study asks for is not computed; builds each model once.

    `Study.not_computed` has those that the file alone tells.

    Args:
        study: from `load_study`, checked against the data.
        dataset: its data.
    """
    models = [_built(study, i, model, dataset) for i, model in enumerate(study.models)]
    return [
        *_of_recorded_runs(study),
        *_of_windows(study),
        *_of_rescaling(study, models),
        *_of_alignment(study, models),
        *_of_optimizers(study),
        *_of_rates(study, models),
        *_of_floors(study, models),
        *_of_size(study, models),
        *_of_seeds(study),
    ]


def _built(study: Study, i: int, settings: ModelSettings, dataset: Dataset) -> _Built:
    with torch.random.fork_rng(devices=[]):
        model = build_model(settings, dataset.input_shape, dataset.n_outputs)
    layout, data = layout_of(model), (dataset.train.inputs, None)
    names = settings.optimizers
    return _Built(
        key=f"models[{i}]",
        name=settings.name,
        dim=layout.dim,
        no_rescaling=_refusal(lambda: rescaling_symmetry(model, layout, data)),
        no_permutation=_refusal(lambda: permutation_symmetry(model, data)),
        several=None if is_tensor(dataset.train.inputs) else SEVERAL_INPUTS,
        optimizers=tuple(
            optimizer for optimizer in study.optimizers if names is None or optimizer.name in names
        ),
    )


def _refusal(symmetry: Callable[[], object]) -> str | None:
    try:
        symmetry()
    except ModelError as error:
        return str(error)
    return None


# ---- recorded runs and windows


def _of_recorded_runs(study: Study) -> Iterator[str]:
    """What the file leaves to its defaults, and a recorded run does not allow."""
    if study.source is None:
        return
    asked = study.angles.model_fields_set
    missing = [name for name in study.angles.directions if name in OF_NEXT_BATCH]
    if "directions" not in asked and missing:
        yield f"{_quoted(missing)}: not computed, since the next batch of a recorded run is not known"
    if "window" not in asked and study.angles.window:
        yield "alignment: not computed, since the steps of a recorded run are not known"


def _of_windows(study: Study) -> Iterator[str]:
    if study.source is not None:
        return
    if not study.angles.directions:
        yield "angles.directions = []: no directions, angles and alignment, on which claim A rests"
    elif study.angles.window == 0:
        yield "angles.window = 0: no alignment, on which claim A rests"


# ---- models


def _of_rescaling(study: Study, models: Sequence[_Built]) -> Iterator[str]:
    gauge = ["gauge 'balanced'"] if "balanced" in study.angles.gauges and study.angles.directions else []
    lost = []
    if study.connectivity is not None and study.source is None:
        lost += ["paths to rescaled copies"] if study.connectivity.rescaled else []
        lost += ["paths aligned by 'scale'"] if "scale" in study.connectivity.align else []
    methods = _methods(study, ("rescaling", "rates"))
    lost += [f"ensembles {', '.join(methods)}"] if methods else []
    yield from _by_reason(models, [*gauge, *lost], lambda model: model.no_rescaling)
    yield from _by_reason(models, lost, lambda model: None if model.no_rescaling else model.several)


def _of_alignment(study: Study, models: Sequence[_Built]) -> Iterator[str]:
    if study.source is not None:
        return
    align = study.connectivity.align if study.connectivity is not None else ()
    permuted = ["paths aligned by 'permutation'"] if "permutation" in align else []
    yield from _by_reason(models, permuted, lambda model: model.no_permutation or model.several)
    either = ["paths aligned by 'both'"] if "both" in align else []
    either += [f"ensembles {', '.join(methods)}"] if (methods := _methods(study, ("alignment",))) else []
    yield from _by_reason(
        models, either, lambda model: (model.no_permutation if model.no_rescaling else None) or model.several
    )


def _by_reason(
    models: Sequence[_Built], lost: Sequence[str], reason: Callable[[_Built], str | None]
) -> Iterator[str]:
    """A line for each reason that some of the models give, with those models."""
    for text, keys in _grouped((reason(model), model.key) for model in models).items() if lost else ():
        yield f"{', '.join(keys)}: no {'; no '.join(lost)}: {text}"


def _of_floors(study: Study, models: Sequence[_Built]) -> Iterator[str]:
    lost = ["structural nullity"] if study.degeneracy is not None else []
    yield from _by_reason(models, lost, lambda model: model.several)


def _of_size(study: Study, models: Sequence[_Built]) -> Iterator[str]:
    most = study.degeneracy.dense_up_to if study.degeneracy is not None else None
    for model in models:
        if most is not None and model.dim > most:
            yield (
                f"{model.key}: no rank and no exact nullity: its d = {model.dim:,} is above "
                f"degeneracy.dense_up_to = {most:,}, so that the counts are a quadrature's"
            )


# ---- optimizers


def _of_optimizers(study: Study) -> Iterator[str]:
    names = list(dict.fromkeys(optimizer.name for optimizer in study.optimizers))
    plain = [name for name in names if OPTIMIZERS[name].momentum is None]
    if plain and "momentum" in study.angles.directions:
        yield f"{_listed(plain)}: no direction 'momentum': it keeps none"
    without = [name for name in names if OPTIMIZERS[name].scale is None]
    lost = ["threshold"]
    lost += ["gauge 'preconditioned'"] if "preconditioned" in study.angles.gauges else []
    operators = {operator.partition(":")[0] for operator in study.curvature.operators}
    lost += ["operator 'preconditioned'"] if "preconditioned" in operators else []
    preconditioned = "preconditioned_gradient" in study.angles.directions
    lost += ["direction 'preconditioned_gradient'"] if preconditioned else []
    if without:
        yield f"{_listed(without)}: no {', no '.join(lost)}: its step has no diagonal preconditioner"
    same = [name for name in names if OPTIMIZERS[name].scale == "identity"]
    if same and preconditioned:
        yield f"{_listed(same)}: no direction 'preconditioned_gradient': it is the gradient itself"


def _of_rates(study: Study, models: Sequence[_Built]) -> Iterator[str]:
    methods = _methods(study, ("rates",))
    one = torch.ones(1)
    trained = {
        optimizer.name: optimizer
        for model in models
        if not model.no_rescaling
        for optimizer in model.optimizers
    }
    names = [name for name, optimizer in trained.items() if equivalent_rates(optimizer, one) is None]
    if methods and names:
        yield (
            f"{_listed(names)}: no ensembles {', '.join(methods)}: no learning rates are equal to a rescaling"
        )


# ---- seeds


def _of_seeds(study: Study) -> Iterator[str]:
    if study.source is not None or len(study.seeds) > 1:
        return
    lost = ["paths between runs"] if study.connectivity is not None else []
    lost += ["separations"] if study.trajectory is not None and study.trajectory.between_seeds else []
    if lost:
        yield f"seeds: no {', no '.join(lost)}: there is one run of each setting"


# ---- words


def _methods(study: Study, needs: Sequence[str]) -> list[str]:
    if study.ensembles is None or study.source is not None:
        return []
    return [name for name in study.ensembles.methods if METHODS[name].needs in needs]


def _grouped(pairs: Iterator[tuple[str | None, str]]) -> Mapping[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        if key is not None:
            groups.setdefault(key, []).append(value)
    return groups


def _listed(names: Sequence[str]) -> str:
    return f"{'optimizer' if len(names) == 1 else 'optimizers'} {', '.join(names)}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
