"""The statistic S of each compared run, arranged for tests: optimizers by seeds, gauge by gauge."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossray.findings.matching import BASELINE as BASELINE

Array = NDArray[np.float64]

NO_SCALE = ("sgd", "momentum", "nesterov")  # P is the identity: the preconditioned gauge is the raw one
TOP, WIDER = "v1", "top10"
RESOLVED_SHARE = 0.5  # of each optimizer's runs: with fewer the wider subspace is shown, and v1 not judged

CELL = ["architecture", "rule", "moment", "direction"]
ALIGNMENT_COLUMNS = (
    "run_id",
    "step",
    "direction",
    "gauge",
    "subspace",
    "log_energy",
    "sign_flip_null",
    "isotropic_null",
    "k",
    "dim",
    "resolved",
)


@dataclass(frozen=True)
class GaugeEnergies:
    """S of m optimizers and n seeds in one gauge; NaN where a run is missing or unresolved.

    Attributes:
        gauge: its name.
        subspace: in which the energies are measured: TOP or WIDER.
        optimizers: the m with a usable run, in alphabetical order.
        seeds: the n, ascending.
        energies: S, [m, n].
        over_chance: S minus its mean over random windows, [m, n].
        over_sign_flips: S - ln(sign-flip null), [m, n].
        dim: smallest number of coordinates d of its runs.
        unresolved: runs left out since their subspace is not resolved.
    """

    gauge: str
    subspace: str
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    energies: Array
    over_chance: Array
    over_sign_flips: Array
    dim: int
    unresolved: int

    def of(self, optimizer: str) -> Array:
        """S of one optimizer, [n]; NaN where it is not there."""
        if optimizer not in self.optimizers:
            return np.full(len(self.seeds), np.nan)
        values: Array = self.energies[self.optimizers.index(optimizer)]
        return values

    def over_null(self, over: Array, optimizer: str) -> Array:
        """One optimizer's row of `over_chance` or `over_sign_flips`, [n]; NaN where it is not there."""
        if optimizer not in self.optimizers:
            return np.full(len(self.seeds), np.nan)
        values: Array = over[self.optimizers.index(optimizer)]
        return values

    def against_baseline(self, optimizers: tuple[str, ...]) -> Array:
        """S minus SGD's S of the same seed, [len(optimizers), n]."""
        rows = [self.of(name) for name in optimizers]
        energies = np.array(rows) if rows else np.empty((0, len(self.seeds)))
        differences: Array = energies - self.of(BASELINE)
        return differences


@dataclass(frozen=True)
class Cell:
    """One direction at one architecture, learning-rate rule and moment.

    Attributes:
        architecture: its label.
        rule: by which the learning rates were chosen.
        moment: level of the training loss, or the last checkpoint.
        direction: "update", "minibatch_gradient", ...
        adaptive: adaptive methods whose runs are compared, with or without rows.
        n_params: largest number of parameters of its runs; 0 where it is not known.
        gauges: by name.
        lost: by optimizer, how many runs diverged or failed, and of how many.
    """

    architecture: str
    rule: str
    moment: str
    direction: str
    adaptive: tuple[str, ...]
    n_params: int
    gauges: dict[str, GaugeEnergies]
    lost: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def observations(points: pd.DataFrame, alignment: pd.DataFrame) -> pd.DataFrame:
    """The rows of `alignment` at the points of `matching.matched_points`, ready to be pivoted.

    Columns of both, and `over_chance`, `over_sign_flips`, `usable` (resolved, and S finite).
    """
    rows = points.merge(alignment, on=["run_id", "step"])
    has = set(zip(rows["run_id"], rows["step"], rows["gauge"], strict=True))
    raw = rows[rows["optimizer"].isin(NO_SCALE) & (rows["gauge"] == "raw")]
    lacking = [
        (run, step, "preconditioned") not in has for run, step in zip(raw["run_id"], raw["step"], strict=True)
    ]
    rows = pd.concat([rows, raw[lacking].assign(gauge="preconditioned")], ignore_index=True)
    energy = rows["log_energy"].to_numpy(dtype=np.float64)
    with np.errstate(all="ignore"):
        chance = rows["isotropic_null"].to_numpy(dtype=np.float64)
        # Rows of before the column: random independent steps, which other gauges than the raw one distort.
        independent = np.log(rows["k"].to_numpy(float) / rows["dim"].to_numpy(float))
        older = np.isnan(chance) & (rows["gauge"] == "raw").to_numpy()
        chance = np.where(older, independent, chance)
        flips = np.log(rows["sign_flip_null"].to_numpy(dtype=np.float64))
    resolved = (rows["resolved"] == True).to_numpy(dtype=bool)  # noqa: E712 - null is not resolved
    return rows.assign(
        log_energy=energy,
        over_chance=energy - chance,
        over_sign_flips=energy - flips,
        usable=resolved & np.isfinite(energy),
    )


