"""Every table of a store by name.

The page docs/tables.md is generated from here: ``python -m lossray.storage.tables > docs/tables.md``.
A new table is one more TableSchema in TABLES.
"""

import pyarrow as pa

from lossray.errors import StoreError
from lossray.names import unknown_name
from lossray.storage.claims_tables import CLAIMS
from lossray.storage.curvature_tables import CURVATURES, DEGENERACY, DENSITY, EIGENVALUES, SHARPNESS
from lossray.storage.ensemble_tables import (
    BARRIERS,
    ENSEMBLES,
    LOGITS,
    MEMBERS,
    PATHS,
    PREDICTIONS,
    RESCALINGS,
)
from lossray.storage.geometry_tables import (
    ALIGNMENT,
    ANGLES,
    DIRECTIONS,
    OVERLAPS,
    SEPARATIONS,
    SHARES,
    SURFACES,
    TRAJECTORY,
)
from lossray.storage.run_tables import CHECKPOINTS, RUNS, TASKS, TRAINING
from lossray.storage.schema import Column, TableSchema

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
        SHARES,
        ANGLES,
        ALIGNMENT,
        SHARPNESS,
        DEGENERACY,
        OVERLAPS,
        TRAJECTORY,
        SEPARATIONS,
        SURFACES,
        PATHS,
        BARRIERS,
        ENSEMBLES,
        MEMBERS,
        PREDICTIONS,
        RESCALINGS,
        LOGITS,
        CLAIMS,
        TASKS,
    )
}


def schema_of(name: str) -> TableSchema:
    """The declared schema of a table; StoreError for an unknown name."""
    if name not in TABLES:
        raise StoreError(f"no such table: {unknown_name(name, TABLES)}")
    return TABLES[name]


_arrow_schemas: dict[str, tuple[TableSchema, pa.Schema]] = {}  # as made; `TABLES` may be changed by a plugin


def arrow_schema(name: str) -> pa.Schema:
    """The Arrow schema of a table: units and meanings are in the fields' metadata, the version in its own."""
    schema = schema_of(name)
    made = _arrow_schemas.get(name)
    if made is None or made[0] is not schema:
        made = _arrow_schemas[name] = (schema, _arrow_schema(schema))
    return made[1]


def _arrow_schema(schema: TableSchema) -> pa.Schema:
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
        "Generated from `lossray/storage/*_tables.py` by `python -m lossray.storage.tables`; do not edit.",
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
