"""Pairs, density, trace and what follows from them, of one operator: `lossray.analyse`."""

from lossray.errors import StudyError
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
        ModelError: the products are not finite, or not those of the model.
        ResourceError: the basis would not fit the memory.

    Example:
        A saddle: of f(x) = b a x, whose loss (b a - 4)^2 has the Hessian [[2, -4], [-4, 2]] at a = b = 1.

        >>> import lossray, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> _ = [torch.nn.init.ones_(parameter) for parameter in model.parameters()]
        >>> data = (torch.tensor([[1.0]]), torch.tensor([[4.0]]))
        >>> report = lossray.analyse(lossray.Hessian(model, torch.nn.functional.mse_loss, data), top=1)
        >>> round(report.pairs.values.item(), 4), round(report.smallest.values.item(), 4)
        (6.0, -2.0)
        >>> round(report.trace.value, 4), round(report.negative_mass.value, 4)  # 6 - 2, and 2 / (6 + 2)
        (4.0, 0.25)
    """
    if type(top) is not int or top < 1:
        raise StudyError(f"top: found {top!r}; allowed: a whole number from 1")
    return packed_analysis(
        packed_of(operator), top=top, tolerance=tol, probes=probes, steps=steps, seeds=[seed], block=block
    ).member(0)
