"""Where a training went: principal axes of its checkpoints, beside a random walk's: `lossray.trajectory`."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossray.errors import StudyError
from lossray.geometry.principal_axes import AXES, gram_of, principal_axes, random_walk_shares
from lossray.networks.layout import layout_of, uncompiled
from lossray.operators.user_data import described
from lossray.spectra.summary import Summarised

if TYPE_CHECKING:
    import pandas as pd

Snapshot = nn.Module | Mapping[str, Tensor] | Tensor
STATISTICS = ("running_mean", "running_var")  # of batch norm: entries of a state dict, and no parameters


@dataclass(frozen=True, repr=False)
class Trajectory(Summarised):
    """The principal axes of T checkpoints; prints as a few lines. An axis that does not exist is NaN.

    Attributes:
        steps: of the checkpoints.
        coordinates: [T, 3] of the checkpoints on the axes, float64; the first one's are not positive.
        explained: [3] shares of the variance along the axes.
        random_walk: [3] those of a random walk with the same steps (theory 2.12).
        axes: [d, 3] orthonormal, float64, in the order of ``model.parameters()``.
    """

    steps: tuple[int, ...]
    coordinates: Tensor
    explained: Tensor
    random_walk: Tensor
    axes: Tensor

    def summary(self) -> str:
        """The share of the variance along each axis, beside a random walk's."""
        lines = [
            f"{len(self.steps)} checkpoints of {len(self.axes):,} parameters, steps {self.steps[0]:,} to "
            f"{self.steps[-1]:,}",
            f"axis {'explained':>10} {'random walk':>12}",
        ]
        for i in range(AXES):
            explained, walk = (_percent(shares[i]) for shares in (self.explained, self.random_walk))
            lines.append(f"pc{i + 1}  {explained:>10} {walk:>12}")
        return "\n".join(lines)

    def to_frame(self) -> "pd.DataFrame":
        """One row per checkpoint, with columns of the table `trajectory`."""
        import pandas as pd

        columns: dict[str, Any] = {"step": self.steps}
        columns |= {f"pc{i + 1}": self.coordinates[:, i].tolist() for i in range(AXES)}
        for name in ("explained", "random_walk"):
            columns |= {f"{name}{i + 1}": float(getattr(self, name)[i]) for i in range(AXES)}
        return pd.DataFrame(columns | {"dim": len(self.axes)})


def trajectory(
    checkpoints: Iterable[Snapshot], *, steps: Sequence[int] | None = None, model: nn.Module | None = None
) -> Trajectory:
    """The principal axes of a sequence of checkpoints, and how much of its variance they explain.

    Beside it stands what the axes of a random walk explain, which is most of its variance too: a picture of a
    trajectory in the plane of two axes is evidence only against that.

    Args:
        checkpoints: two or more modules, state dicts, or flat parameters [d], in their order. Of modules the
            trainable parameters count; of state dicts all floating-point tensors but the statistics of batch
            norm, unless ``model`` is given.
        steps: at which they were taken, rising; by default they are evenly spaced.
        model: of the state dicts, whose trainable parameters are to count.

    Raises:
        StudyError: fewer than two, checkpoints of different models, that share their memory or are not
            finite, or impossible steps.

    Example:
        Three points on a line: one axis explains everything, of a random walk it would be 75 %.

        >>> import lossray, torch
        >>> course = lossray.trajectory([{"w": torch.tensor([t, 2 * t])} for t in (0.0, 1.0, 2.0)])
        >>> print(course)
        3 checkpoints of 2 parameters, steps 0 to 2
        axis  explained  random walk
        pc1      100.0%        75.0%
        pc2           -        25.0%
        pc3           -            -
        >>> [round(x, 4) for x in course.to_frame()["pc1"]]
        [-2.2361, 0.0, 2.2361]
    """
    given = list(checkpoints)
    if len(given) < 2:
        raise StudyError(f"trajectory: found {len(given)} checkpoints; needed: two or more")
    taken = _checked_steps(steps, len(given))
    names = None if model is None else layout_of(uncompiled(model)).names
    points: list[Tensor] = []
    addresses = set()
    for number, checkpoint in enumerate(given):
        pieces = _pieces(checkpoint, number, names)
        names = names or tuple(pieces)
        points.append(_flat(pieces, names, number, None if not points else points[0]))
        addresses.add(tuple(piece.data_ptr() for piece in pieces.values()))
    if len(addresses) < len(points):
        raise StudyError(
            "trajectory: some of the checkpoints share their memory, and so are the same: keep copies, such "
            "as copy.deepcopy(model.state_dict())"
        )
    rows = torch.stack(points)
    axes = principal_axes(gram_of([row[None] for row in rows])[0].cpu().numpy())
    weights = torch.from_numpy(axes.weights).to(rows)
    return Trajectory(
        taken,
        torch.from_numpy(axes.coordinates),
        torch.from_numpy(axes.explained),
        torch.from_numpy(random_walk_shares(taken)),
        (rows - rows.mean(dim=0)).T @ weights,
    )


def _checked_steps(steps: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if steps is None:
        return tuple(range(count))
    taken = tuple(int(step) for step in steps)
    if len(taken) != count or any(b <= a for a, b in itertools.pairwise(taken)):
        raise StudyError(f"trajectory, steps: found {list(steps)}; allowed: {count} rising whole numbers")
    return taken


def _pieces(checkpoint: Snapshot, number: int, names: Sequence[str] | None) -> dict[str, Tensor]:
    """The parameters of one checkpoint by name."""
    if isinstance(checkpoint, nn.Module):
        inner = uncompiled(checkpoint)
        return {name: p.detach() for name, p in inner.named_parameters() if p.requires_grad}
    if isinstance(checkpoint, Mapping):
        floats = {
            n: t.detach() for n, t in checkpoint.items() if isinstance(t, Tensor) and t.is_floating_point()
        }
        if names is not None:
            return {name: floats[name] for name in names if name in floats}
        return {n: t for n, t in floats.items() if n.rpartition(".")[2] not in STATISTICS}
    if isinstance(checkpoint, Tensor) and checkpoint.ndim == 1:
        return {"theta": checkpoint.detach()}
    raise StudyError(
        f"trajectory, checkpoint {number}: found {described(checkpoint)}; allowed: a module, a state dict, "
        "or a tensor [d]"
    )


def _flat(pieces: Mapping[str, Tensor], names: Sequence[str], number: int, first: Tensor | None) -> Tensor:
    """The parameters [d], float64."""
    missing = [name for name in names if name not in pieces]
    others = [name for name in pieces if name not in names]
    if missing or others or not names:
        what = f"no parameter {missing[0]!r}" if missing else f"{(others or ['nothing'])[0]!r}"
        raise StudyError(f"trajectory, checkpoint {number}: found {what}; all must be of one model")
    flat = torch.cat([pieces[name].reshape(-1).double() for name in names])
    if first is not None and flat.shape != first.shape:
        raise StudyError(
            f"trajectory, checkpoint {number}: found {len(flat):,} parameters, before {len(first):,}; all "
            "must be of one model"
        )
    if not bool(torch.isfinite(flat).all()):
        raise StudyError(f"trajectory, checkpoint {number}: found values that are not finite; leave it out")
    return flat if first is None else flat.to(first.device)


def _percent(share: Tensor) -> str:
    return f"{float(share):.1%}" if math.isfinite(float(share)) else "-"
