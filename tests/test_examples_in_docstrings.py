"""Every public name has an example in its docstring, and the examples come out as they say."""

import doctest

import pytest

import flows
import lossray

EXEMPT = {"__version__", "main"}
NAMES = [*(f"lossray.{name}" for name in lossray.__all__ if name not in EXEMPT), "flows.run"]
OPTIONS = doctest.REPORT_ONLY_FIRST_FAILURE


def public(name):
    package, attribute = name.split(".")
    return getattr({"lossray": lossray, "flows": flows}[package], attribute)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the examples write
    found = [test for test in doctest.DocTestFinder().find(public(name), name, globs={}) if test.examples]
    assert name in [test.name for test in found], (
        f"the docstring of {name} has no example: add a section `Example:` with a few lines after `>>>` that "
        "import what they use, come out the same on every machine, and teach something"
    )
    said = []
    for test in found:  # those of methods too
        doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append)
    assert not said, "".join(said)
