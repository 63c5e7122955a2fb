"""The window statistic S: against its definition, under a planted truth, in every gauge."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lossray.geometry.gauges import Gauge
from lossray.geometry.window import Frame, WindowAlignment
from lossray.networks.layout import Layout
from tests.geometry.test_subspace_angles import _pairs

DIM = 30
LAYOUT = Layout(("a", "b"), (torch.Size([12]), torch.Size([18])), ("other", "other"))


def frame(generator, name="raw", scale=None, members=2, k=12):
    draws = torch.randn(DIM, DIM, dtype=torch.float64, generator=generator)
    if scale is not None:  # eigenvectors of S H S vanish where S does
        draws = draws * (scale[0] != 0)[:, None]
    basis = torch.linalg.qr(draws[:, :k]).Q.T
    ones = torch.ones(members, DIM, dtype=torch.float64)
    return Frame(Gauge(name, ones if scale is None else scale), _pairs(members, k=k, dim=DIM, basis=basis))


def steps_of(generator, n=11, members=2):
    return [
        {
            "minibatch_gradient": torch.randn(members, DIM, generator=generator, dtype=torch.float64),
            "update": torch.randn(members, DIM, generator=generator, dtype=torch.float64),
        }
        for _ in range(n)
    ]


def run(frames, steps):
    window = WindowAlignment(frames, LAYOUT)
    for step in steps:
        window.add(step)
    return {(row.direction, row.gauge, row.subspace, row.member): row for row in window.rows()}


def test_s_is_what_it_is_defined_to_be():
    generator = torch.Generator().manual_seed(0)
    scale = 0.2 + torch.rand(2, DIM, dtype=torch.float64, generator=generator)
    scale[:, 4] = 0
    frames = [frame(generator), frame(generator, "adaptive", scale)]
    steps = steps_of(generator)
    rows = run(frames, steps)
    assert len(rows) == 2 * 2 * 2 * 2
    for (direction, gauge, subspace, r), row in rows.items():
        used = frames[gauge == "adaptive"]
        inside = total = 0.0
        for step in steps:
            u = used.gauge.transform(step)[direction][r]
            k = {"v1": 1, "top10": 10}[subspace]
            inside += float((used.pairs.vectors[r, :k] @ u).square().sum())
            total += float(u.square().sum())
        assert row.log_energy == pytest.approx(math.log(inside / total), rel=1e-12)
        assert (row.steps, row.k, row.resolved) == (11, k, True)
        assert (row.dim, row.dropped) == ((DIM, 0) if gauge == "raw" else (DIM - 1, 1))


def test_the_nulls_are_means_over_signs_and_over_directions_within_layers():
    generator = torch.Generator().manual_seed(1)
    frames, steps = [frame(generator, members=1)], steps_of(generator, n=3, members=1)
    row = run(frames, steps)["update", "raw", "top10", 0]
    basis = frames[0].pairs.vectors[0, :10]
    total = sum(float(step["update"].square().sum()) for step in steps)
    signs, layers = [], []
    for _ in range(4000):
        drawn = [torch.randint(0, 2, (DIM,), generator=generator) * 2.0 - 1 for _ in steps]
        flipped = [s * step["update"][0] for s, step in zip(drawn, steps, strict=True)]
        signs.append(sum(float((basis @ u).square().sum()) for u in flipped) / total)
        energy = 0.0
        for step in steps:
            u = torch.randn(DIM, generator=generator, dtype=torch.float64)
            for part in (slice(0, 12), slice(12, 30)):
                u[part] *= step["update"][0, part].norm() / u[part].norm()
            energy += float((basis @ u).square().sum())
        layers.append(energy / total)
    for found, draws in ((row.sign_flip_null, signs), (row.layer_null, layers)):
        draws = torch.tensor(draws)
        assert abs(float(draws.mean()) - found) < 4 * float(draws.std()) / len(draws) ** 0.5


def test_a_planted_direction_is_found():
    generator = torch.Generator().manual_seed(2)
    frames = [frame(generator, members=1)]
    v1 = frames[0].pairs.vectors[:, 0]
    rest = frames[0].pairs.vectors[:, 11]
    rows = run(frames, [{"update": v1 + 3 * rest} for _ in range(5)])
    assert rows["update", "raw", "v1", 0].log_energy == pytest.approx(math.log(0.1))
    assert rows["update", "raw", "top10", 0].log_energy == pytest.approx(math.log(0.1))


def test_a_direction_that_is_there_for_some_steps_counts_these():
    generator = torch.Generator().manual_seed(3)
    steps = steps_of(generator)
    late = [step if i > 6 else {"update": step["update"]} for i, step in enumerate(steps)]
    frames = [frame(generator)]
    rows, expected = run(frames, late), run(frames, steps[7:])
    key = ("minibatch_gradient", "raw", "v1", 1)
    assert rows[key] == expected[key]
    assert rows[key].steps == 4


def test_a_member_that_dies_in_the_window_has_no_value_and_spoils_nobody():
    generator = torch.Generator().manual_seed(4)
    steps, frames = steps_of(generator), [frame(generator)]
    sound = run(frames, steps)
    steps[-1] = {name: u.clone() for name, u in steps[-1].items()}
    for u in steps[-1].values():
        u[1] = torch.nan
    rows = run(frames, steps)
    for key, row in rows.items():
        if key[3] == 1:
            assert math.isnan(row.log_energy)
            assert math.isnan(row.sign_flip_null)
            assert math.isnan(row.isotropic_null)
        else:
            assert row == sound[key]


def test_subspaces_for_which_there_are_too_few_pairs_are_left_out():
    generator = torch.Generator().manual_seed(5)
    rows = run([frame(generator, k=4)], steps_of(generator))
    assert {key[2] for key in rows} == {"v1"}
    assert run([], steps_of(generator)) == {}


def test_a_step_without_a_move_counts_for_nothing():
    generator = torch.Generator().manual_seed(6)
    steps, frames = steps_of(generator), [frame(generator)]
    zero = {name: torch.zeros_like(u) for name, u in steps[0].items()}
    zero["update"][1] = 1.0  # of one member alone
    rows, expected = run(frames, [*steps, zero]), run(frames, steps)
    row, other = (found["minibatch_gradient", "raw", "top10", 0] for found in (rows, expected))
    assert row.isotropic_null == pytest.approx(other.isotropic_null, rel=1e-9)
    assert row == replace(other, isotropic_null=row.isotropic_null)
    assert [rows["update", "raw", "v1", r].steps for r in (0, 1)] == [11, 12]
    nothing = run(frames, [zero])["update", "raw", "v1", 0]
    assert nothing.steps == 0
    assert math.isnan(nothing.log_energy)
    assert math.isnan(nothing.isotropic_null)


def test_an_eigenvector_of_a_dropped_coordinate_is_not_resolved():
    scale = torch.ones(1, DIM, dtype=torch.float64)
    scale[0, 0] = 0
    pairs = _pairs(1, k=12, dim=DIM)  # at the unit vectors, the first of which is dropped
    rows = run([Frame(Gauge("adaptive", scale), pairs)], [{"update": torch.ones(1, DIM)}])
    assert [row.resolved for row in rows.values()] == [False, False]
    scale[0, 0], scale[0, 20] = 1, 0
    rows = run([Frame(Gauge("adaptive", scale), pairs)], [{"update": torch.ones(1, DIM)}])
    assert [row.resolved for row in rows.values()] == [True, True]


def test_directions_of_one_kind_share_their_eigenvectors():
    generator = torch.Generator().manual_seed(7)
    scale = 0.5 + torch.rand(2, DIM, dtype=torch.float64, generator=generator)
    window = WindowAlignment([frame(generator, "adaptive", scale)], LAYOUT)
    u = torch.ones(2, DIM)
    names = ("minibatch_gradient", "momentum", "update", "shadow:adam", "shadow:sgd")
    window.add(dict.fromkeys(names, u))
    bases = {name: window._sums[name].bases[0] for name in names}
    assert bases["minibatch_gradient"] is bases["momentum"]
    assert bases["update"] is bases["shadow:adam"] is bases["shadow:sgd"]
    assert bases["update"] is not bases["momentum"]


# ---- the isotropic null: a planted window, turned at random

TURNS = 1000
SMALL, STEPS = 40, 8


def autoregressive(beta, generator):
    """Directions [STEPS, SMALL]; the next is beta times the last, and the rest of it new."""
    u = torch.randn(SMALL, dtype=torch.float64, generator=generator)
    found = [u]
    for _ in range(STEPS - 1):
        new = torch.randn(SMALL, dtype=torch.float64, generator=generator)
        found.append(beta * found[-1] + math.sqrt(1 - beta**2) * new)
    return torch.stack(found)


def turned(window, generator):
    """The window, turned at random as a whole, [STEPS, TURNS, SMALL]."""
    draws = torch.randn(TURNS, SMALL, SMALL, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(draws)
    rotations = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    return torch.einsum("td,rde->tre", window, rotations)


def gauge_frames(generator):
    """Eigenvectors of one Hessian in three gauges, of which the adaptive one drops a coordinate."""
    theta = torch.randn(SMALL, dtype=torch.float64, generator=generator)
    theta[5] = 0
    scales = {
        "raw": torch.ones(SMALL, dtype=torch.float64),
        "adaptive": theta.abs(),
        "preconditioned": 0.1 + torch.rand(SMALL, dtype=torch.float64, generator=generator),
    }
    root = torch.randn(SMALL, SMALL, dtype=torch.float64, generator=generator)
    hessian = root @ torch.diag(10.0 ** -torch.linspace(0, 3, SMALL, dtype=torch.float64)) @ root.T
    frames = []
    for name, scale in scales.items():
        vectors = torch.linalg.eigh(scale[:, None] * hessian * scale).eigenvectors.T.flip(0)[:11]
        pairs = _pairs(TURNS, k=11, dim=SMALL, basis=vectors)
        frames.append(Frame(Gauge(name, scale.expand(TURNS, SMALL)), pairs))
    return frames


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99, 1.0])
def test_a_window_turned_at_random_is_at_its_isotropic_null_in_every_gauge(beta):
    generator = torch.Generator().manual_seed(int(100 * beta))
    layout = Layout(("a",), (torch.Size([SMALL]),), ("other",))
    window = WindowAlignment(gauge_frames(generator), layout)
    for u in turned(autoregressive(beta, generator), generator):
        window.add({"minibatch_gradient": u, "update": u})
    differences = {}
    for row in window.rows():
        key = (row.direction, row.gauge, row.subspace)
        differences.setdefault(key, []).append(row.log_energy - row.isotropic_null)
    assert len(differences) == 2 * 3 * 2
    for key, values in differences.items():
        error = np.std(values) / TURNS**0.5
        assert abs(np.mean(values)) < 4 * error + 1 / SMALL**2, (key, np.mean(values), error)


def test_a_displacement_at_random_is_hardly_seen_in_the_adaptive_gauge():
    generator = torch.Generator().manual_seed(8)
    frames = [
        Frame(f.gauge, _pairs(1, k=11, dim=SMALL, basis=f.pairs.vectors[0])) for f in gauge_frames(generator)
    ]
    frames = [Frame(Gauge(f.gauge.name, f.gauge.scale[:1]), f.pairs) for f in frames]
    window = WindowAlignment(frames, Layout(("a",), (torch.Size([SMALL]),), ("other",)))
    for u in autoregressive(0.0, generator):
        window.add({"update": u[None].float(), "minibatch_gradient": u[None].float()})
    null = {
        (row.direction, row.gauge): row.isotropic_null + math.log(row.dim)
        for row in window.rows()
        if row.subspace == "v1"
    }
    assert null["update", "raw"] == pytest.approx(-1 / STEPS, abs=0.03)
    assert null["update", "adaptive"] < -3
    assert null["minibatch_gradient", "adaptive"] > 0
