"""Other quadratures that the same products allow: they show how far a Gauss quadrature may be off.

The Lanczos matrix T of m blocks fixes the moments of a probe's measure. Changing its last diagonal block
changes only the highest: each such rule is a measure with positive weights that agrees with the true one in
all moments to degree 2m - 2 (Golub & Meurant 2010). For functions that bend at 0 alone the rule with a node
at 0 is the lowest of them, and those with 0 amid two nodes are about the highest. For |lambda| and one probe
the first is the least that any measure with these moments gives.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lossray.curvature.quadrature import Quadrature

Array = NDArray[np.float64]
Rule = tuple[Array, Array]  # nodes [m], weights [probes, m]

MOST_RULES = 3
LARGEST_SHIFT = 1e6  # of the last diagonal block, in |T|: more would drown the others in rounding


def rules(quadrature: Quadrature) -> Iterator[Rule]:
    """The rule with a node at 0, then those with 0 amid two nodes; all nodes inside the spectrum."""
    known = np.concatenate([quadrature.deflated, quadrature.nodes])
    low, high = known.min() - quadrature.deflation_error, known.max() + quadrature.deflation_error
    for nodes, weights in _rules(quadrature.projected, quadrature.start):
        yield nodes.clip(low, high), weights


def _rules(projected: Array, start: Array) -> Iterator[Rule]:
    scale = np.abs(projected).max()
    if len(projected) <= len(start) or scale == 0:
        return
    projected = projected / scale
    at_zero = _with_node(projected, start, 0.0)
    nodes = at_zero[0]
    apart = nodes[np.abs(nodes) > 1e-9]  # the block's nodes at 0 are equal to rounding
    neighbours = [*apart[apart > 0][:1], *apart[apart < 0][-1:]]
    for nodes, weights in (at_zero, *(_with_node(projected, start, x / 2) for x in neighbours)):
        yield scale * nodes, weights


def _with_node(projected: Array, start: Array, node: float) -> Rule:
    """The rule of which ``node`` is a node for every vector of the block (Gauss-Radau, Golub 1973)."""
    block, kept = len(start), len(projected) - len(start)
    values, vectors = np.linalg.eigh(projected[:kept, :kept])
    coupled = projected[kept:, :kept] @ vectors
    distances = values - node
    least = np.maximum(np.square(coupled).sum(axis=0) / LARGEST_SHIFT, np.finfo(np.float64).tiny)
    distances = np.where(distances < 0, -1.0, 1.0) * np.maximum(np.abs(distances), least)
    changed = projected.copy()
    changed[kept:, kept:] = node * np.eye(block) + (coupled / distances) @ coupled.T
    return gauss(changed, start)


def gauss(projected: Array, start: Array) -> Rule:
    """Nodes [m] and weights [probes, m] of a Lanczos matrix [m, m] and its start [b, probes]."""
    nodes, rotation = np.linalg.eigh(projected)
    components = start.T @ rotation[: len(start)]
    return nodes, np.square(components) / np.square(start).sum(axis=0)[:, None]
