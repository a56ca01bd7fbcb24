"""RECIPES: name -> everything that decides a training run, so that name and seed reproduce it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from gramlip.errors import InputError

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
"""Field -> its type, the values that it takes, and both in words."""
OPTIONAL = ("samples", "test_samples", "clip")


@dataclass(frozen=True)
class Recipe:
    """A run: `model` and `task`, what keeps its constant down (`control`), and the schedule.

    `scale` multiplies the logits of the loss, which a network with a small constant needs to be able to fit. `centre` takes CIFAR-10's
    mean off the pixels, which no constant notices, and `whiten` divides by its std, which the certificate takes into account.
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
        """Refuse what no run could be made of.

        Raises:
            InputError: a word that is not among the choices, or a number out of its range.
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
        """What is taken off the pixels."""
        return MEAN if self.centre else (0.0,) * 3

    @property
    def std(self) -> tuple[float, ...]:
        """What the pixels are then divided by."""
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
    "small-gram-equal": replace(SMALL, control="gram", strength=0.1, epochs=3),  # the epochs that the tracked penalty's time buys
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
