"""What a table is: its columns with type, unit and meaning; and the columns that many tables share."""

from dataclasses import dataclass

import pyarrow as pa

TEXT, INTEGER, NUMBER, FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()
TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Column:
    """One column. Numeric columns have a unit, "1" where they are dimensionless.

    Attributes:
        name: unique in its table.
        type: of its values.
        unit: such as "s" or "loss"; "1" for a number without one, "" for what is no number.
        description: what it means.
        key: whether it identifies the row, together with the table's other keys; never null then.
        volatile: whether it may differ when the same study is run again: times, places, memory.
    """

    name: str
    type: pa.DataType
    unit: str
    description: str
    key: bool = False
    volatile: bool = False


@dataclass(frozen=True)
class TableSchema:
    """One table.

    Its version goes up when a column is removed or comes to mean something else. A column that is added is
    null in the rows that are older, and raises no version.

    Attributes:
        name: of the table and its file.
        version: counts from 1.
        row: what one row stands for.
        columns: in the file's order.
    """

    name: str
    version: int
    row: str
    columns: tuple[Column, ...]

    @property
    def label(self) -> str:
        """What each file carries as `lossray.schema`."""
        return f"{self.name}/{self.version}"

    @property
    def keys(self) -> list[str]:
        """The key columns, in sorting order."""
        return [column.name for column in self.columns if column.key]

    @property
    def volatile(self) -> list[str]:
        """The columns to leave out when two executions of a study are compared."""
        return [column.name for column in self.columns if column.volatile]


# Units. A loss has the unit of the study's loss; parameters have a unit of their own, to tell a gradient
# (loss/parameter) from a displacement (parameter).
LOSS, GRADIENT, CURVATURE, PARAMETER = "loss", "loss/parameter", "loss/parameter^2", "parameter"


def key(name: str, type: pa.DataType, unit: str, description: str) -> Column:
    """A column that identifies a row."""
    return Column(name, type, unit, description, key=True)


def number(name: str, unit: str, description: str) -> Column:
    """A column of floats."""
    return Column(name, NUMBER, unit, description)


def volatile(name: str, type: pa.DataType, unit: str, description: str) -> Column:
    """A column that may differ when the same study is run again."""
    return Column(name, type, unit, description, volatile=True)


RUN = key("run_id", TEXT, "", "the run: one training of one model with one optimizer setting and one seed")
STEP = key("step", INTEGER, "steps", "optimizer steps taken when the row was measured; 0 is initialisation")
OPERATOR = key("operator", TEXT, "", "`hessian`, `ggn`, `fisher` or `preconditioned`")
BLOCK = key("block", TEXT, "", "`all`, or the parameters (a layer) that the operator is restricted to")
DIRECTION = key(
    "direction",
    TEXT,
    "",
    "`gradient` (of the analysis set), `minibatch_gradient` (of the next batch), `update` (the "
    "optimizer's next), `momentum`, `preconditioned_gradient` (P^-1 g of the next batch), `displacement` (to "
    "the next checkpoint), `shadow:NAME` (the next update of another optimizer, fed the same gradients)",
)
GAUGE = key("gauge", TEXT, "", "metric of the angle: `raw`, `balanced`, `adaptive` or `preconditioned`")
SUBSPACE = key(
    "subspace", TEXT, "", "`v1` (top eigenvector), `top5`, ...; `vmin` (smallest eigenvalue's, angles only)"
)

# Splits are always evaluated in full and in eval mode; the loss never includes weight decay.
EVALUATION = (
    number("train_loss", LOSS, "mean loss on the training split, eval mode"),
    number("validation_loss", LOSS, "mean loss on the validation split, eval mode"),
    number("test_loss", LOSS, "mean loss on the test split, eval mode"),
    number("train_accuracy", "1", "share of the training split classified correctly; null in regression"),
    number("validation_accuracy", "1", "share of the validation split classified correctly"),
    number("test_accuracy", "1", "share of the test split classified correctly"),
)
