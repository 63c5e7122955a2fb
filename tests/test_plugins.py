import os
import subprocess
import sys
from pathlib import Path

import pytest

from lossray.errors import LossrayError, StudyError
from lossray.names import nearest, unknown_name
from lossray.plugins import (
    add_user_folders,
    check_imported,
    failure,
    is_spec,
    load,
    source_hash,
    split_spec,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder at the end of the path; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("lrt_"):
            del sys.modules[name]


def write(folder: Path, **sources: str) -> None:
    """Files by dotted module name, with ``__`` for the dot: ``pkg__init`` is pkg/__init__.py."""
    for name, source in sources.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        if path.stem == "init":
            path = path.with_name("__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


class TestSpecs:
    def test_split(self):
        assert split_spec("a.b:f") == ("a.b", "f")
        assert is_spec("a:f")
        assert not is_spec("mlp")

    @pytest.mark.parametrize(
        "spec", ["mlp", ":f", "a:", "a.:f", "a b:f", "a:f:g", "../a:f", "a:f()", "1a:f", ""]
    )
    def test_not_a_spec(self, spec):
        with pytest.raises(StudyError, match=r"is written 'package.module:function'"):
            split_spec(spec)

    def test_unknown_name(self):
        assert unknown_name("adm", ["sgd", "adam"]) == "found 'adm'; allowed: sgd, adam; did you mean 'adam'?"
        assert unknown_name("zzz", ["sgd", "adam"]) == "found 'zzz'; allowed: sgd, adam"
        assert nearest("zzz", ["sgd"]) is None


class TestLoad:
    def test_function_of_a_module_and_of_a_package(self, folder):
        write(
            folder, lrt_mod="def f(x):\n    return x + 1\n", lrt_pkg__init="", lrt_pkg__sub="class F: pass\n"
        )
        assert load("lrt_mod:f")(1) == 2
        assert load("lrt_pkg.sub:F").__name__ == "F"

    def test_a_file_written_after_the_last_look(self, folder):
        with pytest.raises(StudyError):
            load("lrt_late:f")
        write(folder, lrt_late="def f(): return 3\n")
        assert load("lrt_late:f")() == 3

    def test_missing_module_names_the_folders(self, folder):
        with pytest.raises(StudyError, match=r"'lrt_none:f': module 'lrt_none' not found in .*") as caught:
            load("lrt_none:f")
        assert str(folder) in str(caught.value)
        write(folder, lrt_pkg__init="")
        with pytest.raises(StudyError, match=r"module 'lrt_pkg.none' not found"):
            load("lrt_pkg.none:f")

    def test_missing_function_names_the_nearest(self, folder):
        write(folder, lrt_mod="def my_network(): pass\n")
        with pytest.raises(
            StudyError, match=r"lrt_mod.py has no function 'my_netwrk'; did you mean 'my_network'"
        ):
            load("lrt_mod:my_netwrk")

    def test_no_function(self, folder):
        write(folder, lrt_mod="f = 3\n")
        with pytest.raises(StudyError, match=r"'f' of .*lrt_mod.py is no function but 3"):
            load("lrt_mod:f")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("x = 1\ny = 1 / 0\n", r"ZeroDivisionError: division by zero \(lrt_bad.py:2\)"),
            ("def f(:\n", r"SyntaxError: .*\(lrt_bad.py, line 1\)"),
            ("import lrt_absent\n", r"ModuleNotFoundError: No module named 'lrt_absent' \(lrt_bad.py:1\)"),
            ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(lrt_bad.py:2\)"),
            ("import json\njson.loads('{')\n", r"JSONDecodeError: .*\(lrt_bad.py:2\)"),
        ],
    )
    def test_import_that_raises(self, folder, source, message):
        write(folder, lrt_bad=source)
        with pytest.raises(LossrayError, match="'lrt_bad:f': importing 'lrt_bad' raised " + message):
            load("lrt_bad:f")

    def test_our_own_names_are_taken(self):
        with pytest.raises(StudyError, match="'tasks' is lossray's own package"):
            load("tasks:no_such_model")
        with pytest.raises(StudyError, match="'flows' is lossray's own package"):
            load("flows.no_such_module:f")

    def test_failure_on_one_line(self):
        assert failure(ValueError("a\n  b")) == "ValueError: a b"
        assert failure(KeyError()) == "KeyError"


