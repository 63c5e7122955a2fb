"""The eigenvalue distribution of one operator: `lossray.spectral_density`."""

from lossray.spectra.density import SpectralDensity, packed_density
from lossray.spectra.operator import SingleOperator, packed_of


def spectral_density(
    operator: SingleOperator, *, probes: int = 4, steps: int = 64, seed: int = 0
) -> SpectralDensity:
    """The eigenvalue distribution by stochastic Lanczos quadrature.

    `analyse` gives a better one for less where eigenpairs are wanted too: it is deflated by them.

    Args:
        operator: of size d. Where d <= probes * steps all eigenvalues are computed instead.
        probes: random start vectors.
        steps: Lanczos steps, and products, with each.
        seed: of the start vectors.

    Raises:
        StudyError: an impossible argument.
        ResourceError: the bases would not fit the memory.
    """
    return packed_density(packed_of(operator), probes=probes, steps=steps, seeds=[seed]).member(0)
