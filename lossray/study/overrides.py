"""``--set training.steps=200``: one value of a study file, given on the command line."""

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossray.errors import StudyError
from lossray.study.problems import KeyPath, dotted, shown


@dataclass(frozen=True)
class Override:
    """A value and where it goes.

    Attributes:
        text: as given.
        key_path: where the value goes.
        value: as TOML has it.
    """

    text: str
    key_path: KeyPath
    value: Any

    @property
    def origin(self) -> str:
        """How messages refer to it."""
        return f"--set {self.text}"


def parse_override(text: str) -> Override:
    """Read ``KEY=VALUE``: keys as in ``optimizers.0.lr`` or ``optimizers[0].lr``, values in TOML.

    A value that is no TOML is taken as a string: ``--set training.dtype=float64``.

    Raises:
        StudyError: there is no "=", a key is empty, or the value opens a string or bracket and is no
            TOML.
    """
    keys, equals, value = text.partition("=")
    names = [name.strip() for name in re.sub(r"\[(\d+)\]", r".\1", keys).split(".")]
    if not equals or not all(names):
        raise StudyError(f"--set {text}: found no KEY=VALUE; allowed: for example training.steps=200")
    key_path = tuple(int(name) if name.isdecimal() else name for name in names)
    return Override(text, key_path, _value(text, value.strip()))


def _value(text: str, value: str) -> Any:
    try:
        read = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError as error:
        if not value or value[0] in "[{\"'":
            raise StudyError(f"--set {text}: found {shown(value)}, which is no TOML value: {error}") from None
        return value
    return read["value"] if set(read) == {"value"} else value  # a line break would begin another key


def apply_overrides(table: Mapping[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of the table with the values put in; sections that are absent are made.

    Raises:
        StudyError: a list index out of range, or a key below something that is neither table nor list.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(table))
    for override in overrides:
        here: Any = changed
        for i, key in enumerate(override.key_path):
            _check_key_path(here, key, override, override.key_path[:i])
            if i == len(override.key_path) - 1:
                here[key] = override.value
            elif isinstance(here, dict):
                here = here.setdefault(key, {})
            else:
                here = here[key]
    return changed


def _check_key_path(here: Any, key: str | int, override: Override, above: KeyPath) -> None:
    name = dotted(above)
    if isinstance(here, list):
        if not isinstance(key, int) or key >= len(here):
            allowed = f"0 to {len(here) - 1}" if here else "none, the list is empty"
            raise StudyError(
                f"{override.origin}: found {name}.{key}; allowed as an index of {name}: {allowed}"
            )
    elif not isinstance(here, dict):
        raise StudyError(f"{override.origin}: {name} is {shown(here)}, which has no key {str(key)!r}")
    elif isinstance(key, int):
        raise StudyError(f"{override.origin}: {name or 'the study'} is a table, which has no entry {key}")
