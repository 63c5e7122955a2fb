"""Data sets: identities of splitting, standardising and fingerprinting, and the error for every bad input."""

import dataclasses
import io
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lossray.errors import DataError
from lossray.training.data_settings import data_settings
from lossray.training.datasets import (
    analysis_fingerprint,
    analysis_set,
    content_key,
    load_dataset,
    load_whole,
)
from lossray.training.splits import exact_sizes, partition, stratified_counts


def load(base=None, dtype=torch.float64, **table):
    return load_dataset(data_settings(table), dtype=dtype, base=base)


def splits(dataset):
    return dataset.train, dataset.validation, dataset.test


def refused(**table):
    """The place and the message of the one error in a [data] table."""
    with pytest.raises(ValidationError) as caught:
        data_settings(table)
    (error,) = caught.value.errors()
    return error["loc"], error["msg"]


# --- settings


def test_an_empty_table_is_the_digits_with_the_documented_split():
    settings = data_settings({})
    assert settings.source == "digits"
    assert settings.split == (0.7, 0.15, 0.15)
    assert settings.standardise == "feature"


@pytest.mark.parametrize(
    "table",
    [
        {"source": "digits", "split": [0.5, 0.25, 0.25], "standardise": "global"},
        {"source": "gaussians", "n": 50, "noise": 1, "teacher": "mlp"},
        {"source": "parquet", "path": "a.parquet", "label": "y", "image": "x", "image_size": 8},
        {"source": "mine.module:build", "size": 3, "options": {"deep": [1, 2]}},
    ],
)
def test_plain_settings_validate_to_themselves(table):
    settings = data_settings(table)
    assert data_settings(settings.plain()) == settings


def test_unknown_source_names_the_nearest():
    place, message = refused(source="digit")
    assert place == ("source",)
    assert message == (
        "found 'digit'; allowed: digits, gaussians, parquet, package.module:function; did you mean 'digits'?"
    )


@pytest.mark.parametrize(
    ("table", "place", "parts"),
    [
        ({"source": "digits", "standardize": "none"}, "standardize", ["did you mean 'standardise'?"]),
        ({"source": "gaussians", "dims": 3}, "dims", ["did you mean 'dim'?"]),
        ({"source": "digits", "dim": 3}, "dim", ["found 'dim'", "allowed: source, split"]),
        ({"source": 3}, "source", ["string"]),
        ({"source": "mine:"}, "source", ["package.module:function"]),
        ({"source": "gaussians", "n": 2.5}, "n", ["integer"]),
        ({"source": "gaussians", "n": True}, "n", ["integer"]),
        ({"source": "gaussians", "classes": 1}, "classes", ["greater than or equal to 2"]),
        ({"source": "gaussians", "noise": -0.1}, "noise", ["greater than or equal to 0"]),
        ({"source": "gaussians", "teacher": "cnn"}, "teacher", ["'linear' or 'mlp'"]),
        ({"split": [0.7, 0.2, 0.2]}, "split", ["found [0.7, 0.2, 0.2]", "sums to 1.1", "sum to 1"]),
        ({"split": [0.8, 0.2, 0.0]}, "split", ["three positive fractions"]),
        ({"split": [1.2, -0.1, -0.1]}, "split", ["three positive fractions"]),
        ({"standardise": "pixels"}, "standardise", ["'none', 'feature' or 'global'"]),
        ({"source": "parquet", "label": "y", "features": ["x"]}, "path", ["required"]),
    ],
)
def test_bad_settings_name_the_key_and_what_is_allowed(table, place, parts):
    found, message = refused(**table)
    assert found == (place,)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ({}, "found neither"),
        ({"features": ["x"], "image": "z"}, "found both"),
        ({"features": ["x"], "image_size": 8}, "'image_size' without 'image'"),
        ({"features": ["x", "y"]}, "'y' twice"),
        ({"features": []}, "at least 1 item"),
    ],
)
def test_parquet_settings_that_contradict_themselves(table, part):
    assert part in refused(source="parquet", path="a.parquet", label="y", **table)[1]


# --- dividing


@pytest.mark.parametrize("n", [3, 7, 20, 100, 1797])
def test_exact_sizes_sum_to_n_and_are_within_one(n):
    fractions = [0.7, 0.15, 0.15]
    sizes = exact_sizes(n, fractions)
    assert sum(sizes) == n
    assert all(abs(size - fraction * n) < 1 for size, fraction in zip(sizes, fractions, strict=True))


