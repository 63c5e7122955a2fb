"""How high the loss rises on a path between two models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Barrier:
    """What one path's losses and accuracies say; NaN where they are NaN.

    Attributes:
        barrier: max_t of L(t) - ((1 - t) L(0) + t L(1)), L the training loss (Entezari et al., 2110.06296);
            at least 0, since the ends count.
        barrier_test: the same of the test loss.
        barrier_frankle: largest test error minus the mean of the ends' (Frankle et al., 1912.05671).
        barrier_frankle_train: the same of the training error.
        max_loss: largest training loss on the path.
        max_loss_t: where.
        mean_loss: training loss averaged over the path's length, by the trapezoidal rule.
    """

    barrier: float
    barrier_test: float
    barrier_frankle: float
    barrier_frankle_train: float
    max_loss: float
    max_loss_t: float
    mean_loss: float


def barriers(ts: Sequence[float], lengths: Tensor, evaluation: Mapping[str, Tensor]) -> Barrier:
    """The barrier of one path, from its values at T places.

    Args:
        ts: increasing from 0 to 1.
        lengths: [T] arc lengths from t = 0.
        evaluation: `train_loss`, `test_loss`, `train_accuracy` and `test_accuracy` at these places, [T] each.

    Raises:
        ValueError: the places do not increase from 0 to 1.
    """
    times = torch.tensor(ts, dtype=torch.float64, device="cpu")
    if len(ts) < 2 or ts[0] != 0 or ts[-1] != 1 or not bool((times.diff() > 0).all()):
        raise ValueError(f"ts: found {list(ts)}; allowed: numbers that increase from 0 to 1")
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    train, test, train_accuracy, test_accuracy = (evaluation[name].double().cpu() for name in names)
    return Barrier(
        barrier=above_chord(times, train),
        barrier_test=above_chord(times, test),
        barrier_frankle=_above_mean(1 - test_accuracy),
        barrier_frankle_train=_above_mean(1 - train_accuracy),
        max_loss=float(train.max()),
        max_loss_t=float(times[train.argmax()]) if bool(train.isfinite().all()) else torch.nan,
        mean_loss=_mean(times, lengths.double().cpu(), train),
    )


def above_chord(ts: Tensor, values: Tensor) -> float:
    """The largest height [T] above the straight line between the first and the last value."""
    return float((values - ((1 - ts) * values[0] + ts * values[-1])).max())


def _above_mean(errors: Tensor) -> float:
    return float(errors.max() - (errors[0] + errors[-1]) / 2)


def _mean(ts: Tensor, lengths: Tensor, values: Tensor) -> float:
    """The mean of values [T] over the length; over t where the path has none."""
    along = lengths if float(lengths[-1]) > 0 else ts
    return float(torch.trapezoid(values, along) / along[-1])
