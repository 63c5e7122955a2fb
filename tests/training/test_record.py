"""`lossray.record`: what it writes, what it leaves alone, and what it refuses."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

import lossray
from lossray.errors import ModelError, StoreError, StudyError
from lossray.networks.stack import stack_models
from lossray.storage.checkpoints import dumps, read_checkpoint
from lossray.storage.recordings import read_recording, read_recordings
from lossray.storage.store import Store


class Net(nn.Module):
    """Batch norm, a tied and a frozen parameter, and a buffer that is not saved with the others."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.register_buffer("mask", torch.tensor([1.0, -torch.inf, 0.0]), persistent=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def trained():
    """A model and an optimizer that has taken three steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
    return model, optimizer


def read(out, step=3, run="run"):
    return read_checkpoint(Store(str(out)), run, step)


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def moved(model):
    """The same model elsewhere."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    return other


# ---- what it writes


def test_a_checkpoint_holds_what_a_stack_of_the_model_would(out, trained):
    model, optimizer = trained
    lossray.record(out, model, optimizer, 3, run="adam-0")
    checkpoint = read(out, run="adam-0")
    stack, theta, buffers = stack_models([copy.deepcopy(model)], executor="loop", dtype=torch.float32)
    assert list(checkpoint.parameters) == list(stack.layout.names)
    assert torch.equal(stack.layout.join(checkpoint.parameters), theta)
    assert list(checkpoint.buffers) == list(buffers)
    assert all(torch.equal(checkpoint.buffers[name], value) for name, value in buffers.items())
    assert checkpoint.optimizer["momentum"].shape == checkpoint.optimizer["scale"].shape == theta.shape
    moments = [optimizer.state[p]["exp_avg"].flatten() for p in model.parameters() if p.requires_grad]
    assert torch.equal(checkpoint.optimizer["momentum"][0], torch.cat(moments))
    assert (checkpoint.alive.tolist(), checkpoint.diverged_at.tolist()) == ([True], [-1])
    assert checkpoint.log["lr"].tolist() == [0.1]
    assert set(files(out)) == {"checkpoints/adam-0/3.safetensors", "recorded/adam-0.json"}


def test_the_description_says_what_is_known_of_the_run(out, trained):
    model, optimizer = trained
    lossray.record(out, model, optimizer, 3)
    recording = read_recording(Store(str(out)), "run")
    assert recording.parameters == {
        "first.weight": [3, 3],
        "first.bias": [3],
        "norm.weight": [3],
        "norm.bias": [3],
    }
    assert list(recording.buffers)[-1] == "second.bias"
    assert (recording.optimizer, recording.lr) == ("adam", 0.1)
    assert recording.settings == {"name": "adam", "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8}
    assert read_recordings(Store(str(out)))[0].steps.keys() == {3}


def test_model_optimizer_and_generators_are_left_as_they_are(out, trained):
    model, optimizer = trained
    model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    kept = {name: None if grad is None else grad.clone() for name, grad in gradients.items()}
    generator = torch.get_rng_state()
    lossray.record(out, model, optimizer, 3)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), generator)
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert kept[name] is None or torch.equal(parameter.grad, kept[name])
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_recorded_in_their_own_precision(out, dtype):
    model = nn.Linear(2, 3).to(dtype)
    lossray.record(out, model, None, 0)
    assert read(out, 0).parameters["weight"].dtype == dtype
    assert torch.equal(read(out, 0).parameters["weight"][0], model.weight)


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))]
)
def test_a_wrapped_model_is_recorded_as_the_module_inside(out, trained, wrap):
    model, optimizer = trained
    lossray.record(out, wrap(model), optimizer, 3)
    assert next(iter(read(out).parameters)) == "first.weight"


