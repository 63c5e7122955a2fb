"""Every table of a store: what a row stands for, its keys, and its columns with type, unit and meaning.

The page docs/tables.md is generated from here: ``python -m lossray.storage.tables > docs/tables.md``.
A new table is one more TableSchema in TABLES.
"""

import functools
from dataclasses import dataclass

import pyarrow as pa

from lossray.errors import StoreError
from lossray.names import unknown_name

TEXT, INTEGER, NUMBER, FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()
TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Column:
    """One column. Numeric columns have a unit, "1" where they are dimensionless."""

    name: str
    type: pa.DataType
    unit: str
    description: str
    key: bool = False  # identifies the row, together with the table's other keys; never null
    volatile: bool = False  # may differ when the same study is run again: times, places, memory


@dataclass(frozen=True)
class TableSchema:
    """One table. Its version goes up whenever its columns or their meaning change."""

    name: str
    version: int
    row: str  # what one row stands for
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


def _key(name: str, type: pa.DataType, unit: str, description: str) -> Column:
    return Column(name, type, unit, description, key=True)


def _number(name: str, unit: str, description: str) -> Column:
    return Column(name, NUMBER, unit, description)


def _volatile(name: str, type: pa.DataType, unit: str, description: str) -> Column:
    return Column(name, type, unit, description, volatile=True)


RUN = _key("run_id", TEXT, "", "the run: one training of one model with one optimizer setting and one seed")
STEP = _key("step", INTEGER, "steps", "optimizer steps taken when the row was measured; 0 is initialisation")
OPERATOR = _key("operator", TEXT, "", "`hessian`, `ggn`, `fisher` or `preconditioned`")
BLOCK = _key("block", TEXT, "", "`all`, or the parameters (a layer) that the operator is restricted to")
DIRECTION = _key(
    "direction",
    TEXT,
    "",
    "`gradient` (of the analysis set), `minibatch_gradient` (of the next batch), `update` (the "
    "optimizer's next), `momentum`, `displacement` (to the next checkpoint)",
)

# Splits are always evaluated in full and in eval mode; the loss never includes weight decay.
EVALUATION = (
    _number("train_loss", LOSS, "mean loss on the training split, eval mode"),
    _number("validation_loss", LOSS, "mean loss on the validation split, eval mode"),
    _number("test_loss", LOSS, "mean loss on the test split, eval mode"),
    _number("train_accuracy", "1", "share of the training split classified correctly; null in regression"),
    _number("validation_accuracy", "1", "share of the validation split classified correctly"),
    _number("test_accuracy", "1", "share of the test split classified correctly"),
)

RUNS = TableSchema(
    "runs",
    1,
    "one run, at the end of its training",
    (
        RUN,
        Column("pack_id", TEXT, "", "the pack: runs trained together as one stack, differing in their seed"),
        Column("setting_id", TEXT, "", "the model and optimizer setting, shared with other seeds"),
        Column("model", TEXT, "", "the model's name"),
        Column("activation", TEXT, "", "the model's activation; null where it has none"),
        Column("norm", TEXT, "", "the model's normalisation: `none`, `batch`, `group`, `layer`"),
        Column("model_settings", TEXT, "", "all settings of the model, JSON"),
        Column("optimizer", TEXT, "", "the optimizer's name"),
        _number("lr", "1", "base learning rate, before the schedule"),
        _number(
            "weight_decay", "1", "the optimizer's weight decay; not part of any loss, gradient or Hessian"
        ),
        Column("schedule", TEXT, "", "learning-rate schedule: `constant`, `cosine` or `step`"),
        Column("optimizer_settings", TEXT, "", "all settings of the optimizer, JSON"),
        Column("adaptive", FLAG, "", "whether the optimizer scales each parameter by past gradients"),
        Column(
            "seed", INTEGER, "1", "seed of the run's initialisation, data order and dropout; null if recorded"
        ),
        Column("n_params", INTEGER, "parameters", "trainable parameters of the model"),
        Column("batch_size", INTEGER, "examples", "examples per step"),
        Column("loss", TEXT, "", "name of the loss"),
        Column("status", TEXT, "", "`finished`, `diverged` or `failed`"),
        Column("reason", TEXT, "", "why the run diverged or failed; null where it finished"),
        Column("diverged_at", INTEGER, "steps", "the step at which the run diverged; null where it did not"),
        Column("steps_done", INTEGER, "steps", "steps taken"),
        *EVALUATION,
        Column("data_fingerprint", TEXT, "", "hash of the contents of the data, after standardisation"),
        Column("dtype", TEXT, "", "number format of the training"),
        Column("executor", TEXT, "", "how the pack was computed: `vmap` (stacked) or `loop` (one by one)"),
        _volatile("device", TEXT, "", "where the training ran: `cpu`, or the kind of GPU"),
        _volatile("wall_seconds", NUMBER, "s", "training time of the run's pack"),
    ),
)

