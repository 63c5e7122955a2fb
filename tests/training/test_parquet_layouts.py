"""Layouts of Parquet data that people have: each is read, or refused with file, column and type."""

import io
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lossray.errors import DataError
from lossray.training.data_settings import data_settings
from lossray.training.datasets import load_dataset

N = 24
RNG = np.random.default_rng(11)
X = RNG.standard_normal((N, 6)).round(3)
Y = np.arange(N) % 3


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def read(folder, path="a.parquet", *, label="y", standardise="none", **table):
    settings = data_settings(
        {"source": "parquet", "path": path, "label": label, "standardise": standardise, **table}
    )
    return load_dataset(settings, dtype=torch.float64, base=folder)


def refused(folder, *parts, **table):
    with pytest.raises(DataError) as caught:
        read(folder, **table)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def rows(dataset):
    """All examples as {inputs: target}, whatever split they are in."""
    splits = (dataset.train, dataset.validation, dataset.test)
    inputs, targets = (
        torch.cat([getattr(split, kind) for split in splits]) for kind in ("inputs", "targets")
    )
    pairs = zip(inputs.flatten(1).tolist(), targets.tolist(), strict=True)
    return {tuple(np.round(values, 6)): target for values, target in pairs}


def expected(values, targets=Y):
    flat = np.asarray(values, dtype=float).reshape(N, -1).round(6).tolist()
    return {tuple(own): target for own, target in zip(flat, np.asarray(targets).tolist(), strict=True)}


# --- columns of numbers


@pytest.mark.parametrize(
    ("column", "shape"),
    [
        (pa.FixedShapeTensorArray.from_numpy_ndarray(X.reshape(N, 2, 3)), (2, 3)),
        (pa.array(X.reshape(N, 3, 2).tolist()), (3, 2)),
        (
            pa.array(X.reshape(N, 1, 3, 2).tolist(), pa.large_list(pa.list_(pa.list_(pa.float64(), 2)))),
            (1, 3, 2),
        ),
        (pa.array(X.tolist(), pa.list_(pa.float64(), 6)), (6,)),
        (pa.array(X.tolist(), pa.list_view(pa.float64())), (6,)),
    ],
)
def test_one_column_of_tensors_keeps_its_shape(tmp_path, column, shape):
    write(tmp_path / "a.parquet", x=column, z=X[:, 0], y=Y)
    dataset = read(tmp_path, features=["x"])
    assert dataset.input_shape == shape
    assert rows(dataset) == expected(X)
    assert read(tmp_path, features=["x", "z"]).input_shape == (7,)


def test_a_permuted_tensor_is_read_as_it_is_meant(tmp_path):
    values = X.reshape(N, 2, 3)
    stored = np.ascontiguousarray(values.transpose(0, 2, 1))
    kind = pa.fixed_shape_tensor(pa.float64(), (3, 2), permutation=[1, 0])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), 6)
    write(tmp_path / "a.parquet", x=pa.ExtensionArray.from_storage(kind, storage), y=Y)
    dataset = read(tmp_path, features=["x"])
    assert dataset.input_shape == (2, 3)
    assert rows(dataset) == expected(values)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([Decimal(f"{value:.3f}") for value in X[:, 0]]),
        pa.array([Decimal(f"{value:.3f}") for value in X[:, 0]], pa.decimal256(60, 5)),
        pa.array(X[:, 0].astype(np.float16).astype(np.float64)),
    ],
)
def test_decimals_are_numbers(tmp_path, column):
    write(tmp_path / "a.parquet", x=column, y=Y)
    assert rows(read(tmp_path, features=["x"])) == expected(np.array(column.cast(pa.float64())))


def test_unsigned_integers_are_numbers(tmp_path):
    values = np.arange(N, dtype=np.uint64) + 2**63
    write(tmp_path / "a.parquet", x=values, y=Y)
    assert rows(read(tmp_path, features=["x"])).keys() == expected(values.astype(float)).keys()