def test_exact_sizes_follow_the_decimal_fractions():
    assert exact_sizes(20, [0.7, 0.15, 0.15]) == [14, 3, 3]
    assert exact_sizes(1000, [0.58, 0.29, 0.13]) == [580, 290, 130]


def test_stratified_counts_have_exact_margins_and_entries_within_one():
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = rng.integers(1, 12, size=rng.integers(1, 9)).tolist()
        n = sum(rows)
        cuts = np.sort(rng.integers(0, n + 1, size=rng.integers(1, 4)))
        columns = np.diff([0, *cuts, n]).tolist()
        table = np.array(stratified_counts(rows, columns))
        exact = np.outer(rows, columns) / n
        assert table.sum(axis=1).tolist() == rows
        assert table.sum(axis=0).tolist() == columns
        assert np.abs(table - exact).max() < 1


def test_small_classes_are_put_into_every_split_where_rounding_allows():
    # The shares of the class of 4 are 2.8, 0.6, 0.6: the largest remainders alone would make that 3, 1, 0.
    table = np.array(stratified_counts([4, 12, 24], exact_sizes(40, [0.7, 0.15, 0.15])))
    assert table.min() >= 1
    assert table.sum(axis=0).tolist() == [28, 6, 6]


def test_a_class_of_one_example_goes_to_training():
    assert stratified_counts([1, 39], [28, 6, 6])[0] == [1, 0, 0]


def test_partition_depends_on_its_seed_and_covers_everything_once():
    labels = np.arange(60) % 3
    first, again, other = (partition(labels, [40, 20], seed) for seed in (0, 0, 1))
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
    assert sorted(np.concatenate(first)) == list(range(60))
    assert sorted(np.bincount(labels[first[1]])) == [6, 7, 7]


def test_regression_targets_are_divided_at_random():
    parts = partition(np.arange(10.0)[:, None], [6, 4], seed=0)
    assert sorted(np.concatenate(parts)) == list(range(10))
    assert parts[0].tolist() != list(range(6))


# --- digits


@pytest.fixture(scope="module")
def digits():
    return load(source="digits", standardise="none")


def test_digits_are_split_exactly_and_stratified(digits):
    sizes = [len(split.targets) for split in splits(digits)]
    assert sum(sizes) == 1797
    assert sizes == [1258, 270, 269] or sizes == [1258, 269, 270]
    assert digits.input_shape == (1, 8, 8)
    assert digits.n_outputs == 10
    counts = np.array([np.bincount(split.targets, minlength=10) for split in splits(digits)])
    exact = np.outer(sizes, counts.sum(axis=0)) / 1797
    assert np.abs(counts - exact).max() < 1


