"""Training recipes: `RECIPES` by name, their networks and their data. Name and seed determine a run completely."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler

from gramlip.errors import InputError, first_line
from gramlip.nn import Residual
from gramlip.targets import snapshot

# ---- recipes -------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of CIFAR-10's training pixels, by channel."""


CHOICES = {
    "model": ("resnet18", "small", "denoiser"),
    "control": ("plain", "penalised", "gram", "reshaped", "normalised", "rescaled"),
    "task": ("classify", "denoise"),
    "optimiser": ("sgd", "adam"),
}
NUMBERS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    **dict.fromkeys(("epochs", "batch", "samples", "test_samples"), (int, lambda x: x >= 1, "a whole number of at least 1")),
    **dict.fromkeys(("lr", "threshold", "target", "scale", "clip"), (int | float, lambda x: 0 < x < math.inf, "a positive number")),
    **dict.fromkeys(
        ("momentum", "weight_decay", "strength", "noise"), (int | float, lambda x: 0 <= x < math.inf, "a number of at least 0")
    ),
    **dict.fromkeys(("centre", "whiten", "augment"), (bool, lambda _: True, "true or false")),
}
"""Field -> its type, a test of its values, and a description of both."""
OPTIONAL = ("samples", "test_samples", "clip")


@dataclass(frozen=True)
class Recipe:
    """A training run: `model`, `task`, the way to hold the Lipschitz constant down (`control`), and the schedule.

    `scale` multiplies the logits in the loss; a network with a small constant needs this to fit the data. `centre` subtracts the mean
    of CIFAR-10 from the pixels, which changes no Lipschitz constant, and `whiten` divides by its std, which the certificate takes into
    account.
    """

    model: str
    control: str = "plain"
    task: str = "classify"
    epochs: int = 200
    batch: int = 256
    optimiser: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = None
    strength: float = 0.1
    threshold: float = 1.0
    target: float = 1.0
    scale: float = 1.0
    noise: float = 25 / 255
    centre: bool = True
    whiten: bool = True
    augment: bool = True
    samples: int | None = None
    test_samples: int | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            InputError: an unknown choice, or a number out of range.
        """
        for field, choices in CHOICES.items():
            if (value := getattr(self, field)) not in choices:
                msg = f"{field}={value!r} was given; expected one of {', '.join(choices)}"
                raise InputError(msg)
        for field, (kind, fits, words) in NUMBERS.items():
            value = getattr(self, field)
            if value is None and field in OPTIONAL:
                continue
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool) or not fits(value):
                msg = f"{field}={value!r} was given; expected {words}"
                raise InputError(msg)
        if (self.model == "denoiser") != (self.task == "denoise"):
            msg = f"model={self.model!r} was given with task={self.task!r}; expected model='denoiser' for task='denoise' alone"
            raise InputError(msg)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean that is subtracted from the pixels."""
        return MEAN if self.centre else (0.0,) * 3

    @property
    def std(self) -> tuple[float, ...]:
        """The std by which the pixels are then divided."""
        return STD if self.whiten else (1.0,) * 3


SMALL = Recipe("small", epochs=5, batch=128, optimiser="adam", lr=1e-3, whiten=False)
DENOISER = replace(
    SMALL, model="denoiser", task="denoise", epochs=3, batch=32, lr=2e-3, clip=1.0, centre=False, samples=2000, test_samples=500
)

RECIPES: dict[str, Recipe] = {
    "resnet18": Recipe("resnet18"),
    "resnet18-penalised": Recipe("resnet18", "penalised"),
    "resnet18-gram": Recipe("resnet18", "gram"),
    "resnet18-normalised": Recipe("resnet18", "normalised"),
    "small": SMALL,
    "small-penalised": replace(SMALL, control="penalised", strength=0.1),
    "small-gram": replace(SMALL, control="gram", strength=0.1),
    "small-gram-equal": replace(
        SMALL, control="gram", strength=0.1, epochs=3
    ),  # as many epochs as the tracked penalty completes in the same time
    "small-reshaped": replace(SMALL, control="reshaped", strength=0.1),
    "small-normalised": replace(SMALL, control="normalised", scale=4.0),
    "small-rescaled": replace(SMALL, control="rescaled", scale=4.0),
    "denoiser": DENOISER,
    "denoiser-rescaled": replace(DENOISER, control="rescaled"),
}


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: an unknown name.

    >>> recipe("resnet18").epochs
    200
    """
    if name not in RECIPES:
        msg = f"recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}"
        raise InputError(msg)
    return RECIPES[name]


# ---- networks ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, plus the identity, or a 1x1 convolution if the shape changes."""

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


def basic_blocks() -> list[nn.Module]:
    """The four stages of ResNet-18 (arXiv 1512.03385)."""
    stages: list[nn.Module] = []
    for inputs, width in pairwise((64, 64, 128, 256, 512)):
        stages += [Block(inputs, width, 1 if inputs == width else 2), Block(width, width, 1)]
    return stages


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 with the 3x3 stem used for 32x32 images."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *basic_blocks(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, classes))


