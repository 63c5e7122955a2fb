"""Gates: hold a process just after it has put a certain file in place. Python runs this where it starts.

A gate is a file in the folder that LOSSRAY_TEST_GATES names; its text is a pattern of paths. A process that
has renamed a file to such a path writes its id beside the gate, and goes on once the gate is gone.
"""

import fnmatch
import os
import time

FOLDER = os.environ.get("LOSSRAY_TEST_GATES", "")
_replace = os.replace


def replace(source, target, **options):
    _replace(source, target, **options)
    for name in os.listdir(FOLDER):
        if name.endswith(".gate"):
            _pass(os.path.join(FOLDER, name), str(target))


def _pass(gate, target):
    try:
        with open(gate) as file:
            pattern = file.read()
    except FileNotFoundError:
        return
    if fnmatch.fnmatch(target, pattern):
        with open(f"{gate}.{os.getpid()}", "w"):
            pass
        while os.path.exists(gate):
            time.sleep(0.02)


if FOLDER:
    os.replace = replace
