import os
import subprocess
import sys

import pytest

from lossray.errors import StudyError
from lossray.plugins import load
from lossray.source_hash import check_imported, file_hash, is_imported, source_hash
from tests.user_code import write


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
            file.write("print('edited')\n")  # which an import runs
        assert source_hash("lrt_main:f") != before

    @pytest.mark.parametrize("path", ["lrt_other.py", "lrt_pkg/unused.py", "data.csv", "os.py", "new.py"])
    def test_does_not_change_with_other_files(self, project, path):
        before = source_hash("lrt_main:f")
        with (project / path).open("a") as file:
            file.write("print('edited')\n")
        assert source_hash("lrt_main:f") == before

    def test_is_the_same_in_another_folder_and_process(self, project, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        for file in project.rglob("*.py"):
            target = elsewhere / file.relative_to(project)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        code = "from lossray.source_hash import source_hash; print(source_hash('lrt_main:f'))"
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
        write(folder, lrt_mod="import lrt_helper\ndef f(): return lrt_helper.x\n")
        monkeypatch.setattr(sys, "path", [*sys.path, str(second)])
        before = source_hash("lrt_mod:f")
        write(second, lrt_helper="x = 2\n")
        assert source_hash("lrt_mod:f") != before

    def test_lossray_and_installed_packages_do_not_count(self, folder):
        write(folder, lrt_mod="import lossray.seeds, tasks, flows, numpy, json\nfrom torch import nn\n")
        bare = "import lossray.seeds, tasks, flows, numpy, json\nfrom torch import nn\n"
        assert file_hash("lrt_mod:f") == _digest(lrt_mod=bare)

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
            lrt_outer__ns__mod="from . import other\ndef f(): return other.x\n",
            lrt_outer__ns__other="x = 1\n",
        )
        before = source_hash("lrt_outer.ns.mod:f")
        assert "lrt_outer" not in sys.modules
        write(folder, lrt_outer__ns__other="x = 2\n")
        assert source_hash("lrt_outer.ns.mod:f") != before

    def test_namespace_package(self, folder):
        write(folder, lrt_ns__mod="from lrt_ns.other import x\ndef f(): return x\n", lrt_ns__other="x = 1\n")
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


NETS = """
'''Networks of mine.'''
import os  # for later
import dataclasses, torch
from lrt_parts import block, other_block
import lrt_parts as parts
from torch import nn

WIDTH = 8
DEPTH = 2

def helper(n):
    '''Makes one.'''
    return block(n * WIDTH)

def net(input_shape, n_outputs):
    # a comment
    return nn.Sequential(helper(1), nn.Linear(8, n_outputs))

def other(input_shape, n_outputs):
    return other_block(DEPTH)

class Base(nn.Module):
    pass

class Net(Base):
    def forward(self, x):
        return parts.activation(x) + getattr(self, "a" + "b")

if __name__ == "__main__":
    print(net((1,), 2))
"""
PARTS = """
import torch

SCALE = 3.0

def block(n):
    return torch.nn.Linear(n, int(n * SCALE))

def other_block(n):
    return n

def activation(x):
    return x
"""


