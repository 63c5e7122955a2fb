"""Whether a best learning rate is inside its grid is told from the runs alone."""

import json

import numpy as np
import pandas as pd
import pytest

from lossray.findings.learning_rates import edges
from lossray.findings.matching import described_runs


def planted(losses, *, optimizer="adam", seeds=3, widths=(4,), decay=0.0):
    """`runs` rows: the validation loss by learning rate; inf is a run that diverged, None one that failed."""
    rows = []
    for lr, loss in losses.items():
        status = "failed" if loss is None else "finished" if np.isfinite(loss) else "diverged"
        settings = {"name": optimizer, "lr": lr, "weight_decay": decay}
        for seed in range(seeds):
            setting = f"{optimizer}-{lr}-{decay}-{widths}"
            rows.append(
                {
                    "run_id": f"{setting}-s{seed}",
                    "setting_id": setting,
                    "model": "mlp",
                    "model_settings": json.dumps({"name": "mlp", "widths": list(widths)}),
                    "optimizer": optimizer,
                    "optimizer_settings": json.dumps(settings),
                    "lr": lr,
                    "seed": seed,
                    "status": status,
                    "validation_loss": loss + 0.01 * seed if status == "finished" else np.nan,
                }
            )
    return pd.DataFrame(rows)


def found(*parts):
    return edges(described_runs({"runs": pd.concat(parts, ignore_index=True)}))


@pytest.mark.parametrize(
    ("losses", "lr", "inside"),
    [
        ({0.1: 3.0, 0.3: 1.0, 0.9: 2.0}, 0.3, True),
        ({0.1: 3.0, 0.3: 2.0, 0.9: 1.0}, 0.9, False),
        ({0.1: 1.0, 0.3: 2.0, 0.9: 3.0}, 0.1, False),
        ({0.1: 3.0, 0.3: 1.0, 0.9: np.inf}, 0.3, True),  # a rate that diverges was tried
        ({0.1: 3.0, 0.3: 1.0, 0.9: None}, 0.3, False),  # one that failed was not
        ({0.3: 1.0}, 0.3, False),
    ],
)
def test_a_best_rate_is_inside_where_a_lower_and_a_higher_one_were_tried(losses, lr, inside):
    row = found(planted(losses)).iloc[0]
    assert (row["lr"], bool(row["inside"])) == (lr, inside)
    tried = [rate for rate, loss in losses.items() if loss is not None]
    assert (row["tried"], row["lowest"], row["highest"]) == (len(tried), min(tried), max(tried))


def test_every_optimizer_has_a_grid_on_every_architecture():
    rows = found(
        planted({0.1: 2.0, 0.3: 1.0, 0.9: 2.0}),
        planted({0.1: 3.0, 0.3: 2.0, 0.9: 1.0}, widths=(8,)),
        planted({0.1: 1.0, 0.3: 2.0}, optimizer="sgd"),
    )
    inside = {(row["architecture"], row["optimizer"]): row["inside"] for _, row in rows.iterrows()}
    assert inside == {
        ("mlp widths=4", "adam"): True,
        ("mlp widths=8", "adam"): False,
        ("mlp widths=4", "sgd"): False,
    }


def test_rates_tried_with_other_settings_are_another_grid():
    rows = found(
        planted({0.1: 3.0, 0.3: 1.0}, decay=0.0),
        planted({0.1: 5.0, 0.3: 4.0, 0.9: 5.0}, decay=0.5),
    )
    assert rows[["lr", "highest", "inside"]].to_numpy().tolist() == [[0.3, 0.3, False]]


def test_settings_that_are_not_known_do_not_matter():
    row = found(planted({0.1: 3.0, 0.3: 1.0, 0.9: 2.0}).drop(columns="optimizer_settings")).iloc[0]
    assert bool(row["inside"])


def test_no_runs_have_no_rates():
    assert edges(described_runs({})).empty
