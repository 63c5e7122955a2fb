"""What packs take of a GPU: the work that is measured, and how it is read."""

import pytest
import torch

from lossray.measures import pack_memory
from lossray.measures.pack_memory import PackPeaks, gpu_meter, measured_memory, pack_peaks
from lossray.networks.stack import Stack
from lossray.study import partition, study_from_table
from lossray.training.datasets import load_dataset

STUDY = {
    "name": "small",
    "seeds": 4,
    "data": {"source": "gaussians", "n": 60, "dim": 4},
    "models": [{"name": "mlp", "widths": [3]}],
    "optimizers": [{"name": "adam", "lr": 0.01}],
    "training": {"steps": 1, "batch_size": 8},
}


@pytest.fixture
def study():
    return study_from_table(STUDY)


@pytest.fixture
def dataset(study):
    return load_dataset(study.data, dtype=torch.float32)


def pack_of(study, runs):
    resources = study.resources.model_copy(update={"pack": runs})
    changed = study.model_copy(update={"resources": resources})
    return partition(changed, (), lambda setting: ("vmap", "retained"))[0]


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as far as a meter reads it; the list of what it does."""
    done = []
    answers = {
        "reset_peak_memory_stats": lambda device: done.append("reset"),
        "synchronize": lambda device: done.append("synchronize"),
        "max_memory_reserved": lambda device: 100 * len(done),
        "mem_get_info": lambda device: (5, 8),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return done


def test_training_and_products_are_measured_one_after_the_other(study, dataset):
    before, peaks = torch.get_rng_state(), iter([7, 11])

    def meter(work):
        work()
        return next(peaks)

    assert pack_peaks(study, pack_of(study, 2), dataset, meter) == PackPeaks(7, 11)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_is_that_of_the_work_alone(gpu):
    assert gpu_meter(torch.device("cuda:0"))(lambda: gpu.append("work")) == 300
    assert gpu == ["reset", "work", "synchronize"]


def test_a_pack_that_runs_out_of_memory_has_no_peaks(study, dataset, gpu, monkeypatch):
    evaluator = Stack._evaluator

    def tight(stack, function, theta, *others):
        if len(theta) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluator(stack, function, theta, *others)

    monkeypatch.setattr(Stack, "_evaluator", tight)
    packs = [pack_of(study, runs) for runs in (2, 4)]
    measured = measured_memory(study, packs, dataset, torch.device("cuda:0"))
    assert measured.gpu == 8
    assert isinstance(measured.peaks[0], PackPeaks)
    assert measured.peaks[1] is None


def test_what_else_is_wrong_with_a_model_is_raised(study, dataset, gpu, monkeypatch):
    def broken(*arguments):
        raise TypeError("no such thing")

    monkeypatch.setattr(pack_memory, "pack_peaks", broken)
    with pytest.raises(TypeError, match="no such thing"):
        measured_memory(study, [pack_of(study, 2)], dataset, torch.device("cuda:0"))
