"""Every public function and class on a model that lives on the GPU gives what it gives on the CPU."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossray
from lossray.storage.checkpoints import loads

CPU = torch.device("cpu")
WITHOUT_MODEL = {"__version__", "main", "open_study"}  # open_study: test_studies.py
USES: dict[str, Callable[["Scene"], dict[str, Any]]] = {}
SURFACES = ("eigenvectors", "gradient", "update", "random", "vectors", "three")
TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}  # of float64 after an eigensolve


@dataclass
class Scene:
    """A trained network of two layers, its optimizer and its data on one device.

    Attributes:
        device: where they are.
        folder: for what is written.
        rows: where the data are; the device unless said otherwise.
    """

    device: torch.device
    folder: Any
    rows: torch.device

    def __post_init__(self):
        self.data = tuple(tensor.to(self.rows) for tensor in examples())
        self.model, self.optimizer = self.trained(0)

    def trained(self, seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        inputs, targets = (tensor.to(self.device) for tensor in self.data)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        return model, optimizer

    @property
    def hessian(self):
        return lossray.Hessian(self.model, F.cross_entropy, self.data)

    def vector(self, seed=0):
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(51, generator=draw, dtype=torch.float64, device="cpu").to(self.device)


def examples():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 4, generator=draw, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (40,), generator=draw)


def use(function):
    """Registers how the public function of this name is used: what it finds, by name."""
    USES[function.__name__] = function
    return function


def state(scene):
    """All that a function must leave as it was."""
    tensors = {name: tensor.clone() for name, tensor in scene.model.state_dict().items()}
    tensors |= {f"grad {name}": p.grad.clone() for name, p in scene.model.named_parameters()}
    for i, entry in enumerate(scene.optimizer.state.values()):
        tensors |= {f"{i} {name}": value.clone() for name, value in entry.items()}
    return tensors


def projector(vectors):
    """Of the space of columns [d, k]: eigenvectors are known but for their signs."""
    return vectors @ vectors.T


# ---- the uses, in the order of the facade


def products(matrix, scene):
    columns = torch.stack([scene.vector()[: matrix.shape[0]], scene.vector(1)[: matrix.shape[0]]], dim=1)
    assert matrix.device == scene.device
    return {
        "product": matrix @ columns,
        "gradient": matrix.gradient,
        "loss": matrix.loss,
        "numpy": float((matrix @ columns.cpu().numpy())[0, 1]),
        "scipy": float((matrix.to_scipy() @ columns.cpu().numpy())[1, 0]),
    }


@use
def EmpiricalFisher(scene):
    return products(lossray.EmpiricalFisher(scene.model, F.cross_entropy, scene.data), scene)


@use
def GaussNewton(scene):
    return products(lossray.GaussNewton(scene.model, F.cross_entropy, scene.data), scene)


@use
def Hessian(scene):
    found = {}
    for mode in ("retained", "linearized", "recompute"):
        matrix = lossray.Hessian(scene.model, F.cross_entropy, scene.data, mode=mode)
        found |= {f"{mode} {name}": value for name, value in products(matrix, scene).items()}
        assert matrix.derivative_error < 1e-6
    return found


@use
def Preconditioned(scene):
    return products(lossray.Preconditioned(scene.hessian, scene.vector().abs() + 1), scene)


@use
def Restricted(scene):
    return products(lossray.Restricted(scene.hessian, ["2.*"]), scene)


@use
def Scaled(scene):
    return products(lossray.Scaled(scene.hessian, scene.vector().cpu().numpy()), scene)


@use
def align(scene):
    other, _ = scene.trained(1)
    found = {}
    for matching in ("weights", "activations"):
        for kind in ("both", "permutation", "scale"):
            model = lossray.align(scene.model, to=other, data=scene.data, kind=kind, matching=matching)
            found |= {f"{matching} {kind} {name}": p for name, p in model.named_parameters()}
    return found


@use
def analyse(scene):
    analysis = lossray.analyse(scene.hessian, top=3, tol=1e-9, probes=2, steps=8)
    assert len(analysis.to_frame()) == 1
    assert str(analysis)
    return {
        "values": analysis.pairs.values,
        "smallest": analysis.smallest.values,
        "vectors": projector(analysis.pairs.vectors),
        "ipr": analysis.ipr,
        "gradient": analysis.gradient,
        "trace": analysis.trace.value,
        "frobenius": analysis.frobenius.value,
        "nodes": analysis.density.nodes,
        "weights": analysis.density.weights,
    }


@use
def angles(scene):
    directions = {"gradient": [p.grad for p in scene.model.parameters()], "other": scene.vector()}
    gauges = ("raw", "balanced", "adaptive", "preconditioned")
    found = lossray.angles(
        scene.hessian, directions, k=(1, 3), gauges=gauges, optimizer=scene.optimizer, tol=1e-9
    )
    assert not found.notes
    return {"frame": found.to_frame()} | {gauge: found.pairs[gauge].values for gauge in gauges}


@use
def balance(scene):
    return dict(lossray.balance(scene.model, scene.data).named_parameters())


@use
def connect(scene):
    other, _ = scene.trained(1)
    found = {}
    for kind, options in (("bezier", {"steps": 5}), ("polychain", {"bends": 2, "steps": 5}), ("line", {})):
        path = lossray.connect(
            scene.model, other, F.cross_entropy, scene.data, kind, batch_size=16, **options
        )
        middle = dict(path.at(0.5).named_parameters())
        found |= {kind: path.evaluate(5), f"{kind} barrier": path.barrier}
        found |= {f"{kind} {name}": parameter for name, parameter in middle.items()}
    copy = lossray.rescale(scene.model, {"0": 2.0})
    return found | {
        "geometric": lossray.connect(scene.model, copy, F.cross_entropy, scene.data, "geometric").barrier
    }


@use
def degeneracy(scene):
    found = lossray.degeneracy(scene.hessian)
    return {
        "eigenvalues": found.eigenvalues,
        "rank": found.rank,
        "structural": found.structural_nullity,
        "excess": found.excess,
        "counts": len(found.to_frame()),
    }


@use
def directional_curvature(scene):
    found = lossray.directional_curvature(
        scene.hessian, {"one": scene.vector(), "other": scene.vector(1).cpu()}
    )
    return {"frame": found.to_frame(), "curvature": found.curvature["one"], "within": found.within["other"]}


@use
def eigenpairs(scene):
    found = {}
    for end in ("both", "magnitude"):
        pairs = lossray.eigenpairs(scene.hessian, k=3, end=end, tol=1e-10, relative_to="each", block=2)
        again = lossray.eigenpairs(scene.hessian, k=3, end=end, tol=1e-10, start=pairs.vectors)
        assert bool(pairs.converged.all())
        assert str(pairs)
        found |= {
            end: pairs.values,
            f"{end} vectors": projector(pairs.vectors),
            f"{end} again": again.values,
            f"{end} frame": len(pairs.to_frame()),
        }
    return found


@use
def record(scene):
    for step in (0, 3):
        lossray.record(scene.folder, scene.model, scene.optimizer, step, run="one")
        scene.optimizer.step()
    content = (scene.folder / "checkpoints" / "one" / "3.safetensors").read_bytes()
    checkpoint = loads(content, scene.device)
    return {**checkpoint.parameters, **checkpoint.optimizer}


@use
def rescale(scene):
    factors = torch.linspace(0.5, 3, 6, dtype=torch.float64, device=scene.device)
    return dict(lossray.rescale(scene.model, {"0": factors}, scene.data).named_parameters())


@use
def sharpness(scene):
    batches = [tuple(tensor[i : i + 10] for tensor in scene.data) for i in range(0, 40, 10)]
    return {
        "frame": lossray.sharpness(scene.hessian, scene.optimizer, minibatches=batches, tol=1e-9).to_frame()
    }


@use
def spectral_density(scene):
    density = lossray.spectral_density(scene.hessian, probes=2, steps=6)
    grid = density.on_grid(torch.linspace(-1, 2, 5, dtype=torch.float64), 0.1)
    return {"nodes": density.nodes, "weights": density.weights, "grid": grid, "frame": density.to_frame()}


@use
def structural_floor(scene):
    floor = lossray.structural_floor(scene.model, scene.data, F.cross_entropy)
    return {"dimension": floor.dimension, "complete": floor.complete, **floor.by_cause}


@use
def surface(scene):
    other, third = scene.trained(1)[0], scene.trained(2)[0]
    own = {
        "vectors": [scene.vector(), scene.vector(1).cpu()],
        "three": [scene.model, other, third.state_dict()],
    }
    found = {}
    for name in SURFACES:
        plane = lossray.surface(
            scene.model,
            F.cross_entropy,
            scene.data,
            own.get(name, name),
            points=3,
            optimizer=scene.optimizer if name == "update" else None,
        )
        assert str(plane)
        predicted = plane.quadratic(float(plane.loss[1, 1]))
        found |= {f"{name} loss": plane.to_frame(), f"{name} curvature": plane.curvature.abs()}
        found |= {f"{name} accuracy": plane.accuracy, f"{name} predicted": predicted}
    return found


@use
def trace(scene):
    estimate = lossray.trace(scene.hessian, matvecs=20)
    return {"value": estimate.value, "stderr": estimate.stderr, "exact": lossray.trace(scene.hessian).value}


@use
def trajectory(scene):
    course = lossray.trajectory([scene.trained(seed)[0] for seed in range(4)])
    return {"frame": course.to_frame(), "axes": course.axes.abs(), "coordinates": course.coordinates.abs()}


# ---- the tests

MADE_TO_BE_LOOKED_AT = {  # on the CPU wherever the model is
    ("trajectory", "coordinates"),
    *(("surface", f"{axes} {what}") for axes in SURFACES for what in ("accuracy", "curvature", "predicted")),
}


def test_every_public_name_is_tried_on_the_gpu():
    assert set(USES) | WITHOUT_MODEL == set(lossray.__all__)


def assert_close(found, expected, name):
    if isinstance(expected, Tensor):
        torch.testing.assert_close(
            found.cpu(), expected, **TOLERANCE, equal_nan=True, msg=lambda text: f"{name}: {text}"
        )
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, **TOLERANCE, obj=name)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), name
    else:
        assert found == expected, name


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """What each use finds on the CPU, where all is on the CPU."""
    return functools.cache(lambda name: USES[name](Scene(CPU, tmp_path_factory.mktemp(name), CPU)))


@pytest.mark.parametrize("name", USES)
def test_it_finds_what_it_finds_on_the_cpu(on_cpu, gpu, tmp_path, name):
    scene, expected = Scene(gpu, tmp_path, gpu), on_cpu(name)
    before = state(scene)
    found = USES[name](scene)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert_close(found[key], value, f"{name}, {key}")
        if isinstance(value, Tensor):
            assert found[key].device == (CPU if (name, key) in MADE_TO_BE_LOOKED_AT else gpu), key
    if name == "record":
        return  # its use steps the optimizer
    after = state(scene)
    for key, value in before.items():
        assert torch.equal(after[key], value), key
        assert after[key].device == value.device, key


@pytest.mark.parametrize("name", ["align", "analyse", "connect", "degeneracy", "rescale", "surface"])
@pytest.mark.parametrize("model_on_gpu", [True, False], ids=["model on the GPU", "data on the GPU"])
def test_data_may_be_elsewhere_than_the_model(on_cpu, gpu, tmp_path, name, model_on_gpu):
    scene = Scene(gpu if model_on_gpu else CPU, tmp_path, CPU if model_on_gpu else gpu)
    expected, found = on_cpu(name), USES[name](scene)
    for key, value in expected.items():
        assert_close(found[key], value, f"{name}, {key}")


@pytest.mark.parametrize("name", ["align", "analyse", "connect", "degeneracy", "sharpness", "surface"])
def test_a_default_device_changes_nothing(on_cpu, gpu, tmp_path, name):
    """As after `torch.set_default_device("cuda")`: what lossray draws and counts on the CPU stays there."""
    expected, scene = on_cpu(name), Scene(gpu, tmp_path, gpu)
    with torch.device("cuda"):
        found = USES[name](scene)
    for key, value in expected.items():
        assert_close(found[key], value, f"{name}, {key}")
