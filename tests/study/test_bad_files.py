"""Every mistake in a study file is one clear line: file, key, what was found, what is allowed or nearest."""

import pytest

from lossray.errors import StudyError
from lossray.study import load_study

HEAD = 'name = "s"\nseeds = 2\n'
MODEL = '[[models]]\nname = "mlp"\n'
OPTIMIZER = '[[optimizers]]\nname = "sgd"\n'
GOOD = HEAD + MODEL + OPTIMIZER

# study file, key path, what else the line must say
BAD = [
    # no TOML
    ('name = "s\n', "not TOML", ["line 1"]),
    ("seeds = = 2\n", "not TOML", ["line 1, column 9"]),
    (GOOD + "[training]\nsteps = 1\nsteps = 2\n", "not TOML", ["line 9"]),
    # the study itself
    (GOOD.replace('name = "s"\n', ""), "name", ["missing"]),
    ('name = ""\nseeds = 2\n' + MODEL + OPTIMIZER, "name", ["found ''", "at least 1"]),
    ("name = 3\nseeds = 2\n" + MODEL + OPTIMIZER, "name", ["found 3", "a string"]),
    ("stepz = 2\n" + GOOD, "stepz", ["unknown key", "training"]),
    (GOOD + "[trainig]\nsteps = 2\n", "trainig", ["unknown key", "did you mean 'training'?"]),
    ("training = 5\n" + GOOD, "training", ["found 5", "a table"]),
    ('source = "checkpoint"\n' + GOOD, "source", ["found 'checkpoint'", "did you mean 'checkpoints'?"]),
    # seeds
    ('name = "s"\n' + MODEL + OPTIMIZER, "seeds", ["missing", "a number of seeds"]),
    (GOOD.replace("seeds = 2", "seeds = 0"), "seeds", ["found 0", "1 to 1000000"]),
    (GOOD.replace("seeds = 2", "seeds = []"), "seeds", ["found an empty list"]),
    (GOOD.replace("seeds = 2", "seeds = true"), "seeds", ["found true", "a number of seeds"]),
    (GOOD.replace("seeds = 2", 'seeds = "ten"'), "seeds", ["found 'ten'", "a number of seeds"]),
    (GOOD.replace("seeds = 2", "seeds = [4, 1, 4]"), "seeds", ["found 4 twice", "distinct"]),
    (GOOD.replace("seeds = 2", "seeds = [1, -1]"), "seeds[1]", ["found -1", "at least 0"]),
    (GOOD.replace("seeds = 2", "seeds = [1, 2.0]"), "seeds[1]", ["found 2.0", "an integer"]),
    (GOOD.replace("seeds = 2", "seeds = [1, 9223372036854775808]"), "seeds[1]", ["64 bits"]),
    # models
    (HEAD + OPTIMIZER, "models", ["missing", "[[models]]"]),
    ("models = []\n" + HEAD + OPTIMIZER, "models", ["found an empty list", "[[models]]"]),
    ('models = ["mlp"]\n' + HEAD + OPTIMIZER, "models[0]", ["found 'mlp'", "a table"]),
    (HEAD + OPTIMIZER + '[models]\nname = "mlp"\n', "models", ["found a table", "double brackets"]),
    (HEAD + OPTIMIZER + '[[model]]\nname = "mlp"\n', "model", ["unknown key", "did you mean 'models'?"]),
    (GOOD.replace('"mlp"', '"mpl"'), "models[0].name", ["found 'mpl'", "cnn", "did you mean 'mlp'?"]),
    (GOOD + "[[models]]\nwidths = [3]\n", "models[1].name", ["missing", "mlp"]),
    (GOOD + '[[models]]\nname = "mlp"\nwidht = [3]\n', "models[1].widht", ["did you mean 'widths'?"]),
    (GOOD + '[[models]]\nname = "mlp"\nwidths = 64\n', "models[1].widths", ["found 64", "a list"]),
    (GOOD + '[[models]]\nname = "mlp"\nwidths = [8, 0]\n', "models[1].widths[1]", ["found 0", "at least 1"]),
    (GOOD + MODEL, "models[1]", ["models[0] again"]),
    (GOOD + '[[models]]\nname = "mlp"\nwidths = [64, 64]\n', "models[1]", ["models[0] again"]),
    (
        HEAD + MODEL + 'optimizers = ["sdg"]\n' + OPTIMIZER,
        "models[0].optimizers",
        ["found 'sdg'", "did you mean 'sgd'?"],
    ),
    (HEAD + MODEL + "optimizers = []\n" + OPTIMIZER, "models[0].optimizers", ["found []", "at least 1"]),
    (HEAD + MODEL + 'optimizers = "sgd"\n' + OPTIMIZER, "models[0].optimizers", ["found 'sgd'", "a list"]),
    (GOOD + MODEL + 'optimizers = ["sgd"]\n', "models[1]", ["models[0] again"]),
    # optimizers
    (HEAD + MODEL, "optimizers", ["missing", "[[optimizers]]"]),
    (GOOD.replace('"sgd"', '"sdg"'), "optimizers[0].name", ["found 'sdg'", "adam", "did you mean 'sgd'?"]),
    (GOOD.replace('"sgd"', '"SGD"'), "optimizers[0].name", ["found 'SGD'", "did you mean 'sgd'?"]),
    (GOOD + "[[optimizers]]\nlr = 0.1\n", "optimizers[1].name", ["missing", "adam"]),
    (GOOD + "lr = -0.1\n", "optimizers[0].lr", ["found -0.1", "greater than 0"]),
    (GOOD + 'lr = "big"\n', "optimizers[0].lr", ["found 'big'", "a number"]),
    (GOOD + "lr = nan\n", "optimizers[0].lr", ["found nan", "a finite number"]),
    (GOOD + "lr = []\n", "optimizers[0].lr", ["found an empty list"]),
    (GOOD + "lr = [0.1, 0.10]\n", "optimizers[0].lr", ["twice"]),
    (GOOD + "lr = [0.1, 0.0]\n", "optimizers[0].lr", ["found 0.0", "greater than 0"]),
    (GOOD + "momentm = 0.9\n", "optimizers[0].momentm", ["found 'momentm'", "weight_decay"]),
    (GOOD + 'schedule = "cosin"\n', "optimizers[0].schedule", ["found 'cosin'", "did you mean 'cosine'?"]),
    (GOOD + "floor = 0.1\n", "optimizers[0].floor", ['only schedule = "cosine"']),
    (
        GOOD + '[[optimizers]]\nname = "adam"\nbetas = [0.9]\n',
        "optimizers[1].betas",
        ["found [0.9]", "entry 2"],
    ),
    (GOOD + OPTIMIZER + "lr = 0.1\n", "optimizers[1]", ["optimizers[0] again"]),
    (GOOD + OPTIMIZER + "lr = [0.3, 0.1]\n", "optimizers[1]", ["optimizers[0] again"]),
    # data
    (GOOD + '[data]\nsource = "digit"\n', "data.source", ["found 'digit'", "did you mean 'digits'?"]),
    (GOOD + "[data]\nsplit = [0.5, 0.5]\n", "data.split", ["found [0.5, 0.5]", "entry 3"]),
    (GOOD + "[data]\nsplit = [0.5, 0.5, 0.5]\n", "data.split", ["sums to 1.5"]),
    (GOOD + '[data]\nsource = "gaussians"\nn = "x"\n', "data.n", ["found 'x'", "an integer"]),
    (GOOD + "[data]\nstandardize = true\n", "data.standardize", ["did you mean 'standardise'?"]),
    (GOOD + "[[data]]\nsplit = 1\n", "data", ["found", "a table"]),
    # training
    (GOOD + "[training]\nstepz = 2\n", "training.stepz", ["unknown key", "did you mean 'steps'?"]),
    (GOOD + '[training]\nsteps = "many"\n', "training.steps", ["found 'many'", "an integer"]),
    (GOOD + "[training]\nsteps = 0\n", "training.steps", ["found 0", "at least 1"]),
    (GOOD + "[training]\nsteps = 1.5\n", "training.steps", ["found 1.5", "an integer"]),
    (GOOD + '[training]\nbatch_size = "ful"\n', "training.batch_size", ["found 'ful'", "'full'"]),
    (GOOD + '[training]\nloss = "mze"\n', "training.loss", ["found 'mze'", "did you mean 'mse'?"]),
    (GOOD + '[training]\ndtype = "float16"\n', "training.dtype", ["found 'float16'", "float32, float64"]),
    (GOOD + "[training]\ndtype = 2020-01-01\n", "training.dtype", ["date or time 2020-01-01"]),
    (GOOD + "[training]\ncheckpoints = {cont = 3}\n", "training.checkpoints.cont", ["did you mean 'count'?"]),
    (
        GOOD + "[training]\nsteps = 9\ncheckpoints = {steps = [0, 10]}\n",
        "training.checkpoints.steps",
        ["found 10", "0 to 9"],
    ),
    # analysis
    (GOOD + '[curvature]\noperators = ["hesian"]\n', "curvature.operators[0]", ["did you mean 'hessian'?"]),
    (GOOD + '[curvature]\noperators = "hessian"\n', "curvature.operators", ["found 'hessian'", "a list"]),
    (GOOD + "[curvature]\ntop = 0\n", "curvature.top", ["found 0", "at least 1"]),
    (GOOD + "[curvature]\ntolerance = 2\n", "curvature.tolerance", ["found 2", "less than 1"]),
    (GOOD + "[curvature]\nvectors = 1\n", "curvature.vectors", ["found 1", "true or false"]),
    (GOOD + '[curvature]\nexamples = "al"\n', "curvature.examples", ["found 'al'", "'all'"]),
    (GOOD + '[angles]\ngauges = ["row"]\n', "angles.gauges[0]", ["found 'row'", "did you mean 'raw'?"]),
    (GOOD + '[angles]\nshadow = ["adm"]\n', "angles.shadow", ["found 'adm'", "did you mean 'adam'?"]),
    (GOOD + "[claims]\nalpha = 5\n", "claims.alpha", ["found 5", "less than 1"]),
    (GOOD + "[claims]\nalfa = 0.1\n", "claims.alfa", ["unknown key", "did you mean 'alpha'?"]),
    (GOOD + '[degeneracy]\ncheckpoints = "last"\n', "degeneracy.checkpoints", ["found 'last'", "ends, all"]),
    ("trajectory = true\n" + GOOD, "trajectory", ["found true", "a table"]),
    (GOOD + "[trajectory]\nbetween_seeds = 1\n", "trajectory.between_seeds", ["found 1", "true or false"]),
    (GOOD + "[trajectory]\nbetween = true\n", "trajectory.between", ["did you mean 'between_seeds'?"]),
    (GOOD + "[surfaces]\npoints = 24\n", "surfaces.points", ["found 24", "an odd number"]),
    (GOOD + "[surfaces]\npoints = 1\n", "surfaces.points", ["found 1", "at least 3"]),
    (GOOD + "[surfaces]\nspan = 0.0\n", "surfaces.span", ["found 0.0", "greater than 0"]),
    (GOOD + '[surfaces]\nkinds = ["randm"]\n', "surfaces.kinds[0]", ["did you mean 'random'?"]),
    (GOOD + '[surfaces]\nkinds = ["v1", "v1"]\n', "surfaces.kinds", ["found 'v1' twice", "each once"]),
    (GOOD + '[surfaces]\ncheckpoints = "first"\n', "surfaces.checkpoints", ["last, ends, all"]),
    (GOOD + '[connectivity]\nkinds = ["curve"]\n', "connectivity.kinds[0]", ["found 'curve'", "bezier"]),
    (GOOD + '[connectivity]\nalign = ["both", "both"]\n', "connectivity.align", ["found 'both' twice"]),
    (GOOD + "[connectivity]\nbends = 0\n", "connectivity.bends", ["found 0", "at least 1"]),
    (GOOD + '[connectivity]\npairs = "al"\n', "connectivity.pairs", ["found 'al'", "neighbours, all"]),
    (GOOD + '[ensembles]\nmethods = ["snapshots"]\n', "ensembles.methods", ["did you mean 'snapshot'?"]),
    (GOOD + '[ensembles]\nmethods = "al"\n', "ensembles.methods", ["found 'al'", "'all', or a list"]),
    (GOOD + "[ensembles]\nbudgets = [1, 0]\n", "ensembles.budgets[1]", ["found 0", "greater than 0"]),
    (GOOD + "[ensembles]\nbudgets = [1, 1.0]\n", "ensembles.budgets", ["found 1.0 twice"]),
    (GOOD + "[ensembles]\nmember = 3\n", "ensembles.member", ["unknown key"]),
    (GOOD + '[surfaces]\nseeds = "al"\n', "surfaces.seeds", ["found 'al'", "from 1, or 'all'"]),
    # resources
    (GOOD + "[resources]\npack = 0\n", "resources.pack", ["found 0", "'auto'"]),
    (GOOD + "[resources]\ntrain = {cpu = 1}\n", "resources.train.cpu", ["did you mean 'cpus'?"]),
    (GOOD + "[resources]\ntrain = {cpus = 0}\n", "resources.train.cpus", ["found 0", "greater than 0"]),
    (GOOD + "[resources]\ntrain = {gpus = 1.5}\n", "resources.train.gpus", ["found 1.5", "a whole number"]),
    (GOOD + "[resources]\nwait = -1\n", "resources.wait", ["found -1", "at least 0"]),
    (GOOD + "[resources.train]\nlabels = {zone = 1}\n", "resources.train.labels.zone", ["found 1"]),
    (GOOD + "[resources.train]\nlabels = {zone = 'in('}\n", "resources.train.labels.zone", ["'in(A, B)'"]),
    (GOOD + "[resources.train]\nlabels = {'a b' = 'c'}\n", "resources.train.labels", ["found 'a b'"]),
    (GOOD + "[resources.train]\nfallback = [{zone = 'b'}]\n", "resources.train", ["fallback without labels"]),
    # functions of the user's
    (GOOD.replace('"mlp"', '"no_module_x:f"'), "models[0].name", ["no_module_x", "not found"]),
    (GOOD + '[training]\nloss = "json:lods"\n', "training.loss", ["'lods'", "did you mean 'loads'?"]),
    (GOOD + '[data]\nsource = "no_module_x:f"\n', "data.source", ["no_module_x", "not found"]),
    (GOOD + '[training]\nloss = "a b:c"\n', "training.loss", ["found 'a b:c'", "package.module:function"]),
]


