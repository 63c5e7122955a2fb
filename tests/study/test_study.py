"""Reading study files: a long example, overrides, grids, what is said to be missing, checks on data."""

import sys
import tomllib

import pytest
import torch

from lossray.errors import StudyError
from lossray.study import load_study, ready_made_studies, settings_of, study_from_table
from lossray.study.checks import check_against_data
from lossray.study.overrides import parse_override
from lossray.study.toml import toml_text
from lossray.training.datasets import Dataset, Split

# A study file with the sections that most studies have, their keys spelled out.
EXAMPLE = """
name = "adaptive-vs-sgd"
seeds = 10                                 # 0..9, or a list

[data]
source = "digits"                          # "digits" | "gaussians" | "parquet" | "package.module:function"
split = [0.7, 0.15, 0.15]                  # train, validation, test; choices read validation, never test

[[models]]
name = "mlp"                               # "linear" "mlp" "cnn" "resnet" "vit" | "package.module:function"
widths = [64, 64]                          # every other key goes to the model: activation, norm, ...

[[optimizers]]
name = "sgd"
lr = 0.1
[[optimizers]]
name = "adam"
lr = [1e-3, 3e-3]                          # a list is a grid
weight_decay = 0.0
schedule = "constant"                      # "constant" | "cosine" | "step"

[training]
loss = "cross_entropy"                     # "cross_entropy" | "mse" | "package.module:function"
steps = 1000
batch_size = 64                            # or "full"
checkpoints = {count = 12, spacing = "log"}  # or {steps = [0, 10, 100]}
log_every = 10
dtype = "float32"
diverged_above = 1e3                       # times the initial loss

[curvature]
operators = ["hessian"]                    # "hessian" "ggn" "fisher" "preconditioned"; "hessian:layers"
top = 10                                   # the solve takes more where [angles] needs them
tolerance = 1e-3                           # residual / |lambda|max
probes = 4
steps = 64
examples = "all"                           # of the training split, or a number
dtype = "float32"                          # of the products; the Lanczos recurrence is always float64
vectors = true

[angles]
directions = ["gradient", "minibatch_gradient", "update", "momentum", "displacement"]
gauges = ["raw", "balanced", "adaptive", "preconditioned"]
shadow = []                                # optimizers fed the same gradients, e.g. ["adam"]
window = 50                                # steps replayed from each checkpoint; 0 = none

[claims]
margin_energy = 0.01                       # chi_1^2 below it counts as "almost perpendicular"
alpha = 0.05

[resources]
train = {cpus = 1, gpus = "auto"}
curvature = {cpus = 1, gpus = "auto"}
pack = "auto"                              # runs per pack, or a number
"""

