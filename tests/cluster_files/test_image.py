"""cluster/Dockerfile against the project's own set-up: versions, files, and what its commands do."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def instructions():
    """Pairs such as ("RUN", "pip install ..."), continued lines joined as Docker joins them."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def arguments(name):
    return [argument for instruction, argument in instructions() if instruction == name]


def required(name):
    """What the project asks of a package it depends on."""
    requirements = map(Requirement, PROJECT["dependencies"])
    return next(one.specifier for one in requirements if one.name == name)


def test_python_is_one_that_the_project_allows():
    (base,) = arguments("FROM")
    python = re.fullmatch(r"python:(\d+\.\d+)-slim", base)[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")


def test_every_file_that_is_copied_exists_and_is_sent_to_docker():
    sent = {
        line[1:]
        for line in (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {name for line in arguments("COPY") for name in line.split()[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {name.rstrip("*") for name in packages["include"]} <= copied
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= copied


def test_everything_is_installed_under_the_constraints_of_the_makefile():
    installs = [shlex.split(line) for line in re.findall(r"pip install [^&\n]*", "\n".join(arguments("RUN")))]
    assert len(installs) == 2
    constraints = {words[words.index("--constraint") + 1] for words in installs}
    assert constraints == set(re.findall(r"--constraint (\S+)", (ROOT / "Makefile").read_text()))
    assert "://" not in DOCKERFILE.read_text()  # which index pip asks is the user's


def test_the_constraints_are_within_the_bounds_of_the_project():
    extras = [Requirement(line) for line in PROJECT["optional-dependencies"]["s3"]]
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *extras]:
        assert requirement.specifier.contains(PINS[requirement.name]), requirement


def test_every_node_has_one_version_of_ray():
    assert required("ray").contains(PINS["ray"])
    job = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())
    assert Version(job["spec"]["rayClusterSpec"]["rayVersion"]) == Version(PINS["ray"])


def images():
    """What the other files here call the image."""
    for name in ("local", "aws"):
        yield yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())["docker"]["image"]
    cluster = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]["containers"][0]["image"]


def test_no_image_of_somebody_elses_is_named():
    assert {image.rpartition(":")[0] for image in images()} == {"registry.example.com/lossray"}
    assert {image.rpartition(":")[2] for image in images()} <= set(
        re.findall(r"-t lossray:(\w+)", DOCKERFILE.read_text())
    )


def test_the_containers_user_is_not_root_and_has_the_home_that_the_launcher_looks_for():
    assert arguments("USER") == ["ray"]
    (user,) = re.findall(r"ARG UID=(\d+)", DOCKERFILE.read_text())
    job = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    container = job["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert container["securityContext"]["runAsUser"] == int(user) != 0
    assert "HOME=/home/ray" in arguments("ENV")[0].split()
    assert arguments("WORKDIR")[-1] == "/home/ray"


def test_the_launcher_finds_its_tools_and_may_choose_the_command():
    assert {"openssh-client", "rsync"} <= set(arguments("RUN")[0].split())
    assert not arguments("ENTRYPOINT")


def run_command(mentioned, folder, *, pip_ends=0, **environment):
    """Run the command of the one RUN that mentions something, with a stand-in for pip; what pip was asked."""
    (command,) = [command for command in arguments("RUN") if mentioned in command]
    pip = folder / "pip"
    pip.write_text(f'#!/bin/sh\necho "pip $*"\nexit {pip_ends}\n')
    pip.chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder)} | environment
    return subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("device", "build"), [("cpu", "+cpu"), ("gpu", "")])
def test_the_device_says_which_build_of_torch_is_taken(device, build, tmp_path):
    result = run_command("torch==", tmp_path, DEVICE=device)
    assert result.returncode == 0, result.stderr
    torch = Version(f"{PINS['torch']}{build}")
    assert result.stdout.split()[-1] == f"torch=={torch}"
    assert required("torch").contains(torch)


def test_a_build_that_the_index_does_not_have_is_a_line_with_the_remedy(tmp_path):
    result = run_command("torch==", tmp_path, pip_ends=1, DEVICE="cpu")
    assert result.returncode == 1
    assert result.stderr.startswith(f"no torch=={PINS['torch']}+cpu: ")
    assert "--build-arg PIP_EXTRA_INDEX_URL=" in result.stderr


def test_another_device_is_refused(tmp_path):
    result = run_command("torch==", tmp_path, DEVICE="tpu")
    assert result.returncode == 1
    assert result.stderr == "DEVICE: found tpu; allowed: cpu, gpu\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("device", "cuda", "code"), [("cpu", None, 0), ("gpu", "13.0", 0), ("cpu", "13.0", 1), ("gpu", None, 1)]
)
def test_a_build_for_the_other_device_is_refused(device, cuda, code, tmp_path):
    for name in ("ray", "flows", "lossray", "tasks"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "torch.py").write_text(f"class version: cuda = {cuda!r}\n__version__ = '2.13.0'")
    result = run_command("torch.version", tmp_path, DEVICE=device, EXTRAS="s3")
    assert result.returncode == code, result.stderr
    assert result.stdout == "pip install --no-cache-dir --constraint constraints.txt .[s3]\n"
    assert ("PIP_EXTRA_INDEX_URL" in result.stderr) == (code == 1)


def test_s3_may_be_left_out(tmp_path):
    result = run_command("torch.version", tmp_path, DEVICE="cpu", EXTRAS="")
    assert result.stdout.splitlines()[0].endswith(" --constraint constraints.txt .")