def test_digits_are_the_same_where_scikit_learn_keeps_them_elsewhere(digits, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load(source="digits", standardise="none").fingerprint == digits.fingerprint


def test_digits_are_scaled_to_the_unit_interval(digits):
    assert digits.train.inputs.min() == 0
    assert digits.train.inputs.max() == 1


def test_digits_splits_are_disjoint_and_complete(digits):
    from sklearn.datasets import load_digits

    def rows(inputs):
        return sorted(map(tuple, np.asarray(inputs).reshape(len(inputs), 64).tolist()))

    joined = torch.cat([split.inputs for split in splits(digits)])
    assert rows(joined) == rows(load_digits().data / 16)


def test_loading_twice_gives_the_same_bits(digits):
    again = load(source="digits", standardise="none")
    for one, two in zip(splits(digits), splits(again), strict=True):
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(one.targets, two.targets)


def test_another_split_seed_gives_another_split(digits):
    other = load(source="digits", standardise="none", split_seed=1)
    assert not torch.equal(other.test.inputs, digits.test.inputs)
    assert other.fingerprint != digits.fingerprint


def test_dtype_is_that_asked_for():
    dataset = load(source="digits", dtype=torch.float32)
    assert dataset.train.inputs.dtype == torch.float32
    assert dataset.train.targets.dtype == torch.int64


# --- standardisation


def test_features_are_standardised_with_training_statistics_only(digits):
    dataset = load(source="digits")
    train, test = (split.inputs.flatten(1) for split in (dataset.train, dataset.test))
    raw = digits.train.inputs.flatten(1)
    varies = raw.std(dim=0) > 0
    assert 0 < int((~varies).sum()) < 64  # some border pixels are always blank
    assert train[:, varies].mean(dim=0).abs().max() < 1e-12
    assert (train[:, varies].std(dim=0, correction=0) - 1).abs().max() < 1e-12
    assert test[:, varies].mean(dim=0).abs().max() > 0.01
    # the test split went through the same affine map as the training split
    mean, std = raw[:, varies].mean(dim=0), raw[:, varies].std(dim=0, correction=0)
    expected = (digits.test.inputs.flatten(1)[:, varies] - mean) / std
    assert torch.allclose(test[:, varies], expected, atol=1e-12)


def test_features_constant_in_training_are_zero_everywhere(digits):
    dataset = load(source="digits")
    constant = (digits.train.inputs == digits.train.inputs[0]).all(dim=0)
    for split in splits(dataset):
        assert split.inputs.isfinite().all()
        assert (split.inputs[:, constant] == 0).all()


def test_global_standardisation_is_one_affine_map(digits):
    dataset = load(source="digits", standardise="global")
    assert abs(dataset.train.inputs.mean()) < 1e-12
    assert abs(dataset.train.inputs.std(correction=0) - 1) < 1e-12
    raw, done = digits.test.inputs.flatten(), dataset.test.inputs.flatten()
    slope = (done.max() - done.min()) / (raw.max() - raw.min())
    assert torch.allclose(done, done.min() + slope * (raw - raw.min()), atol=1e-12)


def test_what_was_applied_is_recorded_and_can_be_repeated(digits):
    dataset = load(source="digits")
    assert torch.equal(dataset.standardisation.apply(digits.test.inputs), dataset.test.inputs)
    summary = dataset.standardisation.summary()
    assert summary["kind"] == "feature"
    assert summary["constant"] == int((digits.train.inputs == digits.train.inputs[0]).all(dim=0).sum())
    assert 0 < summary["std_smallest"] < summary["std_largest"] < 1
    assert digits.standardisation is None


# --- fingerprint


def test_fingerprint_is_pinned():
    # Data on a grid and sums in a fixed order: the same on every machine. A change here changes every key.
    dataset = load(source="gaussians", n=40, dim=3, classes=3, teacher="mlp", noise=0.5)
    assert dataset.fingerprint == "610975a501f23ba86f1cfcf27b2f5c4213412b0c5d9c788dc70ad654e79f0cfe"


def test_fingerprint_and_key_do_not_depend_on_the_training_dtype():
    settings = data_settings({"source": "digits"})
    single = load_dataset(settings, dtype=torch.float32)
    double = load_dataset(settings, dtype=torch.float64)
    assert single.fingerprint == double.fingerprint == content_key(settings, None)
    assert len(single.fingerprint) == 64


def test_fingerprint_sees_one_label_one_input_and_the_standardisation(tmp_path, module):
    def key(**table):
        return content_key(data_settings({"source": "lossray_test_data:parts", **table}), tmp_path)

    keys = [
        key(),
        key(label=1),
        key(split_of_label="test", label=1),
        key(pixel=1e-12),
        key(standardise="none"),
    ]
    assert len(set(keys)) == 5
    assert key() == keys[0]


def test_equal_contents_have_one_fingerprint_wherever_they_lie(tmp_path):
    table = pa.table({"a": np.arange(20.0), "y": ["u", "v"] * 10})
    (tmp_path / "sub").mkdir()
    pq.write_table(table, tmp_path / "one.parquet")
    pq.write_table(table, tmp_path / "sub" / "two.parquet")
    common = {"source": "parquet", "features": ["a"], "label": "y"}
    one = content_key(data_settings({**common, "path": "one.parquet"}), tmp_path)
    two = content_key(data_settings({**common, "path": "two.parquet"}), tmp_path / "sub")
    assert one == two


# --- analysis set


def test_the_whole_of_a_source_is_neither_split_nor_standardised():
    whole = load_whole(data_settings({}), dtype=torch.float64)
    parts = load(standardise="none")
    assert (len(whole.train.targets), len(whole.validation.targets), len(whole.test.targets)) == (1797, 0, 0)
    assert float(whole.train.inputs.sum()) == pytest.approx(sum(float(s.inputs.sum()) for s in splits(parts)))
    assert (whole.n_outputs, whole.input_shape) == (parts.n_outputs, parts.input_shape)
    assert whole.fingerprint != parts.fingerprint
    assert whole.fingerprint == load_whole(data_settings({}), dtype=torch.float32).fingerprint
    assert len(analysis_set(whole, 100).targets) == 100


def test_the_whole_analysis_set_is_the_training_split(digits):
    assert analysis_set(digits, "all") is digits.train
    n = len(digits.train.targets)
    assert torch.equal(analysis_set(digits, n).inputs, digits.train.inputs)
    assert analysis_fingerprint(digits, "all") == analysis_fingerprint(digits, n)


def test_a_smaller_analysis_set_is_fixed_stratified_and_part_of_training(digits):
    chosen = analysis_set(digits, 100)
    assert torch.equal(chosen.inputs, analysis_set(digits, 100).inputs)
    counts = np.bincount(chosen.targets, minlength=10)
    exact = np.bincount(digits.train.targets, minlength=10) * 100 / len(digits.train.targets)
    assert counts.sum() == 100
    assert np.abs(counts - exact).max() < 1
    matches = (chosen.inputs.flatten(1)[:, None] == digits.train.inputs.flatten(1)).all(dim=2)
    assert matches.any(dim=1).all()


def test_an_analysis_set_is_chosen_from_data_on_any_device(digits):
    class OnDevice(torch.Tensor):
        """Like a tensor on a GPU: NumPy cannot read it."""

        def numpy(self, **options):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def cpu(self, **options):
            return self.as_subclass(torch.Tensor)

    split = dataclasses.replace(digits.train, targets=digits.train.targets.as_subclass(OnDevice))
    moved = dataclasses.replace(digits, train=split)
    assert torch.equal(analysis_set(moved, 100).inputs, analysis_set(digits, 100).inputs)
    assert analysis_fingerprint(moved, 100) == analysis_fingerprint(digits, 100)


def test_analysis_fingerprint_tells_sizes_and_data_apart_but_not_dtypes(digits):
    single = load(source="digits", standardise="none", dtype=torch.float32)
    other = load(source="digits", standardise="none", split_seed=1)
    assert analysis_fingerprint(single, 100) == analysis_fingerprint(digits, 100)
    assert analysis_fingerprint(digits, 101) != analysis_fingerprint(digits, 100)
    assert analysis_fingerprint(other, 100) != analysis_fingerprint(digits, 100)


@pytest.mark.parametrize("examples", [0, 1259])
def test_an_impossible_analysis_set_is_refused(digits, examples):
    with pytest.raises(DataError, match=f"found {examples} examples.*allowed: 1 to 1258"):
        analysis_set(digits, examples)


# --- gaussians


def fit_linearly(dataset):
    """Test accuracy of logistic regression, the student that the linear teacher is made for."""
    from sklearn.linear_model import LogisticRegression

    student = LogisticRegression(max_iter=1000).fit(dataset.train.inputs, dataset.train.targets)
    return student.score(dataset.test.inputs, dataset.test.targets)


def test_gaussians_have_the_size_asked_for_and_are_standard_normal():
    dataset = load(source="gaussians", n=4000, dim=6, classes=3, standardise="none")
    inputs = torch.cat([split.inputs for split in splits(dataset)])
    targets = torch.cat([split.targets for split in splits(dataset)])
    assert inputs.shape == (4000, 6)
    assert dataset.n_outputs == 3
    assert (torch.bincount(targets) > 400).all()
    assert inputs.mean(dim=0).abs().max() < 0.06
    assert (torch.cov(inputs.T) - torch.eye(6)).abs().max() < 0.1


def test_gaussians_are_exact_in_single_precision():
    table = {"source": "gaussians", "n": 100, "dim": 5, "standardise": "none"}
    assert torch.equal(load(**table, dtype=torch.float32).train.inputs.double(), load(**table).train.inputs)


def test_gaussians_repeat_by_seed_and_leave_the_global_generator_alone():
    table = {"source": "gaussians", "n": 200, "dim": 4}
    state = torch.get_rng_state()
    one, two, other = load(**table, seed=3), load(**table, seed=3), load(**table, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != other.fingerprint


def test_the_linear_teacher_can_be_learnt_the_others_less():
    common = {"source": "gaussians", "n": 3000, "dim": 8, "classes": 4}
    linear = fit_linearly(load(**common))
    assert linear > 0.93
    assert fit_linearly(load(**common, teacher="mlp")) < linear - 0.03
    assert fit_linearly(load(**common, noise=1.0)) < linear - 0.1


def test_every_class_occurs_with_more_classes_than_dimensions():
    dataset = load(source="gaussians", n=3000, dim=2, classes=6)
    assert (torch.bincount(dataset.train.targets, minlength=6) > 0).all()


def test_too_few_examples_for_the_split():
    with pytest.raises(DataError, match=r"3 examples are too few .* the test split is empty"):
        load(source="gaussians", n=3)


# --- parquet: columns


def write(path, **columns):
    pq.write_table(pa.table(columns), path)


def read(folder, path="data.parquet", label="y", **table):
    return load(source="parquet", path=path, label=label, base=folder, standardise="none", **table)


def joined(dataset):
    """All examples as (first input value, target) pairs, whatever split they are in."""
    return {
        (float(row.flatten()[0]), target.item())
        for split in splits(dataset)
        for row, target in zip(split.inputs, split.targets, strict=True)
    }


def test_feature_columns_lie_side_by_side_in_the_order_given(tmp_path):
    n = np.arange(20)
    write(
        tmp_path / "data.parquet",
        a=n.astype(np.int32),
        b=n * 0.5,
        flag=n % 2 == 0,
        c=pa.array([[float(i), float(-i)] for i in n]),
        fixed=pa.FixedSizeListArray.from_arrays(np.repeat(n, 3).astype(np.float32), 3),
        y=n % 2,
    )
    dataset = read(tmp_path, features=["b", "a", "c", "flag", "fixed"])
    assert dataset.input_shape == (8,)
    assert dataset.n_outputs == 2
    rows = torch.cat([split.inputs for split in splits(dataset)])
    i = rows[:, 1]
    assert sorted(i.tolist()) == n.tolist()
    even = (i % 2 == 0).double()
    assert torch.equal(rows, torch.stack([i / 2, i, i, -i, even, i, i, i], dim=1))
    assert joined(dataset) == {(i * 0.5, i % 2) for i in range(20)}


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["pear", "apple", "fig"] * 4),
        pa.array(["pear", "apple", "fig"] * 4).dictionary_encode(),
        pa.array([30, -5, 7] * 4),
    ],
)
def test_labels_become_ids_in_sorted_order(tmp_path, labels):
    write(tmp_path / "data.parquet", x=np.arange(12.0), y=labels)
    dataset = read(tmp_path, features=["x"])
    assert dataset.n_outputs == 3
    assert joined(dataset) == {(float(i), [2, 0, 1][i % 3]) for i in range(12)}