class TestWhatCounts:
    """One edit at a time, and the functions whose hash it changes."""

    @pytest.fixture
    def changed(self, folder):
        write(folder, lrt_nets=NETS, lrt_parts=PARTS)
        functions = ("net", "other", "Net")
        before = {name: source_hash(f"lrt_nets:{name}") for name in functions}

        def after(old, new):
            assert (old in NETS) != (old in PARTS)
            write(folder, lrt_nets=NETS.replace(old, new), lrt_parts=PARTS.replace(old, new))
            return {name for name in functions if source_hash(f"lrt_nets:{name}") != before[name]}

        return after

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("    # a comment\n", ""),
            ("import os  # for later", "import os  # unused"),
            ("import os  # for later\n", "import os, json\n"),
            ("'''Networks of mine.'''", "'''Networks of ours.\n\nAll of them.\n'''"),
            ("    '''Makes one.'''\n", "    '''Makes one\n\n    or more.\n    '''\n\n"),
            ("print(net((1,), 2))", "print(net((3,), 2))"),
            ("DEPTH = 2\n", "DEPTH = 2\nUNUSED = [1, 2]\nalso = lambda: print(1)\n"),
            ("class Base", "def another():\n    import lrt_absent, lrt_parts\n\nclass Base"),
            ("class Base", "@torch.no_grad()\ndef another(): return 1\n\nclass Base"),
            ("class Base", "from functools import cache\n@cache\ndef more(): return 1\n\nclass Base"),
            ("class Base", "@dataclasses.dataclass(frozen=True)\nclass C:\n    x: int = 1\n\nclass Base"),
        ],
    )
    def test_no_function(self, changed, old, new):
        assert changed(old, new) == set()

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("helper(1), nn", "helper(2), nn", {"net"}),
            ("block(n * WIDTH)", "block(n + WIDTH)", {"net"}),
            ("WIDTH = 8", "WIDTH = 9", {"net"}),
            ("SCALE = 3.0", "SCALE = 3.5", {"net"}),
            ("int(n * SCALE)", "round(n * SCALE)", {"net"}),
            ("DEPTH = 2", "DEPTH = 3", {"other"}),
            ("other_block(DEPTH)", "other_block(1)", {"other"}),
            ("class Base(nn.Module):\n    pass", "class Base(nn.Module):\n    bias = False", {"Net"}),
            ("def activation(x):\n    return x", "def activation(x):\n    return -x", {"Net"}),
            ("from torch import nn", "from lrt_own import nn", {"net", "Net"}),
            ("SCALE = 3.0", "SCALE = float(3)", {"net", "other", "Net"}),  # what an import runs
            ("import torch\n", "import torch\ntorch.manual_seed(0)\n", {"net", "other", "Net"}),
            ("WIDTH = 8", "nn.Linear.bias = 8\nWIDTH = 8", {"net", "other", "Net"}),
            ("DEPTH = 2", "DEPTH = 2\nfor i in range(2): WIDTH = i", {"net", "other", "Net"}),
            ("def helper", "@nn.init\ndef helper", {"net", "other", "Net"}),
        ],
    )
    def test_the_functions_that_use_it(self, changed, old, new, expected):
        assert changed(old, new) == expected

    @pytest.mark.parametrize(
        "code",
        [
            "globals()['block']",
            "getattr(lrt_parts, 'bl' + 'ock')",
            "eval('block')",
            "lrt_parts.__dict__",
            "vars(lrt_parts)",
            "sys.modules['lrt_parts']",
        ],
    )
    def test_everything_where_names_are_computed(self, folder, code):
        source = f"import sys, lrt_parts\ndef f(): return {code}\ndef g(): pass\n"
        write(folder, lrt_open=source, lrt_parts=PARTS)
        before = source_hash("lrt_open:f"), source_hash("lrt_open:g")
        write(folder, lrt_parts=PARTS.replace("return n\n", "return 2 * n\n"))
        assert source_hash("lrt_open:f") != before[0]
        assert source_hash("lrt_open:g") == before[1]

    @pytest.mark.parametrize(
        ("source", "old", "new"),
        [
            (
                "TABLE = {}\ndef add(f): TABLE[f.__name__] = f\n@add\ndef g(): return 1\n"
                "def f(name): return TABLE[name]\n",
                *("return 1", "return 2"),
            ),
            ("import lrt_parts\ndef f(): return getattr(lrt_parts, 'block')\n", "int(n", "round(n"),
            ("from lrt_parts import *\nf = block\n", "int(n", "round(n"),
            (
                "class A:\n    pass\nclass B(A):\n    x = 1\ndef f(): return A.__subclasses__()\n",
                "x = 1",
                "x = 2",
            ),
            ("from lrt_parts import activation\ndef f(): pass\nf = activation\n", "return x", "return -x"),
            ("W = '''a\n\n  \nb'''\ndef f(): return len(W)\n", "\n\n", "\n"),
            ("W = '''a\n \nb'''\ndef f(): return len(W)\n", "\n \n", "\n  \n"),
            ("T = {}\nclass A:\n    T['x'] = 1\ndef f(): return T\n", "= 1", "= 2"),
            ("import torch\nclass A:\n    torch.manual_seed(1)\ndef f(): pass\n", "seed(1", "seed(2"),
            ("def g(): return 1\ndef __getattr__(name): return g\nf: object\n", "return 1", "return 2"),
            (
                "T = []\nclass A:\n    def __init_subclass__(cls): T.append(cls)\n"
                "class B(A):\n    x = 1\ndef f(): return T[0].x\n",
                *("x = 1", "x = 2"),
            ),
            ("from own import cache\n@cache\ndef g(): return 1\ndef f(): pass\n", "return 1", "return 2"),
        ],
    )
    def test_indirect_ways(self, folder, source, old, new):
        write(folder, lrt_indirect=source, lrt_parts=PARTS)
        before = source_hash("lrt_indirect:f")
        write(folder, lrt_indirect=source.replace(old, new), lrt_parts=PARTS.replace(old, new))
        assert source_hash("lrt_indirect:f") != before

    def test_layout_and_encoding_do_not_count(self, folder):
        write(folder, lrt_latin="def f():\n    return 'grün'  # é\n")
        before = source_hash("lrt_latin:f")
        other = "# -*- coding: latin-1 -*-\r\n\r\ndef f():\r\n\r\n    return 'grün'   # è\r\n"
        (folder / "lrt_latin.py").write_bytes(other.encode("latin-1"))
        assert source_hash("lrt_latin:f") == before
        write(folder, lrt_latin="def f():\n    return 'blau'\n")
        assert source_hash("lrt_latin:f") != before

    def test_the_hash_of_the_first_version_is_known(self, folder):
        """Stores of lossray 0.1 hold the hash of all bytes."""
        write(folder, lrt_nets=NETS, lrt_parts=PARTS)
        assert file_hash("lrt_nets:net") == _digest(lrt_nets=NETS, lrt_parts=PARTS)
        assert is_imported("lrt_nets:net", file_hash("lrt_nets:net"))
        assert is_imported("lrt_nets:net", source_hash("lrt_nets:net"))
        assert not is_imported("lrt_nets:net", "0" * 64)


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

    def test_an_edit_of_another_function_is_accepted(self, folder):
        source = "def f(): return 1\ndef g(): return 2\n"
        write(folder, lrt_two=source)
        load("lrt_two:f")
        write(folder, lrt_two=source.replace("return 2", "return 3  # mended"))
        check_imported({"lrt_two:f": source_hash("lrt_two:f")})
        with pytest.raises(StudyError, match="'lrt_two:g': this Python process has imported other source"):
            check_imported({"lrt_two:g": source_hash("lrt_two:g")})

    def test_a_module_that_extends_the_path_is_known_by_what_it_imports(self, folder):
        write(folder, lrt_lib__lrt_far="def net(): return 1\n")
        write(
            folder,
            lrt_near="import os, sys\n"
            "sys.path.append(os.path.join(os.path.dirname(__file__), 'lrt_lib'))\n"
            "from lrt_far import net\n",
        )
        load("lrt_near:net")
        planned = source_hash("lrt_near:net")
        check_imported({"lrt_near:net": planned})
        write(folder, lrt_lib__lrt_far="def net(): return 2\n")
        assert source_hash("lrt_near:net") != planned

    def test_a_path_that_is_extended_by_a_call_is_named(self, folder):
        write(folder, lrt_aside__lrt_later="def net(): return 1\n")
        write(
            folder,
            lrt_caller="import os, sys\n"
            "def net():\n"
            "    sys.path.append(os.path.join(os.path.dirname(__file__), 'lrt_aside'))\n"
            "    import lrt_later\n"
            "    return lrt_later.net()\n",
        )
        assert load("lrt_caller:net")() == 1
        with pytest.raises(StudyError, match="'lrt_later' was not found yet when 'lrt_caller' was imported"):
            check_imported({"lrt_caller:net": source_hash("lrt_caller:net")})

    def test_an_installed_package_may_differ_between_machines(self):
        check_imported({"statistics:mean": "the hash on the driver's machine"})
