"""Commands that only read a store load neither torch, the statistics, scikit-learn nor Ray."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "scipy.stats", "sklearn", "ray")
# Runs the command line, and then says on its last line which of the heavy modules are there.
COMMAND = f"""
import sys, lossray
try:
    lossray.main()
except SystemExit as end:
    code = end.code
print([name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""
OPENED = f"""
import sys, lossray
study = lossray.open_study(sys.argv[1])
assert study.tables["runs"] == 4
assert len(study.table("runs")) == 4
assert study.study.name == "small"
print([name for name in {HEAVY} if name in sys.modules])
"""


def run(code, *arguments):
    """What a process that runs the code prints: its lines, and the heavy modules that it has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, eval(last)


@pytest.fixture(scope="module")
def out(finished):
    """The store of the small study, complete."""
    return str(finished({})[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tables"], "/tables"),
        (["tables", "runs"], "runs: 4 rows"),
        (["status"], "state: done"),
        (["claims"], "A. Perpendicularity"),
    ],
    ids=" ".join,
)
def test_what_reads_a_store_loads_nothing_heavy(out, arguments, says):
    lines, heavy = run(COMMAND, arguments[0], out, *arguments[1:])
    assert says in "\n".join(lines)
    assert heavy == []


@pytest.mark.parametrize("arguments", [["studies"], ["--version"]], ids=" ".join)
def test_what_needs_no_store_loads_nothing_heavy(arguments):
    lines, heavy = run(COMMAND, *arguments)
    assert lines
    assert heavy == []


def test_tables_are_listed_without_pandas(out):
    _, loaded = run(COMMAND.replace(str(HEAVY), str((*HEAVY, "pandas"))), "tables", out)
    assert loaded == []


def test_an_opened_study_gives_its_tables_and_settings_without_torch(out):
    assert run(OPENED, out) == ([], [])


def test_claims_that_are_not_current_are_computed_anew(out):
    _, heavy = run(COMMAND.replace("import sys, lossray", STALE), "claims", out)
    assert "scipy.stats" in heavy


def test_a_driver_gets_to_its_first_task_without_the_compiler_and_the_statistics(study_file, out):
    sections = {"surfaces": {}, "trajectory": {}, "ensembles": {"methods": ["snapshot"], "budgets": [1]}}
    digits = {"source": "digits", "n": None, "dim": None, "classes": None, "noise": None}
    study = study_file(data=digits, connectivity={}, degeneracy={}, **sections)
    assert run(PLANNED, study, f"{out}-other") == ([], [])


# The claims of another version than the one that is in the store.
STALE = "import sys, lossray, flows.verdicts; flows.verdicts.CLAIMS_VERSION += 1"

# What `lossray run` does before anything is written or starts.
PLANNED = """
import sys
import flows.study as study
request = study.check_request(sys.argv[1], sys.argv[2], ())
study.notes_of(request.loaded.study, request.dataset, ())
assert study.plan_of(request, study.try_settings(request, "cpu")).packs
assert request.store.committed() == {}
heavy = ("torch._dynamo", "scipy", "sklearn", "pandas", "matplotlib", "PIL", "lossray.findings.claims")
print([name for name in heavy if name in sys.modules])
"""
