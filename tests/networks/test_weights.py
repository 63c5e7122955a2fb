"""Weights from files: read as they were saved, refused with a reason, never unpickled."""

import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from lossray.errors import ModelError
from lossray.networks.weights import load_weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    ],
)
def test_a_state_dict_is_read_as_training_scripts_save_it(tmp_path, wrapped):
    saved, model = net(), net()
    torch.save(wrapped(saved.state_dict()), tmp_path / "w.pt")
    assert not same(saved, model)
    load_weights(model, tmp_path / "w.pt")
    assert same(saved, model)


def test_safetensors_are_read_tied_weights_too(tmp_path):
    for saved, model in ((net(), net()), (Tied(), Tied())):
        safetensors.torch.save_model(saved, tmp_path / "w.safetensors")
        load_weights(model, tmp_path / "w.safetensors")
        assert same(saved, model)


class Evil:
    def __reduce__(self):
        return (open, ("evil-was-here", "w"))


def test_what_would_have_to_be_unpickled_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "model.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        ModelError, match=r"Sequential, and nothing is unpickled.*torch\.save\(model\.state_dict"
    ):
        load_weights(net(), "model.pt")
    with pytest.raises(ModelError, match="nothing is unpickled"):
        load_weights(net(), "evil.pkl")
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"0.weight": torch.ones(3, 2)}, r"'0\.bias' of Sequential is missing"),
        (net().state_dict() | {"2.bias": torch.ones(3)}, r"found '2\.bias', which Sequential does not have"),
        (
            net().state_dict() | {"0.bias": torch.ones(4)},
            r"'0\.bias' of Sequential: found \[4\], needed \[3\]",
        ),
        ({"epoch": 3}, "found dict and no state dict"),
        ([torch.ones(3)], "found list and no state dict"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, state, says):
    torch.save(state, tmp_path / "w.pt")
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=f"w.pt: {says}"):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"junk" * 9])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name}: "):
        load_weights(net(), tmp_path / name)


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.pt: no such file"):
        load_weights(net(), tmp_path / "none.pt")
