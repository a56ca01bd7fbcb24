"""Values joined, and what is known of them together: curves of one value, sorted pairs. docs/network.md#shortcuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gramlip.network.rules.piecewise_linear import IDENTITY, Entrywise, NotACurveError, steepness
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.rules.shapes import between
from gramlip.network.steps import Join, Lipschitz, Shortcut, Step, Unbounded, View


@register("aten.cat", "aten.concat", "aten.concatenate", "aten.stack", "aten.hstack", "aten.vstack", "aten.dstack")
def _cat(call: Call) -> Var:
    parts: list[Any] = next(v for v in call.args.values() if isinstance(v, list | tuple))  # type: ignore[reportUnknownVariableType]
    if len(call.vars) < len(parts):
        what = Lipschitz(1.0, "concatenation with constants", same_range=True, others=between(parts))
    elif "cat" in call.op:
        what = Join(int(call.const("dim")) % len(call.shape))
    else:
        what = Lipschitz(1.0, "values stacked", same_range=True)
    made, apart = call.then(what, *call.vars), [_origin(call, v) for v in call.vars]
    tied = _tied(call, list(apart))
    if sorted(tied) != [(1.0, i) for i in sorted(apart)]:
        factors, sources = zip(*tied, strict=True)
        call.steps[made.step] = replace(call.steps[made.step], shortcut=Shortcut(factors, sources))
    return made


def _tied(call: Call, alone: list[int]) -> list[tuple[float, int]]:
    """Steps whose differences, times these factors and joined, are at least as long as those of the given ones joined."""
    curves: dict[int, list[Entrywise]] = {}
    for i in alone:
        curve = call.known.curves.get(i)
        curves.setdefault(i if curve is None else curve.base.step, []).append(
            curve or Entrywise(Var(i, call.steps[i].shape), (), lambda _: IDENTITY)
        )
    found: list[tuple[float, int]] = []
    for base, values in curves.items():
        try:
            factor = steepness(values) if len(values) > 1 else math.inf
        except NotACurveError:
            continue
        if factor < math.inf:
            for value in values:
                value.rely(call)
            found.append((factor, base))
            alone = [i for i in alone if i != base and (i not in call.known.curves or call.known.curves[i].base.step != base)]
    while alone:
        i = alone.pop()
        mate = next((j for j in alone if _mates(call.steps[i], call.steps[j])), None)
        if mate is None:
            found.append((1.0, i))
            continue
        alone.remove(mate)
        found += [(1.0, s) for s in call.steps[i].sources]
    return found


def _mates(one: Step, other: Step) -> bool:
    """Whether the two are the largest and the least of the same groups of entries, or sine and cosine of one value."""
    a, b = one.what, other.what
    if sorted(one.sources) != sorted(other.sources):
        return False
    if isinstance(a, Lipschitz) and isinstance(b, Lipschitz) and a.side is not None and b.side is not None:
        return a.side[0] == -b.side[0] and a.side[1] == b.side[1]
    return {one.op, other.op} == {"aten.sin.default", "aten.cos.default"}


def _origin(call: Call, v: Var) -> int:
    """The step of the value before it was only rearranged."""
    at, steps = v.step, call.steps
    while isinstance(steps[at].what, View) or _is_value(steps, at):
        at = steps[at].sources[0]
    return at


def _is_value(steps: Sequence[Step], at: int) -> bool:
    """Whether the step takes the values, not the places, from what the largest or least entries are found with."""
    found = steps[steps[at].sources[0]].what if steps[at].op == "getitem" else None
    return getattr(found, "side", None) is not None and not isinstance(steps[at].what, Unbounded)
