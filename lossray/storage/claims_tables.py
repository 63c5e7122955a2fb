"""The table of claims."""

from lossray.storage.schema import (
    INTEGER,
    TEXT,
    Column,
    TableSchema,
    key,
    number,
)

CLAIMS = TableSchema(
    "claims",
    1,
    "one statistic of one claim",
    (
        key(
            "claim",
            TEXT,
            "",
            "`A` (perpendicularity), `B` (degeneracy) or `C` (ensembles), and what of it, such as `A/margin`",
        ),
        key("subject", TEXT, "", "whom it is about: optimizers, model, gauge, ..."),
        key("statistic", TEXT, "", "what was estimated or decided"),
        number("estimate", "1", "the estimate; null for a verdict"),
        number("low", "1", "lower end of its confidence interval"),
        number("high", "1", "upper end"),
        number("p_value", "1", "of the test, unadjusted"),
        number("p_adjusted", "1", "adjusted for the tests of its family"),
        Column("n", INTEGER, "1", "runs, seeds, or pairs of them behind it"),
        Column("verdict", TEXT, "", "what follows; null for a number that only informs"),
        Column("text", TEXT, "", "the same in a sentence"),
    ),
)
