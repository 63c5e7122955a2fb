"""PackedHessian against dense float64 Hessians by double backward, and against closed forms."""

import gc
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import Stack, build_stack
from lossray.operators.exact_products import exact_products
from lossray.operators.modes import choose_product_mode, retained_bytes
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.operators.product_count import PRODUCTS
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import Wanted

Batch = tuple[Tensor, Tensor]

CLASSES = 3
MODELS = {
    "linear": ({"name": "linear", "widths": [3]}, (1, 4, 4)),
    "mlp-relu": ({"name": "mlp", "widths": [6]}, (1, 3, 3)),
    "mlp-layer": ({"name": "mlp", "widths": [5], "activation": "tanh", "norm": "layer"}, (1, 3, 3)),
    "cnn": ({"name": "cnn", "channels": [2], "widths": [4], "kernel": 3, "activation": "gelu"}, (1, 4, 4)),
    "resnet-none": ({"name": "resnet", "depth": 8, "width": 1, "norm": "none"}, (1, 4, 4)),
    "resnet-group": ({"name": "resnet", "depth": 8, "width": 1, "norm": "group"}, (1, 4, 4)),
    "resnet-batch": ({"name": "resnet", "depth": 8, "width": 1, "norm": "batch"}, (1, 4, 4)),
    "vit": ({"name": "vit", "dim": 4, "depth": 1, "heads": 2, "patch": 2}, (1, 4, 4)),
}
Case = tuple[Stack, Tensor, dict[str, Tensor], list[Batch]]


def leading_pairs(operator: PackedHessian, k: int, **options: object) -> PackedEigenPairs:
    (pairs,) = packed_eigenpairs(operator, [Wanted("largest", k)], **options)  # type: ignore[arg-type]
    return pairs


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _build(name: str) -> nn.Module:
    table, shape = MODELS[name]
    return build_model(model_settings(table), shape, CLASSES)


