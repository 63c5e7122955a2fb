"""Studies on a GPU measure what packs take of it before they are frozen; the measuring is replaced here."""

import signal

import pytest

import flows
import flows.study
from flows.capacity import Share, Shares, capacity, divided
from flows.cluster_memory import measure_with
from flows.interrupt import Interrupt
from lossray.errors import StudyError
from lossray.measures.pack_memory import MeasuredMemory, PackPeaks
from lossray.storage.store import Store
from lossray.study.manifest import Manifest
from tasks.measure_memory import MemoryJob

GB = 10**9
LIGHT = ["seeds=8", "training.steps=2", "training.checkpoints.steps=[0, 2]", "angles.window=0"]
SHARES = Shares(Share(1.0, 0.5), Share(1.0, 0.5))


@pytest.fixture
def on_gpu(monkeypatch):
    """``on_gpu(measure)``: studies take this machine for one with a GPU that is measured so."""

    def patch(measure):
        monkeypatch.setattr(flows.study, "study_device", lambda study, *, gpus: "cuda")
        monkeypatch.setattr(flows.study, "measure_here", measure)

    return patch


def gpu_of(gigabytes):
    """A GPU of which every run takes 1 GB; packs of more than that run out of memory."""
    jobs = []

    def measure(job):
        jobs.append(job)
        sizes = [len(pack.seeds) for pack in job.packs]
        peaks = [PackPeaks(size * GB, size * GB) if size < gigabytes else None for size in sizes]
        return MeasuredMemory(gigabytes * GB, tuple(peaks)), 1

    return measure, jobs


def frozen(out):
    """Runs of every pack in the manifest."""
    manifest = Manifest.from_plain(Store(str(out)).read_json("manifest.json"), "manifest.json")
    return [len(pack.seeds) for pack in manifest.packs]


def run(study_path, out, *overrides):
    assert flows.run(study_path, out, overrides=[*LIGHT, *overrides], in_process=True) == 0


def test_new_packs_are_as_large_as_half_of_the_gpu_holds_and_frozen_ones_stay(
    study_path, tmp_path, on_gpu, capfd
):
    measure, jobs = gpu_of(12)
    on_gpu(measure)
    run(study_path, tmp_path / "out")
    assert [len(pack.seeds) for pack in jobs[0].packs] == [2, 4]
    assert frozen(tmp_path / "out") == [4, 4]
    note = "takes 4 GB of a GPU to train and 4 GB to analyse"
    assert note in capfd.readouterr().err
    assert any(note in line for line in Store(str(tmp_path / "out")).read_json("gpu_memory.json"))
    not_computed = Store(str(tmp_path / "out")).read_json("notes.json")
    assert not any("GPU" in line for line in not_computed)
    larger, _ = gpu_of(100)
    on_gpu(larger)
    run(study_path, tmp_path / "out", "seeds=16")
    assert frozen(tmp_path / "out") == [4, 4, 8]


def test_where_two_runs_do_not_fit_a_pack_has_one(study_path, tmp_path, on_gpu, capfd):
    on_gpu(gpu_of(2)[0])
    run(study_path, tmp_path / "out", "seeds=2")
    assert frozen(tmp_path / "out") == [1, 1]
    assert "a pack of 1 run of" in capfd.readouterr().err


def test_nothing_is_measured_that_the_study_decides(study_path, tmp_path, on_gpu):
    measure, jobs = gpu_of(100)
    on_gpu(measure)
    run(study_path, tmp_path / "out", "resources.pack=3", "seeds=3")
    assert frozen(tmp_path / "out") == [3]
    assert jobs == []


def test_a_measuring_that_fails_leaves_the_packs_of_a_cpu_and_a_note(study_path, tmp_path, on_gpu, capfd):
    def fails(job):
        raise TypeError("of the model\nand more")

    on_gpu(fails)
    run(study_path, tmp_path / "out", "seeds=2")
    assert frozen(tmp_path / "out") == [2]
    assert "was not measured: of the model\n" in capfd.readouterr().err


def test_a_gpu_that_does_not_come_ends_the_study_in_a_line(study_path, tmp_path, on_gpu):
    def waits(job):
        raise StudyError("resources.train: found 1 GPU; none came")

    on_gpu(waits)
    with pytest.raises(StudyError, match="none came"):
        flows.run(study_path, tmp_path / "out", in_process=True)
    assert not Store(str(tmp_path / "out")).exists("manifest.json")


def test_an_interrupt_while_memory_is_measured_freezes_nothing(study_path, tmp_path, on_gpu):
    def interrupted(job):
        signal.raise_signal(signal.SIGTERM)
        raise TimeoutError("interrupted")

    on_gpu(interrupted)
    assert flows.run(study_path, tmp_path / "out", in_process=True) == 130
    assert not Store(str(tmp_path / "out")).exists("manifest.json")
    measure, _ = gpu_of(12)
    on_gpu(measure)
    run(study_path, tmp_path / "out", "seeds=4")
    assert frozen(tmp_path / "out") == [4]


def test_on_a_cpu_nothing_is_measured(study_path, tmp_path, monkeypatch):
    measure, jobs = gpu_of(100)
    monkeypatch.setattr(flows.study, "measure_here", measure)
    run(study_path, tmp_path / "out", "seeds=2")
    assert jobs == []


@pytest.mark.ray
def test_on_a_cluster_a_task_with_a_gpu_measures(session_ray, study_path, tmp_path, monkeypatch):
    """Here the GPU is declared alone: the task finds none, and nothing follows."""
    request = flows.study.check_request(str(study_path), str(tmp_path / "out"), ())
    job, interrupt = MemoryJob(request.context, ()), Interrupt()
    said = []
    measure = measure_with(SHARES, interrupt, wait=60, say=said.append)
    assert measure(job) is None
    monkeypatch.setattr("flows.cluster_memory.is_embedded", lambda: False)
    assert measure(job) is None
    monkeypatch.setattr("flows.cluster_memory.WAIT_SECONDS", 0.0)
    monkeypatch.setattr("flows.cluster_memory.PATIENCE", 0.0)
    with pytest.raises(TimeoutError, match="no GPU was free for 0 s"):
        measure(job)

    # A cluster without GPUs is waited for; the task that waits asks an autoscaler for one.
    text = "waiting for 1 CPU and 0.5 GPUs (the cluster has 0 CPUs and 0 GPUs)"
    rooms = [divided(SHARES, [])] * 2
    monkeypatch.setattr("flows.cluster_memory.PATIENCE", 60.0)
    monkeypatch.setattr(
        "flows.cluster_memory.capacity", lambda shares: rooms.pop() if rooms else capacity(shares)
    )
    assert measure(job) is None
    assert (said, rooms) == ([text], [])
    rooms = [divided(SHARES, [])]
    with pytest.raises(StudyError, match=r"found 1 CPU and 0\.5 GPUs; .* in 0 s \(resources\.wait\)"):
        measure_with(SHARES, interrupt, wait=0, say=said.append)(job)

    interrupt.received = signal.SIGINT
    with pytest.raises(TimeoutError, match="interrupted"):
        measure(job)
