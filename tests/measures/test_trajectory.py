"""`lossray.trajectory`: closed forms, the singular vectors of the checkpoints, and a study's table."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import lossray
from lossray.errors import StudyError
from lossray.storage.tables import TABLES


def course(count=7, d=30, seed=0):
    """A random walk [T, d]."""
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(0)


def net(norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers)


def test_a_circle_has_two_axes_that_explain_half_each():
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    points = 5 + torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1)
    found = lossray.trajectory(points)
    torch.testing.assert_close(found.explained[:2], torch.full((2,), 0.5, dtype=torch.float64))
    assert found.explained[2].isnan()
    torch.testing.assert_close(found.coordinates[:, :2].norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert float(found.axes[2, :2].abs().max()) < 1e-12


def test_the_axes_are_the_singular_vectors_of_the_centred_checkpoints():
    points = course()
    found = lossray.trajectory(points)
    centred = points - points.mean(dim=0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.explained, (values.square() / values.square().sum())[:3])
    torch.testing.assert_close((found.axes.T @ right[:3].T).abs(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found.coordinates, centred @ found.axes)
    assert (found.coordinates[0] <= 0).all()


def test_the_null_is_that_of_a_random_walk_with_the_same_steps():
    many = lossray.trajectory(course(400, 3))
    expected = [6 / (math.pi * k) ** 2 for k in (1, 2, 3)]
    np.testing.assert_allclose(many.random_walk, expected, rtol=0.02)
    steps = [0, 1, 2, 5, 11, 23, 48, 100, 206, 424, 873, 1800]
    logarithmic = lossray.trajectory(course(12, 3), steps=steps)
    centre = np.eye(12) - 1 / 12
    values = np.linalg.eigvalsh(centre @ np.minimum.outer(steps, steps) @ centre)[::-1]
    np.testing.assert_allclose(logarithmic.random_walk, values[:3] / values.sum())


def test_all_forms_of_a_checkpoint_are_one():
    model, modules, dicts, flat = net(), [], [], []
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape)
        modules.append(copy.deepcopy(model))
        dicts.append(copy.deepcopy(model.state_dict()))
        flat.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    found = [lossray.trajectory(form) for form in (modules, dicts, flat, iter(modules), torch.stack(flat))]
    for other in found[1:]:
        assert torch.equal(other.coordinates, found[0].coordinates)
        assert torch.equal(other.axes, found[0].axes)
    assert len(found[0].axes) == 51


def test_what_is_no_parameter_is_left_out():
    models = []
    for seed in range(3):
        model = net(norm=True)
        model[0].weight.requires_grad_(False)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor += seed * torch.ones_like(tensor)
        models.append(model)
    dicts = [model.state_dict() for model in models]
    assert len(lossray.trajectory(models).axes) == 51 + 12 - 24  # batch norm's parameters, no frozen weight
    assert len(lossray.trajectory(dicts).axes) == 51 + 12
    assert len(lossray.trajectory(dicts, model=models[0]).axes) == 51 + 12 - 24


def test_the_table_and_the_text():
    found = lossray.trajectory(course(), steps=range(0, 70, 10))
    frame = found.to_frame()
    assert list(frame) == [c.name for c in TABLES["trajectory"].columns if c.name != "run_id"]
    assert frame["step"].tolist() == list(range(0, 70, 10))
    np.testing.assert_array_equal(frame[["pc1", "pc2", "pc3"]], found.coordinates)
    first, _, *lines = str(found).splitlines()
    assert first == "7 checkpoints of 30 parameters, steps 0 to 60"
    assert lines[1].split() == [
        "pc2",
        f"{float(found.explained[1]):.1%}",
        f"{float(found.random_walk[1]):.1%}",
    ]


STATE = net().state_dict()


@pytest.mark.parametrize(
    ("checkpoints", "options", "says"),
    [
        ([net()], {}, "found 1 checkpoints; needed: two or more"),
        ([STATE, STATE], {}, "share their memory.*deepcopy"),
        ([STATE, net(norm=True).state_dict()], {}, "checkpoint 1: found no parameter '2.weight'"),
        ([net(), net(norm=True)], {}, "checkpoint 1: found no parameter '2.weight'"),
        ([torch.ones(3), torch.ones(4)], {}, "checkpoint 1: found 4 parameters, before 3"),
        ([torch.ones(3), torch.full((3,), torch.inf)], {}, "checkpoint 1: found values that are not finite"),
        ([torch.ones(3), "b"], {}, "checkpoint 1: found a str; allowed: a module"),
        ([torch.ones(3), torch.zeros(3)], {"steps": [0]}, "steps: found .*allowed: 2 rising"),
        ([torch.ones(3), torch.zeros(3)], {"steps": [5, 5]}, "steps: found .*allowed: 2 rising"),
    ],
)
def test_a_mistake_is_named(checkpoints, options, says):
    with pytest.raises(StudyError, match=says):
        lossray.trajectory(checkpoints, **options)


def test_the_numbers_are_those_of_a_study(charted):
    study = lossray.open_study(charted)
    table = study.table("trajectory")
    for run_id, rows in table.groupby("run_id"):
        steps = rows["step"].tolist()
        found = lossray.trajectory([study.model(run_id, step) for step in steps], steps=steps).to_frame()
        expected = rows.drop(columns="run_id").reset_index(drop=True)
        np.testing.assert_allclose(found.to_numpy(), expected[list(found)].to_numpy(), rtol=1e-6, atol=1e-9)
