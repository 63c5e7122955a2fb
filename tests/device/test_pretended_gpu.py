"""The pretended GPU refuses what a GPU refuses, and computes what the CPU computes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from tests.device.pretended_gpu import GPU, pretended_gpu

pytestmark = pytest.mark.usefixtures("pretended")


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def on_gpu(*shape):
    return numbers(*shape).to(GPU)


MIXED = {
    "operator": lambda x, y: x + y,
    "product": lambda x, y: x @ y,
    "function": lambda x, y: torch.where(x > 0, x, y),
    "list": lambda x, y: torch.cat([x, y]),
    "numbers": lambda x, y: torch.stack([x[0, 0], y[0, 0]]),
    "in place": lambda x, y: y.add_(x[0, 0]),
    "index": lambda x, y: y[x > 0],
    "scatter": lambda x, y: x.__setitem__(x > 0, y[0]),
    "equal": torch.equal,
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_do_not_mix(operation):
    with pytest.raises(RuntimeError, match="same device"):
        operation(on_gpu(2, 2), numbers(2, 2))
    operation(on_gpu(2, 2), on_gpu(2, 2))  # where all is on one device they are allowed


ALLOWED = {
    "number": lambda x, y: x * y[0, 0],
    "index": lambda x, y: x[torch.tensor([1, 0])],
    "mask": lambda x, y: x[y > 0],
    "copy": lambda x, y: x.copy_(y),
    "slice": lambda x, y: x.__setitem__(0, y[0]),
    "shape": lambda x, y: x.view(4).view_as(y),
    "type": lambda x, y: y.type_as(x),
}


@pytest.mark.parametrize("operation", ALLOWED.values(), ids=ALLOWED)
def test_what_a_gpu_allows_across_devices(operation):
    result = operation(on_gpu(2, 2), numbers(2, 2))
    assert result is None or result.device == GPU


@pytest.mark.parametrize("convert", [lambda x: x.numpy(), np.asarray, lambda x: x.detach().T.numpy()])
def test_numpy_takes_no_tensor_of_the_gpu(convert):
    with pytest.raises(TypeError, match="to numpy"):
        convert(on_gpu(2, 2))
    assert convert(on_gpu(2, 2).cpu()).shape == (2, 2)


DRAWS = {
    "new": lambda draw: torch.randn(3, generator=draw, device="cuda"),
    "in place": lambda draw: on_gpu(3).normal_(generator=draw),
    "by position": lambda draw: torch.randperm(3, generator=draw, device=GPU),
    "chosen": lambda draw: torch.multinomial(on_gpu(3).abs(), 2, generator=draw),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_generator_of_the_cpu_draws_nothing_on_the_gpu(draw):
    with pytest.raises(RuntimeError, match="for generator"):
        draw(torch.Generator())


def test_moving_makes_copies_and_staying_does_not():
    x = numbers(3)
    y = x.to("cuda")
    y += 1
    assert torch.equal(y.cpu(), x + 1)
    assert y.device == GPU
    assert y.is_cuda
    assert y.get_device() == 0
    assert y.to(GPU) is y
    assert y.to(GPU, copy=True).data_ptr() != y.data_ptr()
    back = y.to("cpu", torch.float32)
    assert (back.device.type, back.is_cuda, back.dtype) == ("cpu", False, torch.float32)
    assert y.float().device == y.to(torch.float32).device == x.to(y).device == GPU
    assert torch.as_tensor(y).data_ptr() == y.data_ptr()
    assert torch.as_tensor(y, device="cpu").device.type == y.to(x).device.type == "cpu"


def test_a_list_of_numbers_of_the_gpu_becomes_a_tensor_of_the_cpu():
    x = on_gpu(2)
    assert torch.tensor([x[0], x[1]]).device.type == "cpu"
    assert (
        torch.tensor([1.0], device=GPU).device == x.new_zeros(3).device == torch.zeros_like(x).device == GPU
    )


def test_views_iteration_and_indices_keep_the_mark():
    x = on_gpu(4, 3)
    for view in (
        x.T,
        x[1:, 0],
        x.reshape(-1),
        *x,
        *x.split(2),
        x.unbind(1)[0],
        x[[0, 2]],
        x[x > 0],
        x.detach(),
    ):
        assert view.device == GPU
    x.T[0] = 0.0
    assert float(x[:, 0].abs().sum()) == 0


def test_a_model_moves_as_a_whole_and_trains():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    there = copy.deepcopy(model).to(GPU)
    inputs = numbers(5, 3)
    losses = []
    for module, x in ((model, inputs), (there, inputs.cuda())):
        optimizer = torch.optim.Adam(module.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            loss = module(x).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]  # the pretended GPU's arithmetic is the CPU's
    state = [*there.state_dict().values(), *(p.grad for p in there.parameters())]
    state += [value for entry in optimizer.state.values() for value in entry.values() if value.ndim]
    assert {tensor.device for tensor in (*state, *copy.deepcopy(there).state_dict().values())} == {GPU}
    assert {p.device.type for p in there.cpu().parameters()} == {"cpu"}
    with pytest.raises(RuntimeError, match="same device"):
        there(inputs.cuda())
    model.load_state_dict({name: tensor.cuda() for name, tensor in there.state_dict().items()})
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_gradient_is_where_its_parameter_is():
    x = numbers(3).requires_grad_()
    y = on_gpu(3).requires_grad_()
    assert [g.device.type for g in torch.autograd.grad((x.to(GPU) * y).sum(), [x, y])] == ["cpu", "cuda"]


def quadratic(x):
    return (x * x * torch.ones(3, dtype=x.dtype, device=x.device)).sum()


@pytest.mark.parametrize(
    "transformed",
    [
        lambda x: grad(quadratic)(x[0]),
        lambda x: vmap(grad(quadratic))(x),
        lambda x: hessian(quadratic)(x[0]),
        lambda x: vmap(lambda row, t: jvp(grad(quadratic), (row,), (t,))[1])(x, x),
    ],
)
def test_transforms_of_torch_func_stay_on_the_gpu(transformed):
    x = on_gpu(2, 3)
    result = transformed(x)
    assert result.device == GPU
    assert torch.equal(result.cpu(), transformed(x.cpu()))


def test_inside_a_transform_devices_do_not_mix_either():
    forgotten = numbers(3)
    with pytest.raises(RuntimeError, match="same device"):
        vmap(grad(lambda x: (x * forgotten).sum()))(on_gpu(2, 3))


def test_a_stack_of_models_is_called_as_one():
    model = nn.Linear(3, 2).double().to(GPU)
    stack = {name: torch.stack([p, 2 * p]).detach() for name, p in model.named_parameters()}
    inputs = on_gpu(5, 3)
    outputs = vmap(lambda theta: functional_call(model, theta, (inputs,)))(stack)
    assert outputs.device == GPU
    torch.testing.assert_close(outputs[1], 2 * outputs[0])


def test_a_default_device_and_torch_cuda_answer():
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == (True, 1)
    with torch.device("cuda"):
        assert torch.zeros(3).device == GPU
        with pytest.raises(RuntimeError, match="for generator"):
            torch.randn(3, generator=torch.Generator())
    assert torch.zeros(3).device.type == "cpu"
    assert torch.zeros(3, device="meta").device.type == "meta"


def test_waits_for_the_device_are_counted(pretended):
    x = on_gpu(3)
    pretended.waits.clear()
    float(x.sum()), bool(x[0] > 0), x.tolist(), x.cpu(), x[x > 0], x.to("cpu")
    assert pretended.waits.total() == 6
    (x + 1).sum().reshape(1)[0], numbers(3).tolist(), x.to(torch.float32)
    assert pretended.waits.total() == 6


def test_afterwards_all_is_as_before(monkeypatch):
    def none():
        return False

    monkeypatch.setattr(torch.cuda, "is_available", none)
    modes = torch.overrides._get_current_function_mode_stack()
    with pretended_gpu() as mode:
        assert torch.cuda.is_available()
        assert torch.overrides._get_current_function_mode_stack() == [*modes, mode]
    assert torch.cuda.is_available is none
    assert torch.overrides._get_current_function_mode_stack() == modes
