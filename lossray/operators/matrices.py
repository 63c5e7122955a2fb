"""The curvature of one model as symmetric matrices [d, d] that are never formed: ``H @ v``.

Vectors are flat, in the order of the trainable parameters in ``model.named_parameters()``.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lossray.networks.losses import Loss
from lossray.operators.model_outputs import Outputs
from lossray.operators.modules import Closure, ModuleObjective
from lossray.operators.packed import (
    ObjectiveOperator,
    PackedFisher,
    PackedGaussNewton,
    PackedHessian,
)
from lossray.operators.transforms import (
    PackedPreconditioned,
    PackedRestricted,
    PackedScaled,
    PointOperator,
)
from lossray.spectra.operator import packed_of

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Vectors = TypeVar("Vectors", Tensor, NDArray[Any])


class CurvatureMatrix:
    """A symmetric matrix [d, d] known by its products.

    Attributes:
        packed: the operator with R = 1 that the solvers take.
    """

    __array_ufunc__ = None  # NumPy leaves ``v @ H`` to us

    def __init__(self, packed: PointOperator) -> None:
        self.packed = packed

    @property
    def shape(self) -> tuple[int, int]:
        """The pair (d, d)."""
        return (self.packed.shape[1], self.packed.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the products."""
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        """Where the products are formed."""
        return self.packed.device

    @property
    def matvecs(self) -> int:
        """Products so far; those of what this one was made from included."""
        return self.packed.matvecs

    @property
    def mode(self) -> str:
        """How the products are formed: "retained", "linearized" or "recompute"; see modes.py."""
        return self.packed.mode

    @property
    def loss(self) -> float:
        """The mean loss."""
        return float(self.packed.losses[0])

    @property
    def gradient(self) -> Tensor:
        """Its gradient [d], float64, in the coordinates of this matrix."""
        return self.packed.gradient[0]

    @property
    def derivative_error(self) -> float:
        """How far autograd's derivatives are from a finite difference in float64, relative.

        NaN where it cannot be told: at a kink, or where the model does not work in float64.

        Raises:
            ModelError: too far for the products to be those of the model.
        """
        return float(self.packed.derivative_error[0])

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters whose elements the axes hold, in order."""
        return self.packed.layout.names

    def __matmul__(self, vectors: Vectors) -> Vectors:
        """The product with ``vectors`` [d] or [d, k], a tensor or an array.

        Returns:
            Of the same kind, shape and dtype, and on the same device.

        Raises:
            ValueError: another shape, or numbers that are not real and floating-point.
            ModelError: at the first product, the derivatives are not those of the model.
        """
        if isinstance(vectors, np.ndarray):
            return self._product(torch.from_numpy(np.array(vectors))).numpy()
        return self._product(vectors)

    def __rmatmul__(self, vectors: Vectors) -> Vectors:
        """The product from the left, with ``vectors`` [d] or [k, d]; the matrix is symmetric."""
        return (self @ vectors.T).T if vectors.ndim == 2 else self @ vectors

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device})"

    def to_scipy(self) -> "LinearOperator":
        """As a float64 operator for `scipy.sparse.linalg`; its products count in ``matvecs``."""
        from scipy.sparse.linalg import LinearOperator

        def product(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
            return self @ np.asarray(vectors, dtype=np.float64)

        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=np.float64)

    def _product(self, vectors: Tensor) -> Tensor:
        d = self.shape[0]
        if not isinstance(vectors, Tensor):
            raise ValueError(f"vectors: found {type(vectors).__name__}; allowed: a tensor or an array")
        if vectors.ndim not in (1, 2) or len(vectors) != d:
            raise ValueError(f"vectors: found the shape {list(vectors.shape)}; allowed: [{d}] or [{d}, k]")
        if not vectors.is_floating_point():
            raise ValueError(f"vectors: found {vectors.dtype}; allowed: real floating-point numbers")
        rows = vectors.detach().reshape(d, -1).T[None].to(self.device)
        products = self.packed.apply(rows)[0].T if rows.shape[1] else rows[0].T
        return products.reshape(vectors.shape).to(vectors.device, vectors.dtype)


class ModelMatrix(CurvatureMatrix):
    """A curvature matrix of a model's mean loss; see `Hessian` for the arguments."""

    make_packed: ClassVar[type[ObjectiveOperator]]

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        data: Any = None,
        *,
        closure: Closure | None = None,
        train: bool = False,
        dtype: torch.dtype | None = None,
        mode: str = "auto",
        outputs: Outputs | None = None,
    ) -> None:
        objective = ModuleObjective(
            model, loss, data, closure=closure, train=train, dtype=dtype, outputs=outputs
        )
        super().__init__(type(self).make_packed(objective, mode=mode))


class Hessian(ModelMatrix):
    """The Hessian of a model's mean loss.

    The model is evaluated in eval mode and left as it was: mode, weights, buffers, ``.grad``. The kinks of
    ReLU count as flat. ``H.mode`` says how products are formed; modes.py how that is chosen.

    Args:
        model: any module.
        loss: ``loss(outputs, targets)``, the mean over the examples of a batch; None with ``closure``. What
            it holds itself, such as class weights, is taken in the dtype of the outputs.
        data: a batch (inputs, targets) or (inputs, targets, weights), a list of such batches, or a
            DataLoader that gives the same batches each time. Inputs that are a mapping become keywords of
            the model, those of a tuple or list its arguments. Batches may differ in size: the mean is over
            examples.
        closure: ``closure(model, batch)`` returning (mean loss, weight), for losses of another form; ``data``
            is then a list of batches of any kind.
        train: evaluate in train mode. Batch norm then takes one batch only.
        dtype: of the products, float32 or float64; by default that of the parameters.
        mode: "auto", "retained", "linearized" or "recompute".
        outputs: what the loss gets of what the model returns: an attribute or key such as "logits", the place
            in a tuple, or a function. None: all of it.

    Raises:
        ModelError: a model or loss without a Hessian (random, not differentiable twice, no mean over
            examples, batch norm in train mode over several batches), or that raised.
        DataError: data that cannot be read, or only once, or that change from one reading to the next.
        ResourceError: not even the graph of one batch fits the memory.
        ValueError: an unknown mode.

    Example:
        >>> import lossray, torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, (inputs, targets))
        >>> H @ torch.eye(2)  # of linear regression on N examples: (2 / N) X'X
        tensor([[1., 0.],
                [0., 4.]])
    """

    make_packed = PackedHessian


