from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from lossray.ensembles.methods import METHODS
from lossray.networks.settings import LOSSES, MODELS
from lossray.settings import Settings
from lossray.study.settings import Study
from lossray.study.settings_page import SECTIONS, described, meaning, settings_markdown
from lossray.training.data_settings import SOURCES
from lossray.training.schedules import SCHEDULE_KEYS
from lossray.training.update_rules import OPTIMIZERS

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def every_settings(base: type[Settings] = Settings) -> list[type[Settings]]:
    """Those of lossray; a test may have made others."""
    found = [child for child in base.__subclasses__() if child.__module__.startswith("lossray.")]
    return [*found, *(below for child in found for below in every_settings(child))]


def blocks() -> dict[str, str]:
    """The blocks of the page by their headings."""
    parts = ("\n" + settings_markdown()).split("\n#")[1:]
    return {head.strip("# "): text for head, _, text in (part.partition("\n") for part in parts)}


def keys(block: str) -> list[str]:
    return [line.split("`")[1] for line in block.splitlines() if line.startswith("| `")]


def test_the_page_on_settings_is_current():
    assert PAGE.read_text() == settings_markdown(), "run: make docs"


@pytest.mark.parametrize("settings", every_settings(), ids=lambda settings: settings.__name__)
def test_every_key_has_a_meaning(settings):
    for key in settings.model_fields:
        assert meaning(settings, key)


def test_a_key_without_a_meaning_is_an_error():
    class Bare(Settings):
        """No line for its key."""

        key: int = 1

    with pytest.raises(KeyError, match=r"Bare\.key has no line under Attributes:"):
        meaning(Bare, "key")


def test_every_section_and_every_entry_of_the_registries_has_a_heading():
    sections = {"[data]", "[[models]]", "[[optimizers]]", *(f"[{name}]" for name in SECTIONS)}
    assert sections == {
        f"[[{name}]]" if name in ("models", "optimizers") else f"[{name}]"
        for name in Study.model_fields
        if name not in ("name", "source", "seeds")
    }
    assert blocks().keys() >= sections | {*SOURCES, *MODELS, *OPTIMIZERS, "package.module:function"}


def test_every_key_of_a_section_has_a_row():
    for name in SECTIONS:
        field = Study.model_fields[name]
        settings = next(
            part
            for part in every_settings()
            if part in (field.annotation, *getattr(field.annotation, "__args__", ()))
        )
        assert keys(blocks()[f"[{name}]"]) == list(settings.model_fields)


def test_the_keys_and_defaults_of_an_optimizer_are_its_own():
    assert keys(blocks()["nadam"]) == ["lr", "betas", "eps", "momentum_decay"]
    assert "| `lr` | number: > 0 | `0.002` |" in blocks()["nadam"]
    assert keys(blocks()["adamw"]) == ["lr", "weight_decay", "betas", "eps"]


def test_losses_schedules_and_methods_are_listed():
    assert keys(blocks()["Losses"]) == list(LOSSES)
    assert keys(blocks()["Schedules"]) == list(SCHEDULE_KEYS)
    assert keys(blocks()["Methods"]) == list(METHODS)


def test_all_rows_of_a_table_have_its_columns():
    for block in blocks().values():
        rows = [line.replace(r"\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "integer"),
        (Annotated[float, Field(gt=0, le=100)], "number: > 0, <= 100"),
        (Annotated[float, Field(gt=0, le=1e18)], "number: > 0"),
        (Literal["a", "b"], 'string: `"a"`, `"b"`'),
        (Annotated[int, Field(ge=1)] | Literal["all"] | None, 'integer: >= 1 or `"all"`'),
        (tuple[int, ...], "list of integers"),
        (tuple[Annotated[int, Field(ge=0)], ...], "list of integers: each >= 0"),
        (Annotated[tuple[int, ...], Field(min_length=1)], "list of integers: not empty"),
        (tuple[Literal["a", "b"], ...], 'list of strings: `"a"`, `"b"`'),
        (tuple[float, float], "list of 2 numbers"),
        (str | tuple[str, ...], "string or list of strings"),
    ],
)
def test_types_and_bounds_in_words(annotation, text):
    assert described(annotation).text == text
