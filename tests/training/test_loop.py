"""The training loop: packs against solo runs, divergence, exact resume, conservation (theory 2.4)."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import Stack, build_stack
from lossray.seeds import stream
from lossray.storage.checkpoints import Checkpoint, dumps, loads
from lossray.training import batches
from lossray.training.datasets import Dataset, Split
from lossray.training.evaluation import evaluate_split
from lossray.training.loop import batch_indices, next_minibatch, step_gradient, train
from lossray.training.optimizers import PackedOptimizer
from lossray.training.schedules import learning_rate
from lossray.training.settings import TrainingSettings, checkpoint_steps
from lossray.training.steps import all_finite
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings

SEEDS = (3, 5, 8)
MLP = {"name": "mlp", "widths": [6]}
NOISY_MLP = {"name": "mlp", "widths": [8, 6], "norm": "batch", "dropout": 0.3}
RESNET = {"name": "resnet", "depth": 8, "width": 2}


def make_data(*, dtype: torch.dtype = torch.float64, n: int = 26) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> Split:
        inputs = torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64)
        return Split(inputs.to(dtype), torch.randint(0, 3, (size,), generator=generator))

    return Dataset(split(n), split(7), split(9), n_outputs=3, fingerprint="", input_shape=(1, 4, 4))


DATA = make_data()


def make_stack(
    table: dict[str, object],
    seeds: tuple[int, ...],
    executor: str = "vmap",
    dtype: torch.dtype = torch.float64,
) -> tuple[Stack, Tensor, dict[str, Tensor]]:
    settings = model_settings(table)
    return build_stack(lambda: build_model(settings, (1, 4, 4), 3), seeds, executor=executor, dtype=dtype)


def run(
    table: dict[str, object],
    optimizer: dict[str, object],
    training: dict[str, object],
    *,
    seeds: tuple[int, ...] = SEEDS,
    executor: str = "vmap",
    data: Dataset = DATA,
    resume: Checkpoint | None = None,
    poison: int | None = None,
) -> Iterator[Checkpoint]:
    dtype = data.train.inputs.dtype
    stack, theta, buffers = make_stack(table, seeds, executor, dtype)
    if poison is not None:
        theta[poison, 7] = torch.nan
    return train(
        stack,
        theta,
        buffers,
        optimizer_settings(optimizer),
        TrainingSettings(**{"steps": 4, "batch_size": 8, "log_every": 1, "dtype": "float64", **training}),
        data,
        pack_id="p",
        seeds=seeds,
        resume=resume,
    )


def tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by a flat name."""
    groups = ("parameters", "buffers", "optimizer", "evaluation", "log")
    flat = {f"{g}/{name}": value for g in groups for name, value in getattr(checkpoint, g).items()}
    return flat | {name: getattr(checkpoint, name) for name in ("alive", "diverged_at", "initial_loss")}


def member_of(checkpoint: Checkpoint, member: int | list[int]) -> dict[str, Tensor]:
    """What belongs to some members: rows, and columns of the log; what members share stays."""
    own = {}
    for name, value in tensors(checkpoint).items():
        if name.startswith("log/") and value.ndim == 2:
            own[name] = value[:, member]
        else:
            own[name] = value if value.ndim == 0 or name.startswith("log/") else value[member]
    return own


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


# ---- packs and solo runs


def assert_pack_is_solo_runs(
    table: dict[str, object], optimizer: dict[str, object], training: dict[str, object], executor: str
) -> None:
    pack = list(run(table, optimizer, training, executor=executor))
    for member, seed in enumerate(SEEDS):
        solo = list(run(table, optimizer, training, seeds=(seed,), executor="loop"))
        assert [c.step for c in solo] == [c.step for c in pack]
        for together, alone in zip(pack, solo, strict=True):
            expected = member_of(alone, 0)
            for name, value in member_of(together, member).items():
                torch.testing.assert_close(
                    value,
                    expected[name],
                    rtol=1e-9,
                    atol=1e-11,
                    equal_nan=True,
                    msg=f"{name} {together.step}",
                )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pack_equals_solo_runs_for_every_optimizer(name: str) -> None:
    optimizer = {"name": name, "weight_decay": 0.01, "schedule": "cosine"}
    assert_pack_is_solo_runs(MLP, optimizer, {"steps": 7, "checkpoints": {"count": 3}}, "vmap")


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize(
    "optimizer", [{"name": "momentum", "lr": 0.02}, {"name": "adam"}], ids=["momentum", "adam"]
)
@pytest.mark.parametrize(
    "table",
    [
        {"name": "linear", "widths": [5]},
        {"name": "mlp", "widths": [8], "norm": "layer"},
        {"name": "cnn", "channels": [2, 3], "kernel": 3, "widths": [6]},
        RESNET,
        {"name": "vit", "dim": 8, "depth": 1, "heads": 2},
    ],
    ids=lambda table: table["name"],
)
def test_pack_equals_solo_runs_for_every_model(
    table: dict[str, object], optimizer: dict[str, object], executor: str
) -> None:
    assert_pack_is_solo_runs(table, optimizer, {"steps": 3, "checkpoints": {"steps": []}}, executor)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_dropout_and_batch_norm_are_per_member(executor: str) -> None:
    assert_pack_is_solo_runs(NOISY_MLP, {"name": "adam"}, {}, executor)


