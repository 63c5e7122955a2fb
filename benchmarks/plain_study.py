"""The `quick` study as one would write it without lossray: torch.optim, PyHessian, multiprocessing.

    python -m benchmarks.plain_study OUT.json [SEEDS]

One training per optimizer and seed; at each checkpoint the evaluation of the three splits, then PyHessian's
ten leading eigenvalues, trace and density (4 x 64) on the training split. The runs are spread over the cores.
Data, initial weights and minibatches are those of the study, so that the spectra can be compared.
"""

import json
import multiprocessing
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.pyhessian import eigendecomposition_supplied, pyhessian
from lossray.seeds import generator, stream
from lossray.training.data_settings import DataSettings
from lossray.training.datasets import Dataset, load_dataset

SEEDS = 3
CHECKPOINTS = (0, 1, 4, 13, 45, 159, 563, 2000)
BATCH = 64
OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.02, momentum=0.9),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-3),
    "adam": lambda weights: torch.optim.Adam(weights, lr=3e-3),
}


def main() -> None:
    """Train and analyse every run, and write the rows."""
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else SEEDS
    jobs = [(name, seed) for name in OPTIMIZERS for seed in range(seeds)]
    with multiprocessing.Pool() as pool:  # one process per core
        rows = [row for run in pool.imap_unordered(_run, jobs) for row in run]
    Path(sys.argv[1]).write_text(json.dumps(rows))


def _run(job: tuple[str, int]) -> list[dict[str, object]]:
    """One training with its checkpoints."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", r"Using backward\(\) with create_graph=True", UserWarning)
    name, seed = job
    data = load_dataset(DataSettings(source="digits"), dtype=torch.float32)
    model = _model(seed)
    optimizer = OPTIMIZERS[name](model.parameters())
    rows = []
    for step in range(CHECKPOINTS[-1] + 1):
        if step in CHECKPOINTS:
            row = {"optimizer": name, "seed": seed, "step": step}
            rows.append(row | _evaluate(model, data) | _curvature(model, data, seed))
            model.train()
        inputs, targets = _minibatch(data, seed, step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return rows


def _model(seed: int) -> nn.Module:
    torch.manual_seed(stream(seed, "initialisation"))
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def _minibatch(data: Dataset, seed: int, step: int) -> tuple[Tensor, Tensor]:
    n = len(data.train.targets)
    epoch, batch = divmod(step, n // BATCH)
    order = torch.randperm(n, generator=generator(seed, "order", epoch))
    chosen = order[batch * BATCH : (batch + 1) * BATCH]
    return data.train.inputs[chosen], data.train.targets[chosen]


def _evaluate(model: nn.Module, data: Dataset) -> dict[str, float]:
    row = {}
    with torch.no_grad():
        for name in ("train", "validation", "test"):
            split = getattr(data, name)
            outputs = model(split.inputs)
            row[f"{name}_loss"] = float(F.cross_entropy(outputs, split.targets))
            row[f"{name}_accuracy"] = float((outputs.argmax(1) == split.targets).float().mean())
    return row


def _curvature(model: nn.Module, data: Dataset, seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    batch = (data.train.inputs, data.train.targets)
    engine = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False)
    values, _ = engine.eigenvalues(top_n=10)
    samples = engine.trace()
    with eigendecomposition_supplied():
        nodes, weights = engine.density(iter=64, n_v=4)
    model.zero_grad()
    density = {"nodes": np.array(nodes).tolist(), "weights": np.array(weights).tolist()}
    return {"eigenvalues": values, "trace": float(np.mean(samples)), **density}


if __name__ == "__main__":
    main()
