"""The file of a pack's eigenvectors at one step: what comes back, and what is refused."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from lossray.errors import StoreError
from lossray.geometry.vectors import FIELDS, dumps, loads
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage.store import VECTORS_FORMAT

PLACE = "vectors/p/20.safetensors"
NAMES = [
    ("hessian", "all", "largest"),
    ("hessian", "all", "smallest"),
    ("ggn", "layer/0.weight", "largest"),
    ("hessian@adaptive", "all", "largest"),
]


def pairs(seed=0, *, members=2, k=3, dim=7):
    """Every dtype and value that an analysis gives; the second member is dead."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        found = torch.randn(members, *shape, dtype=torch.float64, generator=generator)
        found[1] = torch.nan
        return found

    return PackedEigenPairs(
        values=numbers(k),
        vectors=numbers(k, dim),
        residuals=numbers(k).abs(),
        converged=torch.tensor([[True, True, False], [False] * 3]),
        confirmed=torch.tensor([True, False]),
        gaps=numbers(k),
        complement=torch.tensor([-torch.inf, torch.nan], dtype=torch.float64),
        scale=numbers(),
        matvecs=torch.tensor([70, 0]),
        orthogonality_loss=numbers(),
    )


SPECTRA = {name: pairs(seed) for seed, name in enumerate(NAMES)}
DATA = dumps(SPECTRA, key="k1")


def test_everything_comes_back_to_the_bit_and_vectors_with_the_rounding_of_float32():
    found = loads(DATA, key="k1")
    assert list(found) == NAMES
    for name, expected in SPECTRA.items():
        for field in FIELDS:
            before, after = getattr(expected, field), getattr(found[name], field)
            assert after.dtype == before.dtype
            wanted = before.float().double() if field == "vectors" else before
            assert after.numpy().tobytes() == wanted.numpy().tobytes(), field


def test_the_keys_in_the_file_are_those_that_are_documented():
    stored = safetensors.torch.load(DATA)
    assert set(stored) == {f"{'/'.join(name)}/{field}" for name in NAMES for field in FIELDS}
    assert stored["hessian/all/largest/vectors"].dtype == torch.float32
    assert stored["hessian/all/largest/values"].dtype == torch.float64


def test_equal_eigenpairs_give_equal_files():
    assert all(dumps(SPECTRA, key="k1") == DATA for _ in range(5))


def test_views_of_one_tensor_are_saved_as_they_are():
    whole = torch.randn(2, 3, 14, dtype=torch.float64)
    spectra = {
        ("hessian", block, "largest"): dataclasses.replace(pairs(), vectors=whole[:, :, part])
        for block, part in (("a", slice(0, 7)), ("b", slice(7, 14)))
    }
    found = loads(dumps(spectra, key="k"), key="k")
    assert found["hessian", "b", "largest"].vectors.equal(whole[:, :, 7:].float().double())


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_damaged_file_is_named_with_its_remedy(cut):
    with pytest.raises(StoreError, match=rf"{PLACE} is damaged: .*; delete it and run the study again"):
        loads(DATA[:cut], key="k1", name=PLACE)


def test_a_file_that_lacks_a_tensor_is_named():
    tensors = safetensors.torch.load(DATA)
    del tensors["hessian/all/smallest/gaps"]
    length = int.from_bytes(DATA[:8], "little")
    metadata = json.loads(DATA[8 : 8 + length])["__metadata__"]
    with pytest.raises(
        StoreError, match=rf"{PLACE} is damaged: 'hessian/all/smallest/gaps' is missing; delete it"
    ):
        loads(safetensors.torch.save(tensors, metadata=metadata), key="k1", name=PLACE)


def test_the_result_of_another_task_is_refused():
    with pytest.raises(StoreError, match=rf"{PLACE} is the result of task k1, not of k2; delete it"):
        loads(DATA, key="k2", name=PLACE)


def test_a_foreign_file_is_named():
    for data in (
        safetensors.torch.save({"hessian": torch.ones(2)}),  # without a header
        safetensors.torch.save({"w": torch.ones(2)}, metadata={"lossray": '{"format": "checkpoint/1"}'}),
    ):
        with pytest.raises(
            StoreError, match=rf"{PLACE} is no lossray eigenpairs file: .*not {VECTORS_FORMAT}; delete"
        ):
            loads(data, key="k1", name=PLACE)