@pytest.mark.parametrize("batch_size", ["full", 26, 1000])
def test_full_batch_packs_equal_solo_runs(batch_size: object) -> None:
    assert_pack_is_solo_runs(MLP, {"name": "sgd"}, {"batch_size": batch_size, "steps": 3}, "vmap")


@pytest.mark.parametrize("table", [MLP, NOISY_MLP], ids=["mlp", "noisy"])
def test_training_equals_a_plain_loop(table: dict[str, object]) -> None:
    """One member against what one would write by hand with nn.Module and torch.optim."""
    seed = 5
    (*_, last) = run(table, {"name": "momentum", "weight_decay": 0.1}, {"steps": 9}, seeds=(seed,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "initialisation"))
        model = build_model(model_settings(table), (1, 4, 4), 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    masks: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.forward = lambda x: x * masks.pop(0) if masks else x  # type: ignore[method-assign]
    for step in range(9):
        indices = batch_indices(seed, step, 26, 8)
        noise = torch.Generator().manual_seed(stream(seed, "noise", step))
        masks[:] = [torch.empty(8, width).bernoulli_(0.7, generator=noise).double() / 0.7 for width in (8, 6)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(DATA.train.inputs[indices]), DATA.train.targets[indices])
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(last.parameters[name][0], parameter.detach(), rtol=1e-9, atol=1e-11)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(last.buffers[name][0], buffer, rtol=1e-9, atol=1e-11)
    model.eval()
    outputs = model(DATA.test.inputs)
    accuracy = (outputs.argmax(1) == DATA.test.targets).double().mean()
    torch.testing.assert_close(last.evaluation["test_accuracy"][0], accuracy)
    loss = nn.functional.cross_entropy(outputs, DATA.test.targets)
    torch.testing.assert_close(last.evaluation["test_loss"][0], loss.detach(), rtol=1e-9, atol=0)


# ---- data order


def test_batches_are_epochs_without_repetition() -> None:
    n, size = 26, 8  # 3 batches an epoch, 2 examples left over
    for epoch in range(2):
        seen = torch.cat([batch_indices(7, 3 * epoch + batch, n, size) for batch in range(3)])
        assert len(seen.unique()) == 24
    orders = [batch_indices(seed, step, n, size).tolist() for seed in (7, 8) for step in range(6)]
    assert len({tuple(order) for order in orders}) == 12
    assert torch.equal(batch_indices(7, 5, n, "full"), torch.arange(n))
    assert torch.equal(batch_indices(7, 5, n, n), torch.arange(n))


def test_order_and_initialisation_depend_on_the_seed_alone() -> None:
    training = TrainingSettings(batch_size=8)
    for step in (0, 4, 2, 40):
        together = next_minibatch(DATA, training, (1, 2, 3), step)
        alone = next_minibatch(DATA, training, (2,), step)
        assert together.per_member
        assert torch.equal(together.inputs[1], alone.inputs[0])
        assert torch.equal(together.targets[1], DATA.train.targets[batch_indices(2, step, 26, 8)])
    first = next(run(MLP, {"name": "sgd"}, {}, seeds=(1, 2, 3)))
    other = next(run(MLP, {"name": "sgd"}, {}, seeds=(9, 2)))
    for name, value in first.parameters.items():
        assert torch.equal(value[1], other.parameters[name][1])


# ---- divergence


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("table", [MLP, NOISY_MLP, RESNET], ids=["mlp", "noisy", "resnet"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "muon"])
def test_poisoned_parameters_leave_the_others_bit_identical(
    optimizer: str, table: dict[str, object], executor: str
) -> None:
    plain = run(table, {"name": optimizer}, {}, executor=executor)
    poisoned = run(table, {"name": optimizer}, {}, executor=executor, poison=1)
    for sound, sick in zip(plain, poisoned, strict=True):
        assert_identical(member_of(sick, [0, 2]), member_of(sound, [0, 2]))
        assert sick.alive.tolist() == [True, False, True]
        assert sick.diverged_at.tolist() == [-1, 0, -1]
        assert all(bool(value[1].isnan()) for value in sick.evaluation.values())
        assert all(bool(v[:, 1].isnan().all()) for v in sick.log.values() if v.ndim == 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_poisoned_data_leave_the_others_bit_identical(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 6, "checkpoints": {"count": 7, "spacing": "linear"}}
    sound = list(run(NOISY_MLP, {"name": optimizer}, training))
    original = batches.next_minibatch

    def poisoned(data: Dataset, training: TrainingSettings, seeds: tuple[int, ...], step: int) -> object:
        batch = original(data, training, seeds, step)
        if step == 2:
            batch.inputs[1, 3] = torch.nan  # the batch is a copy
        return batch

    monkeypatch.setattr("lossray.training.steps.next_minibatch", poisoned)
    sick = list(run(NOISY_MLP, {"name": optimizer}, training))
    for before, after in zip(sound, sick, strict=True):
        assert_identical(member_of(after, [0, 2]), member_of(before, [0, 2]))
    assert sick[2].alive.all()
    assert [c.diverged_at[1] for c in sick[3:]] == [2] * 4
    frozen = tensors(sick[2])
    for name, value in tensors(sick[-1]).items():  # at step 2: parameters, batch norm, optimizer
        if name.split("/")[0] in ("parameters", "buffers", "optimizer") and value.ndim > 0:
            assert torch.equal(value[1], frozen[name][1]), name
    assert sick[3].log["train_loss"].isnan().tolist() == [[False, True, False]]


def linear_regression_diverges(lr: float, diverged_above: float, dtype: torch.dtype) -> list[Checkpoint]:
    data = make_data(dtype=dtype)
    training = {
        "loss": "mse",
        "steps": 60,
        "batch_size": "full",
        "diverged_above": diverged_above,
        "checkpoints": {"count": 61, "spacing": "linear"},
    }
    return list(run({"name": "linear", "widths": []}, {"name": "sgd", "lr": lr}, training, data=data))


def test_divergence_by_threshold_is_recorded_with_its_step() -> None:
    checkpoints = linear_regression_diverges(2.0, 100.0, torch.float64)
    initial = checkpoints[0].evaluation["train_loss"]
    assert torch.equal(checkpoints[-1].initial_loss, initial)
    # Without a limit, to see the losses: the first above 100 times the initial one.
    free = linear_regression_diverges(2.0, 1e300, torch.float64)
    losses = torch.stack([c.evaluation["train_loss"] for c in free])
    first = (losses > 100 * initial).int().argmax(dim=0)
    assert bool((first > 1).all())
    assert torch.equal(checkpoints[-1].diverged_at, first)
    for member, step in enumerate(first.tolist()):
        assert not checkpoints[step].alive[member]
        assert checkpoints[step - 1].alive[member]
        frozen = checkpoints[step].parameters["output.weight"][member]
        assert torch.equal(frozen, free[step].parameters["output.weight"][member])
        assert torch.equal(frozen, checkpoints[-1].parameters["output.weight"][member])


def test_divergence_by_non_finite_values_freezes_finite_parameters() -> None:
    checkpoints = linear_regression_diverges(1e12, 1e300, torch.float32)
    last = checkpoints[-1]
    assert [c.step for c in checkpoints] == list(range(61))  # all of them, though nobody is left
    assert not last.alive.any()
    assert bool((last.diverged_at > 0).all())
    assert bool((last.diverged_at < 10).all())
    for name, value in last.parameters.items():
        assert bool(value.isfinite().all())
        assert torch.equal(value, checkpoints[10].parameters[name])
    assert all(bool(value.isnan().all()) for value in last.evaluation.values())
    assert last.log["step"].tolist() == [59, 60]
    assert bool(last.log["train_loss"].isnan().all())


def test_a_loss_that_starts_negative_diverges_only_where_it_is_not_finite(monkeypatch) -> None:
    def shifted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets) - 5.0

    training = {"steps": 20, "checkpoints": {"steps": []}}
    plain = list(run(MLP, {"name": "sgd", "lr": 1.0}, training))[-1]
    monkeypatch.setattr("lossray.training.loop.get_loss", lambda name: shifted)
    first, last = run(MLP, {"name": "sgd", "lr": 1.0}, training)
    assert bool((first.evaluation["train_loss"] < 0).all())
    assert last.diverged_at.tolist() == [-1, -1, -1]
    for name, value in plain.parameters.items():
        torch.testing.assert_close(last.parameters[name], value)
    (*_, lost) = run(MLP, {"name": "sgd", "lr": 1e18}, training)
    assert bool((lost.diverged_at > 0).all())


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    large = torch.full((3, 4), 3e38)
    large[1, 2] = float("inf")
    large[2, 0] = float("nan")
    assert all_finite(large).tolist() == [True, False, False]
    assert all_finite(large[:1]).tolist() == [True]


def test_parameters_that_overflow_freeze_the_last_finite_ones() -> None:
    """Loss and gradient are finite, but the update from step 0 to step 1 overflows."""
    data = make_data(dtype=torch.float32)
    data.train.inputs.mul_(1e25)
    training = {"steps": 2, "diverged_above": 1e30, "checkpoints": {"steps": [1]}}
    first, second, last = run(MLP, {"name": "sgd", "lr": 1e18}, training, data=data)
    assert last.diverged_at.tolist() == [1, 1, 1]
    for name, value in first.parameters.items():
        assert torch.equal(last.parameters[name], value)
        assert torch.equal(second.parameters[name], value)


# ---- the conservation law


def test_conservation_law_along_sgd() -> None:
    """Theory 2.4, from the steps as recorded: C_j = |w_j|^2 + b_j^2 - |u_j|^2 of every hidden unit."""
    lr, decay, steps = 0.2, 0.05, 12
    table = {"name": "mlp", "widths": [7], "activation": "relu"}
    training = TrainingSettings(steps=steps, batch_size=8, dtype="float64")
    every = {"steps": steps, "checkpoints": {"count": steps + 1, "spacing": "linear"}}
    checkpoints = list(run(table, {"name": "sgd", "lr": lr, "weight_decay": decay}, every))
    stack, _, _ = make_stack(table, SEEDS)

    def difference(tensors: dict[str, Tensor]) -> Tensor:
        inward = tensors["hidden1.weight"].square().sum(2) + tensors["hidden1.bias"].square()
        return inward - tensors["output.weight"].square().sum(1)

    for here, there in pairwise(checkpoints):
        theta = stack.layout.join(here.parameters)
        loss = get_loss("cross_entropy")
        losses, gradient = step_gradient(stack, theta, here.buffers, loss, DATA, training, SEEDS, here.step)
        expected = (1 - lr * decay) ** 2 * difference(here.parameters)
        expected += lr**2 * difference(stack.layout.split(gradient))
        torch.testing.assert_close(difference(there.parameters), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(there.log["train_loss"][0], losses)
    moved = difference(checkpoints[-1].parameters) - difference(checkpoints[0].parameters)
    assert bool((moved.abs() > 1e-3).any())


# ---- resume


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_bit_exact(optimizer: str, executor: str) -> None:
    """From every checkpoint, through its bytes, with dropout, batch norm, a schedule and a dead member."""
    data = make_data(dtype=torch.float32)
    table = {"name": optimizer, "schedule": "cosine", "weight_decay": 0.01}
    training = {"steps": 9, "checkpoints": {"steps": [2, 5]}, "dtype": "float32"}
    undisturbed = list(run(NOISY_MLP, table, training, data=data, executor=executor, poison=0))
    for i, start in enumerate(undisturbed):
        resumed = list(
            run(NOISY_MLP, table, training, data=data, executor=executor, resume=loads(dumps(start)))
        )
        assert [c.step for c in resumed] == [c.step for c in undisturbed[i + 1 :]]
        for again, before in zip(resumed, undisturbed[i + 1 :], strict=True):
            assert_identical(tensors(again), tensors(before))


def test_resume_at_a_step_that_is_no_checkpoint() -> None:
    start = list(run(NOISY_MLP, {"name": "adam"}, {"steps": 9, "checkpoints": {"steps": [4]}}))[1]
    plan = {"steps": 9, "checkpoints": {"steps": [7]}}
    expected = list(run(NOISY_MLP, {"name": "adam"}, plan))
    resumed = list(run(NOISY_MLP, {"name": "adam"}, plan, resume=start))
    assert [c.step for c in resumed] == [7, 9]
    for again, before in zip(resumed, expected[1:], strict=True):
        for name, value in before.parameters.items():
            assert torch.equal(again.parameters[name], value)


def test_resume_refuses_another_pack() -> None:
    start = next(run(MLP, {"name": "sgd"}, {}))
    with pytest.raises(ValueError, match="cannot resume pack p"):
        next(run(MLP, {"name": "sgd"}, {}, seeds=(3, 5, 9), resume=start))


# ---- what a step was, recomputed


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "muon"])
def test_step_gradient_and_virtual_update_recompute_the_step(optimizer: str) -> None:
    """From a checkpoint alone: the minibatch gradient and the update that training went on to make."""
    training = TrainingSettings(steps=6, batch_size=8, dtype="float64")
    table = {"name": optimizer, "schedule": "step", "milestones": [0.3], "weight_decay": 0.1}
    every = {"steps": 6, "checkpoints": {"count": 7, "spacing": "linear"}}
    checkpoints = list(run(NOISY_MLP, table, every))
    stack, _, _ = make_stack(NOISY_MLP, SEEDS)
    settings, loss = optimizer_settings(table), get_loss("cross_entropy")
    for here, there in pairwise(checkpoints):
        theta = stack.layout.join(here.parameters)
        kept = {name: value.clone() for name, value in tensors(here).items()}
        losses, gradient = step_gradient(stack, theta, here.buffers, loss, DATA, training, SEEDS, here.step)
        runner = PackedOptimizer(settings, theta, stack.layout)
        runner.load_state(here.optimizer)
        lr = learning_rate(settings, here.step, training.steps)
        update = runner.virtual_update(gradient, lr)
        assert_identical(tensors(here), kept)
        assert torch.equal(stack.layout.join(there.parameters) - theta, update)
        assert torch.equal(there.log["train_loss"][0], losses)
        assert torch.equal(there.log["gradient_norm"][0], gradient.norm(dim=1))
        torch.testing.assert_close(there.log["update_norm"][0], update.norm(dim=1), rtol=1e-12, atol=0)
        assert there.log["lr"][0] == lr
    assert not gradient.requires_grad
    assert not losses.requires_grad


