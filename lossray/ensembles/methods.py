"""The ensemble methods by name: the variants of the paper's claim C, and the controls (SCIENCE 5C).

Each is a function of a bench, which holds the base runs and the budget. Its ensembles have one member for
each cycle that the budget holds, and the base, where it does not say otherwise. A new method is one function
and one entry of METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lossray.ensembles import controls, variants
from lossray.ensembles.bench import Bench, Problem
from lossray.ensembles.budget import Budget
from lossray.ensembles.recipes import Members, Options
from lossray.ensembles.rescaling import equivalent_rates
from lossray.errors import ModelError
from lossray.networks.layout import uncompiled
from lossray.networks.permutations import permutation_symmetry
from lossray.networks.symmetry import rescaling_symmetry


@dataclass(frozen=True)
class Method:
    """One entry of METHODS.

    Attributes:
        build: makes the members.
        role: a variant of the paper's method, or a control.
        words: what it does.
        steps: of training beyond the base runs, by the budget.
        needs: "rescaling", a ReLU network whose units can be rescaled; "rates", also an optimizer with
            learning rates that equal a rescaling; "alignment", units that can be permuted or rescaled.
    """

    build: Callable[[Bench, Options], Members]
    role: Literal["variant", "control"]
    words: str
    steps: Callable[[Budget], int] = lambda budget: budget.extra_steps
    needs: Literal["rescaling", "rates", "alignment"] | None = None

    def refusal(self, problem: Problem) -> str | None:
        """Why the method cannot be applied to these runs; None where it can."""
        model, optimizer = problem.stack.template, problem.optimizer
        if self.needs is not None:
            try:
                rescaling_symmetry(model, problem.stack.layout)
            except ModelError as error:
                if self.needs != "alignment" or not _can_be_permuted(model):
                    return str(error)
        if self.needs == "rates" and equivalent_rates(optimizer, torch.ones(1)) is None:
            return f"optimizer {optimizer.name!r}: no learning rates are equal to a rescaling"
        return None


def _can_be_permuted(model: nn.Module) -> bool:
    try:
        permutation_symmetry(uncompiled(model))
    except ModelError:
        return False
    return True


def _none(budget: Budget) -> int:
    return 0


def _all(budget: Budget) -> int:
    return budget.total_steps


def _full(budget: Budget) -> int:
    return budget.size * budget.run_steps


METHODS: dict[str, Method] = {
    "rescaled_copies": Method(
        variants.rescaled_copies, "variant", "C0: rescaled copies of the base", _none, needs="rescaling"
    ),
    "rescale_retrain": Method(
        variants.rescale_retrain, "variant", "C1: rescale and retrain, again and again", needs="rescaling"
    ),
    "points_geometric": Method(
        variants.points_geometric, "variant", "C2: points on D^t theta", _none, needs="rescaling"
    ),
    "points_line": Method(
        variants.points_line,
        "variant",
        "C2: points on the line from theta to D theta",
        _none,
        needs="rescaling",
    ),
    "rescale_curve": Method(
        variants.rescale_curve,
        "variant",
        "C3: a trained curve from theta to polished D theta",
        needs="rescaling",
    ),
    "rescale_retrain_curve": Method(
        variants.rescale_retrain_curve, "variant", "C4: C1, and curves between neighbours", needs="rescaling"
    ),
    "align_curve": Method(
        variants.align_curve, "variant", "C5: a trained curve to another run, aligned", needs="alignment"
    ),
    "snapshot": Method(controls.snapshot, "control", "C1's schedule without rescaling"),
    "lr_equivalent": Method(
        controls.lr_equivalent, "control", "C1's schedule with learning rates eta D^-2", needs="rates"
    ),
    "perturbed": Method(
        controls.perturbed,
        "control",
        "C1's schedule after random displacements of the same length",
        needs="rescaling",
    ),
    "curve": Method(controls.curve, "control", "C3 without rescaling"),
    "curve_lr_equivalent": Method(
        controls.curve_lr_equivalent, "control", "C3 with learning rates eta D^-2", needs="rates"
    ),
    "curve_seeds": Method(controls.curve_seeds, "control", "C5 without alignment"),
    "fge": Method(controls.fge, "control", "fast geometric ensembling"),
    "long_run": Method(controls.long_run, "control", "one run with all steps", _all),
    "swa": Method(controls.swa, "control", "stochastic weight averaging"),
    "swag": Method(controls.swag, "control", "draws from SWA-Gaussian"),
    "simplex": Method(controls.simplex, "control", "draws from a low-loss simplex (ESPRO)"),
    "independent": Method(controls.independent, "control", "as many full runs as the budget holds", _all),
    "deep_ensemble": Method(
        controls.deep_ensemble, "control", "as many full runs as the others have members", _full
    ),
    "deep_ensemble_equal_total": Method(
        controls.deep_ensemble_equal_total,
        "control",
        "as many runs as the others have members, which share the budget",
        _all,
    ),
}
