"""The k algebraically largest eigenpairs of R symmetric operators at once.

Thick-restart Lanczos (Wu & Simon 2000) in float64 with full reorthogonalisation and locking. The members
share each call of the operator and nothing else: every member has its own start vectors, basis and stopping
rule, so its result depends on its own seed.

The Krylov space of one start vector holds one copy of a multiple eigenvalue, so a single run misses the
others with every residual small. Hence converged pairs are *locked*, and a fresh random vector orthogonal to
them runs until the complement's leading pair has itself converged. What it finds above the current k-th value
is locked too and another vector runs; the solve is *confirmed* when it finds nothing.

What is proved (SCIENCE 2.15): some eigenvalue lies within its residual of every value, and the block of k
pairs accounts for k eigenvalues with their multiplicity. That nothing larger was missed is very likely, not
proved: a confirmation can overlook an eigenvalue that exceeds the k-th by less than tolerance * |lambda|max,
and, with a probability that falls exponentially with its steps, a larger one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.curvature.pairs import Block, EigenPairs, PackedOperator, certify, orthogonality_loss, row_norms
from lossray.seeds import generator

Array = NDArray[np.float64]
Span = tuple[int, int]

FIRST_CHECK = 8  # steps of a run before it is judged: fewer would confirm too little
CHECK_EVERY = 4  # steps between judgements, each a small dense eigenproblem
LOCKING_MARGIN = 0.5  # pairs are locked at this share of the tolerance; the rest is for the final rotation


def leading_pairs(
    operator: PackedOperator,
    k: int,
    *,
    seeds: Sequence[int],
    tolerance: float = 1e-3,
    alive: Tensor | None = None,
    basis: int | None = None,
    max_matvecs: int | None = None,
) -> EigenPairs:
    """The k algebraically largest eigenpairs of every member.

    Args:
        operator: R symmetric operators of size d.
        k: number of pairs; min(k, d) are returned.
        seeds: one seed per member, for its random start vectors.
        tolerance: largest residual of a converged pair, as a share of |lambda|max.
        alive: [R] bool; the other members are skipped and come out as NaN. All by default. A member whose
            products turn out not to be finite is given up in the same way.
        basis: most vectors in a member's Krylov basis; max(64, 2 k + 20) by default.
        max_matvecs: most Lanczos products per member, 1000 + 100 k by default; what has not converged by then
            is flagged. The final certificates cost one more product for each pair.

    Raises:
        ValueError: an impossible k, tolerance, basis, cap or number of seeds.
    """
    n_members, dim = operator.shape
    k = min(k, dim)
    width = min(dim, max(64, 2 * k + 20) if basis is None else basis)
    limit = 1000 + 100 * k if max_matvecs is None else max_matvecs
    if k < 1 or not 0 < tolerance < 1 or limit < 1 or width < min(dim, k + 4):
        raise ValueError(
            "need k >= 1, 0 < tolerance < 1, max_matvecs >= 1 and a basis of at least k + 4 vectors; "
            f"found k={k}, tolerance={tolerance}, max_matvecs={limit}, basis={width}"
        )
    if len(seeds) != n_members:
        raise ValueError(f"need one seed for each of {n_members} members; found {len(seeds)}")
    living = [True] * n_members if alive is None else [bool(flag) for flag in alive]
    solver = _Solver(operator, k, seeds, living, tolerance, width, limit)
    solver.iterate()
    return certify(operator, [solver.block(r) for r in range(n_members)], k, tolerance=tolerance)


@dataclass
class _Member:
    """Where one member's solve stands."""

    seed: int
    running: bool
    projected: Array  # [width, width]: V H V' of the current basis, filled up to `size`
    size: int = 0  # vectors in the current basis
    steps: int = 0  # products of the current run
    runs: int = 0  # start vectors drawn
    matvecs: int = 0
    scale: float = 0.0  # largest |Ritz value| or |H v| seen: a lower bound of |lambda|max
    locked: Array = field(default_factory=lambda: np.zeros(0))  # values, in the order of their vectors
    errors: Array = field(default_factory=lambda: np.zeros(0))  # how far the locked values may be off
    complement: float = float("nan")  # leading Ritz value outside the locked vectors, once known
    confirmed: bool = False
    orthogonality_loss: float = 0.0