class MaxMin(nn.Module):
    """Sort channels in pairs: 1-Lipschitz, and it keeps the length of every vector (GroupSort of arXiv 1811.05381 with groups of two)."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, ...) -> the same shape; the number of channels is even."""
        return x.unflatten(1, (-1, 2)).sort(2).values.flatten(1, 2)


def small(classes: int = 10) -> nn.Module:
    """A chain of four convolutions and two linear layers, for training with a Lipschitz constant of 1.

    The strides equal the kernel sizes and the initial weights are orthogonal, so a layer can preserve lengths, as `MaxMin` does.
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
    """Initialise a layer as an orthogonal matrix on patches, or else its centre tap as one, plus a tenth of the usual noise."""
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
    """`x - f(x)` with four convolutions in f (arXiv 1608.03981, smaller): the usual denoiser, without any control of its constant."""

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
    """The network of a recipe; only the blocks of a denoiser are parametrized already."""
    if name == "denoiser":
        return blocks() if control == "rescaled" else Denoiser()
    return MODELS[name]()


# ---- data ----------------------------------------------------------------------------------------------------------------
#
# CIFAR-10 from a folder of parquet files or from the hub, held in memory, in an order that depends on seed and epoch only.

HUB = "uoft-cs/cifar10"


def files(source: str | Path, split: str) -> list[Path]:
    """The parquet files of a split: from a folder, or from the hub's data set if `source` is its name."""
    folder = Path(source)
    if not folder.is_dir() and str(source) == HUB:
        folder = snapshot(HUB, HUB, ["*.parquet"], "dataset")
    parquet = sorted(folder.rglob(f"{split}-*.parquet"))
    if not parquet:
        msg = f"{source} holds no {split}-*.parquet; expected a folder of CIFAR-10's parquet files, or {HUB} for the hub's"
        raise InputError(msg)
    return parquet


def load(source: str | Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images as uint8 (N, 3, 32, 32) and labels (N,), in the files' order, the first `limit` of them.

    Raises:
        InputError: no such files, none that can be read, columns other than `img` and `label`, or no rows at all.
    """
    images: list[Tensor] = []
    labels: list[int] = []
    for file in files(source, split):
        pictures, classes = _rows(file, None if limit is None else limit - len(images))
        images += [_pixels(f"{file}: image {i}", picture) for i, picture in enumerate(pictures)]
        labels += classes
    if not images:
        msg = f"{source} holds no image in its {split} files; expected CIFAR-10's, as in {HUB}: fetch it again"
        raise InputError(msg)
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _rows(file: Path, limit: int | None) -> tuple[list[Any], list[int]]:
    """The first pictures and labels of a file."""
    parquet: Any = import_module("pyarrow.parquet")
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError, NotImplementedError) as error:
        msg = f"{file} cannot be read as parquet ({first_line(error)}); expected a whole file, as in {HUB}: fetch it again"
        raise InputError(msg) from error
    if not {"img", "label"} <= set(table.column_names):
        msg = f"{file} has columns {table.column_names}; expected img and label, as in {HUB}"
        raise InputError(msg)
    rows = table if limit is None else table.slice(0, limit)
    labels: list[Any] = rows["label"].to_pylist()
    wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < 10]
    if wrong:
        msg = f"{file} holds the label {wrong[0]!r}; expected integers from 0 to 9, as in {HUB}"
        raise InputError(msg)
    return rows["img"].to_pylist(), labels


def _pixels(name: str, picture: Any) -> Tensor:
    """A picture's pixels, uint8 (32, 32, 3)."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture["bytes"])) as image:
            rgb = image.convert("RGB")
    except Exception as error:  # a damaged picture shows in many ways
        msg = f"{name} cannot be read ({first_line(error)}); expected a PNG or JPEG, as in {HUB}: fetch the file again"
        raise InputError(msg) from error
    if rgb.size != (32, 32):
        msg = f"{name} has {rgb.width}x{rgb.height} pixels; expected 32x32, as in {HUB}"
        raise InputError(msg)
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).reshape(32, 32, 3)


class Order(Sampler[int]):
    """A permutation for each epoch, a function of seed and epoch alone: a resumed run sees the same data as an uninterrupted one."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=generator(self.seed, self.epoch)).tolist())


def generator(seed: int, step: int) -> torch.Generator:
    """A generator whose state depends on seed and step alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def augmented(images: Tensor, source: torch.Generator, pad: int = 4) -> Tensor:
    """Each image (N, 3, h, w) shifted by up to `pad` pixels over a black border, and mirrored half of the time."""
    n, _, height, width = images.shape
    shift = torch.randint(2 * pad + 1, (2, n, 1), generator=source)
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)
    columns = torch.where(torch.rand(n, 1, generator=source) < 0.5, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, (pad,) * 4)
    picked = padded[torch.arange(n, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels in [0, 1], less mean, over std, by channel; uint8 is divided by 255 first."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
