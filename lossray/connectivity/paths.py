"""Paths between two points of parameter space, for all members of a pack at once.

Straight, elementwise geometric (the rescaling orbit D^t theta), polygonal, or a Bezier curve of any degree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lossray.errors import ModelError, StudyError
from lossray.names import unknown_name

Kind = Literal["line", "geometric", "polychain", "bezier"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CURVES: tuple[Kind, ...] = ("polychain", "bezier")  # those with bends, which can be trained

PANELS, NODES = 32, 4  # of the Gauss-Legendre quadrature of arc lengths, at least


@dataclass(frozen=True)
class Path:
    """One path per member from t = 0 to t = 1.

    Attributes:
        kind: polychain: straight pieces that take equal times; bezier: the Bernstein polynomial of degree
            K - 1; geometric: sign(a) |a|^(1 - t) |b|^t in each coordinate.
        points: [K, R, d], the control points, the ends first and last; K = 2 for line and geometric.
    """

    kind: Kind
    points: Tensor

    @property
    def bends(self) -> Tensor:
        """A view of the control points between the ends, [K - 2, R, d]."""
        return self.points[1:-1]

    def at(self, t: float | Tensor) -> Tensor:
        """The points at t, [R, d]; t = 0 and t = 1 give the ends bit for bit.

        Args:
            t: 0 to 1, one number for all members or one for each [R].

        Raises:
            ValueError: t lies outside.
        """
        times = self._times(t)
        inner = self._geometric(times) if self.kind == "geometric" else self._combined(times)
        first, last = (self._column(times == end) for end in (0, 1))
        return torch.where(first, self.points[0], torch.where(last, self.points[-1], inner))

    def coefficients(self, t: float | Tensor) -> Tensor:
        """The derivative of `at` by each control point, a multiple of the identity, [K, R] float64.

        Args:
            t: as in `at`.

        Raises:
            ValueError: t lies outside, or the path is geometric, which is not linear in its control points.
        """
        if self.kind == "geometric":
            raise ValueError("a geometric path is not linear in its control points")
        return self._weights(self._times(t)).to(self.points.device)

    def lengths(self, ts: Sequence[float]) -> Tensor:
        """Arc lengths from t = 0 to each of T places, [R, T] float64.

        Exact for line and polychain; by quadrature otherwise.

        Raises:
            ValueError: a place lies outside of 0 to 1.
        """
        for t in ts:
            self._times(t)
        if self.kind in ("line", "polychain"):
            corners = [i / (len(self.points) - 1) for i in range(len(self.points))]
            return _interpolated(_norms(self._steps()).cumsum(dim=1), corners, ts)
        edges = sorted({*(i / PANELS for i in range(PANELS + 1)), *map(float, ts)})
        return _interpolated(_integrals(self._speed(), edges).cumsum(dim=1), edges, ts)

    # Linear combinations of the control points.

    def _times(self, t: float | Tensor) -> Tensor:
        """The times of all members, [R] float64 on the CPU, where they and their weights are made."""
        times = torch.as_tensor(t, dtype=torch.float64).cpu().expand(self.points.shape[1])
        if not bool(((times >= 0) & (times <= 1)).all()):
            raise ValueError(f"t: found {t}; allowed: 0 to 1")
        return times

    def _column(self, values: Tensor) -> Tensor:
        """Values [R] beside the members' coordinates: [R, 1], on their device."""
        return values.to(self.points.device)[:, None]

    def _combined(self, times: Tensor) -> Tensor:
        weights = self._weights(times).to(self.points.dtype)
        # One after the other: the order of a reduction may depend on the size of the pack.
        total = self._column(weights[0]) * self.points[0]
        for weight, point in zip(weights[1:], self.points[1:], strict=True):
            total = total + self._column(weight) * point
        return total

    def _weights(self, times: Tensor) -> Tensor:
        """The weights [K, R] of the control points at times [R]."""
        pieces = len(self.points) - 1
        if self.kind == "bezier":
            return torch.stack(
                [math.comb(pieces, k) * times**k * (1 - times) ** (pieces - k) for k in range(pieces + 1)]
            )
        corners = torch.arange(pieces + 1, dtype=torch.float64, device="cpu")
        return (1 - (pieces * times - corners[:, None]).abs()).clamp(min=0)  # hat functions

    def _steps(self) -> Tensor:
        """From each control point to the next, [K - 1, R, d] float64."""
        return self.points.detach().double().diff(dim=0)

    # Geometric paths and speeds.

    def _geometric(self, times: Tensor) -> Tensor:
        a, b = self.points.double()
        inner: Tensor = a * torch.where(a == 0, 1, b / a) ** self._column(times)
        return inner.to(self.points.dtype)

    def _speed(self) -> Callable[[float], Tensor]:
        """|d theta / dt| [R] float64, as a function of t."""
        if self.kind == "geometric":
            a, b = self.points.detach().double()
            rates = torch.where(a == 0, 0, (b / a).log())
            return lambda t: _norms((a * rates * (t * rates).exp())[None])[:, 0]
        steps = self._steps()
        # Of the hodograph, whose control points are the steps: the Gram matrices are all that lengths need.
        grams = torch.einsum("ird,jrd->rij", steps, steps)
        hodograph = Path("bezier", torch.zeros(len(steps), 1, 1, device="cpu"))

        def speed(t: float) -> Tensor:
            weights = len(steps) * hodograph.coefficients(t)[:, 0].to(grams.device)
            return (grams @ weights @ weights).clamp(min=0).sqrt()

        return speed


