"""The page docs/settings.md: every key of a study file, from the rooms' settings and their docstrings.

``python -m lossray.study.settings_page > docs/settings.md``
"""

import inspect
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from lossray.ensembles.methods import METHODS
from lossray.ensembles.settings import EnsemblesSettings
from lossray.geometry.settings import AnglesSettings
from lossray.networks.settings import LOSSES, MODELS, BuiltinSettings, ModelSettings, UserModelSettings
from lossray.references import resolve
from lossray.settings import Settings
from lossray.study.settings import Study
from lossray.study.toml import toml_value
from lossray.training.data_settings import FUNCTION, SOURCES, DataSettings
from lossray.training.schedules import SCHEDULE_KEYS
from lossray.training.settings import TrainingSettings
from lossray.training.update_rules import OPTIMIZERS, OptimizerSettings

SECTIONS = (
    "training",
    "curvature",
    "angles",
    "degeneracy",
    "trajectory",
    "surfaces",
    "connectivity",
    "ensembles",
    "tuning",
    "claims",
    "resources",
)
ALL = "all"
SPEC = "package.module:function"
# Names that a registry allows, and the type does not tell.
NAMES: dict[tuple[type[Settings], str], Iterable[str]] = {
    (TrainingSettings, "loss"): (*LOSSES, SPEC),
    (AnglesSettings, "shadow"): OPTIMIZERS,
    (EnsemblesSettings, "methods"): (*METHODS, ALL),
    (DataSettings, "source"): (*SOURCES, SPEC),
    (ModelSettings, "name"): (*MODELS, SPEC),
    (OptimizerSettings, "name"): OPTIMIZERS,
}
# What fields do not tell: values that are changed before they are checked, defaults from elsewhere.
VALUES: dict[tuple[type[Settings], str], str] = {
    (Study, "seeds"): "integer: >= 1, or list of integers: each >= 0",
}
DEFAULTS: dict[tuple[type[Settings], str], str] = {
    (Study, "seeds"): "*required*",
    (DataSettings, "source"): '`"digits"`',
    (OptimizerSettings, "lr"): "the optimizer's",
}
TECHNICAL = 1e18  # bounds of this size only keep numbers within what arithmetic can hold
WORDS = {str: "string", int: "integer", float: "number", bool: "boolean"}
BOUNDS = {
    annotated_types.Ge: (">=", "ge"),
    annotated_types.Gt: (">", "gt"),
    annotated_types.Le: ("<=", "le"),
    annotated_types.Lt: ("<", "lt"),
}


def settings_markdown() -> str:
    """The text of docs/settings.md."""
    blocks = [
        "# Settings",
        "Generated from the settings of the rooms by `python -m lossray.study.settings_page`; do not edit.",
        "A study file is TOML: the keys below at its top, then its sections. A key that is left out has its "
        "default; where that is *none* nothing is set, and *required* means that it cannot be left out. "
        "`--set training.steps=200` changes a key on the command line. The ready-made studies in "
        "`flows/studies` are examples.",
        _table(Study, ("name", "source", "seeds")),
        *_data(),
        *_models(),
        *_optimizers(),
    ]
    for name in SECTIONS:
        blocks += _section(name, Study.model_fields[name])
    return "\n\n".join(blocks) + "\n"


def _section(name: str, field: FieldInfo) -> Iterator[str]:
    """A section of the study file, and the tables inside it."""
    (settings,) = (part for part in (field.annotation, *get_args(field.annotation)) if _is_settings(part))
    yield f"## [{name}]"
    yield _prose(settings)
    if field.default is None:
        yield "Without this section nothing of it is done."
    yield _table(settings)
    for key, inner in settings.model_fields.items():
        if _is_settings(inner.annotation):
            yield f"### [{name}.{key}]"
            yield _prose(inner.annotation)
            yield _table(inner.annotation)
    if settings is TrainingSettings:
        yield "### Losses"
        yield _named(("loss", "meaning"), {name: _summary(resolve(text)) for name, text in LOSSES.items()})
    if settings is EnsemblesSettings:
        yield "### Methods"
        methods = {name: _summary(method.build) for name, method in METHODS.items()}
        yield _named(("method", "meaning"), methods)


