"""A spectrum as tables: rows of `eigenvalues`, `density` and `curvature` in a store of spectra."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lossray.curvature.analysis import MemberAnalysis
from lossray.errors import StoreError
from lossray.settings import content_hash
from lossray.storage.publish import publish_tables
from lossray.storage.store import Store
from lossray.training.datasets import Dataset, analysis_fingerprint, analysis_set
from tasks.record import Stopwatch

Row = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """What a spectrum was computed from."""

    request: Mapping[str, Any]  # JSON-compatible; with "model", "operator" and "dtype"
    model: nn.Module
    data: Dataset
    examples: int | Literal["all"]


def open_store(out: str) -> Store:
    """A store that is new, or holds other spectra.

    Raises:
        StoreError: it holds something else.
    """
    store = Store(out)
    if store.exists("manifest.json") or store.paths("recorded"):
        raise StoreError(f"--out {store.url}: is the store of a study; allowed: a folder for spectra alone")
    if not store.committed_keys() and (strangers := store.paths()):
        raise StoreError(
            f"--out {store.url}: found other files, such as {strangers[0]}; allowed: a new folder"
        )
    return store


def publish(store: Store, watch: Stopwatch, origin: Origin, analysis: MemberAnalysis, mode: str) -> None:
    """Write the rows, under a run that is named by the model and the content of all that was analysed."""
    request = origin.request
    content = {**request, "weights": _weights_hash(origin.model), "data": origin.data.fingerprint}
    key = content_hash({"kind": "spectrum", **content})
    run_id = f"{request['model'].rpartition(':')[2]}-{key[:8]}"
    own = {"run_id": run_id, "step": 0, "operator": request["operator"], "block": "all"}
    settings = {
        "n_examples": len(analysis_set(origin.data, origin.examples).targets),
        "data_fingerprint": analysis_fingerprint(origin.data, origin.examples),
        "product_mode": mode,
        "dtype": request["dtype"],
    }
    for name, rows in {
        "eigenvalues": _eigenvalue_rows(analysis),
        "density": _density_rows(analysis),
        "curvature": [_curvature_row(analysis) | settings],
    }.items():
        store.publish(name, key, [own | row for row in rows])
    store.commit(watch.record(key, "curvature", step=0) | {"run_id": run_id})
    publish_tables(store)


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _eigenvalue_rows(analysis: MemberAnalysis) -> list[Row]:
    rows: list[Row] = []
    for end, pairs in (("largest", analysis.pairs), ("smallest", analysis.smallest)):
        for i in range(len(pairs)):
            gap = float(pairs.gaps[i])
            rows.append(
                {
                    "end": end,
                    "index": i,
                    "eigenvalue": float(pairs.values[i]),
                    "residual": float(pairs.residuals[i]),
                    "converged": bool(pairs.converged[i]),
                    "gap": gap if math.isfinite(gap) else None,
                    "ipr": float(analysis.ipr[i]) if end == "largest" else None,
                    "product_error": analysis.product_error if (end, i) == ("largest", 0) else None,
                }
            )
    return rows


def _density_rows(analysis: MemberAnalysis) -> list[Row]:
    nodes, weights = analysis.density.nodes.tolist(), analysis.density.weights.tolist()
    return [
        {"probe": probe, "index": index, "node": node, "weight": weight}
        for probe, pairs in enumerate(map(zip, nodes, weights))
        for index, (node, weight) in enumerate(pairs)
        if weight > 0  # padding has none
    ]


def _curvature_row(analysis: MemberAnalysis) -> Row:
    estimates = {
        "trace": analysis.trace,
        "frobenius_norm": analysis.frobenius,
        "negative_mass": analysis.negative_mass,
        "participation": analysis.participation,
        "effective_dimension": analysis.effective_dimension,
    }
    return {
        "lambda_max": float(analysis.pairs.values[0]),
        "lambda_min": float(analysis.smallest.values[0]),
        "confirmed": analysis.pairs.confirmed,
        **{name: estimate.value for name, estimate in estimates.items()},
        **{f"{name}_stderr": estimate.stderr for name, estimate in estimates.items()},
        "effective_dimension_regulariser": analysis.regulariser,
        "matvecs": analysis.matvecs,
        "orthogonality_loss": analysis.pairs.orthogonality_loss,
        "dim": len(analysis.gradient),
        "loss": analysis.loss,
        "gradient_norm": analysis.gradient_norm,
        "reg_included": False,
    }
