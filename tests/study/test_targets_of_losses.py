"""Losses and models of a user's own that a study takes or refuses, by the shapes of outputs and targets."""

import sys
import tomllib

import pytest
import torch

from lossray.errors import StudyError
from lossray.study import study_from_table
from lossray.study.checks import check_against_data
from lossray.training.datasets import Dataset, Split

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn

class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze(-1)

def column(): return nn.Linear(4, 1)
def flat(): return Squeezed(4, 1)
def image(): return nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (3, 2, 2)))
def two(): return nn.Linear(4, 2)
def three(): return nn.Linear(4, 3)

def careless(o, t): return ((o - t) ** 2).mean()
def squeezed(o, t): return ((o.squeeze(-1) - t) ** 2).mean()
def first(o, t): return F.huber_loss(o[:, 0], t)
def logit(o, t): return F.binary_cross_entropy_with_logits(o[:, 0], t.to(o.dtype))
def pixels(o, t): return F.cross_entropy(o, t)
"""
STUDY = """
name = "shapes"
seeds = 1
[[models]]
name = "lossray_test_shapes:{model}"
[[optimizers]]
name = "sgd"
[training]
loss = "{loss}"
batch_size = 4
"""
N = 30
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(3))
FLOATS, CLASSES = X[:, 0] * 2, (X[:, 0] > 0).long()


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "lossray_test_shapes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("lossray_test_shapes", None)


def check(model, loss, targets, n_outputs, more=""):
    loss = loss if loss in ("mse", "cross_entropy") else f"lossray_test_shapes:{loss}"
    study = study_from_table(tomllib.loads(STUDY.format(model=model, loss=loss) + more))
    split = Split(X, targets)
    check_against_data(study, Dataset(split, split, split, n_outputs, "f", (4,)))


@pytest.mark.parametrize(
    ("model", "loss", "targets", "n_outputs"),
    [
        ("column", "squeezed", FLOATS, 1),
        ("column", "first", FLOATS, 1),
        ("column", "mse", FLOATS, 1),
        ("column", "careless", FLOATS[:, None], 1),
        ("flat", "careless", FLOATS, 1),
        ("flat", "mse", FLOATS, 1),
        ("column", "logit", CLASSES, 2),
        ("image", "pixels", CLASSES[:, None, None].expand(N, 2, 2), 3),
        ("image", "careless", FLOATS[:, None, None, None].expand(N, 3, 2, 2), 3),
        ("image", "mse", FLOATS[:, None, None, None].expand(N, 3, 2, 2), 3),
        ("two", "cross_entropy", CLASSES, 2),
    ],
)
def test_taken(model, loss, targets, n_outputs):
    check(model, loss, targets, n_outputs)


@pytest.mark.parametrize(
    ("model", "loss", "targets", "n_outputs", "text"),
    [
        (
            "column",
            "careless",
            FLOATS,
            1,
            r"outputs \[8, 1\] and targets \[8\] gives .*broadcast to \[B, B\]",
        ),
        ("flat", "careless", FLOATS[:, None], 1, r"outputs \[8\] and targets \[8, 1\] gives .*broadcast"),
        ("column", "careless", CLASSES, 2, r"outputs \[8, 1\] and targets \[8\] gives .*broadcast"),
        ("column", "mse", CLASSES, 2, r"returns \[8, 1\] where a tensor \[8, 2\]"),
        ("two", "mse", FLOATS, 1, r"returns \[8, 2\] where a tensor \[8, 1\]"),
        ("two", "cross_entropy", FLOATS, 2, "targets of the data are floats"),
        ("three", "cross_entropy", CLASSES + 1, 3, "from 1 to 2; allowed: classes 0..C-1.*subtract 1"),
        ("two", "mse", CLASSES * 101 - 100, 2, "from -100 to 1; allowed: classes 0..C-1"),
        ("two", "cross_entropy", CLASSES[:, None], 2, r"integer targets \[30, 1\] from 0 to 1"),
    ],
)
def test_refused(model, loss, targets, n_outputs, text):
    with pytest.raises(StudyError, match=text) as caught:
        check(model, loss, targets, n_outputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "loss", "targets", "text"),
    [
        ("column", "logit", CLASSES, r"returns \[8, 1\] where a tensor \[8, 2\]"),
        ("column", "squeezed", FLOATS, "targets that are floats"),
        ("image", "pixels", CLASSES[:, None, None].expand(N, 2, 2), r"no classes 0\.\.C-1 of shape \[N\]"),
    ],
)
def test_ensembles_need_classes_and_their_logits(model, loss, targets, text):
    with pytest.raises(StudyError, match=text):
        check(model, loss, targets, 2, "[ensembles]\n")
