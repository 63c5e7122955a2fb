"""What `lossray tables` prints, from any machine that reads the store."""

from lossray.results import open_study

CELL_WIDTH = 32  # characters of a cell that is shown


def list_tables(out: str) -> str:
    """Every table with its rows, and where the files are."""
    study = open_study(out)
    width = max(map(len, study.tables))
    lines = [f"{name:{width}}  {rows:8,} rows" for name, rows in study.tables.items()]
    return "\n".join([f"{study.store.url}/tables", *lines])


def head(out: str, table: str, rows: int) -> str:
    """The first rows of one table; columns without any value are left out."""
    frame = open_study(out).table(table)
    shown = frame.head(rows).dropna(axis="columns", how="all")
    return f"{table}: {len(frame):,} rows\n{shown.to_string(index=False, max_colwidth=CELL_WIDTH)}"
