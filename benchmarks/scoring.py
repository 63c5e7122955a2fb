"""Scoring an ensemble against what one would write with scikit-learn, in one process on one thread.

The plain way is benchmarks/plain_scores.py. Both get the same logits, and that both find the same numbers is
checked, not assumed. Repeats of the two alternate, so that a disturbance hits both; the speed-up is the
median over neighbouring repeats.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import plain_scores
from benchmarks.report import table, write_section
from lossray.ensembles.calibration import fit_temperature
from lossray.ensembles.diversity import pairwise
from lossray.ensembles.scores import log_mean_probabilities, prefix_scores, score

EXAMPLES, CLASSES = 10_000, 10
MEMBERS = (10, 50)
REPEATS = 3
AGREEMENT = 1e-4  # relative to the larger: the plain search for the temperature is not exact

Numbers = np.ndarray
Work = Callable[[], Numbers]


def main() -> None:
    """Measure everything and write the section."""
    rows, worst = [], 0.0
    with threadpool_limits(1):
        for members in MEMBERS:
            for name, works in _works(members).items():
                row, difference = _compare(*works)
                rows.append([name, str(members), *row])
                worst = max(worst, difference)
                print(" | ".join(rows[-1]), flush=True)
    header = ("work", "members", "lossray, s", "plain, s", "speed-up")
    body = f"{_text(worst)}\n\n{table(header, rows)}"
    write_section("scoring", "Scoring ensembles", "python -m benchmarks.scoring", body)


def _text(worst: float) -> str:
    software = f"scikit-learn {version('scikit-learn')} and SciPy {version('scipy')}"
    return f"""Logits of {EXAMPLES:,} examples and {CLASSES} classes in float32, as they are stored; one
thread. "All scores" are the 15 of the table `ensembles` for all members, on one split, the temperature
fitted there; "all prefixes" the same for the first 1, 2, ... members on two splits of {EXAMPLES:,};
"all pairs" the disagreement and the symmetrised divergence of every two members. The plain way
(benchmarks/plain_scores.py) uses {software} as they come, and loops over
members (with a running sum of their probabilities), bins and pairs. Seconds are the median (smallest to
largest) of {REPEATS} repeats, both in turn; the speed-up is the median over neighbouring repeats. The numbers
of the two differ by at most {worst:.0e} (relative): SciPy's bounded search for the temperature is not
exact."""


def _works(members: int) -> dict[str, tuple[Work, Work]]:
    """By name: our way and the plain one."""
    (validation, v_targets), (test, targets) = (_ensemble(members, seed) for seed in (0, 1))

    def scored() -> Numbers:
        temperature = fit_temperature(log_mean_probabilities(test), targets)
        return np.array(dataclasses.astuple(score(test, targets, temperature=temperature)))

    def prefixes() -> Numbers:
        rows = prefix_scores(validation, v_targets, test, targets)
        return np.array([dataclasses.astuple(scores) for _, *both in rows for scores in both])

    return {
        "all scores": (scored, lambda: plain_scores.all_scores(test, targets)),
        "all prefixes": (
            prefixes,
            lambda: plain_scores.all_prefixes(validation, v_targets, test, targets),
        ),
        "all pairs": (lambda: np.array(pairwise(test)), lambda: plain_scores.all_pairs(test)),
    }


def _ensemble(members: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [members, examples, classes] in float32, and targets that are mostly met."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, size=EXAMPLES)
    common = 2 * rng.normal(size=(EXAMPLES, CLASSES)) + 4 * np.eye(CLASSES)[targets]
    logits = common + 1.5 * rng.normal(size=(members, EXAMPLES, CLASSES))
    return logits.astype(np.float32), targets


def _compare(ours: Work, plain: Work) -> tuple[list[str], float]:
    """The seconds of both and the speed-up, and the largest relative difference of their numbers."""
    timings = [(_seconds(ours), _seconds(plain)) for _ in range(REPEATS)]
    difference = _difference(ours(), plain())
    if not difference < AGREEMENT:
        raise SystemExit(f"the two ways differ by {difference:.1e}")
    speedup = statistics.median(theirs / own for own, theirs in timings)
    return [*(_spread(side) for side in zip(*timings, strict=True)), f"{speedup:.1f}"], difference


def _difference(ours: Numbers, plain: Numbers) -> float:
    """Largest over the numbers of the difference over the value; both may be missing, one alone may not."""
    if ours.shape != plain.shape or (np.isnan(ours) != np.isnan(plain)).any():
        return float("inf")
    return float(np.nanmax(np.abs(ours - plain) / np.maximum(np.abs(plain), 1e-6)))


def _seconds(work: Work) -> float:
    clock = time.perf_counter()
    work()
    return time.perf_counter() - clock


def _spread(seconds: tuple[float, ...]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