def test_float_labels_are_regression_targets(tmp_path):
    write(tmp_path / "data.parquet", x=np.arange(12.0), y=np.arange(12) / 8)
    dataset = read(tmp_path, features=["x"])
    assert dataset.n_outputs == 1
    assert dataset.train.targets.shape == (8,)
    assert joined(dataset) == {(float(i), i / 8) for i in range(12)}


def test_a_directory_is_its_files_in_the_order_of_their_names(tmp_path):
    whole = {"x": np.arange(30.0), "y": np.arange(30) % 3}
    write(tmp_path / "whole.parquet", **whole)
    folder = tmp_path / "parts"
    (folder / "_temporary").mkdir(parents=True)
    for name, rows in [("part-2.parquet", slice(20, 30)), ("part-0.parquet", slice(0, 9))]:
        write(folder / name, **{key: value[rows] for key, value in whole.items()})
    write(folder / "part-1.parquet", **{key: value[9:20] for key, value in whole.items()})
    write(folder / "part-3.parquet", x=np.zeros(0), y=np.zeros(0, dtype=np.int64))
    (folder / "README.md").write_text("not data")
    (folder / "_temporary" / "left.parquet").write_text("not data")
    parts, one = read(tmp_path, "parts", features=["x"]), read(tmp_path, "whole.parquet", features=["x"])
    assert parts.fingerprint == one.fingerprint


