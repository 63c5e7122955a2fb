"""Pairs, density, trace and what follows from them, of one operator: `lossray.analyse`."""

from lossray.spectra.analysis import Analysis, packed_analysis
from lossray.spectra.operator import SingleOperator, packed_of


def analyse(
    operator: SingleOperator,
    *,
    top: int = 10,
    probes: int = 4,
    steps: int = 64,
    tol: float = 1e-3,
    seed: int = 0,
    block: int = 1,
) -> Analysis:
    """Pairs at both ends, density, trace, Frobenius norm and what follows from them, from one Krylov pass.

    Args:
        operator: of size d.
        top: eigenpairs at the large end; the smallest comes with them.
        probes: random vectors of density and trace.
        steps: vectors of a basis that resolves the whole spectrum; what the pairs leave of it is resolved as
            finely, by fewer.
        tol: largest residual of a converged pair, as a share of |lambda|max.
        seed: of the random vectors.
        block: vectors of a block in the search for the pairs; more than one pays on a GPU.

    Raises:
        StudyError: an impossible argument.
        ResourceError: the basis would not fit the memory.
    """
    return packed_analysis(
        packed_of(operator), top=top, tolerance=tol, probes=probes, steps=steps, seeds=[seed], block=block
    ).member(0)
