"""On Ray: workers that die, models that fail, sessions that somebody else has started."""

import os
import signal

import pytest
import ray

import flows
import lossray
from flows.session import worker_options
from lossray.storage.checkpoints import loads

pytestmark = pytest.mark.ray


def attempts(out, kind):
    tasks = lossray.open_study(out).table("tasks")
    return tasks[tasks["kind"] == kind].set_index("step")["attempts"].to_dict()


def final_parameters(out):
    (path,) = out.glob("checkpoints/*/12.safetensors")
    return loads(path.read_bytes()).parameters


def kill_at(gates, pattern, run):
    """SIGKILL to the worker that has just written such a file; it is written again by the next attempt."""
    gates.shut(pattern)
    os.kill(gates.wait(unless=run.ended), signal.SIGKILL)
    gates.open()


@pytest.mark.slow
def test_killed_workers_are_replaced_and_the_rows_are_those_of_an_undisturbed_run(
    session_ray, gates, helpers, study_path, undisturbed, tmp_path
):
    out = tmp_path / "out"
    gates.shut("*/checkpoints/*/5.safetensors")
    run = helpers.Background(study_path, out)
    actor = gates.wait(unless=run.ended)
    os.kill(actor, signal.SIGKILL)  # a checkpoint whose rows are not committed
    gates.open()
    kill_at(gates, "*/parts/eigenvalues/*", run)  # rows without their commit
    assert run.result() == 0
    helpers.assert_same_rows(out, undisturbed)
    assert attempts(out, "checkpoint")[5] == 2
    assert max(attempts(out, "curvature").values()) == 2
    expected = final_parameters(undisturbed)
    assert all(tensor.equal(expected[name]) for name, tensor in final_parameters(out).items())


MODELS = """
import os
import torch
import ray

class Odd(Exception):  # cannot be unpickled from its arguments
    def __init__(self, a, b):
        super().__init__("odd")

def where():
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return "driver"
    return "training" if context.get_actor_id() else "curvature"

class Fails(torch.nn.Linear):
    def forward(self, x):
        if where() == "training":
            raise Odd(1, 2)
        return super().forward(x)

class FailsInAnalysis(torch.nn.Linear):
    def forward(self, x):
        if where() == "curvature":
            raise ZeroDivisionError("a mistake of the user's")
        return super().forward(x)

class Exits(torch.nn.Linear):
    def forward(self, x):
        if where() == "training":
            os._exit(1)
        return super().forward(x)

def fails():
    return Fails(6, 2)

def fails_in_analysis():
    return FailsInAnalysis(6, 2)

def exits():
    return Exits(6, 2)

def sound():
    return torch.nn.Linear(6, 2)
"""

FAILING = """
name = "failing"
seeds = 1
models = [
    {name = "nets:fails"},
    {name = "nets:fails_in_analysis"},
    {name = "nets:exits"},
    {name = "nets:sound"},
]
optimizers = [{name = "sgd", lr = 0.1}]

[data]
source = "gaussians"
n = 90
dim = 6

[training]
steps = 4
batch_size = 16
checkpoints = {steps = [0, 4]}

[curvature]
top = 3
"""


@pytest.mark.slow
def test_models_that_fail_or_kill_their_worker_are_recorded_and_the_others_are_done(
    session_ray, forget_modules, tmp_path, capfd, monkeypatch
):
    """In a session that is not of lossray's making, as in a notebook: the workers must find the module."""
    monkeypatch.setattr("flows.driver.ATTEMPTS", 2)
    (tmp_path / "nets.py").write_text(MODELS)
    (tmp_path / "failing.toml").write_text(FAILING)
    out = tmp_path / "out"
    assert flows.run(tmp_path / "failing.toml", out) == 1
    study = lossray.open_study(out)
    runs = study.table("runs").set_index("model")
    assert runs["status"].to_dict() == {
        "nets:fails": "failed",
        "nets:fails_in_analysis": "finished",
        "nets:exits": "failed",
        "nets:sound": "finished",
    }
    assert "odd" in runs["reason"]["nets:fails"]
    assert "died" in runs["reason"]["nets:exits"].lower()
    tasks = study.table("tasks").set_index("task_key")
    failed = tasks[tasks["status"] == "failed"]
    assert sorted(failed["kind"]) == ["curvature", "curvature", "training", "training"]
    own = failed.join(study.table("runs").set_index("pack_id")["model"], on="pack_id")
    tries = own.groupby("model")["attempts"].max().to_dict()
    assert tries == {"nets:exits": 2, "nets:fails": 1, "nets:fails_in_analysis": 1}
    traces = {model: (out / "logs" / f"{key}.log").read_text() for key, model in own["model"].items()}
    assert "raise Odd(1, 2)" in traces["nets:fails"]
    assert "a mistake of the user's" in traces["nets:fails_in_analysis"]
    assert "nets.py" in traces["nets:fails_in_analysis"]
    assert len(study.table("curvature")) == 2  # nets:sound, at both checkpoints
    said = capfd.readouterr().err
    assert said.count("traceback in logs/") == 4


def test_a_module_is_imported_anew_for_each_driver_of_a_session_that_goes_on(session_ray, tmp_path):
    seen = []
    for answer in (1, 2):
        (tmp_path / "edited_module.py").write_text(f"ANSWER = {answer}")

        @ray.remote(num_cpus=1)
        def read():
            from lossray.imports import worker_setup

            worker_setup()
            import edited_module

            return edited_module.ANSWER

        seen.append(ray.get(read.options(**worker_options([str(tmp_path)])).remote()))
    assert seen == [1, 2]
