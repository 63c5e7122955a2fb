"""A small vision transformer (Dosovitskiy et al., arXiv 2010.11929) with pre-norm blocks and mean pooling."""

import math

import torch
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.networks.layers import ACTIVATIONS, image_shape, initialise
from lossray.networks.settings import VitSettings


class Attention(nn.Module):
    """Multi-head self-attention with an explicit softmax: fused kernels have no double backward."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, dim] to tokens [B, T, dim]."""
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [B, heads, T, T]
        mixed = torch.softmax(scores, dim=-1) @ value
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, dim] to [B, heads, T, dim / heads]."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x)); the perceptron is 4 dim wide."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, settings.heads)
        self.norm2 = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, 4 * dim)
        self.activation = ACTIVATIONS[settings.activation]()
        self.output = nn.Linear(4 * dim, dim)
        # One module per place: a layer that is called twice would be one place to whoever replaces it.
        rates = [settings.dropout] * 3
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(p) if p else nn.Identity() for p in rates)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, dim] to tokens [B, T, dim]."""
        x = x + self.dropout1(self.attention(self.norm1(x)))
        hidden = self.dropout2(self.activation(self.hidden(self.norm2(x))))
        return x + self.dropout3(self.output(hidden))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patches to tokens, learned positions, blocks, norm, mean over tokens, linear output."""

    def __init__(self, settings: VitSettings, in_channels: int, tokens: int, patch: int, n_outputs: int):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, settings.dim, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(tokens, settings.dim))
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(settings) for _ in range(settings.depth)))
        self.norm = nn.LayerNorm(settings.dim)
        self.output = nn.Linear(settings.dim, n_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to outputs [B, n_outputs]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.output(self.norm(self.blocks(tokens)).mean(dim=1))  # type: ignore[no-any-return]


def build_vit(settings: VitSettings, input_shape: tuple[int, ...], n_outputs: int) -> nn.Module:
    """The vision transformer.

    Raises:
        ModelError: the inputs are not images, or the patch does not divide them.
    """
    in_channels, height, width = image_shape("vit", input_shape)
    sides = [side for side in range(1, min(height, width) + 1) if height % side == width % side == 0]
    patch = settings.patch or max(side for side in sides if side * side <= min(height, width))
    if patch not in sides:
        allowed = ", ".join(map(str, sides))
        raise ModelError(f"model 'vit', patch: found {patch}; images of {height} x {width} allow {allowed}")
    model = VisionTransformer(settings, in_channels, (height // patch) * (width // patch), patch, n_outputs)
    initialise(model, settings, settings.activation)
    return model
