"""The spectra that [curvature] asks for at one checkpoint: operators, blocks, and their table rows."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lossray.measures.cells import Row, finite
from lossray.measures.pack_point import PackPoint
from lossray.networks.parameter_layers import layers
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedFisher, PackedGaussNewton, PackedHessian
from lossray.operators.transforms import PackedPreconditioned, PackedRestricted, PointOperator
from lossray.spectra.analysis import PackedAnalysis
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.spectra.estimates import PackedEstimate
from lossray.study import Study
from lossray.study.demands import operators_asked
from lossray.training.datasets import analysis_fingerprint

HESSIAN = ("hessian", "all")  # operator and block that angles and directions rest on
ESTIMATES = ("trace", "negative_mass", "participation", "effective_dimension")


@dataclass(frozen=True)
class Named:
    """An operator of a pack, restricted to a block.

    Attributes:
        name: "hessian", "ggn", "fisher" or "preconditioned".
        block: "all", or a layer.
        operator: of R members.
    """

    name: str
    block: str
    operator: PointOperator

    @property
    def key(self) -> tuple[str, str]:
        """Operator and block."""
        return self.name, self.block


def operators_of(
    study: Study, objective: PackedObjective, *, mode: str, scale: Tensor | None
) -> Iterator[Named]:
    """What the study asks for, one after the other: a graph is kept no longer than it is needed.

    Args:
        study: the settings.
        objective: the losses of a pack's members.
        mode: how products are formed.
        scale: the diagonal [R, d] of the optimizer's preconditioner; None where it does not exist, and then
            there is no preconditioned operator.
    """
    for name, with_layers in operators_asked(study).items():
        operator = _operator(name, objective, mode, scale)
        if operator is None:
            continue
        yield Named(name, "all", operator)
        for layer, parameters in layers(operator.layout).items() if with_layers else ():
            yield Named(name, layer, PackedRestricted(operator, parameters))


def _operator(name: str, objective: PackedObjective, mode: str, scale: Tensor | None) -> PointOperator | None:
    if name == "ggn":
        return PackedGaussNewton(objective, mode=mode)
    if name == "fisher":
        return PackedFisher(objective, mode=mode)
    if name == "hessian":
        return PackedHessian(objective, mode=mode)
    alive = ~objective.dead[:, None]
    if scale is None or not bool(((scale > 0) | ~alive).all()):  # false for what is not a number
        return None
    return PackedPreconditioned(PackedHessian(objective, mode=mode), scale)


def spectrum_rows(point: PackPoint, named: Named, analysis: PackedAnalysis) -> dict[str, list[Row]]:
    """Rows of `eigenvalues`, `density` and `curvature` of one operator."""
    settings = point.study.curvature
    keys: list[Row] = [
        {"run_id": run_id, "step": point.step, "operator": named.name, "block": named.block}
        for run_id in point.pack.run_ids
    ]
    shared: Row = {
        "n_examples": len(point.examples.targets),
        "data_fingerprint": analysis_fingerprint(point.dataset, settings.examples),
        "dtype": settings.dtype,
    }
    return {
        "eigenvalues": eigenvalue_rows(keys, analysis),
        "density": density_rows(keys, analysis),
        "curvature": curvature_rows(keys, analysis, named.operator, shared),
    }


def eigenvalue_rows(keys: list[Row], analysis: PackedAnalysis) -> list[Row]:
    """Rows of `eigenvalues`; ``keys`` are the key columns of every member."""
    return [
        *_end_rows(keys, analysis, analysis.pairs, "largest"),
        *_end_rows(keys, analysis, analysis.smallest, "smallest"),
    ]


def _end_rows(keys: list[Row], analysis: PackedAnalysis, pairs: PackedEigenPairs, end: str) -> list[Row]:
    columns = {
        "eigenvalue": pairs.values,
        "residual": pairs.residuals,
        "gap": pairs.gaps,
        "ipr": pairs.vectors.pow(4).sum(dim=2),
    }
    numbers = {name: column.tolist() for name, column in columns.items()}
    converged, alive = pairs.converged.tolist(), analysis.alive.tolist()
    errors = analysis.product_error.tolist()
    return [
        {
            **key,
            "end": end,
            "index": i,
            **{name: finite(column[r][i]) for name, column in numbers.items()},
            "product_error": finite(errors[r]),
            "converged": converged[r][i] if alive[r] else None,
        }
        for r, key in enumerate(keys)
        for i in range(len(pairs))
    ]


def density_rows(keys: list[Row], analysis: PackedAnalysis) -> list[Row]:
    """Rows of `density`; none for a dead member."""
    rows = []
    nodes, weights = analysis.density.nodes.tolist(), analysis.density.weights.tolist()
    for r, key in enumerate(keys):
        for probe, measure in enumerate(zip(nodes[r], weights[r], strict=True)):
            pairs = [(node, weight) for node, weight in zip(*measure, strict=True) if weight > 0]
            rows += [
                {**key, "probe": probe, "index": i, "node": node, "weight": weight}
                for i, (node, weight) in enumerate(sorted(pairs))
            ]
    return rows


def curvature_rows(
    keys: list[Row], analysis: PackedAnalysis, operator: PointOperator, shared: Row
) -> list[Row]:
    """Rows of `curvature`; ``shared`` are columns that all of them have in common."""
    return [
        {
            **key,
            "lambda_max": finite(float(analysis.pairs.values[r, 0])),
            "lambda_min": finite(float(analysis.smallest.values[r, 0])),
            "confirmed": bool(analysis.pairs.confirmed[r]) if alive else None,
            **_estimates(analysis, r),
            "effective_dimension_regulariser": finite(float(analysis.regulariser[r])),
            "matvecs": int(analysis.matvecs[r]) if alive else None,
            "orthogonality_loss": finite(float(analysis.pairs.orthogonality_loss[r])),
            "derivative_error": finite(float(analysis.derivative_error[r])),
            "dim": operator.shape[1],
            "loss": finite(float(analysis.losses[r])),
            "gradient_norm": finite(float(analysis.gradient_norm[r])),
            "reg_included": False,
            "product_mode": operator.mode,
            **shared,
        }
        for r, (key, alive) in enumerate(zip(keys, analysis.alive.tolist(), strict=True))
    ]


def _estimates(analysis: PackedAnalysis, r: int) -> Row:
    """Each estimate of member r with its standard error and bound."""
    estimates: dict[str, PackedEstimate] = {name: getattr(analysis, name) for name in ESTIMATES}
    estimates["frobenius_norm"] = analysis.frobenius
    values = {name: finite(float(estimate.value[r])) for name, estimate in estimates.items()}
    errors = {f"{name}_stderr": finite(float(estimate.stderr[r])) for name, estimate in estimates.items()}
    bounds = {f"{name}_bound": finite(float(e.bound[r])) for name, e in estimates.items() if name != "trace"}
    return values | errors | bounds
