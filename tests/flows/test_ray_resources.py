"""On Ray: logical GPUs, requests that cannot be met, a machine with one CPU to spare."""

import os

import pytest
import ray
import torch

import flows
from flows.capacity import shares_of
from flows.driver import Driver
from flows.session import worker_options
from lossray.errors import StudyError
from lossray.study import Resources
from tasks.worker import gpu_index, prepare_worker

pytestmark = pytest.mark.ray


def test_tasks_take_their_share_of_a_logical_gpu_and_run_on_the_cpu_where_torch_has_none(session_ray):
    shares = shares_of(Resources(), gpus=True)

    @ray.remote
    class Actor:
        def look(self):
            return ray.get_gpu_ids(), str(prepare_worker(2)), torch.get_num_threads()

    @ray.remote
    def look():
        return ray.get_gpu_ids(), str(prepare_worker(1)), torch.get_num_threads()

    actor = Actor.options(**shares.train.options()).remote()
    assert ray.get(actor.look.remote()) == ([0], "cpu", 2)
    assert ray.get(look.options(**shares.curvature.options()).remote()) == ([0], "cpu", 1)
    assert ray.get(look.options(num_gpus=0).remote())[0] == []
    ray.kill(actor)


@pytest.mark.parametrize(
    ("ids", "available", "device"),
    [
        ([0], True, "cuda:0"),
        ([3], True, "cuda:3"),
        ([4], True, "cuda:0"),
        ([], True, "cpu"),
        ([0], False, "cpu"),
        ([], False, "cpu"),
    ],
)
def test_a_task_runs_on_the_gpu_only_if_it_was_given_one_and_torch_sees_it(
    monkeypatch, ids, available, device
):
    monkeypatch.setattr("sys.path", ["unchanged"])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: ids)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert str(prepare_worker(1)) == device
    assert [str(one) for one in current] == ([device] if device != "cpu" else [])


@pytest.mark.parametrize(
    ("given", "visible", "count", "index"),
    [
        (1, "", 2, 1),
        (3, "2,3", 2, 1),  # a node that was started with some of its machine's GPUs
        ("GPU-5ab", "GPU-1cd, GPU-5ab", 2, 1),
        (1, "1", 1, 0),  # Ray has hidden the others
        (1, "", 1, 0),  # likewise, by another variable
    ],
)
def test_which_of_the_visible_gpus_a_task_was_given(given, visible, count, index):
    assert gpu_index(given, visible=visible, count=count) == index


def test_a_worker_that_is_reused_sees_every_gpu(session_ray):
    @ray.remote(num_gpus=1)
    def visible():
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert ray.get(visible.options(**worker_options([])).remote()) == before


@pytest.mark.parametrize("asked", ["train.cpus=64", "train.gpus=2", "curvature.cpus=64"])
def test_a_request_that_no_node_can_meet_is_refused_and_nothing_is_written(
    session_ray, study_path, tmp_path, asked
):
    kind = asked.partition(".")[0]
    with pytest.raises(StudyError, match=rf"resources\.{kind}: found .*2 CPUs and 1 GPU"):
        flows.run(study_path, tmp_path / "out", overrides=[f"resources.{asked}"])
    assert list(tmp_path.iterdir()) == []


def test_a_study_ends_on_the_one_cpu_that_others_have_left(
    session_ray, helpers, study_path, undisturbed, tmp_path, monkeypatch
):
    """One of the others is an actor with the name that a training actor is about to have.

    So it is after a driver was killed, since Ray ends the actors of a dead driver only after a moment.
    """

    @ray.remote(num_cpus=1, num_gpus=0.5)
    class Other:
        def ready(self):
            return True

    others = []
    start = Driver._start_trainer

    def start_beside_another(self, trainer):
        name = f"train/{trainer.plan.pack.pack_id}"
        others.append(Other.options(name=name, namespace=self.plan.namespace).remote())
        assert ray.get(others[-1].ready.remote())
        start(self, trainer)

    monkeypatch.setattr(Driver, "_start_trainer", start_beside_another)
    out = tmp_path / "out"
    assert flows.run(study_path, out) == 0
    helpers.assert_same_rows(out, undisturbed)
    assert len(others) == 1
    ray.kill(others[0])
