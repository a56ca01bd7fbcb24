"""Radii from margins, by one constant or by constants around each input. No radius is above the true one.

docs/training.md#certify and docs/local.md#radii.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.network.execution import ExecutionError
from gramlip.network.graph import export, undisturbed
from gramlip.network.local import Around, Results, region
from gramlip.network.ranges import capped
from gramlip.network.rules import lower
from gramlip.nn.parametrize import evaluating
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
        values = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"{name} of type {type(given).__name__} were given; expected a tensor, array or list of numbers"
        raise InputError(msg) from error
    if values.is_complex():
        msg = f"{name} of {values.dtype} were given; expected real numbers"
        raise InputError(msg)
    return values


def constant(lipschitz: float | Bound | Report, std: float | Sequence[float] = 1.0) -> float:
    """Upper bound of the constant with respect to pixels: divided by the least `std` that the input normalisation divides by.

    >>> constant(2.0, std=(0.5, 0.25)) >= 8.0
    True
    """
    if isinstance(lipschitz, Report) and lipschitz.scope:
        given = f"the constant of {' and '.join(lipschitz.scope)} was given"
        msg = f"{given}; expected one of all inputs and results: type gramlip.audit(model, example), or local=True for balls"
        raise InputError(msg)
    constants = [float(lipschitz.upper)] if isinstance(lipschitz, Bound | Report) else numbers(lipschitz)
    if len(constants) != 1 or not constants[0] >= 0:
        msg = f"lipschitz={lipschitz!r} was given; expected an upper bound of at least 0: type gramlip.audit(model, example).upper"
        raise InputError(msg)
    (upper,), spread = constants, numbers(std)
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
        lipschitz: upper bound for the network from its (normalised) input to the logits; with `last`, to the input of `last`. That
            of a report on a domain holds for inputs of the domain; one around an input, or of some entries, is refused.
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
    check_classes(logits, labels)
    logits, labels = least_favourable(logits, labels, execution), labels.long()
    gaps = logits.gather(1, labels[:, None]) - logits
    if last is None:
        slopes, units = torch.full_like(gaps, rd.sqrt_up(2.0)), torch.ones_like(gaps)
    else:
        slopes, units = (part[labels] for part in _pairs(last, logits))
    least = _quotients(gaps, slopes, units, constant(lipschitz, std)).scatter(1, labels[:, None], torch.inf).amin(1)
    return torch.where((least > 0) & logits.isfinite().all(1), least, 0.0)


def check_classes(logits: Tensor, labels: Tensor) -> None:
    """InputError unless there is a row of logits for each label, and a column for each class."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        given = f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}"
        msg = f"{given} were given; expected (batch, classes) with at least 2 classes, and (batch,)"
        raise InputError(msg)
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if labels.is_floating_point() or bool(wrong.any()):
        given = f"a label of {labels.dtype}" if labels.is_floating_point() else f"the label {int(labels[wrong][0])}"
        msg = f"{given} was given for {logits.shape[1]} classes; expected integers from 0 to {logits.shape[1] - 1}"
        raise InputError(msg)


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
    mantissas, exponents = torch.frexp(gaps.clamp(max=sys.float_info.max))  # a difference that overflows is larger than that
    divisors = slopes * digits
    small = mantissas / divisors * (1 - 2.0**-49)
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


# ---- around single inputs ----------------------------------------------------------------------------------------------
#
# How far margins last as constants grow with the distance.

INF = math.inf
TRIALS = 6  # radii that are tried for an input
CLOSE = 1.05  # a ball tried in vain over the radius that is proved, at which nothing more is tried
IDLE = 2.0  # the same of a ball whose constants are those of everywhere
FIRST = 1e-4  # of what is open, is tried where nothing is proved
STEP = 4.0  # times what is proved is tried at once
NEAREST = 10  # other classes whose slopes at the input say what no trial can reach
INWARD = 0.1  # of a bracket, on its logarithm, is left to either side of a guess
BEYOND = 1.0 + 1e-6  # times a goal is tried for it


@dataclass(frozen=True)
class Trial:
    """A ball that was tried, and what holds on it for the margins of a label over each other class."""

    radius: float
    on: Results


