"""``lossray spectrum``: the curvature of one's own model at one point, printed, and as tables."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from torch import nn

from flows.spectrum_store import Origin, open_store, publish
from lossray.errors import DataError, ModelError, StudyError
from lossray.names import unknown_name
from lossray.networks.functional import call_model
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.nests import described, rows
from lossray.networks.settings import model_settings
from lossray.networks.weights import load_weights
from lossray.operators.example_mean import require_example_mean
from lossray.operators.modules import ModuleObjective
from lossray.operators.packed import PackedFisher, PackedGaussNewton, PackedHessian
from lossray.operators.transforms import PointOperator
from lossray.plugins import add_user_folders, failure, is_spec
from lossray.seeds import stream
from lossray.source_hash import source_hash
from lossray.spectra.analysis import Analysis, packed_analysis
from lossray.spectra.summary import spectrum_text
from lossray.study.problems import problems_in
from lossray.training.data_settings import DataSettings, data_settings
from lossray.training.datasets import Dataset, analysis_set, load_whole
from tasks.commit_record import Stopwatch
from tasks.jobs import Attempt

OPERATORS: dict[str, Callable[[ModuleObjective], PointOperator]] = {
    "hessian": PackedHessian,
    "ggn": PackedGaussNewton,
    "fisher": PackedFisher,
}
DTYPES = ("float32", "float64")
PARQUET = (".parquet", ".pq")
LABEL = "label"  # the column of a Parquet file that holds the targets; the others are the inputs
TOLERANCE = 1e-3  # of the pairs
PROBES, STEPS = 4, 64  # of the density


@dataclass(frozen=True)
class SpectrumRequest:
    """What to analyse.

    Attributes:
        model: ``package.module:function`` that builds it.
        data: a function that returns them, a Parquet file, or "digits".
        weights: path of a file; None for those that the function makes.
        loss: name of a loss, or a function.
        top: eigenpairs at the large end.
        examples: size of a stratified part of the data; None for all.
        dtype: of the products.
        operator: "hessian", "ggn" or "fisher".
    """

    model: str
    data: str
    weights: str | None = None
    loss: str = "cross_entropy"
    top: int = 10
    examples: int | None = None
    dtype: str = "float32"
    operator: str = "hessian"


@dataclass(frozen=True)
class ModelAndData:
    """The model and the examples, read and checked.

    Attributes:
        model: with its weights, in eval mode.
        data: of which the examples are taken.
        examples: number of those that are analysed.
    """

    model: nn.Module
    data: Dataset
    examples: int | Literal["all"]


def spectrum(request: SpectrumRequest, out: str | None = None) -> str:
    """Analyse a model and describe its spectrum.

    Args:
        request: what to analyse.
        out: a store for the tables; None for none.

    Returns:
        The text to print.

    Raises:
        LossrayError: bad input; nothing was written.
    """
    add_user_folders([os.getcwd()])
    for name, given, allowed in (
        ("--operator", request.operator, OPERATORS),
        ("--dtype", request.dtype, DTYPES),
    ):
        if given not in allowed:
            raise StudyError(f"{name}: {unknown_name(given, allowed)}")
    store = open_store(out) if out is not None else None
    watch = Stopwatch(Attempt(), device="cpu")
    point = read_point(request)
    operator = operator_at(request, point)
    analysis = packed_analysis(
        operator,
        top=min(request.top, operator.shape[1]),
        tolerance=TOLERANCE,
        probes=PROBES,
        steps=STEPS,
        seeds=[0],
    )
    text = spectrum_text(request.operator, analysis.member(0), heading(request, point, analysis.member(0)))
    if store is None:
        return text
    functions = {name: source_hash(name) for name in (request.model, request.loss) if is_spec(name)}
    origin = Origin({**vars(request), "sources": functions}, point.model, point.data, point.examples)
    publish(store, watch, origin, analysis, operator)
    return f"{text}\n\ntables in {store.url}: `lossray tables {store.url}`"


def read_point(request: SpectrumRequest) -> ModelAndData:
    """The model with its weights, and the data.

    Raises:
        LossrayError: they cannot be read, or do not fit.
    """
    dtype = getattr(torch, request.dtype)
    data = load_whole(_data_settings(request.data), dtype=dtype)
    n = len(data.train.targets)
    if request.examples is not None and request.examples > n:
        raise StudyError(f"--examples: found {request.examples}; allowed: at most {n}, as the data have")
    try:
        settings = model_settings({"name": request.model})
    except ValidationError as error:
        (problem, *_) = problems_in(error, {"name": request.model})
        raise StudyError(f"MODEL: {problem.text}") from None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream(0, "initialisation"))
        model = build_model(settings, data.input_shape, data.n_outputs)
    if request.weights is not None:
        load_weights(model, request.weights)
    model = model.to(dtype).eval()
    few = rows(data.train.inputs, slice(2))
    try:
        with torch.no_grad():
            get_loss(request.loss)(call_model(model, few), data.train.targets[:2])
    except (ModelError, StudyError):
        raise
    except Exception as error:  # a user's forward or loss may raise anything
        raise ModelError(
            f"model {request.model!r} with loss {request.loss!r} on inputs {described(few)}: {failure(error)}"
        ) from error
    return ModelAndData(model, data, request.examples or "all")


def operator_at(request: SpectrumRequest, point: ModelAndData) -> PointOperator:
    """The operator as a pack of one.

    Raises:
        ModelError: the loss is no mean over examples, or cannot be differentiated twice.
    """
    examples = analysis_set(point.data, point.examples)
    data = (examples.inputs, examples.targets)
    objective = ModuleObjective(point.model, get_loss(request.loss), data)
    require_example_mean(objective, purpose="the spectrum of the mean loss")
    return OPERATORS[request.operator](objective)


def heading(request: SpectrumRequest, point: ModelAndData, analysis: Analysis) -> list[str]:
    """What was analysed."""
    where = f"weights of {request.weights}" if request.weights else "weights as the function makes them"
    size = sum(parameter.numel() for parameter in point.model.parameters() if parameter.requires_grad)
    n = len(analysis_set(point.data, point.examples).targets)
    return [
        f"{request.model}: {size:,} parameters, {where}",
        f"{request.data}: {n:,} examples, {request.loss} {analysis.loss:.6g}, "
        f"gradient norm {analysis.gradient_norm:.3g}",
        f"{request.operator}: {request.dtype} products, {analysis.matvecs} of them",
    ]


# ---- reading


def _data_settings(name: str) -> DataSettings:
    if name.endswith(PARQUET):
        table: dict[str, object] = {"source": "parquet", "path": name, **_columns(name)}
    elif is_spec(name) or name == "digits":
        table = {"source": name}
    else:
        allowed = "digits, a Parquet file, package.module:function"
        raise StudyError(f"DATA: found {name!r}; allowed: {allowed}")
    try:
        return data_settings({**table, "standardise": "none"})
    except ValidationError as error:
        (problem, *_) = problems_in(error, table)
        raise StudyError(f"DATA: {problem.text}") from None


def _columns(path: str) -> Mapping[str, object]:
    """Label and features of a Parquet file: the column `label`, and all others."""
    try:
        names = pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error
    if LABEL not in names or len(names) < 2:
        raise DataError(
            f"{path}: found columns {', '.join(names)}; needed: {LABEL!r}, the targets, and inputs beside it"
        )
    return {"label": LABEL, "features": [name for name in names if name != LABEL]}
