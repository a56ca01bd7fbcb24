"""CIFAR-10 from a folder of parquet files or from the hub, whole in memory, in an order that seed and epoch decide."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler

from gramlip.errors import InputError, first_line
from gramlip.sources import snapshot

HUB = "uoft-cs/cifar10"


def files(source: str | Path, split: str) -> list[Path]:
    """The split's parquet files: of a folder, or of the hub's data set where `source` is its name."""
    folder = Path(source)
    if not folder.is_dir() and str(source) == HUB:
        folder = snapshot(HUB, HUB, ["*.parquet"], "dataset")
    found = sorted(folder.rglob(f"{split}-*.parquet"))
    if not found:
        msg = f"{source} holds no {split}-*.parquet; expected a folder of CIFAR-10's parquet files, or {HUB} for the hub's"
        raise InputError(msg)
    return found


def load(source: str | Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images as uint8 (N, 3, 32, 32) and labels (N,), in the files' order, the first `limit` of them.

    Raises:
        InputError: no such files, none that can be read, columns other than `img` and `label`, or no rows at all.
    """
    images: list[Tensor] = []
    labels: list[int] = []
    for file in files(source, split):
        pictures, found = _rows(file, None if limit is None else limit - len(images))
        images += [_pixels(f"{file}: image {i}", picture) for i, picture in enumerate(pictures)]
        labels += found
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
    """A permutation for each epoch, a function of seed and epoch alone: what is resumed sees what it would have seen."""

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
    """A generator that seed and step alone decide."""
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
