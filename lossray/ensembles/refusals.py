"""Why an ensemble method cannot be applied to some runs: symmetries that their model lacks, rates, inputs."""

from typing import Any

import torch
from torch import nn

from lossray.ensembles.bench import BaseRuns
from lossray.ensembles.methods import Method
from lossray.ensembles.rescaling import equivalent_rates
from lossray.errors import ModelError
from lossray.networks.layout import uncompiled
from lossray.networks.nests import SEVERAL_INPUTS, is_tensor
from lossray.networks.permutations import permutation_symmetry
from lossray.networks.symmetry import rescaling_symmetry


def refusal(method: Method, base_runs: BaseRuns) -> str | None:
    """Why a method cannot be applied to these runs; None where it can."""
    model, optimizer = base_runs.stack.template, base_runs.optimizer
    if method.needs is not None and not is_tensor(base_runs.dataset.train.inputs):
        return SEVERAL_INPUTS
    data = (base_runs.dataset.train.inputs, None)
    if method.needs is not None:
        try:
            rescaling_symmetry(model, base_runs.stack.layout, data)
        except ModelError as error:
            if method.needs != "alignment" or not _can_be_permuted(model, data):
                return str(error)
    if method.needs == "rates" and equivalent_rates(optimizer, torch.ones(1)) is None:
        return f"optimizer {optimizer.name!r}: no learning rates are equal to a rescaling"
    return None


def _can_be_permuted(model: nn.Module, data: Any) -> bool:
    try:
        permutation_symmetry(uncompiled(model), data)
    except ModelError:
        return False
    return True
