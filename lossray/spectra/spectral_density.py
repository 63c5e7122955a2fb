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
        ModelError: the products are not finite, or not those of the model.
        ResourceError: the bases would not fit the memory.

    Example:
        >>> import lossray, torch
        >>> model = torch.nn.Linear(100, 1, bias=False)
        >>> inputs = 10 * torch.cat([torch.eye(30), torch.zeros(70, 30)]).T  # 70 of 100 weights do nothing
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, (inputs, torch.zeros(30, 1)))
        >>> density = lossray.spectral_density(H)  # d = 100 is less than probes * steps
        >>> density.exact, round(density.weights[density.nodes.abs() < 1e-3].sum().item(), 4)
        (True, 0.7)
    """
    return packed_density(packed_of(operator), probes=probes, steps=steps, seeds=[seed]).member(0)
