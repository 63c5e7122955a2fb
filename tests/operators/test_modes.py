"""How products are formed: the rule, the pieces of a batch, the linearised mode and its self-check."""

import gc
import os

import psutil
import pytest
import torch
from torch import Tensor, nn

import lossray
from lossray.errors import ResourceError
from lossray.limits import Limits
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.operators import modes
from lossray.operators.modes import CACHED_BYTES, PIECE_EXAMPLES, graph_bytes, plan_products
from lossray.operators.modules import ModuleObjective
from lossray.operators.objectives import Batch, PackedObjective
from lossray.operators.packed import PackedFisher, PackedGaussNewton, PackedHessian
from lossray.operators.products import hessian_piece

KINDS = [PackedHessian, PackedGaussNewton, PackedFisher]
CROSS_ENTROPY = get_loss("cross_entropy")


def _data(
    n: int, shape: tuple[int, ...] = (1, 4, 4), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(n, *shape, dtype=dtype, generator=generator)
    return inputs, torch.randint(0, 3, (n,), generator=generator)


def _model(table: dict[str, object]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(model_settings(table), (1, 4, 4), 3)


def _objective(table: dict[str, object], n: int = 12, dtype: torch.dtype = torch.float64) -> PackedObjective:
    stack, theta, buffers = build_stack(lambda: _model(table), [0, 1], executor="loop", dtype=torch.float64)
    return PackedObjective(stack, theta, buffers, CROSS_ENTROPY, [_data(n)], dtype=dtype)


MLP = {"name": "mlp", "widths": [6]}
CNN = {"name": "cnn", "channels": [2], "widths": [4], "kernel": 3}
VIT = {"name": "vit", "dim": 4, "depth": 1, "heads": 2, "patch": 2}


@pytest.mark.parametrize(
    ("table", "kind"),
    [(MLP, PackedHessian), (CNN, PackedHessian), (MLP, PackedGaussNewton), (CNN, PackedFisher)],
    ids=["mlp-hessian", "cnn-hessian", "mlp-ggn", "cnn-fisher"],
)
def test_linearized_products_are_those_of_double_backward(table: dict[str, object], kind: type) -> None:
    objective = _objective(table)
    plain, linearized = kind(objective, mode="recompute"), kind(objective, mode="linearized")
    assert linearized.mode == "linearized"
    probe = torch.randn(plain.shape, dtype=torch.float64)
    expected = plain.apply(probe)
    assert torch.linalg.vector_norm(linearized.apply(probe) - expected) < 1e-11 * torch.linalg.vector_norm(
        expected
    )
    assert torch.allclose(linearized.gradient, plain.gradient, rtol=1e-11, atol=1e-14)


class _Plain(torch.autograd.Function):
    """A square in the old style, which torch.func refuses."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x**2

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * slope


class _Powers(nn.Module):
    """A linear layer and a function of its outputs."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.layer(x.flatten(1)))  # type: ignore[no-any-return,no-untyped-call]


class _DetachedTangent(torch.autograd.Function):
    """A cube whose derivative for forward mode is wrong, as that of a library may be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)  # type: ignore[attr-defined]
        ctx.save_for_forward(*inputs)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 3 * x**2 * slope

    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x**2 * tangent


@pytest.mark.parametrize("function", [_Plain, _DetachedTangent], ids=["fails", "disagrees"])
@pytest.mark.parametrize("matrix", [lossray.GaussNewton, lossray.EmpiricalFisher])
def test_where_linearizing_does_not_work_double_backward_takes_over(
    function: type[torch.autograd.Function], matrix: type
) -> None:
    model, data = _Powers(function).double(), _data(12)
    fallen = matrix(model, CROSS_ENTROPY, data, mode="linearized")
    assert fallen.mode == "retained"
    probe = torch.randn(fallen.shape[0], dtype=torch.float64)
    assert torch.equal(fallen @ probe, matrix(model, CROSS_ENTROPY, data, mode="retained") @ probe)


def test_auto_is_retained_up_to_a_fixed_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = _objective(MLP)
    needed = graph_bytes(objective, next(objective.batches()), hessian_piece).of(12)
    for limit, mode in ((needed, "retained"), (needed - 1, "recompute")):
        monkeypatch.setattr(modes, "RETAINED_BYTES", limit)
        assert plan_products(objective, "auto", hessian_piece).mode == mode
        assert PackedHessian(objective).mode == mode


def test_large_batches_are_split_where_the_cache_favours_it() -> None:
    """ViT: some kB an example; the graph of 600 examples exceeds the cache, that of 10 does not."""
    for n, piece in ((10, None), (600, PIECE_EXAMPLES)):
        objective = _objective(VIT, n=n)
        cost = graph_bytes(objective, next(objective.batches()), hessian_piece)
        assert (cost.example * n > CACHED_BYTES) == (piece is not None)
        assert plan_products(objective, "retained", hessian_piece).piece == piece


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["retained", "recompute"])
def test_split_batches_give_the_same_mean(kind: type, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kind(_objective(CNN, n=11), mode=mode)
    monkeypatch.setattr(modes, "CACHED_BYTES", 0)
    monkeypatch.setattr(modes, "PIECE_EXAMPLES", 4)
    split = kind(_objective(CNN, n=11), mode=mode)
    probe = torch.randn(whole.shape, dtype=torch.float64)
    assert not torch.equal(split.apply(probe), whole.apply(probe))  # other sums: it was split
    assert torch.allclose(split.apply(probe), whole.apply(probe), rtol=1e-10, atol=1e-13)
    assert torch.allclose(split.losses, whole.losses, rtol=1e-13)
    assert torch.allclose(split.gradient, whole.gradient, rtol=1e-10, atol=1e-13)


def test_what_mixes_its_examples_is_never_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "CACHED_BYTES", 0)
    monkeypatch.setattr(modes, "PIECE_EXAMPLES", 4)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    total = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="sum")  # noqa: E731
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    inputs, targets = _data(11)
    for model, loss, train in ((normed, CROSS_ENTROPY, True), (plain, total, False)):
        objective = ModuleObjective(model, loss, (inputs, targets), train=train)
        assert plan_products(objective, "auto", hessian_piece).piece is None
        value = loss(model.train(train)(inputs), targets).item()
        assert PackedHessian(objective).losses.item() == pytest.approx(value, rel=1e-12)


def test_parts_of_a_batch_are_even_and_share_its_share() -> None:
    weights = torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 0.0])
    parts = Batch(torch.arange(7), torch.arange(7), 0.5, weights).split(3)
    # Of 2, 2 and 3 examples, the middle one weighs nothing.
    assert [part.inputs.tolist() for part in parts] == [[0, 1], [4, 5, 6]]
    assert [part.share for part in parts] == pytest.approx([0.15, 0.35])
    whole = Batch(torch.arange(7), torch.arange(7), 0.5)
    assert [part.share for part in whole.split(3)] == pytest.approx([1 / 7, 1 / 7, 1.5 / 7])
    assert whole.split(None) == [whole]
    assert len(whole.split(7)) == 1


def test_what_does_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossray.memory.available_bytes", lambda device: 2000)
    objective = _objective(MLP, n=40)
    with pytest.raises(ResourceError, match=r"mode 'retained' needs about .* mode='recompute' needs about"):
        PackedHessian(objective, mode="retained")
    with pytest.raises(ResourceError, match=r"the graph of one batch needs about .* examples would fit"):
        PackedHessian(objective, mode="recompute")
    closure = lambda model, batch: (CROSS_ENTROPY(model(batch[0]), batch[1]), 1.0)  # noqa: E731
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    with pytest.raises(ResourceError, match="smaller batches would fit"):
        lossray.Hessian(model, closure=closure, data=[_data(200)], mode="recompute")


@pytest.mark.parametrize("mode", ["retained", "recompute"])
def test_a_thousand_products_leave_nothing_behind(mode: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 300)).double()
    operator = PackedHessian(ModuleObjective(model, CROSS_ENTROPY, _data(12)), mode=mode)
    probe = torch.ones(operator.shape, dtype=torch.float64)
    process = psutil.Process(os.getpid())

    def held(products: int) -> tuple[int, int]:
        for _ in range(products):
            operator.apply(probe)
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()), process.memory_info().rss

    tensors, memory = held(50)
    tensors_after, memory_after = held(1000)
    assert tensors_after <= tensors
    assert memory_after - memory < 1000 * operator.shape[1] * 8  # not even one vector for each product


@pytest.mark.parametrize("kind", KINDS)
def test_where_memory_has_run_out_fewer_examples_are_held_and_products_are_the_same(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share counts for the bytes that are kept, whatever mode was frozen."""
    objective = _objective(MLP, n=40)
    expected = kind(objective, mode="retained")
    whole = graph_bytes(objective, next(objective.batches()), kind.make_piece).of(40)
    monkeypatch.setattr(modes, "RETAINED_BYTES", whole)
    objective.stack = objective.stack.limited(Limits(share=0.25))
    plan = plan_products(objective, "retained", kind.make_piece)
    assert plan.mode == "recompute"
    assert plan.piece is not None
    assert plan.piece < 12
    probe = torch.randn(expected.shape, dtype=torch.float64)
    actual = kind(objective, mode="retained")
    torch.testing.assert_close(actual.apply(probe), expected.apply(probe), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-12, atol=0)