def test_a_uri_is_read_through_fsspec(tmp_path):
    columns = {"x": np.arange(20.0), "y": np.arange(20) % 2}
    write(tmp_path / "data.parquet", **columns)
    memory = fsspec.filesystem("memory")
    memory.pipe("/lossray-test/data/a.parquet", (tmp_path / "data.parquet").read_bytes())
    try:
        remote = read(None, "memory://lossray-test/data", features=["x"])
    finally:
        memory.rm("/lossray-test", recursive=True)
    assert remote.fingerprint == read(tmp_path, features=["x"]).fingerprint


def test_an_absolute_path_ignores_the_base(tmp_path):
    write(tmp_path / "data.parquet", x=np.arange(20.0), y=np.arange(20) % 2)
    assert read(Path("/nowhere"), str(tmp_path / "data.parquet"), features=["x"]).input_shape == (1,)


GOOD = {"x": np.arange(12.0), "y": np.arange(12) % 2}


@pytest.mark.parametrize(
    ("columns", "table", "parts"),
    [
        ({}, {"features": ["xx"]}, ["data.parquet has no", "'xx'", "did you mean 'x'?"]),
        ({"label": GOOD["y"]}, {"features": ["x"], "label": "lable"}, ["'lable'", "did you mean 'label'?"]),
        ({"x": pa.array([0.0] * 5 + [None] * 7)}, {}, ["column 'x'", "7 nulls", "row 5"]),
        (
            {"x": np.array([0.0] * 4 + [np.nan] + [np.inf] * 7)},
            {},
            ["column 'x'", "not finite in 8", "row 4"],
        ),
        ({"x": ["a"] * 12}, {}, ["column 'x'", "string", "expected numbers"]),
        ({"x": pa.array([[1.0, 2.0]] * 3 + [[1.0]] * 9)}, {}, ["lists of 2 values, but 1 in row 3"]),
        ({"x": pa.array([[1.0, 2.0]] * 3 + [[1.0, None]] * 9)}, {}, ["null in row 3"]),
        ({"x": pa.array([[1.0, 2.0]] * 3 + [None] * 9)}, {}, ["9 nulls", "row 3"]),
        ({"x": pa.array([[]] * 12, pa.list_(pa.float64()))}, {}, ["empty lists"]),
        ({"x": pa.array([["a"]] * 12)}, {}, ["list<", "expected numbers"]),
        ({"y": pa.array([0, None] * 6)}, {}, ["column 'y'", "6 nulls", "row 1"]),
        ({"y": np.array([0.5] * 11 + [np.nan])}, {}, ["column 'y'", "not finite", "row 11"]),
        ({"y": pa.array([b"a"] * 12)}, {}, ["column 'y'", "binary", "expected integers or strings"]),
        ({"y": [1] * 12}, {}, ["all 12 examples are of one class"]),
        ({"x": [0.0] * 2, "y": [0, 1]}, {}, ["2 examples are too few", "is empty"]),
        ({"x": np.zeros(0), "y": np.zeros(0, dtype=np.int64)}, {}, ["has no rows"]),
        ({}, {"image": "x", "features": None}, ["column 'x'", "double", "expected struct<bytes, path>"]),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, table, parts):
    write(tmp_path / "data.parquet", **GOOD | columns)
    with pytest.raises(DataError) as caught:
        read(tmp_path, **{"features": ["x"]} | table)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_wide_table_shows_a_few_of_its_columns(tmp_path):
    write(tmp_path / "data.parquet", y=[0, 1], **{f"pixel{i}": [0.0, 1.0] for i in range(500)})
    with pytest.raises(DataError, match=r"did you mean 'pixel\d+'\? \(481 more not shown\)"):
        read(tmp_path, features=["pixel500"])


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [np.arange(12.0), np.arange(12.0), np.arange(12) % 2]
    pq.write_table(pa.table(columns, names=["x", "x", "y"]), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet has 2 columns named 'x'; allowed: one"):
        read(tmp_path, features=["x"])


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("missing.parquet", "missing.parquet does not exist"),
        ("empty", "holds no file that ends in .parquet"),
        ("text.parquet", "text.parquet cannot be read as Parquet"),
        ("nosuch://bucket/data", "nosuch://bucket/data cannot be opened"),
    ],
)
def test_paths_that_cannot_be_read(tmp_path, path, part):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=part):
        read(tmp_path, path, features=["x"])


