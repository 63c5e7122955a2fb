"""What every engine under comparison offers: one product, and the full report of one checkpoint."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.problems import Problem

Array = NDArray[np.float64]

TOP = 10
TOLERANCE = 1e-3  # residual of an eigenpair, as a share of the largest eigenvalue
PROBES, STEPS = 4, 64


@dataclass(frozen=True)
class Part:
    """One part of a report, such as the eigenpairs."""

    seconds: float
    products: int


@dataclass(frozen=True)
class Report:
    """The numbers of one checkpoint."""

    values: Array  # [TOP] leading eigenvalues, descending
    trace: float
    nodes: Array  # [PROBES, STEPS]
    weights: Array  # [PROBES, STEPS], each row adds up to 1
    parts: dict[str, Part]

    @property
    def products(self) -> int:
        """Products with the Hessian, all parts together."""
        return sum(part.products for part in self.parts.values())


@dataclass(frozen=True)
class Side:
    """One engine, as its user would call it."""

    name: str
    product: Callable[[Problem], Callable[[Tensor], object]]  # set up; returns v [d] -> H v
    report: Callable[[Problem, int], Report]  # of a problem, with a seed; set-up included


@dataclass
class Parts:
    """Measures the parts of a report as they run; ``count`` reads the products so far."""

    count: Callable[[], int]
    measured: dict[str, Part] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        products, clock = self.count(), time.perf_counter()
        yield
        self.measured[name] = Part(time.perf_counter() - clock, self.count() - products)