def _data() -> Iterator[str]:
    yield "## [data]"
    yield _prose(DataSettings)
    yield _table(DataSettings)
    for name, source in {**SOURCES, SPEC: FUNCTION}.items():
        yield from _entry(name, source.settings, DataSettings)


def _models() -> Iterator[str]:
    yield "## [[models]]"
    yield "One table for each model. Every model takes:"
    yield _table(ModelSettings)
    yield "Every built-in model takes:"
    yield _table(BuiltinSettings, _own_keys(BuiltinSettings, ModelSettings))
    for name, model in MODELS.items():
        yield from _entry(name, model.settings, BuiltinSettings)
    yield from _entry(SPEC, UserModelSettings, ModelSettings)


def _optimizers() -> Iterator[str]:
    yield "## [[optimizers]]"
    yield (
        "One table for each optimizer. A list in the place of a value is a grid: one setting for each of its "
        "values, and for each combination where there are several. Every optimizer takes:"
    )
    yield _table(OptimizerSettings, sorted(OptimizerSettings.model_fields, key="name".__ne__))
    yield "### Schedules"
    yield "What a schedule takes beside `lr`; a key of another schedule is refused."
    defaults = {
        name: ", ".join(f"`{key} = {toml_value(value)}`" for key, value in keys.items()) or "-"
        for name, keys in SCHEDULE_KEYS.items()
    }
    yield _named(("schedule", "keys and their defaults"), defaults)
    for name, optimizer in OPTIMIZERS.items():
        yield from _entry(name, optimizer.settings, OptimizerSettings)


def _entry(name: str, settings: type[Settings], base: type[Settings]) -> Iterator[str]:
    """One entry of a registry, with the keys that it adds or whose defaults it changes."""
    yield f"### {name}"
    yield _prose(settings)
    if keys := _own_keys(settings, base):
        yield _table(settings, keys)


def _own_keys(settings: type[Settings], base: type[Settings]) -> list[str]:
    """The keys of some settings that their base lacks or has otherwise, its name apart."""
    return [
        key
        for key, field in settings.model_fields.items()
        if key not in ("name", "source")
        and (key not in base.model_fields or field.default != base.model_fields[key].default)
    ]


# ---- one key


@dataclass(frozen=True)
class Values:
    """What a key may hold.

    Attributes:
        type: such as "integer", or "list of strings".
        allowed: such as ">= 1"; empty where every value of the type is.
    """

    type: str
    allowed: str = ""

    @property
    def text(self) -> str:
        """Both in one cell."""
        return f"{self.type}: {self.allowed}" if self.allowed else self.type


def _table(settings: type[Settings], keys: Iterable[str] | None = None) -> str:
    """The keys of some settings, one a row."""
    chosen = settings.model_fields if keys is None else keys
    return _rows(
        ("key", "values", "default", "meaning"),
        (
            (
                f"`{key}`",
                VALUES.get((settings, key)) or _values(settings, key).text,
                DEFAULTS.get((settings, key)) or _default(settings, key),
                meaning(settings, key),
            )
            for key in chosen
        ),
    )


def meaning(settings: type[Settings], key: str) -> str:
    """What the docstring of the class, or of the next above it, says of a key under ``Attributes:``."""
    for kind in settings.__mro__:
        if key in (texts := _attributes(kind)):
            return texts[key]
    raise KeyError(f"{settings.__name__}.{key} has no line under Attributes: in the docstring of its class")


