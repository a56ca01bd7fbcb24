"""The networks of the recipes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
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


class MaxMin(nn.Module):
    """Neighbouring channels sorted in pairs: 1-Lipschitz, and no vector gets shorter (GroupSort of arXiv 1811.05381 in twos)."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, ...) -> the same shape; the number of channels is even."""
        return x.unflatten(1, (-1, 2)).sort(2).values.flatten(1, 2)


def small(classes: int = 10) -> nn.Module:
    """Four convolutions and two linear layers in a chain, made to be trained with a constant of 1.

    Strides equal to the kernel and an orthogonal start, so that a layer can keep the length of what it is given, and `MaxMin`, which does.
    """
    net = nn.Sequential(
        nn.Conv2d(3, 32, 4, 4),
        MaxMin(),
        nn.Conv2d(32, 32, 3, 1, 1),
        MaxMin(),
        nn.Conv2d(32, 64, 2, 2),
        MaxMin(),
        nn.Conv2d(64, 64, 3, 1, 1),
        MaxMin(),
        nn.Flatten(),
        nn.Linear(1024, 128),
        MaxMin(),
        nn.Linear(128, classes),
    )
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            _orthogonal(layer)
    return net


@torch.no_grad()
def _orthogonal(layer: nn.Conv2d | nn.Linear) -> None:
    """Orthogonal where the layer is a matrix on patches; otherwise its centre tap is, beside a tenth of the usual noise."""
    weight = layer.weight
    if isinstance(layer, nn.Conv2d) and layer.kernel_size != layer.stride:
        centre = weight.mul_(0.1)[(..., *(k // 2 for k in layer.kernel_size))]
        centre.add_(nn.init.orthogonal_(torch.empty_like(centre)))
    else:
        nn.init.orthogonal_(weight)
    nn.init.zeros_(cast("Tensor", layer.bias))


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