def test_rows_of_the_log() -> None:
    training = {"steps": 12, "log_every": 5, "checkpoints": {"steps": [7]}}
    first, middle, last = run(MLP, {"name": "sgd"}, training)
    assert first.log["step"].tolist() == []
    assert first.log["train_loss"].shape == (0, 3)
    assert middle.log["step"].tolist() == [0, 5]
    assert last.log["step"].tolist() == [7, 10, 12]
    assert last.log["examples_seen"].tolist() == [56, 80, 96]
    for checkpoint, row, log in ((first, 0, middle.log), (middle, 0, last.log), (last, 2, last.log)):
        for name in ("validation_loss", "test_loss", "test_accuracy"):
            assert torch.equal(log[name][row], checkpoint.evaluation[name])
    assert bool(last.log["test_loss"][1].isnan().all())
    assert last.log["update_norm"].isnan().tolist() == [[False] * 3, [False] * 3, [True] * 3]
    assert bool(last.log["gradient_norm"].isfinite().all())


def test_checkpoints_are_snapshots_and_the_inputs_stay() -> None:
    stack, theta, buffers = make_stack(NOISY_MLP, SEEDS)
    kept, kept_buffers = theta.clone(), {name: value.clone() for name, value in buffers.items()}
    training = TrainingSettings(steps=3, batch_size=8, dtype="float64")
    stream = train(
        stack, theta, buffers, optimizer_settings({"name": "adam"}), training, DATA, pack_id="p", seeds=SEEDS
    )
    first = next(stream)
    copy = {name: value.clone() for name, value in tensors(first).items()}
    rest = list(stream)
    assert_identical(tensors(first), copy)
    assert torch.equal(theta, kept)
    assert_identical(buffers, kept_buffers)
    assert not torch.equal(rest[-1].parameters["output.weight"], first.parameters["output.weight"])
    assert all(checkpoint.seconds > 0 for checkpoint in [first, *rest])