def _data(shape: tuple[int, ...], sizes: tuple[int, ...], n_classes: int = CLASSES) -> list[Batch]:
    generator = _generator(5)
    return [
        (
            torch.randn(size, *shape, dtype=torch.float64, generator=generator),
            torch.randint(0, n_classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def _case(name: str, *, executor: str = "loop", members: int = 2, sizes: tuple[int, ...] = (7, 2)) -> Case:
    stack, theta, buffers = build_stack(
        lambda: _build(name), range(members), executor=executor, dtype=torch.float64
    )
    for key, tensor in buffers.items():  # running statistics that differ from the initial ones
        if tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape, dtype=torch.float64, generator=_generator(len(key))))
    return stack, theta, buffers, _data(MODELS[name][1], sizes)


def _joined(batches: list[Batch]) -> Batch:
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def _dense(case: Case, loss: str, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient [d] and Hessian [d, d] of member r by double backward through the plain model."""
    stack, theta, buffers, batches = case
    inputs, targets = _joined(batches)
    point = theta[r].clone().requires_grad_()
    weights = stack.layout.split(point)
    state = {**weights, **{name: tensor[r].clone() for name, tensor in buffers.items()}}
    value = get_loss(loss)(functional_call(stack.template.eval(), state, (inputs,)), targets)
    (gradient,) = torch.autograd.grad(value, point, create_graph=True)
    rows = [torch.autograd.grad(g, point, retain_graph=True, materialize_grads=True)[0] for g in gradient]
    return value.detach(), gradient.detach(), torch.stack(rows)


def _operator(case: Case, loss: str = "cross_entropy", *, mode: str = "retained") -> PackedHessian:
    stack, theta, buffers, batches = case
    return PackedHessian(
        PackedObjective(stack, theta, buffers, get_loss(loss), batches, dtype=torch.float64), mode=mode
    )


def _matrix(operator: PackedHessian) -> Tensor:
    """The dense matrices [R, d, d] column by column."""
    n_members, dim = operator.shape
    eye = torch.eye(dim, dtype=torch.float64)
    columns = [operator.apply(eye[i].expand(n_members, -1)) for i in range(dim)]
    return torch.stack(columns, dim=2)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_hessian(name: str, loss: str) -> None:
    case = _case(name)
    value, gradient, hessian = _dense(case, loss, 1)
    exact = torch.linalg.eigvalsh(hessian).flip(0)
    largest = exact.abs().max()
    for executor in ("loop", "vmap"):
        for mode in ("retained", "recompute"):
            operator = _operator((case[0].with_executor(executor), *case[1:]), loss, mode=mode)
            probe = torch.randn(operator.shape, dtype=torch.float64, generator=_generator(1))
            error = operator.apply(probe)[1] - hessian @ probe[1]
            assert operator.losses[1].item() == pytest.approx(value.item(), rel=1e-12)
            assert torch.allclose(operator.gradient[1], gradient, rtol=1e-9, atol=1e-12)
            assert error.abs().max() <= 1e-11 * largest * torch.linalg.vector_norm(probe[1]), (executor, mode)
    pairs = leading_pairs(_operator(case, loss), 5, seeds=[0, 1], tolerance=1e-9)
    assert pairs.converged.all()
    assert pairs.confirmed.all()
    assert torch.allclose(pairs.values[1], exact[:5], rtol=1e-8, atol=1e-8 * largest)
    nearest = (pairs.values[1, :, None] - exact).abs().amin(dim=1)
    assert (nearest <= pairs.residuals[1] + 1e-13 * largest).all()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_products(name: str, loss: str) -> None:
    stack, theta, buffers, batches = _case(name)
    hessian = _dense((stack, theta, buffers, batches), loss, 0)[2]
    exact = torch.linalg.eigvalsh(hessian).flip(0)
    operator = PackedHessian(PackedObjective(stack, theta, buffers, get_loss(loss), batches), mode="retained")
    assert operator.dtype == torch.float32
    assert operator.apply(theta).dtype == torch.float64
    pairs = leading_pairs(operator, 3, seeds=[0, 1], tolerance=1e-5)
    assert torch.allclose(pairs.values[0], exact[:3], rtol=1e-4, atol=1e-4 * exact.abs().max())
    # The residual certifies the float32 operator; `product_error` says how far that is from the exact one.
    vector = pairs.vectors[:, 0]
    error = operator.apply(vector)[0] - hessian @ vector[0]
    found = operator.product_error(vector)[0].item()
    assert found == pytest.approx(torch.linalg.vector_norm(error).item(), rel=1e-3, abs=1e-12)
    assert found < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("mode", ["retained", "recompute"])
def test_batches_count_by_their_examples(mode: str) -> None:
    """Batches of 5, 1 and 3 are the mean over 9 examples, not the mean of three means."""
    case = _case("mlp-relu", sizes=(5, 1, 3))
    split, whole = _operator(case, mode=mode), _operator((*case[:3], [_joined(case[3])]), mode=mode)
    probe = torch.randn(split.shape, dtype=torch.float64, generator=_generator(2))
    assert torch.allclose(split.apply(probe), whole.apply(probe), rtol=1e-10, atol=1e-13)
    assert torch.allclose(split.gradient, whole.gradient, rtol=1e-10, atol=1e-13)
    assert torch.allclose(split.losses, whole.losses, rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp-layer", "vit", "resnet-batch"])
def test_symmetric_and_the_derivative_of_the_gradient(name: str) -> None:
    stack, theta, buffers, batches = _case(name)
    case = (stack, theta, buffers, batches)
    operator = _operator(case)
    a, b = torch.randn(2, *operator.shape, dtype=torch.float64, generator=_generator(3))
    left, right = (a * operator.apply(b)).sum(dim=1), (b * operator.apply(a)).sum(dim=1)
    assert torch.allclose(left, right, rtol=1e-10, atol=1e-12)
    step = 1e-5
    ahead, behind = (_operator((stack, theta + s * a, buffers, batches)).gradient for s in (step, -step))
    assert torch.allclose((ahead - behind) / (2 * step), operator.apply(a), rtol=1e-5, atol=1e-6)


def test_products_count_each_member_and_each_vector() -> None:
    operator = _operator(_case("linear"))
    before = PRODUCTS.total
    operator.apply(torch.randn(operator.shape[0], 3, operator.shape[1]))
    operator.apply(torch.randn(operator.shape))
    assert PRODUCTS.total - before == 2 * (3 + 1)
    assert operator.matvecs == 3 + 1


def _softmax_regression(n_features: int, n_classes: int) -> tuple[PackedHessian, Tensor]:
    (inputs, targets), *_ = _data((n_features,), (40,), n_classes)
    build = lambda: nn.Linear(n_features, n_classes, bias=False)  # noqa: E731
    stack, theta, buffers = build_stack(build, [0, 1], executor="vmap", dtype=torch.float64)
    loss = get_loss("cross_entropy")
    batches = [(inputs, targets)]
    operator = PackedHessian(
        PackedObjective(stack, torch.zeros_like(theta), buffers, loss, batches, dtype=torch.float64),
        mode="retained",
    )
    return operator, inputs


def test_softmax_regression_spectrum() -> None:
    """Theory 2.9: eigenvalues of X'X/N over C, each C - 1 times, and d zeros."""
    n_features, n_classes = 6, 4
    operator, inputs = _softmax_regression(n_features, n_classes)
    covariance = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    expected = torch.cat([covariance.repeat_interleave(n_classes - 1) / n_classes, torch.zeros(n_features)])
    expected = expected.sort(descending=True).values
    for k in (4, 10, 24):
        pairs = leading_pairs(operator, k, seeds=[0, 1], tolerance=1e-10)
        assert torch.allclose(pairs.values, expected[:k].expand(2, -1), atol=1e-10)
        assert pairs.confirmed.all()


def test_softmax_shift_is_null() -> None:
    """Theory 2.2: equal shifts of all output biases, or of all output weights of one hidden unit."""
    case = _case("mlp-relu")
    stack = case[0]
    operator = _operator(case)
    scale = torch.linalg.matrix_norm(_matrix(operator), 2).max()
    hidden = stack.layout.shapes[stack.layout.names.index("output.weight")][1]
    for unit in [None, *range(hidden)]:
        zeros = {
            n: torch.zeros(2, *s, dtype=torch.float64)
            for n, s in zip(stack.layout.names, stack.layout.shapes, strict=True)
        }
        if unit is None:
            zeros["output.bias"][:] = 1
        else:
            zeros["output.weight"][:, :, unit] = 1
        shift = stack.layout.join(zeros)
        assert operator.apply(shift).abs().max() < 1e-14 * max(1.0, scale.item())
        assert (operator.gradient * shift).sum(dim=1).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("loss", "widths", "rank_inputs"),
    [("mse", (6,), 5), ("mse", (3,), 3), ("mse", (4, 3), 5), ("cross_entropy", (3,), 5)],
)
def test_linear_network_rank(loss: str, widths: tuple[int, ...], rank_inputs: int) -> None:
    """Theory 2.8: rank = 2 q M - L q^2 + q (r + k), k outputs (k - 1 for cross entropy)."""
    n_inputs, n_outputs = 5, 4
    generator = _generator(11)
    inputs = torch.randn(30, rank_inputs, dtype=torch.float64, generator=generator)
    inputs = inputs @ torch.randn(rank_inputs, n_inputs, dtype=torch.float64, generator=generator)
    targets: Tensor = torch.randint(0, n_outputs, (30,), generator=generator)
    if loss == "mse":
        targets = torch.randn(30, n_outputs, dtype=torch.float64, generator=generator)
    settings = model_settings({"name": "linear", "widths": list(widths)})
    build = lambda: build_model(settings, (n_inputs,), n_outputs)  # noqa: E731
    stack, theta, buffers = build_stack(build, [0, 1], executor="vmap", dtype=torch.float64)
    operator = PackedHessian(
        PackedObjective(stack, theta, buffers, get_loss(loss), [(inputs, targets)], dtype=torch.float64),
        mode="retained",
    )
    k = n_outputs - 1 if loss == "cross_entropy" else n_outputs
    q, layers = min(rank_inputs, k, *widths), len(widths) + 1
    expected = 2 * q * sum(widths) - layers * q**2 + q * (rank_inputs + k)
    for hessian in _matrix(operator):
        sizes = torch.linalg.eigvalsh((hessian + hessian.T) / 2).abs().sort(descending=True).values
        assert expected < len(sizes)
        assert sizes[expected - 1] > 1e-9 * sizes[0]
        assert sizes[expected] < 1e-13 * sizes[0]


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["mlp-relu", "cnn", "resnet-batch"])
@pytest.mark.parametrize("mode", ["retained", "recompute"])
def test_a_nan_member_is_isolated(name: str, executor: str, mode: str) -> None:
    case = _case(name, executor=executor, members=3)
    stack, theta, buffers, batches = case
    spoiled = theta.clone()
    spoiled[1, 0] = math.nan
    spoiled_buffers = {n: b.clone() for n, b in buffers.items()}
    for buffer in spoiled_buffers.values():
        if buffer.is_floating_point():
            buffer[1] = math.inf
    healthy = _operator(case, mode=mode)
    operator = _operator((stack, spoiled, spoiled_buffers, batches), mode=mode)
    probe = torch.randn(healthy.shape, dtype=torch.float64, generator=_generator(4))
    expected, found = healthy.apply(probe), operator.apply(probe)
    for r in (0, 2):
        assert torch.equal(found[r], expected[r])
        assert torch.equal(operator.gradient[r], healthy.gradient[r])
        assert torch.equal(operator.losses[r], healthy.losses[r])
    for rows in (found, operator.gradient, operator.losses):
        assert torch.isnan(rows[1]).all()


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("mode", ["retained", "recompute"])
def test_unused_parameters_give_zeros(executor: str, mode: str) -> None:
    stack, theta, buffers = build_stack(_Unused, [0, 1], executor=executor, dtype=torch.float64)
    operator = _operator((stack, theta, buffers, _data((4,), (6,))), mode=mode)
    product = stack.layout.split(operator.apply(torch.ones_like(theta)))
    assert product["used.weight"].abs().max() > 0
    assert product["unused.weight"].abs().max() == 0
    assert stack.layout.split(operator.gradient)["unused.bias"].abs().max() == 0


