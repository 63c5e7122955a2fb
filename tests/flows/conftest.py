"""A study file small enough to run in about a second, and the user's modules, forgotten after each test."""

import sys

import pytest

import flows
from lossray.study.toml import toml_text

TABLE = {
    "name": "small",
    "seeds": 2,
    "data": {"source": "gaussians", "n": 90, "dim": 6, "classes": 3, "noise": 1.0},
    "models": [{"name": "mlp", "widths": [4]}],
    "optimizers": [{"name": "sgd", "lr": 0.1}, {"name": "adam", "lr": 0.03}],
    "training": {"steps": 12, "batch_size": 16, "checkpoints": {"steps": [0, 5, 12]}, "log_every": 3},
    "curvature": {"top": 3},
}


def without_none(table):
    entries = {key: without_none(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in entries.items() if value is not None}


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    """``study_file(section={...}, key=value)`` writes the small study, changed, and gives its path as text.

    Keys that are None are left out. The current directory is an empty folder elsewhere.
    """
    monkeypatch.setattr(sys, "path", list(sys.path))  # a study's folders are appended to it
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def write(*, file="study.toml", **changes):
        table = {
            key: {**TABLE[key], **value} if isinstance(value, dict) and key in TABLE else value
            for key, value in (TABLE | changes).items()
        }
        path = tmp_path / "studies" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(toml_text(without_none(table)))
        return str(path)

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """``finished({section: ...})`` runs the small study with these sections: its file and its store."""

    def run(sections):
        folder = tmp_path_factory.mktemp("finished")
        path = folder / "study.toml"
        path.write_text(toml_text(TABLE | sections))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", list(sys.path))
            assert flows.run(str(path), folder / "out", in_process=True) == 0
        return path, folder / "out"

    return run


@pytest.fixture
def forget_modules(tmp_path):
    """Modules imported from the test's folders do not stay for the next test."""

    def forget():
        own = [
            name
            for name, module in list(sys.modules.items())
            if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path))
        ]
        for name in own:
            del sys.modules[name]

    yield forget
    forget()
