"""The base of every room's settings: strict, frozen, and hashable by content."""

import hashlib
import json
from collections import Counter
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict

ADDED: Final = "added"  # marks a setting that is younger than stores: see `Settings.content`


class Settings(BaseModel):
    """Strict pydantic model: unknown keys and wrong types are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    def plain(self) -> dict[str, Any]:
        """The settings as JSON-compatible values, defaults included, in declaration order."""
        return self.model_dump(mode="json")

    def content(self) -> dict[str, Any]:
        """What names and keys are made of: `plain` without added settings that are left at their default.

        A setting that is added to a section, ``setting: Annotated[bool, ADDED] = False``, so changes no key
        of a store that was made before it, as long as nobody sets it.
        """
        plain = self.plain()
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if ADDED in field.metadata and value == field.get_default(call_default_factory=True):
                del plain[name]
            elif isinstance(value, Settings):
                plain[name] = value.content()
        return plain


T = TypeVar("T")


def each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    """The values as they are, for a validator.

    Raises:
        ValueError: one is there twice.
    """
    for value, count in Counter(values).items():
        if count > 1:
            raise ValueError(f"found {value!r} twice; allowed: each once")
    return values


def content_hash(value: Any, length: int = 16) -> str:
    """Hash of a JSON-compatible value: equal values give equal hashes on every machine.

    Args:
        value: nested dicts, lists, strings, numbers, booleans and None.
        length: hexadecimal digits to keep (at most 64).
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
