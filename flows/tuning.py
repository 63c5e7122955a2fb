"""Learning rates tuned: whole grids are trained, rates beyond an edge added, and only the best analysed.

Everything follows from the study, the packs of its store and the `runs` rows that are committed: a driver
that resumes goes on with the round in which an earlier one has stopped, and nothing else is written down.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flows.plan import Plan
from lossray.storage.publish import assemble
from lossray.storage.store import Store
from lossray.study import Pack, Setting, Study, runs_of, setting_of, settings_of
from lossray.training.update_rules import OptimizerSettings, optimizer_settings

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 12  # of a rate that is added: 0.1 x 3 is 0.3


@dataclass(frozen=True)
class Round:
    """What is to be trained and analysed now.

    Attributes:
        settings: all that is trained: the study's, those that earlier rounds have added, and new ones.
        analysed: ids of the settings that are analysed; None where it is all of them.
        settled: whether it is the last round: no rate will be added.
        lines: what is said of the rates.
    """

    settings: tuple[Setting, ...]
    analysed: frozenset[str] | None = None
    settled: bool = True
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Best:
    """The best setting of one optimizer for one model, and the ends of the rates that were tried."""

    name: str  # "adam on mlp"
    setting: Setting
    lr: float
    lowest: float
    highest: float
    finished: bool = True  # False: every run has diverged, and the smallest rate is the least bad

    @property
    def edges(self) -> list[str]:
        ends = {"lower": self.lowest, "upper": self.highest}
        return [name for name, end in ends.items() if end == self.lr]


def round_of(study: Study, packs: Sequence[Pack], runs: "pd.DataFrame") -> Round:
    """The round that follows from what is trained.

    All rates train first. Where the best one of an optimizer for a model is then at an edge, one is added
    beyond it, for that model. Once there is nothing to add, the best are analysed.

    Args:
        study: with [tuning].
        packs: of its store.
        runs: of `trained_runs`.
    """
    from lossray.findings.learning_rates import edges  # here: few studies tune, and these load pandas
    from lossray.findings.matching import described_runs

    settings = _with_added(study, packs)
    if not runs_of(study, settings=settings) <= set(runs["run_id"]):
        return Round(settings, frozenset(), settled=False)
    described = described_runs({"runs": runs})
    edge_rows = edges(described)
    bests = [*_finished(edge_rows, settings), *_diverged(described, edge_rows, settings)]
    added = [_beyond(study, settings, best) for best in bests]
    lines = [_line(best, new) for best, new in zip(bests, added, strict=True) if best.edges]
    if any(added):
        new = [setting for beyond in added for setting in beyond]
        return Round((*settings, *new), frozenset(), settled=False, lines=tuple(lines))
    inside = f"{int(edge_rows['inside'].sum())} of {len(bests)} best learning rates are inside their grids"
    return Round(settings, frozenset(edge_rows["setting_id"]), lines=(*lines, inside))


def trained_runs(store: Store, plan: Plan, given_up: Collection[str] = ()) -> "pd.DataFrame":
    """The `runs` rows of all packs that are trained, as the plan has them.

    Args:
        store: the store.
        plan: of its packs.
        given_up: ids of packs whose training has failed and is not tried again.
    """
    committed = store.committed_keys()
    trained = {pack.pack.pack_id for pack in plan.packs if pack.training_key in committed}
    runs: pd.DataFrame = assemble(store, "runs").to_pandas()
    return runs[runs["pack_id"].isin(trained.union(given_up))]


def most_added(study: Study) -> int:
    """How many settings tuning may add at most to those of the study."""
    assert study.tuning is not None
    return 2 * study.tuning.extensions * len(stand_ins(settings_of(study)))


def stand_ins(settings: Sequence[Setting]) -> frozenset[str]:
    """One setting of each optimizer for each model: as many as will be analysed, before it is known which."""
    first: dict[tuple[str, str], str] = {}
    for setting in settings:
        key = (setting.model.model_dump_json(), optimizer_of(setting).name)
        first.setdefault(key, setting.setting_id)
    return frozenset(first.values())


def optimizer_of(setting: Setting) -> OptimizerSettings:
    """The optimizer of a setting that is trained, not recorded."""
    assert setting.optimizer is not None
    return setting.optimizer


def rate_of(setting: Setting) -> float:
    """The learning rate of a setting that is trained."""
    return float(optimizer_of(setting).plain()["lr"])


def _with_added(study: Study, packs: Sequence[Pack]) -> tuple[Setting, ...]:
    """The settings of the study, and those that earlier rounds have added to its store."""
    asked = {setting.setting_id: setting for setting in settings_of(study)}
    stored = {pack.setting_id: Setting(pack.setting_id, pack.model, pack.optimizer) for pack in packs}
    return tuple({**stored, **asked}[name] for name in {**asked, **stored})


def _finished(edge_rows: "pd.DataFrame", settings: Sequence[Setting]) -> Iterator[_Best]:
    """The best setting of every optimizer and model of which a run has finished."""
    by_id = {setting.setting_id: setting for setting in settings}
    for row in edge_rows.to_dict("records"):
        name = f"{row['optimizer']} on {row['architecture']}"
        yield _Best(name, by_id[row["setting_id"]], row["lr"], row["lowest"], row["highest"])


def _diverged(
    runs: "pd.DataFrame", edge_rows: "pd.DataFrame", settings: Sequence[Setting]
) -> Iterator[_Best]:
    """The smallest rate of every other optimizer and model, where its runs have diverged."""
    by_id = {setting.setting_id: setting for setting in settings}
    finished = set(zip(edge_rows["architecture"], edge_rows["optimizer"], strict=True))
    diverged = runs[runs["status"] == "diverged"].sort_values("lr")
    for (architecture, optimizer), rows in diverged.groupby(["architecture", "optimizer"]):
        if (architecture, optimizer) not in finished:
            first = rows.iloc[0]
            name, lr = f"{optimizer} on {architecture}", first["lr"]
            yield _Best(name, by_id[first["setting_id"]], lr, lr, np.inf, finished=False)


def _beyond(study: Study, settings: Sequence[Setting], best: _Best) -> list[Setting]:
    """What is added to the grid of a best setting: a rate beyond each edge that it is at."""
    assert study.tuning is not None
    factor, most = study.tuning.factor, study.tuning.extensions
    have, given = _rates(settings, best.setting), _rates(settings_of(study), best.setting)
    rates = []
    if "lower" in best.edges and sum(lr < min(given) for lr in have) < most:
        rates.append(best.lr / factor)
    if "upper" in best.edges and sum(lr > max(given) for lr in have) < most:
        rates.append(best.lr * factor)
    rounded = [float(f"{lr:.{DIGITS}g}") for lr in rates]
    return [_at_rate(study, best.setting, lr) for lr in rounded if lr not in have]


def _rates(settings: Sequence[Setting], like: Setting) -> list[float]:
    """The rates of the settings that differ from one in nothing else."""
    kind = (like.model, _without_rate(like))
    return [rate_of(setting) for setting in settings if (setting.model, _without_rate(setting)) == kind]


def _without_rate(setting: Setting) -> dict[str, object]:
    return {key: value for key, value in optimizer_of(setting).plain().items() if key != "lr"}


def _at_rate(study: Study, setting: Setting, lr: float) -> Setting:
    optimizer = optimizer_settings({"lr": lr, **_without_rate(setting)})
    return setting_of(study, setting.model, optimizer)


def _line(best: _Best, added: Sequence[Setting]) -> str:
    """``adam on mlp: best lr 0.01 at the upper edge; 0.03 added``."""
    at = f"best lr {best.lr:g} at the {' and the '.join(best.edges)} edge"
    rates = [f"{rate_of(setting):g}" for setting in added]
    does = f"{' and '.join(rates)} added" if rates else "no more are added"
    return f"{best.name}: {at if best.finished else 'every run has diverged'}; {does}"