def test_a_pattern_takes_columns_in_the_order_of_the_file(tmp_path):
    names = [f"x{i}" for i in (0, 1, 2, 10, 11, 3)]
    write(tmp_path / "p" / "a.parquet", xy=Y, other=X[:, 0], **dict(zip(names, X.T, strict=True)))
    reordered = {name: X[:, names.index(name)] + 1 for name in sorted(names)}
    write(tmp_path / "p" / "b.parquet", **reordered, xy=Y, other=X[:, 0])
    found = rows(read(tmp_path, "p", features=["x*"], label="xy"))
    assert found == expected(X) | expected(X + 1)
    assert rows(read(tmp_path, "p/a.*", features=["x1?", "x[0-2]"], label="xy")) == expected(
        X[:, [3, 4, 0, 1, 2]]
    )
    refused(tmp_path, "a.parquet", "'z*'", path="p", features=["z*"], label="xy")


def test_a_pattern_leaves_the_index_of_pandas_out(tmp_path):
    frame = pd.DataFrame(X, columns=list("abcdef")).assign(y=Y)
    frame.set_index("c").to_parquet(tmp_path / "a.parquet")
    assert rows(read(tmp_path, features=["*"])) == expected(X[:, [0, 1, 3, 4, 5]])
    assert rows(read(tmp_path, features=["c", "a"])) == expected(X[:, [2, 0]])


def test_fields_of_structs_are_columns(tmp_path):
    column = pa.array(
        [{"u": float(a), "v": {"w": float(b), "y": int(c)}} for a, b, c in zip(*X.T[:2], Y, strict=True)]
    )
    write(tmp_path / "a.parquet", s=column)
    assert rows(read(tmp_path, features=["s.v.w", "s.u"], label="s.v.y")) == expected(X[:, [1, 0]])
    refused(tmp_path, "'s.v.x'", "did you mean 's.v.", features=["s.v.x"], label="s.v.y")
    refused(tmp_path, "column 's'", "struct<u: double", "COLUMN.u", features=["s"], label="s.v.y")


def test_a_struct_that_is_null_names_its_row(tmp_path):
    column = pa.array([{"u": 1.0}] * 5 + [None] + [{"u": 2.0}] * (N - 6))
    write(tmp_path / "a.parquet", s=column, y=Y)
    refused(tmp_path, "column 's.u'", "1 nulls, first in row 5", features=["s.u"])


@pytest.mark.parametrize(
    ("column", "parts"),
    [
        (pd.date_range("2021", periods=N), ["timestamp", "such as seconds"]),
        (["u", "v", "w"] * 8, ["is string", "columns of 0 and 1"]),
        (pa.array(["u", "v", "w"] * 8).dictionary_encode(), ["dictionary<", "columns of 0 and 1"]),
        (pa.array([[[1.0, 2.0]]] * 7 + [[[1.0, None]]] * 17), ["null in row 7"]),
        (pa.array([[[1.0, 2.0]]] * 7 + [[[1.0]]] * 17), ["lists of 2 values, but 1 in row 7"]),
        (pa.array([[[1.0], [2.0]]] * 4 + [[[1.0], None]] * 20), ["null in row 4"]),
        (pa.array([b"a"] * N), ["is binary"]),
        (pa.array([[("k", 1.0)]] * N, pa.map_(pa.string(), pa.float64())), ["is map<"]),
    ],
)
def test_columns_that_are_no_numbers_say_their_type(tmp_path, column, parts):
    write(tmp_path / "a.parquet", x=column, y=Y)
    refused(tmp_path, "a.parquet: column 'x'", *parts, features=["x"])


# --- labels


