"""Curvature along directions, within and across the layers of a model: `lossray.directional_curvature`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lossray.geometry.directions import ShareRow, curvature_within_layers, measure, share_rows
from lossray.measures.model_point import point_of
from lossray.measures.user_vectors import Vector
from lossray.spectra.operator import SingleOperator
from lossray.spectra.summary import Summarised

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class DirectionalCurvature(Summarised):
    """The curvature u'Hu / u'u along directions, layer by layer; prints as one line for each direction.

    Attributes:
        norms: |u| by direction.
        curvature: u'Hu / u'u by direction.
        within: of that, the sum of u_l'H u_l / u'u over the layers.
        across: the rest, which couplings between layers bring.
        shares: one row for each direction and layer; see `ShareRow`.
    """

    norms: Mapping[str, float]
    curvature: Mapping[str, float]
    within: Mapping[str, float]
    across: Mapping[str, float]
    shares: tuple[ShareRow, ...]

    def summary(self) -> str:
        """Each direction's curvature, and how much of it lies within layers and across."""
        lines = [f"{'direction':<22} {'norm':>11} {'curvature':>11} {'within':>11} {'across layers':>14}"]
        for name, value in self.curvature.items():
            columns = f"{self.norms[name]:11.4g} {value:11.4g} {self.within[name]:11.4g}"
            lines.append(f"{name:<22} {columns} {self.across[name]:14.4g}")
        return "\n".join(lines)

    def to_frame(self) -> "pd.DataFrame":
        """One row per direction and layer, with columns of the table `shares`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.shares]).drop(columns="member")


def directional_curvature(
    matrix: SingleOperator, directions: Mapping[str, Vector] | None = None
) -> DirectionalCurvature:
    """The curvature along directions, and how much of it lies within each layer.

    A layer is the module that owns the parameters. It takes one product for each direction, and one for each
    of its layers.

    Args:
        matrix: ``lossray.Hessian(model, loss, data)``, or another matrix of a model.
        directions: vectors by name, in the forms that `lossray.angles` takes. None: the gradient.

    Raises:
        StudyError: an impossible argument, a matrix that knows no model, or a model that has moved since.

    Example:
        Two layers a and b of one weight each, f(x) = b a x at a = b = 1 with the residual 1: H is [[2, 4],
        [4, 2]], and half of what the two meet together is their coupling.

        >>> import lossray, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> _ = [torch.nn.init.ones_(parameter) for parameter in model.parameters()]
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> found = lossray.directional_curvature(H, {"both": torch.ones(2), "one": torch.tensor([1.0, 0.0])})
        >>> print(found)
        direction                     norm   curvature      within  across layers
        both                         1.414           6           2              4
        one                              1           2           2              0
    """
    point = point_of(matrix, "directional_curvature")
    measured = measure(point.vectors(directions, "directional_curvature"), point.operator)
    within = curvature_within_layers(measured, point.operator, point.layout)
    curvature = {name: float((one.units * one.products).sum()) for name, one in measured.items()}
    inside = {name: float(values.sum()) for name, values in within.items()}
    return DirectionalCurvature(
        norms={name: float(one.norms) for name, one in measured.items()},
        curvature=curvature,
        within=inside,
        across={name: value - inside[name] for name, value in curvature.items()},
        shares=tuple(share_rows(measured, point.layout, within)),
    )
