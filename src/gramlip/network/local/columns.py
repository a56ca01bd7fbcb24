"""Columns carried forward: every value as a linear function of the input, and what slopes may add to it. docs/local.md#columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gramlip.network.local.intervals import Region, Value, round_down, round_up, terms, whole_of
from gramlip.network.local.relaxations import action, stray_of
from gramlip.network.steps import Input, Linear, Lipschitz, Network, Slope, Step
from gramlip.norm.certify import certify_all
from gramlip.numerics import rounding as rd
from gramlip.numerics.rounding import frobenius_up, row_norms_up
from gramlip.operators.linear_maps import Dense

INF = math.inf
MOST = 2**27  # entries of the columns of one value
WORK = 2**31  # and of those of all values together
TOGETHER = 2**24  # of them at a time
LARGEST = 1e60  # differences and weights up to which nothing that underflows counts
LOST = 1e-150  # is added for what does


@dataclass(frozen=True)
class Form:
    """How a value differs at two inputs y and z, entry by entry: by `linear (y - z) + extra w` up to `loose`.

    `linear` has a column for each entry of the input, along its first axis, `extra` one for each activation that may switch; the
    entries of w are what those differ by beside their middles. `most` bounds the differences, first of two inputs at the distance
    1, then of an input and the centre of the set; so does `loose` what has no column.
    """

    linear: Tensor
    extra: Tensor
    loose: Tensor
    most: Tensor


@dataclass(frozen=True)
class Switches:
    """Activations that have columns: their slopes differ from the middle by `half`, their arguments by `rows (y - z)` up to `rest`."""

    half: Tensor
    rows: Tensor
    rest: Tensor


class Columns:
    """The values so far as linear functions of the input, and what slopes may add to them."""

    def __init__(self, network: Network, area: Region, budget: int = WORK) -> None:
        """Nothing is followed where that takes more than `budget` entries."""
        sizes, outputs = [math.prod(step.shape) for step in network.steps], network.outputs
        self._area, self._outputs, self._sizes = area, outputs, sizes
        work = area.entries * sum(sizes)
        self._left = budget - work
        self._pays = area.entries * max(sizes) <= MOST and self._left >= 0 and area.far < LARGEST
        self._actions = [action(network.steps, i) if self._pays else None for i in range(len(sizes))]
        reads = [step.sources if act is None else act[0] for step, act in zip(network.steps, self._actions, strict=True)]
        self._last = {s: i for i, some in enumerate(reads) for s in some} | dict.fromkeys(outputs, len(sizes))
        self._steps, self._forms, self._inputs = list[Step](), dict[int, Form](), 0
        self._weights, self._switches = torch.zeros(2, 0, dtype=torch.float64), list[Switches]()

    def add(self, step: Step, value: Value) -> Value:
        """One more step; its value inside what the columns say of it."""
        i = len(self._steps)
        self._steps.append(step)
        if not self._pays:
            return value
        with torch.no_grad():
            form = self._form(i, step)
        self._forms = {s: f for s, f in self._forms.items() if self._last.get(s, -1) > i}
        if form is None or not bool((form.most < LARGEST).all()):
            return value
        if self._last.get(i, -1) > i:
            self._forms[i] = form
        return _inside(value, form.most[1], step)

    def _form(self, i: int, step: Step) -> Form | None:
        if isinstance(step.what, Input):
            return self._input(step)
        act = self._actions[i]
        if any(s not in self._forms for s in (step.sources if act is None else act[0])):
            return None
        if isinstance(step.what, Slope) and self._forms[step.sources[0]].linear.shape[1:] == step.shape:
            return self._activated(i, step.what, self._forms[step.sources[0]])
        return None if act is None else self._mapped(i, step, act[1], [self._forms[s] for s in act[0]])

    def _input(self, step: Step) -> Form:
        size = math.prod(step.shape)
        linear = torch.zeros(self._area.entries, size, dtype=torch.float64)
        linear[torch.arange(self._inputs, self._inputs + size), torch.arange(size)] = 1.0
        self._inputs += size
        blank = torch.zeros(2, *step.shape, dtype=torch.float64)
        return self._measured(linear.reshape(-1, *step.shape), blank[:0], blank)

    def _mapped(self, i: int, step: Step, act: Callable[[Sequence[Tensor], bool], Tensor], forms: Sequence[Form]) -> Form:
        """A linear step."""
        linear = _in_parts(act, [f.linear for f in forms], step)
        count = max(len(f.extra) for f in forms)
        extra = _in_parts(act, [torch.cat([f.extra, f.extra.new_zeros(count - len(f.extra), *f.extra.shape[1:])]) for f in forms], step)
        what, wide = step.what, sum(f.most[0].numel() for f in forms)
        products = terms(what.op) if isinstance(what, Linear) else wide if isinstance(what, Lipschitz) else len(forms)
        gamma = rd.gamma(8.0 * (products + 8))
        loose = act([f.loose + gamma * self._rounded(f) for f in forms], True) * (1.0 + gamma) + LOST
        if stray := stray_of(self._steps, i):
            lost = [rd.mul_up(stray, rd.hypot_up(frobenius_up(f.most[k]) for f in forms)) for k in range(2)]
            loose = round_up(loose + torch.tensor(lost, dtype=torch.float64).reshape(2, *[1] * len(step.shape)))
        return self._measured(linear, extra, loose)

    def _rounded(self, form: Form) -> Tensor:
        """A norm of the columns of each entry, of which products have their relative roundings."""
        return torch.stack([form.most[0], form.most[0] * self._area.radius]) if self._area.radius < INF else form.most

    def _activated(self, i: int, what: Slope, form: Form) -> Form:
        """An activation: its middle slopes, and a column of its own for each entry that differs most from them, as many as fit."""
        low, high = (torch.as_tensor(end, dtype=torch.float64).expand(form.linear.shape[1:]) for end in (what.low, what.high))
        middle = low + (high - low) / 2
        half = torch.maximum(high - middle, middle - low)
        half = torch.where(half > 0, half * (1 + 2.0**-50) + rd.TINY, 0.0)
        loose = (middle.abs() * (form.loose + rd.gamma(8.0) * self._rounded(form))) * (1.0 + rd.gamma(8.0)) + LOST
        moved = (half * form.most * (1.0 + rd.gamma(8.0))).flatten(1)
        open_, known, later = int((half > 0).sum()), self._area.entries + self._weights.shape[1], self._sizes[i:]
        room = max(0, min(open_, MOST // max(later) - known, self._left // sum(later)))
        self._left -= room * sum(later)
        chosen = moved[0].topk(room).indices
        own = torch.zeros(room, half.numel(), dtype=torch.float64)
        own[torch.arange(room), chosen] = 1.0
        before = form.extra.new_zeros(self._weights.shape[1] - len(form.extra), *half.shape)
        self._weights = torch.cat([self._weights, moved[:, chosen]], 1)
        moved[:, chosen] = 0.0
        rows = form.linear.flatten(1)[:, chosen].mT.contiguous()
        rest = (form.most[0] - torch.linalg.vector_norm(form.linear, dim=0)).reshape(-1)[chosen].clamp_min(0.0)
        self._switches.append(
            Switches(half.reshape(-1)[chosen], rows, round_up(rest + rd.gamma(len(form.linear) + 64.0) * form.most[0].reshape(-1)[chosen]))
        )
        extra = torch.cat([form.extra * middle, before, own.reshape(room, *half.shape)])
        return self._measured(form.linear * middle, extra, round_up(loose + moved.reshape(loose.shape)))

    def _measured(self, linear: Tensor, extra: Tensor, loose: Tensor) -> Form:
        """A form with what it bounds of the differences."""
        area, count = self._area, float(len(linear) + len(extra) + 8)
        length = torch.linalg.vector_norm(linear, dim=0) * (1.0 + rd.gamma(count)) + LOST
        span = length * area.radius
        halves = area.halves
        if not bool((halves >= area.radius * (1.0 - 2.0**-30)).all()):
            box = sum((h @ part.flatten(1).abs() for h, part in zip(halves.split(256), linear.split(256), strict=True)), torch.zeros(()))
            span = torch.minimum(span, box.reshape(span.shape) * (1.0 + rd.gamma(count)) + LOST)
        moved, weights = torch.zeros_like(loose).flatten(1), self._weights[:, : len(extra)]
        for w, part in zip(weights.split(256, 1), extra.split(256), strict=True) if len(extra) else ():
            moved = moved + w @ part.flatten(1).abs()
        most = torch.stack([length, span]) + moved.reshape(loose.shape) * (1.0 + rd.gamma(count)) + loose
        return Form(linear, extra, loose, most * (1.0 + rd.gamma(8.0)))

    # ---- what they say of the results ----------------------------------------------------------------------------------------

    def rows(self) -> Tensor | None:
        """Upper bounds of the constants of the single results on the set, flat: theorem L8; None where columns do not reach them."""
        if any(i not in self._forms for i in self._outputs):
            return None
        return torch.cat([self._forms[i].most[0].reshape(-1) for i in self._outputs])

    def norm(self, inputs: Tensor | None, outputs: Tensor | None) -> float:
        """Upper bound of the constant on the set, from and to some entries of the flat inputs and results; None are all."""
        if any(i not in self._forms for i in self._outputs):
            return INF
        forms, count = [self._forms[i] for i in self._outputs], self._weights.shape[1]
        linear = torch.cat([f.linear.flatten(1) for f in forms], 1)
        extra = torch.cat([torch.cat([f.extra.flatten(1), f.extra.new_zeros(count - len(f.extra), f.loose[0].numel())]) for f in forms], 1)
        loose = torch.cat([f.loose[0].reshape(-1) for f in forms])
        if inputs is not None:
            linear = linear[inputs]
        if outputs is not None:
            linear, extra, loose = linear[:, outputs], extra[:, outputs], loose[outputs]
        middle = float(certify_all([Dense(linear.mT.contiguous())], rtol=1e-6)[0].upper)
        return rd.add_up(middle, self._switched(extra, inputs), frobenius_up(loose))

    def _switched(self, extra: Tensor, inputs: Tensor | None) -> float:
        """What all activations with columns may add in norm, `extra` being those of the results."""
        lengths, room = row_norms_up(extra), 1.0 + rd.gamma(float(len(extra) + 64))
        kept = lengths > 0
        if not bool(kept.any()):
            return 0.0
        half, rows, rest = (torch.cat([getattr(s, name) for s in self._switches])[kept] for name in ("half", "rows", "rest"))
        extra, lengths = extra[kept], lengths[kept]
        plain = frobenius_up((self._weights[0, kept] @ extra.abs()) * room)
        apart = frobenius_up(((half * rest) @ extra.abs()) * room)
        share = (half * lengths / row_norms_up(rows).clamp_min(LOST)).sqrt().clamp(1.0 / LARGEST, LARGEST)
        left, right = extra * (half / share).reshape(-1, 1), (rows if inputs is None else rows[:, inputs]) * share.reshape(-1, 1)
        found = certify_all([Dense(left.mT.contiguous()), Dense(right)], rtol=1e-3)
        norms = [rd.add_up(float(b.upper), rd.mul_up(rd.gamma(8.0), frobenius_up(m))) for b, m in zip(found, (left, right), strict=True)]
        return min(plain, rd.add_up(rd.mul_up(*norms), apart))


def _in_parts(act: Callable[[Sequence[Tensor], bool], Tensor], xs: Sequence[Tensor], step: Step) -> Tensor:
    """A linear step of many columns, some of them at a time."""
    made = torch.empty(len(xs[0]), *step.shape, dtype=torch.float64)
    some = max(1, TOGETHER // max(math.prod(step.shape), *(x[0].numel() for x in xs))) if len(made) else 1
    for k in range(0, len(made), some):
        made[k : k + some] = act([x[k : k + some] for x in xs], False)
    return made


def _inside(value: Value, span: Tensor, step: Step) -> Value:
    """A value within so far of its value at the centre."""
    if value.middle is None or not isinstance(value.low, Tensor):
        return value
    low = torch.maximum(value.low, round_down(value.middle[0] - span))
    high = torch.minimum(value.high, round_up(value.middle[1] + span))
    return replace(value, low=low, high=high, whole=whole_of(low, high, value.whole, step.shape), far=min(value.far, frobenius_up(span)))