# ---- evaluation


def test_evaluation_in_chunks_is_the_evaluation_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, theta, buffers = make_stack(NOISY_MLP, SEEDS)
    loss = get_loss("cross_entropy")
    whole = evaluate_split(stack, theta, buffers, loss, DATA.train)
    monkeypatch.setattr("lossray.training.evaluation.CHUNK", 3 * 7)  # 26 = 7 + 7 + 7 + 5
    chunked = evaluate_split(stack, theta, buffers, loss, DATA.train)
    for found, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    expected = stack.losses(theta, buffers, DATA.train.inputs, DATA.train.targets, loss)
    torch.testing.assert_close(whole[0], expected, rtol=1e-13, atol=0)


def test_accuracy_is_absent_in_regression_and_everything_on_an_empty_split() -> None:
    stack, theta, buffers = make_stack(MLP, SEEDS)
    inputs = DATA.test.inputs
    losses, accuracy = evaluate_split(
        stack, theta, buffers, get_loss("mse"), Split(inputs, torch.zeros(9, 3).double())
    )
    assert bool(losses.isfinite().all())
    assert bool(accuracy.isnan().all())
    empty = Split(inputs[:0], DATA.test.targets[:0])
    losses, accuracy = evaluate_split(stack, theta, buffers, get_loss("cross_entropy"), empty)
    assert bool(losses.isnan().all())
    assert bool(accuracy.isnan().all())