def cells_of(points: pd.DataFrame, rows: pd.DataFrame, lost: pd.DataFrame) -> list[Cell]:
    """One cell for each architecture, rule, moment and direction, in alphabetical order.

    Args:
        points: of `matching.matched_points`.
        rows: of `observations`.
        lost: of `matching.lost_runs`.
    """
    compared = lost[lost["adaptive"].astype(bool)].groupby(["architecture", "rule"])["optimizer"].unique()
    counts = {
        labels: {
            str(name): (int(gone), int(total))
            for name, gone, total in zip(group["optimizer"], group["lost"], group["total"], strict=True)
        }
        for labels, group in lost.groupby(["architecture", "rule"])
    }
    n_params = points.groupby("architecture")["n_params"].max()
    cells = []
    for labels, group in rows.groupby(CELL):
        architecture, rule, moment, direction = map(str, labels)
        adaptive = compared.get((architecture, rule), np.array([], dtype=object))
        gauges = {
            str(name): _gauge(str(name), gauge_rows)
            for name, gauge_rows in group.groupby("gauge", sort=False)
        }
        cells.append(
            Cell(
                architecture=architecture,
                rule=rule,
                moment=moment,
                direction=direction,
                adaptive=tuple(sorted(adaptive)),
                n_params=int(n_params[architecture]) if pd.notna(n_params[architecture]) else 0,
                gauges=gauges,
                lost=counts.get((architecture, rule), {}),
            )
        )
    return cells


def _gauge(gauge: str, rows: pd.DataFrame) -> GaugeEnergies:
    subspace = _subspace(rows)
    subspace_rows = rows[rows["subspace"] == subspace]
    usable = subspace_rows[subspace_rows["usable"]]
    row, optimizers = pd.factorize(usable["optimizer"], sort=True)
    column, seeds = pd.factorize(usable["seed"], sort=True)

    def matrix(name: str) -> Array:
        values = np.full((len(optimizers), len(seeds)), np.nan)
        values[row, column] = usable[name].to_numpy(dtype=np.float64)
        return values

    return GaugeEnergies(
        gauge=gauge,
        subspace=subspace,
        optimizers=tuple(map(str, optimizers)),
        seeds=tuple(int(seed) for seed in seeds),
        energies=matrix("log_energy"),
        over_chance=matrix("over_chance"),
        over_sign_flips=matrix("over_sign_flips"),
        dim=int(usable["dim"].min()) if usable["dim"].notna().any() else 0,
        unresolved=int((~subspace_rows["usable"]).sum()),
    )


def _subspace(rows: pd.DataFrame) -> str:
    """v1 where it is resolved in enough runs of every compared optimizer, else the top 10 if they are there.

    The top 10 are for the reader: what lies in them need not lie in v1, so that they neither establish nor
    refute (`evidence_a`). One choice for all runs keeps paired differences comparable.
    """
    judged = rows[rows["adaptive"] | (rows["optimizer"] == BASELINE)]
    share = judged.groupby(["subspace", "optimizer"])["usable"].mean()
    least = share.groupby("subspace").min()
    if least.get(TOP, 0.0) >= RESOLVED_SHARE or WIDER not in set(rows["subspace"]):
        return TOP
    return WIDER if least.get(WIDER, 0.0) > least.get(TOP, 0.0) else TOP
