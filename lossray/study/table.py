"""From the table in a study file to a checked `Study`, or to every problem that the table has."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from pydantic import ValidationError

from lossray import plugins
from lossray.errors import StudyError
from lossray.names import unknown_name
from lossray.networks.settings import MODELS, ModelSettings, model_settings
from lossray.study.grids import expand_grid
from lossray.study.problems import KeyPath, Problem, problems_in, shown, without_consequences
from lossray.study.settings import LARGEST_INTEGER, Study
from lossray.training.data_settings import DataSettings, data_settings
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import OPTIMIZERS, OptimizerSettings, optimizer_settings

RECORDED_TRAINING = ("loss", "dtype")  # the keys of [training] that a recorded study takes


def study_from_table(table: Mapping[str, Any], origin: str = "") -> Study:
    """A study from the table of a study file, or from `Study.plain`; the user's functions are not imported.

    Args:
        table: as `tomllib` reads it.
        origin: put before each line of an error.

    Raises:
        StudyError: one line for each problem.
    """
    study, problems = check_table(table)
    if study is None:
        raise StudyError("\n".join(problem.line(origin) for problem in problems))
    return study


def check_table(table: Mapping[str, Any]) -> tuple[Study | None, list[Problem]]:
    """The study, or None and its problems."""
    problems = list(_impossible_values(table))
    if problems:
        return None, problems
    rooms: dict[str, Any] = {}
    rooms["data"], room_problems = _data(table)
    problems += room_problems
    rooms["models"], room_problems = _models(table)
    problems += room_problems
    rooms["optimizers"], room_problems = _optimizers(table)
    problems += room_problems
    problems += _missing(table)
    try:
        study = Study.model_validate(
            {**table, **{name: value for name, value in rooms.items() if value is not None}}
        )
    except ValidationError as error:
        return None, without_consequences([*problems_in(error, table), *problems])
    return (None if problems else study), without_consequences(problems)


def function_problems(study: Study) -> list[Problem]:
    """Import every function of the user's that the study names, and say which cannot be."""
    problems = []
    for key_path, name in study.user_functions().items():
        try:
            plugins.load(name)
        except StudyError as error:
            problems.append(Problem(key_path, str(error)))
    return problems


