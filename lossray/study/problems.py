"""What is wrong with a study file, one line a problem: where, what was found, what is allowed or nearest.

pydantic reports a failed union once for each of its branches and knows no TOML; here its errors become
`Problem`s at the key path that the user wrote.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lossray.names import nearest, unknown_name
from lossray.settings import Settings
from lossray.study.toml import toml_value

KeyPath = tuple[str | int, ...]  # ("optimizers", 1, "lr")

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
    """One thing wrong in a study file.

    Attributes:
        key_path: of the value at fault.
        text: what was found, and what is allowed.
    """

    key_path: KeyPath
    text: str

    def line(self, origin: str) -> str:
        """``study.toml: optimizers[1].lr: found -1.0; allowed: ...``."""
        return ": ".join(part for part in (origin, dotted(self.key_path), self.text) if part)


@dataclass(frozen=True)
class _Error:
    """One error of pydantic, at the key path that the user wrote."""

    key_path: KeyPath
    kind: str
    value: object
    context: Mapping[str, Any]
    message: str
    schema: str  # name of the settings class that was validated
    below: int  # how much of `key_path` lies above that class


def dotted(key_path: Sequence[str | int]) -> str:
    """``optimizers[1].lr``."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in key_path)
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


def problems_in(error: ValidationError, table: object, key_path: KeyPath = ()) -> list[Problem]:
    """The problems that pydantic found in one table.

    Args:
        error: from validating `table`.
        table: as the user wrote it.
        key_path: where in the study file it stands.
    """
    errors = _flatten(error, table, key_path)
    problems: dict[KeyPath, Problem] = {}
    for at in dict.fromkeys(item.key_path for item in errors):
        here = [item for item in errors if item.key_path == at]
        problem = _problem(here)
        problems.setdefault(problem.key_path, problem)
    return list(problems.values())


def _flatten(error: ValidationError, table: object, key_path: KeyPath) -> list[_Error]:
    flat = []
    for details in error.errors(include_url=False):
        context = details.get("ctx", {})
        item = _Error(
            key_path=key_path + _located(details["loc"], details["type"], table),
            kind=details["type"],
            value=details["input"],
            context=context,
            message=str(context["error"]) if "error" in context else details["msg"],
            schema=error.title,
            below=len(key_path),
        )
        flat.append(_at_named_key(item))
    return flat


def _located(loc: KeyPath, kind: str, table: object) -> KeyPath:
    """Drop from `loc` what names no key of the table: pydantic puts the branches of a union there."""
    key_path: KeyPath = ()
    here: Any = table
    for i, key in enumerate(loc):
        is_key = isinstance(here, Mapping) and key in here
        is_index = isinstance(here, list | tuple) and isinstance(key, int) and key < len(here)
        if is_key or is_index:
            here = here[key]
            key_path += (key,)
        elif kind == "missing" and i == len(loc) - 1:
            key_path += (key,)
    return key_path


def _at_named_key(item: _Error) -> _Error:
    """A validator of a whole table starts its message with the key at fault: move it into the key path."""
    named = re.match(r"([\w.]+): (.+)", item.message, re.DOTALL)
    if item.kind != "value_error" or not named:
        return item
    keys, message = named.groups()
    value: Any = item.value
    for key in keys.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return item
        value = value[key]
    return replace(item, key_path=(*item.key_path, *keys.split(".")), value=value, message=message)


def _problem(errors: list[_Error]) -> Problem:
    """One problem from all errors at one key path."""
    first = errors[0]
    if first.kind == "missing" and isinstance(first.key_path[-1], int):
        text = f"found {shown(first.value)}, which lacks entry {first.key_path[-1] + 1}"
        return Problem(first.key_path[:-1], text)
    if first.kind == "missing":
        return Problem(first.key_path, "missing, but required")
    if first.kind == "extra_forbidden":
        return Problem(first.key_path, unknown_key(str(first.key_path[-1]), _allowed_keys(first)))
    if any(item.kind not in ALLOWED for item in errors):
        custom = next(item for item in errors if item.kind not in ALLOWED)
        return Problem(custom.key_path, _own_words(custom))
    options = [option for item in errors if item.kind == "literal_error" for option in _options(item)]
    if isinstance(first.value, str) and options and len(options) == sum(_width(item) for item in errors):
        return Problem(first.key_path, unknown_name(first.value, options))
    allowed = list(dict.fromkeys(_allowed(item) for item in errors))
    text = f"found {shown(first.value)}; allowed: {' or '.join(allowed)}"
    guess = nearest(first.value, options) if isinstance(first.value, str) else None
    return Problem(first.key_path, f"{text}; did you mean {guess!r}?" if guess else text)


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
    if "found" in message or isinstance(item.value, Mapping) or message.startswith("unknown key"):
        return message
    return f"found {shown(item.value)}; {message}"


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """The message for a key that does not exist."""
    names = list(allowed)
    text = f"unknown key; allowed: {', '.join(names)}" if names else "unknown key"
    guess = nearest(key, names)
    return f"{text}; did you mean {guess!r}?" if guess else text


def without_consequences(problems: list[Problem]) -> list[Problem]:
    """Leave out "missing" for a misspelt key, and "too short" for a list that has bad entries."""
    misspelt = {
        (*problem.key_path[:-1], guess[1])
        for problem in problems
        if (guess := re.search(r"did you mean '(.*)'\?$", problem.text))
        and problem.text.startswith("unknown key")
    }
    above = {problem.key_path[:-1] for problem in problems if isinstance(problem.key_path[-1], int)}
    return [
        problem
        for problem in problems
        if not (problem.key_path in misspelt and problem.text.startswith("missing"))
        and not (problem.key_path in above and problem.text.endswith("entries"))
    ]


def _allowed_keys(item: _Error) -> list[str]:
    """The keys that the table around `item` may have."""
    schemas = [schema for schema in _all_settings(Settings) if schema.__name__ == item.schema]
    for key in item.key_path[item.below : -1]:
        if isinstance(key, str):
            fields = [schema.model_fields[key] for schema in schemas if key in schema.model_fields]
            schemas = [nested for field in fields for nested in _schemas_in(field.annotation)]
    return list(dict.fromkeys(name for schema in schemas for name in schema.model_fields))


def _all_settings(base: type[BaseModel]) -> list[type[BaseModel]]:
    return [base, *(descendant for child in base.__subclasses__() for descendant in _all_settings(child))]


def _schemas_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes in a type such as ``Counted | Listed`` or ``tuple[Claims, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for part in get_args(annotation) for schema in _schemas_in(part)]
