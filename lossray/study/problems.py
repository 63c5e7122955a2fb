"""What is wrong with a study file, one line a problem: where, what was found, what is allowed or nearest.

pydantic reports a failed union once for each of its branches and knows no TOML; here its errors become
`Problem`s at the place that the user wrote.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lossray.names import nearest, unknown_name
from lossray.settings import Settings
from lossray.study.toml import toml_value

Place = tuple[str | int, ...]  # ("optimizers", 1, "lr")

# What pydantic asked for, by the type of its error; {} are filled in from the error's context.
ALLOWED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "list_type": "a list",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "a string of at least {min_length} characters",
    "literal_error": "{expected}",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong: `text` says what was found and what is allowed."""

    place: Place
    text: str

    def line(self, origin: str) -> str:
        """``study.toml: optimizers[1].lr: found -1.0; allowed: ...``."""
        return ": ".join(part for part in (origin, dotted(self.place), self.text) if part)


@dataclass(frozen=True)
class _Error:
    """One error of pydantic, at the place that the user wrote."""

    place: Place
    kind: str
    found: object
    context: Mapping[str, Any]
    message: str
    schema: str  # name of the settings class that was validated
    below: int  # how much of `place` lies above that class


def dotted(place: Sequence[str | int]) -> str:
    """``optimizers[1].lr``."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    return text.removeprefix(".")


def shown(value: object, limit: int = 80) -> str:
    """A value as a message shows it: short, on one line."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, Mapping):
        text = f"a table with {', '.join(map(repr, value)) or 'no keys'}"
    else:
        text = toml_value(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def problems_in(error: ValidationError, table: object, place: Place = ()) -> list[Problem]:
    """The problems that pydantic found in one table.

    Args:
        error: from validating `table`.
        table: as the user wrote it.
        place: where in the study file it stands.
    """
    errors = _flatten(error, table, place)
    problems: dict[Place, Problem] = {}
    for at in dict.fromkeys(item.place for item in errors):
        here = [item for item in errors if item.place == at]
        problem = _problem(here)
        problems.setdefault(problem.place, problem)
    return list(problems.values())


def _flatten(error: ValidationError, table: object, place: Place) -> list[_Error]:
    flat = []
    for details in error.errors(include_url=False):
        context = details.get("ctx", {})
        item = _Error(
            place=place + _located(details["loc"], details["type"], table),
            kind=details["type"],
            found=details["input"],
            context=context,
            message=str(context["error"]) if "error" in context else details["msg"],
            schema=error.title,
            below=len(place),
        )
        flat.append(_at_named_key(item))
    return flat


def _located(loc: Place, kind: str, table: object) -> Place:
    """Drop from `loc` what names no key of the table: pydantic puts the branches of a union there."""
    place: Place = ()
    here: Any = table
    for i, key in enumerate(loc):
        is_key = isinstance(here, Mapping) and key in here
        is_index = isinstance(here, list | tuple) and isinstance(key, int) and key < len(here)
        if is_key or is_index:
            here = here[key]
            place += (key,)
        elif kind == "missing" and i == len(loc) - 1:
            place += (key,)
    return place


def _at_named_key(item: _Error) -> _Error:
    """A validator of a whole table starts its message with the key at fault: move it into the place."""
    named = re.match(r"([\w.]+): (.+)", item.message, re.DOTALL)
    if item.kind != "value_error" or not named:
        return item
    keys, message = named.groups()
    found: Any = item.found
    for key in keys.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return item
        found = found[key]
    return replace(item, place=(*item.place, *keys.split(".")), found=found, message=message)


def _problem(errors: list[_Error]) -> Problem:
    """One problem from all errors at one place."""
    first = errors[0]
    if first.kind == "missing" and isinstance(first.place[-1], int):
        text = f"found {shown(first.found)}, which lacks entry {first.place[-1] + 1}"
        return Problem(first.place[:-1], text)
    if first.kind == "missing":
        return Problem(first.place, "missing, but required")
    if first.kind == "extra_forbidden":
        return Problem(first.place, unknown_key(str(first.place[-1]), _allowed_keys(first)))
    if any(item.kind not in ALLOWED for item in errors):
        own = next(item for item in errors if item.kind not in ALLOWED)
        return Problem(own.place, _own_words(own))
    options = [option for item in errors if item.kind == "literal_error" for option in _options(item)]
    if isinstance(first.found, str) and options and len(options) == sum(_width(item) for item in errors):
        return Problem(first.place, unknown_name(first.found, options))
    allowed = list(dict.fromkeys(_allowed(item) for item in errors))
    text = f"found {shown(first.found)}; allowed: {' or '.join(allowed)}"
    guess = nearest(first.found, options) if isinstance(first.found, str) else None
    return Problem(first.place, f"{text}; did you mean {guess!r}?" if guess else text)


def _allowed(item: _Error) -> str:
    bounds = {key: f"{value:g}" for key, value in item.context.items() if isinstance(value, float)}
    return ALLOWED[item.kind].format(**{**item.context, **bounds})


def _width(item: _Error) -> int:
    return len(_options(item)) if item.kind == "literal_error" else 1


def _options(item: _Error) -> list[str]:
    return re.findall(r"'([^']*)'", str(item.context["expected"]))


def _own_words(item: _Error) -> str:
    """The message of a room's own check, with the value where the message lacks it."""
    message = " ".join(item.message.split())
    if "found" in message or isinstance(item.found, Mapping) or message.startswith("unknown key"):
        return message
    return f"found {shown(item.found)}; {message}"


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """The message for a key that does not exist."""
    names = list(allowed)
    text = f"unknown key; allowed: {', '.join(names)}" if names else "unknown key"
    guess = nearest(key, names)
    return f"{text}; did you mean {guess!r}?" if guess else text


def without_consequences(problems: list[Problem]) -> list[Problem]:
    """Leave out "missing" for a misspelt key, and "too short" for a list that has bad entries."""
    misspelt = {
        (*problem.place[:-1], guess[1])
        for problem in problems
        if (guess := re.search(r"did you mean '(.*)'\?$", problem.text))
        and problem.text.startswith("unknown key")
    }
    above = {problem.place[:-1] for problem in problems if isinstance(problem.place[-1], int)}
    return [
        problem
        for problem in problems
        if not (problem.place in misspelt and problem.text.startswith("missing"))
        and not (problem.place in above and problem.text.endswith("entries"))
    ]


def _allowed_keys(item: _Error) -> list[str]:
    """The keys that the table around `item` may have."""
    schemas = [schema for schema in _all_settings(Settings) if schema.__name__ == item.schema]
    for key in item.place[item.below : -1]:
        if isinstance(key, str):
            fields = [schema.model_fields[key] for schema in schemas if key in schema.model_fields]
            schemas = [found for field in fields for found in _schemas_in(field.annotation)]
    return list(dict.fromkeys(name for schema in schemas for name in schema.model_fields))


def _all_settings(base: type[BaseModel]) -> list[type[BaseModel]]:
    return [base, *(found for child in base.__subclasses__() for found in _all_settings(child))]


def _schemas_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes in a type such as ``Counted | Listed`` or ``tuple[Claims, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _schemas_in(part)]
