"""The largest Ritz values after a fixed number of Lanczos steps: a cheap lower bound, without a certificate.

For what may cost no more than so many products. Eigenpairs with residuals are in `eigensolver`.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lossray.spectra.operator import PackedOperator


def largest_ritz_values(operator: PackedOperator, start: Tensor, steps: int) -> Tensor:
    """Lower bounds of the members' largest eigenvalues, [R] float64; NaN where a product is not finite.

    Lanczos with full reorthogonalisation, one vector a step; the recurrence is in float64, the products in
    the operator's own dtype.

    Args:
        operator: R symmetric operators of size d.
        start: [R, d], of any length; best near the leading eigenvectors.
        steps: products of each member.
    """
    basis = [normalize(start.double(), dim=1)]
    projected = torch.zeros(len(start), steps, steps, dtype=torch.float64, device=start.device)
    for k in range(steps):
        image = operator.apply(basis[k]).double()
        for _ in range(2):  # once leaves what rounding has brought back
            for i, vector in enumerate(basis):
                share = (vector * image).sum(dim=1)
                projected[:, i, k] += share
                image = image - share[:, None] * vector
        basis.append(normalize(image, dim=1))
    projected = projected.cpu()  # once: a GPU is waited for
    tridiagonal = projected.triu() + projected.triu(1).transpose(1, 2)
    finite = torch.isfinite(tridiagonal).all(dim=(1, 2))
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], tridiagonal, 0.0))[:, -1]
    return torch.where(finite, values, torch.nan).to(start.device)