@dataclass(frozen=True)
class _Ritz:
    """Ritz pairs of one member's current basis, descending."""

    values: Array  # [m]
    rotation: Array  # [m, m], columns: coefficients in the basis
    residuals: Array  # [m], as the recurrence gives them

    def errors(self) -> Array:
        """Bounds of the values' errors: the residual, or its square over the gap where the gap is known."""
        distances = np.abs(self.values[:, None] - self.values)
        np.fill_diagonal(distances, np.inf)
        gaps = np.maximum(distances.min(axis=1), self.residuals)
        bounds: Array = np.divide(self.residuals**2, gaps, out=np.zeros_like(gaps), where=gaps > 0)
        return bounds


class _Solver:
    """The iteration: the vectors of all members in one tensor, the control of each on the host."""

    def __init__(
        self,
        operator: PackedOperator,
        k: int,
        seeds: Sequence[int],
        living: Sequence[bool],
        tolerance: float,
        width: int,
        limit: int,
    ) -> None:
        n_members, self.dim = operator.shape
        self.operator, self.k, self.tolerance, self.width, self.limit = operator, k, tolerance, width, limit
        self.eps = torch.finfo(operator.dtype).eps
        self.capacity = min(2 * k, self.dim)  # locked vectors; beyond it the lowest is given up
        self.origin = self.capacity  # locked vectors end where the basis begins, so that both are one slice
        size = (n_members, self.capacity + width, self.dim)
        self.vectors = torch.zeros(size, dtype=torch.float64, device=operator.device)
        self.members = [
            _Member(seed, running, np.zeros((width, width)))
            for seed, running in zip(seeds, living, strict=True)
        ]

    def iterate(self) -> None:
        """Advance the members together, one product each, until every one has ended."""
        for r, member in enumerate(self.members):
            if member.running:
                self._start_run(r)
        while any(member.running for member in self.members):
            products = self._products()
            overlaps, norms = _orthogonalise(self.vectors, products, self._spans())
            for r, member in enumerate(self.members):
                if member.running:
                    self._advance(r, overlaps[r][-member.size :], norms[r], products[r])

    def block(self, r: int) -> Block:
        """What member r's certificates rest on: its k largest pairs, and those that may yet exceed them."""
        member = self.members[r]
        vectors, complement = self._locked_vectors(r), member.complement
        if len(member.locked) > self.k:
            kth = np.sort(member.locked)[-self.k]
            chosen = member.locked >= kth - self.tolerance * member.scale
            vectors = vectors[torch.from_numpy(chosen).to(vectors.device)]
            complement = float(np.max([complement, *member.locked[~chosen]]))  # NaN stays NaN
        return Block(
            vectors, complement, member.scale, member.confirmed, member.matvecs, member.orthogonality_loss
        )

    # One step.

    def _products(self) -> Tensor:
        """H v [R, d] with the last basis vector of every running member; zeros in the other rows."""
        current = torch.zeros_like(self.vectors[:, 0])
        for r, member in enumerate(self.members):
            if member.running:
                current[r] = self.vectors[r, self.origin + member.size - 1]
        products = self.operator.apply(current).to(torch.float64)
        norms = row_norms(products).tolist()
        for r, member in enumerate(self.members):
            if member.running and np.isfinite(norms[r]):
                member.matvecs += 1
                member.scale = max(member.scale, norms[r])
                continue
            if member.running:  # an operator that is not finite has no eigenpairs
                member.running, member.locked = False, np.zeros(0)
            products[r] = 0
        return products

    def _advance(self, r: int, overlaps: Array, norm: float, rest: Tensor) -> None:
        """Take in member r's last product, in two parts: ``overlaps``, and ``rest`` of length ``norm``."""
        member = self.members[r]
        m = member.size
        member.steps += 1
        member.projected[:m, m - 1] = member.projected[m - 1, :m] = overlaps
        # An invariant subspace, or no room left: the rest is rounding.
        exhausted = norm <= 4 * self.eps * member.scale or m + len(member.locked) == self.dim
        capped = member.matvecs >= self.limit
        due = member.steps >= FIRST_CHECK and (member.steps - FIRST_CHECK) % CHECK_EVERY == 0
        if due or exhausted or capped or m == self.width:
            ritz = _ritz(member.projected[:m, :m], 0.0 if exhausted else norm)
            member.scale = max(member.scale, float(np.abs(ritz.values).max()))
            if self._judge(r, ritz, exhausted=exhausted, capped=capped):
                return
            if m == self.width:
                self._restart(r, ritz)
        self._append(r, rest / norm)

    def _judge(self, r: int, ritz: _Ritz, *, exhausted: bool, capped: bool) -> bool:
        """Lock what member r's run was for, once converged. True where the run, or the member, has ended."""
        member = self.members[r]
        converged = ritz.residuals <= LOCKING_MARGIN * self.tolerance * member.scale
        prefix = len(converged) if converged.all() else int(np.argmin(converged))
        above = int((ritz.values[:prefix] > self._threshold(member)).sum())
        needed = self.k - len(member.locked) if len(member.locked) < self.k else self.k
        if above >= needed or above < prefix or exhausted:
            self._note_orthogonality(r)
            self._lock(r, ritz, min(above, needed))
            if above == 0 or len(member.locked) == self.dim:
                member.running, member.confirmed = False, True
                member.complement = float(ritz.values[0]) if above == 0 else -np.inf
            elif capped:
                member.running = False
            else:
                self._start_run(r)
            return True
        if capped:  # the best of what has not converged joins the block: the certificates flag it
            self._note_orthogonality(r)
            count = min(self.k, member.size)
            self._lock(r, ritz, count)
            member.running = False
            member.complement = float(ritz.values[count]) if count < member.size else float("nan")
        return capped

    def _threshold(self, member: _Member) -> float:
        """What a pair must exceed to matter: the k-th locked value, by more than that may be off."""
        if len(member.locked) < self.k:
            return -np.inf
        kth = np.argsort(-member.locked, kind="stable")[self.k - 1]
        return float(member.locked[kth] + member.errors[kth] + 32 * self.eps * member.scale)

    # The vectors of one member.

    def _start_run(self, r: int) -> None:
        """Begin a run from a fresh random vector orthogonal to the locked ones."""
        member = self.members[r]
        draws = generator(member.seed, "lanczos", member.runs)
        start = torch.randn(1, self.dim, dtype=torch.float64, generator=draws).to(self.vectors.device)
        member.runs, member.steps, member.size = member.runs + 1, 0, 0
        member.projected[:] = 0
        _, (norm,) = _orthogonalise(self.vectors[r : r + 1], start, [self._spans()[r]])
        self._append(r, start[0] / norm)

    def _restart(self, r: int, ritz: _Ritz) -> None:
        """Compress a full basis to its leading Ritz vectors."""
        member = self.members[r]
        keep = min((self.width + self.k) // 2, self.width - 2)
        self.vectors[r, self.origin : self.origin + keep] = self._rotated(r, ritz, keep)
        member.projected[:] = 0
        np.fill_diagonal(member.projected[:keep, :keep], ritz.values[:keep])
        member.size = keep

    def _lock(self, r: int, ritz: _Ritz, count: int) -> None:
        """Lock the first ``count`` Ritz pairs; beyond the capacity the lowest locked ones are given up."""
        member = self.members[r]
        vectors = torch.cat([self._locked_vectors(r), self._rotated(r, ritz, count)])
        values = np.concatenate([member.locked, ritz.values[:count]])
        errors = np.concatenate([member.errors, ritz.errors()[:count]])
        kept = np.sort(np.argsort(-values, kind="stable")[: self.capacity])
        member.locked, member.errors = values[kept], errors[kept]
        self._locked_vectors(r).copy_(vectors[torch.from_numpy(kept).to(vectors.device)])

    def _append(self, r: int, vector: Tensor) -> None:
        member = self.members[r]
        self.vectors[r, self.origin + member.size] = vector
        member.size += 1

    def _locked_vectors(self, r: int) -> Tensor:
        """View [n, d]."""
        return self.vectors[r, self.origin - len(self.members[r].locked) : self.origin]

    def _rotated(self, r: int, ritz: _Ritz, count: int) -> Tensor:
        """The first ``count`` Ritz vectors [count, d]."""
        basis = self.vectors[r, self.origin : self.origin + self.members[r].size]
        return torch.from_numpy(ritz.rotation[:, :count].T.copy()).to(basis.device) @ basis

    def _spans(self) -> list[Span]:
        """Where in `vectors` each member's locked vectors and basis are; nowhere once it has ended."""
        return [
            (self.origin - len(m.locked), self.origin + m.size) if m.running else (self.origin, self.origin)
            for m in self.members
        ]

    def _note_orthogonality(self, r: int) -> None:
        member = self.members[r]
        first, last = self._spans()[r]
        found = orthogonality_loss(self.vectors[r, first:last])
        member.orthogonality_loss = max(member.orthogonality_loss, found)


def _ritz(projected: Array, norm: float) -> _Ritz:
    """Ritz pairs of ``projected`` [m, m], the last basis vector of which leaves a rest of length ``norm``."""
    values, rotation = np.linalg.eigh(projected)
    values, rotation = values[::-1], rotation[:, ::-1]
    return _Ritz(values, rotation, norm * np.abs(rotation[-1]))


def _orthogonalise(
    vectors: Tensor, products: Tensor, spans: Sequence[Span]
) -> tuple[list[Array], list[float]]:
    """Remove from each row of ``products`` its components along its span, in place.

    Two passes always; more for a member while a pass still removes half of what was left (Kahan-Parlett):
    what is left is then mostly rounding, about to be scaled up.

    Args:
        vectors: [R, n, d] orthonormal rows in each member's span.
        products: [R, d], changed in place.
        spans: R slices of n; members with an empty one are left alone.

    Returns:
        For each member the removed components, in the order of its span, and the length of the rest.
    """
    total, before = _project(vectors, products, spans)
    for _ in range(4):
        overlaps, after = _project(vectors, products, spans)
        total = [t + o if len(o) else t for t, o in zip(total, overlaps, strict=True)]
        again = [a < 0.5 * b for a, b in zip(after, before, strict=True)]
        spans = [(first, last if more else first) for (first, last), more in zip(spans, again, strict=True)]
        before = after
        if not any(again):
            break
    return total, before


def _project(vectors: Tensor, products: Tensor, spans: Sequence[Span]) -> tuple[list[Array], list[float]]:
    """One pass of `_orthogonalise`."""
    # On a CPU the batched product of a matrix and a vector takes 3-5 times as long as one after the other.
    each = _project_each if products.device.type == "cpu" else _project_batched
    overlaps = each(vectors, products, spans)
    return overlaps, row_norms(products).tolist()


def _project_each(vectors: Tensor, products: Tensor, spans: Sequence[Span]) -> list[Array]:
    """Member after member; arguments as in `_orthogonalise`."""
    overlaps = []
    for r, (first, last) in enumerate(spans):
        overlap = vectors[r, first:last] @ products[r]
        products[r].addmv_(vectors[r, first:last].T, overlap, alpha=-1)
        overlaps.append(overlap.cpu().numpy())
    return overlaps


def _project_batched(vectors: Tensor, products: Tensor, spans: Sequence[Span]) -> list[Array]:
    """All members in one product over the union of their spans; arguments as in `_orthogonalise`."""
    low, high = min(first for first, _ in spans), max(last for _, last in spans)
    slots = torch.arange(low, high)
    inside = torch.stack([(slots >= first) & (slots < last) for first, last in spans]).to(products.device)
    overlaps = torch.bmm(vectors[:, low:high], products[:, :, None])[:, :, 0] * inside
    products.sub_(torch.bmm(overlaps[:, None], vectors[:, low:high])[:, 0])
    rows = overlaps.cpu().numpy()
    return [rows[r, first - low : last - low] for r, (first, last) in enumerate(spans)]
