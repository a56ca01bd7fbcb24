"""Radii around single inputs: how far margins last as constants grow with the distance. docs/local.md#radii."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.network.graph import export, undisturbed
from gramlip.network.local import Around, Results, region
from gramlip.network.ranges import capped
from gramlip.network.rules import lower
from gramlip.nn.parametrize import evaluating
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.given import unwrapped
from gramlip.robust.margins import LEAST

INF = math.inf
TRIALS = 6  # radii that are tried for an input
CLOSE = 1.05  # a ball tried in vain over the radius that is proved, at which nothing more is tried
IDLE = 2.0  # the same of a ball whose constants are those of everywhere
FIRST = 1e-4  # of what is open, is tried where nothing is proved
STEP = 4.0  # times what is proved is tried at once
NEAREST = 10  # other classes whose slopes at the input say what no trial can reach
INWARD = 0.1  # of a bracket, on its logarithm, is left to either side of a guess
BEYOND = 1.0 + 1e-6  # times a goal is tried for it

# ---- how far margins last ------------------------------------------------------------------------------------------------


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
    """How far each margin lasts, at `begin` plus as much, or at least as much from the centre on."""
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
        """What is proved when the search ends, at the first goal that is out of its reach or after TRIALS."""
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
