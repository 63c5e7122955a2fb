"""The ensemble methods by name: the variants of the paper's claim C, and the controls (theory 5C).

Each is a function of a bench, which holds the base runs and the budget. Its ensembles have one member for
each cycle that the budget holds, and the base, where it does not say otherwise. A new method is one function
and one entry of METHODS; nothing here loads torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from lossray.ensembles.budget import Budget
from lossray.references import resolve

if TYPE_CHECKING:
    from lossray.ensembles.bench import Bench
    from lossray.ensembles.recipes import EnsembleMembers, Options

Recipe = Callable[["Bench", "Options"], "EnsembleMembers"]


@dataclass(frozen=True)
class Method:
    """One entry of METHODS.

    Attributes:
        recipe: "module:function" that makes the members, imported when it is first needed.
        steps: of training beyond the base runs, by the budget.
        needs: "rescaling", a ReLU network whose units can be rescaled; "rates", also an optimizer with
            learning rates that equal a rescaling; "alignment", units that can be permuted or rescaled.
    """

    recipe: str
    steps: Callable[[Budget], int]
    needs: Literal["rescaling", "rates", "alignment"] | None = None

    @property
    def build(self) -> Recipe:
        """The function that makes the members."""
        return cast(Recipe, resolve(self.recipe))


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
    "rescaled_copies": Method("lossray.ensembles.variants:rescaled_copies", _none, "rescaling"),
    "rescale_retrain": Method("lossray.ensembles.variants:rescale_retrain", _extra, "rescaling"),
    "points_geometric": Method("lossray.ensembles.variants:points_geometric", _none, "rescaling"),
    "points_line": Method("lossray.ensembles.variants:points_line", _none, "rescaling"),
    "rescale_curve": Method("lossray.ensembles.variants:rescale_curve", _extra, "rescaling"),
    "rescale_retrain_curve": Method("lossray.ensembles.variants:rescale_retrain_curve", _extra, "rescaling"),
    "align_curve": Method("lossray.ensembles.variants:align_curve", _extra, "alignment"),
    # what else the budget would buy
    "snapshot": Method("lossray.ensembles.controls:snapshot", _extra),
    "lr_equivalent": Method("lossray.ensembles.controls:lr_equivalent", _extra, "rates"),
    "perturbed": Method("lossray.ensembles.controls:perturbed", _extra, "rescaling"),
    "curve": Method("lossray.ensembles.controls:curve", _extra),
    "curve_lr_equivalent": Method("lossray.ensembles.controls:curve_lr_equivalent", _extra, "rates"),
    "curve_seeds": Method("lossray.ensembles.controls:curve_seeds", _extra),
    "fge": Method("lossray.ensembles.controls:fge", _extra),
    "long_run": Method("lossray.ensembles.controls:long_run", _all),
    "swa": Method("lossray.ensembles.controls:swa", _extra),
    "swag": Method("lossray.ensembles.controls:swag", _extra),
    "simplex": Method("lossray.ensembles.controls:simplex", _extra),
    "independent": Method("lossray.ensembles.controls:independent", _all),
    "deep_ensemble": Method("lossray.ensembles.controls:deep_ensemble", _full),
    "deep_ensemble_equal_total": Method("lossray.ensembles.controls:deep_ensemble_equal_total", _all),
}