@pytest.mark.parametrize(
    ("column", "targets"),
    [
        (pa.array(np.array(["b", "c", "a"])[Y], pa.string_view()), np.array([1, 2, 0])[Y]),
        (
            pa.array(np.array(["b", "c", "a"])[Y], pa.large_string()).dictionary_encode(),
            np.array([1, 2, 0])[Y],
        ),
        (pa.array(np.array([2**63 + 9, 3, 2**64 - 1], dtype=np.uint64)[Y]), np.array([1, 0, 2])[Y]),
        (
            pa.array([Decimal(int(v)) for v in np.array([7, -2, 4])[Y]], pa.decimal128(10, 0)),
            np.array([2, 0, 1])[Y],
        ),
        (pa.array([Decimal(int(v)) / 4 for v in Y], pa.decimal128(10, 2)), Y / 4),
        (Y.astype(float), Y.astype(float)),
        (pa.array(np.eye(3)[Y].tolist()), np.eye(3)[Y]),
        (pa.array(X[:, :2].tolist()), X[:, :2]),
        (pa.array(np.stack([Y, 2 - Y], axis=1).tolist()), np.stack([Y, 2 - Y], axis=1)),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(X.reshape(N, 2, 3)), X.reshape(N, 2, 3)),
    ],
)
def test_labels(tmp_path, column, targets):
    write(tmp_path / "a.parquet", x=X[:, 0], label=column)
    dataset = read(tmp_path, features=["x"], label="label")
    assert dataset.train.targets.shape[1:] == targets.shape[1:]
    assert dataset.train.targets.is_floating_point() == (targets.dtype.kind == "f")
    assert rows(dataset) == expected(X[:, 0], targets)


def test_several_label_columns_are_targets_side_by_side(tmp_path):
    write(tmp_path / "a.parquet", x=X[:, 0], u=X[:, 1], v=Y, w=["s"] * N)
    mixed = read(tmp_path, features=["x"], label=["u", "v"])
    assert rows(mixed) == expected(X[:, 0], np.stack([X[:, 1], Y], axis=1))
    assert mixed.n_outputs == 2
    assert read(tmp_path, features=["x"], label=["v"]).train.targets.dtype == torch.int64
    refused(tmp_path, "column 'w' is string", "one number a row", features=["x"], label=["u", "w"])


@pytest.mark.parametrize(
    ("column", "part"),
    [
        (pa.array([{"u": int(v)} for v in Y]), "struct<u: int64>"),
        (pd.date_range("2021", periods=N), "timestamp"),
        (pa.array([0.0] * 9 + [None] * 15), "15 nulls, first in row 9"),
    ],
)
def test_labels_that_are_none_say_their_type(tmp_path, column, part):
    write(tmp_path / "a.parquet", x=X[:, 0], y=column)
    refused(tmp_path, "a.parquet: column 'y'", part, features=["x"])


def test_integers_that_pandas_made_floats_in_one_file_are_classes(tmp_path):
    write(tmp_path / "p" / "a.parquet", x=X[:9, 0], y=Y[:9].astype(float))
    write(tmp_path / "p" / "b.parquet", x=X[9:, 0], y=Y[9:])
    assert rows(read(tmp_path, "p", features=["x"])) == expected(X[:, 0])
    write(tmp_path / "p" / "a.parquet", x=X[:9, 0], y=Y[:9] + 0.5)
    refused(tmp_path, "b.parquet: 'y' is int64", "float64 [] in", "a.parquet", path="p", features=["x"])


# --- files and folders


def test_names_of_hive_folders_are_columns(tmp_path):
    for y in range(3):
        for z in ("0.5", "2"):
            own = (y == Y) & ((np.arange(N) % 2 == 0) == (z == "2"))
            write(tmp_path / "hive" / f"y={y}" / f"z={z}" / "part.parquet", x=X[own, 0])
    table = {"path": "hive", "features": ["z", "x"]}
    z = np.where(np.arange(N) % 2 == 0, 2, 0.5)
    assert rows(read(tmp_path, **table)) == expected(np.stack([z, X[:, 0]], axis=1))
    assert rows(read(tmp_path, "hive/y=*/z=2/*.parquet", features=["x"])) == {
        key: value for i, (key, value) in enumerate(expected(X[:, 0]).items()) if i % 2 == 0
    }


