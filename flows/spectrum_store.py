"""A spectrum as tables: rows of `eigenvalues`, `density` and `curvature` in a store of spectra."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lossray.errors import StoreError
from lossray.measures.checkpoint_spectra import curvature_rows, density_rows, eigenvalue_rows
from lossray.operators.transforms import PointOperator
from lossray.settings import content_hash
from lossray.spectra.analysis import PackedAnalysis
from lossray.storage.publish import publish_tables
from lossray.storage.store import Store
from lossray.study import versions_of
from lossray.training.datasets import Dataset, analysis_fingerprint, analysis_set
from tasks.commit_record import Stopwatch


@dataclass(frozen=True)
class Origin:
    """What a spectrum was computed from.

    Attributes:
        request: JSON-compatible, with "model", "operator" and "dtype".
        model: with its weights.
        data: of which the examples are taken.
        examples: number of those that were analysed.
    """

    request: Mapping[str, Any]
    model: nn.Module
    data: Dataset
    examples: int | Literal["all"]


def open_store(out: str) -> Store:
    """A store that is new, or holds other spectra.

    Raises:
        StoreError: it holds something else.
    """
    store = Store(out)
    try:
        of_a_study = store.exists("manifest.json") or store.paths("recorded")
    except OSError as error:
        raise StoreError(f"--out {store.url}: cannot be a store: {error.strerror}") from error
    if of_a_study:
        raise StoreError(f"--out {store.url}: is the store of a study; allowed: a folder for spectra alone")
    if not store.committed_keys() and (strangers := store.paths()):
        raise StoreError(
            f"--out {store.url}: found other files, such as {strangers[0]}; allowed: a new folder"
        )
    return store


def publish(
    store: Store, watch: Stopwatch, origin: Origin, analysis: PackedAnalysis, operator: PointOperator
) -> None:
    """Write the rows, under a run that is named by the model and the content of all that was analysed."""
    request = origin.request
    content = {**request, "weights": _weights_hash(origin.model), "data": origin.data.fingerprint}
    # With the versions of its numbers: those of another lossray stand beside, under another run.
    key = content_hash({"kind": "spectrum", "versions": versions_of("curvature"), **content})
    run_id = f"{request['model'].rpartition(':')[2]}-{key[:8]}"
    columns = {"run_id": run_id, "step": 0, "operator": request["operator"], "block": "all"}
    settings = {
        "n_examples": len(analysis_set(origin.data, origin.examples).targets),
        "data_fingerprint": analysis_fingerprint(origin.data, origin.examples),
        "dtype": request["dtype"],
    }
    store.publish("eigenvalues", key, eigenvalue_rows([columns], analysis))
    store.publish("density", key, density_rows([columns], analysis))
    store.publish("curvature", key, curvature_rows([columns], analysis, operator, settings))
    store.commit(watch.record(key, "curvature", step=0) | {"run_id": run_id})
    publish_tables(store)


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
