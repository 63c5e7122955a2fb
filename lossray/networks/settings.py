"""The [[models]] of a study file, and the names of models and losses; nothing here loads torch.

A new model is one settings class and one entry of MODELS; its build function stands in a file of its own. A
new loss is one entry of LOSSES.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from lossray.errors import StudyError
from lossray.names import unknown_name
from lossray.plugins import is_spec, split_spec
from lossray.references import resolve
from lossray.settings import Settings

if TYPE_CHECKING:
    from torch import nn

Activation = Literal["relu", "gelu", "tanh"]
Initialisation = Literal["default", "kaiming_normal", "xavier_normal", "orthogonal"]

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Widths = Annotated[tuple[Count, ...], Field(strict=False)]  # TOML has lists, strict tuples refuse them

LOSSES = {
    "cross_entropy": "lossray.networks.losses:cross_entropy",
    "mse": "lossray.networks.losses:mse",
    "mse_mean": "lossray.networks.losses:mse_mean",
}


class ModelSettings(Settings):
    """Base of every model's settings.

    Attributes:
        name: which model.
        optimizers: names of those of the study's optimizers that train it; left out, all do. No part of the
            model.
    """

    name: str
    optimizers: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None

    @property
    def alone(self) -> Self:
        """The model, whoever trains it."""
        return self.model_copy(update={"optimizers": None})

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `optimizers` out where it says nothing: a model's settings are part of its runs' ids."""
        plain: dict[str, Any] = serialise(self)
        if self.optimizers is None:
            plain.pop("optimizers", None)
        return plain


class BuiltinSettings(ModelSettings):
    """What every built-in model takes.

    Attributes:
        init: "default" is PyTorch's own; the others draw every weight matrix and convolution kernel anew and
            set its bias to 0: "kaiming_normal" with standard deviation gain / sqrt(fan in) and "orthogonal"
            with the same gain (sqrt 2 for relu and gelu, 5/3 for tanh, 1 for linear), "xavier_normal" with
            standard deviation sqrt(2 / (fan in + fan out)).
        init_scale: multiplies those weights.
    """

    init: Initialisation = "default"
    init_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class LinearSettings(BuiltinSettings):
    """A deep linear network: a product of len(widths) + 1 matrices.

    Attributes:
        widths: of the hidden layers; with none there is one matrix.
        bias: whether the layers have biases.
    """

    name: Literal["linear"] = "linear"
    widths: Widths = (16,)
    bias: bool = False


class MlpSettings(BuiltinSettings):
    """A multilayer perceptron: per hidden layer affine map, norm, activation, dropout; then the output.

    Attributes:
        widths: of the hidden layers.
        activation: after each of them.
        norm: of each hidden layer, before its activation.
        dropout: probability that an activation of a hidden layer is left out.
        bias: whether the layers have biases.
    """

    name: Literal["mlp"] = "mlp"
    widths: Widths = (64, 64)
    activation: Activation = "relu"
    norm: Literal["none", "batch", "layer"] = "none"
    dropout: Probability = 0.0
    bias: bool = True


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"found {kernel}; a kernel has an odd side, so that the image keeps its size")
    return kernel


class CnnSettings(BuiltinSettings):
    """Convolutions that keep the image size, each followed by pooling, then fully connected layers.

    Attributes:
        channels: of the convolutions.
        kernel: side of their kernels in pixels, odd.
        widths: of the fully connected layers; may be empty.
        activation: after each convolution and each fully connected layer.
        norm: after each convolution.
        dropout: probability, after each fully connected layer.
    """

    name: Literal["cnn"] = "cnn"
    channels: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = (6, 16)
    kernel: Annotated[Count, AfterValidator(_odd)] = 5
    widths: Widths = (120, 84)
    activation: Activation = "relu"
    norm: Literal["none", "batch", "group"] = "none"
    dropout: Probability = 0.0


def _depth(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"found {depth}; the depth is 6n + 2: 8, 14, 20, 26, ...")
    return depth


class ResnetSettings(BuiltinSettings):
    """A residual network: three stages of (depth - 2) / 6 blocks each.

    Attributes:
        depth: 6n + 2 for n blocks a stage: 8, 14, 20, 26, ...
        width: channels of the first stage; the second has twice, the third four times as many.
        activation: after each convolution.
        norm: after each convolution.
        dropout: probability, between the two convolutions of a block (Wide ResNet, arXiv 1605.07146).
    """

    name: Literal["resnet"] = "resnet"
    depth: Annotated[int, AfterValidator(_depth)] = 8
    width: Count = 16
    activation: Activation = "relu"
    norm: Literal["batch", "group", "none"] = "batch"
    dropout: Probability = 0.0


class VitSettings(BuiltinSettings):
    """A small vision transformer with pre-norm blocks and mean pooling.

    Attributes:
        patch: side of a patch in pixels; left out, the largest divisor of both image sides up to the root of
            the shorter one.
        dim: of a token; a multiple of `heads`.
        depth: number of blocks.
        heads: of the attention.
        activation: of the perceptrons, whose hidden layer is 4 dim wide.
        norm: before attention, before each perceptron, and before the output.
        dropout: probability, after attention and after each layer of a perceptron.
    """

    name: Literal["vit"] = "vit"
    patch: Count | None = None
    dim: Count = 32
    depth: Count = 2
    heads: Count = 4
    activation: Activation = "gelu"
    norm: Literal["layer"] = "layer"
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"found heads = {self.heads} and dim = {self.dim}; heads must divide dim")
        return self


class UserModelSettings(ModelSettings):
    """A model of the user's own, ``package.module:function``; every other key goes to the function."""

    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys for the function."""
        return dict(self.model_extra or {})


Build = Callable[[Any, tuple[int, ...], int], "nn.Module"]  # settings, shape of one input, outputs


@dataclass(frozen=True)
class ModelEntry:
    """One built-in model.

    Attributes:
        settings: its keys.
        builder: "module:function" that builds it, imported when the first one is built.
    """

    settings: type[BuiltinSettings]
    builder: str

    @property
    def build(self) -> Build:
        """The function that builds it."""
        return cast(Build, resolve(self.builder))


MODELS = {
    "linear": ModelEntry(LinearSettings, "lossray.networks.mlp:build_linear"),
    "mlp": ModelEntry(MlpSettings, "lossray.networks.mlp:build_mlp"),
    "cnn": ModelEntry(CnnSettings, "lossray.networks.cnn:build_cnn"),
    "resnet": ModelEntry(ResnetSettings, "lossray.networks.resnet:build_resnet"),
    "vit": ModelEntry(VitSettings, "lossray.networks.vit:build_vit"),
}


class _Name(BaseModel):
    """The one key that decides which settings the others must fit."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        if not is_spec(name):
            if name not in MODELS:
                raise ValueError(unknown_name(name, [*MODELS, "package.module:function"]))
            return name
        try:
            split_spec(name)
        except StudyError as error:
            raise ValueError(str(error)) from None
        return name


def model_settings(table: Mapping[str, object]) -> ModelSettings:
    """The settings in one [[models]] table, such as ``{"name": "mlp", "widths": [64]}``.

    Raises:
        pydantic.ValidationError: an unknown name or key, a wrong type, an impossible value. ``loc`` is
            relative to the table.
    """
    name = _Name.model_validate(dict(table)).name
    schema = MODELS[name].settings if name in MODELS else UserModelSettings
    return schema.model_validate(dict(table))