def _attributes(kind: type) -> dict[str, str]:
    """The texts under ``Attributes:`` in the docstring of a class, by name."""
    _, _, section = inspect.cleandoc(kind.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", section, flags=re.MULTILINE)
    return {name: _without_stop(_plain(text)) for name, text in entries}


def _values(settings: type[Settings], key: str) -> Values:
    field = settings.model_fields[key]
    values = described(field.annotation, field.metadata)
    names = next((names for (kind, name), names in NAMES.items() if name == key and kind is settings), None)
    return values if names is None else Values(values.type, _choice(map(toml_value, names)))


def described(annotation: Any, metadata: Iterable[Any] = ()) -> Values:
    """The values of a type, within the bounds of its metadata.

    Args:
        annotation: of a field: a plain type, Literal, tuple, Settings, or a union of such.
        metadata: what pydantic has found beside it.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return described(inner[0], [*_flat(inner[1:]), *metadata])
    if origin in (Union, types.UnionType):
        return _either([described(part, metadata) for part in inner if part is not type(None)])
    if origin is Literal:
        return Values(WORDS[type(inner[0])], _choice(map(toml_value, inner)))
    bounds = ", ".join(_bounds(metadata))
    if origin is tuple:
        each, number = described(inner[0]), "" if inner[-1] is Ellipsis else f"{len(inner)} "
        of_each = f"each {each.allowed}" if each.allowed and not _is_choice(each) else each.allowed
        return Values(f"list of {number}{each.type}s", ", ".join(filter(None, [bounds, of_each])))
    if origin is dict:
        return Values("table", f"of {described(inner[1]).type}s")
    if _is_settings(annotation):
        return Values("table", "see below")
    return Values(WORDS[annotation], bounds)


def _either(parts: list[Values]) -> Values:
    """Values of one type or of another: `integer >= 1 or "all"`."""
    if len(parts) == 1:
        return parts[0]
    return Values(" or ".join(part.allowed if _is_choice(part) else part.text for part in parts))


def _is_choice(values: Values) -> bool:
    return values.allowed.startswith("`")


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    """Metadata with the contents of each `Field(...)` in its place."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, annotated_types.MinLen):
            yield "not empty" if item.min_length == 1 else f"at least {item.min_length}"
        for kind, (sign, attribute) in BOUNDS.items():
            if isinstance(item, kind) and abs(getattr(item, attribute)) < TECHNICAL:
                yield f"{sign} {getattr(item, attribute):,}".replace(".0", "")


def _default(settings: type[Settings], key: str) -> str:
    field = settings.model_fields[key]
    if field.is_required():
        return "*required*"
    if ALL in NAMES.get((settings, key), ()):
        return f"`{toml_value(ALL)}`"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "*none*"
    if value in ((), {}):
        return "`[]`" if value == () else "`{}`"
    return "-" if isinstance(value, Settings) else f"`{toml_value(value)}`"


# ---- words


def _prose(settings: type[Settings]) -> str:
    """The docstring of a class without its attributes, one paragraph a line."""
    text = inspect.cleandoc(settings.__dict__.get("__doc__") or "").partition("\nAttributes:\n")[0]
    return "\n\n".join(_plain(paragraph) for paragraph in text.strip().split("\n\n"))


def _summary(function: Any) -> str:
    text = inspect.getdoc(function)
    if text is None:
        raise KeyError(f"{function.__qualname__} has no docstring, whose first line is its meaning")
    return _plain(text.split("\n")[0])


def _plain(text: str) -> str:
    """On one line, with the code marks of Markdown."""
    return " ".join(text.split()).replace("``", "`")


def _without_stop(text: str) -> str:
    """Without the full stop of a text that is no more than a phrase."""
    return text if ". " in text else text.removesuffix(".")


def _choice(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _named(heads: tuple[str, str], texts: dict[str, str]) -> str:
    return _rows(heads, ((f"`{name}`", text) for name, text in texts.items()))


def _rows(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_settings(annotation: Any) -> TypeGuard[type[Settings]]:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


if __name__ == "__main__":
    print(settings_markdown(), end="")
