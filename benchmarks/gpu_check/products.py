"""Products with the Hessian: the three modes, two precisions, single vectors and blocks."""

import time
from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

import lossray
from benchmarks.devices import seconds_of, wait_for
from benchmarks.gpu_check.recorder import Recorder, Row
from benchmarks.problems import Problem, make_problem, setting_of
from benchmarks.reference import ExactHessian
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.seeds import generator

LARGE = "resnet-20, 32 x 32"
MODELS = ("mlp", "cnn", "resnet-20", "vit", LARGE)
SMALL_MODELS = ("tiny mlp", "tiny cnn")
MODES = ("retained", "recompute", "linearized")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
AGREEMENT = {"float32": 1e-3, "float64": 1e-8}  # of a product, over its norm
BLOCK = 16
IMAGES = 256
TITLE = "Products with the Hessian"
TEXT = f"""Models briefly trained on digits as in the section on curvature; "{LARGE}" is untrained,
on {IMAGES} random images of 32 x 32 with 3 channels. A block holds {BLOCK} vectors, each of which counts.
Medians (smallest to largest) of 5 repeats; "set-up" until the first product is there, the check of
the derivatives included. The error is that of one product, over its norm, against double backward in float64
on the CPU."""


def measure(record: Recorder) -> None:
    """All modes of one model after another."""
    models = SMALL_MODELS if record.small else MODELS
    cases = [(model, dtype, mode) for model in models for dtype in DTYPES for mode in MODES]
    record.each(cases, partial(_products, device=record.device))


def _products(case: tuple[str, str, str], *, device: torch.device) -> Iterator[Row]:
    name, dtype, mode = case
    problem = _problem(name).to(device)
    gradient = seconds_of(problem.gradient, device)
    vectors = _vectors(problem.dim).to(device, DTYPES[dtype])
    vector = vectors[:, 0].contiguous()
    clock = time.perf_counter()
    hessian = lossray.Hessian(
        problem.model, problem.loss, (problem.inputs, problem.targets), dtype=DTYPES[dtype], mode=mode
    )
    product = hessian @ vector
    wait_for(device)
    setup = time.perf_counter() - clock
    error = _error(product, _exact_product(name))
    single = seconds_of(lambda: hessian @ vector, device)
    block = seconds_of(lambda: hessian @ vectors, device)
    yield {
        "model": name,
        "d": problem.dim,
        "examples": len(problem.targets),
        "dtype": dtype,
        "mode": mode,
        "gradient, ms": [1e3 * seconds for seconds in gradient],
        "set-up, s": setup,
        "products/s": [1 / seconds for seconds in single],
        "products/s in blocks": [BLOCK / seconds for seconds in block],
        "error": error,
    }
    if not error < AGREEMENT[dtype]:
        raise SystemExit(f"the product is off by {error:.1e}")


@lru_cache(maxsize=1)
def _problem(name: str) -> Problem:
    """On the CPU."""
    if name != LARGE:
        return make_problem(setting_of(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(model_settings({"name": "resnet", "depth": 20}), (3, 32, 32), 10)
    inputs = torch.randn(IMAGES, 3, 32, 32, generator=generator(0, "images"))
    targets = torch.arange(IMAGES) % 10
    return Problem(name, model.eval(), inputs, targets, nn.CrossEntropyLoss(), dense=False)


def _vectors(dim: int) -> Tensor:
    return torch.randn(dim, BLOCK, generator=generator(0, "vectors"), dtype=torch.float64)


@lru_cache(maxsize=1)
def _exact_product(name: str) -> Tensor:
    problem = _problem(name)
    return ExactHessian(problem) @ _vectors(problem.dim)[:, 0]


def _error(product: Tensor, exact: Tensor) -> float:
    return float((product.double().cpu() - exact).norm() / exact.norm())