@pytest.mark.parametrize(
    ("second", "part"),
    [
        ({"x": np.arange(12.0), "y": ["a", "b"] * 6}, r"b\.parquet: 'y' is <U1"),
        (
            {"x": pa.array([[1.0, 2.0]] * 12), "y": GOOD["y"]},
            r"b\.parquet: 'features' is float64 \[2\] a row",
        ),
    ],
)
def test_files_that_disagree(tmp_path, second, part):
    write(tmp_path / "a.parquet", **GOOD)
    write(tmp_path / "b.parquet", **second)
    with pytest.raises(DataError, match=part):
        read(tmp_path, ".", features=["x"])


# --- parquet: images


def encode(pixels, mode="L"):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).convert(mode).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": "some.png"}


def write_images(path, images, labels=None):
    write(path, image=images, label=labels or [i % 2 for i in range(len(images))])


def read_images(folder, **table):
    return read(folder, label="label", image="image", **table)


def test_gray_images_are_decoded_to_the_unit_interval(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(12, 4, 6))
    write_images(tmp_path / "data.parquet", [encode(image) for image in pixels])
    dataset = read_images(tmp_path)
    assert dataset.input_shape == (1, 4, 6)
    decoded = torch.cat([split.inputs for split in splits(dataset)])[:, 0] * 255
    key = [image.flatten().tolist() for image in decoded.round().long()]
    assert sorted(key) == sorted(image.flatten().tolist() for image in pixels)


