"""The commands of cluster/README.md: bash reads them, and lossray and Ray have the options."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from flows.cli import app

README = Path(__file__).resolve().parents[2] / "cluster" / "README.md"
BLOCKS = re.findall(r"^ *```\n(.*?)^ *```", README.read_text(), re.DOTALL | re.MULTILINE)


def commands(program):
    """The arguments of every call of a program."""
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            if line and line.split()[0] == program:
                words = shlex.split(line, comments=True)[1:]
                ends = [at for at, word in enumerate(words) if re.match("[&>]", word)]
                yield words[: min(ends, default=len(words))]


def parsed(group, arguments):
    """The values of a command line's options; nothing is run."""
    with group.make_context("", list(arguments)) as context:
        return group.get_command(context, arguments[0]).make_context("", arguments[1:]).params


def test_bash_reads_every_block():
    assert len(BLOCKS) >= 8
    for block in BLOCKS:
        result = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr


def test_lossray_has_these_commands_and_options():
    submitted = [words for words in commands("lossray") if words[0] == "submit"]
    assert len(submitted) == 3
    assert all(parsed(get_command(app), words) for words in commands("lossray"))
    assert {parsed(get_command(app), words)["address"] for words in submitted} == {"http://127.0.0.1:8265"}


def test_ray_has_these_commands_and_options():
    from ray.scripts.scripts import cli

    used = {words[0] for words in commands("ray")}
    assert used == {"get-auth-token", "start", "stop", "up", "dashboard", "down"}
    for words in commands("ray"):
        parsed(cli, words)


def test_an_option_that_is_not_there_is_noticed():
    with pytest.raises(Exception, match="No such option"):  # of a click that typer brings along
        parsed(get_command(app), ["submit", "quick", "--wait-for-it"])
