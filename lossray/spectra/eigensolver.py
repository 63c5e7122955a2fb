"""The outermost eigenpairs of R symmetric operators: by a Krylov pass, or from the matrix of a small one."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lossray.errors import StudyError
from lossray.spectra.certified_pairs import PackedEigenPairs, certify
from lossray.spectra.dense import dense_spectra
from lossray.spectra.ends import RelativeTo, Wanted
from lossray.spectra.lanczos import KrylovPass, capacity
from lossray.spectra.operator import PackedOperator

SMALLEST_BASIS = 64  # vectors of a basis before it is compressed


def packed_eigenpairs(
    operator: PackedOperator,
    ends: Sequence[Wanted],
    *,
    seeds: Sequence[int],
    tolerance: float = 1e-3,
    alive: Tensor | None = None,
    basis: int | None = None,
    block: int = 1,
    max_matvecs: int | None = None,
    guesses: Tensor | None = None,
    relative_to: RelativeTo = "largest",
) -> list[PackedEigenPairs]:
    """The outermost eigenpairs of every member, one result for each end.

    Args:
        operator: R symmetric operators of size d.
        ends: of the spectrum, each with its number of pairs; min(k, d) are returned.
        seeds: one seed per member, for its random vectors.
        tolerance: largest residual of a converged pair, as a share of |lambda|max.
        alive: [R] bool; the other members are skipped and come out as NaN. All by default. A member whose
            products turn out not to be finite is given up in the same way.
        basis: most vectors in a member's Krylov basis.
        block: vectors of a block.
        max_matvecs: most Lanczos products per member, 1000 + 100 k by default; what has not converged by then
            is flagged. The final certificates cost one more product for each pair.
        guesses: [R, n, d] approximate eigenvectors to start from; a random vector always joins them.
        relative_to: "each" makes the tolerance a share of each |lambda|.

    Raises:
        StudyError: an impossible k, tolerance, basis, block, cap or number of seeds.
        ResourceError: the basis would not fit the memory.
    """
    n_members, dim = operator.shape
    ends = [replace(end, k=min(end.k, dim)) for end in ends]
    check_solve(n_members, seeds=seeds, tolerance=tolerance, block=block, max_matvecs=max_matvecs)
    n_guesses = 0 if guesses is None else guesses.shape[1]
    width = basis_size(ends, block=max(block, n_guesses + 1), asked=basis)
    living = living_members(n_members, alive)
    if is_small(operator, ends, width + max(block, n_guesses + 1)):
        spectra = dense_spectra(operator, living)
        blocks = [spectra.blocks(end) for end in ends]
    else:
        solver = KrylovPass(
            operator,
            ends,
            seeds=seeds,
            tolerance=tolerance,
            alive=living,
            basis=width,
            block=block,
            max_matvecs=most_matvecs(ends) if max_matvecs is None else max_matvecs,
            guesses=guesses,
            relative_to=relative_to,
        )
        solver.run()
        blocks = [solver.blocks(end) for end in ends]
    return [
        certify(operator, end_blocks, end, tolerance=tolerance, relative_to=relative_to)
        for end_blocks, end in zip(blocks, ends, strict=True)
    ]


def check_solve(
    n_members: int, *, seeds: Sequence[int], tolerance: float, block: int, max_matvecs: int | None
) -> None:
    """Refuse impossible arguments.

    Raises:
        StudyError: naming the argument.
    """
    if len(seeds) != n_members:
        raise StudyError(f"need one seed for each of {n_members} members; found {len(seeds)}")
    if not 0 < tolerance < 1:
        raise StudyError(f"tol (tolerance): found {tolerance}; allowed: between 0 and 1")
    if block < 1:
        raise StudyError(f"block: found {block}; allowed: a whole number from 1")
    if max_matvecs is not None and max_matvecs < 1:
        raise StudyError(f"max_matvecs: found {max_matvecs}; allowed: a whole number from 1")


def basis_size(ends: Sequence[Wanted], *, block: int, asked: int | None = None) -> int:
    """Most vectors of a basis before it is compressed.

    Raises:
        StudyError: ``asked`` leaves a compressed basis no room to grow.
    """
    most = max((end.k for end in ends), default=0)
    least = sum(end.k for end in ends) + 4 * block
    if asked is None:
        return max(SMALLEST_BASIS, 2 * most + 20, 24 * block)
    if asked < least:
        raise StudyError(
            f"basis: found {asked}; allowed: at least {least}, the pairs and four blocks of {block}"
        )
    return asked


def most_matvecs(ends: Sequence[Wanted]) -> int:
    """Products of a member after which a solve gives up."""
    return 1000 + 100 * sum(end.k for end in ends)


def living_members(n_members: int, alive: Tensor | None) -> list[bool]:
    """A flag per member; all are alive by default."""
    return [True] * n_members if alive is None else [bool(flag) for flag in alive]


def is_small(operator: PackedOperator, ends: Sequence[Wanted], vectors: int) -> bool:
    """Whether so many vectors may fill the space: then the matrix costs little more, and tells all.

    The basis and its next block count: locked and basis vectors have to fit into the space together.
    """
    return operator.shape[1] <= capacity(ends) + vectors
