"""Orthonormal block Krylov bases of R members in float64, side by side in one tensor.

All running members of a round have bases of one size, which grow by one block at a time: they share each call
of the operator and nothing else. In front of its basis every member has the vectors it has locked, to which
the basis stays orthogonal.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.memory import require_bytes
from lossray.seeds import generator
from lossray.spectra.certified_pairs import row_norms
from lossray.spectra.operator import PackedOperator

Array = NDArray[np.float64]

ENOUGH = 0.5  # a pass that leaves this share of a vector has made it orthogonal to rounding (Kahan-Parlett)
MOST_PASSES = 5
ROUNDING = 4  # a rest below this many units of rounding is nothing but rounding


class KrylovBases:
    """The locked vectors and the bases of all members.

    Args:
        operator: R operators of size d.
        locked: most locked vectors of a member.
        width: most vectors of a basis.
        seeds: one per member, for its random vectors.

    Raises:
        ResourceError: the bases would not fit the memory.
        ValueError: they would not fit the space.
    """

    def __init__(self, operator: PackedOperator, *, locked: int, width: int, seeds: Sequence[int]) -> None:
        n_members, self.dim = operator.shape
        if locked + width > self.dim:
            raise ValueError(
                f"{locked} locked vectors and a basis of {width} exceed the dimension {self.dim}"
            )
        self.width, self.origin, self.seeds = width, locked, tuple(seeds)
        self.eps = torch.finfo(operator.dtype).eps
        self.n_locked = [0] * n_members
        self.size = 0  # vectors in the basis of every running member, the last block included
        self.block = 0  # vectors of the last block
        self.compressed = False  # since the start
        slots = locked + width
        require_bytes(
            8 * n_members * slots * self.dim,
            operator.device,
            what=f"a basis of {slots} vectors of {self.dim:,} for each of {n_members} members",
            remedy="ask for fewer pairs, a smaller basis or fewer members at a time",
        )
        # Unused slots hold zeros: they project to nothing.
        shape = (n_members, slots, self.dim)
        self.vectors = torch.zeros(shape, dtype=torch.float64, device=operator.device)

    def start(self, vectors: Tensor, running: Sequence[int]) -> list[Array]:
        """Begin the bases of the running members anew.

        Args:
            vectors: start blocks [R, b, d], linearly independent; changed.
            running: indices of the running members.

        Returns:
            For every member the upper triangle U [b, b] with start = U' basis, outside its locked vectors.
        """
        self.size, self.block, self.compressed = 0, vectors.shape[1], False
        _, factors = self._orthonormalise(vectors, running)
        self._append(vectors, running)
        return factors

    def last_block(self) -> Tensor:
        """View [R, b, d] of the last block."""
        end = self.origin + self.size
        return self.vectors[:, end - self.block : end]

    def extend(
        self, products: Tensor, running: Sequence[int], scales: Sequence[float], draw: int
    ) -> tuple[list[Array], list[Array]]:
        """Orthonormalise the products with the last block and append them as the next block.

        Where a rest is nothing but rounding (an invariant subspace) a random vector takes its place, with
        coupling zero.

        Args:
            products: [R, b, d]; changed.
            running: indices of the running members.
            scales: a lower bound of |lambda|max of every member.
            draw: tells the random vectors of one step from those of others.

        Returns:
            For every member the overlaps [m, b] of the products with the basis that it had, and the coupling
            [b, b] of the new block to the last one; empty arrays for the others.
        """
        overlaps, factors = self._orthonormalise(products, running)
        for r in running:
            noise = ROUNDING * self.eps * scales[r]
            if np.abs(np.diag(factors[r])).min() <= noise:
                factors[r] = self._replace_noise(r, products, factors[r], noise, draw)
        self._append(products, running)
        return overlaps, factors

    def rotated(self, r: int, rotation: Array) -> Tensor:
        """Combinations [n, d] of member r's basis without its last block; ``rotation`` [m, n]."""
        basis = self.vectors[r, self.origin : self.origin + len(rotation)]
        return torch.from_numpy(np.ascontiguousarray(rotation.T)).to(basis.device) @ basis

    def compress(self, rotations: dict[int, Array]) -> None:
        """Replace each basis but for its last block by the combinations [m, n] of it; n is common to all."""
        last = self.last_block().clone()
        for r, rotation in rotations.items():
            kept = rotation.shape[1]
            self.vectors[r, self.origin : self.origin + kept] = self.rotated(r, rotation)
            self.vectors[r, self.origin + kept : self.origin + self.size] = 0
        self.size, self.compressed = kept, True
        self._append(last, list(rotations))

    def locked(self, r: int) -> Tensor:
        """View [n, d] of member r's locked vectors."""
        return self.vectors[r, self.origin - self.n_locked[r] : self.origin]

    def set_locked(self, r: int, vectors: Tensor) -> None:
        """Make ``vectors`` [n, d] member r's locked vectors, and forget its basis."""
        self.vectors[r] = 0
        self.n_locked[r] = len(vectors)
        self.locked(r).copy_(vectors)

    def occupied(self, r: int) -> Tensor:
        """View [n, d] of everything orthonormal that member r has."""
        return self.vectors[r, self.origin - self.n_locked[r] : self.origin + self.size]

    def krylov(self, r: int, size: int) -> Tensor:
        """View [size, d] of the first vectors of member r's basis."""
        return self.vectors[r, self.origin : self.origin + size]

    def _append(self, block: Tensor, running: Sequence[int]) -> None:
        start = self.origin + self.size
        for r in running:
            self.vectors[r, start : start + block.shape[1]] = block[r]
        self.size += block.shape[1]

    def _orthonormalise(self, block: Tensor, running: Sequence[int]) -> tuple[list[Array], list[Array]]:
        """Make the rows of ``block`` [R, b, d] orthonormal, and orthogonal to what is there, in place.

        Full passes go on while one of them still removes most of a row: what is left is then mostly
        rounding. The components along the two last blocks, the large ones of a Lanczos step, are removed
        before the first, so that one is enough as a rule.

        Returns:
            The removed overlaps [m, b] with the basis, and the triangle [b, b] that recovers the rest.
        """
        n_members, b = block.shape[:2]
        low, end = self.origin - max(self.n_locked, default=0), self.origin + self.size
        empty = [self.origin - low - n for n in self.n_locked]
        overlaps = np.zeros((n_members, end - low, b))
        factors = np.tile(np.eye(b), (n_members, 1, 1))
        recent = max(self.origin, end - 2 * self.block)
        if recent < end:
            overlaps[:, recent - low :] += _project(
                self.vectors[:, recent:end], block, running, [0] * n_members
            )
        pending = list(running)
        for _ in range(MOST_PASSES):
            before = row_norms(block.flatten(0, 1)).view(n_members, b).cpu().numpy()
            removed = _project(self.vectors[:, low:end], block, pending, empty)
            triangles = _triangularise(block, pending)
            for r in pending:
                overlaps[r] += removed[r] @ factors[r]
                factors[r] = triangles[r] @ factors[r]
            pending = [r for r in pending if (np.abs(np.diag(triangles[r])) < ENOUGH * before[r]).any()]
            if not pending:
                break
        n_basis = end - self.origin
        return [o[len(o) - n_basis :] for o in overlaps], list(factors)

    def _replace_noise(self, r: int, block: Tensor, factor: Array, noise: float, draw: int) -> Array:
        """Turn member r's rows so that noise comes last, and put random vectors in its place."""
        left, sizes, right = np.linalg.svd(factor)
        block[r] = torch.from_numpy(np.ascontiguousarray(left.T)).to(block.device) @ block[r]
        n_sound = int((sizes > noise).sum())
        sizes[n_sound:] = 0
        draws = generator(self.seeds[r], "replacement", draw)
        fresh = torch.randn(
            len(sizes) - n_sound, self.dim, dtype=torch.float64, generator=draws, device="cpu"
        )
        rows = fresh.to(block.device)
        basis = torch.cat([self.occupied(r), block[r, :n_sound]])
        for _ in range(2):
            rows -= (rows @ basis.T) @ basis
            rows = torch.linalg.qr(rows.T).Q.T
        block[r, n_sound:] = rows
        turned: Array = sizes[:, None] * right
        return turned


