from pathlib import Path

import pyarrow as pa
import pytest

from lossray.errors import StoreError
from lossray.storage.tables import TABLES, arrow_schema, schema_of, tables_markdown

# The columns that users rely on: others may be added, none of these goes.
PROMISED = {
    "runs": "run_id pack_id model activation norm optimizer lr seed n_params status reason steps_done "
    "train_loss test_loss test_accuracy wall_seconds device dtype executor",
    "training": "run_id step train_loss validation_loss test_loss test_accuracy lr gradient_norm update_norm "
    "examples_seen",
    "checkpoints": "run_id step path train_loss test_loss test_accuracy parameter_norm distance_from_init",
    "eigenvalues": "run_id step operator block end index eigenvalue residual product_error converged gap ipr",
    "curvature": "run_id step operator block lambda_max lambda_min trace trace_stderr frobenius_norm "
    "frobenius_norm_stderr negative_mass participation effective_dimension "
    "effective_dimension_regulariser matvecs orthogonality_loss n_examples data_fingerprint loss "
    "gradient_norm reg_included product_mode dtype",
    "directions": "run_id step direction norm curvature finite_step_curvature finite_step_curvature_noise "
    "relative_curvature cosine_with_gradient",
    "angles": "run_id step direction gauge subspace cosine angle_degrees energy null_ratio null_p "
    "null_p_lower k dim resolved",
    "overlaps": "run_id step previous_step k subspace_overlap chance",
    "paths": "pair_id kind t run_a run_b train_loss test_loss test_accuracy arc_length",
    "barriers": "pair_id kind barrier barrier_frankle max_loss endpoint_distance aligned",
    "ensembles": "method base_run members split metric value budget seed",
    "members": "ensemble_id i j disagreement kl weight_distance",
    "tasks": "task_key kind status attempts wall_seconds queue_seconds started finished node device "
    "peak_bytes error",
}
KEYS = {
    "runs": "run_id",
    "training": "run_id step",
    "checkpoints": "run_id step",
    "eigenvalues": "run_id step operator block end index",
    "curvature": "run_id step operator block",
    "directions": "run_id step direction",
    "angles": "run_id step direction gauge subspace",
    "overlaps": "run_id step previous_step operator block k",
    "paths": "pair_id kind t",
    "barriers": "pair_id kind",
    "ensembles": "method base_run nominal_budget members split metric",
    "members": "ensemble_id i j",
    "tasks": "task_key",
}


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_column_exists(name):
    assert set(PROMISED[name].split()) <= set(arrow_schema(name).names)


@pytest.mark.parametrize("name", KEYS)
def test_rows_are_identified_by_the_promised_keys(name):
    assert schema_of(name).keys == KEYS[name].split()


@pytest.mark.parametrize("name", TABLES)
def test_every_numeric_column_has_a_unit_and_every_column_a_meaning(name):
    for column in TABLES[name].columns:
        kind = column.type.value_type if pa.types.is_list(column.type) else column.type
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        assert bool(column.unit) == number, column.name
        assert column.description, column.name


@pytest.mark.parametrize("name", TABLES)
def test_names_are_unique_and_keys_are_never_volatile(name):
    columns = TABLES[name].columns
    assert len({column.name for column in columns}) == len(columns)
    assert not [column.name for column in columns if column.key and column.volatile]


@pytest.mark.parametrize("name", TABLES)
def test_every_standard_error_stands_beside_its_estimate(name):
    names = arrow_schema(name).names
    estimates = [column.removesuffix("_stderr") for column in names if column.endswith("_stderr")]
    assert set(estimates) <= set(names)


def test_the_schema_carries_version_units_and_nullability():
    schema = arrow_schema("curvature")
    assert schema.metadata == {b"lossray.schema": b"curvature/1"}
    assert schema.field("lambda_max").metadata[b"unit"] == b"loss/parameter^2"
    assert not schema.field("run_id").nullable
    assert schema.field("trace").nullable


def test_an_unknown_table_is_refused_with_the_nearest_name():
    with pytest.raises(StoreError, match="did you mean 'eigenvalues'"):
        arrow_schema("eigenvalue")


def test_the_page_on_tables_is_current():
    page = Path(__file__).parents[2] / "docs" / "tables.md"
    assert page.read_text() == tables_markdown(), "run: python -m lossray.storage.tables > docs/tables.md"


def test_the_page_has_a_row_for_every_column():
    lines = tables_markdown().splitlines()
    assert sum(line.startswith("| ") for line in lines) == sum(len(t.columns) + 1 for t in TABLES.values())
    assert all(line.replace(r"\|", "").count("|") == 5 for line in lines if line.startswith("| "))
