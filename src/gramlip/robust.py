"""Certified robustness: from the margins of a classifier and its Lipschitz constant to l2 radii, in pixels of [0, 1].

Proofs: docs/training.md#certify. The constant is proved in floating point; the logits are taken as the model computes them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from gramlip import rounding as rd
from gramlip.bound import Bound, decimals
from gramlip.errors import InputError
from gramlip.nn.modes import evaluating
from gramlip.report import Report

EPS = (36 / 255, 72 / 255, 108 / 255, 255 / 255)
"""The radii that the field reports, for pixels in [0, 1]."""


@dataclass(frozen=True)
class Certified:
    """Clean and certified accuracy of `count` samples, with every sample's radius (0 for wrong labels and ties)."""

    clean: float
    certified: dict[float, float]
    radii: Tensor
    because: str

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.radii)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        by_eps = [{"eps": eps, "accuracy": share} for eps, share in self.certified.items()]
        return {"schema": 1, "count": self.count, "clean": self.clean, "certified": by_eps, "because": self.because}

    def __str__(self) -> str:
        lines = [f"clean accuracy                {100 * self.clean:6.2f} %  ({self.count} samples)"]
        lines += [f"certified at eps = {round(255 * eps, 4):>7g}/255  {100 * share:6.2f} %" for eps, share in self.certified.items()]
        return "\n".join([*lines, self.because])


def constant(lipschitz: float | Bound | Report, std: float | Sequence[float] = 1.0) -> float:
    """Upper bound of the constant with respect to pixels: divided by the least `std` that the input normalisation divides by.

    >>> constant(2.0, std=(0.5, 0.25)) >= 8.0
    True
    """
    upper = float(lipschitz.upper) if isinstance(lipschitz, Bound | Report) else float(lipschitz)
    if math.isnan(upper) or upper < 0:
        msg = f"lipschitz={lipschitz!r} was given; expected an upper bound of at least 0: type gramlip.audit(model, example).upper"
        raise InputError(msg)
    spread: list[float] = torch.as_tensor(std, dtype=torch.float64).flatten().tolist()
    if not spread or any(not 0 < s < math.inf for s in spread):
        msg = f"std={std!r} was given; expected the positive numbers that the input normalisation divides by"
        raise InputError(msg)
    return upper if min(spread) == 1.0 else rd.up(upper / min(spread)) if upper else 0.0


