"""Every direction says what it is: a name without a kind would be turned the wrong way in a gauge."""

from typing import get_args

import torch

from lossray.geometry import gauges
from lossray.geometry.direction_kinds import COVECTORS, DIRECTION_KINDS, Direction


def test_every_direction_has_a_kind():
    assert set(DIRECTION_KINDS) == set(get_args(Direction))


def test_a_gradient_and_a_displacement_have_the_same_product_in_every_gauge():
    draws = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(2, 5, dtype=torch.float64, generator=draws) for name in DIRECTION_KINDS}
    turned = gauges.adaptive(torch.randn(2, 5, dtype=torch.float64, generator=draws)).transform(vectors)
    displacements = set(DIRECTION_KINDS) - set(COVECTORS)
    assert displacements == {"update", "preconditioned_gradient", "displacement"}
    for covector in COVECTORS:
        for vector in displacements:
            before, after = ((pair[covector] * pair[vector]).sum(dim=1) for pair in (vectors, turned))
            torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
