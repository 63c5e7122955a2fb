"""The residual network for small images: ResNet-8, -20, ... (He et al., arXiv 1512.03385, section 4.2)."""

from collections import OrderedDict

from torch import Tensor, nn

from lossray.networks.layers import ACTIVATIONS, image_shape, initialise, norm2d
from lossray.networks.settings import ResnetSettings


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: identity where the shape stays, a projection where it changes.

    The projection (a strided 1 x 1 convolution and its norm) is option B of the paper. Option A, subsampling
    and zero channels, has no parameters but ties the rescaling symmetries of the stages (theory 5C).
    """

    def __init__(self, fan_in: int, channels: int, *, stride: int, settings: ResnetSettings) -> None:
        super().__init__()
        biased = settings.norm == "none"
        self.conv1 = nn.Conv2d(fan_in, channels, 3, stride=stride, padding=1, bias=biased)
        self.norm1 = norm2d(settings.norm, channels)
        self.activation = ACTIVATIONS[settings.activation]()
        self.dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=biased)
        self.norm2 = norm2d(settings.norm, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != channels:
            projection = nn.Conv2d(fan_in, channels, 1, stride=stride, bias=biased)
            norm = norm2d(settings.norm, channels)
            self.shortcut = nn.Sequential(OrderedDict(projection=projection, norm=norm))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, fan_in, H, W] to [B, channels, H / stride, W / stride], rounded up."""
        residual = self.dropout(self.activation(self.norm1(self.conv1(x))))
        residual = self.norm2(self.conv2(residual))
        return self.activation(residual + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """First convolution, three stages, global average pooling, linear output."""

    def __init__(self, settings: ResnetSettings, in_channels: int, n_outputs: int) -> None:
        super().__init__()
        width, blocks = settings.width, (settings.depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=settings.norm == "none")
        self.norm = norm2d(settings.norm, width)
        self.activation = ACTIVATIONS[settings.activation]()
        self.stage1 = _stage(width, width, blocks, stride=1, settings=settings)
        self.stage2 = _stage(width, 2 * width, blocks, stride=2, settings=settings)
        self.stage3 = _stage(2 * width, 4 * width, blocks, stride=2, settings=settings)
        self.output = nn.Linear(4 * width, n_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to outputs [B, n_outputs]."""
        x = self.activation(self.norm(self.conv(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.output(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _stage(
    fan_in: int, channels: int, blocks: int, *, stride: int, settings: ResnetSettings
) -> nn.Sequential:
    first = ResidualBlock(fan_in, channels, stride=stride, settings=settings)
    rest = [ResidualBlock(channels, channels, stride=1, settings=settings) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def build_resnet(settings: ResnetSettings, input_shape: tuple[int, ...], n_outputs: int) -> nn.Module:
    """The residual network, for images of any size.

    Raises:
        ModelError: the inputs are not images.
    """
    in_channels, _, _ = image_shape("resnet", input_shape)
    model = ResNet(settings, in_channels, n_outputs)
    initialise(model, settings, settings.activation)
    return model
