"""Each case runs in a process of its own, started in a user's folder that comes first on the path."""

import ast
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lossray.imports
from lossray.imports import uncollected

ROOT = Path(lossray.imports.__file__).resolve().parents[1]
REPORT = """
import json, sys
import tasks, flows
print(json.dumps({"tasks": tasks.__file__, "flows": flows.__file__, "path": sys.path,
                  "tasks_path": list(getattr(tasks, "__path__", ()))}))
"""


@pytest.fixture
def user(tmp_path):
    """The user's folder, with decoys under the names of ours, and one real module."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "tasks.py").write_text("DECOY = True\n")
    (folder / "flows").mkdir()
    (folder / "flows" / "__init__.py").write_text("DECOY = True\n")
    (folder / "flows" / "cli.py").write_text("DECOY = True\n")
    (folder / "statistics.py").write_text("DECOY = True\n")
    (folder / "lrt_mine.py").write_text("VALUE = 'user'\n")
    return folder


def run(code, cwd, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(cwd)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def is_ours(report):
    return [report["tasks"], report["flows"]] == [
        str(ROOT / name / "__init__.py") for name in ("tasks", "flows")
    ]


def test_the_decoys_win_without_us(user):
    assert not is_ours(run("", user))


@pytest.mark.parametrize("before", ["", "import tasks, flows, flows.cli; assert tasks.DECOY\n"])
def test_settled(user, before):
    code = "import os\nfrom lossray.imports import settle_imports\n" + before
    report = run(code + "settle_imports([os.getcwd()])\n", user)
    assert is_ours(report)
    assert report["tasks_path"] == [str(ROOT / "tasks")]
    assert report["path"][-1] == str(user)
    assert report["path"].count(str(user)) == 1
    assert "" not in report["path"]


def test_a_decoys_submodules_go_with_it(user):
    code = (
        "import os, sys, flows.cli\nfrom lossray.imports import settle_imports\n"
        "settle_imports([os.getcwd()])\nassert 'flows.cli' not in sys.modules\n"
    )
    assert is_ours(run(code, user))


def test_user_modules_are_found_and_shadow_nothing(user):
    code = (
        "import os\nfrom lossray.imports import settle_imports\nsettle_imports([os.getcwd()])\n"
        "import lrt_mine, statistics\n"
        "assert lrt_mine.VALUE == 'user' and not hasattr(statistics, 'DECOY')\n"
    )
    run(code, user)


def test_second_call_changes_nothing(user):
    code = (
        "import os, sys\nfrom lossray.imports import settle_imports\n"
        "settle_imports([os.getcwd(), '/nowhere'])\n"
        "import tasks, flows\nbefore = (list(sys.path), tasks, flows)\n"
        "settle_imports([os.getcwd(), '/nowhere'])\n"
        "assert before == (sys.path, sys.modules['tasks'], sys.modules['flows'])\n"
    )
    report = run(code, user)
    assert report["path"][-2:] == [str(user), "/nowhere"]


def test_current_directory_before_the_studys_folder(user, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    (study / "lrt_mine.py").write_text("VALUE = 'study'\n")
    (study / "lrt_study.py").write_text("VALUE = 'study'\n")
    code = (
        "import os\nfrom lossray.imports import settle_imports\n"
        f"settle_imports([os.getcwd(), {str(study)!r}])\n"
        "import lrt_mine, lrt_study\nassert (lrt_mine.VALUE, lrt_study.VALUE) == ('user', 'study')\n"
    )
    assert run(code, user)["path"][-2:] == [str(user), str(study)]


def test_a_link_to_the_folder_is_the_folder(user, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(user)
    code = f"from lossray.imports import settle_imports\nsettle_imports([{str(user)!r}])\n"
    report = run(code, user, PYTHONPATH=str(link))
    assert is_ours(report)
    assert str(link) not in report["path"]


def test_worker_reads_the_folders_from_its_environment(user, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    code = "from lossray.imports import worker_setup\nworker_setup()\n"
    report = run(code, user, LOSSRAY_USER_FOLDERS=os.pathsep.join([str(user), str(study)]))
    assert is_ours(report)
    assert report["path"][-2:] == [str(user), str(study)]


def test_worker_without_folders_moves_its_own_directory_back(user):
    report = run("from lossray.imports import worker_setup\nworker_setup()\n", user, LOSSRAY_USER_FOLDERS="")
    assert is_ours(report)
    assert report["path"][-1] == str(user)
    assert report["path"].count(str(user)) == 1


def test_worker_undoes_what_ray_does_before_a_task(user):
    code = (
        "import os, sys\nfrom lossray.imports import worker_setup\nworker_setup()\n"
        "sys.path.insert(0, os.getcwd())\nworker_setup()\n"
    )
    report = run(code, user, LOSSRAY_USER_FOLDERS=str(user))
    assert report["path"].count(str(user)) == 1
    assert report["path"][-1] == str(user)


def test_works_from_the_installation_itself():
    code = "import os\nfrom lossray.imports import settle_imports\nsettle_imports([os.getcwd()])\n"
    code += "import lossray.errors\n"
    assert is_ours(run(code, ROOT))


def test_light_enough_for_every_worker():
    source = Path(lossray.imports.__file__).read_text()
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"lossray", *sys.stdlib_module_names}


def test_a_worker_collects_no_garbage_until_its_first_task(user):
    run(
        "import gc\n"
        "from lossray.imports import worker_started\nworker_started()\nassert not gc.isenabled()\n"
        "from tasks.worker import prepare_worker\nprepare_worker(1)\nassert gc.isenabled()\n",
        user,
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_imports_leave_the_collection_of_garbage_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
