"""Paths between two trained networks, the gauges in which they stand, and an ensemble along a path."""

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

import lossray


def train(inputs: Tensor, targets: Tensor, seed: int, steps: int) -> nn.Module:
    """A small ReLU network after some steps of Adam."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (64,))
        optimizer.zero_grad()
        cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    return model


def sharpness(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The largest eigenvalue of the Hessian."""
    return lossray.eigenpairs(lossray.Hessian(model, cross_entropy, data), k=1).values.item()


def ensemble_loss(models: list[nn.Module], inputs: Tensor, targets: Tensor) -> float:
    """Of the mean of the models' probabilities."""
    with torch.no_grad():
        probabilities = torch.stack([model(inputs).softmax(dim=1) for model in models]).mean(dim=0)
    return nll_loss(probabilities.log(), targets).item()


def main(steps: int = 400, curve_steps: int = 400, members: int = 5) -> pd.DataFrame:
    """Two networks, what lies between them, and what it is worth together."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    data, held_out = (inputs[:1200], targets[:1200]), (inputs[1200:], targets[1200:])
    a, b = (train(*data, seed, steps) for seed in (0, 1))

    # One function, many weights: rescaled, the network is sharper and computes the same. To compare networks,
    # take a gauge that the function fixes, such as the balanced one.
    scaled = lossray.rescale(a, {"0": 3.0})  # the name of the hidden layer; or a factor for each of its units
    for name, model in (("a", a), ("rescaled", scaled), ("balanced", lossray.balance(scaled))):
        print(f"largest eigenvalue of {name}: {sharpness(model, data):.3f}")

    # Hidden units have no order. Permuted and rescaled, b is the same function, and closer to a.
    near = lossray.align(b, to=a, data=data[0])
    paths = {
        "line": lossray.connect(a, b, cross_entropy, data, kind="line"),
        "line, aligned": lossray.connect(a, near, cross_entropy, data, kind="line"),
        "curve": lossray.connect(a, b, cross_entropy, data, kind="bezier", steps=curve_steps),
        "curve, aligned": lossray.connect(a, near, cross_entropy, data, kind="bezier", steps=curve_steps),
    }
    for name, path in paths.items():  # how far the loss rises above the chord between those of the ends
        print(f"barrier of the {name}: {path.barrier:.3f}")
    evaluated = paths["curve, aligned"].evaluate(points=9)
    print(evaluated.round(3).to_string(index=False))

    # Points of a curve are networks, and make an ensemble. Is it worth more than the ends alone? Measure it.
    along = [paths["curve"].at(i / (members - 1)) for i in range(members)]
    for name, models in (("a", [a]), ("a and b", [a, b]), (f"{members} points of the curve", along)):
        print(f"loss on held-out digits of {name}: {ensemble_loss(models, *held_out):.3f}")
    return evaluated


if __name__ == "__main__":
    main()
