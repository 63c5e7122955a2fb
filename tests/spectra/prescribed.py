"""Operators with prescribed spectra, for the tests of the solvers."""

import torch
from torch import Tensor

DIM = 1000


class Rotated:
    """Operators with prescribed spectra [R, d], in a basis turned by three reflections."""

    def __init__(self, spectra: Tensor, *, dtype: torch.dtype = torch.float64) -> None:
        self.spectra = spectra
        self.shape = (spectra.shape[0], spectra.shape[1])
        self.dtype = dtype
        self.device = torch.device("cpu")
        normals = torch.randn(3, self.shape[1], dtype=torch.float64, generator=generator(7))
        self.mirrors = normals / torch.linalg.vector_norm(normals, dim=1, keepdim=True)
        self.calls = 0
        self.matvecs = 0
        self.losses = torch.zeros(self.shape[0], dtype=torch.float64)
        self.gradient = torch.zeros(self.shape, dtype=torch.float64)
        self.derivative_error = torch.zeros(self.shape[0], dtype=torch.float64)

    def product_error(self, vectors: Tensor) -> Tensor:
        exact = self._reflect(self.spectra * self._reflect(vectors, self.mirrors), self.mirrors.flip(0))
        return torch.linalg.vector_norm(self.apply(vectors) - exact, dim=1)

    def _reflect(self, vectors: Tensor, mirrors: Tensor) -> Tensor:
        for mirror in mirrors:
            vectors = vectors - 2 * (vectors @ mirror)[..., None] * mirror
        return vectors

    def apply(self, vectors: Tensor) -> Tensor:
        self.calls += 1
        self.matvecs += 1 if vectors.ndim == 2 else vectors.shape[1]
        vectors = vectors.to(self.dtype).double()
        turned = self._reflect(vectors, self.mirrors)
        spectra = self.spectra if vectors.ndim == 2 else self.spectra[:, None]
        product = self._reflect(spectra * turned, self.mirrors.flip(0))
        return product.to(self.dtype).double()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bulk(dim: int = DIM, seed: int = 1) -> Tensor:
    return torch.randn(dim, dtype=torch.float64, generator=generator(seed))


def spectrum(*outliers: float) -> Tensor:
    values = bulk()
    values[: len(outliers)] = torch.tensor(outliers, dtype=torch.float64)
    return values


def largest(spectra: Tensor, k: int) -> Tensor:
    return spectra.sort(dim=-1, descending=True).values[..., :k]
