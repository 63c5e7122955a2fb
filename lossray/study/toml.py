"""TOML, written: the standard library only reads it."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any


def toml_text(table: Mapping[str, Any]) -> str:
    """A TOML document that reads back as `table`: [sections] for tables, [[arrays]] for lists of tables."""
    lines = [f"{_key(key)} = {toml_value(value)}" for key, value in table.items() if not _is_section(value)]
    for key, value in table.items():
        if _is_section(value):
            header = f"[{_key(key)}]" if isinstance(value, Mapping) else f"[[{_key(key)}]]"
            for entry in [value] if isinstance(value, Mapping) else value:
                lines += ["", header, *(f"{_key(k)} = {toml_value(v)}" for k, v in entry.items())]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """One value in TOML, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML string once its surrogate pairs are characters again and DEL is escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return str(value)  # integers, dates and times


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _is_section(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
    return isinstance(value, Mapping) or is_list
