"""One wording for every name that does not exist: what was found, what is allowed, what is nearest."""

import difflib
from collections.abc import Iterable


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name most like ``given``, or None where nothing resembles it; capitals do not matter."""
    folded = {name.casefold(): name for name in allowed}
    matches = difflib.get_close_matches(given.casefold(), list(folded), n=1, cutoff=0.5)
    return folded[matches[0]] if matches else None


def unknown_name(given: str, allowed: Iterable[str]) -> str:
    """The message for an unknown name: ``found 'mpl'; allowed: cnn, mlp; did you mean 'mlp'?``."""
    names = list(allowed)
    message = f"found {given!r}; allowed: {', '.join(names)}"
    guess = nearest(given, names)
    return message if guess is None else f"{message}; did you mean {guess!r}?"