@pytest.mark.parametrize(
    ("text", "key", "says"), BAD, ids=[f"{i}-{key}" for i, (_, key, _) in enumerate(BAD)]
)
def test_mistake_is_one_line_with_file_key_found_and_allowed(tmp_path, text, key, says):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(StudyError) as caught:
        load_study(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {key}: ")
    assert "\n" not in message
    for fragment in says:
        assert fragment in message


def test_the_files_above_are_bad_for_their_own_reason(tmp_path):
    (tmp_path / "study.toml").write_text(GOOD)
    assert load_study(tmp_path / "study.toml").study.name == "s"


def test_every_problem_is_reported_at_once(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(
        'name = "s"\n[[models]]\nname = "mpl"\n[[optimizers]]\nname = "sgd"\nlr = -1\n[training]\nsteps = 0\n'
    )
    with pytest.raises(StudyError) as caught:
        load_study(path)
    keys = [line.removeprefix(f"{path}: ").split(":")[0] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["models[0].name", "optimizers[0].lr", "seeds", "training.steps"]


RECORDED = """
name = "mine"
source = "checkpoints"
[[models]]
name = "mlp"
"""


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("seeds = 2\n" + RECORDED, "seeds", "whose runs are trained already; allowed: none"),
        (RECORDED + '[[optimizers]]\nname = "sgd"\n', "optimizers", "whose runs are trained already"),
        (RECORDED + '[[models]]\nname = "cnn"\n', "models", "found 2; needed: one [[models]] table"),
        (RECORDED.partition("[[")[0], "models", "found none; needed: one [[models]] table"),
        (RECORDED + "[training]\nsteps = 5\n", "training.steps", "allowed: loss, dtype"),
        (RECORDED + "[training]\nbatch_size = 'full'\n", "training.batch_size", "allowed: loss, dtype"),
    ],
)
def test_a_study_of_recorded_runs_has_one_model_and_nothing_of_a_training(tmp_path, text, place, says):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(StudyError) as caught:
        load_study(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: {place}: ")
    assert says in line


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(StudyError, match=r"no such file or ready-made study"):
        load_study(tmp_path / "none.toml")
    with pytest.raises(StudyError, match=r"did you mean 'quick'\?"):
        load_study("quikc")
    (tmp_path / "digits.toml").write_text(GOOD)
    with pytest.raises(StudyError, match=r"did you mean '.*/digits\.toml'\?"):
        load_study(tmp_path / "digit.toml")
    with pytest.raises(StudyError, match="found a folder"):
        load_study(tmp_path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'name = "\xe9"\n')
    with pytest.raises(StudyError, match="not UTF-8 at offset 8"):
        load_study(latin)


def test_user_module_that_raises_on_import_is_reported_at_its_key(tmp_path):
    (tmp_path / "lossray_test_broken.py").write_text("1 / 0\n")
    path = tmp_path / "study.toml"
    path.write_text(GOOD.replace('"mlp"', '"lossray_test_broken:build"'))
    with pytest.raises(StudyError) as caught:
        load_study(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: models[0].name: ")
    assert "ZeroDivisionError" in message
    assert "\n" not in message