def _triangularise(block: Tensor, running: Sequence[int]) -> dict[int, Array]:
    """Orthonormalise the rows of the running members [b, d] in place; U [b, b] upper with old = U' new."""
    if block.shape[1] > 1:
        chosen = list(running)
        q, upper = torch.linalg.qr(block[chosen].transpose(1, 2))
        block[chosen] = q.transpose(1, 2)
        return dict(zip(chosen, upper.cpu().numpy(), strict=True))
    norms = row_norms(block[:, 0])
    block /= torch.where(norms > 0, norms, 1)[:, None, None]
    return {r: np.array([[norm]]) for r, norm in enumerate(norms.tolist())}


def _project(vectors: Tensor, block: Tensor, running: Sequence[int], empty: Sequence[int]) -> Array:
    """Remove from the rows of ``block`` their components along ``vectors``, in place.

    Args:
        vectors: [R, n, d], orthonormal rows or zeros.
        block: [R, b, d].
        running: members to take part.
        empty: how many rows of each member's vectors are zero, at the front.

    Returns:
        The overlaps [R, n, b]; zeros for the other members.
    """
    # On a CPU the batched product of a matrix and a vector takes 3-5 times as long as one after the other.
    if block.device.type == "cpu":
        return _project_each(vectors, block, running, empty)
    return _project_batched(vectors, block, running)


def _project_each(vectors: Tensor, block: Tensor, running: Sequence[int], empty: Sequence[int]) -> Array:
    """Member after member; arguments as in `_project`."""
    overlaps = np.zeros((len(block), vectors.shape[1], block.shape[1]))
    for r in running:
        basis = vectors[r, empty[r] :]
        if block.shape[1] == 1:
            overlap = basis @ block[r, 0]
            block[r, 0].addmv_(basis.T, overlap, alpha=-1)
            overlaps[r, empty[r] :, 0] = overlap.numpy()
        else:
            overlap = basis @ block[r].T
            block[r].addmm_(overlap.T, basis, alpha=-1)
            overlaps[r, empty[r] :] = overlap.numpy()
    return overlaps


def _project_batched(vectors: Tensor, block: Tensor, running: Sequence[int]) -> Array:
    """All members in one product; arguments as in `_project`."""
    taking_part = torch.zeros(len(block), 1, 1, dtype=block.dtype, device=block.device)
    taking_part[list(running)] = 1
    overlaps = torch.bmm(vectors, block.transpose(1, 2)) * taking_part
    block.sub_(torch.bmm(overlaps.transpose(1, 2), vectors))
    result: Array = overlaps.cpu().numpy()
    return result
