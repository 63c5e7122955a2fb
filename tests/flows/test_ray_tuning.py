"""On Ray: a study whose learning rates are tuned has the rows of a run without Ray."""

import pytest

import flows
import lossray
from flows.driver import Driver

pytestmark = pytest.mark.ray

TUNED = ["optimizers.0.lr=[0.001, 0.01]", "tuning.factor=10.0", "curvature.top=1", "resources.pack=1"]


def test_rates_are_tuned_on_ray_by_actors_that_train_pack_after_pack(
    session_ray, helpers, study_path, tmp_path, monkeypatch
):
    serial, out = tmp_path / "serial", tmp_path / "out"
    assert flows.run(study_path, serial, overrides=TUNED, in_process=True) == 0
    rounds, at_once = [], set()
    loop, train = Driver._loop, Driver._train

    def count_rounds(self):
        rounds.append((len(self.waiting), set()))
        return loop(self)

    def count_actors(self, trainer):
        train(self, trainer)
        rounds[-1][1].add(trainer.actor)
        at_once.add(len(self.trainers))

    monkeypatch.setattr(Driver, "_loop", count_rounds)
    monkeypatch.setattr(Driver, "_train", count_actors)
    assert flows.run(study_path, out, overrides=TUNED) == 0
    helpers.assert_same_rows(out, serial)
    assert set(lossray.open_study(out).table("runs")["lr"]) > {0.001, 0.01}
    assert rounds[0][0] == 4  # two rates of two seeds
    assert len(rounds[0][1]) == 2  # as many actors as there are CPUs: nothing is analysed beside them
    assert at_once == {1, 2}
    assert rounds[-1] == (0, set())  # the last round trains nothing
