"""The trace by Hutchinson's estimator, deflated by a Krylov space (Hutch++, Meyer et al. 2021).

For any orthonormal Q the trace of H is that of Q'HQ plus that of (I - QQ') H (I - QQ'). Half of the products
go into a Krylov basis Q, which holds the outliers and gets Q'HQ for nothing; the other half into independent
probes outside Q. Q is random but independent of the probes, so the estimate is unbiased and the probes'
spread gives its standard error, with their number less one as degrees of freedom.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lossray.errors import StudyError
from lossray.seeds import generator
from lossray.spectra.dense import dense_spectra
from lossray.spectra.eigensolver import living_members
from lossray.spectra.estimates import Estimate, PackedEstimate, jackknife, unit_of
from lossray.spectra.lanczos import KrylovPass
from lossray.spectra.operator import PackedOperator, SingleOperator, packed_of
from lossray.spectra.quadrature import Probing, outside, quadratic_forms

FEWEST = 4  # products: two for the basis, and two probes to tell the spread


def trace(operator: SingleOperator, *, matvecs: int = 60, seed: int = 0) -> Estimate:
    """The trace, with its standard error and a Student's t interval.

    Args:
        operator: of size d. Where d <= matvecs the trace is exact.
        matvecs: products to spend.
        seed: of the random vectors.

    Raises:
        StudyError: too few products.
        ModelError: the products are not finite, or not those of the model.
        ResourceError: the basis would not fit the memory.

    Example:
        >>> import lossray, torch
        >>> model = torch.nn.Linear(200, 1, bias=False)
        >>> inputs = torch.arange(1.0, 201.0).sqrt().diag()
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, (inputs, torch.zeros(200, 1)))
        >>> estimate = lossray.trace(H, matvecs=40)  # of diag(1, 2, ..., 200) / 100, which is 201
        >>> low, high = estimate.interval(0.999)
        >>> low < 201 < high, H.matvecs
        (True, 40)
    """
    return packed_trace(packed_of(operator), matvecs=matvecs, seeds=[seed]).member(0)


def packed_trace(
    operator: PackedOperator, *, matvecs: int, seeds: Sequence[int], alive: Tensor | None = None
) -> PackedEstimate:
    """The traces of R members.

    Args:
        operator: R symmetric operators of size d. Where d <= matvecs the matrix is formed: exact.
        matvecs: products with each member.
        seeds: one per member.
        alive: [R] bool; the other members come out as NaN.

    Raises:
        StudyError: too few products.
        ResourceError: the basis would not fit the memory.
    """
    if matvecs < FEWEST:
        raise StudyError(f"matvecs: found {matvecs}; allowed: a whole number from {FEWEST}")
    n_members, dim = operator.shape
    living = living_members(n_members, alive)
    if dim <= matvecs:
        return jackknife(dense_spectra(operator, living).values.sum(dim=1)[:, None, None], exact=True)
    steps = matvecs // 2
    basis = KrylovPass(
        operator,
        (),
        seeds=seeds,
        tolerance=1.0,
        alive=living,
        basis=steps + 1,
        max_matvecs=steps,
        probing=Probing(1, steps),
    )
    members = basis.run()
    spaces = [
        basis.bases.krylov(r, 0 if m.quadrature is None else len(m.quadrature.nodes))
        for r, m in enumerate(members)
    ]
    inside = [0.0 if m.quadrature is None else float(m.quadrature.nodes.sum()) for m in members]
    probes = torch.stack(
        [_probes(space, matvecs - steps, seed) for space, seed in zip(spaces, seeds, strict=True)]
    )
    forms = quadratic_forms(operator, probes)  # [R, n]
    rest = dim - torch.tensor([len(space) for space in spaces], device=forms.device)
    samples = torch.tensor(inside, device=forms.device)[:, None] + rest[:, None] * forms
    samples[[m.quadrature is None for m in members]] = float("nan")
    unit = unit_of(torch.tensor([member.scale for member in members], device=forms.device))
    return jackknife((samples / unit[:, None])[:, :, None]).times(unit)


def _probes(space: Tensor, n: int, seed: int) -> Tensor:
    """Independent vectors [n, d], uniform on the unit sphere outside ``space`` [q, d]."""
    draws = torch.randn(
        n, space.shape[1], dtype=torch.float64, generator=generator(seed, "trace"), device="cpu"
    )
    return outside(draws.to(space.device), space)
