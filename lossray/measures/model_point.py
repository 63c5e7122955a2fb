"""One model at the parameters where its curvature matrix was made: where a notebook's measures start."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lossray.errors import StudyError
from lossray.measures.user_vectors import Vector, flat_vector
from lossray.networks.layout import Layout
from lossray.operators.modules import ModuleObjective
from lossray.operators.packed import ObjectiveOperator
from lossray.spectra.operator import SingleOperator


@dataclass(frozen=True)
class ModelPoint:
    """A model and its curvature at one point.

    Attributes:
        operator: the curvature, as a pack of one member.
        objective: the mean loss that it is of.
    """

    operator: ObjectiveOperator
    objective: ModuleObjective

    @property
    def model(self) -> nn.Module:
        """The user's module."""
        return self.objective.model

    @property
    def layout(self) -> Layout:
        """How d divides into the trainable parameters."""
        return self.objective.layout

    @property
    def theta(self) -> Tensor:
        """The parameters [1, d], float64."""
        return self.objective.theta.detach().double()

    def vector(self, given: Vector, name: str) -> Tensor:
        """A vector of the user's as [1, d], float64; see `flat_vector`."""
        return flat_vector(given, self.model, self.layout, name=name)[None]

    def vectors(self, given: Mapping[str, Vector] | None, caller: str) -> dict[str, Tensor]:
        """Directions of the user's as [1, d] by name; for None the gradient.

        Raises:
            StudyError: no mapping, or a vector of another form, shape or name.
        """
        if given is None:
            return {"gradient": self.operator.gradient}
        if not isinstance(given, Mapping):
            raise StudyError(
                f"{caller}, directions: found {type(given).__name__}; allowed: a dict of vectors by name, "
                'such as {"update": u}'
            )
        return {name: self.vector(vector, f"direction {name!r}") for name, vector in given.items()}


def point_of(matrix: SingleOperator, caller: str) -> ModelPoint:
    """Where a curvature matrix was made.

    Args:
        matrix: what `lossray.Hessian`, `GaussNewton` or `EmpiricalFisher` gives.
        caller: the function that asks, for messages.

    Raises:
        StudyError: it is made of another matrix, or the model has moved since.
    """
    operator = getattr(matrix, "packed", None)
    if not isinstance(operator, ObjectiveOperator) or not isinstance(operator.objective, ModuleObjective):
        raise StudyError(
            f"{caller}: found {type(matrix).__name__}; needed: lossray.Hessian(model, loss, data), "
            "GaussNewton or EmpiricalFisher itself, which know the model"
        )
    objective = operator.objective
    now = torch.cat([p.detach().reshape(-1).to(objective.dtype) for p in objective.live_parameters()])
    if not torch.equal(now, objective.theta.detach()[0]):
        raise StudyError(
            f"{caller}: the weights of {objective.names['model']} have changed since the matrix was made; "
            "make it anew"
        )
    return ModelPoint(operator, objective)
