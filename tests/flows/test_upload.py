"""What travels with a study, and what does not: compared with the package that Ray itself makes."""

import os
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from flows import upload
from flows.upload import not_sent, upload_of
from lossray.errors import StudyError
from lossray.study import load_study

SENT = ("nets.py", "data/d.csv", "lib/__init__.py", "runs/notes.txt", ".rayignore", "lib/.gitignore")
LEFT = (
    ".git/HEAD",
    "lib/.venv/x.py",
    "lib/__pycache__/x.pyc",
    "web/node_modules/x.js",
    "other env/pyvenv.cfg",
    "other env/x.py",
    "runs/[a]! #1/manifest.json",
    "runs/[a]! #1/study.toml",
    "runs/[a]! #1/parts/tasks/k.parquet",
    "runs/begun/manifest.json",  # a store without results yet
    "runs/begun/study.toml",
    "runs/rec/recorded/r.json",
    "runs/rec/checkpoints/r/0.safetensors",
    "big/x.bin",
    "lib/local.txt",
)


@pytest.fixture
def project(study_file, tmp_path, monkeypatch):
    """``project(*files, **changes)``: the small study in a folder of its own, the current one, with files."""

    def make(*files, overrides=(), **changes):
        path = study_file(file="s.toml", **changes)
        for name in files:
            file = Path(path).parent / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        monkeypatch.chdir(Path(path).parent)
        return load_study("s.toml", overrides)

    return make


def refused(loaded):
    """The one line with which a study's upload is refused."""
    with pytest.raises(StudyError) as error:
        upload_of(loaded)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_sent_is_what_the_study_may_need_and_what_ray_packs(project, tmp_path):
    loaded = project(*SENT, *LEFT)
    Path(".rayignore").write_text("/big\n")
    Path("lib/.gitignore").write_text("local.*\n")
    sent = upload_of(loaded)
    assert {str(path) for path in sent.files} == {"s.toml", *SENT}

    package = tmp_path / "package.zip"
    create_package(str(sent.folder), package, include_gitignore=True, excludes=list(sent.excludes))
    with zipfile.ZipFile(package) as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == {"s.toml", *SENT}
    assert package.stat().st_size <= sent.size


def test_ignore_files_of_git_may_be_switched_off_as_for_ray(project, monkeypatch):
    loaded = project("x.bin")
    Path(".gitignore").write_text("*.bin\n")
    assert Path("x.bin") not in upload_of(loaded).files
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert Path("x.bin") in upload_of(loaded).files


def test_a_ready_made_study_takes_nothing_along_unless_it_names_something(project):
    project("nets.py")
    Path("nets.py").write_text("def data():\n    return None\n")
    assert upload_of(load_study("quick")).folder is None
    named = load_study("quick", ["data.source=nets:data"])
    assert Path("nets.py") in upload_of(named).files


def test_a_study_outside_of_the_current_directory_is_refused(project):
    loaded = project("below/x.txt")
    os.chdir("below")
    assert f"cd {loaded.folder}" in refused(load_study("../s.toml"))


def test_a_study_that_an_ignore_file_names_is_refused(project):
    loaded = project()
    Path(".gitignore").write_text("*.toml\n")
    assert "the study file: s.toml would not be sent" in refused(loaded)


PARQUET = {"source": "parquet", "label": "y", "features": ["x"]}
NO_GAUSSIANS = {"n": None, "dim": None, "classes": None, "noise": None}


def test_data_beside_the_study_travel_or_the_study_is_refused(project):
    loaded = project("d/a.parquet", "d/b.parquet", data=PARQUET | NO_GAUSSIANS | {"path": "d/*.parquet"})
    assert upload_of(loaded).holds("d/b.parquet")
    assert not_sent(loaded, upload_of(loaded)) == []
    Path(".rayignore").write_text("b.parquet\n")
    assert "b.parquet would not be sent, since it is named by a .gitignore" in refused(loaded)


def test_data_outside_of_the_current_directory_are_refused(project, tmp_path):
    (tmp_path / "d.parquet").touch()
    loaded = project(data=PARQUET | NO_GAUSSIANS | {"path": "../d.parquet"})
    assert "outside of the current directory" in refused(loaded)


def test_what_every_node_must_have_of_its_own_is_said(project, tmp_path, monkeypatch, forget_modules):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "lrt_far.py").write_text("WIDTH = 3\n")
    monkeypatch.syspath_prepend(elsewhere)
    project()
    Path("lrt_near.py").write_text("import lrt_far\n\ndef net():\n    return None\n")
    data = PARQUET | NO_GAUSSIANS | {"path": "/d.parquet"}
    loaded = project(data=data, models=[{"name": "lrt_near:net"}])
    lines = not_sent(loaded, upload_of(loaded))
    assert [line.split(" is not sent")[0] for line in lines] == [
        "data.path: /d.parquet",
        f"models.0.name: {elsewhere}/lrt_far.py",
    ]


def test_too_large_an_upload_is_refused_by_the_names_of_what_is_large(project, monkeypatch):
    loaded = project("small.txt")
    for name, size in (("runs/a.bin", 3000), ("runs/b.bin", 3000), ("model.pt", 4000)):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(bytes(size))
    assert upload_of(loaded).size < upload.LIMIT
    monkeypatch.setattr(upload, "LIMIT", 9000)
    message = refused(loaded)
    assert message.index("runs ") < message.index("model.pt ")
    assert ".rayignore" in message
    Path(".rayignore").write_text("runs\n")
    assert Path("runs/a.bin") not in upload_of(loaded).files


def test_a_folder_of_far_too_many_files_is_refused_before_they_are_all_seen(project, monkeypatch):
    loaded = project(*(f"{i}.txt" for i in range(5)))
    Path("loop").symlink_to(".")
    monkeypatch.setattr(upload, "MOST_FILES", 100)
    assert "more than 100 files" in refused(loaded)