class TestAddUserFolders:
    def test_at_the_end_in_order_and_once(self, tmp_path, monkeypatch):
        start = list(sys.path)
        monkeypatch.setattr(sys, "path", list(start))
        folders = [tmp_path / "b", tmp_path / "a"]
        add_user_folders(folders)
        add_user_folders(folders)
        assert sys.path == [*start, *map(str, folders)]


class TestSourceHash:
    @pytest.fixture
    def project(self, folder):
        write(
            folder,
            lrt_main="import os, torch\nfrom lrt_pkg import sub\ndef f():\n    import lrt_lazy\n",
            lrt_lazy="import importlib\nimportlib.import_module('lrt_named')\n",
            lrt_named="import lrt_main\n",  # a circle
            lrt_pkg__init="from .deep import leaf as _leaf\nfrom .star import *\n",
            lrt_pkg__sub="from . import sibling\nfrom .sibling import value\n",
            lrt_pkg__sibling="value = 1\n",
            lrt_pkg__deep__init="",
            lrt_pkg__deep__leaf="from ... import above_the_top\nfrom ..cousin import x\n",
            lrt_pkg__cousin="x = 1\n",
            lrt_pkg__star__init="__all__ = ['public']\n",
            lrt_pkg__star__public="",
            lrt_pkg__unused="",
            lrt_other="",
        )
        (folder / "data.csv").write_text("1")
        return folder

    @pytest.mark.parametrize(
        "path",
        [
            *("lrt_main.py", "lrt_lazy.py", "lrt_named.py", "lrt_pkg/__init__.py", "lrt_pkg/sub.py"),
            *("lrt_pkg/sibling.py", "lrt_pkg/deep/__init__.py", "lrt_pkg/deep/leaf.py", "lrt_pkg/cousin.py"),
            *("lrt_pkg/star/__init__.py", "lrt_pkg/star/public.py"),
        ],
    )
    def test_changes_with_every_module_imported(self, project, path):
        before = source_hash("lrt_main:f")
        with (project / path).open("a") as file:
            file.write("# edited\n")
        assert source_hash("lrt_main:f") != before

    @pytest.mark.parametrize("path", ["lrt_other.py", "lrt_pkg/unused.py", "data.csv", "os.py", "new.py"])
    def test_does_not_change_with_other_files(self, project, path):
        before = source_hash("lrt_main:f")
        with (project / path).open("a") as file:
            file.write("# edited\n")
        assert source_hash("lrt_main:f") == before

    def test_is_the_same_in_another_folder_and_process(self, project, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        for file in project.rglob("*.py"):
            target = elsewhere / file.relative_to(project)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        code = "from lossray.plugins import source_hash; print(source_hash('lrt_main:f'))"
        environment = os.environ | {"PYTHONPATH": str(elsewhere), "PYTHONHASHSEED": "7"}
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == source_hash("lrt_main:f")

    def test_executes_nothing(self, folder):
        flag = folder / "executed"
        code = f"open({str(flag)!r}, 'w')\n"
        write(folder, lrt_top__init=code, lrt_top__mod=code + "import lrt_more\n", lrt_more=code)
        assert len(source_hash("lrt_top.mod:f")) == 64
        assert not flag.exists()
        assert not any(name.startswith("lrt_") for name in sys.modules)

    def test_the_same_before_and_after_loading(self, folder):
        write(
            folder, lrt_pkg__init="", lrt_pkg__mod="from lrt_helper import f\n", lrt_helper="def f(): pass\n"
        )
        before = source_hash("lrt_pkg.mod:f")
        load("lrt_pkg.mod:f")
        assert source_hash("lrt_pkg.mod:f") == before

    def test_helpers_in_another_user_folder_count(self, folder, monkeypatch):
        second = folder / "second"
        write(second, lrt_helper="x = 1\n")
        write(folder, lrt_mod="import lrt_helper\n")
        monkeypatch.setattr(sys, "path", [*sys.path, str(second)])
        before = source_hash("lrt_mod:f")
        write(second, lrt_helper="x = 2\n")
        assert source_hash("lrt_mod:f") != before

    def test_lossray_and_installed_packages_do_not_count(self, folder):
        write(folder, lrt_mod="import lossray.seeds, tasks, flows, numpy, json\nfrom torch import nn\n")
        bare = "import lossray.seeds, tasks, flows, numpy, json\nfrom torch import nn\n"
        assert source_hash("lrt_mod:f") == _digest(lrt_mod=bare)

    def test_an_installed_function_counts_its_own_package_only(self, folder):
        site = folder / "site-packages"
        write(
            site, lrt_lib__init="from .a import f\nimport lrt_dependency\n", lrt_lib__a="", lrt_dependency=""
        )
        sys.path.append(str(site))
        before = source_hash("lrt_lib:f")
        write(site, lrt_dependency="x = 1\n")
        assert source_hash("lrt_lib:f") == before
        write(site, lrt_lib__a="x = 1\n")
        assert source_hash("lrt_lib:f") != before

    def test_a_namespace_package_inside_a_package(self, folder):
        write(
            folder,
            lrt_outer__init="",
            lrt_outer__ns__mod="from . import other\n",
            lrt_outer__ns__other="x = 1\n",
        )
        before = source_hash("lrt_outer.ns.mod:f")
        assert "lrt_outer" not in sys.modules
        write(folder, lrt_outer__ns__other="x = 2\n")
        assert source_hash("lrt_outer.ns.mod:f") != before

    def test_namespace_package(self, folder):
        write(folder, lrt_ns__mod="from lrt_ns.other import x\n", lrt_ns__other="x = 1\n")
        before = source_hash("lrt_ns.mod:f")
        write(folder, lrt_ns__other="x = 2\n")
        assert source_hash("lrt_ns.mod:f") != before

    def test_missing_module(self, folder):
        with pytest.raises(StudyError, match="module 'lrt_none' not found"):
            source_hash("lrt_none:f")

    def test_a_source_that_does_not_parse_still_counts(self, folder):
        write(folder, lrt_mod="def f(:\n")
        before = source_hash("lrt_mod:f")
        write(folder, lrt_mod="def g(:\n")
        assert source_hash("lrt_mod:f") != before


def _digest(**sources: str) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name}\0{len(source)}\0{source}".encode())
    return digest.hexdigest()


