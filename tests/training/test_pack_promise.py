"""What a run owes to its pack: not its draws, and no more than rounding; under the loop not a bit."""

import pytest
import torch

from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.storage.checkpoints import Checkpoint
from lossray.training.batches import next_minibatch
from lossray.training.datasets import Dataset, Split
from lossray.training.loop import train
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import optimizer_settings

MODELS = {
    "mlp": {"name": "mlp", "widths": [9, 7], "dropout": 0.2},
    "cnn": {"name": "cnn", "channels": [3, 5], "kernel": 3, "widths": [6]},
    "vit": {"name": "vit", "dim": 8, "depth": 1, "heads": 2},
}
STEP = 1e-5  # of the length of a step: float32 has 1e-7, and sums over some hundred terms


def dataset() -> Dataset:
    draw = torch.Generator().manual_seed(2)

    def split(n: int) -> Split:
        return Split(torch.randn(n, 1, 8, 8, generator=draw), torch.randint(0, 4, (n,), generator=draw))

    return Dataset(split(60), split(8), split(8), n_outputs=4, fingerprint="", input_shape=(1, 8, 8))


DATA = dataset()


def trained(model: str, seeds: tuple[int, ...], executor: str, steps: int) -> list[Checkpoint]:
    settings = model_settings(MODELS[model])
    stack, theta, buffers = build_stack(
        lambda: build_model(settings, (1, 8, 8), 4), seeds, executor=executor, dtype=torch.float32
    )
    training = TrainingSettings.model_validate(
        {"steps": steps, "batch_size": 12, "checkpoints": {"steps": []}}
    )
    rule = optimizer_settings({"name": "momentum", "lr": 0.05})
    return list(train(stack, theta, buffers, rule, training, DATA, pack_id="p", seeds=seeds))


@pytest.mark.parametrize("model", MODELS)
def test_draws_are_the_same_in_every_pack_and_a_step_differs_by_rounding(model):
    alone, together = trained(model, (4,), "vmap", 1), trained(model, (2, 4, 9), "vmap", 1)
    for name, tensor in alone[0].parameters.items():
        assert torch.equal(tensor[0], together[0].parameters[name][1])  # the initialisation
        step = tensor[0] - alone[1].parameters[name][0]
        other = tensor[0] - together[1].parameters[name][1]
        assert float((step - other).norm()) <= STEP * float(step.norm()) + 1e-7 * float(tensor[0].norm())
    training = TrainingSettings.model_validate({"steps": 5, "batch_size": 12})
    for step in range(5):
        own = next_minibatch(DATA, training, (4,), step)
        pack = next_minibatch(DATA, training, (2, 4, 9), step)
        assert torch.equal(own.inputs[0], pack.inputs[1])


@pytest.mark.parametrize("model", MODELS)
def test_under_the_loop_a_run_has_the_same_bits_in_every_pack(model):
    alone, together = trained(model, (4,), "loop", 6), trained(model, (2, 4, 9), "loop", 6)
    for name, tensor in alone[-1].parameters.items():
        assert torch.equal(tensor[0], together[-1].parameters[name][1])
