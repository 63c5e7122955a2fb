"""The records of a check as the text of a section."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import median
from typing import Any

from benchmarks.gpu_check.parts import PARTS
from benchmarks.report import table, write_section

TITLE = "On a GPU"
DRY_TITLE = "Dry run of the check of a GPU"
DRY_TEXT = "A dry run on the CPU, at sizes that say nothing of speed: it shows that every part runs.\n\n"
COMMAND = "make gpu-check"
Records = Sequence[dict[str, Any]]


def failed(records: Records) -> list[str]:
    """The parts that did not come to a good end, those that never began included."""
    ends = {record["part"]: record["end"] for record in records if "end" in record}
    asked = next(record["parts"] for record in records if "parts" in record)
    return [name for name in asked if ends.get(name) != "passed"]


def write(records: Records) -> str:
    """Put the section into docs/benchmarks.md; the section."""
    return write_section("gpu_check", TITLE, COMMAND, body(records), on=machine(records))


def dry_section(records: Records) -> str:
    """The section of a dry run, which is in no document."""
    return f"## {DRY_TITLE}\n\n{DRY_TEXT}`{COMMAND} DEVICE=cpu` on {machine(records)}.\n\n{body(records)}\n"


def is_dry(records: Records) -> bool:
    """Whether this was on a CPU."""
    return any(record.get("device") == "cpu" for record in records)


def machine(records: Records) -> str:
    """It and its software, in words."""
    return next((record["machine"] for record in records if "machine" in record), "an unknown machine")


def summary(records: Records) -> str:
    """A table with one line for each part."""
    ends = [record for record in records if "end" in record]
    rows = [
        [PARTS[end["part"]].module.TITLE, end["end"], f"{end['seconds']:.0f}", _counts(end["part"], records)]
        for end in ends
    ]
    return table(("part", "result", "seconds", ""), rows)


def body(records: Records) -> str:
    """The summary, and each part."""
    lacking = [line for record in records for line in record.get("not_installed", ())]
    parts = [_part(name, [record for record in records if record.get("part") == name]) for name in PARTS]
    return "\n\n".join(filter(None, [summary(records), _list("", lacking), *parts]))


def _part(name: str, records: Records) -> str:
    if not records:
        return ""
    module = PARTS[name].module
    rows = [record["row"] for record in records if "row" in record]
    tables = [_table(list(group)) for _, group in groupby(rows, key=list)]
    left_out = [record["left_out"] for record in records if "left_out" in record]
    failures = [record["failure"] for record in records if "failure" in record]
    lists = [_list("Left out for lack of time:", left_out), _list("Failed:", failures)]
    return "\n\n".join(filter(None, [f"### {module.TITLE}", module.TEXT, *tables, *lists]))


def _counts(name: str, records: Records) -> str:
    outcomes = [record["outcome"] for record in records if record.get("part") == name and "outcome" in record]
    counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    left_out = sum("left_out" in record for record in records if record.get("part") == name)
    counts |= {"left out for lack of time": left_out} if left_out else {}
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return table(list(rows[0]), [[_cell(cell) for cell in row.values()] for row in rows])


def _cell(value: Any) -> str:
    """A text, a number, or the median (smallest to largest) of several."""
    if isinstance(value, list):
        return f"{_number(median(value))} ({_number(min(value))} to {_number(max(value))})"
    return (
        _number(value) if isinstance(value, int | float) else " ".join(str(value).replace("|", "/").split())
    )


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def _list(title: str, lines: Iterable[str]) -> str:
    lines = [" ".join(line.split()) for line in lines]
    return "\n".join([*([title, ""] if title else []), *(f"- {line}" for line in lines)]) if lines else ""
