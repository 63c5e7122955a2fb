"""Where Ray is not installed a study runs in one process, and says so where it is not asked to."""

import subprocess
import sys

import pytest

WITHOUT_RAY = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
import lossray
lossray.main()
"""


@pytest.fixture
def without_ray(study_path, tmp_path):
    """`lossray run` of the small study, cut to one step, in an interpreter that has no Ray."""

    def run(*options):
        out = ["--out", str(tmp_path / "out"), "--set", "seeds=1", "--set", "training.steps=1"]
        steps = ["--set", "training.checkpoints.steps=[0]"]
        command = [sys.executable, "-c", WITHOUT_RAY, "run", str(study_path), *out, *steps, *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_a_study_in_this_process_needs_no_ray(without_ray, tmp_path):
    done = without_ray("--in-process")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tables" / "curvature.parquet").is_file()


def test_a_study_on_ray_says_that_there_is_none(without_ray, tmp_path):
    done = without_ray()
    assert (done.returncode, done.stderr) == (
        2,
        "lossray: Ray is not installed here; allowed without it: --in-process\n",
    )
    assert not (tmp_path / "out").exists()
