import sys

import pytest

from lossray.errors import LossrayError, StudyError
from lossray.names import nearest, unknown_name
from lossray.plugins import (
    add_user_folders,
    failure,
    is_spec,
    load,
    split_spec,
)
from tests.user_code import write


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
