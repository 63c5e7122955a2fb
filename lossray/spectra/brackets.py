"""Other quadratures that the same products allow: they show how far a Gauss quadrature may be off.

The Lanczos matrix T of m blocks fixes the moments of a probe's measure. Changing its last diagonal block
changes only the highest: each such rule is a measure with positive weights that agrees with the true one in
all moments to degree 2m - 2 (Golub & Meurant 2010). For functions that bend at 0 alone the rule with a node
at 0 is the lowest of them, and those with 0 amid two nodes are about the highest. For |lambda| and one probe
the first is the least that any measure with these moments gives.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from lossray.spectra.quadrature import Quadrature, start_weights

Array = NDArray[np.float64]
Rule = tuple[Array, Array]  # nodes [m], weights [probes, m]

MOST_RULES = 3
LARGEST_SHIFT = 1e6  # of the last diagonal block, in |T|: more would drown the others in rounding


def rules(quadrature: Quadrature) -> Iterator[Rule]:
    """The rule with a node at 0, then those with 0 amid two nodes; all nodes inside the spectrum."""
    values = np.concatenate([quadrature.deflated, quadrature.nodes])
    low, high = values.min() - quadrature.deflation_error, values.max() + quadrature.deflation_error
    for nodes, weights in _rules(quadrature.projected, quadrature.start):
        yield nodes.clip(low, high), weights


def _rules(projected: Array, start: Array) -> Iterator[Rule]:
    scale, kept = np.abs(projected).max(), len(projected) - len(start)
    if kept <= 0 or scale == 0:
        return
    projected = projected / scale
    values, vectors = _eigh(projected[:kept, :kept])
    coupled = projected[kept:, :kept] @ vectors
    at_zero = _with_node(projected, start, values, coupled, 0.0)
    nodes = at_zero[0]
    apart = nodes[np.abs(nodes) > 1e-9]  # the block's nodes at 0 are equal to rounding
    middles = [x / 2 for x in (*apart[apart > 0][:1], *apart[apart < 0][-1:])]
    others = (_with_node(projected, start, values, coupled, middle) for middle in middles)
    for nodes, weights in (at_zero, *others):
        yield scale * nodes, weights


def _with_node(projected: Array, start: Array, values: Array, coupled: Array, node: float) -> Rule:
    """The rule of which ``node`` is a node for every vector of the block (Gauss-Radau, Golub 1973).

    Args:
        projected: T [m, m], of size about 1.
        start: of the start vectors to the basis [b, probes].
        values: eigenvalues [m - b] of T without its last block.
        coupled: coupling [b, m - b] of their vectors to the last block.
        node: the node.
    """
    block, kept = len(start), len(values)
    least = np.maximum(np.square(coupled).sum(axis=0) / LARGEST_SHIFT, np.finfo(np.float64).tiny)
    distances = values - node
    distances = np.where(distances < 0, -1.0, 1.0) * np.maximum(np.abs(distances), least)
    changed = projected.copy()
    changed[kept:, kept:] = node * np.eye(block) + (coupled / distances) @ coupled.T
    nodes, rotation = _eigh(changed)
    return nodes, start_weights(rotation, start)


def _eigh(matrix: Array) -> tuple[Array, Array]:
    """By torch, not NumPy: the threads of a second BLAS would get in the way of the products'."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()