# ---- settings


@pytest.mark.parametrize(
    ("steps", "checkpoints", "expected"),
    [
        (1000, {"count": 11}, (0, 1, 2, 5, 10, 22, 46, 100, 215, 464, 1000)),
        (100, {"count": 5, "spacing": "linear"}, (0, 25, 50, 75, 100)),
        (100, {"count": 2}, (0, 100)),
        (100, {"count": 3}, (0, 1, 100)),
        (3, {"count": 12}, (0, 1, 2, 3)),
        (1, {}, (0, 1)),
        (8, {"count": 7}, (0, 1, 2, 3, 4, 5, 8)),
        (100, {"steps": [10, 0, 50, 10]}, (0, 10, 50, 100)),
        (100, {"steps": []}, (0, 100)),
    ],
)
def test_checkpoint_steps(steps: int, checkpoints: dict[str, object], expected: tuple[int, ...]) -> None:
    settings = TrainingSettings(steps=steps, checkpoints=checkpoints)  # type: ignore[arg-type]
    assert checkpoint_steps(settings) == expected


@pytest.mark.parametrize("spacing", ["log", "linear"])
def test_checkpoint_steps_are_as_many_as_asked(spacing: str) -> None:
    for steps in (1, 2, 5, 13, 14, 60, 1000):
        for count in (2, 3, 5, 12, 40):
            settings = TrainingSettings(steps=steps, checkpoints={"count": count, "spacing": spacing})  # type: ignore[arg-type]
            chosen = checkpoint_steps(settings)
            assert (chosen[0], chosen[-1]) == (0, steps)
            assert len(chosen) == min(count, steps + 1)
            assert all(a < b for a, b in pairwise(chosen))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"loss": "cross_entropi"}, "did you mean 'cross_entropy'"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"steps": 10.0}, "valid integer"),
        ({"batch_size": "ful"}, "found 'ful'; allowed: a whole number from 1, or 'full'"),
        ({"batch_size": 0}, "found 0; allowed"),
        ({"batch_size": True}, "found True; allowed"),
        ({"log_every": 0}, "greater than or equal to 1"),
        ({"dtype": "float16"}, "'float32' or 'float64'"),
        ({"diverged_above": 1}, "greater than 1"),
        ({"diverged_above": float("nan")}, "greater than 1|finite"),
        ({"checkpoints": {"count": 1}}, "greater than or equal to 2"),
        ({"checkpoints": {"spacing": "lin"}}, "'log' or 'linear'"),
        ({"checkpoints": {"steps": [-1]}}, "greater than or equal to 0"),
        ({"checkpoints": {"steps": [5], "count": 3}}, "found 'count' beside 'steps'"),
        ({"steps": 10, "checkpoints": {"steps": [5, 20]}}, "checkpoints.steps: found 20; allowed: 0 to 10"),
        ({"checkpoint": {}}, "Extra inputs"),
    ],
)
def test_bad_training_settings(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingSettings(**table)  # type: ignore[arg-type]


def test_training_settings_round_trip() -> None:
    for table in ({}, {"batch_size": "full", "checkpoints": {"steps": [3]}}, {"diverged_above": 10}):
        settings = TrainingSettings.model_validate(table)
        assert TrainingSettings.model_validate(settings.plain()) == settings
