"""The cells of a table's row, as measures give them."""

import math
from typing import Any

Row = dict[str, Any]


def finite(number: float) -> float | None:
    """Null for what does not exist: a gap where there is no other value, anything of a diverged member."""
    return number if math.isfinite(number) else None


def measured(number: Any) -> int | float | None:
    """The cell of an entry of a tensor: integers stay, NaN (not measured, or diverged) becomes null."""
    value = number.item()
    return None if isinstance(value, float) and math.isnan(value) else value
