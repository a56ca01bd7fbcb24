"""Certified robustness: from the margins of a classifier and its Lipschitz constant to l2 radii, in pixels of [0, 1].

Proofs: docs/training.md#certify. The constant is proved in floating point; the logits are taken as the model computes
them, or with what rounding may have done to them (`executed=True`, docs/execution.md).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from gramlip.errors import InputError, check_integers
from gramlip.network.audit import audit
from gramlip.network.execution import ExecutionError, execution_error
from gramlip.network.graph import export, undisturbed
from gramlip.network.local import Around, region
from gramlip.network.ranges import capped
from gramlip.network.rules import lower
from gramlip.nn.parametrize import evaluating, in_eval_mode
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.given import unwrapped
from gramlip.operators.interval import Bound, decimals
from gramlip.reports.report import Report

# ---- radii from margins --------------------------------------------------------------------------------------------------
#
# From margins to radii, rounded so that no radius is above the true one: docs/training.md#certify.

LEAST = 2.0**-960  # flushed denormals, of 2^-1022 at most, are less than half a rounding of what is not below this


def numbers(given: object) -> list[float]:
    """A number, or a sequence, array or tensor of them, as floats; nothing for anything else.

    >>> numbers(torch.tensor([0.5, 1.0])), numbers("1.0")
    ([0.5, 1.0], [])
    """
    try:
        return torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        return []


def tensor(name: str, given: object) -> Tensor:
    """A tensor, array or list of real numbers as a tensor."""
    try:
        found = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"{name} of type {type(given).__name__} were given; expected a tensor, array or list of numbers"
        raise InputError(msg) from error
    if found.is_complex():
        msg = f"{name} of {found.dtype} were given; expected real numbers"
        raise InputError(msg)
    return found


def constant(lipschitz: float | Bound | Report, std: float | Sequence[float] = 1.0) -> float:
    """Upper bound of the constant with respect to pixels: divided by the least `std` that the input normalisation divides by.

    >>> constant(2.0, std=(0.5, 0.25)) >= 8.0
    True
    """
    found = [float(lipschitz.upper)] if isinstance(lipschitz, Bound | Report) else numbers(lipschitz)
    if len(found) != 1 or not found[0] >= 0:
        msg = f"lipschitz={lipschitz!r} was given; expected an upper bound of at least 0: type gramlip.audit(model, example).upper"
        raise InputError(msg)
    (upper,), spread = found, numbers(std)
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
    execution: float | Tensor | ExecutionError = 0.0,
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
        execution: bounds of how far each logit of the program that runs is from the real one, by `gramlip.execution_error`: the radii
            are then of the program, for inputs of the set that the bounds hold for. With 0 the logits are taken for real numbers.

    Raises:
        InputError: shapes or numbers that cannot be used.

    Reference: Tsuzuku et al. 2018 (arXiv 1802.04034), proposition 1; docs/training.md#certify.

    >>> radii(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.tensor([0, 0]), 1.0)
    tensor([1.4142, 0.0000], dtype=torch.float64)
    """
    logits, labels = tensor("logits", logits), tensor("labels", labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        given = f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}"
        msg = f"{given} were given; expected (batch, classes) with at least 2 classes, and (batch,)"
        raise InputError(msg)
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if labels.is_floating_point() or bool(wrong.any()):
        given = f"a label of {labels.dtype}" if labels.is_floating_point() else f"the label {int(labels[wrong][0])}"
        msg = f"{given} was given for {logits.shape[1]} classes; expected integers from 0 to {logits.shape[1] - 1}"
        raise InputError(msg)
    logits, labels = least_favourable(logits, labels, execution), labels.long()
    gaps = logits.gather(1, labels[:, None]) - logits
    if last is None:
        slopes, units = torch.full_like(gaps, rd.sqrt_up(2.0)), torch.ones_like(gaps)
    else:
        slopes, units = (part[labels] for part in _pairs(last, logits))
    least = _quotients(gaps, slopes, units, constant(lipschitz, std)).scatter(1, labels[:, None], torch.inf).amin(1)
    return torch.where((least > 0) & logits.isfinite().all(1), least, 0.0)


