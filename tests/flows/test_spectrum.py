"""`lossray spectrum`: reads a model and its data, prints certified numbers, and writes the same as tables."""

import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lossray
from flows.cli import app
from flows.spectrum import SpectrumRequest, spectrum
from lossray.errors import DataError, ModelError, StoreError, StudyError
from lossray.spectra.density import SpectralDensity
from lossray.spectra.summary import BINS, histogram

OWN = """
import torch
from torch import nn

def net(input_shape, n_outputs):
    return nn.Sequential(nn.Linear(*input_shape, 4), nn.Tanh(), nn.Linear(4, n_outputs))

def deep():
    return nn.Linear(7, 3)

def data():
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()

def pair():
    return (torch.ones(30, 4).cumsum(0) / 30, torch.ones(30, 2).cumsum(1)), torch.arange(30) % 3

def named():
    (user, item), targets = pair()
    return {"item": item, "user": user}, targets

class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, user, item):
        return self.left(user) * self.right(item)

def one_logit():
    return nn.Linear(5, 1)

def parts():
    inputs, targets = data()
    rest = inputs[30:], targets[30:]
    return {"train": (inputs[:30], targets[:30]), "validation": rest, "test": rest}
"""
D = 5 * 4 + 4 + 4 * 3 + 3


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, forget_modules):
    """The user's folder, in which the command is given."""
    (tmp_path / "spectrum_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def request(**changes):
    return SpectrumRequest(
        **{"model": "spectrum_own:net", "data": "spectrum_own:data", "dtype": "float64", **changes}
    )


def exact(weights, n=40):
    """Loss and eigenvalues of the dense Hessian, descending."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model.load_state_dict(
        {name: tensor.double() for name, tensor in torch.load(weights, weights_only=True).items()}
    )
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()[:n]
    targets = ((inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())[:n]
    names = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in names.items()}

    def loss(theta):
        pieces = torch.split(theta, [shape.numel() for shape in shapes.values()])
        weights = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, inputs), targets)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    rows = [torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in gradient]
    return float(loss(theta).detach()), torch.linalg.eigvalsh(torch.stack(rows)).flip(0)


@pytest.fixture
def weights(tmp_path):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    return "w.pt"


def test_the_tables_and_the_text_hold_the_spectrum(weights):
    text = spectrum(request(weights=weights, top=4), "out")
    loss, values = exact(weights)
    study = lossray.open_study("out")
    assert study.tables["eigenvalues"] == 5
    rows = study.table("eigenvalues").set_index(["end", "index"])
    torch.testing.assert_close(torch.tensor(rows.loc["largest"]["eigenvalue"].to_numpy()), values[:4])
    assert rows["eigenvalue"]["smallest", 0] == pytest.approx(float(values[-1]))
    (row,) = study.table("curvature").to_dict("records")
    assert row["loss"] == pytest.approx(loss)
    assert row["trace"] == pytest.approx(float(values.sum()))
    assert (row["dim"], row["n_examples"], row["dtype"], row["step"]) == (D, 40, "float64", 0)
    density = study.table("density")
    assert density.groupby("probe")["weight"].sum().to_numpy() == pytest.approx(1.0)
    assert f"{D} parameters, weights of w.pt" in text
    assert f"40 examples, cross_entropy {loss:.6g}" in text
    shown = [float(value) for value in re.findall(r"^ +\d +(\S+) +\S+ +\S+$", text, re.MULTILINE)]
    assert shown == pytest.approx([*values[:4].tolist(), float(values[-1])], rel=1e-6)
    assert f"trace                {float(values.sum()):.5g} (exact)" in text


def test_the_same_again_changes_nothing_and_others_stand_beside_it(weights):
    spectrum(request(weights=weights), "out")
    first = lossray.open_study("out").table("curvature")
    spectrum(request(weights=weights), "out")
    assert lossray.open_study("out").table("curvature").equals(first)
    for other in ({"examples": 20}, {"top": 3}, {"dtype": "float32"}, {}):
        spectrum(request(**other, **({"weights": weights} if other else {})), "out")
    assert lossray.open_study("out").table("curvature")["run_id"].is_unique
    assert len(lossray.open_study("out").table("curvature")) == 5


def test_of_data_that_come_in_parts_the_training_part_is_taken():
    assert ": 30 examples" in spectrum(request(data="spectrum_own:parts"))


def test_inputs_of_two_tensors_are_arguments_or_keywords():
    texts = [
        spectrum(request(model="spectrum_own:Product", data=f"spectrum_own:{d}")) for d in ("pair", "named")
    ]
    assert all("24 parameters" in text for text in texts)
    assert len({text.split("30 examples", 1)[1] for text in texts}) == 1


def test_a_parquet_file_has_a_label_and_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator)
    columns = {f"x{i}": inputs[:, i].numpy() for i in range(5)} | {"label": (inputs[:, 0] > 0).int().numpy()}
    pq.write_table(pa.table(columns), "data.parquet")
    assert "data.parquet: 40 examples" in spectrum(request(data="data.parquet"))
    pq.write_table(pa.table({"x": [1.0], "y": [2]}), "bare.parquet")
    with pytest.raises(DataError, match=r"bare\.parquet: found columns x, y; needed: 'label'"):
        spectrum(request(data="bare.parquet"))
    with pytest.raises(DataError, match=r"none\.parquet: cannot be read"):
        spectrum(request(data="none.parquet"))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "spectrum_own:nte"}, StudyError, "no function 'nte'; did you mean 'net'"),
        ({"model": "mpl"}, StudyError, "MODEL: found 'mpl'; allowed: .*; did you mean 'mlp'"),
        (
            {"model": "spectrum_own:deep"},
            ModelError,
            r"'spectrum_own:deep' with loss .* on inputs \[2, 5\]: RuntimeError",
        ),
        ({"data": "elsewhere"}, StudyError, "DATA: found 'elsewhere'; allowed: digits, a Parquet file"),
        ({"data": "spectrum_own:dta"}, StudyError, "did you mean 'data'"),
        ({"loss": "cross_entrop"}, ModelError, "loss: found 'cross_entrop'"),
        ({"operator": "hesian"}, StudyError, "--operator: found 'hesian'; .* did you mean 'hessian'"),
        ({"dtype": "float16"}, StudyError, "--dtype: found 'float16'; allowed: float32, float64"),
        ({"examples": 41}, StudyError, "--examples: found 41; allowed: at most 40"),
        ({"weights": "none.pt"}, ModelError, "none.pt: no such file"),
        (
            {"model": "spectrum_own:one_logit"},
            ModelError,
            r"outputs \[2, 1\]: a softmax over one output is 1.*binary_cross_entropy_with_logits",
        ),
        ({"model": "spectrum_own:Product"}, ModelError, r"on inputs \[2, 5\]: TypeError"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, changes, error, says):
    with pytest.raises(error, match=says) as caught:
        spectrum(request(**changes), "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_stores_are_refused(tmp_path):
    lossray.record("recorded", nn.Linear(1, 1), None, 0)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    with pytest.raises(StoreError, match="is the store of a study"):
        spectrum(request(), "recorded")
    with pytest.raises(StoreError, match=r"found other files, such as a\.txt"):
        spectrum(request(), "notes")


def test_the_global_generator_stays_as_it_is():
    before = torch.get_rng_state()
    assert spectrum(request()) == spectrum(request())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command_takes_the_options(weights):
    arguments = ["spectrum", "spectrum_own:net", "spectrum_own:data", "--weights", weights, "--top", "2"]
    result = CliRunner().invoke(app, [*arguments, "--examples", "30", "--dtype", "float64", "--out", "out"])
    assert result.exit_code == 0, result.output
    assert "30 examples" in result.output
    assert len(lossray.open_study("out").table("eigenvalues")) == 3


def test_a_histogram_counts_every_eigenvalue_once():
    nodes = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 9.0]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]], dtype=torch.float64)
    density = SpectralDensity(nodes, weights, False, dim=100)
    lines = histogram(density)
    assert len(lines) == BINS
    counts = [float(line.split()[3]) for line in lines]
    assert counts == [50.0, *[0.0] * 7, 12.5, *[0.0] * 6, 37.5]
    bars = [line.count("#") for line in lines]
    assert max(bars) == bars[0]
    assert [bar > 0 for bar in bars] == [count > 0 for count in counts]
    point = SpectralDensity(torch.zeros(1, 2), torch.full((1, 2), 0.5), True, dim=7)
    assert histogram(point) == ["          0  all 7"]


def test_a_loss_that_is_no_mean_is_refused(weights, tmp_path):
    (tmp_path / "spectrum_sum.py").write_text(
        "from torch.nn.functional import cross_entropy\n\n\n"
        "def total(outputs, targets):\n    return cross_entropy(outputs, targets, reduction='sum')\n"
    )
    with pytest.raises(ModelError, match="is no mean over examples"):
        spectrum(request(weights=weights, loss="spectrum_sum:total"))


def test_a_file_cannot_receive_the_tables(weights):
    with pytest.raises(StoreError, match=r"w.pt: cannot be a store: Not a directory"):
        spectrum(request(weights=weights), "w.pt")