def lasting(margins: Tensor, everywhere: Tensor, trials: Sequence[Trial]) -> float:
    """No margin is used up closer to the centre than this: theorem L7, from what holds on some balls and everywhere.

    Args:
        margins: (pairs,), lower bounds at the centre, all of them positive.
        everywhere: (pairs,), upper bounds of the constants for all inputs.
        trials: what is known of some balls around the centre.

    >>> lasting(torch.tensor([3.0]).double(), torch.tensor([4.0]).double(), []) <= 0.75
    True
    """
    balls = sorted(trials, key=lambda trial: trial.radius)
    constants, rates = (_rising([getattr(b.on, name) for b in balls], everywhere) for name in ("constants", "rates"))
    drops = _rising([b.on.drops for b in balls], torch.full_like(everywhere, INF))
    begin, left = 0.0, margins
    for ball, constant, rate, drop in zip(balls, constants[:-1], rates[:-1], drops[:-1], strict=True):
        falls = torch.minimum(_above(rate * ball.radius), _above(drop))
        rest = torch.maximum(left - _above(constant * rd.up(ball.radius - begin)), margins - falls) - margins * 2.0**-50
        spent = ~(rest > 0)
        if bool(spent.any()):
            return max(begin, min(_ends(begin, left / constant, margins / rate)[spent].tolist()))
        begin, left = ball.radius, torch.minimum(rest, margins)
    return max(begin, float(_ends(begin, left / constants[-1], margins / rates[-1]).min()))


def _rising(inner: Sequence[Tensor], outer: Tensor) -> list[Tensor]:
    """Bounds that rise from ball to ball: what holds on a ball holds on every smaller one; the last one is `outer`."""
    known = [outer.nan_to_num(INF, INF).clamp_min(LEAST)]
    for bound in reversed(inner):
        known.append(torch.minimum(bound.nan_to_num(INF, INF).clamp_min(LEAST), known[-1]))
    return known[::-1]


def _above(x: Tensor) -> Tensor:
    return x * (1.0 + 2.0**-50)


def _ends(begin: float, further: Tensor, whole: Tensor) -> Tensor:
    """The distance that each margin lasts, beyond `begin`, or at least that much from the centre."""
    ends = (torch.maximum(begin + further, whole) * (1 - 2.0**-50)).clamp_max(sys.float_info.max)
    return torch.where(ends >= rd.TINY, ends, 0.0)


