"""The models that the experiments and the tests audit: each small by its arguments, each in a standard form.

`resnet` has torchvision's state-dict names, `cifar_resnet` those of the CIFAR checkpoints with option A shortcuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: none, a 1x1 convolution (torchvision) or strided slices with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.room = stride, (outputs - inputs) // 2
        changes = stride > 1 or inputs != outputs
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if changes and shortcut == "conv"
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.room, self.room))
        return self.relu(x + y)


def _stage(inputs: int, outputs: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    return nn.Sequential(*(BasicBlock(inputs if b == 0 else outputs, outputs, stride if b == 0 else 1, shortcut) for b in range(blocks)))


class ResNet(nn.Module):
    """ResNet with basic blocks, as torchvision names and builds it (ResNet-18: width 64, two blocks in each of four stages)."""

    def __init__(self, width: int = 64, blocks: Sequence[int] = (2, 2, 2, 2), classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [width * 2**i for i in range(len(blocks))]
        for i, (n, w) in enumerate(zip(blocks, widths, strict=True)):
            setattr(self, f"layer{i + 1}", _stage(widths[max(i - 1, 0)], w, n, 1 if i == 0 else 2, "conv"))
        self.stages = len(widths)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images with parameter-free (option A) shortcuts."""

    def __init__(self, n: int = 3, widths: Sequence[int] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], n, 1, "zeros")
        self.layer2 = _stage(widths[0], widths[1], n, 2, "zeros")
        self.layer3 = _stage(widths[1], widths[2], n, 2, "zeros")
        self.linear = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.shape[2:])
        return self.linear(x.view(x.shape[0], -1))


def resnet20(path: str | Path = "../shared/models/resnet20-cifar10.safetensors") -> CifarResNet:
    """The trained CIFAR-10 ResNet-20 in evaluation mode."""
    from safetensors.torch import load_file

    model = CifarResNet()
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return model.eval()


def mlp(path: str | Path = "../shared/models/mlp-2-10-30-20-2.safetensors") -> nn.Sequential:
    """The 2-10-30-20-2 ReLU network without biases of the layer-coupling literature."""
    from safetensors.torch import load_file

    weights = load_file(path)
    layers: list[nn.Module] = []
    for name in sorted(weights, key=lambda key: int(key.split(".")[0])):
        layer = nn.Linear(weights[name].shape[1], weights[name].shape[0], bias=False, dtype=weights[name].dtype)
        layer.weight.data.copy_(weights[name])
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def vgg(width: int = 64, classes: int = 10, size: int = 32) -> nn.Sequential:
    """Convolutions and max pooling, then two linear layers with dropout."""
    layers: list[nn.Module] = []
    channels = 3
    for w in (width, 2 * width):
        layers += [nn.Conv2d(channels, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
        channels = w
    flat = channels * (size // 4) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 4 * width), nn.ReLU(), nn.Dropout(), nn.Linear(4 * width, classes))


class DenseNet(nn.Module):
    """Each layer reads the concatenation of all before it; a transition halves the size."""

    def __init__(self, growth: int = 12, layers: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        widths = [growth * (i + 1) for i in range(layers + 1)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1, bias=False)) for w in widths[:-1]
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], growth, 1), nn.AvgPool2d(2))
        self.fc = nn.Linear(growth, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(self.transition(x).mean((2, 3)))


class MobileNet(nn.Module):
    """Inverted residuals: 1x1, depthwise 3x3 and 1x1 convolutions with hard-swish; linear bottlenecks."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()

        def inverted(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            wide = 3 * inputs
            return nn.Sequential(
                *(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()),
                *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()),
                *(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
            )

        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish())
        self.block1, self.block2 = inverted(width, width, 1), inverted(width, 2 * width, 2)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.block2(x + self.block1(x)))


class UNet(nn.Module):
    """Encoder, decoder with transposed convolutions, skip by concatenation."""

    def __init__(self, width: int = 16, channels: int = 1) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU())

        self.down1, self.down2 = double(channels, width), double(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = double(2 * width, width)
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        return self.out(self.merge(torch.cat([self.up(b), a], 1)))


class DnCNN(nn.Module):
    """Denoiser that predicts the noise: `x - net(x)`."""

    def __init__(self, width: int = 64, depth: int = 6, channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x)


def controller(states: int = 4, width: int = 32, actions: int = 1) -> nn.Sequential:
    """A feedback law: tanh layers and a saturated action."""
    return nn.Sequential(
        nn.Linear(states, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, actions), nn.Hardtanh(-2.0, 2.0)
    )


class Recurrent(nn.Module):
    """A recurrent layer, and a linear one on its last state."""

    def __init__(self, kind: type[nn.RNNBase], width: int = 6, actions: int = 2, **options: Any) -> None:
        super().__init__()
        self.memory = kind(3, width, batch_first=True, **options)
        self.head = nn.LazyLinear(actions)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0][:, -1])


class Attention(nn.Module):
    """Softmax attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class ViT(nn.Module):
    """Patches, one encoder layer, mean over tokens; `norm_first` puts the layer norms before the branches, as ViT does."""

    def __init__(self, size: int = 32, patch: int = 8, width: int = 32, heads: int = 2, classes: int = 10, norm_first: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, classes)
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        if self.norm_first:
            x = x + self.attention(self.norm1(x))
            x = x + self.feed(self.norm2(x))
        else:
            x = self.norm1(x + self.attention(x))
            x = self.norm2(x + self.feed(x))
        return self.head(x.mean(1))


def audio(width: int = 16, classes: int = 10) -> nn.Sequential:
    """A network on waveforms: strided and dilated 1d convolutions with SiLU."""
    return nn.Sequential(
        *(nn.Conv1d(1, width, 9, stride=4, padding=4), nn.BatchNorm1d(width), nn.SiLU()),
        *(nn.Conv1d(width, 2 * width, 5, padding=4, dilation=2), nn.BatchNorm1d(2 * width), nn.SiLU()),
        *(nn.AvgPool1d(4), nn.Flatten(), nn.LazyLinear(classes)),
    )


def volume(width: int = 8, classes: int = 2) -> nn.Sequential:
    """A 3d network with ELU."""
    return nn.Sequential(
        *(nn.Conv3d(1, width, 3, padding=1), nn.BatchNorm3d(width), nn.ELU()),
        *(nn.Conv3d(width, width, 3, stride=2, padding=1), nn.ELU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(width, classes)),
    )


def settled(model: nn.Module, example: Tensor, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with batch norm statistics and gains as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.eval()(example)  # lazy layers take their shape
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
    return model
