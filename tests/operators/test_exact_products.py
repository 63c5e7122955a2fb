"""Inside products full precision and kernels with two derivatives; afterwards all settings are as found."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossray
from lossray.operators.exact_products import exact_products

CUDNN = torch.backends.cudnn


def settings():
    backends = torch.backends
    return {
        "matmul": backends.cuda.matmul.fp32_precision,
        "convolutions": CUDNN.conv.fp32_precision,
        "recurrences": CUDNN.rnn.fp32_precision,
        "cudnn": CUDNN.enabled,
        "benchmark": CUDNN.benchmark,
        "deterministic": CUDNN.deterministic,
        "gradients": torch.is_grad_enabled(),
        "fused attention": torch.backends.cuda.flash_sdp_enabled(),
    }


class Recording(nn.Module):
    """A model that notes at each forward pass whether cuDNN is on."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append(CUDNN.enabled)
        outputs = self.layer(x)
        return self.head(outputs[0][:, -1] if isinstance(outputs, tuple) else outputs.mean(dim=-1))


LAYERS = {
    "lstm": lambda: nn.LSTM(4, 3, batch_first=True),
    "gru": lambda: nn.GRU(4, 3, batch_first=True),
    "convolution": lambda: nn.Conv1d(5, 3, 3),
}


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setattr(CUDNN, "enabled", CUDNN.enabled)
    monkeypatch.setattr(CUDNN, "benchmark", True)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("enabled", [True, False])
def test_cudnn_is_off_inside_products_of_recurrent_models_alone(layer, enabled):
    torch.manual_seed(0)
    model, data = Recording(LAYERS[layer]()).double(), (torch.randn(6, 5, 4).double(), torch.arange(6) % 2)
    CUDNN.enabled = enabled
    before = settings()
    hessian = lossray.Hessian(model, F.cross_entropy, data, mode="recompute")
    model.seen.clear()
    hessian @ torch.ones(hessian.shape[0])
    assert set(model.seen) == {enabled and layer == "convolution"}
    assert settings() == before


@pytest.mark.parametrize("recurrent", [True, False])
def test_settings_are_as_found_after_an_error(recurrent):
    inside = {}

    def fail():
        inside.update(settings())
        raise KeyError

    with torch.no_grad():
        before = settings()
        with pytest.raises(KeyError), exact_products(recurrent=recurrent):
            fail()
        assert settings() == before
    full = dict.fromkeys(("matmul", "convolutions", "recurrences"), "ieee")
    changed = {**full, "cudnn": not recurrent, "gradients": True, "fused attention": False}
    assert inside == before | changed


def test_autocast_does_not_reach_the_products():
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), (torch.randn(8, 4), torch.arange(8) % 3)
    expected = lossray.Hessian(model, F.cross_entropy, data) @ torch.ones(15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lossray.Hessian(model, F.cross_entropy, data) @ torch.ones(15)
    assert torch.equal(found, expected)
