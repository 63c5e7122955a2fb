"""The GPU, in words, and the two numbers that its small kernels hang on."""

import shutil
import subprocess

import torch

from benchmarks.devices import seconds_of
from benchmarks.gpu_check.recorder import Recorder
from benchmarks.report import machine

TITLE = "The machine"
TEXT = """What a small kernel takes, one launched after another, and the bytes read and written per second
when a large tensor is copied on the device."""
COPIED = {"cuda": 2**32, "cpu": 2**26}  # bytes


def measure(record: Recorder) -> None:
    """Say what this is, and measure the two."""
    device = record.device
    record.write(machine=f"{_gpu(device)}{machine()}")
    small = torch.zeros(64, device=device)
    large = torch.randn(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(large)
    launch = seconds_of(lambda: small.add_(1), device)
    copy = seconds_of(lambda: target.copy_(large), device)
    moved = 2 * large.nbytes
    record.row(
        **{
            "a small kernel, µs": [1e6 * seconds for seconds in launch],
            "copy, GB/s": [1e-9 * moved / seconds for seconds in copy],
        }
    )


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB of its own memory, "
        f"{properties.multi_processor_count} multiprocessors, compute capability "
        f"{properties.major}.{properties.minor}, driver {_driver()}, CUDA {torch.version.cuda}; "
    )


def _driver() -> str:
    """As the driver's own tool says it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip() or "unknown"
