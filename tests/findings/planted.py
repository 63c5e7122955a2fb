"""Tables with a planted truth: S of every run is chosen, seeds are paired, checkpoints pass a common loss."""

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

ADAPTIVE = ("adam", "rmsprop", "adagrad")
OPTIMIZERS = ("sgd", "momentum", *ADAPTIVE)
GAUGES = ("raw", "balanced", "adaptive", "preconditioned")
STEPS = (0, 10, 100, 1000)
DIM = 2410
Energies = Mapping[str, float | Mapping[str, float]]  # by gauge: of all optimizers, or of each


def planted(
    energies: Energies,
    *,
    seeds: int = 10,
    sd: float = 0.4,
    dim: int = DIM,
    widths: tuple[int, ...] = (32,),
    gradient: float = 0.06,
    lr: Mapping[str, tuple[float, ...]] | None = None,
    random_seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Tables of one mlp.

    Args:
        energies: mean of exp(S) of the update with v1, by gauge; a mapping gives it by optimizer.
        seeds: runs of each optimizer.
        sd: standard deviation of S over seeds; half of its variance is shared by the runs of a seed.
        dim: parameters.
        widths: of the mlp.
        gradient: mean of exp(S) of the minibatch gradient, in all gauges and of all optimizers.
        lr: learning rates by optimizer, the first the best; 0.1 alone where not given.
        random_seed: of the draws.
    """
    rng = np.random.default_rng(random_seed)
    runs, checkpoints, alignment = [], [], []
    shared = rng.normal(0, sd / np.sqrt(2), size=seeds)
    for optimizer in OPTIMIZERS:
        for place, rate in enumerate((lr or {}).get(optimizer, (0.1,))):
            for seed in range(seeds):
                run_id = f"{widths}-{optimizer}-{rate}-{seed}"
                settings = {"name": "mlp", "widths": list(widths), "activation": "relu", "optimizers": None}
                runs.append(
                    {
                        "run_id": run_id,
                        "setting_id": f"{widths}-{optimizer}-{rate}",
                        "model": "mlp",
                        "activation": "relu",
                        "model_settings": json.dumps(settings),
                        "optimizer": optimizer,
                        "lr": rate,
                        "adaptive": optimizer in ADAPTIVE,
                        "seed": seed,
                        "n_params": dim,
                        "loss": "cross_entropy",
                        "status": "finished",
                        "train_loss": 0.01,
                        "validation_loss": 0.1 + 0.1 * place,
                    }
                )
                for step, loss in zip(STEPS, (2.3, 1.0, 0.2, 0.01), strict=True):
                    noisy = loss * np.exp(rng.normal(0, 0.1))
                    checkpoints.append({"run_id": run_id, "step": step, "train_loss": noisy})
                    own = shared[seed] + rng.normal(0, sd / np.sqrt(2))
                    for gauge in GAUGES:
                        level = energies[gauge]
                        update = level if isinstance(level, float) else level[optimizer]
                        for direction, energy in (("update", update), ("minibatch_gradient", gradient)):
                            for subspace, k in (("v1", 1), ("top10", 10)):
                                alignment.append(
                                    {
                                        "run_id": run_id,
                                        "step": step,
                                        "direction": direction,
                                        "gauge": gauge,
                                        "subspace": subspace,
                                        "log_energy": np.log(energy * k**0.3) + own,
                                        "steps": 50,
                                        "sign_flip_null": 1.5 * k / dim,
                                        "k": k,
                                        "dim": dim,
                                        "resolved": True,
                                    }
                                )
    return {
        "runs": pd.DataFrame(runs),
        "checkpoints": pd.DataFrame(checkpoints),
        "alignment": pd.DataFrame(alignment),
    }


def by_group(sgd: float, adaptive: float) -> dict[str, float]:
    """Energies by optimizer: one for sgd and momentum, one for the adaptive methods."""
    return {name: adaptive if name in ADAPTIVE else sgd for name in OPTIMIZERS}


def in_all_gauges(energy: float | Mapping[str, float], **others: float | Mapping[str, float]) -> Energies:
    """The same energies in every gauge but those named."""
    return {gauge: others.get(gauge, energy) for gauge in GAUGES}


def planted_degeneracy(
    runs: pd.DataFrame,
    *,
    excess: float,
    share: float,
    gap: bool = True,
    floor: int = 40,
    operators: tuple[str, ...] = ("hessian", "adaptive"),
) -> pd.DataFrame:
    """Dense counts at the first and last checkpoint of each run.

    Args:
        runs: whose rows are made.
        excess: null directions beyond the structural floor, after step 0.
        share: of the eigenvalues above 1e-2 |lambda|max.
        gap: whether a gap supports the counts at the noise floor.
        floor: structural null directions.
        operators: those counted.
    """
    rows = []
    for run, dim in zip(runs["run_id"], runs["n_params"], strict=True):
        for step in (STEPS[0], STEPS[-1]):
            nullity = floor + (excess if step else 0)
            counts = (
                (1e-13, nullity, True),
                (1e-3, dim * (1 - 2 * share), False),
                (1e-2, dim * (1 - share), False),
            )
            for operator in operators:
                rows += [
                    {
                        "run_id": run,
                        "step": step,
                        "operator": operator,
                        "point": "checkpoint",
                        "method": "dense",
                        "tau": tau,
                        "at_noise_floor": at_floor,
                        "nullity": count,
                        "structural_nullity": floor,
                        "quadrature_bias": np.nan if at_floor else 5.0,
                        "excess": count - floor,
                        "rank": dim - count if gap and at_floor else np.nan,
                        "dim": dim,
                        "n_examples": 512,
                    }
                    for tau, count, at_floor in counts
                ]
    return pd.DataFrame(rows)