def test_an_optimizer_of_ones_own_is_named_and_its_state_is_left_out(out, trained):
    model, _ = trained

    class Mine(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    optimizer = Mine(model.parameters(), lr=0.2)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    lossray.record(out, model, optimizer, 1)
    recording = read_recording(Store(str(out)), "run")
    assert (recording.optimizer, recording.settings, recording.lr) == ("Mine", None, 0.2)
    assert recording.notes == ("optimizer Mine is not known: no momentum, preconditioner, threshold",)
    assert read(out, 1).optimizer == {}


def test_an_optimizer_that_is_given_later_is_taken_on(out, trained):
    model, optimizer = trained
    lossray.record(out, model, None, 0)
    assert read_recording(Store(str(out)), "run").optimizer is None
    lossray.record(out, model, optimizer, 3)
    assert read_recording(Store(str(out)), "run").optimizer == "adam"


def test_a_state_is_read_by_the_settings_of_its_step(out, trained):
    model, optimizer = trained
    found = {}
    for step, betas in enumerate([(0.9, 0.999), (0.5, 0.999), (0.9, 0.5)], start=3):
        optimizer.param_groups[0]["betas"] = betas
        lossray.record(out, model, optimizer, step)
        found[step] = read(out, step).optimizer
    assert torch.equal(found[3]["scale"], found[4]["scale"])
    assert [float(own["threshold"]) for own in found.values()] == pytest.approx([38, 6, 38])
    expected = found[3]["scale"] * ((1 - 0.999**3) / (1 - 0.5**3)) ** 0.5
    torch.testing.assert_close(found[5]["scale"], expected, rtol=1e-4, atol=1e-7)


def test_notes_of_any_checkpoint_are_the_runs(out, trained):
    model, optimizer = trained
    lossray.record(out, model, optimizer, 3)
    assert read_recording(Store(str(out)), "run").notes == ()
    for step in (4, 5):
        optimizer.param_groups[0]["maximize"] = True
        lossray.record(out, model, optimizer, step)
    (note,) = read_recording(Store(str(out)), "run").notes
    assert note.startswith("its optimizer maximises")


def test_what_an_older_version_has_recorded_is_the_same_and_goes_on(out, trained):
    model, optimizer = trained
    lossray.record(out, model, optimizer, 3)
    as_older(out, model, optimizer, 3)
    before = files(out)
    lossray.record(out, model, optimizer, 3)
    assert files(out) == before
    optimizer.param_groups[0]["maximize"] = True  # which it did not know, and would have called by its class
    lossray.record(out, model, optimizer, 4)
    assert read(out, 4).optimizer.keys() == {"momentum", "scale", "threshold", "rate"}
    assert {name: files(out)[name] for name in before if "3" in name} == {
        name: content for name, content in before.items() if "3" in name
    }
    recording = read_recording(Store(str(out)), "run")
    assert (recording.optimizer, recording.kind, len(recording.notes)) == ("adam", "Adam", 1)
    with pytest.raises(StoreError, match="optimizer: found sgd, before adam"):
        lossray.record(out, model, torch.optim.SGD(model.parameters()), 5)


def as_older(out, model, optimizer, step, run="run"):
    """A checkpoint and its description as version 0.1 wrote them: the raw state, and no notes."""
    store = Store(str(out))
    names = ("exp_avg", "exp_avg_sq")
    states = [optimizer.state[p] for p in model.parameters() if p.requires_grad]
    state = {name: torch.cat([own[name].flatten() for own in states])[None] for name in names}
    older = replace(read(out, step, run), optimizer={**state, "step": states[0]["step"].clone()})
    store.write_bytes(store.checkpoint_path(run, step), dumps(older))
    plain = store.read_json(f"recorded/{run}.json")
    for key in ("kind", "exact", "adaptive", "notes"):
        del plain[key]
    store.write_json(f"recorded/{run}.json", {**plain, "format": "recording/1"})


def test_parameters_that_are_not_finite_are_recorded_as_diverged(out, trained):
    model, optimizer = trained
    with torch.no_grad():
        model.first.bias[1] = torch.nan
    lossray.record(out, model, optimizer, 7)
    checkpoint = read(out, 7)
    assert (checkpoint.alive.tolist(), checkpoint.diverged_at.tolist()) == ([False], [7])
    lossray.record(out, model, optimizer, 7)  # the same again


def test_it_writes_to_object_stores(trained):
    lossray.record("memory://recorded-out", *trained, 3)
    assert read("memory://recorded-out").step == 3


# ---- again


def test_the_same_weights_again_change_nothing(out, trained):
    model, optimizer = trained
    for step in (3, 5):
        lossray.record(out, model, optimizer, step)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for overwrite in (False, True):
        for step in (3, 5):
            lossray.record(out, model, optimizer, step, overwrite=overwrite)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_weights_at_a_recorded_step_are_refused_by_name(out, trained):
    model, optimizer = trained
    lossray.record(out, model, None, 3, run="mine")
    before = files(out)
    with pytest.raises(
        StoreError, match=r"step 3 of run 'mine' is recorded already, with other weights: .*overwrite"
    ):
        lossray.record(out, moved(model), None, 3, run="mine")
    with pytest.raises(StoreError, match="with other optimizer state and lr: "):
        lossray.record(out, model, optimizer, 3, run="mine")
    assert files(out) == before


def test_overwriting_drops_what_the_run_has_from_there_on(out, trained):
    model, _ = trained
    for step in (0, 5, 10):
        lossray.record(out, model, None, step)
        lossray.record(out, model, None, step, run="other")
    lossray.record(out, moved(model), None, 5, overwrite=True)
    store = Store(str(out))
    assert store.checkpoint_steps("run") == [0, 5]
    assert store.checkpoint_steps("other") == [0, 5, 10]
    assert torch.equal(read(out, 5).parameters["first.weight"][0], moved(model).first.weight)
    lossray.record(out, model, None, 3, overwrite=True)  # a new step before: what followed was another course
    assert store.checkpoint_steps("run") == [0, 3]


def test_overwriting_the_first_checkpoint_begins_the_run_anew(out, trained):
    model, optimizer = trained
    other = nn.Linear(2, 2)
    for step in (3, 5):
        lossray.record(out, other, torch.optim.Adam(other.parameters(), eps=1.0), step)
    lossray.record(out, model, optimizer, 3, overwrite=True)
    assert read(out, 3).optimizer.keys() == {"momentum", "scale", "threshold", "rate"}
    (recording,) = read_recordings(Store(str(out)))
    assert next(iter(recording.parameters)) == "first.weight"
    assert recording.optimizer == "adam"
    assert recording.steps.keys() == {3}


# ---- what it refuses


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_has_one_architecture_and_one_optimizer(out, trained, overwrite):
    model, optimizer = trained
    for step in (0, 9):
        lossray.record(out, model, optimizer, step)
    with pytest.raises(
        StoreError, match=r"parameters: found first\.weight none, before \[3, 3\]; .*run=\.\.\."
    ):
        lossray.record(out, nn.Linear(2, 2), None, 1, overwrite=overwrite)
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(StoreError, match="optimizer: found sgd, before adam"):
        lossray.record(out, model, sgd, 1, overwrite=overwrite)
    model.first.bias.requires_grad_(False)
    with pytest.raises(StoreError, match=r"parameters: found first\.bias none, before \[3\]"):
        lossray.record(out, model, optimizer, 1, overwrite=overwrite)
    assert Store(str(out)).checkpoint_steps("run") == [0, 9]


@pytest.mark.parametrize("place", ["file", "file/deeper", "/proc/lossray-out", "/dev/null", "nobody://x/y"])
def test_a_place_that_cannot_be_written_is_named_in_a_line(tmp_path, trained, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot (be a store|be written|open the store)") as caught:
        lossray.record(place if "//" in place else tmp_path / place, *trained, 3)
    assert "\n" not in str(caught.value)
    assert place in str(caught.value)


def test_an_object_store_that_says_no_is_named_in_a_line(monkeypatch, trained):
    class NoCredentials(Exception):
        pass

    def refuse(self, path):
        raise NoCredentials("Unable to locate credentials")

    monkeypatch.setattr(MemoryFileSystem, "find", refuse)
    with pytest.raises(StoreError, match="memory://mine: cannot be a store: NoCredentials: Unable to locate"):
        lossray.record("memory://mine", *trained, 3)


@pytest.mark.parametrize("step", [-1, 1.0, "3", None, True, torch.tensor(0.5)])
def test_a_step_is_a_count(out, step):
    with pytest.raises(StudyError, match=r"step: found .*; allowed: a whole number from 0"):
        lossray.record(out, nn.Linear(1, 1), None, step)
    assert not out.exists()


def test_a_step_may_be_any_kind_of_integer(out):
    import numpy as np

    for step in (np.int64(3), torch.tensor(4)):
        lossray.record(out, nn.Linear(1, 1), None, step, run=f"r{int(step)}")
    assert read(out, 4, "r4").step == 4


@pytest.mark.parametrize("run", ["", "a/b", "../a", ".hidden", "a b", "x" * 101, 3, None])
def test_a_run_is_a_name(out, run):
    with pytest.raises(StudyError, match=r"run: found .*; allowed: "):
        lossray.record(out, nn.Linear(1, 1), None, 0, run=run)
    assert not out.exists()


def test_what_is_no_model_or_no_optimizer_of_it_is_refused(out):
    model = nn.Linear(2, 2)
    for arguments, error, says in (
        (({}, None), StudyError, "model: found dict; allowed: a torch.nn.Module"),
        ((model, 0.1), StudyError, "optimizer: found float; allowed: a torch.optim.Optimizer, or None"),
        ((nn.Linear(2, 2).requires_grad_(False), None), ModelError, "Linear has no trainable parameter"),
        ((nn.ReLU(), None), ModelError, "ReLU has no trainable parameter"),
        ((nn.LazyLinear(2), None), ModelError, "lazy layers .* after its first forward pass"),
        (
            (model, torch.optim.SGD(nn.Linear(2, 2).parameters())),
            ModelError,
            "SGD steps none of the parameters of this Linear",
        ),
    ):
        with pytest.raises(error, match=says):
            lossray.record(out, *arguments, 0)
    assert not out.exists()


def test_the_store_of_a_study_that_trains_is_refused(out):
    Store(str(out)).write_json("manifest.json", {"study": {"name": "paper", "source": None}})
    before = files(out)
    with pytest.raises(StoreError, match="is the store of study 'paper', which trains its runs itself"):
        lossray.record(out, nn.Linear(1, 1), None, 0)
    assert files(out) == before


@pytest.mark.parametrize("stranger", ["notes.txt", "checkpoints/last.pt"])
def test_a_folder_of_other_files_is_refused(out, stranger):
    Store(str(out)).write_bytes(stranger, b"")
    with pytest.raises(StoreError, match=r"found files that lossray\.record has not written"):
        lossray.record(out, nn.Linear(1, 1), None, 0)


def test_a_damaged_description_is_named(out):
    lossray.record(out, nn.Linear(1, 1), None, 0)
    path = out / "recorded" / "run.json"
    plain = json.loads(path.read_text())
    for content, says in (
        ("{", "is damaged"),
        ("[]", "is no recording"),
        (json.dumps(plain | {"format": "recording/3"}), "is no recording of this version"),
        (json.dumps(plain | {"colour": 1}), "is damaged"),
    ):
        path.write_text(content)
        with pytest.raises(StoreError, match=f"run.json.* {says}"):
            lossray.record(out, nn.Linear(1, 1), None, 1)
