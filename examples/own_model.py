"""One's own model, loss and data in a study: own_model.toml names the three functions below.

A study passes `input_shape` and `n_outputs` to the model function, and the other keys of its table as they
are. What the functions are made of is part of the keys of all results: edit one, and no old number is used.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import flows
import lossray

STUDY = Path(__file__).with_suffix(".toml")


class GatedLayer(nn.Module):
    """tanh(A x) * sigmoid(B x)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, width)
        self.gate = nn.Linear(inputs, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, inputs] to [N, width]."""
        return torch.tanh(self.value(inputs)) * torch.sigmoid(self.gate(inputs))


def net(input_shape: tuple[int, ...], n_outputs: int, width: int) -> nn.Module:
    """The model; its runs differ in the seed under which it is called."""
    return nn.Sequential(GatedLayer(math.prod(input_shape), width), nn.Linear(width, n_outputs))


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over examples of log cosh(f - y): quadratic for small errors, linear for outliers.

    The targets come as the data function gives them, [N] here, and the outputs as the model does, [N, 1].
    """
    errors = outputs.squeeze(-1) - targets
    return (errors + nn.functional.softplus(-2 * errors) - math.log(2)).mean()


def waves(n: int, outliers: float) -> tuple[Tensor, Tensor]:
    """Inputs [n, 2] and noisy targets [n], some of them far off; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    inputs = 4 * torch.rand(n, 2, generator=generator) - 2
    targets = torch.sin(2 * inputs[:, 0]) * inputs[:, 1] + 0.1 * torch.randn(n, generator=generator)
    return inputs, torch.where(torch.rand(n, generator=generator) < outliers, targets + 5, targets)


def main(out: str = "out/own_model", overrides: Sequence[str] = ()) -> pd.DataFrame:
    """Run or resume the study, and ask its tables; `overrides` are settings such as "training.steps=20"."""
    # The same in a shell, on all cores with Ray: lossray run own_model.toml --out out/own_model
    flows.run(STUDY, out, overrides=overrides, in_process=True)
    study = lossray.open_study(out)
    print({name: rows for name, rows in study.tables.items() if rows}, "\n")

    # How sharp is the end of each run? Tables are joined by their keys.
    runs = study.table("runs")[["run_id", "optimizer", "seed", "test_loss"]]
    curvature = study.table("curvature")[["run_id", "step", "lambda_max", "lambda_min", "trace"]]
    ends = runs.merge(curvature.groupby("run_id").last(), on="run_id")  # rows are sorted by step
    print(ends.drop(columns="run_id").round(3).to_string(index=False), "\n")

    # What this says on the paper's claims, and what it would take to say more: two seeds decide little.
    claims = study.table("claims").dropna(subset="verdict")
    for row in claims[~claims["claim"].str.contains("/")].itertuples():
        print(f"{row.claim}, {row.subject}: {row.verdict}\n  {row.text}")
    return ends


if __name__ == "__main__":
    main()
