"""Eigenpairs at the ends of the spectra of R symmetric operators, by one block Krylov pass.

Thick-restart block Lanczos (Wu & Simon 2000) in float64 with full reorthogonalisation and locking. The
members share each call of the operator and nothing else: every member has its own start vectors, basis and
stopping rule, so its result depends on its own seed (and, among the vectors of a multiple eigenvalue, on
rounding).

The Krylov space of a block of b vectors holds at most b copies of a multiple eigenvalue, so a single run can
miss the others with every residual small. Hence converged pairs are *locked*, and a fresh random block
orthogonal to them runs until the complement's leading pair has itself converged. What it finds above the
current k-th value is locked too and another block runs; the solve is *confirmed* when it finds nothing.

What is proved (theory 2.15): some eigenvalue lies within its residual of every value, and the block of k
pairs accounts for k eigenvalues with their multiplicity. That nothing larger was missed is very likely, not
proved: a confirmation can overlook an eigenvalue that exceeds the k-th by less than tolerance * |lambda|max,
and, with a probability that falls exponentially with its steps, a larger one.

The fresh blocks serve a second purpose: they are uniformly random in the complement of the locked vectors,
so they are the probes of `density`, which thus costs little beyond the confirmation.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.seeds import generator
from lossray.spectra.certified_pairs import Block, orthogonality_loss, row_norms
from lossray.spectra.ends import RelativeTo, Wanted, allowed_residuals
from lossray.spectra.krylov import ROUNDING, KrylovBases
from lossray.spectra.operator import PackedOperator
from lossray.spectra.pass_state import PassState, Ritz
from lossray.spectra.quadrature import (
    Probing,
    Quadrature,
    Sketch,
    forms_and_lengths,
    outside,
    start_weights,
)

Array = NDArray[np.float64]

FIRST_CHECK = 8  # steps of a run before it is judged: fewer would confirm too little
CHECK_EVERY = 4  # products between judgements, each a small dense eigenproblem
LOCKING_MARGIN = 0.5  # pairs are locked at this share of the tolerance; the rest is for the final rotation


class KrylovPass:
    """One pass over R members: a round of runs that looks for what is wanted, then rounds that confirm it.

    Args:
        operator: R symmetric operators of size d.
        ends: of the spectrum, each with its number of pairs; none for a density alone.
        seeds: one per member.
        tolerance: largest residual of a converged pair, as a share of |lambda|max.
        alive: the members to solve.
        basis: most vectors in a basis.
        block: vectors of a block.
        max_matvecs: most products per member.
        probing: what the second round (the first, where nothing is wanted) yields beside; None for nothing.
        guesses: [R, n, d] approximate eigenvectors that the first round starts from, beside a random vector.
        relative_to: "each" makes the tolerance a share of each |lambda|, down to the products' rounding.
    """

    def __init__(
        self,
        operator: PackedOperator,
        ends: Sequence[Wanted],
        *,
        seeds: Sequence[int],
        tolerance: float,
        alive: Sequence[bool],
        basis: int,
        block: int = 1,
        max_matvecs: int,
        probing: Probing | None = None,
        guesses: Tensor | None = None,
        relative_to: RelativeTo = "largest",
    ) -> None:
        self.operator, self.ends, self.tolerance = operator, tuple(ends), tolerance
        self.relative_to = relative_to
        self.width, self.block, self.limit, self.probing = basis, block, max_matvecs, probing
        self.guesses = guesses
        self.bases = KrylovBases(
            operator, locked=capacity(self.ends), width=basis + self._largest_block(), seeds=seeds
        )
        self.members = [
            PassState(seed, False, living, np.zeros((basis, basis)), [float("nan")] * len(self.ends))
            for seed, living in zip(seeds, alive, strict=True)
        ]
        self._probes: dict[int, Tensor] = {}  # the draws of the probing round, by member
        self.round = 0
        self.steps = 0  # blocks of the current round

    def run(self) -> list[PassState]:
        """All rounds, until every member is confirmed, capped or given up."""
        while any(member.searching for member in self.members):
            self._run_round()
            self.round += 1
        return self.members

    def blocks(self, end: Wanted) -> list[Block]:
        """What one end's certificates rest on: its k leading pairs, and those that may yet exceed them."""
        return [self._block(r, end) for r in range(len(self.members))]

    # One round.

    def _run_round(self) -> None:
        self.steps = 0
        for member in self.members:
            member.running = member.searching
            member.projected[:] = 0
        starts = self.bases.start(self._start_block(), self._running())
        for r in self._running():
            self.members[r].start = starts[r]
        if self.probing is not None and self.ends and self.round == self._probing_round:
            self._trace_products(self.probing)
            self._probes.clear()
        while self._running():
            self._step()

    def _step(self) -> None:
        """Multiply the last block, and judge every running member."""
        size, block = self.bases.size, self.bases.block
        products = self._products()
        running = self._running()
        scales = [member.scale for member in self.members]
        draw = self.round * 100_000 + self.steps
        overlaps, couplings = self.bases.extend(products, running, scales, draw)
        self.steps += 1
        for r in running:
            member = self.members[r]
            member.projected[:size, size - block : size] = overlaps[r]
            member.projected[size - block : size, :size] = overlaps[r].T
            member.coupling = couplings[r]
        full = size + block > self.width
        every = max(1, CHECK_EVERY // block)
        # The first round confirms nothing, so that vectors count in it; a warm start may need few steps.
        enough = size >= FIRST_CHECK if self.round == 0 else self.steps >= FIRST_CHECK
        due = enough and self.steps % every == 0
        judged = [r for r in running if due and size >= self._least(self.members[r])]
        ritz = {r: self._ritz(r, size) for r in running if full or r in judged or self._at_an_end(r)}
        for r, pairs in ritz.items():
            self._judge(r, pairs)
        if full and self._running():
            keep = min((size + self._n_pairs()) // 2, size - block)
            self._compress({r: ritz[r] for r in self._running()}, keep)

    def _products(self) -> Tensor:
        """H v [R, b, d] with the last block; a member whose products are not finite is given up."""
        products = self.operator.apply(self.bases.last_block()).to(torch.float64)
        n_members, block = products.shape[:2]
        norms = row_norms(products.flatten(0, 1)).view(n_members, block).amax(dim=1).tolist()
        for r in self._running():
            member = self.members[r]
            if np.isfinite(norms[r]):
                member.matvecs += block
                member.scale = max(member.scale, norms[r])
            else:  # an operator that is not finite has no eigenpairs
                member.running = member.searching = False
                member.values = np.zeros(0)
                self.bases.set_locked(r, self.bases.locked(r)[:0])
        stopped = [r for r, member in enumerate(self.members) if not member.running]
        products[stopped] = 0
        return products

    def _at_an_end(self, r: int) -> bool:
        """Whether member r cannot go on: an invariant subspace, or too many products."""
        return self._exhausted(r) or self.members[r].matvecs >= self.limit

    def _exhausted(self, r: int) -> bool:
        return not self.members[r].coupling.any() or self.members[r].scale == 0

    def _ritz(self, r: int, size: int) -> Ritz:
        """Ritz pairs of member r's basis of ``size`` vectors, whose last block leaves the coupling."""
        member = self.members[r]
        # torch's, not NumPy's: the threads of a second BLAS would get in the way of the products'.
        pairs = torch.linalg.eigh(torch.from_numpy(member.projected[:size, :size]))
        values, rotation = pairs[0].numpy(), pairs[1].numpy()
        member.scale = max(member.scale, float(np.abs(values).max()))
        # Scaled, so that no square overflows or vanishes.
        largest = np.abs(member.coupling).max()
        coupling = member.coupling / largest if largest > 0 else member.coupling
        lengths = np.linalg.norm(coupling @ rotation[size - len(coupling) :], axis=0)
        return Ritz(values, rotation, largest * lengths)

    def _judge(self, r: int, ritz: Ritz) -> None:
        """End member r's run where it has found what it was for, or cannot go on."""
        member, size = self.members[r], len(ritz.values)
        capped = member.matvecs >= self.limit
        self._note_quadrature(r, ritz)
        to_lock = [self._pairs_to_lock(member, ritz, end) for end in self.ends]
        # An end that need not be confirmed keeps nobody waiting once it has its pairs.
        optional = [not end.confirm and len(member.values) >= end.k for end in self.ends]
        settled = all(i is not None or free for i, free in zip(to_lock, optional, strict=True))
        if not settled and capped:  # the best of what has not converged joins the block; it will be flagged
            best = [end.order(ritz.values)[: end.k] for end in self.ends]
            self._end_run(r, ritz, best)
            member.searching = False
        elif settled and (size >= self._least(member) or self._exhausted(r) or capped):
            indices = [chosen for chosen in to_lock if chosen is not None]
            self._end_run(r, ritz, indices)
            nothing_new = all(len(chosen) == 0 for chosen in indices)
            member.confirmed = [nothing_new and chosen is not None for chosen in to_lock]
            member.searching = not nothing_new and not capped

    def _pairs_to_lock(self, member: PassState, ritz: Ritz, end: Wanted) -> NDArray[np.intp] | None:
        """Ritz pairs to lock for one end; None while the run has to go on.

        It may end once all pairs that are still missing have converged, or once a converged pair lies below
        the k-th locked one: then the complement's leading pair is known.
        """
        order = end.order(ritz.values)
        keys, residuals = end.keys(ritz.values)[order], ritz.residuals[order]
        locked_keys = end.keys(member.values)
        threshold = -np.inf
        if len(locked_keys) >= end.k:
            kth = np.argsort(-locked_keys, kind="stable")[end.k - 1]
            threshold = locked_keys[kth] + member.errors[kth] + 32 * self.bases.eps * member.scale
        allowed = allowed_residuals(
            ritz.values[order], member.scale, tolerance=self.tolerance, relative_to=self.relative_to
        )
        rounding = ROUNDING * self.bases.eps * member.scale  # no residual of products gets below it
        bound = np.maximum(allowed * np.where(keys > threshold, LOCKING_MARGIN, 1.0), rounding)
        converged = residuals <= bound
        prefix = len(converged) if converged.all() else int(np.argmin(converged))
        above = int((keys[:prefix] > threshold).sum())
        needed = end.k - len(locked_keys) if len(locked_keys) < end.k else end.k
        settled = above >= needed or above < prefix or converged.all()
        return order[: min(above, needed)] if settled else None

    def _end_run(self, r: int, ritz: Ritz, chosen: Sequence[NDArray[np.intp]]) -> None:
        """Lock the chosen Ritz pairs, and note what is left outside."""
        member = self.members[r]
        member.running = False
        member.orthogonality_loss = max(member.orthogonality_loss, orthogonality_loss(self.bases.occupied(r)))
        indices = np.unique(np.concatenate([np.zeros(0, np.intp), *chosen]))
        rest = np.delete(ritz.values, indices)
        member.complements = [
            float(rest[end.order(rest)[0]]) if len(rest) else float("nan") for end in self.ends
        ]
        if self.round == 0 and len(rest):
            whole = np.ptp(ritz.values)
            member.share = float(np.ptp(rest) / whole) if whole > 0 else 0.0
        if self.round == 0 and self.probing is not None and self.ends:
            member.sketch = self._sketch(r, ritz, indices)
        if len(indices):
            self._lock(r, ritz, indices)

    def _lock(self, r: int, ritz: Ritz, indices: NDArray[np.intp]) -> None:
        """Lock Ritz pairs; beyond the capacity those that no end wants any more are given up."""
        member = self.members[r]
        vectors = torch.cat([self.bases.locked(r), self.bases.rotated(r, ritz.rotation[:, indices])])
        values = np.concatenate([member.values, ritz.values[indices]])
        errors = np.concatenate([member.errors, ritz.errors()[indices]])
        kept = np.unique(np.concatenate([end.order(values)[: 2 * end.k] for end in self.ends]))
        member.values, member.errors = values[kept], errors[kept]
        self.bases.set_locked(r, vectors[torch.from_numpy(kept).to(vectors.device)])

    def _note_quadrature(self, r: int, ritz: Ritz) -> None:
        """Keep the quadrature of the probing round, as of the largest basis before a compression."""
        member, size = self.members[r], len(ritz.values)
        if self.probing is None or self.round != self._probing_round or self.bases.compressed:
            return
        weights = start_weights(ritz.rotation, member.start)
        products = np.concatenate([weights @ ritz.values, member.trace_products])
        traces = self.bases.dim * products
        if member.sketch is not None:
            traces = member.sketch.traces(products, self.bases.dim)
        unit = member.scale if member.scale > 0 else 1.0
        squares = [weights @ np.square(ritz.values / unit), np.square(member.trace_lengths / unit)]
        member.quadrature = Quadrature(
            ritz.values,
            weights,
            member.values,
            2 * float(member.errors.sum()),  # what a locked value gains others lose
            traces,
            np.concatenate(squares),
            unit,
            member.projected[:size, :size].copy(),
            member.start,
        )

    def _trace_products(self, probing: Probing) -> None:
        """Of the probes for the trace alone, outside the locked vectors: one product each."""
        if probing.traces == 0:
            return
        shape = (len(self.members), probing.traces, self.bases.dim)
        vectors = torch.zeros(shape, dtype=torch.float64, device=self.operator.device)
        for r in self._running():
            vectors[r] = outside(self._draws(r, self.round)[probing.probes :], self.bases.locked(r))
            self.members[r].matvecs += probing.traces
        arrays = (tensor.cpu().numpy() for tensor in forms_and_lengths(self.operator, vectors))
        for member, forms, lengths in zip(self.members, *arrays, strict=True):
            member.trace_products, member.trace_lengths = forms, lengths

    def _sketch(self, r: int, ritz: Ritz, indices: NDArray[np.intp]) -> Sketch:
        """Member r's, for the probes of its next run, outside the Ritz pairs to be locked."""
        member, size, block = self.members[r], len(ritz.values), self.bases.block
        draws = self._draws(r, self.round + 1)
        basis = self.bases.krylov(r, size + block)
        overlaps = (basis @ draws.T).cpu().numpy()  # [size + block, probes]
        locked = ritz.rotation[:, indices]
        shares = locked.T @ overlaps[:size]
        lengths = np.sqrt(draws.square().sum(dim=1).cpu().numpy() - np.square(shares).sum(axis=0))
        inside = (overlaps[:size] - locked @ shares) / lengths
        coupled = member.coupling.T @ overlaps[size:] / lengths  # [block, probes]
        projected = member.projected[:size, :size]
        return Sketch(
            trace=float(np.trace(projected)),
            inside=(inside * (projected @ inside)).sum(axis=0)
            + 2 * (inside[size - block :] * coupled).sum(axis=0),
            outside=1 - np.square(inside).sum(axis=0),
            size=size,
        )

    def _compress(self, ritz: dict[int, Ritz], keep: int) -> None:
        """Restart from the Ritz vectors that are wanted most, and the block that would have come next."""
        rotations = {}
        for r, pairs in ritz.items():
            indices = self._most_promising(pairs, keep)
            rotations[r] = pairs.rotation[:, indices]
            member = self.members[r]
            member.projected[:] = 0
            np.fill_diagonal(member.projected[:keep, :keep], pairs.values[indices])
        self.bases.compress(rotations)

    def _most_promising(self, ritz: Ritz, keep: int) -> NDArray[np.intp]:
        """Indices of ``keep`` Ritz pairs, taken from the ends in turn in proportion to what they want."""
        if not self.ends:
            return np.arange(len(ritz.values) - keep, len(ritz.values))
        ranks = [np.argsort(end.order(ritz.values)) / (end.k + 4) for end in self.ends]
        return np.sort(np.argsort(np.min(ranks, axis=0), kind="stable")[:keep])

    # What a round is for.

    def _start_block(self) -> Tensor:
        """Random vectors [R, b, d] of this round, and the guesses in front of them in the first."""
        n_members, dim = self.operator.shape
        size = self._block_size()
        starts = torch.zeros(n_members, size, dim, dtype=torch.float64, device=self.operator.device)
        for r in self._running():
            starts[r] = self._draws(r, self.round)[:size]
        if self.guesses is None or self.round > 0:
            return starts
        return torch.cat([self.guesses.to(starts), starts[:, :1]], dim=1)

    def _draws(self, r: int, round_index: int) -> Tensor:
        """The random vectors [n, d] of member r in a round; the same at each call."""
        if self.probing is None or round_index != self._probing_round:
            return self._random(r, round_index, self.block)
        if r not in self._probes:  # they are needed before their round and in it
            self._probes[r] = self._random(r, round_index, self.probing.probes + self.probing.traces)
        return self._probes[r]

    def _random(self, r: int, round_index: int, size: int) -> Tensor:
        draws = generator(self.members[r].seed, "lanczos", round_index)
        vectors = torch.randn(size, self.bases.dim, dtype=torch.float64, generator=draws, device="cpu")
        return vectors.to(self.operator.device)

    def _block_size(self) -> int:
        if self.probing is not None and self.round == self._probing_round:
            return self.probing.probes
        return self.block

    @property
    def _probing_round(self) -> int:
        return 1 if self.ends else 0

    def _least(self, member: PassState) -> int:
        """Vectors of a basis below which a settled run goes on.

        The degree of the polynomials over the spread decides what a quadrature resolves.
        """
        if self.probing is None or self.round != self._probing_round:
            return 0
        share = member.share if self.ends else 1.0
        probes = self.probing.probes
        return min(ceil(self.probing.steps * share) * probes, self.width - self.width % probes)

    def _largest_block(self) -> int:
        guesses = 0 if self.guesses is None else self.guesses.shape[1] + 1
        return max(self.block, guesses, self.probing.probes if self.probing else 0)

    def _n_pairs(self) -> int:
        return sum(end.k for end in self.ends)

    def _running(self) -> list[int]:
        return [r for r, member in enumerate(self.members) if member.running]

    def _block(self, r: int, end: Wanted) -> Block:
        member, vectors = self.members[r], self.bases.locked(r)
        complement = member.complements[self.ends.index(end)]
        keys = end.keys(member.values)
        if len(keys) > end.k:
            kth = np.sort(keys)[-end.k]
            chosen = keys >= kth - self.tolerance * member.scale
            vectors = vectors[torch.from_numpy(chosen).to(vectors.device)]
            rest = np.append(member.values[~chosen], complement)  # NaN stays NaN
            complement = float(rest[np.argmax(end.keys(rest))])
        confirmed = any(member.confirmed) and member.confirmed[self.ends.index(end)]
        return Block(vectors, complement, member.scale, confirmed, member.matvecs, member.orthogonality_loss)


def capacity(ends: Sequence[Wanted]) -> int:
    """Most locked vectors of a member."""
    return sum(2 * end.k for end in ends)
