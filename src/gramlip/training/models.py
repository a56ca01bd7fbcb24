"""The networks of the recipes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from gramlip.nn import Residual


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm beside the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Sequential() if same else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, h, w) -> (batch, width, h / stride, w / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 with the 3x3 stem used for 32x32 images (arXiv 1512.03385)."""
    widths, strides, inputs = (64, 128, 256, 512), (1, 2, 2, 2), 64
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for width, stride in zip(widths, strides, strict=True):
        parts += [Block(inputs, width, stride), Block(width, width, 1)]
        inputs = width
    return nn.Sequential(*parts, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, classes))


def small(classes: int = 10) -> nn.Module:
    """Four convolutions and two linear layers in a chain: its constant is at most the product of theirs.

    Without biases: in a normalised network the features are small beside them, and they are what an optimiser then learns first.
    """
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 48, 4, 2, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(48, 64, 4, 2, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 128, bias=False),
        nn.ReLU(),
        nn.Linear(128, classes, bias=False),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "small": small}
"""Name -> classifier."""


class Denoiser(nn.Module):
    """`x - f(x)` with f four convolutions (arXiv 1608.03981, smaller): the usual form, with nothing that keeps its constant down."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = [3, width, width, width, 3]
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            parts += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU()]
        self.noise = nn.Sequential(*parts[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """The image without its noise, of the shape of x."""
        return x - self.noise(x)


def blocks(depth: int = 6, width: int = 24) -> nn.Module:
    """A chain of residual blocks on images: 1-Lipschitz."""
    layers = [nn.Conv2d(3, width, 3, 1, 1) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(*(Residual(layer) for layer in layers))


def build(name: str, control: str) -> nn.Module:
    """The network of a recipe, before anything is parametrized but a denoiser's blocks."""
    if name == "denoiser":
        return blocks() if control == "rescaled" else Denoiser()
    return MODELS[name]()