# ---- one classifier, one input after another -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Margins of a label over all other classes at an input, with what the search for its radius begins from.

    `pairs` has a row `e_y - e_j` for each of them, `everywhere` the constants of these for all inputs, `proved` is a radius that is
    proved already, and no trial can prove one above `limit`, by the slopes at the input.
    """

    margins: Tensor
    pairs: Tensor
    everywhere: Tensor
    proved: float
    limit: float


class LocalRadii:
    """Radii of single inputs of a classifier from the constants of its pairs of classes around each of them.

    Raises:
        InputError: a model that is not audited, or whose result is not one row of logits.
    """

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        bare = unwrapped(model)
        self._model = bare if all(p.device.type == "cpu" for p in bare.parameters()) else copy.deepcopy(bare).cpu()
        with evaluating(self._model), undisturbed():
            lowered = lower(export(self._model, (sample[:1].cpu(),)))
        if lowered.unsupported or len(lowered.network.outputs) != 1:
            calls = "; ".join(lowered.unsupported) or f"{len(lowered.network.outputs)} results"
            msg = f"{type(model).__name__} was given, with {calls}; expected a classifier that gramlip.audit takes"
            raise InputError(msg)
        self._around = Around(capped(lowered.network))

    def radius(self, x: Tensor, logits: Tensor, label: int, everywhere: Tensor, proved: float, goals: Sequence[float] = (INF,)) -> float:
        """No input closer than this to x (1, ...) gets another label; looked for up to the goals, in their order.

        The search ends at the first goal that is out of its reach. 0 for a label that is not the largest logit.

        Args:
            x: the input.
            logits: (classes,), lower for the label and upper for others than what the network is taken to give.
            label: of x.
            everywhere: (classes,), upper bounds of the constants of the label's logit less the others', for all inputs.
            proved: such a radius already.
            goals: radii.
        """
        others = [j for j in range(len(logits)) if j != label]
        pairs = torch.zeros(len(others), len(logits), dtype=torch.float64)
        pairs[:, label] = 1.0
        pairs[torch.arange(len(others)), others] = -1.0
        margins = (pairs @ to_float64(logits).cpu()) * (1 - 2.0**-50)
        if not bool((margins >= LEAST).all() & margins.isfinite().all()) or proved > goals[-1]:
            return proved
        known = Known(margins, pairs, everywhere[others], proved, self._limit(x, margins, pairs))
        return _Search(self._around, x, known).radius(goals)

    def _limit(self, x: Tensor, margins: Tensor, pairs: Tensor) -> float:
        """Margin over slope at the input, for the pairs of least margin: no constant is below the slope."""
        nearest = margins.topk(min(NEAREST, len(margins)), largest=False).indices.tolist()
        with evaluating(self._model), torch.inference_mode(False), torch.enable_grad():
            point = x.detach().cpu().clone().requires_grad_()
            logits = self._model(point.clone())[0]
            if not logits.requires_grad:
                return INF
            rows = [torch.autograd.grad((pairs[j].to(logits) * logits).sum(), point, retain_graph=True)[0] for j in nearest]
        sizes = torch.stack([torch.linalg.vector_norm(row.double()) for row in rows])
        return float((margins[nearest] / sizes).nan_to_num(INF, INF).min())


class _Search:
    """Trials of radii for one input. Which are tried decides how much is proved, never whether it holds."""

    def __init__(self, around: Around, x: Tensor, known: Known) -> None:
        self._around, self._x, self._known = around, x, known
        self._trials, self._proved = list[Trial](), known.proved

    def radius(self, goals: Sequence[float]) -> float:
        """The radius proved when the search ends, at the first goal out of its reach or after TRIALS."""
        for goal in goals:
            while self._proved <= goal and len(self._trials) < TRIALS and not self._out_of_reach(goal):
                self._try(self._next(goal))
            if self._proved <= goal:
                break
        return self._proved

    def _try(self, radius: float) -> None:
        area = region([tuple(self._x.shape)], None, self._x, radius)
        assert area is not None
        self._trials.append(Trial(radius, self._around.results(area, self._known.pairs)))
        self._proved = max(self._proved, lasting(self._known.margins, self._known.everywhere, self._trials))

    def _failed(self) -> Trial | None:
        """The smallest ball of those that were tried in vain."""
        return min((t for t in self._trials if t.radius > self._proved), key=lambda t: t.radius, default=None)

    def _out_of_reach(self, goal: float) -> bool:
        """Whether no trial is worth its time: constants grow with the radius, as far as the search knows."""
        if self._known.limit <= (CLOSE * self._proved if goal == INF else goal):
            return True
        failed = self._failed()
        if failed is not None and failed.radius <= self._proved * (IDLE if self._idle(failed) else CLOSE):
            return True
        return goal < INF and any(self._used_up(trial, goal) for trial in self._trials)

    def _used_up(self, trial: Trial, goal: float) -> bool:
        """Whether a goal is further than what holds on a smaller ball lets a margin last."""
        rates = torch.minimum(trial.on.rates, self._known.everywhere)
        return trial.radius < goal and bool((rates * goal > self._known.margins).any())

    def _idle(self, trial: Trial) -> bool:
        """Whether what holds on a ball is no better than what holds everywhere."""
        return bool((trial.on.rates >= self._known.everywhere).all())

    def _next(self, goal: float) -> float:
        """The radius to try: where a power of it, through the ends of what is open, would use up the margin."""
        failed, limit = self._failed(), self._known.limit
        top = min(limit if failed is None else failed.radius, goal * BEYOND if goal else INF)
        if top == INF:
            return STEP * max(self._proved, FIRST)
        begin = max(self._proved, FIRST * top)
        if failed is None:
            return top if goal < INF and top <= STEP * begin else math.sqrt(begin * top)
        share = 0.5
        if limit < INF and not self._idle(failed):
            use = float((failed.on.rates / self._known.margins).max()) * failed.radius
            share = math.log(limit / begin) / (math.log(limit / begin) + math.log(max(use, 1.0)))
        return begin * (top / begin) ** min(max(share, INWARD), 1.0 - INWARD)
