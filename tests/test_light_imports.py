"""What must not load torch, scipy, sklearn, pandas or Ray; each case in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "ray", "pandas", "scipy", "sklearn")
# Files of settings, and the registries of names that settings are checked against.
LIGHT = [
    *ROOT.glob("lossray/**/settings.py"),
    *ROOT.glob("lossray/**/*_settings.py"),
    ROOT / "lossray/ensembles/methods.py",
    ROOT / "lossray/training/update_rules.py",
]


def loaded(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of these modules are there after the code has run."""
    report = f"\nimport sys; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_and_registries_load_nothing_heavy(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert loaded(f"import {module}") == []


def test_the_check_notices_torch():
    assert loaded("import lossray.training.optimizers", ("torch",)) == ["torch"]