class TestCheckImported:
    def test_source_that_was_planned_is_accepted(self, folder):
        write(folder, lrt_planned="import lrt_planned_helper\ndef f(): pass\n", lrt_planned_helper="x = 1\n")
        hashes = {"lrt_planned:f": source_hash("lrt_planned:f")}
        check_imported(hashes)
        check_imported(hashes)

    @pytest.mark.parametrize("edited", ["lrt_edited", "lrt_edited_helper"])
    def test_a_module_edited_after_its_import_is_refused(self, folder, edited):
        write(folder, lrt_edited="import lrt_edited_helper\ndef f(): pass\n", lrt_edited_helper="x = 1\n")
        load("lrt_edited:f")
        write(folder, **{edited: "def f(): return 2\n"})
        with pytest.raises(StudyError, match="'lrt_edited:f': this Python process has imported other source"):
            check_imported({"lrt_edited:f": source_hash("lrt_edited:f")})

    def test_a_module_edited_before_its_import_is_refused(self, folder):
        write(folder, lrt_late="def f(): pass\n")
        planned = {"lrt_late:f": source_hash("lrt_late:f")}
        write(folder, lrt_late="def f(): return 2\n")
        with pytest.raises(StudyError, match="restart the process"):
            check_imported(planned)

    def test_an_installed_package_may_differ_between_machines(self):
        check_imported({"statistics:mean": "the hash on the driver's machine"})
