"""The two trained networks that ship with the package, plain and regularised: something real to audit."""

from __future__ import annotations

from collections import OrderedDict
from importlib import resources

from safetensors.torch import load
from torch import Tensor, nn


def _unit(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution, batch normalisation and, where asked for, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", nn.BatchNorm2d(outputs))]
    return nn.Sequential(OrderedDict([*parts, ("relu", nn.ReLU())] if relu else parts))


class _Residual(nn.Module):
    """Input plus a grouped 3x3 and a 1x1 unit, then ReLU."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.spatial = _unit(channels, channels, 3, groups=groups)
        self.pointwise = _unit(channels, channels, 1, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.pointwise(self.spatial(x)))


class DemoNet(nn.Module):
    """CIFAR-10 classifier of 153,450 parameters; pixels in [0, 1], shape (batch, 3, 32, 32), to logits (batch, 10).

    It has what an audit meets in practice: strides, a depthwise, a grouped and a 1x1 convolution, batch normalisation (also of
    the pixels, so that its Lipschitz constant is in units of the pixels), residual sums, pooling and a linear layer.

    >>> sum(p.numel() for p in DemoNet().parameters())
    153450
    """

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.BatchNorm2d(3, affine=False)
        self.stem = _unit(3, 32, 3)
        self.down1 = _unit(32, 64, 3, stride=2)
        self.block1 = _Residual(64, groups=64)
        self.down2 = _unit(64, 128, 3, stride=2)
        self.block2 = _Residual(128, groups=4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.block1(self.down1(self.stem(self.pixels(x))))
        return self.head(self.pool(self.block2(self.down2(x))).flatten(1))


def _trained(name: str) -> DemoNet:
    net = DemoNet()
    net.load_state_dict(load((resources.files("gramlip") / "data" / f"{name}.safetensors").read_bytes()))
    return net.eval()


def demo() -> DemoNet:
    """The network as trained by `experiments/train_demo.py` without a penalty, in eval mode."""
    return _trained("demo")


def demo_regularised() -> DemoNet:
    """The same network trained with a Gram penalty on the norm of each of its linear maps, in eval mode."""
    return _trained("demo-regularised")
