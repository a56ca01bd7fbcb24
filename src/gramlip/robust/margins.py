"""Radii from margins, rounded so that no radius is above the true one. docs/training.md#certify."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.network.execution import ExecutionError
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.given import unwrapped
from gramlip.operators.interval import Bound
from gramlip.reports.report import Report

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


def pair_constants(lipschitz: float | Bound | Report, last: nn.Linear | Tensor | None, logits: Tensor) -> Tensor:
    """Upper bounds of the constants of `f_y - f_j` for all inputs, (classes, classes), in float64: as for `radii`, of the input itself.

    >>> pair_constants(1.0, torch.eye(2), torch.zeros(1, 2))[0, 1] >= 2**0.5
    tensor(True)
    """
    upper, classes = constant(lipschitz), logits.shape[1]
    if last is None:
        return torch.full((classes, classes), rd.mul_up(rd.sqrt_up(2.0), upper), dtype=torch.float64)
    norms, units = _pairs(last, logits.cpu())
    return (norms * units * (1.0 + 2.0**-50) + rd.TINY) * upper * (1.0 + 2.0**-50) + rd.TINY


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
