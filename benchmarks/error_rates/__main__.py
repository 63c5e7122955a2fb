"""``python -m benchmarks.error_rates [REPEATS]`` simulates every case and writes docs/error_rates.md."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

from benchmarks.error_rates import claim_a, claim_b, claim_c, slope_and_dispersion
from benchmarks.error_rates.case import MOST, Case, hits
from benchmarks.report import table

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "error_rates.md"
REPEATS = 1000
WORKERS = 2
TITLE = """# How often a verdict is wrong

Every word of a verdict is given by a rule (see [science.md](science.md#claims)). Here the rules are tried
on simulated studies whose truth is planted. Written by `python -m benchmarks.error_rates {repeats}`:
{repeats} studies for each number, which is good to {error:.1f} points where it is 5%; the slow tests check
every word on fewer (tests/findings/test_error_rates.py).

- **Wrong**: how often a word is given, in percent, at the edge of its truth, where it just is not true: the
  worst case. Bound: {most:.0%}.
- **Right**: how often it is given where it is true, at distances that were measured.
- n is the number of seeds. Runs scatter *independently*; or those of a seed together, with that
  *correlation*; or *skewed*, as the logarithm of a squared normal number is (for claim A: S of a single
  direction), which no S can be more.
"""


def cases() -> Iterator[Case]:
    """Those of all claims."""
    return chain(claim_a.cases(), slope_and_dispersion.cases(), claim_b.cases(), claim_c.cases())


def main(repeats: int) -> None:
    """Simulate, and write the document."""
    every = list(cases())
    with ProcessPoolExecutor(WORKERS) as pool:
        counts = list(pool.map(_hits, range(len(every)), [repeats] * len(every), chunksize=4))
    rates = {id(case): count / repeats for case, count in zip(every, counts, strict=True)}
    error = 100 * (0.05 * 0.95 / repeats) ** 0.5
    parts = [TITLE.format(repeats=repeats, error=error, most=MOST)]
    for wrong, title in ((True, "Wrong"), (False, "Right")):
        parts.append(f"## {title}\n\n{_table([case for case in every if case.wrong == wrong], rates)}\n")
    DOCUMENT.write_text("\n".join(parts))


def _hits(i: int, repeats: int) -> int:
    return hits(list(cases())[i], repeats=repeats, seed=i)


def _table(chosen: Iterable[Case], rates: Mapping[int, float]) -> str:
    """One row for each word, truth and scatter; one column for each n."""
    rows: dict[tuple[str, ...], dict[int, float]] = {}
    for case in chosen:
        key = (case.claim, case.word, case.truth, case.null)
        rows.setdefault(key, {})[case.n] = 100 * rates[id(case)]
    sizes = sorted({n for own in rows.values() for n in own})
    body = [[*key, *(f"{own[n]:.1f}" if n in own else "-" for n in sizes)] for key, own in rows.items()]
    return table(("claim", "word", "truth", "runs", *(f"n = {n}" for n in sizes)), body)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS)