def test_hive_folders_of_words_are_classes(tmp_path):
    for word, y in (("test", 1), ("a b", 0), ("train", 2)):  # a class may be called like a split
        write(tmp_path / "hive" / f"y={word.replace(' ', '%20')}" / "part.parquet", x=X[y == Y, 0])
    dataset = read(tmp_path, "hive", features=["x"])
    assert rows(dataset) == expected(X[:, 0])
    assert len(dataset.train.targets) == 17  # divided by the settings


def test_a_folder_without_a_value_is_named(tmp_path):
    write(tmp_path / "hive" / "y=1" / "part.parquet", x=X[:, 0])
    write(tmp_path / "hive" / "y=__HIVE_DEFAULT_PARTITION__" / "part.parquet", x=X[:, 0])
    refused(tmp_path, "y=__HIVE_DEFAULT_PARTITION__/part.parquet: column 'y'", path="hive", features=["x"])


SPLIT = {"train": slice(0, 12), "validation": slice(12, 18), "test": slice(18, 24)}


@pytest.mark.parametrize(
    "names",
    [
        {
            "train": "train-00000-of-00001",
            "validation": "validation-00000-of-00001",
            "test": "test-00000-of-00001",
        },
        {"train": "train/0", "validation": "val/0", "test": "test/0"},
        {"train": "mnist_training", "validation": "mnist_dev", "test": "mnist_eval"},
        {"train": "split=train/0", "validation": "split=valid/0", "test": "split=test/0"},
    ],
)
def test_files_named_after_splits_keep_them(tmp_path, names):
    for split, name in names.items():
        write(
            tmp_path / "d" / f"{name}.parquet",
            x=X[SPLIT[split], 0],
            y=np.array(["u", "v", "w"])[Y[SPLIT[split]]],
        )
    dataset = read(tmp_path, "d", features=["x"])
    for split, own in SPLIT.items():
        assert getattr(dataset, split).inputs[:, 0].tolist() == X[own, 0].tolist()
        assert getattr(dataset, split).targets.tolist() == Y[own].tolist()


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_a_split_without_files_comes_from_the_training_files(tmp_path, missing):
    for split, own in SPLIT.items():
        if split != missing:
            write(tmp_path / "d" / f"{split}.parquet", x=X[own, 0], y=Y[own])
    dataset = read(tmp_path, "d", features=["x"], split=[0.5, 0.25, 0.25])
    kept = "test" if missing == "validation" else "validation"
    assert getattr(dataset, kept).inputs[:, 0].tolist() == X[SPLIT[kept], 0].tolist()
    assert (len(dataset.train.targets), len(getattr(dataset, missing).targets)) == (8, 4)
    taken = torch.cat([dataset.train.inputs, getattr(dataset, missing).inputs])[:, 0]
    assert sorted(taken.tolist()) == sorted(X[:12, 0].tolist())


def test_files_of_one_split_are_divided_as_any(tmp_path):
    write(tmp_path / "d" / "train-0.parquet", x=X[:9, 0], y=Y[:9])
    write(tmp_path / "d" / "train-1.parquet", x=X[9:, 0], y=Y[9:])
    write(tmp_path / "a.parquet", x=X[:, 0], y=Y)
    parts, whole = read(tmp_path, "d", features=["x"]), read(tmp_path, features=["x"])
    assert parts.fingerprint == whole.fingerprint
    assert read(tmp_path, "d/train-[01].parquet", features=["x"]).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"train": Y, "other": Y}, ["other.parquet belongs to no split", "train.parquet is 'train'"]),
        ({"validation": Y, "test": Y}, ["no file is of the training split"]),
        ({"train": Y, "test": Y * 0 - 1}, ["test files hold no label that the training files have"]),
    ],
)
def test_splits_that_cannot_be_meant(tmp_path, files, parts):
    for name, labels in files.items():
        write(tmp_path / "d" / f"{name}.parquet", x=X[:, 0], y=labels)
    refused(tmp_path, *parts, path="d", features=["x"])


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("d/none-*.parquet", "none-*.parquet matches nothing"),
        ("hf://datasets/some/thing/train.parquet", "download it first"),
    ],
)
def test_paths(tmp_path, path, part):
    refused(tmp_path, part, path=path, features=["x"])


