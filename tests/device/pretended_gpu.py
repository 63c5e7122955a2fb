"""A second device for machines without one: tensors that pretend to be on cuda:0.

Inside `with pretended_gpu():` a tensor that is made on "cuda" or moved there stays in main memory and is
marked. `.device` and `.is_cuda` then answer as on a GPU, and what a GPU refuses is refused: an operation on
tensors of both devices, `.numpy()`, a generator of the CPU. This finds a forgotten `device=` or `.cpu()`. It
tells nothing of kernels, streams, memory or speed, and does not see into what runs during a backward pass.

The mark is on the storage, which all views of a tensor share. Waits of the host for the device, which a GPU
makes silently, are counted by the line of code that asks for them.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
PACKAGES = ("lossray", "tasks", "flows")  # whose lines are named in `waits`


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        function: what is called.
        arguments: by position.
        options: by keyword.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @cached_property
    def name(self) -> str:
        """Of the function; an attribute's is "get NAME" or "set NAME"."""
        name = getattr(self.function, "__name__", "")
        if name in ("__get__", "__set__"):
            return f"{name.strip('_')} {getattr(self.function.__self__, '__name__', '')}"
        return name

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All that are given."""
        return list(tensors_in((self.arguments, self.options)))

    @cached_property
    def device(self) -> torch.device | None:
        """Of the tensors, as far as operations agree: the GPU where one of them is there."""
        if not self.tensors:
            return None
        return GPU if any(is_marked(tensor) for tensor in self.tensors) else CPU

    def result(self) -> Any:
        """What the function returns, in main memory."""
        return self.function(*self.arguments, **self.options)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors inside nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """What all views share, those that torch.func has wrapped too; the object lives as long as the memory."""
    with torch._C.DisableTorchFunction():
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        return tensor.untyped_storage()


def is_marked(tensor: Tensor) -> bool:
    """Whether a tensor pretends to be on the GPU."""
    return getattr(_storage(tensor), "pretends", False)


def _marked(result: Any) -> Any:
    for tensor in tensors_in(result):
        _storage(tensor).pretends = True
    return result


def _is_gpu(device: Any) -> bool:
    return not isinstance(device, int) and torch.device(device).type == "cuda"


def _refuse_mixing(name: str) -> None:
    raise RuntimeError(
        f"Expected all tensors to be on the same device, found cuda:0 and cpu in {name} (pretended)"
    )


def _moved(tensor: Tensor, result: Any, target: torch.device) -> Tensor:
    """``result`` was computed from ``tensor`` and is to be on ``target``: a copy where that is elsewhere."""
    is_view = _storage(result) is _storage(tensor)
    if is_view and is_marked(tensor) != (target.type == "cuda"):
        result = result.clone()
    return _marked(result) if target.type == "cuda" else result


def _device(call: Call) -> Any:
    return GPU if call.device == GPU else call.result()


def _is_cuda(call: Call) -> bool:
    return call.device == GPU


def _to_numpy(call: Call) -> Any:
    if call.device == GPU:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() (pretended)")
    return call.result()


def _cpu(call: Call) -> Tensor:
    return _moved(call.arguments[0], call.result(), CPU)


def _cuda(call: Call) -> Tensor:
    return _moved(call.arguments[0], call.arguments[0], GPU)


def _to(call: Call) -> Tensor:
    """`Tensor.to`, whose device and dtype may stand anywhere, or be those of another tensor."""
    tensor, *places = (*call.arguments, *call.options.values())
    target, dtype = call.device if is_marked(tensor) else CPU, tensor.dtype
    for given in places:
        if isinstance(given, Tensor):
            target, dtype = (GPU if is_marked(given) else given.device), given.dtype
        elif isinstance(given, torch.device | str):
            target = torch.device(given)
        elif isinstance(given, torch.dtype):
            dtype = given
    if target.type == "meta":
        return tensor.to(target, dtype)
    kept = {name: call.options[name] for name in ("copy", "memory_format") if name in call.options}
    return _moved(tensor, tensor.to(dtype, **kept), target)


def _as_tensor(call: Call) -> Tensor:
    value = call.arguments[0]
    if isinstance(value, Tensor):
        device = call.options.pop("device", None) or (GPU if is_marked(value) else CPU)
        return _moved(value, call.result(), torch.device(device))
    return _made(call) if call.options.get("device") is not None else call.result()


def _tensor(call: Call) -> Tensor:
    """`torch.tensor`: numbers are taken out of tensors in a list, and the result is then on the CPU."""
    if call.options.get("device") is not None:
        return _made(call)
    return (
        _marked(call.result())
        if isinstance(call.arguments[0], Tensor) and call.device == GPU
        else call.result()
    )


def _made(call: Call) -> Any:
    """A function that is told on which device to make its result."""
    gpu = _is_gpu(call.options["device"])
    if gpu:
        _refuse_generators(call)
        call.options["device"] = CPU
    result = call.result()
    return _marked(result) if gpu else result


def _copied_into(call: Call) -> Any:
    """`copy_`: the tensor stays where it is."""
    return call.result()


def _got_item(call: Call) -> Any:
    tensor, index = call.arguments
    if not is_marked(tensor) and any(is_marked(i) and i.ndim for i in tensors_in(index)):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (pretended)"
        )
    return _of_itself(call)


def _set_item(call: Call) -> None:
    """`tensor[index] = value`: copies across devices, unless it scatters by an index that is a tensor."""
    tensor, index, value = call.arguments
    indices = [i for i in tensors_in(index) if i.ndim or i.dtype == torch.bool]
    if not is_marked(tensor) and any(is_marked(i) for i in indices):
        _refuse_mixing("__setitem__")
    if indices and isinstance(value, Tensor) and value.ndim and is_marked(value) != is_marked(tensor):
        _refuse_mixing("__setitem__")
    call.result()


def _gradients(call: Call) -> Any:
    """`torch.autograd.grad`: each gradient is where its parameter is."""
    inputs = call.arguments[1] if len(call.arguments) > 1 else call.options["inputs"]
    found = call.result()
    for gradient, leaf in zip(found, [inputs] if isinstance(inputs, Tensor) else inputs, strict=True):
        if gradient is not None and is_marked(leaf):
            _marked(gradient)
    return found


def _of_itself(call: Call) -> Any:
    """The result is where the tensor is whose method it is, whatever else is given."""
    result = call.result()
    return _marked(result) if is_marked(call.arguments[0]) else result


def _computed(call: Call) -> Any:
    """Every other operation: all tensors on one device, but for numbers of the CPU."""
    if call.options.get("device") is not None:
        return _made(call)
    if call.device != GPU:
        return call.result()
    others = [tensor for tensor in call.tensors if not is_marked(tensor)]
    if any(tensor.ndim for tensor in others) or (
        others and call.name in ("stack", "cat", "hstack", "vstack")
    ):
        _refuse_mixing(call.name)
    if _is_in_place(call.name) and not is_marked(call.tensors[0]):
        _refuse_mixing(call.name)
    _refuse_generators(call)
    return _marked(call.result())


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))


def _refuse_generators(call: Call) -> None:
    """Every generator is of the CPU."""
    if any(isinstance(given, torch.Generator) for given in (*call.arguments, *call.options.values())):
        raise RuntimeError(
            f"Expected a 'cuda' device type for generator but found 'cpu' in {call.name} (pretended)"
        )


RULES: dict[str, Callable[[Call], Any]] = {
    "get device": _device,
    "get is_cuda": _is_cuda,
    "get is_cpu": lambda call: call.device != GPU,
    "get grad": _of_itself,
    "get_device": lambda call: 0 if call.device == GPU else -1,
    "numpy": _to_numpy,
    "__array__": _to_numpy,
    "cpu": _cpu,
    "cuda": _cuda,
    "to": _to,
    "type_as": _to,
    "as_tensor": _as_tensor,
    "asarray": _as_tensor,
    "tensor": _tensor,
    "copy_": _copied_into,
    "set data": _copied_into,
    "__getitem__": _got_item,
    "__setitem__": _set_item,
    "grad": _gradients,
    "__deepcopy__": _of_itself,
    "expand_as": _of_itself,
    "view_as": _of_itself,
    "reshape_as": _of_itself,
    "is_same_size": _of_itself,
    "_has_compatible_shallow_copy_type": _of_itself,
}
WAITING = {
    *(
        "item",
        "tolist",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "cpu",
        "nonzero",
        "equal",
        "allclose",
    ),
    *("masked_select", "unique", "is_nonzero", "__contains__"),
}


class PretendedGpu(TorchFunctionMode):
    """The mode; see the file's head.

    Attributes:
        waits: how often each line ("lossray/training/loop.py:97 item") waited for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        call = Call(function, arguments, dict(options or {}))
        name = call.name
        if _waits(call, name):
            self.waits[f"{_line()} {name}"] += 1
        return RULES.get(name, _computed)(call)


