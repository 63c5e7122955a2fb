"""How far the steps of a window lie in an eigenspace held fixed at its start: rows of the `alignment` table.

S = ln[sum |V'u|^2 / sum |u|^2] over the window. One snapshot of the energy scatters over orders of magnitude
from seed to seed; S does not, and claim A is judged on it (theory 5A, "The statistic").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.geometry.direction_kinds import COVECTORS
from lossray.geometry.gauges import Gauge
from lossray.geometry.gram import GramSketch, gram_shares
from lossray.geometry.nulls import IsotropicNull, LayerNull
from lossray.geometry.quadratic_forms import form_of
from lossray.geometry.subspace_angles import subspace_resolved
from lossray.networks.layout import Layout
from lossray.spectra.certified_pairs import PackedEigenPairs

SIZES = {"v1": 1, "top10": 10}
STEPS_AT_ONCE = 8  # that are projected together: the eigenvectors are read once for all of them


@dataclass(frozen=True)
class Frame:
    """Leading eigenvectors at the start of a window, in one gauge.

    Attributes:
        gauge: of all members.
        pairs: the largest, in the gauge.
    """

    gauge: Gauge
    pairs: PackedEigenPairs


@dataclass(frozen=True)
class AlignmentRow:
    """One direction of one member over a window; NaN for a member that was not alive throughout.

    Attributes:
        member: index of the member in the pack.
        direction: its name.
        gauge: its name.
        subspace: "v1" or "top10".
        log_energy: S = ln(sum |V'u|^2 / sum |u|^2) over the window.
        steps: number of those that had this direction, and not as zero.
        sign_flip_null: mean of exp(S) over random signs of the directions' components.
        layer_null: mean of exp(S) over random directions with the same norms in every layer.
        isotropic_null: mean of S over random turns of the whole window in the raw coordinates.
        k: dimension of the subspace.
        dim: d, the coordinates that the gauge keeps.
        dropped: number of the other coordinates.
        resolved: whether the eigenspace is known; None for a dead member.
    """

    member: int
    direction: str
    gauge: str
    subspace: str
    log_energy: float
    steps: int
    sign_flip_null: float
    layer_null: float
    isotropic_null: float
    k: int
    dim: int
    dropped: int
    resolved: bool | None


class WindowAlignment:
    """Collects the steps of a window.

    Args:
        frames: the eigenvectors of R members, in one gauge each.
        layout: how d divides into parameters.
    """

    def __init__(self, frames: Sequence[Frame], layout: Layout) -> None:
        self.frames = frames
        self.layout = layout
        self._sums: dict[str, _Sums] = {}
        self._bases: dict[bool, list[Tensor]] = {}  # by whether they are for gradients; see `_dual_bases`
        self._nulls: dict[bool, list[IsotropicNull]] = {}  # likewise
        self._sketch = GramSketch(sum(layout.sizes))

    def add(self, directions: Mapping[str, Tensor]) -> None:
        """One step's directions [R, d] by name, in the parameters' own coordinates; NaN once dead."""
        for name, vectors in directions.items():
            if name not in self._sums:
                self._sums[name] = _Sums(self._dual_bases(name), self._sketch)
            self._sums[name].add(vectors)

    def rows(self) -> list[AlignmentRow]:
        """One row per direction, gauge, subspace and member."""
        rows = []
        for name, sums in self._sums.items():
            sums.flush()
            steps = form_of(gram_shares(torch.cat(sums.sketches, dim=1)))
            for i, (frame, null) in enumerate(zip(self.frames, self._isotropic_nulls(name), strict=True)):
                rows += self._frame_rows(name, sums, sums.projected[i], frame, null.expected(steps))
        return rows

    def _dual_bases(self, direction: str) -> list[Tensor]:
        """Per frame W [R, k, d] with W u = V u~, u~ the direction in the gauge: one copy for each kind."""
        kind = direction in COVECTORS
        if kind not in self._bases:
            self._bases[kind] = [_dual_basis(frame, direction) for frame in self.frames]
        return self._bases[kind]

    def _isotropic_nulls(self, direction: str) -> list[IsotropicNull]:
        """Per frame, one for each kind."""
        kind = direction in COVECTORS
        if kind not in self._nulls:
            bases = self._dual_bases(direction)
            self._nulls[kind] = [
                _isotropic_null(frame, basis, direction)
                for frame, basis in zip(self.frames, bases, strict=True)
            ]
        return self._nulls[kind]

    def _frame_rows(
        self, name: str, sums: "_Sums", projected: Tensor, frame: Frame, isotropic: Mapping[int, Tensor]
    ) -> list[AlignmentRow]:
        """The rows of one direction in one gauge; ``projected`` [R, k] sums of (v'u)^2."""
        gauge, kept = frame.gauge, frame.gauge.scale != 0
        # Squares in the gauge: the transform of the root of the sum of squares is that of each step.
        energies = gauge.transform({name: sums.squares.sqrt()})[name].square()
        total, nulls = energies.sum(dim=1), LayerNull(self.layout, kept)
        dims, steps = kept.sum(dim=1).tolist(), sums.steps.tolist()
        rows = []
        for subspace, k in SIZES.items():
            if k > min(len(frame.pairs), kept.shape[1] - 1):
                continue
            weights = frame.pairs.vectors[:, :k].square().sum(dim=1)
            log_energies = torch.log(projected[:, :k].sum(dim=1) / total).tolist()
            flips = ((energies * weights).sum(dim=1) / total).tolist()
            layered = (nulls.expected(energies, weights) / total).tolist()
            turned = torch.where(total > 0, isotropic[k], torch.nan).tolist()
            resolved = subspace_resolved(frame.pairs, k, kept)
            rows += [
                AlignmentRow(
                    member=r,
                    direction=name,
                    gauge=gauge.name,
                    subspace=subspace,
                    log_energy=log_energies[r],
                    steps=steps[r],
                    sign_flip_null=flips[r],
                    layer_null=layered[r],
                    isotropic_null=turned[r],
                    k=k,
                    dim=dims[r],
                    dropped=kept.shape[1] - dims[r],
                    resolved=resolved[r],
                )
                for r in range(len(log_energies))
            ]
        return rows


def _dual_basis(frame: Frame, direction: str) -> Tensor:
    vectors, gauge = frame.pairs.vectors[:, : max(SIZES.values())], frame.gauge
    if gauge.identity:
        return vectors.double()
    return torch.stack([gauge.transform({direction: v})[direction] for v in vectors.unbind(dim=1)], dim=1)


def _isotropic_null(frame: Frame, basis: Tensor, direction: str) -> IsotropicNull:
    scale = frame.gauge.transform({direction: torch.ones_like(frame.gauge.scale)})[direction]
    return IsotropicNull(scale, basis, [k for k in SIZES.values() if k <= basis.shape[1]])


class _Sums:
    """What a window keeps of one direction: sums over its steps, and a sketch of each."""

    def __init__(self, bases: Sequence[Tensor], sketch: GramSketch) -> None:
        # [R] once there is a step, as are the squares
        self.steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self.bases = bases  # per frame [R, k, d]
        self.projected = [
            torch.zeros(basis.shape[:2], dtype=torch.float64, device=basis.device) for basis in bases
        ]
        self.squares = torch.zeros((), device="cpu")  # [R, d]
        self.sketches: list[Tensor] = []  # [R, steps, m] each
        self._sketch = sketch
        self._waiting: list[Tensor] = []

    def add(self, vectors: Tensor) -> None:
        self._waiting.append(vectors.double())
        if len(self._waiting) == STEPS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        block = torch.stack(self._waiting, dim=1)  # [R, w, d]
        self._waiting = []
        self.steps = self.steps.to(block.device) + (block != 0).any(dim=2).sum(dim=1)
        if not self.squares.ndim:
            self.squares = torch.zeros_like(block[:, 0])
        for vectors in block.unbind(dim=1):  # without a copy of the block
            self.squares.addcmul_(vectors, vectors)
        self.sketches.append(self._sketch(block))
        for total, basis in zip(self.projected, self.bases, strict=True):
            total += torch.einsum("rwd,rkd->rwk", block, basis).square().sum(dim=1)