def _impossible_values(value: Any, key_path: KeyPath = ()) -> Iterator[Problem]:
    """What TOML can say but no setting can mean."""
    if isinstance(value, float) and not math.isfinite(value):
        yield Problem(key_path, f"found {shown(value)}; allowed: a finite number")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        yield Problem(key_path, f"found {value}; allowed: integers of 64 bits")
    elif isinstance(value, date | datetime | time):
        yield Problem(
            key_path,
            f"found the date or time {shown(value)}; allowed: numbers, strings, booleans, lists, tables",
        )
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _impossible_values(item, (*key_path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _impossible_values(item, (*key_path, i))


def _missing(table: Mapping[str, Any]) -> Iterator[Problem]:
    """Models, optimizers and seeds: a study that trains has all of them."""
    if table.get("source") == "checkpoints":
        yield from _beside_recordings(table)
        return
    for key, example in (
        ("seeds", "a number of seeds, or a list of them"),
        ("models", 'at least one [[models]] table, such as name = "mlp"'),
        ("optimizers", 'at least one [[optimizers]] table, such as name = "sgd"'),
    ):
        if table.get(key) in (None, [], ()):
            yield Problem(
                (key,), f"{'found an empty list' if key in table else 'missing'}; needed: {example}"
            )


def _beside_recordings(table: Mapping[str, Any]) -> Iterator[Problem]:
    """A recorded study has one model, and nothing that only a training needs."""
    beside = "found beside source = 'checkpoints', whose runs are trained already; allowed: none"
    for key in ("seeds", "optimizers", "tuning"):
        if table.get(key) not in (None, [], ()):
            yield Problem((key,), beside)
    models = table.get("models", [])
    if isinstance(models, list | tuple) and len(models) != 1:
        needed = "one [[models]] table, which builds the module that was recorded"
        yield Problem(("models",), f"found {len(models) or 'none'}; needed: {needed}")
    training, defaults = table.get("training"), TrainingSettings().plain()
    for key, value in training.items() if isinstance(training, Mapping) else ():
        # The defaults may stand there: that is how settings are written to a manifest.
        if key in defaults and key not in RECORDED_TRAINING and value != defaults[key]:
            yield Problem(("training", key), f"{beside.removesuffix('none')}{', '.join(RECORDED_TRAINING)}")


def _data(table: Mapping[str, Any]) -> tuple[DataSettings | None, list[Problem]]:
    section = table.get("data", {})
    if not isinstance(section, Mapping):
        return None, []  # pydantic says so
    if table.get("source") == "checkpoints":  # the recorded model has seen the inputs as they are read
        section = {"standardise": "none", **section}
    try:
        return data_settings(section), []
    except ValidationError as error:
        return data_settings({}), problems_in(error, section, ("data",))


def _models(table: Mapping[str, Any]) -> tuple[tuple[ModelSettings, ...], list[Problem]]:
    tables, problems = _tables(table, "models", MODELS)
    models: list[ModelSettings] = []
    first: dict[str, int] = {}
    for i, entry in tables:
        try:
            models.append(model_settings(entry))
        except ValidationError as error:
            problems += problems_in(error, entry, ("models", i))
        else:
            problems += _repeated(models[-1].alone, first, "models", i)
            problems += _unknown_optimizers(models[-1], table, i)
    return tuple(models), problems


def _unknown_optimizers(model: ModelSettings, table: Mapping[str, Any], i: int) -> Iterator[Problem]:
    """A model names only optimizers that the study has."""
    entries, _ = _tables(table, "optimizers", OPTIMIZERS)
    names = [str(entry["name"]) for _, entry in entries]
    for name in model.optimizers or ():
        if name not in names:
            key_path = ("models", i, "optimizers")
            yield Problem(
                key_path, unknown_name(name, names) if names else f"found {name!r}; the study has none"
            )


def _optimizers(table: Mapping[str, Any]) -> tuple[tuple[OptimizerSettings, ...], list[Problem]]:
    tables, problems = _tables(table, "optimizers", OPTIMIZERS)
    optimizers: list[OptimizerSettings] = []
    first: dict[str, int] = {}
    for i, entry in tables:
        key_path = ("optimizers", i)
        try:
            points = expand_grid(entry)
        except ValueError as error:
            problems.append(_at_key(key_path, entry, str(error)))
            continue
        for point in points:
            try:
                optimizers.append(optimizer_settings(point))
            except ValidationError as error:
                problems += [
                    problem for problem in problems_in(error, point, key_path) if problem not in problems
                ]
            else:
                problems += _repeated(optimizers[-1], first, "optimizers", i)
    return tuple(optimizers), problems


def _tables(
    table: Mapping[str, Any], section: str, names: Mapping[str, object]
) -> tuple[list[tuple[int, Mapping[str, Any]]], list[Problem]]:
    """The entries of [[section]] that are tables with a name, by index."""
    entries = table.get(section, [])
    if not isinstance(entries, list | tuple):
        text = f"found {shown(entries)}; allowed: one [[{section}]] for each (double brackets)"
        return [], [Problem((section,), text)]
    tables, problems = [], []
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            example = f'[[{section}]] with name = "{next(iter(names))}"'
            text = f"found {shown(entry)}; allowed: a table, such as {example}"
            problems.append(Problem((section, i), text))
        elif "name" not in entry:
            problems.append(
                Problem((section, i, "name"), f"missing, but required; allowed: {', '.join(names)}")
            )
        else:
            tables.append((i, entry))
    return tables, problems


def _at_key(key_path: KeyPath, entry: Mapping[str, Any], message: str) -> Problem:
    """Messages of `expand_grid` begin with the key."""
    key, _, text = message.partition(": ")
    return Problem((*key_path, key), text) if key in entry else Problem(key_path, message)


def _repeated(
    settings: ModelSettings | OptimizerSettings, first: dict[str, int], section: str, i: int
) -> Sequence[Problem]:
    """A setting that was there before would train the same runs twice."""
    content = settings.model_dump_json()
    if content not in first:
        first[content] = i
        return []
    return [
        Problem((section, i), f"found the setting of {section}[{first[content]}] again; allowed: each once")
    ]
