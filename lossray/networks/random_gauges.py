"""Random factors by which the hidden units of a ReLU network are rescaled."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lossray.seeds import generator


def random_factors(seeds: Sequence[int], units: int, *, sigma: Tensor, powers_of_two: bool = False) -> Tensor:
    """Log-normal factors of each member's own generator, [R, units] float64.

    Args:
        seeds: of the members, [R].
        units: hidden units of one member.
        sigma: standard deviations of the logarithms, [R] float64.
        powers_of_two: round each factor to the nearest power of two. Then nothing is rounded where weights
            are multiplied by it, and the rescaled network computes the same outputs bit for bit.
    """
    draws = [
        torch.randn(units, generator=generator(seed, "gauge"), device="cpu", dtype=torch.float64)
        for seed in seeds
    ]
    octaves = sigma[:, None] * torch.stack(draws) / math.log(2)
    return torch.exp2(octaves.round() if powers_of_two else octaves)
