"""Out of memory: less is held until it fits, and what is held is said."""

import weakref

import pytest
import torch

from lossray.errors import ModelError, ResourceError, StudyError
from lossray.limits import most_halvings
from lossray.measures.halving import Halving


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore words")


def wrapped():
    error = ModelError("differentiating it twice failed")
    error.__cause__ = RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    )
    return error


@pytest.mark.parametrize(
    ("size", "sentences"),
    [
        (16, [None, "8 of 16 runs", "4 of 16 runs", "2 of 16 runs", "1 of 16 runs"]),
        (3, [None, "2 of 3 runs", "1 of 3 runs", "1 of 3 runs and 1/2 of the examples"]),
        (1, [None, "1/2 of the examples", "1/4 of the examples"]),
    ],
)
def test_what_is_held_at_once_is_said(size, sentences):
    for times, sentence in enumerate(sentences):
        expected = sentence and f"{sentence} at a time after running out of memory"
        assert Halving(size, times).reduced == expected


@pytest.mark.parametrize(
    "error",
    [
        out_of_memory(),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        ResourceError("the Krylov basis needs about 20 GB on cpu, where 3 GB can be had"),
        wrapped(),
    ],
)
def test_less_is_held_until_it_fits(error):
    def work(part):
        if len(part.members) > 1:
            raise error
        return list(part.members)

    halving = Halving(3, 0)
    assert halving.by_parts(work) == [[0], [1], [2]]
    assert halving.times == 2


def test_other_errors_are_raised_as_they_are():
    def work(part):
        raise StudyError("no such thing")

    halving = Halving(3, 0)
    with pytest.raises(StudyError, match="no such thing"):
        halving.by_parts(work)
    assert halving.reduced is None


def test_an_attempt_begins_where_the_one_before_has_ended():
    assert Halving(4, 2).by_parts(lambda part: part.members) == [range(r, r + 1) for r in range(4)]


def test_with_nothing_left_to_halve_it_says_what_to_do():
    tries = []

    def work(part):
        tries.append(part)
        raise out_of_memory()

    with pytest.raises(
        ResourceError,
        match=r"with 1 of 2 runs and 1/32 of the examples.*Tried to allocate 2.00 GiB; give the task a GPU",
    ) as raised:
        Halving(2, 0).by_parts(work)
    assert "\n" not in str(raised.value)
    assert len(tries) == most_halvings(2) + 1


def test_what_does_not_fit_by_estimate_keeps_its_message():
    def work(part):
        raise ResourceError("the basis needs 20 GB; ask for fewer pairs")

    with pytest.raises(ResourceError, match=r"^the basis needs 20 GB; ask for fewer pairs$"):
        Halving(2, 0).by_parts(work)


def test_what_a_failed_try_has_held_is_free_in_the_next():
    held = []

    def work(part):
        if part.members.start == 0:  # a new try
            assert all(reference() is None for reference in held)
        tensor = torch.zeros(10)
        cycle = [tensor]
        cycle.append(cycle)
        held.append(weakref.ref(tensor))
        if len(part.members) > 1:
            raise out_of_memory()

    Halving(4, 0).by_parts(work)
    assert len(held) == 1 + 1 + 4