TRAINING = TableSchema(
    "training",
    1,
    "one logged step of one run",
    (
        RUN,
        _key("step", INTEGER, "steps", "steps taken before; the row's update leads to the next"),
        _number("train_loss", LOSS, "mean loss of the step's own batch, before the update, train mode"),
        _number("validation_loss", LOSS, "mean loss on the validation split; null where not evaluated"),
        _number("test_loss", LOSS, "mean loss on the test split; null where not evaluated"),
        _number("test_accuracy", "1", "share of the test split classified correctly; null where not known"),
        _number("lr", "1", "learning rate of the step, after the schedule"),
        _number("gradient_norm", GRADIENT, "norm of the gradient of the step's batch, without weight decay"),
        _number("update_norm", PARAMETER, "norm of the change that the step made, weight decay included"),
        Column("examples_seen", INTEGER, "examples", "examples used before the step"),
    ),
)

CHECKPOINTS = TableSchema(
    "checkpoints",
    1,
    "one checkpoint of one run",
    (
        RUN,
        STEP,
        Column("pack_id", TEXT, "", "the pack whose checkpoint file holds the run"),
        Column("member", INTEGER, "1", "the run's index in the stacked tensors of the file"),
        Column("path", TEXT, "", "the file, relative to the store"),
        Column("alive", FLAG, "", "false from the step at which the run diverged; its numbers are null then"),
        *EVALUATION,
        _number("parameter_norm", PARAMETER, "norm of the parameters"),
        _number(
            "distance_from_init",
            PARAMETER,
            "norm of the difference to the first checkpoint's, which is step 0 or the first recorded",
        ),
    ),
)

EIGENVALUES = TableSchema(
    "eigenvalues",
    1,
    "one eigenvalue of one operator at one checkpoint",
    (
        RUN,
        STEP,
        OPERATOR,
        BLOCK,
        _key("end", TEXT, "", "`largest` or `smallest` (algebraic) end of the spectrum"),
        _key("index", INTEGER, "1", "0 is the outermost eigenvalue of its end"),
        _number("eigenvalue", CURVATURE, "the Ritz value"),
        _number("residual", CURVATURE, "|Hv - lambda v| of the unit Ritz vector, from a product of its own"),
        _number(
            "product_error",
            CURVATURE,
            "|(H - H in float64) v| for the top vector of the solve: the residual certifies H as computed",
        ),
        Column("converged", FLAG, "", "whether the residual met the tolerance"),
        _number("gap", CURVATURE, "distance to the nearest other Ritz value; residual/gap bounds the error"),
        _number("ipr", "1", "inverse participation ratio sum v_i^4 of the vector: 1/d spread, 1 localised"),
    ),
)

DENSITY = TableSchema(
    "density",
    1,
    "one node of one probe's estimate of the eigenvalue distribution of one operator at one checkpoint",
    (
        RUN,
        STEP,
        OPERATOR,
        BLOCK,
        _key("probe", INTEGER, "1", "the random vector; one alone where all eigenvalues are known"),
        _key("index", INTEGER, "1", "nodes in ascending order"),
        _number("node", CURVATURE, "a known eigenvalue, or a node of the quadrature of the others"),
        _number("weight", "1", "its share of all eigenvalues; the weights of a probe sum to 1"),
    ),
)

