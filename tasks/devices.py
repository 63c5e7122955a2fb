"""Where a task computes."""

import torch


def local_device() -> torch.device:
    """The device of a study that runs without Ray."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """For the tables: "cpu", or the kind of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
