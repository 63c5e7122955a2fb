"""Tables of ensembles with a planted truth: the mean test NLL of every method is chosen."""

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from lossray.storage.rows import to_arrow

VARIANTS = ("rescale_retrain", "rescale_curve")
CONTROLS = ("snapshot", "lr_equivalent", "curve", "curve_lr_equivalent")
OTHERS = ("independent", "align_curve", "curve_seeds")
METHODS = (*VARIANTS, *CONTROLS, *OTHERS)
BUDGETS = (1.0, 3.0)
Level = float | Mapping[float, float]  # at all budgets, or at each; 1 if not named
Levels = Mapping[str, Level]  # by method


def planted_ensembles(
    levels: Levels,
    *,
    seeds: int = 10,
    sd: float = 0.02,
    examples: int = 200,
    same: Mapping[str, str] | None = None,
    lr: float = 0.1,
    random_seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Tables `runs`, `predictions`, `ensembles`, `members` and `rescalings` of one mlp and sgd setting.

    Args:
        levels: mean NLL of a method in units of 0.2 nats.
        seeds: base runs.
        sd: standard deviation over seeds of a method's level, and of each of its examples' ln NLL.
        examples: of the test split.
        same: methods that repeat another to rounding.
        lr: learning rate, which names the setting.
        random_seed: of the draws.
    """
    rng = np.random.default_rng(random_seed)
    difficulty = rng.exponential(0.2, size=(1, examples)) * rng.lognormal(0, 0.3, size=(seeds, examples))
    predictions, ensembles = [], []
    for budget in BUDGETS:
        drawn: dict[str, np.ndarray] = {}
        for method in METHODS:
            level = levels.get(method, 1.0)
            level = level if isinstance(level, float) else level.get(budget, 1.0)
            own = 1 + sd * rng.normal(size=(seeds, 1))
            drawn[method] = level * difficulty * own * rng.lognormal(0, sd, size=difficulty.shape)
        for method, other in (same or {}).items():
            drawn[method] = drawn[other] * (1 + 1e-6 * rng.normal(size=difficulty.shape))
        for method, nll in drawn.items():
            for seed in range(seeds):
                key = {
                    "method": method,
                    "base_run": f"run-{lr}-{seed}",
                    "nominal_budget": budget,
                    "setting_id": f"setting-{lr}",
                    "seed": seed,
                    "ensemble_id": f"run-{lr}-{seed}/{method}/{budget:g}",
                }
                predictions += [
                    key
                    | {
                        "split": split,
                        "nll": list(x),
                        "nll_scaled": list(0.9 * x),
                        "error": list(1.0 * (x > 0.4)),
                    }
                    for split, x in (("test", nll[seed]), ("validation", 100 * nll[seed]))
                ]
                ensembles += _scores(key, float(nll[seed].mean()))
    tables = {"predictions": predictions, "ensembles": ensembles, "runs": _runs(seeds, lr)}
    pairs = [
        {
            k: v
            for k, v in row.items()
            if k not in ("setting_id", "seed", "split", "nll", "nll_scaled", "error")
        }
        for row in predictions
        if row["split"] == "test"
    ]
    tables["members"] = [
        row | {"i": 0, "j": j, "disagreement": 0.1, "kl": 0.02, "weight_distance": 4.0 + j, "barrier": 0.3}
        for row in pairs
        for j in (1, 2)
    ]
    tables["rescalings"] = [
        row
        | {"cycle": 0, "sigma": 0.5, "lambda_max_before": 2.0, "lambda_max_after": 3.0, "line_barrier": 0.0}
        for row in pairs
        if row["method"] in VARIANTS
    ]
    return {name: to_arrow(name, rows).to_pandas() for name, rows in tables.items()}


def _scores(key: dict[str, object], nll: float) -> list[dict[str, object]]:
    """Of the first 1, 2 and 3 members: the last is the whole ensemble's."""
    return [
        key | {"members": m, "split": split, "metric": metric, "value": value, "budget": 100.0 * m, "size": 3}
        for m in (1, 2, 3)
        for split in ("test", "validation")
        for metric, value in (
            ("nll", nll * (1 + (3 - m) / 10)),
            ("kl", None if m == 1 else 0.01 * m),
            ("disagreement", None if m == 1 else 0.1),
            ("temperature", 1.2),
        )
    ]


def _runs(seeds: int, lr: float) -> list[dict[str, object]]:
    return [
        {
            "run_id": f"run-{lr}-{seed}",
            "setting_id": f"setting-{lr}",
            "model": "mlp",
            "model_settings": json.dumps({"name": "mlp", "widths": [32]}),
            "optimizer": "sgd",
            "optimizer_settings": json.dumps({"name": "sgd", "lr": lr}),
            "lr": lr,
            "seed": seed,
            "loss": "cross_entropy",
            "status": "finished",
        }
        for seed in range(seeds)
    ]