def least_favourable(logits: Tensor, labels: Tensor, execution: float | Tensor | ExecutionError) -> Tensor:
    """Logits in float64, those of other classes raised by all that rounding may do to a margin: here, and at the other input.

    >>> least_favourable(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 0.125)[0, 1] >= 0.5
    tensor(True)
    """
    given = execution.outputs[0] if isinstance(execution, ExecutionError) and len(execution.outputs) == 1 else execution
    off = tensor("execution", given).to(torch.float64).reshape(-1)
    if len(off) not in (1, logits.shape[1]) or bool((off < 0).any() | off.isnan().any()):
        msg = f"execution={execution!r} was given for {logits.shape[1]} classes; expected bounds of at least 0, by gl.execution_error"
        raise InputError(msg)
    logits, labels, off = to_float64(logits), labels.long()[:, None], off.expand(logits.shape[1]).to(logits.device)
    if not bool(off.any()):
        return logits
    raised = logits + 2.0 * (off[labels] + off)
    return (raised + raised.abs() * 2.0**-50).scatter(1, labels, logits.gather(1, labels))


def _quotients(gaps: Tensor, slopes: Tensor, units: Tensor, scale: float) -> Tensor:
    """Lower bounds of gaps / (slopes * units * scale), infinite where the divisor is exactly zero; 0 or NaN where nothing is proved.

    Divided are mantissas, the exponents are added up: only the last step can leave the range of floats, to the largest of them or
    to 0. The gap, the product, the quotient and the margin are rounded once each, by 2^-53 of themselves: less than 2^-49 in all.
    """
    digits, shift = math.frexp(scale)
    found, exponents = torch.frexp(gaps.clamp(max=sys.float_info.max))  # a difference that overflows is larger than that
    divisors = slopes * digits
    small = found / divisors * (1 - 2.0**-49)
    exponents = (exponents - torch.frexp(units)[1] + 1 - shift).clamp(-2000, 2000)  # the units are powers of two, 1 is 2^1 / 2
    least = (small * _power(exponents // 2) * _power(exponents - exponents // 2)).clamp(max=sys.float_info.max)
    least = torch.where(least >= rd.TINY, least, torch.where(least.isnan(), least, 0.0))
    least = torch.where(divisors == 0, torch.inf, least)
    return torch.where(gaps >= LEAST, least, 0.0)


def _power(exponents: Tensor) -> Tensor:
    """2 to the power of integers from -1022 to 1023, exactly: made of bits."""
    return ((exponents.long() + 1023) << 52).view(torch.float64)


def _pairs(last: nn.Linear | Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds of `||w_y - w_j||`, (classes, classes), as numbers times powers of two; zero for rows that agree bit by bit.

    Each difference is divided by a power of two near its peak, so that its squares neither over- nor underflow where they count.
    """
    weight = last if isinstance(last, Tensor) else getattr(unwrapped(last) if isinstance(last, nn.Module) else last, "weight", None)
    if not isinstance(weight, Tensor):
        msg = f"last={last!r} was given; expected the network's final nn.Linear, or its weight: type last=model.fc"
        raise InputError(msg)
    if weight.ndim != 2 or weight.shape[0] != logits.shape[1]:
        msg = f"last has a weight of shape {tuple(weight.shape)}; expected ({logits.shape[1]}, features), one row a class"
        raise InputError(msg)
    rows, size = to_float64(weight).to(logits.device), weight.shape[1]
    norms, units = [], []
    for row in rows:
        gap = rows - row
        peak = gap.abs().amax(1).nan_to_num(LEAST).clamp(LEAST, 2.0**1023)
        unit = _power(torch.frexp(peak)[1] - 1)
        norm = torch.linalg.vector_norm(gap / unit[:, None], dim=1)
        # What is flushed of an entry, three times 2^-1022 at most, is less than 2^-60 of any unit.
        norm = norm * (1 + rd.gamma(size + 8.0)) + size * 2.0**-60
        norms.append(torch.where((rows.view(torch.int64) == row.view(torch.int64)).all(1), 0.0, norm))
        units.append(unit)
    return torch.stack(norms), torch.stack(units)


# ---- radii around each input ---------------------------------------------------------------------------------------------
#
# The largest radius at which the margins and the constants around an input agree: docs/local.md#radii.

TRIALS = 7  # radii that are tried for an input
CLOSE = 1e-6  # of the first one


class LocalRadii:
    """Radii of single inputs of a classifier from the constants of its pairs of classes around each of them.

    Raises:
        InputError: a model that is not audited, or whose result is not one row of logits.
    """

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        with evaluating(model), undisturbed():
            lowered = lower(export(unwrapped(model), (sample[:1].cpu(),)))
        if lowered.unsupported or len(lowered.network.outputs) != 1:
            calls = "; ".join(lowered.unsupported) or f"{len(lowered.network.outputs)} results"
            msg = f"{type(model).__name__} was given, with {calls}; expected a classifier that gramlip.audit takes"
            raise InputError(msg)
        self._around = Around(capped(lowered.network))

    def radius(self, x: Tensor, logits: Tensor, label: int, least: float) -> float:
        """No input closer than this to x (1, ...) gets another label; `least` is such a radius already."""
        others = [j for j in range(len(logits)) if j != label]
        pairs = torch.zeros(len(others), len(logits), dtype=torch.float64)
        pairs[:, label] = 1.0
        pairs[torch.arange(len(others)), others] = -1.0
        gaps = pairs @ to_float64(logits).cpu()
        best, below, above = least, least, math.inf
        tried = CLOSE * max(1.0, float(torch.linalg.vector_norm(to_float64(x))))
        for _ in range(TRIALS):
            around = region([tuple(x.shape)], None, x, tried)
            assert around is not None
            reach = float((gaps / self._around.results(around, pairs).constants).min()) * (1 - 2.0**-48)
            if not LEAST <= reach < math.inf:
                break
            best, below, above = max(best, min(reach, tried)), max(below, min(reach, tried)), min(above, max(reach, tried))
            if reach < tried:
                above = min(above, tried)
            if above <= below * 1.01:
                break
            tried = (below + above) / 2
        return best


# ---- certified accuracy --------------------------------------------------------------------------------------------------
#
# Certified robustness: from the margins of a classifier and its Lipschitz constant to l2 radii, in pixels of [0, 1].
#
# Proofs: docs/training.md#certify. The constant is proved in floating point; the logits are taken as the model computes them.

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


def certify(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    lipschitz: float | Bound | Report | None = None,
    eps: float | Sequence[float] = EPS,
    *,
    std: float | Sequence[float] = 1.0,
    last: nn.Linear | Tensor | None = None,
    local: bool = False,
    executed: bool = False,
    domain: tuple[Any, Any] | None = None,
) -> Certified:
    """Clean and certified accuracy: the share of samples that are right and stay right at every distance up to `eps`.

    Args:
        model: the classifier, run in eval mode on its parameters' device, on what the loader gives.
        loader: batches (inputs, labels); inputs normalised where `std` is not 1.
        lipschitz: as for `radii`; None audits the model.
        eps: radii in pixels of [0, 1].
        std: as for `radii`.
        last: as for `radii`.
        local: also look for a larger radius around each sample, which takes some constants of the network for each of them.
        executed: take what rounding may do to the logits off the margins, so that the radii are those of the program that runs, for
            inputs in `domain`.
        domain: (low, high) of what the loader gives and of what it may be changed to, numbers or tensors that broadcast to a sample.

    Raises:
        InputError: no samples, or numbers that cannot be used.
        UnsupportedError: `executed` of a model with calls whose rounding no rule bounds.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> certify(model, [(torch.tensor([[1.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0]))], 1.0, eps=0.5).certified
    {0.5: 0.5}
    """
    wanted = numbers(eps)
    if not wanted or any(not 0 <= e < math.inf for e in wanted):
        msg = f"eps={eps!r} was given; expected radii of at least 0 in pixels of [0, 1], such as 36/255"
        raise InputError(msg)
    found, right, around, error = list[Tensor](), 0, None, None
    for inputs, labels in _batches(loader):
        if lipschitz is None:
            with evaluating(model):
                lipschitz = audit(model, inputs[:1].to(_device(model)))
        logits, truth = tensor("logits", logits_of(model, inputs)), labels.to(_device(model))
        if executed and error is None:
            error = _execution(model, inputs[:1], domain)
        sure = least_favourable(logits, truth, error or 0.0)
        found.append(radii(sure, truth, lipschitz, std=std, last=last).cpu())
        if local:
            around = around or LocalRadii(model, inputs)
            found[-1] = _widened(around, inputs, sure.cpu(), truth.cpu(), found[-1], min(numbers(std)))
        right += int(((logits.argmax(1) == truth) & logits.isfinite().all(1)).sum())  # the argmax of NaN is no answer
    if not found:
        msg = "the loader gave no batch; expected at least one (inputs, labels)"
        raise InputError(msg)
    assert lipschitz is not None
    every = torch.cat(found)
    shares = {e: float((every > e).double().mean()) for e in wanted}
    pairs = "the pairwise norms of the last layer's rows" if last is not None else "sqrt(2)"
    most = decimals(constant(lipschitz, std), upward=True)
    because = f"margin over {pairs} times the constant {most} for pixels{AROUND if local else ''}; {_rounding(error)}"
    return Certified(right / len(every), shares, every, because)


AROUND = "; or over the constants of pairs of classes around each input, where that is more"


def _rounding(error: ExecutionError | None) -> str:
    """What is taken off for rounding, in words."""
    if error is None:
        return "logits as the model computes them"
    return f"less {decimals(4 * error.largest, upward=True)} for the rounding of both programs ({error.because})"


def _execution(model: nn.Module, sample: Tensor, domain: tuple[Any, Any] | None) -> ExecutionError:
    """What rounding may do to the logits of a sample of the domain."""
    if domain is None:
        msg = "executed=True was given without a domain; expected where inputs lie: type domain=(0.0, 1.0) for pixels"
        raise InputError(msg)
    with in_eval_mode(model):
        return execution_error(model, sample.to(_device(model)), domain=domain)


def _widened(around: LocalRadii, inputs: Tensor, logits: Tensor, labels: Tensor, least: Tensor, std: float) -> Tensor:
    """The radii in pixels, those of the constants around each input where they are larger; a step of one pixel moves the input by 1/std."""
    made = least.tolist()
    for i, radius in enumerate(made):
        if radius > 0:
            found = around.radius(inputs[i : i + 1].cpu(), logits[i], int(labels[i]), rd.down(radius / std))
            made[i] = max(radius, rd.down(found * std))
    return torch.tensor(made, dtype=torch.float64)


def certified_accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    eps: float = EPS[0],
    *,
    lipschitz: float | Bound | Report | None = None,
    **options: Any,
) -> float:
    """Certified accuracy at one radius; arguments as for `certify`. Never above the accuracy under any attack of that radius.

    >>> batch = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    >>> certified_accuracy(nn.Identity(), [batch], 0.5, lipschitz=1.0)
    1.0
    """
    if len(numbers(eps)) != 1:
        msg = f"eps={eps!r} was given; expected one radius such as 36/255: type certify(...).certified for several"
        raise InputError(msg)
    (share,) = certify(model, loader, lipschitz, eps, **options).certified.values()
    return share


def attacked_accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    eps: float = EPS[0],
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
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
    check_integers(1, steps=steps, restarts=restarts)
    if len(numbers(eps)) != 1 or not 0 <= (radius := numbers(eps)[0]) < math.inf:
        msg = f"eps={eps!r} was given; expected one radius of at least 0 in pixels of [0, 1], such as 36/255"
        raise InputError(msg)
    preprocessing, right, count = _preprocessing(mean, std), 0, 0
    with in_eval_mode(model):
        target = foolbox.PyTorchModel(model, bounds=(0, 1), preprocessing=preprocessing, device=_device(model))
        attack = foolbox.attacks.L2ProjectedGradientDescentAttack(steps=steps)
        for pixels, labels in _batches(loader):
            if not bool(((pixels >= 0) & (pixels <= 1)).all()):
                given = f"pixels from {float(pixels.min()):.4g} to {float(pixels.max()):.4g} were given"
                msg = f"{given}; expected pixels in [0, 1]: pass mean and std here in place of normalising in the loader"
                raise InputError(msg)
            truth = labels.to(_device(model))
            kept = torch.ones_like(truth, dtype=torch.bool)
            for _ in range(restarts):
                _, _, broken = attack(target, pixels.to(_device(model)), truth, epsilons=radius)
                kept &= ~broken
            right, count = right + int(kept.sum()), count + len(labels)
    if not count:
        msg = "the loader gave no batch; expected at least one (pixels, labels)"
        raise InputError(msg)
    return right / count


def _preprocessing(mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> dict[str, Any] | None:
    """The normalisation as foolbox takes it, from numbers, sequences, arrays or tensors; None where there is none."""
    if mean is None and std is None:
        return None
    shifts, scales = [0.0] if mean is None else numbers(mean), [1.0] if std is None else numbers(std)
    if not shifts or not all(map(math.isfinite, shifts)) or not scales or not all(0 < s < math.inf for s in scales):
        msg = f"mean={mean!r}, std={std!r} were given; expected the finite numbers that are subtracted and the positive ones divided by"
        raise InputError(msg)
    channels = max(len(shifts), len(scales))
    if {len(shifts), len(scales)} - {1, channels}:
        msg = f"mean has {len(shifts)} channels and std {len(scales)}; expected the same number of both"
        raise InputError(msg)
    wide = (values * channels if len(values) == 1 else values for values in (shifts, scales))
    return dict(zip(("mean", "std"), wide, strict=True), axis=-3)


def _batches(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs that a loader gives, the labels as a tensor; refused where it gives something else."""
    for batch in loader:
        if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[0], Tensor):
            given = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
            msg = f"the loader gave a {given}; expected (inputs, labels), a tensor first: type ((b[0], b[1]) for b in loader)"
            raise InputError(msg)
        yield batch[0], tensor("labels", batch[1])


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's output in eval mode, without gradient; the modes are put back."""
    with evaluating(model):
        return model(inputs.to(_device(model)))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