CURVATURES = TableSchema(
    "curvature",
    1,
    "one operator at one checkpoint",
    (
        RUN,
        STEP,
        OPERATOR,
        BLOCK,
        _number("lambda_max", CURVATURE, "largest eigenvalue"),
        _number("lambda_min", CURVATURE, "smallest (algebraic) eigenvalue"),
        Column(
            "confirmed",
            FLAG,
            "",
            "whether a fresh search of the complement found nothing above the last of the top eigenvalues",
        ),
        _number("trace", CURVATURE, "estimate of the trace"),
        _number("trace_stderr", CURVATURE, "its standard error; here and below 0 where the value is exact"),
        _number("frobenius_norm", CURVATURE, "estimate of the Frobenius norm"),
        _number("frobenius_norm_stderr", CURVATURE, "its standard error"),
        _number("negative_mass", "1", "sum of |lambda| over negative eigenvalues, over the sum over all"),
        _number("negative_mass_stderr", "1", "its standard error"),
        _number("participation", "1", "(sum |lambda|)^2 / sum lambda^2: how many eigenvalues dominate"),
        _number("participation_stderr", "1", "its standard error"),
        _number("effective_dimension", "1", "sum of lambda / (lambda + regulariser) over positive lambda"),
        _number("effective_dimension_stderr", "1", "its standard error"),
        _number("effective_dimension_regulariser", CURVATURE, "the regulariser in it: |lambda|max / 100"),
        Column("matvecs", INTEGER, "products", "products of the operator with a vector, all told"),
        _number("orthogonality_loss", "1", "largest |Q'Q - I| of the Krylov basis"),
        Column("dim", INTEGER, "1", "order of the operator: parameters in the block"),
        Column("n_examples", INTEGER, "examples", "size of the analysis set"),
        Column("data_fingerprint", TEXT, "", "hash of the analysis set's contents"),
        _number("loss", LOSS, "mean loss on the analysis set"),
        _number("gradient_norm", GRADIENT, "norm of the gradient of that loss"),
        Column("reg_included", FLAG, "", "whether weight decay is part of loss, gradient and operator"),
        Column("product_mode", TEXT, "", "how products were computed"),
        Column("dtype", TEXT, "", "number format of the products; the recurrence is always float64"),
    ),
)

DIRECTIONS = TableSchema(
    "directions",
    1,
    "one direction u at one checkpoint",
    (
        RUN,
        STEP,
        DIRECTION,
        _number("norm", "loss/parameter or parameter", "|u|: a gradient's, or a displacement's"),
        _number("curvature", CURVATURE, "u'Hu / u'u with the Hessian H of the analysis set"),
        _number(
            "finite_step_curvature",
            CURVATURE,
            "[L(theta + s) - 2 L(theta) + L(theta - s)] / |s|^2 in float64, s the real step along u: "
            "it sees the kinks of ReLU, which the Hessian misses",
        ),
        _number("finite_step_curvature_noise", CURVATURE, "its rounding error"),
        _number("relative_curvature", "1", "curvature over trace/d, the mean over all directions"),
        _number("cosine_with_gradient", "1", "cosine of the angle to the gradient of the analysis set"),
    ),
)

ANGLES = TableSchema(
    "angles",
    1,
    "the angle of one direction to one eigenspace, in one gauge, at one checkpoint",
    (
        RUN,
        STEP,
        DIRECTION,
        _key("gauge", TEXT, "", "metric of the angle: `raw`, `balanced`, `adaptive` or `preconditioned`"),
        _key("subspace", TEXT, "", "`v1` (top eigenvector), `top5`, ..."),
        _number("cosine", "1", "cosine of the angle between direction and subspace, >= 0"),
        _number("angle_degrees", "degrees", "that angle, 0 to 90"),
        _number("energy", "1", "chi^2, the squared cosine: the direction's share inside the subspace"),
        _number("null_ratio", "1", "energy over its mean k/d for a random direction"),
        _number("null_p", "1", "P(Beta(k/2, (d-k)/2) >= energy): small if unusually aligned"),
        _number("null_p_lower", "1", "P(Beta(k/2, (d-k)/2) <= energy): small if unusually perpendicular"),
        Column("k", INTEGER, "1", "dimension of the subspace"),
        Column("dim", INTEGER, "1", "dimension d of the space"),
        Column("resolved", FLAG, "", "whether the subspace is: its residual/gap is below 0.1"),
    ),
)

OVERLAPS = TableSchema(
    "overlaps",
    1,
    "the leading eigenspace of one dimension at one checkpoint and at the one before",
    (
        RUN,
        _key("step", INTEGER, "steps", "optimizer steps taken at the later checkpoint"),
        _key("previous_step", INTEGER, "steps", "those at the earlier one, its neighbour"),
        OPERATOR,
        BLOCK,
        _key(
            "k", INTEGER, "1", "dimension of the eigenspaces: 1, 5, 10, C-1, C, 2C for C outputs, and `top`"
        ),
        _number(
            "subspace_overlap", "1", "|V'W|_F^2 / k of their orthonormal bases: 1 the same, 0 orthogonal"
        ),
        _number("chance", "1", "k/d: its mean for random subspaces"),
        Column("dim", INTEGER, "1", "dimension d of the space"),
        Column("resolved", FLAG, "", "whether both eigenspaces are: their residual/gap is below 0.1"),
    ),
)

