"""From a PyHessian script to lossray: eigenvalues, trace and density of a trained network.

What one writes with PyHessian stands in comments above what takes its place. Every number comes with how well
it is known, and the model is left as it was: its mode, its weights and its `.grad`.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lossray
from lossray.spectra.analysis import Analysis


def train(inputs: Tensor, targets: Tensor, steps: int) -> nn.Module:
    """A small network after some steps of Adam, as any script of yours has it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


def main(examples: int = 1000, steps: int = 100, top: int = 5) -> Analysis:
    """Train on some images of digits, and look at the curvature of the loss."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = (
        torch.tensor(images / 16, dtype=torch.float32)[:examples],
        torch.tensor(labels)[:examples],
    )
    model = train(inputs, targets, steps)

    # H = hessian(model, criterion, data=(inputs, targets), cuda=False)
    H = lossray.Hessian(model, cross_entropy, (inputs, targets))  # or a list of batches, or a DataLoader

    # values, vectors = H.eigenvalues(maxIter=100, tol=1e-3, top_n=5)
    #
    # That power iteration ends when a value hardly changes any more, which does not mean that it has arrived.
    # And it finds what is largest in magnitude: "the sharpness" may be a negative eigenvalue. Here both ends
    # are asked for, and each pair has its true residual |H v - value v|: an eigenvalue lies that near.
    pairs = lossray.eigenpairs(H, k=top, end="both")
    print(pairs, "\n")

    # trace = numpy.mean(H.trace(maxIter=100, tol=1e-3))
    #
    # That ends when two means in a row agree, which they may do long before they are right. Here one says how
    # many products to spend, and gets a standard error.
    trace = lossray.trace(H, matvecs=100)
    print("trace", trace, "\n")

    # nodes, weights = H.density(iter=100, n_v=1)
    #
    # Nodes and weights are real, and the weights of each probe sum to 1. They are smoothed when a curve is
    # drawn, by a width of your choice. What share of the eigenvalues lies in an interval needs no smoothing.
    density = lossray.spectral_density(H, probes=4, steps=64)
    largest = pairs.values.max()
    grid = torch.linspace(-0.1, 1.1, 400, dtype=torch.float64) * largest
    curve = density.on_grid(grid, width=0.01 * float(largest))  # pyplot.semilogy(grid, curve)
    flat = density.weights[density.nodes.abs() < 0.01 * largest].sum() / len(density.nodes)
    print(f"density: {flat:.0%} of the eigenvalues are below 1% of the largest; peak {curve.max():.3g}\n")

    # Or all at once, for fewer products: density and trace have to estimate only what the pairs leave.
    report = lossray.analyse(H, top=top)
    print(report)
    return report


if __name__ == "__main__":
    main()