def straight(a: Tensor, b: Tensor) -> Path:
    """The straight line from a to b, [R, d] each."""
    return Path("line", torch.stack([a.detach(), b.detach()]))


def geometric(a: Tensor, b: Tensor) -> Path:
    """The path D^t a to b = D a, D diagonal and positive: of a rescaled network, the same function all along.

    Args:
        a: [R, d].
        b: [R, d]; each coordinate has the sign of a's.

    Raises:
        ModelError: the signs differ somewhere.
    """
    differ = (a.sign() != b.sign()) & a.isfinite() & b.isfinite()
    if bool(differ.any()):
        member, coordinate = differ.nonzero()[0].tolist()
        raise ModelError(
            "a geometric path needs ends with the same signs, b = D a with D > 0, as lossray.rescale makes: "
            f"found {float(a[member, coordinate]):.4g} and {float(b[member, coordinate]):.4g} in "
            f"coordinate {coordinate} of member {member} ({int(differ.sum())} differ); take the kind 'line' "
            "or a curve"
        )
    return Path("geometric", torch.stack([a.detach(), b.detach()]))


def bent(kind: Kind, a: Tensor, b: Tensor, bends: int) -> Path:
    """A curve whose bends still lie on the straight line from a to b, evenly spaced: where training starts.

    Args:
        kind: "polychain" or "bezier".
        a: [R, d].
        b: [R, d].
        bends: control points between the ends, at least one.

    Raises:
        StudyError: another kind, or no whole number of bends from 1 on.
    """
    if kind not in CURVES:
        raise StudyError(f"a path with bends, kind: {unknown_name(str(kind), CURVES)}")
    if isinstance(bends, bool) or not isinstance(bends, int) or bends < 1:
        raise StudyError(f"bends: found {bends!r}; allowed: a whole number, 1 or more")
    line = straight(a, b)
    return Path(kind, torch.stack([line.at(k / (bends + 1)) for k in range(bends + 2)]))


def _norms(steps: Tensor) -> Tensor:
    """Lengths [R, K - 1] of steps [K - 1, R, d]."""
    norms: Tensor = torch.linalg.vector_norm(steps, dim=2).T
    return norms


def _integrals(speed: Callable[[float], Tensor], edges: Sequence[float]) -> Tensor:
    """Integrals [R, E - 1] of ``speed`` over the intervals between edges, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    panels = []
    for start, end in pairwise(edges):
        half, middle = (end - start) / 2, (end + start) / 2
        values = (w * speed(middle + half * x) for x, w in zip(nodes.tolist(), weights.tolist(), strict=True))
        panels.append(half * sum(values, start=torch.zeros((), device="cpu")))
    return torch.stack(panels, dim=1)


def _interpolated(sums: Tensor, edges: Sequence[float], ts: Sequence[float]) -> Tensor:
    """Cumulative lengths at ts [R, T], from those at the edges after the first [R, E - 1]; linear between."""
    at_edges = torch.nn.functional.pad(sums, (1, 0)).cpu().numpy()
    rows = [np.interp(np.asarray(ts, dtype=np.float64), edges, row) for row in at_edges]
    return torch.from_numpy(np.stack(rows)).to(sums.device)
