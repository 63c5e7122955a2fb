"""`lossray.directional_curvature`: dense blocks, layers without couplings, and a study's rows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossray
from lossray.errors import StudyError
from lossray.storage.tables import TABLES

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def hessian(model):
    return lossray.Hessian(model, F.cross_entropy, (X, Y))


def test_within_and_across_are_those_of_the_dense_blocks():
    H = hessian(net())
    dense = H @ torch.eye(51, dtype=torch.float64)
    u = torch.randn(51, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = lossray.directional_curvature(H, {"u": u, "gradient": H.gradient})
    blocks = {"0": slice(0, 30), "2": slice(30, 51)}
    own = {block: float(u[part] @ dense[part, part] @ u[part] / (u @ u)) for block, part in blocks.items()}
    rows = found.to_frame().query("direction == 'u'").set_index("block")
    assert rows["curvature_within"].to_dict() == pytest.approx(own)
    assert found.curvature["u"] == pytest.approx(float(u @ dense @ u / (u @ u)))
    assert found.within["u"] == pytest.approx(sum(own.values()))
    assert found.within["u"] + found.across["u"] == pytest.approx(found.curvature["u"])
    assert rows["curvature_part"].sum() == pytest.approx(found.curvature["u"])
    assert found.norms["u"] == pytest.approx(float(u.norm()))
    assert set(found.curvature) == {"u", "gradient"}
    default = lossray.directional_curvature(H)
    assert default.curvature == {"gradient": found.curvature["gradient"]}


def test_of_layers_that_meet_nowhere_nothing_is_across():
    class Apart(nn.Module):
        """Two linear maps that give outputs of their own."""

        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 1).double(), nn.Linear(4, 1).double()

        def forward(self, x):
            return torch.cat([self.left(x), self.right(x)], dim=1)

    torch.manual_seed(0)
    H = lossray.Hessian(Apart(), F.mse_loss, (X, X[:, :2]))
    found = lossray.directional_curvature(H, {"u": torch.ones(10), "v": torch.arange(10.0)})
    assert found.across == pytest.approx({"u": 0, "v": 0}, abs=1e-14)
    assert all(value > 0 for value in found.within.values())


def test_the_table_and_the_text():
    found = lossray.directional_curvature(hessian(net()))
    frame = found.to_frame()
    assert list(frame) == [c.name for c in TABLES["shares"].columns if c.name not in ("run_id", "step")]
    assert frame["block"].tolist() == ["0", "2"]
    line = str(found).splitlines()[1].split()
    assert line[0] == "gradient"
    assert float(line[2]) == pytest.approx(found.curvature["gradient"], rel=1e-3)


def test_a_mistake_is_named():
    H = hessian(net())
    with pytest.raises(StudyError, match="directions: found Tensor; allowed: a dict"):
        lossray.directional_curvature(H, torch.ones(51))
    with pytest.raises(StudyError, match=r"direction 'u': found the shape \[5\]"):
        lossray.directional_curvature(H, {"u": torch.ones(5)})
    with pytest.raises(StudyError, match=r"needed: lossray\.Hessian"):
        lossray.directional_curvature(lossray.Restricted(H, ["0.*"]))


def test_the_shares_are_those_of_a_study(undisturbed):
    study = lossray.open_study(undisturbed)
    rows = study.table("shares").query("step == 12 and direction == 'gradient'")
    for run_id, own in rows.groupby("run_id"):
        H = lossray.Hessian(study.model(run_id, 12), F.cross_entropy, study.data("train"))
        frame = lossray.directional_curvature(H).to_frame().merge(own, on="block")
        assert len(frame) == len(own)
        for column in ("energy_share", "curvature_part"):
            np.testing.assert_allclose(frame[f"{column}_x"], frame[f"{column}_y"], rtol=1e-3, atol=1e-6)
