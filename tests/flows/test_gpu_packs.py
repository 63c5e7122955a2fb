"""What follows from the memory that packs take of a GPU: sizes, shares, and words."""

from dataclasses import replace

import pytest

from flows.capacity import Share, Shares
from flows.gpu_packs import CONTEXT_BYTES, USABLE, GpuPacks, GpuRoom, PackMemory, decided, kind_of, pack_size
from lossray.measures.pack_memory import PackPeaks
from lossray.networks.settings import model_settings
from lossray.study import Pack, Resources
from lossray.training.update_rules import optimizer_settings

GB = 10**9


def memory(fixed, each, *, analysis=0.0):
    """In GB; the analysis takes so much more for each run."""

    def peaks(runs):
        return PackPeaks(int(GB * (fixed + each * runs)), int(GB * (fixed + (each + analysis) * runs)))

    return PackMemory((2, 4), (peaks(2), peaks(4)))


def room(usable, gpus=1):
    """GPUs with so many GB for tensors, were one process alone."""
    return GpuRoom(int((usable * GB + CONTEXT_BYTES) / USABLE), gpus)


def pack(runs, *, model="mlp", optimizer="adam", lr=0.01, executor="vmap"):
    settings = optimizer_settings({"name": optimizer, "lr": lr})
    names = ("p", f"{model}-{optimizer}", model_settings({"name": model}), settings)
    return Pack(*names, tuple(range(runs)), executor, "retained")


def test_memory_is_a_line_through_two_packs():
    line = memory(1, 0.25, analysis=0.25)
    assert line.training(16) == pytest.approx(5 * GB)
    assert line.analysis(16) == pytest.approx(9 * GB)
    assert line.most(16) == line.analysis(16)


def test_memory_that_falls_with_the_runs_by_chance_is_taken_as_constant():
    line = PackMemory((2, 4), (PackPeaks(100, 100), PackPeaks(90, 110)))
    assert line.training(64) == 100
    assert line.analysis(64) == 410


@pytest.mark.parametrize(
    ("usable", "gpus", "runs", "size"),
    [
        (1000, 1, 1000, 64),  # the largest
        (1000, 1, 20, 16),  # no more than there are
        (1000, 8, 64, 8),  # every GPU has some
        (1000, 8, 3, 1),
        (20, 1, 1000, 16),  # 9 GB, twice with a context each
        (10, 1, 1000, 4),
        (0.1, 1, 1000, 1),  # one in any case
    ],
)
def test_a_pack_is_as_large_as_half_of_a_gpu(usable, gpus, runs, size):
    assert pack_size(memory(1, 0.5), room(usable, gpus), runs) == size


def test_of_what_did_not_fit_a_pack_has_one_run():
    assert pack_size(None, room(1000), 1000) == 1


@pytest.mark.parametrize(("needed", "tasks"), [(1, 4), (5, 4), (6, 2), (14, 1), (100, 1)])
def test_tasks_share_a_gpu_as_far_as_it_holds_them(needed, tasks):
    assert room(25).shared_by(needed * GB) == tasks


def test_settings_that_differ_in_their_rate_are_of_one_kind():
    assert kind_of(pack(2, lr=0.1)) == kind_of(pack(3, lr=0.2))
    assert len({kind_of(pack(2)), kind_of(pack(2, model="cnn")), kind_of(pack(2, optimizer="sgd"))}) == 3


def test_the_pack_that_takes_the_most_says_how_many_share_a_gpu():
    small, large = pack(4), pack(16, model="cnn")
    memories = {kind_of(small): memory(1, 0.1), kind_of(large): memory(1, 0.25, analysis=0.25)}
    packs = decided([small, small, large], memories, {}, room(22))
    assert packs.shared_by == (4, 2)
    assert packs.notes == (
        "a pack of 4 runs of mlp-adam takes 1.4 GB of a GPU to train and 1.4 GB to analyse",
        "a pack of 16 runs of cnn-adam takes 5 GB of a GPU to train and 9 GB to analyse",
        "packs: 4 at a time are trained on a GPU of 28.2 GB, 2 analysed",
    )


def test_a_pack_that_did_not_fit_has_a_gpu_of_its_own():
    packs = decided([pack(4), pack(1, model="cnn")], {kind_of(pack(4)): memory(1, 0.1)}, {}, room(22))
    assert packs.shared_by == (1, 1)
    assert packs.notes[1] == "a pack of 1 run of cnn-adam: a trial ran out of the memory of a GPU, 28.2 GB"


def test_shares_that_the_study_names_stay():
    shares = Shares(Share(1.0, 0.5), Share(1.0, 0.5))
    named = Resources.model_validate({"curvature": {"gpus": 0.5}})
    assert GpuPacks().applied(shares, Resources()) == shares
    measured = GpuPacks(shared_by=(4, 1))
    assert measured.applied(shares, Resources()) == Shares(Share(1.0, 0.25), Share(1.0, 1.0))
    assert measured.applied(shares, named) == replace(shares, train=Share(1.0, 0.25))