TASKS = TableSchema(
    "tasks",
    1,
    "one task; its part is the commit record",
    (
        _key("task_key", TEXT, "", "hash of all that the task's result depends on"),
        Column(
            "kind",
            TEXT,
            "",
            "`checkpoint` (training up to one published checkpoint), `training` (a pack's end), `curvature` "
            "(of one checkpoint), `pair` (of one and the one before), or `gather` (the task that made these "
            "tables)",
        ),
        Column("status", TEXT, "", "`done`, `diverged` (done, with a run that diverged) or `failed`"),
        Column("pack_id", TEXT, "", "the pack that the task worked on"),
        Column("run_id", TEXT, "", "the run, where the task worked on one only"),
        Column("step", INTEGER, "steps", "the checkpoint, where the task worked on one; the later of a pair"),
        Column("tables", TEXT, "", "the tables that the task published parts of, comma-separated"),
        _volatile("attempts", INTEGER, "1", "executions, the successful one included"),
        _volatile("wall_seconds", NUMBER, "s", "time of the successful execution"),
        _volatile("queue_seconds", NUMBER, "s", "time between submission and start"),
        _volatile("started", TIME, "", "start of the execution, UTC"),
        _volatile("finished", TIME, "", "its end, UTC"),
        _volatile("node", TEXT, "", "the machine"),
        _volatile("device", TEXT, "", "`cpu`, or the kind of GPU"),
        _volatile("peak_bytes", INTEGER, "bytes", "largest memory in use, of the GPU where the task has one"),
        _volatile("error", TEXT, "", "why the task failed; null where it did not"),
    ),
)

TABLES: dict[str, TableSchema] = {
    schema.name: schema
    for schema in (
        RUNS,
        TRAINING,
        CHECKPOINTS,
        EIGENVALUES,
        DENSITY,
        CURVATURES,
        DIRECTIONS,
        ANGLES,
        OVERLAPS,
        TASKS,
    )
}


def schema_of(name: str) -> TableSchema:
    """The declared schema of a table; StoreError for an unknown name."""
    if name not in TABLES:
        raise StoreError(f"no such table: {unknown_name(name, TABLES)}")
    return TABLES[name]


@functools.cache
def arrow_schema(name: str) -> pa.Schema:
    """The Arrow schema of a table: units and meanings are in the fields' metadata, the version in its own."""
    schema = schema_of(name)
    fields = [
        pa.field(
            column.name,
            column.type,
            nullable=not column.key,
            metadata={"unit": column.unit, "description": column.description},
        )
        for column in schema.columns
    ]
    return pa.schema(fields, metadata={"lossray.schema": schema.label})


def tables_markdown() -> str:
    """The text of docs/tables.md."""
    lines = [
        "# Tables",
        "",
        "Generated from `lossray/storage/tables.py` by `python -m lossray.storage.tables`; do not edit.",
        "",
        "Every table is one Parquet file, `OUT/tables/<table>.parquet`, sorted by its keys, and carries "
        "`lossray.schema=<table>/<version>`. What does not exist or could not be computed is null. `loss` is "
        "the unit of the study's loss, `parameter` that of the parameters. *Key* columns identify a row; "
        "*volatile* ones may differ when the same study is run again.",
    ]
    for schema in TABLES.values():
        lines += ["", f"## {schema.name}", "", f"One row per: {schema.row}. Schema `{schema.label}`.", ""]
        lines += ["| column | type | unit | meaning |", "|---|---|---|---|"]
        lines += [_markdown_row(column) for column in schema.columns]
    return "\n".join(lines) + "\n"


def _markdown_row(column: Column) -> str:
    marks = ", ".join(mark for mark, on in (("key", column.key), ("volatile", column.volatile)) if on)
    description = column.description.replace("|", r"\|")
    meaning = f"*{marks}.* {description}" if marks else description
    return f"| {column.name} | {column.type} | {column.unit or '-'} | {meaning} |"


if __name__ == "__main__":
    print(tables_markdown(), end="")
