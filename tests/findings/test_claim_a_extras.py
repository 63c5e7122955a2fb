"""The words for a slope of S on ln d: by equivalence, within a declared margin."""

import numpy as np
import pytest

from lossray.findings.claim_a_extras import SLOPE_MARGIN, _slope_tests
from lossray.study.settings import ClaimsSettings


def _word(slopes: np.ndarray) -> str:
    (word,) = {row.verdict for row in _slope_tests("x", slopes, "d", ClaimsSettings())}
    return str(word)


@pytest.mark.parametrize(
    ("mean", "sd", "word"),
    [
        (0.0, 0.03, "a constant angle"),
        (0.05, 0.02, "a constant angle"),
        (-1.03, 0.03, "chance"),
        (-0.5, 0.1, "neither constant nor chance"),
        (0.4, 0.1, "neither constant nor chance"),
        (-1.4, 0.1, "neither constant nor chance"),
        (0.0, 0.5, "not decided"),  # where 0 was not rejected, the angle was called constant
        (-1.0, 0.5, "not decided"),
        (-0.1, 0.05, "not decided"),
        (-0.5, 1.5, "not decided"),
    ],
)
def test_words(mean: float, sd: float, word: str) -> None:
    scatter = np.array([-1.3, -0.8, -0.4, -0.1, 0.1, 0.4, 0.8, 1.3])
    assert _word(mean + sd * scatter) == word


def test_the_margin_is_in_the_text_and_one_or_two_seeds_decide_nothing() -> None:
    rows = list(_slope_tests("x", np.array([0.01, -0.01, 0.0, 0.02]), "d = 10 to 1000", ClaimsSettings()))
    assert len(rows) == 2
    assert all(f"within {SLOPE_MARGIN:g} of it" in str(row.text) for row in rows)
    assert rows[0].p_value < 0.05 < rows[1].p_value
    assert _word(np.array([0.0])) == "not decided"
    assert _word(np.array([0.03, -0.04])) == "not decided"


@pytest.mark.parametrize("n", [3, 5, 10, 20])
@pytest.mark.parametrize("sd", [0.03, 0.3])
def test_no_word_is_wrong_too_often_at_its_boundary(n: int, sd: float) -> None:
    rng = np.random.default_rng(n)
    for truth, wrong in (
        (SLOPE_MARGIN, ("a constant angle", "neither constant nor chance")),
        (-SLOPE_MARGIN, ("a constant angle", "neither constant nor chance")),
        (-1 + SLOPE_MARGIN, ("chance", "neither constant nor chance")),
        (0.0, ("neither constant nor chance", "chance")),
    ):
        words = [_word(truth + sd * rng.normal(size=n)) for _ in range(100)]
        assert max(words.count(word) for word in wrong) < 100 * (0.05 + 3 * np.sqrt(0.05 / 100))
