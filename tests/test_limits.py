"""Halving: runs first, down to one, then examples."""

import pytest

from lossray.limits import SHARE_HALVINGS, WHOLE, Limits, halved, most_halvings


@pytest.mark.parametrize(
    ("members", "held"),
    [
        (16, [None, 8, 4, 2, 1, 1, 1]),
        (5, [None, 3, 2, 1, 1]),
        (2, [None, 1, 1]),
        (1, [None, None]),
    ],
)
def test_runs_are_halved_down_to_one(members, held):
    assert [halved(times, members).members for times in range(len(held))] == held


@pytest.mark.parametrize("members", [1, 2, 5, 16, 17])
def test_examples_are_halved_once_one_run_is_left_and_all_halvings_have_an_effect(members):
    limits = [halved(times, members) for times in range(most_halvings(members) + 1)]
    assert limits[0] == WHOLE
    assert len(set(limits)) == len(limits)
    assert limits[-1] == Limits(1 if members > 1 else None, 0.5**SHARE_HALVINGS)
    assert all(one.share == 1 for one in limits if one.members not in (None, 1))


def test_a_portion_is_never_nothing():
    assert [Limits(share=0.25).portion(number) for number in (4096, 5, 1)] == [1024, 1, 1]
    assert WHOLE.portion(2**30) == 2**30