def test_colour_images_keep_their_channels_in_front(tmp_path):
    red = np.zeros((5, 3, 3))
    red[..., 0] = 255
    write_images(tmp_path / "data.parquet", [encode(red, "RGB"), encode(red, "P"), encode(red, "RGBA")] * 4)
    inputs = read_images(tmp_path).train.inputs
    assert inputs.shape[1:] == (3, 5, 3)
    assert (inputs[:, 0] == 1).all()
    assert (inputs[:, 1:] == 0).all()


def test_gray_images_among_colour_ones_become_colour(tmp_path):
    gray, colour = encode(np.full((2, 2), 51)), encode(np.full((2, 2, 3), 51), "RGB")
    write_images(tmp_path / "data.parquet", [gray, colour] * 6)
    dataset = read_images(tmp_path)
    assert dataset.input_shape == (3, 2, 2)
    assert (dataset.train.inputs == 0.2).all()


def test_images_of_differing_sizes_name_the_remedy_which_works(tmp_path):
    images = [encode(np.full((4, 6), 102))] * 9 + [encode(np.full((8, 5), 102))] * 3
    write_images(tmp_path / "data.parquet", images)
    with pytest.raises(DataError) as caught:
        read_images(tmp_path)
    assert "4x6 (9 images), 8x5 (3 images)" in str(caught.value)
    assert "image_size = [4, 6]" in str(caught.value)
    dataset = read_images(tmp_path, image_size=[4, 6])
    assert dataset.input_shape == (1, 4, 6)
    assert (dataset.test.inputs == 0.4).all()
    assert read_images(tmp_path, image_size=5).input_shape == (1, 5, 5)


def of_floats():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 6), dtype=np.float32)).save(buffer, format="TIFF")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("image", "part"),
    [
        ({"bytes": b"no image", "path": None}, "row 1 cannot be decoded"),
        ({"bytes": encode(np.zeros((4, 6)))["bytes"][:40], "path": None}, "row 1 cannot be decoded"),
        ({"bytes": None, "path": "elsewhere.png"}, "row 1 has no bytes"),
        (of_floats(), "row 1 is an image of mode 'F'"),
        (None, "1 nulls, first in row 1"),
    ],
)
def test_images_that_cannot_be_used(tmp_path, image, part):
    good = encode(np.zeros((4, 6)))
    write_images(tmp_path / "data.parquet", [good, image, good, good])
    with pytest.raises(DataError, match=f"column 'image'.*{part}"):
        read_images(tmp_path)


# --- package.module:function

