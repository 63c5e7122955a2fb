"""The grids of a study file: an [[optimizers]] table with lists stands for one table a combination."""

import itertools
from collections.abc import Mapping


def expand_grid(table: Mapping[str, object]) -> list[dict[str, object]]:
    """Every combination of the listed values, the last key varying fastest; the tables are not validated.

    A list is a grid, except for keys whose value is itself a list (`betas`, `milestones`): there only a
    list of lists is one.

    Raises:
        ValueError: an empty grid, or one that names a value twice.
    """
    choices = [_grid_values(key, value) for key, value in table.items()]
    return [dict(zip(table, combination, strict=True)) for combination in itertools.product(*choices)]


def _grid_values(key: str, value: object) -> list[object]:
    if not isinstance(value, list | tuple):
        return [value]
    nested = [isinstance(item, list | tuple) for item in value]
    if key in ("betas", "milestones") and not (nested and all(nested)):
        return [value]
    if not value:
        raise ValueError(f"{key}: found an empty list; a grid needs at least one value")
    if any(item in value[:i] for i, item in enumerate(value)):
        raise ValueError(f"{key}: found {list(value)}; a grid must not name a value twice")
    return list(value)
