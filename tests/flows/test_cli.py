"""The command line: what it prints, its exit codes, and that mistakes cost one line and nothing else."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

import lossray
from flows.cli import run_command
from lossray.storage.files import LocalFiles
from lossray.storage.tables import TABLES

SGD = [{"name": "sgd", "lr": 0.1}]


@pytest.fixture
def command(monkeypatch, capsys):
    """``command("run", ...)``: exit code, output and errors of the command line, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lossray", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def refused(command, *arguments):
    """The one line that a mistake costs."""
    code, output, errors = command(*arguments)
    assert (code, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("lossray: ")
    return line.removeprefix("lossray: ")


# ---- mistakes


def test_a_store_in_memory_is_for_one_process(command, study_file):
    assert "--in-process" in refused(command, "run", study_file(), "--out", "memory://lossray-test/out")


def test_an_address_is_of_no_use_without_ray(command, study_file, out):
    line = refused(command, "run", study_file(), "--out", out, "--in-process", "--address", "auto")
    assert "--address beside --in-process" in line


def test_a_full_disk_is_one_line_and_the_same_command_resumes(command, study_file, out, monkeypatch):
    write = LocalFiles.write

    def fill_up(self, path, data):
        if path.startswith("tables/"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        write(self, path, data)

    arguments = ("run", study_file(), "--out", out, "--in-process")
    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "write", fill_up)
        code, _, errors = command(*arguments)
    assert code == 1
    last = errors.splitlines()[-1]
    assert last.startswith("lossray: [Errno 28] No space left on device: 'tables/")
    assert last.endswith("what is committed stays: the same command resumes")
    assert "Traceback" not in errors
    assert command(*arguments)[0] == 0
    assert set(lossray.open_study(out).table("tasks")["attempts"]) == {1}  # the rest was committed


def test_a_bad_study_file_is_one_line_with_file_key_and_the_nearest_name(command, study_file, out):
    study = study_file(training={"step": 5})
    line = refused(command, "run", study, "--out", out)
    assert line.startswith(f"{study}: training.step")
    assert "did you mean 'steps'" in line
    assert not Path(out).exists()


def test_an_override_that_is_wrong_is_named_as_it_was_written(command, study_file, out):
    line = refused(command, "run", study_file(), "--out", out, "--set", "training.stesp=5")
    assert "training.stesp" in line
    assert "did you mean" in line
    assert not Path(out).exists()


def test_a_study_that_does_not_exist_names_the_nearest(command, out, study_file):
    assert "did you mean 'quick'" in refused(command, "run", "qick", "--out", out)
    assert not Path(out).exists()


def test_out_is_asked_for(command, study_file):
    assert "--out is missing" in refused(command, "run", study_file())


def test_every_problem_has_a_line_of_its_own(command, study_file, out):
    study = study_file(training={"steps": 0, "batch_size": -1})
    code, _, errors = command("run", study, "--out", out)
    assert code == 2
    assert len(errors.splitlines()) == 2
    assert all(line.startswith(f"lossray: {study}: training.") for line in errors.splitlines())


def test_another_studys_store_is_refused_naming_the_difference(command, study_file, out):
    assert command("run", study_file(optimizers=SGD), "--out", out, "--in-process")[0] == 0
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    line = refused(command, "run", study_file(optimizers=SGD, training={"steps": 14}), "--out", out)
    assert "training.steps: the store has 12, the study says 14" in line
    assert {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("subcommand", ["status", "tables"])
def test_a_folder_that_is_no_store_is_refused(command, tmp_path, subcommand):
    assert "is no store of a study" in refused(command, subcommand, str(tmp_path))


# ---- commands


def test_run_status_and_tables_of_one_study(command, study_file, out):
    study = study_file(optimizers=SGD)
    code, output, errors = command("run", study, "--out", out, "--in-process")
    assert (code, output) == (0, "")
    assert f"lossray tables {out}" in errors
    code, output, _ = command("status", out)
    assert code == 0
    assert "state: done" in output
    code, output, _ = command("tables", out)
    assert (code, len(output.splitlines())) == (0, 1 + len(TABLES))
    code, output, _ = command("tables", out, "eigenvalues", "--rows", "3")
    assert code == 0
    assert output.startswith("eigenvalues: 66 rows")
    assert len(output.splitlines()) == 2 + 3
    assert "did you mean 'eigenvalues'" in refused(command, "tables", out, "eigenvalue")


def test_a_store_given_relative_to_the_current_directory_lies_there(command, study_file):
    study = study_file(optimizers=SGD)
    assert command("run", study, "--out", "results", "--in-process", "--set", "seeds=1")[0] == 0
    assert Path("results", "tables", "runs.parquet").is_file()  # the current directory is not the study's
    assert not Path(study).with_name("results").exists()


def test_overrides_are_taken_in_order(command, study_file, out):
    changes = ["--set", "seeds=2", "--set", "seeds=1", "--set", 'optimizers=[{name = "lion"}]']
    assert command("run", study_file(), "--out", out, "--in-process", *changes)[0] == 0
    runs = lossray.open_study(out).table("runs")
    assert runs[["optimizer", "seed"]].to_numpy().tolist() == [["lion", 0]]


def test_a_run_with_failures_exits_1(command, study_file, out, monkeypatch):
    monkeypatch.setattr("tasks.run_analysis.analyse_checkpoint", lambda job, device=None: 1 / 0)
    code, _, errors = command("run", study_file(optimizers=SGD), "--out", out, "--in-process")
    assert code == 1
    assert "ZeroDivisionError: division by zero (traceback in logs/" in errors


def test_studies_lists_the_ready_made_ones_with_a_line_each(command):
    code, output, _ = command("studies")
    assert code == 0
    quick = next(line for line in output.splitlines() if line.startswith("quick "))
    assert len(quick.split()) > 4


# ---- as a program


def test_the_program_runs_a_study_from_another_directory_with_functions_of_the_users(study_file, out):
    """Decoys named as ours lie in the current directory, the user's module beside the study file."""
    study = study_file(models=[{"name": "program_nets:net"}], optimizers=SGD, seeds=1)
    Path(study).with_name("program_nets.py").write_text(
        "from torch import nn\ndef net(n_outputs):\n    return nn.Linear(6, n_outputs)\n"
    )
    for decoy in ("tasks.py", "flows.py"):
        Path(decoy).write_text("raise SystemExit('a decoy was imported')\n")
    program = Path(sys.executable).with_name("lossray")
    arguments = ["run", study, "--out", out, "--in-process"]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert lossray.open_study(out).table("runs")["model"].tolist() == ["program_nets:net"]


def test_the_program_says_what_is_wrong_without_a_traceback(study_file, out):
    code = "import lossray; lossray.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", study_file(seeds=0), "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "seeds" in done.stderr
    assert not Path(out).exists()


def test_the_version_is_that_of_the_package(command):
    assert command("--version") == (0, f"lossray {lossray.__version__}\n", "")
