"""One's own training loop, recorded, and analysed by a study that trains nothing.

Two optimizers train one network. `lossray.record` writes checkpoints from inside the loop. The study
own_checkpoints.toml says how to build the network, the data and the loss, and takes it from there.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flows
import lossray

STUDY = Path(__file__).with_suffix(".toml")


def net() -> nn.Module:
    """The network; the study knows this function as own_checkpoints:net."""
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Digits in three splits, so that the study analyses the very examples that were trained on."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    parts = {"train": slice(1200), "validation": slice(1200, 1500), "test": slice(1500, None)}
    return {split: (inputs[part], targets[part]) for split, part in parts.items()}


def train(out: str, run: str, steps: int) -> None:
    """A loop as you have it, with one line more."""
    torch.manual_seed(
        0
    )  # a script that is run again and comes to the same weights changes nothing in the store
    inputs, targets = data()["train"]
    model = net()
    rates = {"sgd": 0.3, "adam": 3e-3}
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[run](model.parameters(), lr=rates[run])
    for step in range(steps + 1):
        if step % max(1, steps // 4) == 0:
            lossray.record(out, model, optimizer, step, run=run)
        batch = torch.randint(len(inputs), (64,))
        optimizer.zero_grad()
        cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()


def main(out: str = "out/own_checkpoints", steps: int = 400, overrides: Sequence[str] = ()) -> pd.DataFrame:
    """Train and record, analyse, and ask the tables; `overrides` are settings such as "curvature.top=3"."""
    for run in ("sgd", "adam"):
        train(out, run, steps)

    # The same in a shell, on all cores with Ray: lossray run own_checkpoints.toml --out out/own_checkpoints
    flows.run(STUDY, out, overrides=overrides, in_process=True)
    study = lossray.open_study(out)

    # How sharp is it, and how near is that to where a step of its optimizer becomes unstable (share = 1)?
    sharpness = study.table("sharpness")
    sharpness["share"] = sharpness["preconditioned_lr"] / sharpness["threshold"]
    sharpness = sharpness.pivot(index="step", columns="run_id", values=["lambda_max", "share"])
    print(sharpness.round(3).to_string(), "\n")

    # Where does it go? The share of a move's square in the span of the leading eigenvectors (energy), and how
    # many times that of a random direction it is.
    moves = study.table("angles").query(
        "direction == 'displacement' and gauge == 'raw' and subspace == 'top5'"
    )
    print(moves[["run_id", "step", "energy", "null_ratio", "resolved"]].round(3).to_string(index=False))
    return sharpness


if __name__ == "__main__":
    main()