MODULE = """
import numpy as np
import torch

def pair(n=20, kind="numpy"):
    inputs, targets = np.arange(2.0 * n).reshape(n, 2), np.arange(n) % 2
    if kind == "torch":
        return torch.from_numpy(inputs).float().requires_grad_(), torch.from_numpy(targets)
    if kind == "list":
        return [inputs.tolist(), targets.tolist()]
    return inputs, targets

def parts(label=0, split_of_label="train", pixel=0.0):
    def part(name, n):
        inputs, targets = np.arange(2.0 * n).reshape(n, 2), np.arange(n) % 2
        if name == split_of_label:
            targets[0], inputs[1, 1] = label, inputs[1, 1] + pixel
        return inputs, targets
    return {"test": part("test", 4), "train": part("train", 8), "validation": part("validation", 6)}

def regression(outputs):
    inputs = np.arange(20.0)[:, None]
    return inputs, inputs[:, 0] if outputs == 1 else np.hstack([inputs] * outputs)

def tokens():
    return np.arange(40).reshape(20, 2), np.arange(20) % 2

X, Y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
BAD = {
    "lengths": (X, Y[:19]),
    "empty": (X[:0], Y[:0]),
    "strings": (np.array([["a"]] * 20), Y),
    "nan": (np.where(X == 6, np.nan, X), Y),
    "complex": (X, Y * 1j),
    "flat": (X[:, 0], Y),
    "negative": (X, Y - 1),
    "ids": (X, Y * 1000),
    "ragged": ([[1.0], [1.0, 2.0]], [0, 1]),
    "one_class": (X, Y * 0),
    "triple": (X, Y, Y),
    "nothing": None,
    "two_splits": {"train": (X, Y), "test": (X, Y)},
    "shapes": {"train": (X, Y), "validation": (X[:, :1], Y), "test": (X, Y)},
    "kinds": {"train": (X, Y), "validation": (X, Y), "test": (X, Y * 0.5)},
}

def bad(name):
    return BAD[name]

def fails():
    return 1 / 0

def leaves():
    raise SystemExit(3)

def sparse():
    return torch.from_numpy(X).to_sparse(), torch.from_numpy(Y)

def large():
    return X, 1e300 * X[:, :1]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "lossray_test_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("lossray_test_data", None)


@pytest.mark.usefixtures("module")
class TestFunction:
    def load(self, function, *, standardise="none", **arguments):
        return load(source=f"lossray_test_data:{function}", standardise=standardise, **arguments)

    @pytest.mark.parametrize("kind", ["numpy", "torch", "list"])
    def test_a_pair_is_split_here_and_keys_reach_the_function(self, kind):
        dataset = self.load("pair", n=40, kind=kind)
        assert [len(split.targets) for split in splits(dataset)] == [28, 6, 6]
        assert joined(dataset) == {(2.0 * i, i % 2) for i in range(40)}
        assert not dataset.train.inputs.requires_grad

    def test_a_sparse_tensor_is_taken_as_a_dense_one(self):
        assert joined(self.load("sparse")) == joined(self.load("pair"))

    def test_exit_is_an_error_like_any_other(self):
        with pytest.raises(DataError, match="lossray_test_data:leaves raised SystemExit: 3"):
            self.load("leaves")

    def test_numbers_that_the_dtype_cannot_hold_are_refused(self):
        assert self.load("large").n_outputs == 1
        with pytest.raises(DataError, match=r"large: targets of up to 3\.8e\+301 do not fit torch\.float32"):
            self.load("large", dtype=torch.float32)

    def test_a_mapping_is_taken_as_it_is(self):
        dataset = self.load("parts")
        assert [len(split.targets) for split in splits(dataset)] == [8, 6, 4]
        assert torch.equal(dataset.train.inputs, torch.arange(16.0, dtype=torch.float64).reshape(8, 2))

    @pytest.mark.parametrize("outputs", [1, 3])
    def test_float_targets_are_regression(self, outputs):
        dataset = self.load("regression", outputs=outputs)
        assert dataset.n_outputs == outputs
        assert dataset.test.targets.shape == ((3,) if outputs == 1 else (3, outputs))

    def test_integers_stay_integers_without_standardisation_only(self):
        assert self.load("tokens").train.inputs.dtype == torch.int64
        with pytest.raises(
            DataError, match=r"integers.*'feature'.*return floats, or set standardise = 'none'"
        ):
            self.load("tokens", standardise="feature")

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("lengths", "20 inputs, but 19 targets"),
            ("empty", "inputs are empty"),
            ("strings", "inputs have dtype <U1"),
            ("nan", "inputs are not finite in 1 of 20 examples, first in example 3"),
            ("complex", "targets have dtype complex128"),
            ("flat", r"inputs are float64 \[20\]; expected \[N, ...\]"),
            ("negative", "from -1 to 0; expected class ids"),
            ("ids", "class ids go up to 1000 in 20 examples"),
            ("ragged", "inputs are ragged"),
            ("one_class", "all 20 examples are of one class"),
            ("triple", "returned tuple"),
            ("nothing", "returned NoneType"),
            ("two_splits", "mapping of 'train', 'test'; expected 'train', 'validation', 'test'"),
            ("shapes", r"validation inputs are float64 \[20, 1\], train inputs float64 \[20, 2\]"),
            ("kinds", r"test targets are float64 \[20\], train targets int64 \[20\]"),
        ],
    )
    def test_what_it_returns_is_checked(self, name, part):
        with pytest.raises(DataError, match=part):
            self.load("bad", name=name)

    def test_a_key_it_does_not_take_names_the_nearest(self):
        with pytest.raises(DataError, match="found 'knd'; allowed: n, kind; did you mean 'kind'"):
            self.load("pair", knd="list")

    def test_a_key_it_needs_is_missed(self):
        with pytest.raises(DataError, match="missing a required argument: 'outputs'"):
            self.load("regression")

    def test_what_it_raises_is_one_line_with_the_place(self):
        with pytest.raises(
            DataError, match=r"lossray_test_data:fails raised ZeroDivisionError: .*data.py:\d+"
        ):
            self.load("fails")
