"""The README, block by block, as a user would run it: files are written, commands run, statements executed.

The fast suite runs it with smaller numbers (SHORTER), in one process and without Ray; the slow one to the
letter. Installation and its own tests (EXCLUDED) are left out of both.
"""

import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flows
from flows.cli import app
from lossray.storage.store import Store

README = Path(flows.__file__).parents[1] / "README.md"
EXCLUDED = ("make",)  # the first word of commands that install, or run this
SHORTER = {  # each stands in the README, and is replaced wherever it does
    "seeds = 3": "seeds = 2",
    "widths = [16]": "widths = [4]",
    "lr = [0.05, 0.1]": "lr = [0.1]",
    "steps = 1000": "steps = 12",
    "step=1000": "step=12",
    "count = 8": "count = 2",
    "window = 50": "window = 2",
    "[surfaces]": "[surfaces]\npoints = 3",
    "[connectivity]": "[connectivity]\nsteps = 3",
    '["rescale_retrain", "lr_equivalent", "snapshot"]': '["rescale_retrain"]',
    "budgets = [1, 2]": "budgets = [1.5]",
    'align = ["none", "both"]': 'align = ["both"]',
    "nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)": "nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10)",
    "[curvature]": "[curvature]\nprobes = 1\nsteps = 8\nexamples = 60",
    "range(201)": "range(5)",
    "step % 50": "step % 2",
}


def blocks(text):
    """The fenced blocks in order: language ("" for commands) and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(block):
    """Its lines without comments, those joined by && apart, but for installation."""
    for line in block.splitlines():
        for command in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
            words = shlex.split(command)
            if words and words[0] not in EXCLUDED:
                yield words


def follow(text, run):
    """Do all that the README says, in the current folder."""
    named = {}
    for language, block in blocks(text):
        name = re.match(r"# (\S+\.\w+)\n", block)
        if name:
            Path(name[1]).write_text(block)
        elif language == "python":
            exec(compile(block, "README.md", "exec"), named)
        else:
            assert language == "", f"a block of {language} without a file name"
            for words in commands(block):
                run(words)
    return named


def here(words):
    """A command in this process, without Ray."""
    if words[0] == "python":
        runpy.run_path(words[1])
        return
    assert words[0] == "lossray", words
    more = ["--in-process"] if words[1] == "run" and "--dry-run" not in words else []
    with contextlib.suppress(SystemExit):
        code = app([*words[1:], *more], standalone_mode=False)
        assert not code, words


def elsewhere(words):
    """A command in a shell of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(shlex.join(words), shell=True, check=True, env={**os.environ, "PATH": path})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    for name in ("own", "mine"):
        sys.modules.pop(name, None)


def check(named, last):
    """What the text around the blocks promises."""
    assert named["found"].nullity >= 0
    assert named["path"].barrier is not None
    assert Store("out/own").checkpoint_steps("run")[-1] == last
    assert not any(count == 0 for count in named["study"].tables.values())


def test_the_readme_works_with_smaller_numbers(folder, capsys):
    text = README.read_text()
    for long, short in SHORTER.items():
        assert long in text, long
        text = text.replace(long, short)
    check(follow(text, here), last=4)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert "note: optimizer sgd: no direction 'momentum': it keeps none" in notes
    assert not any(word in note for note in notes for word in ("ensembles", "dense_up_to", "paths"))
    here(["python", "train.py"])  # the same weights again change nothing
    here(["lossray", "run", "own.toml", "--out", "out/own"])
    assert "is complete: nothing to do" in capsys.readouterr().err
    Path("train.py").write_text(Path("train.py").read_text().replace("range(5)", "range(7)"))
    here(["python", "train.py"])  # and more steps add to them
    here(["lossray", "run", "own.toml", "--out", "out/own"])
    assert Store("out/own").checkpoint_steps("run") == [0, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_readme_works_to_the_letter(folder):
    check(follow(README.read_text(), elsewhere), last=200)
