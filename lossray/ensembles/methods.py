"""The ensemble methods by name: the variants of the paper's claim C, and the controls (theory 5C).

Each is a function of a bench, which holds the base runs and the budget. Its ensembles have one member for
each cycle that the budget holds, and the base, where it does not say otherwise. A new method is one function
and one entry of METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lossray.ensembles import controls, variants
from lossray.ensembles.bench import BaseRuns, Bench
from lossray.ensembles.budget import Budget
from lossray.ensembles.recipes import EnsembleMembers, Options
from lossray.ensembles.rescaling import equivalent_rates
from lossray.errors import ModelError
from lossray.networks.layout import uncompiled
from lossray.networks.nests import SEVERAL_INPUTS, is_tensor
from lossray.networks.permutations import permutation_symmetry
from lossray.networks.symmetry import rescaling_symmetry


@dataclass(frozen=True)
class Method:
    """One entry of METHODS.

    Attributes:
        build: makes the members.
        steps: of training beyond the base runs, by the budget.
        needs: "rescaling", a ReLU network whose units can be rescaled; "rates", also an optimizer with
            learning rates that equal a rescaling; "alignment", units that can be permuted or rescaled.
    """

    build: Callable[[Bench, Options], EnsembleMembers]
    steps: Callable[[Budget], int]
    needs: Literal["rescaling", "rates", "alignment"] | None = None

    def refusal(self, problem: BaseRuns) -> str | None:
        """Why the method cannot be applied to these runs; None where it can."""
        model, optimizer = problem.stack.template, problem.optimizer
        if self.needs is not None and not is_tensor(problem.dataset.train.inputs):
            return SEVERAL_INPUTS
        data = (problem.dataset.train.inputs, None)
        if self.needs is not None:
            try:
                rescaling_symmetry(model, problem.stack.layout, data)
            except ModelError as error:
                if self.needs != "alignment" or not _can_be_permuted(model, data):
                    return str(error)
        if self.needs == "rates" and equivalent_rates(optimizer, torch.ones(1)) is None:
            return f"optimizer {optimizer.name!r}: no learning rates are equal to a rescaling"
        return None


def _can_be_permuted(model: nn.Module, data: Any) -> bool:
    try:
        permutation_symmetry(uncompiled(model), data)
    except ModelError:
        return False
    return True


def _none(budget: Budget) -> int:
    return 0


def _extra(budget: Budget) -> int:
    return budget.extra_steps


def _all(budget: Budget) -> int:
    return budget.total_steps


def _full(budget: Budget) -> int:
    return budget.size * budget.run_steps


METHODS: dict[str, Method] = {
    # C0 to C5
    "rescaled_copies": Method(variants.rescaled_copies, _none, "rescaling"),
    "rescale_retrain": Method(variants.rescale_retrain, _extra, "rescaling"),
    "points_geometric": Method(variants.points_geometric, _none, "rescaling"),
    "points_line": Method(variants.points_line, _none, "rescaling"),
    "rescale_curve": Method(variants.rescale_curve, _extra, "rescaling"),
    "rescale_retrain_curve": Method(variants.rescale_retrain_curve, _extra, "rescaling"),
    "align_curve": Method(variants.align_curve, _extra, "alignment"),
    # what else the budget would buy
    "snapshot": Method(controls.snapshot, _extra),
    "lr_equivalent": Method(controls.lr_equivalent, _extra, "rates"),
    "perturbed": Method(controls.perturbed, _extra, "rescaling"),
    "curve": Method(controls.curve, _extra),
    "curve_lr_equivalent": Method(controls.curve_lr_equivalent, _extra, "rates"),
    "curve_seeds": Method(controls.curve_seeds, _extra),
    "fge": Method(controls.fge, _extra),
    "long_run": Method(controls.long_run, _all),
    "swa": Method(controls.swa, _extra),
    "swag": Method(controls.swag, _extra),
    "simplex": Method(controls.simplex, _extra),
    "independent": Method(controls.independent, _all),
    "deep_ensemble": Method(controls.deep_ensemble, _full),
    "deep_ensemble_equal_total": Method(controls.deep_ensemble_equal_total, _all),
}
