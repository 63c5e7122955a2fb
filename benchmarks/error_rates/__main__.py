"""``python -m benchmarks.error_rates [REPEATS]`` simulates every case and writes docs/error_rates.md."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

from benchmarks.error_rates import claim_a, claim_b, claim_c, slope_and_dispersion
from benchmarks.error_rates.case import MOST, Case, hits
from benchmarks.report import table

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "error_rates.md"
REPEATS = 1000
WORKERS = 2
AGAIN = 10
TITLE = """# How often a verdict is wrong

Every word of a verdict is given by a rule (see [science.md](science.md#claims)). Here the rules are tried
on simulated studies whose truth is planted. Written by `python -m benchmarks.error_rates {repeats}`:
{repeats} studies for each number, which is good to {error:.1f} points where it is 5%; the slow tests check
every word on fewer (tests/findings/test_error_rates.py).

- **Wrong**: how often a word is given, in percent, at the edge of its truth, where it just is not true: the
  worst case. Bound: {most:.0%}. What comes out above it is simulated again, {again} times as often, and
  that number stands here: of so many numbers some are above by chance.
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
    write(rates_of(every, repeats), repeats)


def rates_of(every: Sequence[Case], repeats: int) -> list[float]:
    """How often each case's word is given; those above the bound from AGAIN times as many studies."""
    with ProcessPoolExecutor(WORKERS) as pool:
        places = range(len(every))
        counts = list(pool.map(_hits, places, [repeats] * len(every), chunksize=4))
        return again([count / repeats for count in counts], every, repeats, pool)


def again(rates: list[float], every: Sequence[Case], repeats: int, pool: ProcessPoolExecutor) -> list[float]:
    """The rates, those of wrong words above the bound from more studies: by chance some of many are above."""
    high = [i for i, case in enumerate(every) if case.wrong and rates[i] > MOST]
    counts = pool.map(_hits, high, [AGAIN * repeats] * len(high))
    better = dict(zip(high, counts, strict=True))
    return [better[i] / (AGAIN * repeats) if i in better else rate for i, rate in enumerate(rates)]


def write(rates: Sequence[float], repeats: int) -> None:
    """The document, from the rates of all cases."""
    every = list(cases())
    error = 100 * (0.05 * 0.95 / repeats) ** 0.5
    parts = [TITLE.format(repeats=repeats, error=error, most=MOST, again=AGAIN)]
    for wrong, title in ((True, "Wrong"), (False, "Right")):
        chosen = {case: rate for case, rate in zip(every, rates, strict=True) if case.wrong == wrong}
        parts.append(f"## {title}\n\n{_table(chosen)}\n")
    DOCUMENT.write_text("\n".join(parts))


def _hits(i: int, repeats: int) -> int:
    return hits(list(cases())[i], repeats=repeats, seed=i)


def _table(rates: Mapping[Case, float]) -> str:
    """One row for each word, truth and scatter; one column for each n."""
    rows: dict[tuple[str, ...], dict[int, float]] = {}
    for case, rate in rates.items():
        key = (case.claim, case.word, case.truth, case.null)
        rows.setdefault(key, {})[case.n] = 100 * rate
    sizes = sorted({n for own in rows.values() for n in own})
    body = [[*key, *(f"{own[n]:.1f}" if n in own else "-" for n in sizes)] for key, own in rows.items()]
    return table(("claim", "word", "truth", "runs", *(f"n = {n}" for n in sizes)), body)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS)
