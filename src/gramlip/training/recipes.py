"""RECIPES: name -> everything that decides a training run, so that name and seed reproduce it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gramlip.errors import InputError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of CIFAR-10's training pixels, by channel; a run that does not normalise its input has mean 0 and std 1."""


@dataclass(frozen=True)
class Recipe:
    """A run: `model` and `task`, what keeps its constant down (`control`), and the schedule.

    `scale` multiplies the logits of the loss, which a network with a small constant needs to be able to fit.
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
    normalise: bool = True
    augment: bool = True
    samples: int | None = None
    test_samples: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def mean(self) -> tuple[float, ...]:
        """What is taken off the pixels."""
        return MEAN if self.normalise else (0.0,) * 3

    @property
    def std(self) -> tuple[float, ...]:
        """What the pixels are then divided by."""
        return STD if self.normalise else (1.0,) * 3


def _small(control: str, **options: Any) -> Recipe:
    short = {"epochs": 6, "batch": 128, "optimiser": "adam", "lr": 2e-3, "samples": 5000, "normalise": False}
    return Recipe("small", control, **{**short, **options})


def _denoiser(control: str) -> Recipe:
    short = {"epochs": 3, "batch": 32, "optimiser": "adam", "lr": 2e-3, "samples": 2000, "test_samples": 500, "normalise": False}
    return Recipe("denoiser", control, "denoise", clip=1.0, **short)


RECIPES: dict[str, Recipe] = {
    "resnet18": Recipe("resnet18"),
    "resnet18-penalised": Recipe("resnet18", "penalised"),
    "resnet18-gram": Recipe("resnet18", "gram"),
    "resnet18-normalised": Recipe("resnet18", "normalised"),
    "small": _small("plain"),
    "small-penalised": _small("penalised", strength=0.05),
    "small-gram": _small("gram", strength=0.05),
    "small-reshaped": _small("reshaped", strength=0.05),
    "small-normalised": _small("normalised", scale=16.0),
    "small-rescaled": _small("rescaled", scale=16.0),
    "denoiser": _denoiser("plain"),
    "denoiser-rescaled": _denoiser("rescaled"),
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