def _waits(call: Call, name: str) -> bool:
    """Whether a GPU would make the host wait: a number or a size that only the device knows."""
    if name == "__getitem__":
        return any(
            is_marked(i) and (i.dtype == torch.bool or not i.ndim) for i in tensors_in(call.arguments[1])
        )
    if name == "to":
        return is_marked(call.arguments[0]) and any(
            _names_cpu(given) for given in (*call.arguments[1:], *call.options.values())
        )
    return name in WAITING and call.device == GPU


def _names_cpu(given: Any) -> bool:
    return isinstance(given, torch.device | str) and torch.device(given).type == "cpu"


def _line() -> str:
    """The innermost line of the packages under test."""
    root, frame = Path(__file__).parents[2], sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(root) and path.relative_to(root).parts[0] in PACKAGES:
            return f"{path.relative_to(root)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": lambda device: contextlib.nullcontext(),
    "get_device_name": lambda device=None: "pretended GPU",
    "mem_get_info": lambda device=None: (6 << 30, 8 << 30),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "max_memory_reserved": lambda device=None: 1,
    "reset_peak_memory_stats": lambda device=None: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.zeros(8, dtype=torch.uint8, device="cpu"),
    "set_rng_state": lambda state, device=None: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """The mode, with torch.cuda answering as if there were one device of 8 GiB."""
    with mock.patch.multiple(torch.cuda, **ANSWERS), PretendedGpu() as mode:
        yield mode
