"""The Gram matrix of a window's directions: how far they persist from step to step."""

import torch
from torch import Tensor

WIDTH = 4096
SEED = 20250913  # of the one sketch that all windows share


class GramSketch:
    """A random map from R^d to R^m, m = `WIDTH`, that keeps inner products; the identity where d <= m.

    A count sketch (Charikar, Chen and Farach-Colton 2002): every coordinate gets a random sign, and is added
    to one of m buckets. Runs of m coordinates are turned by a random shift each, which is as good as a bucket
    for each, and faster: two coordinates meet with a probability of 1/m at most. Inner products of u and v
    are right in the mean, with a standard deviation of sqrt(2/m) |u||v| or less.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.width = min(dim, WIDTH)
        self._signs = (
            2 * torch.randint(0, 2, (dim,), generator=generator, device="cpu", dtype=torch.float64) - 1
        )
        self._shifts = torch.randint(
            0, self.width, (-(-dim // self.width),), generator=generator, device="cpu"
        ).tolist()

    def __call__(self, vectors: Tensor) -> Tensor:
        """The images [..., m] of ``vectors`` [..., d], float64."""
        if vectors.shape[-1] == self.width:
            return vectors.double()
        self._signs = self._signs.to(vectors.device)
        image = torch.zeros(*vectors.shape[:-1], self.width, dtype=torch.float64, device=vectors.device)
        runs = zip(vectors.split(self.width, dim=-1), self._signs.split(self.width), strict=True)
        for shift, (run, signs) in zip(self._shifts, runs, strict=True):
            ahead = min(run.shape[-1], self.width - shift)
            image[..., shift : shift + ahead].addcmul_(run[..., :ahead], signs[:ahead])
            image[..., : run.shape[-1] - ahead].addcmul_(run[..., ahead:], signs[ahead:])
        return image


def gram_shares(vectors: Tensor) -> Tensor:
    """Eigenvalues of the Gram matrices of w vectors each, over their sums.

    Args:
        vectors: [R, w, m].

    Returns:
        [R, w] float64, rising; NaN for those with a value that is not finite, or with zeros alone.
    """
    gram = vectors @ vectors.mT
    values = finite_eigenvalues(gram)
    return values / values.sum(dim=1, keepdim=True)


def finite_eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues [R, n] of semidefinite matrices [R, n, n], rising; NaN for those that are not finite."""
    finite = matrices.isfinite().flatten(start_dim=1).all(dim=1)[:, None]
    values = torch.linalg.eigvalsh(torch.where(finite[:, :, None], matrices, 0)).clamp(min=0)
    return torch.where(finite, values, torch.nan)
