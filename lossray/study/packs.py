"""From a study to its runs: settings (model x optimizer), and packs of seeds within each setting."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lossray.networks.settings import ModelSettings, model_settings
from lossray.operators.settings import ProductMode
from lossray.settings import content_hash
from lossray.storage.recordings import Recording
from lossray.study.settings import Study
from lossray.training.update_rules import OptimizerSettings, optimizer_settings

AUTO_SIZE = {
    "vmap": 16,
    "loop": 1,
}  # runs per pack: a loop gains nothing from company, and workers run in parallel


@dataclass(frozen=True)
class Setting:
    """One model with one optimizer setting: what the runs of a pack have in common.

    Attributes:
        setting_id: readable, fit for file names; changes with whatever changes the training of a seed but for
            the data.
        model: the model's settings.
        optimizer: the optimizer's settings; None for that of a recorded run, if lossray does not know it.
    """

    setting_id: str
    model: ModelSettings
    optimizer: OptimizerSettings | None


@dataclass(frozen=True)
class RecordedRun:
    """What is known of a run that somebody's own script has trained.

    Attributes:
        run_id: its name.
        optimizer: its name, or its class where lossray does not know it.
        lr: before any schedule.
        settings: what decides its step, as JSON, where a study file could not say it.
        adaptive: see `OptimizerEntry`; None without ``settings``.
    """

    run_id: str
    optimizer: str | None
    lr: float | None
    settings: str | None = None
    adaptive: bool | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON-compatible values, those left out that only some recordings have."""
        extra = {} if self.settings is None else {"settings": self.settings, "adaptive": self.adaptive}
        return {"run_id": self.run_id, "optimizer": self.optimizer, "lr": self.lr, **extra}