def radii(
    logits: Tensor,
    labels: Tensor,
    lipschitz: float | Bound | Report,
    *,
    std: float | Sequence[float] = 1.0,
    last: nn.Linear | Tensor | None = None,
) -> Tensor:
    """Certified l2 radii (batch,), float64: no input closer than that, in pixels, gets another label.

    0 for wrong labels, ties, and logits that are not finite: an overflow has no margin.

    Args:
        logits: (batch, classes).
        labels: (batch,), integers.
        lipschitz: upper bound for the network from its (normalised) input to the logits; with `last`, to the input of `last`.
        std: what the input normalisation outside the network divides by; 1 where the network takes pixels.
        last: the network's final linear layer: each pair of classes then has its own constant, `||w_y - w_j||` times `lipschitz`,
            instead of `sqrt(2)` times that of the whole network.

    Raises:
        InputError: shapes or numbers that cannot be used.

    Reference: Tsuzuku et al. 2018 (arXiv 1802.04034), proposition 1; docs/training.md#certify.

    >>> radii(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.tensor([0, 0]), 1.0)
    tensor([1.4142, 0.0000], dtype=torch.float64)
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        given = f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}"
        msg = f"{given} were given; expected (batch, classes) with at least 2 classes, and (batch,)"
        raise InputError(msg)
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if labels.is_floating_point() or bool(wrong.any()):
        given = f"a label of {labels.dtype}" if labels.is_floating_point() else f"the label {int(labels[wrong][0])}"
        msg = f"{given} was given for {logits.shape[1]} classes; expected integers from 0 to {logits.shape[1] - 1}"
        raise InputError(msg)
    logits, labels = logits.detach().to(torch.float64), labels.long()
    gaps = logits.gather(1, labels[:, None]) - logits
    scale = constant(lipschitz, std)
    slopes = _pairs(last, labels, logits) if last is not None else torch.full_like(gaps, rd.sqrt_up(2.0))
    # Two roundings up in the constant, three in what follows: each moves a number by less than 2^-52 of itself.
    least = (gaps / (slopes * scale)) * (1 - 2.0**-49)
    least = torch.where((gaps > 0) & (slopes * scale == 0), torch.inf, least)
    least = least.scatter(1, labels[:, None], torch.inf).amin(1)
    return torch.where((least > 0) & logits.isfinite().all(1), least, 0.0)


def _pairs(last: nn.Linear | Tensor, labels: Tensor, logits: Tensor) -> Tensor:
    """Upper bounds of `||w_y - w_j||`: (batch, classes)."""
    weight = (last if isinstance(last, Tensor) else last.weight).detach()
    if weight.ndim != 2 or weight.shape[0] != logits.shape[1]:
        msg = f"last has a weight of shape {tuple(weight.shape)}; expected ({logits.shape[1]}, features), one row a class"
        raise InputError(msg)
    rows = weight.to(logits)
    norms = torch.stack([torch.linalg.vector_norm(rows - row, dim=1) for row in rows])
    return (norms * (1 + rd.gamma(rows.shape[1] + 8.0)))[labels]


def certify(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    lipschitz: float | Bound | Report,
    eps: float | Sequence[float] = EPS,
    *,
    std: float | Sequence[float] = 1.0,
    last: nn.Linear | Tensor | None = None,
) -> Certified:
    """Clean and certified accuracy: the share of samples that are right and stay right at every distance up to `eps`.

    Args:
        model: the classifier, run in eval mode on its parameters' device, on what the loader gives.
        loader: batches (inputs, labels); inputs normalised where `std` is not 1.
        lipschitz: as for `radii`.
        eps: radii in pixels of [0, 1].
        std: as for `radii`.
        last: as for `radii`.

    Raises:
        InputError: no samples, or numbers that cannot be used.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> certify(model, [(torch.tensor([[1.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0]))], 1.0, eps=0.5).certified
    {0.5: 0.5}
    """
    wanted = tuple(eps) if isinstance(eps, Sequence) else (eps,)
    if any(not 0 <= e < math.inf for e in wanted):
        msg = f"eps={eps!r} was given; expected radii of at least 0 in pixels of [0, 1], such as 36/255"
        raise InputError(msg)
    found, right = [], 0
    for inputs, labels in loader:
        logits, truth = logits_of(model, inputs), labels.to(_device(model))
        found.append(radii(logits, truth, lipschitz, std=std, last=last).cpu())
        right += int((logits.argmax(1) == truth).sum())
    if not found:
        msg = "the loader gave no batch; expected at least one (inputs, labels)"
        raise InputError(msg)
    every = torch.cat(found)
    shares = {e: float((every > e).double().mean()) for e in wanted}
    pairs = "the pairwise norms of the last layer's rows" if last is not None else "sqrt(2)"
    most = decimals(constant(lipschitz, std), upward=True)
    because = f"margin over {pairs} times the constant {most} for pixels; logits as the model computes them"
    return Certified(right / len(every), shares, every, because)


def certified_accuracy(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], eps: float = EPS[0], *, lipschitz: float | Bound | Report, **options: Any
) -> float:
    """Certified accuracy at one radius; arguments as for `certify`. Never above the accuracy under any attack of that radius.

    >>> batch = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    >>> certified_accuracy(nn.Identity(), [batch], 0.5, lipschitz=1.0)
    1.0
    """
    return certify(model, loader, lipschitz, eps, **options).certified[eps]


def attacked_accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    eps: float = EPS[0],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    steps: int = 50,
    restarts: int = 1,
) -> float:
    """Accuracy under an l2 attack of radius `eps`: the empirical side, never below the certified accuracy at that radius.

    Projected gradient descent of the foolbox library, on pixels in [0, 1].

    Args:
        model: the classifier, which takes `(pixels - mean) / std`.
        loader: batches (pixels, labels); **pixels in [0, 1]**, not normalised.
        eps: radius.
        mean: of the input normalisation, by channel; None is 0.
        std: likewise; None is 1.
        steps: of the attack.
        restarts: from random points; a sample counts as right only if all of them fail.

    Raises:
        InputError: foolbox is not installed, there are no samples, or nothing is tried.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> attacked_accuracy(model, [(torch.tensor([[0.9, 0.0]]), torch.tensor([0]))], 0.5)
    1.0
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that foolbox imports
            foolbox: Any = import_module("foolbox")
    except ImportError as error:
        msg = 'attacks need foolbox, which is not installed; expected the extra: type pip install "gramlip[attack]"'
        raise InputError(msg) from error
    if min(steps, restarts) < 1:
        msg = f"steps={steps}, restarts={restarts} were given; expected integers of at least 1"
        raise InputError(msg)
    channels = len(std or mean or [])
    preprocessing = {"mean": list(mean or [0.0] * channels), "std": list(std or [1.0] * channels), "axis": -3} if channels else None
    modes, right, count = [(module, module.training) for module in model.modules()], 0, 0
    target = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), preprocessing=preprocessing, device=_device(model))
    attack = foolbox.attacks.L2ProjectedGradientDescentAttack(steps=steps)
    try:
        for pixels, labels in loader:
            truth = labels.to(_device(model))
            kept = torch.ones_like(truth, dtype=torch.bool)
            for _ in range(restarts):
                _, _, broken = attack(target, pixels.to(_device(model)), truth, epsilons=float(eps))
                kept &= ~broken
            right, count = right + int(kept.sum()), count + len(labels)
    finally:
        for module, training in modes:
            module.training = training
    if not count:
        msg = "the loader gave no batch; expected at least one (pixels, labels)"
        raise InputError(msg)
    return right / count


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's output in eval mode, without gradient; the modes are put back."""
    with evaluating(model):
        return model(inputs.to(_device(model)))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
