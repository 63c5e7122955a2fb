"""manifest.json: what a store was made from, frozen when it is made, and what a later study may change."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lossray.errors import StoreError, StudyError
from lossray.packages import installed, running
from lossray.settings import content_hash
from lossray.study import Pack, Study, StudyInputs, involved_sources, study_from_table
from lossray.study.problems import shown

FORMAT_VERSION = 1
ANALYSES = (
    "degeneracy",
    "trajectory",
    "surfaces",
    "connectivity",
    "ensembles",
)  # sections that may be added, and then stay as they are
GROWING = (("ensembles", "methods"), ("connectivity", "align"))  # lists to which more may be added
PACKAGES = ("torch", "ray", "lossray")


@dataclass(frozen=True)
class Manifest:
    """What is in manifest.json.

    Attributes:
        study: the effective settings, defaults included: `study_from_table` reads them.
        inputs: content hash of the data, source hashes of the user's modules.
        packs: the frozen partition.
        folder: the study's folder, to which relative data paths refer.
        versions: of Python and the packages that numbers depend on.
        host: where the store was made.
        git_revision: of the study's folder, "-dirty" where files had changed; None outside a repository.
        arguments: the command line.
        created: UTC, ISO 8601.
        format_version: of this file.
    """

    study: Mapping[str, Any]
    inputs: StudyInputs
    packs: tuple[Pack, ...]
    folder: str
    versions: Mapping[str, str]
    host: str
    git_revision: str | None
    arguments: tuple[str, ...]
    created: str
    format_version: int = FORMAT_VERSION

    def plain(self) -> dict[str, Any]:
        """As JSON-compatible values."""
        return {
            "format_version": self.format_version,
            "created": self.created,
            "host": self.host,
            "versions": dict(self.versions),
            "git_revision": self.git_revision,
            "arguments": list(self.arguments),
            "folder": self.folder,
            "inputs": {"data_key": self.inputs.data_key, "sources": dict(self.inputs.sources)},
            "study": dict(self.study),
            "packs": [pack.plain() for pack in self.packs],
        }

    @classmethod
    def from_plain(cls, plain: Any, where: str = "manifest.json") -> "Manifest":
        """Inverse of `plain`.

        Args:
            plain: as read from JSON.
            where: names the file in errors.

        Raises:
            StoreError: the file is of another format version, or damaged.
        """
        version = plain.get("format_version") if isinstance(plain, dict) else None
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:  # of 1 to now, all are read
            raise StoreError(
                f"{where}: found format version {version}; this lossray, {installed('lossray')}, reads up to "
                f"version {FORMAT_VERSION}; use the lossray that made the store, or another --out"
            )
        try:
            return cls(
                **{
                    **plain,
                    "inputs": StudyInputs(**plain["inputs"]),
                    "packs": tuple(Pack.from_plain(pack) for pack in plain["packs"]),
                    "arguments": tuple(plain["arguments"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{where} is damaged: {' '.join(str(error).split())}") from error


def new_manifest(
    study: Study,
    inputs: StudyInputs,
    packs: Sequence[Pack],
    *,
    folder: str | os.PathLike[str],
    arguments: Sequence[str] | None = None,
) -> Manifest:
    """The manifest of a store that is made now.

    Args:
        study: from `load_study`.
        inputs: from `study_inputs`.
        packs: from `partition`.
        folder: the study's folder.
        arguments: the command line; None takes this process's.
    """
    return Manifest(
        study=study.plain(),
        inputs=inputs,
        packs=tuple(packs),
        folder=str(Path(folder).resolve()),
        versions={"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
        host=platform.node(),
        git_revision=_git_revision(Path(folder)),
        arguments=tuple(sys.argv if arguments is None else arguments),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def extended(
    old: Manifest,
    study: Study,
    inputs: StudyInputs,
    packs: Sequence[Pack],
    *,
    folder: str | os.PathLike[str] | None = None,
) -> Manifest:
    """The manifest after an extension; equal to `old` where the study is the same.

    When, on which host and with what the store was made stays, and so does a section of analysis that the
    study leaves out: the store has its rows. The folder goes with the study, since its data paths may be
    relative; None leaves that too.
    """
    study_folder = old.folder if folder is None else str(Path(folder).resolve())
    plain = study.plain()
    kept = {section: old.study.get(section) for section in ANALYSES if plain[section] is None}
    return replace(old, study=plain | kept, inputs=inputs, packs=tuple(packs), folder=study_folder)


def other_versions(old: Manifest | None) -> list[str]:
    """A line if a store was made with another lossray or torch than the running ones; else nothing."""
    now = running()
    made = now if old is None else {name: old.versions.get(name, "unknown") for name in now}
    differ = [name for name in now if made[name] != now[name]]
    if not differ:
        return []
    there, here = (", ".join(f"{name} {of[name]}" for name in differ) for of in (made, now))
    return [
        f"the store was made with {there}, and this is {here}: the columns of `tasks` named "
        f"{' and '.join(f'{name}_version' for name in differ)} say what computed each row"
    ]


def edited_packs(old: Manifest, study: Study, inputs: StudyInputs) -> dict[str, list[str]]:
    """By pack id, the functions of the user's that were edited since the pack's results were computed."""
    now = inputs.sources
    edited = {
        pack.pack_id: [
            name
            for name, value in involved_sources(pack, study, old.inputs).items()
            if name in now and now[name] != value
        ]
        for pack in old.packs
    }
    return {pack_id: names for pack_id, names in edited.items() if names}


def check_extension(old: Manifest, study: Study, inputs: StudyInputs) -> None:
    """Allow what adds to a store, refuse what changes an input of the rows that it has.

    Seeds, optimizers, models and sections may be added; [resources], [claims] and [tuning] may change, and so
    may the place of the data as long as their content is the same.

    Raises:
        StoreError: one line for each difference, and the remedy.
    """
    lines = list(_differences(old, study, inputs))
    if lines:
        them = "it" if len(lines) == 1 else "them"
        remedy = f"the store's rows depend on {them}: run into another --out, or restore {them}"
        raise StoreError("\n".join([*lines, remedy]) if len(lines) > 1 else f"{lines[0]}; {remedy}")


def _differences(old: Manifest, study: Study, inputs: StudyInputs) -> Iterator[str]:
    new = study.plain()
    old = replace(old, study=_with_defaults(old.study))
    for key in ("name", "source"):
        yield from _changes(key, old.study.get(key), new[key])
    if old.inputs.data_key != inputs.data_key:
        changes = list(_changes("data", old.study["data"], new["data"]))
        hashes = f"the store has content {old.inputs.data_key[:12]}, the study finds {inputs.data_key[:12]}"
        yield from changes or [f"data: {hashes}"]
    for section in ("training", "curvature", "angles"):
        yield from _changes(section, old.study[section], new[section])
    for section in ANALYSES:
        if old.study.get(section) is not None and new[section] is not None:
            same = _as_before(section, old.study[section], new[section])
            yield from _changes(section, old.study[section], same)
    for section in ("models", "optimizers"):
        yield from _lost_settings(section, *(_alone(side[section]) for side in (old.study, new)))
    yield from _lost_trainings(old.study, new)
    kept = set(study.seeds)
    lost = [seed for seed in old.study["seeds"] if seed not in kept]
    if lost:
        yield f"seeds: the store has {shown(lost)}, which the study lacks"


def _with_defaults(study: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of an older store with the defaults of those that were added since.

    As they are where this version refuses some of them: then the differences name it.
    """
    try:
        return study_from_table(study).plain()
    except StudyError:
        return study


