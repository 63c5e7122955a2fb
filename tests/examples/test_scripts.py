"""The scripts of examples/ in shortened form: they run, and what their comments promise comes out."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIGHTER = ("curvature.top=5", "curvature.probes=1", "curvature.steps=8", "curvature.tolerance=0.05")
SHORTER = (*LIGHTER, "training.steps=4", "training.checkpoints={steps = [0, 4]}", "angles.window=2")


@pytest.fixture
def script(monkeypatch):
    """Imports a script from its file; what studies import of it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # studies add the folder to it

    def load(name):
        spec = importlib.util.spec_from_file_location(f"script_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with torch.random.fork_rng(devices=[]):
        yield load
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_every_script_is_run_here_and_named_on_the_page():
    tested, page = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'script("{path.stem}")' not in tested] == []
    files = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.toml")]
    assert [path.name for path in files if f"({path.name})" not in page] == []


def test_scripts_stay_short():
    assert [path.name for path in EXAMPLES.glob("*.py") if len(path.read_text().splitlines()) > 80] == []


def test_from_pyhessian(script, capsys):
    report = script("from_pyhessian").main(examples=60, steps=3, top=2)
    assert report.pairs.converged.all()
    said = capsys.readouterr().out
    assert "2 largest, 2 smallest eigenvalues" in said
    assert "of the eigenvalues are below 1% of the largest" in said


def test_own_checkpoints(script, tmp_path, capsys):
    sharpness = script("own_checkpoints").main(str(tmp_path / "out"), steps=1, overrides=LIGHTER)
    assert sharpness["lambda_max"].columns.tolist() == ["adam", "sgd"]
    assert sharpness["lambda_max"].notna().all(axis=None)
    assert sharpness.index.tolist() == [0, 1]
    moves = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("True", "False"))]
    assert {line.split()[0] for line in moves} == {"adam", "sgd"}


def test_own_model(script, tmp_path, capsys):
    ends = script("own_model").main(str(tmp_path / "out"), overrides=("data.n=60", *SHORTER))
    runs = [(optimizer, seed, 4) for optimizer in ("adam", "sgd") for seed in (0, 1)]
    assert list(ends[["optimizer", "seed", "step"]].itertuples(index=False, name=None)) == runs
    assert "C, overall: UNDECIDED" in capsys.readouterr().out


def test_paths_and_ensembles(script, capsys):
    evaluated = script("paths_and_ensembles").main(steps=5, curve_steps=2, members=2)
    assert evaluated["t"].tolist() == [i / 8 for i in range(9)]
    said = capsys.readouterr().out
    assert "barrier of the curve, aligned:" in said
    assert "loss on held-out digits of 2 points of the curve:" in said