SMALL = """
name = "small"
seeds = 2
[[models]]
name = "mlp"
[[optimizers]]
name = "sgd"
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def dataset(n=20, *, targets=None):
    train = Split(torch.zeros(n, 1, 8, 8), torch.zeros(n, dtype=torch.int64) if targets is None else targets)
    return Dataset(train, train, train, n_outputs=3, fingerprint="f", input_shape=(1, 8, 8))


def test_the_example_says_what_it_says(tmp_path):
    path = tmp_path / "example.toml"
    path.write_text(EXAMPLE)
    loaded = load_study(path)
    study = loaded.study
    assert study.seeds == tuple(range(10))
    assert [(o.name, o.lr) for o in study.optimizers] == [("sgd", 0.1), ("adam", 1e-3), ("adam", 3e-3)]
    assert study.models[0].widths == (64, 64)
    assert study.training.steps == 1000
    assert study.training.checkpoints.count == 12
    assert study.curvature.top == 10
    assert study.angles.window == 50
    assert study.claims.margin_energy == 0.01
    assert study.resources.train.cpus == 1
    assert loaded.text == EXAMPLE
    assert loaded.folder == tmp_path.resolve()


def test_absent_sections_have_the_defaults_of_the_example(small, tmp_path):
    (tmp_path / "example.toml").write_text(EXAMPLE)
    example, short = load_study(tmp_path / "example.toml").study, load_study(small).study
    for section in ("data", "training", "curvature", "angles", "claims", "resources"):
        assert getattr(short, section) == getattr(example, section)


def test_plain_settings_read_back_as_the_same_study(tmp_path):
    (tmp_path / "example.toml").write_text(
        EXAMPLE
        + '[degeneracy]\ndense_up_to = 9\n[connectivity]\nkinds = "line"\n[ensembles]\nbudgets = [1, 2.5]\n'
    )
    study = load_study(tmp_path / "example.toml").study
    again = study_from_table(study.plain())
    assert again == study
    assert again.plain() == study.plain()
    assert again.degeneracy.dense_up_to == 9
    assert again.connectivity.kinds == ("line",)
    assert again.ensembles.budgets == (1.0, 2.5)


RECORDED = {"name": "own", "source": "checkpoints", "models": [{"name": "mlp"}]}


def test_a_study_of_recorded_runs_needs_one_model():
    study = study_from_table(RECORDED | {"training": {"loss": "mse", "dtype": "float64"}})
    assert settings_of(study) == ()
    assert study.not_computed() == []
    assert study_from_table(study.plain()) == study


def test_recorded_models_see_the_inputs_as_they_are_read_unless_the_study_says_otherwise():
    assert study_from_table(RECORDED).data.standardise == "none"
    assert study_from_table(RECORDED | {"data": {"standardise": "global"}}).data.standardise == "global"


def test_directions_of_the_next_batch_are_not_known_of_recorded_runs():
    asked = {"angles": {"directions": ["gradient", "update", "momentum"]}}
    (line,) = study_from_table(RECORDED | asked).not_computed()
    assert line.startswith("angles.directions: 'update' not computed, since")
    asked = {"angles": {"directions": ["preconditioned_gradient", "displacement"]}}
    (line,) = study_from_table(RECORDED | asked).not_computed()
    assert line.startswith("angles.directions: 'preconditioned_gradient' not computed, since")
    assert study_from_table(RECORDED | {"angles": {"window": 0, "shadow": []}}).not_computed() == []
    for key, value in (("shadow", ["adam"]), ("window", 5)):
        (line,) = study_from_table(RECORDED | {"angles": {key: value}}).not_computed()
        assert line.startswith(f"angles.{key}: not computed, since")


def test_a_byte_order_mark_is_no_problem(tmp_path):
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_study(tmp_path / "bom.toml").study.name == "small"


# Grids


def test_grids_are_all_combinations_in_order():
    table = tomllib.loads(SMALL + 'lr = [0.1, 0.2]\nschedule = ["constant", "cosine"]\n')
    found = [(o.lr, o.schedule) for o in study_from_table(table).optimizers]
    assert found == [(0.1, "constant"), (0.1, "cosine"), (0.2, "constant"), (0.2, "cosine")]


def test_betas_are_a_value_and_a_list_of_betas_is_a_grid():
    head = SMALL.replace("sgd", "adam")
    one = study_from_table(tomllib.loads(head + "betas = [0.9, 0.99]\n"))
    two = study_from_table(tomllib.loads(head + "betas = [[0.9, 0.99], [0.8, 0.99]]\n"))
    assert [o.betas for o in one.optimizers] == [(0.9, 0.99)]
    assert [o.betas for o in two.optimizers] == [(0.9, 0.99), (0.8, 0.99)]


# Overrides


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.steps=200", lambda study: study.training.steps == 200),
        ("training.steps = 200", lambda study: study.training.steps == 200),
        ("training.dtype=float64", lambda study: study.training.dtype == "float64"),
        ('training.dtype="float64"', lambda study: study.training.dtype == "float64"),
        ("training.checkpoints.count=3", lambda study: study.training.checkpoints.count == 3),
        ("training.checkpoints={steps = [0, 7]}", lambda study: study.training.checkpoints.steps == (0, 7)),
        ("optimizers.0.lr=0.3", lambda study: study.optimizers[0].lr == 0.3),
        ("optimizers[0].lr=[0.3, 0.4]", lambda study: [o.lr for o in study.optimizers] == [0.3, 0.4]),
        ("seeds=[5, 7]", lambda study: study.seeds == (5, 7)),
        ("models.0.widths=[4]", lambda study: study.models[0].widths == (4,)),
        ("curvature.vectors=false", lambda study: study.curvature.vectors is False),
        ("name=a=b", lambda study: study.name == "a=b"),
    ],
)
def test_override_changes_one_value(small, override, read):
    assert not read(load_study(small).study)
    loaded = load_study(small, [override])
    assert read(loaded.study)
    assert loaded.overrides == (override,)


def test_frozen_text_with_overrides_reads_as_the_same_study(small, tmp_path):
    loaded = load_study(small, ["optimizers[0].lr=[0.3, 1e-4]", 'name=a "quoted" name', "training.steps=7"])
    frozen = tmp_path / "frozen.toml"
    frozen.write_text(loaded.text)
    assert load_study(frozen).study == loaded.study
    assert "--set training.steps=7" in loaded.text


def test_later_overrides_win(small):
    assert load_study(small, ["training.steps=7", "training.steps=8"]).study.training.steps == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.stepz=3", ["training.stepz", "unknown key", "did you mean 'steps'?"]),
        ("trainin.steps=3", ["trainin", "unknown key", "did you mean 'training'?"]),
        ("training.steps=x", ["training.steps", "found 'x'", "an integer"]),
        ("optimizers.1.lr=0.3", ["found optimizers.1", "0 to 0"]),
        ("optimizers.lr=0.3", ["found optimizers.lr", "0 to 0"]),
        ("name.x=3", ["name is 'small'", "no key 'x'"]),
        ("training.0=3", ["training is a table", "no entry 0"]),
        ("seeds=[1, 2", ["no TOML value"]),
        ("training.steps", ["KEY=VALUE"]),
        ("=3", ["KEY=VALUE"]),
    ],
)
def test_bad_override_is_one_line_that_names_it(small, override, says):
    with pytest.raises(StudyError) as caught:
        load_study(small, [override])
    message = str(caught.value)
    assert message.startswith(f"--set {override}: ")
    assert "\n" not in message
    for fragment in says:
        assert fragment in message


def test_a_problem_of_the_file_is_not_blamed_on_an_override(small):
    small.write_text(SMALL + "lr = -1\n")
    with pytest.raises(StudyError) as caught:
        load_study(small, ["optimizers.0.weight_decay=0.1", "training.steps=0"])
    lines = sorted(str(caught.value).splitlines())
    assert lines[0].startswith("--set training.steps=0: training.steps: ")
    assert lines[1].startswith(f"{small}: optimizers[0].lr: ")


def test_a_value_with_a_line_break_sets_one_key_only():
    assert parse_override("name=1\nseeds = 3").value == "1\nseeds = 3"


def test_written_toml_reads_back():
    table = {
        "text": 'quote " backslash \\ newline \n é \U0001f600 \x7f \x01',
        "numbers": [1, -2, 1.5, 1e-300, 3e20],
        "flag": True,
        "odd key": {"x": {"y": [1]}, "é": "z"},
        "models": [{"name": "a", "nested": [{"b": 1}]}, {}],
        "empty": {},
        "none": [],
    }
    assert tomllib.loads(toml_text(table)) == table


# Which file


def test_ready_made_studies_load():
    studies = ready_made_studies()
    assert "quick" in studies
    for name in studies:
        assert load_study(name).study.seeds


def test_ready_made_study_takes_paths_relative_to_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_study("quick").folder == tmp_path


def test_a_file_wins_over_a_ready_made_study_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    assert load_study("quick").study.name != "small"
    (tmp_path / "quick").rmdir()
    (tmp_path / "quick").write_text(SMALL)
    assert load_study("quick").study.name == "small"


def test_user_functions_are_found_beside_the_study_and_not_imported_from_plain_settings(tmp_path):
    (tmp_path / "lossray_test_beside.py").write_text("def build():\n    return None\n")
    path = tmp_path / "study.toml"
    path.write_text(SMALL.replace('"mlp"', '"lossray_test_beside:build"\ndepth = 3'))
    study = load_study(path).study
    assert study.models[0].arguments == {"depth": 3}
    assert study.user_functions() == {("models", 0, "name"): "lossray_test_beside:build"}
    del sys.modules["lossray_test_beside"]
    assert study_from_table(study.plain()) == study
    assert "lossray_test_beside" not in sys.modules


# What this version does not compute


def test_defaults_are_not_listed_as_missing(small):
    assert load_study(small).study.not_computed() == []


@pytest.mark.parametrize("section", ["connectivity", "ensembles"])
def test_what_needs_training_is_not_computed_of_recorded_runs_and_said_so(section):
    lines = study_from_table(RECORDED | {section: {}}).not_computed()
    assert len(lines) == 1
    assert lines[0].startswith(f"[{section}]: not computed")


def test_what_is_asked_for_and_computed_is_not_listed():
    angles = '[angles]\ngauges = ["adaptive"]\ndirections = ["update"]\nwindow = 9\nshadow = ["adam"]\n'
    later = "[degeneracy]\n[trajectory]\n[surfaces]\n[connectivity]\n[ensembles]\n"
    asked = f'{angles}{later}[curvature]\ntop = 3\nprobes = 2\noperators = ["ggn:layers"]\n'
    assert study_from_table(tomllib.loads(SMALL + asked)).not_computed() == []


@pytest.mark.parametrize(
    ("directions", "missing"),
    [("", "no overlaps, and no angles of the displacement;"), ('directions = ["update"]\n', "no overlaps;")],
)
def test_a_study_that_keeps_no_eigenvectors_is_told_what_goes_missing(directions, missing):
    asked = f"[curvature]\nvectors = false\n[angles]\n{directions}"
    (line,) = study_from_table(tomllib.loads(SMALL + asked)).not_computed()
    assert line == f"curvature.vectors = false: {missing} both need the eigenvectors"


@pytest.mark.parametrize(
    ("kinds", "missing"),
    [("", "'v1', 'eigenvectors'"), ('kinds = ["v1", "pca"]\n', "'v1'"), ('kinds = ["random"]\n', None)],
)
def test_surfaces_along_eigenvectors_need_them_to_be_kept(kinds, missing):
    asked = f"[curvature]\nvectors = false\n[surfaces]\n{kinds}"
    _, *lines = study_from_table(tomllib.loads(SMALL + asked)).not_computed()
    reason = "not computed, since curvature.vectors = false keeps no eigenvectors"
    assert lines == ([f"surfaces.kinds: {missing} {reason}"] if missing else [])


# Checks against the data


def test_a_study_that_fits_its_data_passes():
    check_against_data(study_from_table(tomllib.loads(SMALL + "[training]\nbatch_size = 20\n")), dataset())


def test_the_default_batch_size_fits_small_data_too():
    check_against_data(study_from_table(tomllib.loads(SMALL)), dataset(5))


@pytest.mark.parametrize(
    ("changed", "targets", "line"),
    [
        ("[training]\nbatch_size = 21\n", None, "training.batch_size: found 21; allowed: at most 20"),
        ("[curvature]\nexamples = 21\n", None, "curvature.examples: found 21; allowed: at most 20"),
        (
            "",
            torch.zeros(20, 3),
            "training.loss: found 'cross_entropy', but the targets of the data are floats",
        ),
        ('[[models]]\nname = "json:loads"\ns = "3"\n', None, "models[1]: model 'json:loads' returned int"),
        ('[training]\nloss = "json:loads"\n', None, "training.loss: "),
    ],
)
def test_what_does_not_fit_the_data_is_one_line(changed, targets, line):
    study = study_from_table(tomllib.loads(SMALL + changed))
    with pytest.raises(StudyError) as caught:
        check_against_data(study, dataset(targets=targets), "study.toml")
    assert str(caught.value).startswith(f"study.toml: {line}")
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_a_sum_is_refused(tmp_path, monkeypatch):
    (tmp_path / "summed_losses.py").write_text(
        "from torch.nn.functional import cross_entropy\n"
        "def summed(outputs, targets):\n    return cross_entropy(outputs, targets, reduction='sum')\n"
        "def mean(outputs, targets):\n    return cross_entropy(outputs, targets, label_smoothing=0.1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def check(name):
        study = study_from_table(tomllib.loads(f'{SMALL}[training]\nloss = "summed_losses:{name}"\n'))
        check_against_data(study, dataset(), "study.toml")

    check("mean")
    with pytest.raises(
        StudyError, match=r"study\.toml: training\.loss: .* twice; allowed: the mean over examples"
    ):
        check("summed")


def test_checking_models_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    check_against_data(study_from_table(tomllib.loads(SMALL)), dataset())
    assert torch.equal(torch.get_rng_state(), state)
