"""What a model draws from torch's default generators: seeded where wanted, and noticed elsewhere."""

import torch
from torch import Tensor


class seeded:
    """Torch's default generators of the CPU and of ``device`` forked and seeded; nothing for seed None."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self.seed = seed
        self.device = device

    def __enter__(self) -> None:
        if self.seed is None:
            return
        devices = [self.device] if self.device.type == "cuda" else []
        self.fork = torch.random.fork_rng(devices=devices)
        self.fork.__enter__()
        torch.default_generator.manual_seed(self.seed)
        if devices:
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(self.seed)

    def __exit__(self, *exception: object) -> None:
        if self.seed is not None:
            self.fork.__exit__(None, None, None)


def random_state(device: torch.device) -> Tensor:
    """The state of torch's default generators of the CPU and of ``device``, as one tensor of bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