@dataclass(frozen=True)
class Pack:
    """Runs of one setting, trained and analysed together. Once in a manifest it never changes.

    A recorded run is a pack of its own, whose checkpoints are there already.

    Attributes:
        pack_id: names it in the store.
        setting_id: as in `Setting`.
        model: the model's settings.
        optimizer: the optimizer's settings; None for that of a recorded run, if lossray does not know it.
        seeds: of the members, in order; a recorded run's names its random vectors only.
        executor: "vmap" or "loop".
        product_mode: how Hessian-vector products are formed.
        recorded: the run that it is; None where the study trains it.
    """

    pack_id: str
    setting_id: str
    model: ModelSettings
    optimizer: OptimizerSettings | None
    seeds: tuple[int, ...]
    executor: str
    product_mode: ProductMode
    recorded: RecordedRun | None = None

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Of the members, in order."""
        if self.recorded is not None:
            return (self.recorded.run_id,)
        return tuple(f"{self.setting_id}-s{seed}" for seed in self.seeds)

    def plain(self) -> dict[str, Any]:
        """As JSON-compatible values."""
        plain = {
            "pack_id": self.pack_id,
            "setting_id": self.setting_id,
            "model": self.model.plain(),
            "optimizer": self.optimizer.plain() if self.optimizer else None,
            "seeds": list(self.seeds),
            "executor": self.executor,
            "product_mode": self.product_mode,
        }
        return plain | ({"recorded": self.recorded.plain()} if self.recorded else {})

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Pack":
        """Inverse of `plain`."""
        recorded = {"recorded": RecordedRun(**plain["recorded"])} if "recorded" in plain else {}
        return cls(
            **{
                **plain,
                "model": model_settings(plain["model"]),
                "optimizer": optimizer_settings(plain["optimizer"]) if plain["optimizer"] else None,
                "seeds": tuple(plain["seeds"]),
                **recorded,
            }
        )


def settings_of(study: Study, recordings: Sequence[Recording] = ()) -> tuple[Setting, ...]:
    """Every model with each of its optimizer settings, models first; of a recorded study those recorded.

    The id is readable, fit for file names, and changes with whatever changes the training of a seed but for
    the data, which a store has once.
    """
    if study.source == "checkpoints":
        settings = [_recorded_setting(study, recording) for recording in recordings]
        return tuple({setting.setting_id: setting for setting in settings}.values())
    return tuple(
        setting_of(study, model.alone, optimizer)
        for model in study.models
        for optimizer in study.optimizers
        if model.optimizers is None or optimizer.name in model.optimizers
    )


def setting_of(study: Study, model: ModelSettings, optimizer: OptimizerSettings) -> Setting:
    """A model, without the optimizers that it names, trained as the study says with an optimizer."""
    content = {
        "model": model.content(),
        "optimizer": optimizer.content(),
        "training": study.training.content(),
    }
    name = f"{_short(model.name)}-{_short(optimizer.name)}-{content_hash(content, 8)}"
    return Setting(name, model, optimizer)


def runs_of(
    study: Study, recordings: Sequence[Recording] = (), *, settings: Sequence[Setting] | None = None
) -> set[str]:
    """The ids of all runs of a study; of these settings, where they are given."""
    if study.source == "checkpoints":
        return {recording.run for recording in recordings}
    chosen = settings_of(study) if settings is None else settings
    return {f"{setting.setting_id}-s{seed}" for setting in chosen for seed in study.seeds}


def partition(
    study: Study,
    frozen: Sequence[Pack],
    decide: Callable[[Setting], tuple[str, ProductMode]],
    recordings: Sequence[Recording] = (),
    *,
    settings: Sequence[Setting] | None = None,
    auto_size: Callable[[Setting, str], int] = lambda setting, executor: AUTO_SIZE[executor],
) -> tuple[Pack, ...]:
    """Divide the runs of a study into packs.

    Frozen packs come first and stay as they are. Seeds of a setting that no frozen pack covers form new
    packs, in the study's order, of `resources.pack` runs.
    A recorded study has one pack for each recording, whatever was frozen.

    Args:
        study: the study.
        frozen: packs of the store's manifest; empty for a new store.
        decide: (executor, product mode) of a setting that has no pack yet; others keep theirs.
        recordings: the recorded runs of the store.
        settings: what is trained, where that is not `settings_of` the study.
        auto_size: runs of a new pack with "auto", by setting and executor; 16 for vmap, 1 for the loop.
    """
    if study.source == "checkpoints":
        return _recorded_packs(study, frozen, decide, recordings)
    packs = list(frozen)
    for setting in settings_of(study) if settings is None else settings:
        earlier = [pack for pack in frozen if pack.setting_id == setting.setting_id]
        covered = {seed for pack in earlier for seed in pack.seeds}
        seeds = [seed for seed in study.seeds if seed not in covered]
        if not seeds:
            continue
        executor, product_mode = (
            (earlier[0].executor, earlier[0].product_mode) if earlier else decide(setting)
        )
        asked = study.resources.pack
        size = auto_size(setting, executor) if asked == "auto" else asked
        for start in range(0, len(seeds), size):
            packs.append(_pack(setting, tuple(seeds[start : start + size]), executor, product_mode))
    return tuple(packs)


def _pack(setting: Setting, seeds: tuple[int, ...], executor: str, product_mode: ProductMode) -> Pack:
    # A seed of a setting is in one pack only, so its first seed names a pack.
    return Pack(
        f"{setting.setting_id}-p{seeds[0]}",
        setting.setting_id,
        setting.model,
        setting.optimizer,
        seeds,
        executor,
        product_mode,
    )


def _recorded_packs(
    study: Study,
    frozen: Sequence[Pack],
    decide: Callable[[Setting], tuple[str, ProductMode]],
    recordings: Sequence[Recording],
) -> tuple[Pack, ...]:
    decided = {pack.setting_id: (pack.executor, pack.product_mode) for pack in frozen}
    packs = []
    for recording in recordings:
        setting = _recorded_setting(study, recording)
        if setting.setting_id not in decided:
            decided[setting.setting_id] = decide(setting)
        packs.append(
            Pack(
                recording.run,
                setting.setting_id,
                setting.model,
                setting.optimizer,
                (recording.seed,),
                *decided[setting.setting_id],
                _recorded_run(recording),
            )
        )
    return tuple(packs)


def _recorded_run(recording: Recording) -> RecordedRun:
    run = RecordedRun(recording.run, recording.optimizer, recording.lr)
    if recording.settings is None or recording.exact:
        return run
    return replace(run, settings=json.dumps(recording.settings), adaptive=recording.adaptive)


def _recorded_setting(study: Study, recording: Recording) -> Setting:
    """The study's one model with the optimizer as it was recorded."""
    (model,) = study.models
    optimizer = None
    if recording.settings is not None and recording.exact:
        lr = {"lr": recording.lr} if recording.lr else {}  # a warm-up may start from 0
        optimizer = optimizer_settings({**recording.settings, **lr})
    content = {
        "model": model.content(),
        "optimizer": optimizer.content() if optimizer else recording.settings or recording.optimizer,
        "lr": recording.lr,
    }
    name = recording.optimizer or "unknown"
    return Setting(f"{_short(model.name)}-{_short(name)}-{content_hash(content, 8)}", model, optimizer)


def _short(name: str) -> str:
    """A name as a part of file names: of ``package.module:function`` the function."""
    return re.sub(r"\W", "_", name.rpartition(":")[2], flags=re.ASCII)
