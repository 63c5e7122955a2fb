"""``--dry-run`` counts what a study would do, and does nothing."""

import re

import pytest

from flows.costs import SURFACE_POINT_BYTES, Cost
from flows.estimate import STARTUP_SECONDS, WORKER_SECONDS, _bytes, dry_run, wall_seconds
from lossray.errors import StudyError

STUDY = """
name = "tiny"
seeds = 3
[data]
source = "gaussians"
n = 90
dim = 6
classes = 3
[[models]]
name = "mlp"
widths = [4]
[[optimizers]]
name = "sgd"
lr = [0.1, 0.2]
[training]
steps = 20
batch_size = 10
checkpoints = {steps = [0, 10, 20]}
[curvature]
top = 2
[angles]
directions = ["gradient"]
[resources]
pack = 2
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return str(path)


def test_it_counts_packs_runs_and_products(study):
    text = dry_run(study, None)
    assert "4 packs, 6 runs, 3 checkpoints each" in text
    # 4 packs x 3 checkpoints x (as many products as there are parameters, 43, in each of 3 gauges, and 6 for
    # one direction and the forward passes of the sharpness)
    assert "about 1,620 products" in text
    rows = re.findall(r"^mlp-sgd-\w+ +43 +3 +2  vmap +retained", text, flags=re.MULTILINE)
    assert len(rows) == 2  # (6 + 1) * 4 + (4 + 1) * 3 parameters


def test_polishing_counts_the_most_steps_that_it_can_take(study):
    def products(table):
        return int(re.search(r"about ([\d,]+) products", dry_run(study, None, [table]))[1].replace(",", ""))

    # 4 packs, both ends, 43 parameters: three Hessians at a point, and at another; 60 on the way
    assert products("degeneracy={}") == 1620 + 4 * 2 * 43 * 3
    assert products("degeneracy={polish=true}") == 1620 + 4 * 2 * 43 * 66


def test_it_counts_the_products_of_layers(study):
    text = dry_run(study, None, ["angles.layers=true"])
    directions = int(re.search(r"about ([\d,]+) products", text)[1].replace(",", "")) - 1620
    assert directions > 0
    assert directions % (4 * 3 * 2) == 0  # packs, checkpoints, layers


def test_it_counts_the_points_of_surfaces(study):
    def bytes_of(*overrides):
        text = dry_run(study, None, overrides=["resources.pack=1", *overrides])
        return float(re.search(r"disk: about ([\d.]+) MB", text)[1]) * 1e6

    slices = bytes_of("surfaces={points=101}") - bytes_of()
    expected = 2 * (101 + 3 * 101**2) * SURFACE_POINT_BYTES  # of the first seed of each setting
    assert slices == pytest.approx(expected, abs=2e4)  # the sizes are rounded


def test_it_writes_nothing(study, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    dry_run(study, str(tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_it_counts_what_a_store_has(study, tmp_path):
    from flows import run

    out = str(tmp_path / "out")
    assert run(study, out, overrides=["seeds=2"], in_process=True) == 0
    text = dry_run(study, out, overrides=["degeneracy={}"])
    # Done: 2 packs x (3 checkpoints + training + 3 curvatures + 2 pairs); to do: those of the third seed, and
    # the degeneracy at both ends of all four packs.
    assert "done already: 18 of 44 tasks" in text


def test_bad_input_is_refused_as_in_a_run(study):
    with pytest.raises(StudyError, match="batch_size"):
        dry_run(study, None, overrides=["training.batch_size=1000"])


def test_bytes_have_the_unit_of_their_size():
    assert [_bytes(n) for n in (7, 1500, 2_500_000, 3 * 10**9)] == ["7 bytes", "1.5 kB", "2.5 MB", "3 GB"]


def test_wall_time_counts_the_actors_and_the_slot_that_is_kept_for_curvature():
    def packs(number, training, curvature):
        return [Cost(1, 1, training, curvature, 1)] * number

    assert wall_seconds(packs(1, 2, 3), 1) == STARTUP_SECONDS + WORKER_SECONDS + 5
    one_after_the_other = 8 * (WORKER_SECONDS + 2)
    assert wall_seconds(packs(8, 2, 0), 2) == STARTUP_SECONDS + one_after_the_other
    assert wall_seconds(packs(8, 2, 100), 4) == STARTUP_SECONDS + 8 * (WORKER_SECONDS + 102) / 4
    assert wall_seconds([*packs(8, 2, 0), *packs(1, 900, 0)], 64) == STARTUP_SECONDS + WORKER_SECONDS + 900