def test_a_loss_linear_in_the_parameters_has_no_curvature() -> None:
    stack, theta, buffers = build_stack(lambda: nn.Linear(4, 3), [0, 1], executor="vmap", dtype=torch.float64)
    loss = lambda outputs, targets: (outputs[:, 0] * targets).mean()  # noqa: E731
    for mode in ("retained", "recompute"):
        operator = PackedHessian(PackedObjective(stack, theta, buffers, loss, _data((4,), (6,))), mode=mode)  # type: ignore[arg-type]
        assert operator.gradient.abs().max() > 0
        assert torch.equal(operator.apply(theta), torch.zeros(theta.shape, dtype=torch.float64))


def test_the_fused_attention_kernel_is_replaced() -> None:
    """Fused attention has no second derivative: the products choose the math kernel, and only they."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 24)
            self.output = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x)[:, None].chunk(3, dim=-1)
            return self.output(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(dim=1))  # type: ignore[no-any-return]

    stack, theta, buffers = build_stack(Attention, [0, 1], executor="loop", dtype=torch.float64)
    case = (stack, theta, buffers, _data((5, 8), (6,)))
    fused = torch.backends.cuda.flash_sdp_enabled()
    operator = _operator(case, mode="recompute")
    probe = torch.randn(operator.shape, dtype=torch.float64, generator=_generator(6))
    step = 1e-5
    ahead, behind = (_operator((stack, theta + s * probe, buffers, case[3])).gradient for s in (step, -step))
    assert torch.allclose(operator.apply(probe), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    assert torch.backends.cuda.flash_sdp_enabled() == fused


@pytest.mark.parametrize("mode", ["retained", "recompute"])
def test_the_callers_tensors_are_left_alone(mode: str) -> None:
    stack, theta, buffers, batches = _case("resnet-batch")
    kept = theta.clone(), {name: tensor.clone() for name, tensor in buffers.items()}
    state = torch.get_rng_state()
    operator = _operator((stack, theta, buffers, batches), mode=mode)
    before = operator.apply(theta)
    assert torch.equal(theta, kept[0])
    assert not theta.requires_grad
    assert theta.grad is None
    assert all(torch.equal(buffers[name], tensor) for name, tensor in kept[1].items())
    assert all(parameter.grad is None for parameter in stack.template.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    theta.zero_()  # and training may go on while the operator is in use
    for tensor in buffers.values():
        tensor.zero_()
    assert torch.equal(operator.apply(kept[0]), before)
    assert operator.matvecs == 2


@pytest.mark.parametrize("mode", ["retained", "recompute"])
def test_memory_stays_flat(mode: str) -> None:
    """As many live tensors after hundreds of products as after the first few."""
    operator = _operator(_case("mlp-relu"), mode=mode)
    probe = torch.ones(operator.shape, dtype=torch.float64)

    def live(products: int) -> int:
        for _ in range(products):
            operator.apply(probe)
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    first = live(5)
    assert live(200) <= first


def test_precision_is_full_inside_and_restored_outside() -> None:
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        with exact_products():
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in places] == ["tf32", "tf32"]
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


@pytest.mark.parametrize("executor", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["mlp-relu", "cnn", "vit"])
def test_the_bytes_of_the_graph_are_estimated(name: str, executor: str) -> None:
    """Two small samples predict a large one; the rule follows from the prediction and a fixed limit."""
    stack, theta, buffers, batches = _case(name, executor=executor, sizes=(60,))
    loss = get_loss("cross_entropy")
    few = (batches[0][0][:3], batches[0][1][:3])
    estimate = retained_bytes(stack, theta, buffers, loss, few, n_examples=60, dtype=torch.float64)
    held: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _operator((stack, theta, buffers, batches))
    actual = sum(size for size, _ in held.values())
    assert estimate == pytest.approx(actual, rel=0.05)
    for limit, mode in ((estimate, "retained"), (estimate - 1, "recompute")):
        chosen = choose_product_mode(
            stack, theta, buffers, loss, few, n_examples=60, dtype=torch.float64, limit=limit
        )
        assert chosen == mode


def test_one_example_is_enough_to_choose() -> None:
    stack, theta, buffers, batches = _case("mlp-relu", sizes=(1,))
    loss = get_loss("cross_entropy")
    assert choose_product_mode(stack, theta, buffers, loss, batches[0], n_examples=1) == "retained"


def test_empty_data_and_unknown_modes_are_refused() -> None:
    stack, theta, buffers, batches = _case("mlp-relu")
    with pytest.raises(ValueError, match="at least one example"):
        _operator((stack, theta, buffers, []))
    with pytest.raises(ValueError, match="found 'fast'; allowed: auto, retained, linearized, recompute"):
        _operator((stack, theta, buffers, batches), mode="fast")
    inputs, targets = batches[0]
    with_empty = _operator((stack, theta, buffers, [(inputs, targets), (inputs[:0], targets[:0])]))
    assert np.isfinite(with_empty.losses.numpy()).all()  # an empty last batch counts for nothing