# --- images


def png(pixels, mode=None, form="PNG"):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format=form)
    return buffer.getvalue()


GRAY = RNG.integers(0, 256, (N, 5, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (N, 5, 4), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (N, 5, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([png(own) for own in GRAY]),
        pa.array([png(own) for own in GRAY], pa.large_binary()),
        pa.array([[{"bytes": png(own), "path": None}] for own in GRAY]),
        pa.array([[png(own)] for own in GRAY]),
        pa.array(GRAY.tolist(), pa.list_(pa.list_(pa.uint8()))),
        pa.FixedShapeTensorArray.from_numpy_ndarray(GRAY),
        pa.FixedShapeTensorArray.from_numpy_ndarray(GRAY.reshape(N, 1, 5, 4)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(GRAY.reshape(N, 5, 4, 1)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(GRAY / 255),
    ],
)
def test_gray_images_of_every_layout_are_the_same(tmp_path, column):
    write(tmp_path / "a.parquet", image=column, y=Y)
    dataset = read(tmp_path, image="image")
    assert dataset.input_shape == (1, 5, 4)
    assert rows(dataset) == expected(GRAY / 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_gray_of_16_bits_is_scaled_by_its_range(tmp_path, form):
    write(tmp_path / "a.parquet", image=pa.array([png(own, form=form) for own in DEEP]), y=Y)
    assert rows(read(tmp_path, image="image")) == expected(DEEP / 65535)
    flat = pa.array([png(np.full((6, 8), 13107, dtype=np.uint16), form=form)] * N)
    write(tmp_path / "a.parquet", image=flat, y=Y)
    inputs = read(tmp_path, image="image", image_size=[3, 4]).train.inputs
    assert inputs.shape[1:] == (1, 3, 4)
    assert (inputs == 0.2).all()


def test_modes_may_be_mixed(tmp_path):
    images = [png(GRAY[0]), png(DEEP[1]), png(COLOUR[2]), png(COLOUR[3], "RGBA")] * 6
    write(tmp_path / "a.parquet", image=pa.array(images), y=np.arange(N) % 4)
    found = {
        target: np.array(key).reshape(3, 5, 4) for key, target in rows(read(tmp_path, image="image")).items()
    }
    wanted = [
        GRAY[0] / 255,
        DEEP[1] / 65535,
        COLOUR[2].transpose(2, 0, 1) / 255,
        COLOUR[3].transpose(2, 0, 1) / 255,
    ]
    for target, values in enumerate(wanted):
        np.testing.assert_allclose(found[target], np.broadcast_to(values, (3, 5, 4)), atol=1e-6)


@pytest.mark.parametrize(
    ("column", "table", "parts"),
    [
        ([[png(GRAY[0])] * 2] * N, {}, ["2 images in row 0", "one image a row"]),
        ([[png(GRAY[0])]] * 3 + [[]] * 21, {}, ["0 images in row 3"]),
        (pa.array(GRAY.astype(int).tolist()), {}, ["list<element: list<element: int64>>", "uint8, uint16"]),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(GRAY[:, None, None]), {}, ["arrays [1, 1, 5, 4]"]),
        (
            pa.FixedShapeTensorArray.from_numpy_ndarray(GRAY),
            {"image_size": 3},
            ["resizes encoded images only"],
        ),
        (["name.png"] * N, {}, ["string", "expected struct<bytes, path>"]),
        ([png(GRAY[0])] * 5 + [None] * 19, {}, ["19 nulls, first in row 5"]),
    ],
)
def test_images_that_cannot_be_read_say_their_type(tmp_path, column, table, parts):
    write(tmp_path / "a.parquet", image=column, y=Y)
    refused(tmp_path, "a.parquet: column 'image'", *parts, image="image", **table)