class GaussNewton(ModelMatrix):
    """The generalised Gauss-Newton matrix J' (d2 loss / d outputs2) J (Schraudolph 2002).

    Equal to the Hessian where the outputs are linear in the parameters; positive semi-definite where the loss
    is convex in the outputs. These are one tensor: of a model that returns more, ``outputs="logits"`` (an
    attribute or key, the place in a tuple, or a function) says which. Arguments and errors as for `Hessian`.

    Example:
        The Hessian has in addition the curvature of the outputs, weighed by the residuals. That of
        f(x) = b a x makes it indefinite here.

        >>> import lossray, torch
        >>> from torch.nn.functional import mse_loss
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> _ = [torch.nn.init.ones_(parameter) for parameter in model.parameters()]
        >>> data = (torch.tensor([[1.0]]), torch.tensor([[4.0]]))  # one example, with f(x) - y = -3
        >>> lossray.GaussNewton(model, mse_loss, data) @ torch.eye(2)  # eigenvalues 4 and 0
        tensor([[2., 2.],
                [2., 2.]])
        >>> lossray.Hessian(model, mse_loss, data) @ torch.eye(2)  # eigenvalues 6 and -2
        tensor([[ 2., -4.],
                [-4.,  2.]])
    """

    make_packed = PackedGaussNewton


class EmpiricalFisher(ModelMatrix):
    """The mean of g_n g_n' over the examples n, with g_n the gradient of example n's own loss.

    That loss is ``loss(outputs[n:n+1], targets[n:n+1])``, with outputs as for `GaussNewton`. Arguments and
    errors as for `Hessian`; batch norm in train mode is refused.

    Example:
        It measures how the examples' gradients scatter, not how the loss bends: here these are 4 and 2.

        >>> import lossray, torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> data = (torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]]))  # with gradients -2 and 2
        >>> F = lossray.EmpiricalFisher(model, torch.nn.functional.mse_loss, data)
        >>> F @ torch.ones(1), F.gradient.abs().item()
        (tensor([4.]), 0.0)
    """

    make_packed = PackedFisher


class Scaled(CurvatureMatrix):
    """S H S with S = diag s.

    Args:
        matrix: H.
        scale: s, [d]; zeros are allowed.

    Raises:
        ValueError: another shape, or values that are not finite.
        StudyError: no matrix of lossray's.

    Example:
        Zeros and ones pick coordinates; other numbers measure the weights in other units.

        >>> import lossray, torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, data)  # diag(1, 4)
        >>> lossray.Scaled(H, torch.tensor([3.0, 0.0])) @ torch.eye(2)
        tensor([[9., 0.],
                [0., 0.]])
    """

    def __init__(self, matrix: CurvatureMatrix, scale: Tensor | NDArray[Any]) -> None:
        super().__init__(PackedScaled(_packed(matrix), _diagonal(scale)))


class Preconditioned(CurvatureMatrix):
    """D^-1/2 H D^-1/2, the curvature that an optimizer with preconditioner D meets.

    Args:
        matrix: H.
        scale: the diagonal of D, [d], above zero.

    Raises:
        ValueError: another shape, or values that are not finite and above zero.
        StudyError: no matrix of lossray's.

    Example:
        A preconditioner that equals the curvature makes the surface round.

        >>> import lossray, torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, data)  # diag(1, 4)
        >>> lossray.Preconditioned(H, torch.tensor([1.0, 4.0])) @ torch.eye(2)
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, matrix: CurvatureMatrix, scale: Tensor | NDArray[Any]) -> None:
        super().__init__(PackedPreconditioned(_packed(matrix), _diagonal(scale)))


class Restricted(CurvatureMatrix):
    """The block of H that belongs to some parameters.

    Args:
        matrix: H.
        names: parameters by name or glob, such as ``["0.weight"]`` or ``["blocks.0.*"]``.

    Raises:
        ModelError: a name or glob that no parameter matches.
        StudyError: no matrix of lossray's.

    Example:
        >>> import lossray, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> data = (torch.ones(5, 3), torch.zeros(5, 2))
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, data)
        >>> H.shape, lossray.Restricted(H, ["2.*"]).shape
        ((26, 26), (10, 10))
        >>> lossray.Restricted(H, ["2.bias"]) @ torch.eye(2)  # the mean is over examples and outputs
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, matrix: CurvatureMatrix, names: Iterable[str]) -> None:
        super().__init__(PackedRestricted(_packed(matrix), names))


def _diagonal(scale: Any) -> Tensor:
    try:
        return torch.as_tensor(scale)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"scale: found {type(scale).__name__}; allowed: a tensor or an array [d]") from error


def _packed(matrix: CurvatureMatrix) -> PointOperator:
    """The matrix as a pack of one member.

    Raises:
        StudyError: it is none of lossray's.
    """
    packed_of(matrix)  # which says what is allowed
    return matrix.packed