def _as_before(section: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new section without what may be added to it."""
    kept = {key: old[key] for owner, key in GROWING if owner == section and set(old[key]) <= set(new[key])}
    return {**new, **kept}


def _changes(dotted_key: str, old: Any, new: Any) -> Iterator[str]:
    """``training.steps: the store has 1000, the study says 200``, for each value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _changes(f"{dotted_key}.{key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and _shown(old) == _shown(new) and old != new:
        yield f"{dotted_key}: {_list_difference(old, new)}"
    elif old != new:
        yield f"{dotted_key}: the store has {_shown(old)}, the study says {_shown(new)}"


def _list_difference(old: Sequence[Any], new: Sequence[Any]) -> str:
    """What two long lists do not share: shown as they are, they would be cut before they differ."""
    lost, added = [x for x in old if x not in new], [x for x in new if x not in old]
    parts = [f"the store has {shown(lost)}, which the study lacks"] if lost else []
    parts += [f"the study adds {shown(added)}"] if added else []
    return "; ".join(parts) or f"the store has {shown(old)}, the study says {shown(new)}"


def _lost_settings(section: str, old: Sequence[Any], new: Sequence[Any]) -> Iterator[str]:
    """Models or optimizers that the store has and the study lacks.

    One that was edited is told from one that was removed by an added one of the same name, and named by the
    keys that differ.
    """
    added = [entry for entry in new if entry not in old]
    for entry in old:
        if entry in new:
            continue
        edited = next((candidate for candidate in added if candidate["name"] == entry["name"]), None)
        if edited is None:
            keys = ", ".join(f"{key} = {shown(value)}" for key, value in entry.items() if value is not None)
            yield f"{section}: the store has {keys}, which the study lacks"
        else:
            added.remove(edited)
            yield from _changes(f"{section} ({entry['name']})", entry, edited)


def _alone(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Models without the optimizers that they name; optimizers as they are."""
    return [{key: value for key, value in entry.items() if key != "optimizers"} for entry in entries]


def _lost_trainings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Optimizers that a model of the store was trained with, and that the study no longer gives it."""
    given = {content_hash(model): names for model, names in _trainings(new)}
    there = {entry["name"] for entry in new["optimizers"]}
    for model, names in _trainings(old):
        lost = sorted((names & there) - given.get(content_hash(model), names))
        if lost:
            where = f"models ({model['name']}).optimizers"
            yield f"{where}: the store has {shown(lost)}, which the study lacks"


def _trainings(study: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """Each model with the names of the optimizers that train it."""
    names = {entry["name"] for entry in study["optimizers"]}
    for model, alone in zip(study["models"], _alone(study["models"]), strict=True):
        yield alone, set(model.get("optimizers") or names)


def _shown(value: Any) -> str:
    return "nothing" if value is None else shown(value)


def _git_revision(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit
        return None
    return done.stdout.strip() or None
