"""The pages and what refers to them: citations, names of pages and links resolve."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lossray", "tasks", "flows", "tests", "benchmarks", "docs", "cluster", "examples")
TEXTS = (".py", ".md", ".toml", ".yaml", ".cff", ".txt")
THEORY = ROOT / "docs" / "theory.md"
ABSENT = re.compile(
    r"\b(SCIENCE|DESIGN)\b|\b(RAY|HOUSE|PEERS)\.md\b"
)  # pages that are no part of the repository
SECTION = r"\d+(?:\.\d+|[A-Z])?"
CITATION = re.compile(rf"\b[Tt]heory\s+(?:# )?({SECTION}(?:(?:, | and | to ){SECTION})*)")
NAMED_FILE = re.compile(r"`((?:\w+/)*\w+\.(?:py|toml|cff|md))`")
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")

FILES = sorted(
    path
    for path in [
        *ROOT.glob("*"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")),
    ]
    if path.is_file()
    and (path.suffix in TEXTS or path.name == "Makefile")
    and path != Path(__file__).resolve()
)
PAGES = [
    path
    for path in FILES
    if path.suffix == ".md"
    and path.parent in (ROOT, *(ROOT / name for name in ("docs", "cluster", "examples")))
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def citations(text: str) -> list[str]:
    """The sections of the theory that a text cites, such as "2.6"."""
    return [section for cited in CITATION.findall(text) for section in re.findall(SECTION, cited)]


def headings(page: Path) -> list[str]:
    """The headings of a page, without those of code blocks."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ +(.*?) *$", prose, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives to the headings of a page."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


def links(page: Path) -> list[str]:
    """The targets of a page's links inside the repository."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [target for target in LINK.findall(prose) if "://" not in target]


def sections() -> set[str]:
    """The numbers of the theory's headings."""
    return {match[0] for heading in headings(THEORY) if (match := re.match(SECTION, heading))}


def test_citations_are_read_from_lists_ranges_and_comments():
    assert citations("(theory 2.1, 2.4 to 2.7 and 5A), theory\n# 6") == ["2.1", "2.4", "2.7", "5A", "6"]
    assert citations("in theory 5 steps do") == ["5"]
    assert citations("a theory of 2.1") == []


def test_anchors_are_those_of_a_forge():
    assert "26-gauge-invariant-geometry" in anchors(THEORY)


def test_every_citation_of_the_theory_is_a_heading():
    cited = {(name_of(path), section) for path in FILES for section in citations(path.read_text())}
    assert len(cited) > 50
    assert sorted((name, section) for name, section in cited if section not in sections()) == []


def test_the_theory_refers_to_its_own_headings():
    references = set(re.findall(r"\((?:section )?(\d\.\d+|\d[A-Z]|\d)\)", THEORY.read_text()))
    assert {"2.6", "5C", "1"} <= references
    assert sorted(references - sections()) == []


def test_no_file_names_a_page_that_is_not_here():
    named = [name_of(path) for path in FILES if ABSENT.search(path.read_text())]
    assert named == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for target in links(page):
        place, _, anchor = target.partition("#")
        there = (page.parent / place).resolve() if place else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_file_that_a_page_names_exists(page):
    """By its path in the repository, or in lossray/."""
    named = {name for name in NAMED_FILE.findall(page.read_text()) if "/" in name}
    missing = [name for name in named if not any((top / name).exists() for top in (ROOT, ROOT / "lossray"))]
    assert missing == []
