"""Products with the Hessian of the loss, for R members at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossray.networks.stack import Loss, Stack

ProductMode = Literal["retained", "recompute"]
Batch = tuple[Tensor, Tensor]  # inputs [B, ...], targets [B, ...]

RETAINED_BYTES = 2**30  # largest graph that `choose_product_mode` keeps


class StackHessian:
    """The Hessians of R members' mean losses over one fixed set of examples, in eval mode.

    Twice differentiated backwards: the gradient of the *sum* over members, then the gradient of its product
    with the vectors. The Hessian of the sum is block-diagonal, so row r of a product belongs to member r
    alone. (vmap(grad) and torch.func.hessian are wrong for LayerNorm: SCIENCE 2.14.) Batches count by their
    number of examples; the kinks of ReLU count as flat (SCIENCE 4).

    A member with a parameter that is not finite takes no part: its losses, gradient and products are NaN.

    Args:
        stack: the architecture.
        theta: parameters [R, d]; copied.
        buffers: buffers by name, [R, *shape]; copied.
        loss: mean loss over the examples of a batch.
        batches: pairs (inputs, targets), of any sizes.
        mode: "retained" keeps the gradient's graph and pays one backward pass per product; "recompute" builds
            it anew for every batch and product, and holds one batch's graph at a time. `choose_product_mode`
            chooses.
        dtype: of the products; parameters, buffers and floating data are converted to it.

    Attributes:
        shape: (R, d).
        dtype: precision of the products.
        losses: mean loss of every member [R], float64.
        gradient: its gradient [R, d], float64.
        matvecs: products so far; each is one per member.
    """

    def __init__(
        self,
        stack: Stack,
        theta: Tensor,
        buffers: Mapping[str, Tensor],
        loss: Loss,
        batches: Sequence[Batch],
        *,
        mode: ProductMode,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if mode not in ("retained", "recompute"):
            raise ValueError(f"mode: found {mode!r}; allowed: retained, recompute")
        sizes = [len(targets) for _, targets in batches]
        if sum(sizes) == 0:
            raise ValueError("the curvature needs at least one example")
        self.stack, self.loss, self.mode, self.dtype = stack, loss, mode, dtype
        self.device = theta.device
        self.shape = (theta.shape[0], theta.shape[1])
        self.matvecs = 0
        self.dead = ~torch.isfinite(theta).all(dim=1)  # [R]
        values = theta.detach().to(dtype, copy=True).masked_fill_(self.dead[:, None], 0)
        self._theta = values.requires_grad_()
        self._buffers = {name: self._sound(tensor) for name, tensor in buffers.items()}
        self._batches = [
            (self._converted(inputs), self._converted(targets))
            for (inputs, targets), size in zip(batches, sizes, strict=True)
            if size
        ]
        self._weights = [size / sum(sizes) for size in sizes if size]
        self._graph: Tensor | None = None
        losses, gradient = self._differentiate()
        self.losses = self._masked(losses)
        self.gradient = self._masked(gradient)

    def apply(self, vectors: Tensor) -> Tensor:
        """Products of the members' Hessians with their vectors.

        Args:
            vectors: [R, d] or [R, b, d], any floating dtype.

        Returns:
            Of the same shape, float64.
        """
        if vectors.ndim == 3:
            return torch.stack([self.apply(column) for column in vectors.unbind(1)], dim=1)
        self.matvecs += 1
        vectors = vectors.to(device=self.device, dtype=self.dtype)
        with exact_products():
            if self._graph is not None:
                return self._masked(self._vector_product(self._graph, vectors, retain_graph=True))
            total = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
            for batch, weight in zip(self._batches, self._weights, strict=True):
                gradient = self._gradient_graph(self._weighted([batch], [weight]))
                total += self._vector_product(gradient, vectors, retain_graph=False)
            return self._masked(total)

    def product_error(self, vectors: Tensor) -> Tensor:
        """How far the products with ``vectors`` [R, d] are from those in float64, [R]."""
        exact = StackHessian(
            self.stack,
            self._theta.detach(),
            self._buffers,
            self.loss,
            self._batches,
            mode="recompute",
            dtype=torch.float64,
        )
        found = self.apply(vectors)
        return self._masked(torch.linalg.vector_norm(found - exact.apply(vectors), dim=1))

    def _differentiate(self) -> tuple[Tensor, Tensor]:
        """Losses [R] and gradient [R, d] in float64; keeps the gradient's graph in mode "retained"."""
        with exact_products():
            if self.mode == "retained":
                losses = self._weighted(self._batches, self._weights)
                self._graph = self._gradient_graph(losses)
                return losses.detach().double(), self._graph.detach().double()
            losses = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
            gradient = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
            for batch, weight in zip(self._batches, self._weights, strict=True):
                part = self._weighted([batch], [weight])
                losses += part.detach()
                gradient += torch.autograd.grad(part.sum(), self._theta)[0]
            return losses, gradient

    def _weighted(self, batches: Sequence[Batch], weights: Sequence[float]) -> Tensor:
        """Sum over batches of weight times mean loss, [R]."""
        parts = [
            weight * self.stack.losses(self._theta, self._buffers, inputs, targets, self.loss)
            for (inputs, targets), weight in zip(batches, weights, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    def _gradient_graph(self, losses: Tensor) -> Tensor:
        """Differentiable gradient [R, d]."""
        (gradient,) = torch.autograd.grad(losses.sum(), self._theta, create_graph=True)
        return gradient

    def _vector_product(self, gradient: Tensor, vectors: Tensor, *, retain_graph: bool) -> Tensor:
        """Derivative of ``gradient`` [R, d] along ``vectors``, float64."""
        if not gradient.requires_grad:  # the loss is linear in the parameters
            return torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        (product,) = torch.autograd.grad(
            gradient, self._theta, vectors, retain_graph=retain_graph, materialize_grads=True
        )
        return product.double()

    def _masked(self, values: Tensor) -> Tensor:
        """``values`` [R, ...] with NaN in the rows of dead members."""
        return values.masked_fill(self.dead.view(-1, *[1] * (values.ndim - 1)), float("nan"))

    def _sound(self, buffer: Tensor) -> Tensor:
        """A copy of ``buffer`` [R, *shape] in the dtype of the products, with ones for dead members."""
        dtype = self.dtype if buffer.is_floating_point() else buffer.dtype
        dead = self.dead.view(-1, *[1] * (buffer.ndim - 1))
        return buffer.detach().to(dtype, copy=True).masked_fill_(dead, 1)

    def _converted(self, data: Tensor) -> Tensor:
        return data.to(self.device, self.dtype if data.is_floating_point() else data.dtype)


def choose_product_mode(
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    batch: Batch,
    *,
    n_examples: int,
    dtype: torch.dtype = torch.float32,
    limit: int = RETAINED_BYTES,
) -> ProductMode:
    """The mode of a setting: "retained" where the gradient's graph over all examples fits ``limit`` bytes.

    A rule of shapes alone, with a fixed limit: every machine decides alike, and the answer can be frozen.

    Args:
        stack: the architecture.
        theta: parameters [R, d] of a pack of the size that will be analysed.
        buffers: buffers by name.
        loss: mean loss over the examples of a batch.
        batch: at least one example (inputs, targets); two are measured.
        n_examples: size of the analysis set.
        dtype: of the products.
        limit: bytes.
    """
    estimate = retained_bytes(stack, theta, buffers, loss, batch, n_examples=n_examples, dtype=dtype)
    return "retained" if estimate <= limit else "recompute"


def retained_bytes(
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    batch: Batch,
    *,
    n_examples: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Estimated bytes of the gradient's graph over ``n_examples``; arguments as in `choose_product_mode`.

    What autograd saves for the gradient of two and of four examples (repeats of the batch's first two),
    continued as a straight line.
    """

    def repeated(tensor: Tensor, n: int) -> Tensor:
        return tensor[torch.arange(n, device=tensor.device) % min(2, len(tensor))]

    two, four = (
        _saved_bytes(stack, theta, buffers, loss, (repeated(batch[0], n), repeated(batch[1], n)), dtype=dtype)
        for n in (2, 4)
    )
    return two + (four - two) * (n_examples - 2) // 2


def _saved_bytes(
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    batch: Batch,
    *,
    dtype: torch.dtype,
) -> int:
    """Bytes of the distinct storages that the retained graph of ``batch`` holds on to."""
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensors are held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        StackHessian(stack, theta, buffers, loss, [batch], mode="retained", dtype=dtype)
    return sum(size for size, _ in kept.values())


@contextmanager
def exact_products() -> Iterator[None]:
    """Full float32 products (no TF32, no bfloat16) and attention that can be differentiated twice."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    names = [(cuda, "matmul"), *((library, name) for library in (cudnn, mkldnn) for name in ("conv", "rnn"))]
    places = [getattr(library, name) for library, name in [*names, (mkldnn, "matmul")]]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
