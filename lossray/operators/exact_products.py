"""The numerical settings of torch under which products are formed: full precision, twice differentiable."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def exact_products(device: torch.device | str = "cpu", *, recurrent: bool = False) -> Iterator[None]:
    """Full float32 products (no TF32, bfloat16, autocast), and kernels that can be differentiated twice.

    Gradients are recorded inside even where the caller has switched that off. Everything is restored.

    Args:
        device: where the work runs, whose autocast is switched off.
        recurrent: whether the model has recurrent layers: cuDNN, whose kernels for these can be
            differentiated once at most, is then not used. Convolutions are faster with it.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    names = [(cuda, "matmul"), *((library, name) for library in (cudnn, mkldnn) for name in ("conv", "rnn"))]
    backends = [getattr(library, name) for library, name in [*names, (mkldnn, "matmul")]]
    before, with_cudnn = [backend.fp32_precision for backend in backends], cudnn.enabled
    autocast_off = torch.autocast(torch.device(device).type, enabled=False)
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        cudnn.enabled = with_cudnn and not recurrent
        with torch.enable_grad(), autocast_off, sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cudnn.enabled = with_cudnn
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
