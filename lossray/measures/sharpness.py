"""How sharp the loss of one model is, beside what its optimizer can bear: `lossray.sharpness`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossray.errors import StudyError
from lossray.geometry.gauges import preconditioned
from lossray.geometry.step_sharpness import batch_sharpness, critical_sharpness
from lossray.measures.model_point import ModelPoint, point_of
from lossray.measures.user_optimizer import UserOptimizer, read_user_optimizer
from lossray.measures.user_vectors import Vector
from lossray.operators.packed import PackedHessian
from lossray.operators.transforms import PackedScaled, PointOperator
from lossray.operators.user_data import read_data
from lossray.spectra.certified_pairs import EigenPairs
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import Wanted
from lossray.spectra.estimates import Estimate
from lossray.spectra.operator import SingleOperator
from lossray.spectra.summary import Summarised, estimate_text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Sharpness(Summarised):
    """The sharpness of one model; prints as a few lines. What is not known is None.

    Attributes:
        lr: learning rate of the next step; the largest of the parameter groups'.
        lambda_max: largest eigenvalue of the Hessian.
        lambda_max_residual: |Hv - lambda v|: an eigenvalue lies within it.
        lambda_max_lr: lambda_max times lr.
        preconditioned_lambda_max: largest eigenvalue of P^-1/2 H P^-1/2, P the optimizer's preconditioner.
        preconditioned_lambda_max_residual: its residual.
        preconditioned_lr: preconditioned_lambda_max times lr.
        batch_sharpness: E[g_B'H_B g_B] / E|g_B|^2 over minibatches B.
        batch_sharpness_stderr: its standard error; 0 for one batch of all examples.
        batches: minibatches in that mean.
        critical_sharpness: 2 / lr_c, lr_c the smallest learning rate at which the update, so scaled, raises
            the loss; 0 where none up to a million times the rate does, NaN where all do or the loss falls by
            less than its rounding.
        threshold: of lr times sharpness, above which the optimizer is unstable on a quadratic (theory 2.10),
            to be compared with preconditioned_lr.
        notes: what is not known of the optimizer, and why, one line each.
    """

    lr: float | None
    lambda_max: float
    lambda_max_residual: float
    lambda_max_lr: float | None = None
    preconditioned_lambda_max: float | None = None
    preconditioned_lambda_max_residual: float | None = None
    preconditioned_lr: float | None = None
    batch_sharpness: float | None = None
    batch_sharpness_stderr: float | None = None
    batches: int | None = None
    critical_sharpness: float | None = None
    threshold: float | None = None
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for each measure that is known, with its product with the learning rate."""
        lines = [
            f"largest eigenvalue   {self.lambda_max:.6g}, residual {self.lambda_max_residual:.2g}"
            f"{_times_lr(self.lambda_max_lr)}"
        ]
        if self.preconditioned_lambda_max is not None:
            lines.append(
                f"preconditioned       {self.preconditioned_lambda_max:.6g}, residual "
                f"{self.preconditioned_lambda_max_residual:.2g}{_times_lr(self.preconditioned_lr)}"
            )
        if self.threshold is not None:
            lines.append(f"threshold            {self.threshold:.5g}, of the preconditioned one times lr")
        if self.batch_sharpness is not None and self.batch_sharpness_stderr is not None:
            estimate = Estimate(self.batch_sharpness, self.batch_sharpness_stderr, 0)
            lines.append(f"batch sharpness      {estimate_text(estimate)}, over {self.batches} batches")
        if self.critical_sharpness is not None:
            lines.append(f"critical sharpness   {self.critical_sharpness:.5g}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_frame(self) -> "pd.DataFrame":
        """One row, with the columns of the table `sharpness`."""
        import pandas as pd

        return pd.DataFrame([{f.name: getattr(self, f.name) for f in fields(self) if f.name != "notes"}])


def sharpness(
    matrix: SingleOperator,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    minibatches: Iterable[Any] | None = None,
    update: Vector | None = None,
    lr: float | None = None,
    tol: float = 1e-3,
    seed: int = 0,
) -> Sharpness:
    """The largest eigenvalue, as it is and as the optimizer meets it, beside the optimizer's threshold.

    Args:
        matrix: ``lossray.Hessian(model, loss, data)``.
        optimizer: of the model, left as it is: it gives learning rate, preconditioner, threshold, and the
            update at the gradient of the Hessian's own loss.
        minibatches: batches as for `lossray.Hessian`, for the batch sharpness: a list of them, or a
            DataLoader, which is read once.
        update: the optimizer's next, for the critical sharpness, in a form that `lossray.angles` takes; in
            place of the optimizer's.
        lr: learning rate of the next step, where there is no optimizer, and of ``update``.
        tol: largest residual of a converged pair, as a share of |lambda|max.
        seed: of the random start vectors.

    Raises:
        StudyError: an impossible argument, a matrix that is no Hessian, or a model that has moved since.
        ModelError: a loss or minibatches that cannot be differentiated twice.

    Example:
        Descent on half a squared error whose Hessian is diag(9, 4, 1), and close to what it can bear.

        >>> import lossray, torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> loss = lambda outputs, targets: 1.5 * (outputs - targets).square().mean()
        >>> data = (torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1))
        >>> H = lossray.Hessian(model, loss, data)
        >>> result = lossray.sharpness(H, torch.optim.SGD(model.parameters(), lr=0.2))
        >>> round(result.lambda_max_lr, 4), result.threshold
        (1.8, 2.0)
        >>> result = lossray.sharpness(H, torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9))
        >>> result.threshold
        3.8
    """
    point = point_of(matrix, "sharpness")
    if not isinstance(point.operator, PackedHessian):
        raise StudyError(f"sharpness: found {type(matrix).__name__}; needed: lossray.Hessian")
    reader = None if optimizer is None else read_user_optimizer(optimizer, point)
    rate = _rate(reader, lr)
    pairs = _largest(point.operator, tol, seed)
    measured = Sharpness(
        rate,
        float(pairs.values[0]),
        float(pairs.residuals[0]),
        lambda_max_lr=None if reader and not reader.has_one_rate else _product(rate, float(pairs.values[0])),
        threshold=None if reader is None else reader.state.threshold,
        notes=() if reader is None else reader.notes,
    )
    if reader is not None:
        measured = _with_preconditioner(measured, point, reader, pairs, tol, seed)
    if minibatches is not None:
        measured = _with_batches(measured, point, minibatches)
    return _with_critical(measured, point, reader, update)


def _rate(reader: UserOptimizer | None, lr: float | None) -> float | None:
    if lr is None:
        return None if reader is None else reader.lr
    if not 0 < lr < math.inf:
        raise StudyError(f"sharpness, lr: found {lr}; allowed: above 0")
    if reader is not None:
        raise StudyError("sharpness: found both optimizer and lr; the rate is the optimizer's")
    return lr


def _with_preconditioner(
    measured: Sharpness, point: ModelPoint, reader: UserOptimizer, pairs: EigenPairs, tol: float, seed: int
) -> Sharpness:
    """With the largest eigenvalue in the optimizer's metric; that of the Hessian where there P = 1."""
    scale = reader.state.scale()
    if scale is None:
        note = "no preconditioner: the optimizer has none, or has taken no step"
        noted = any("preconditioner" in other for other in measured.notes)
        return measured if noted else replace(measured, notes=(*measured.notes, note))
    gauge = preconditioned(scale)
    if not gauge.identity:
        pairs = _largest(PackedScaled(point.operator, gauge.scale), tol, seed)
    value = float(pairs.values[0])
    return replace(
        measured,
        preconditioned_lambda_max=value,
        preconditioned_lambda_max_residual=float(pairs.residuals[0]),
        preconditioned_lr=_product(measured.lr, value),
    )


def _with_batches(measured: Sharpness, point: ModelPoint, minibatches: Iterable[Any]) -> Sharpness:
    closure = point.objective.closure is not None
    batches = [point.objective.over([batch]) for batch in read_data(minibatches, closure=closure)]
    if not batches:
        raise StudyError("sharpness, minibatches: found none; allowed: one or more batches")
    everything = sum(size or 0 for size in point.objective.sizes)
    full = len(batches) == 1 and sum(size or 0 for size in batches[0].sizes) == everything
    estimate = batch_sharpness(batches, mode="auto", full=full).member(0)
    return replace(
        measured,
        batch_sharpness=estimate.value,
        batch_sharpness_stderr=estimate.stderr,
        batches=len(batches),
    )


def _with_critical(
    measured: Sharpness, point: ModelPoint, reader: UserOptimizer | None, update: Vector | None
) -> Sharpness:
    if update is None and reader is None:
        return measured
    step: Tensor | str
    if update is not None:
        step = point.vector(update, "update")
    elif reader is not None:
        step = reader.virtual_update(point.operator.gradient)
    if isinstance(step, str):
        return replace(measured, notes=(*measured.notes, step))
    if not measured.lr:
        if reader is None:
            raise StudyError("sharpness: found update without lr; pass the learning rate that it belongs to")
        return measured  # at a rate of 0 nothing moves
    return replace(
        measured, critical_sharpness=float(critical_sharpness(point.objective, step, measured.lr)[0])
    )


def _largest(operator: PointOperator, tol: float, seed: int) -> EigenPairs:
    (pairs,) = packed_eigenpairs(operator, [Wanted("largest", 1)], seeds=[seed], tolerance=tol)
    return pairs.member(0, "largest")


def _product(lr: float | None, value: float) -> float | None:
    return None if lr is None else lr * value


def _times_lr(product: float | None) -> str:
    return "" if product is None else f"; times lr {product:.5g}"
