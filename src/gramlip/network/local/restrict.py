"""Networks restricted to a set of inputs: docs/local.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from gramlip.network.local.columns import WORK, Columns, inside
from gramlip.network.local.intervals import Region, Value, followed, given
from gramlip.network.local.relaxations import BUDGET, Relaxations
from gramlip.network.steps import Input, Linear, Network, Slope, Step
from gramlip.operators.linear_maps import Scale

INF = math.inf


@dataclass(frozen=True)
class Local:
    """A network on a set of inputs: its steps restricted to it, and what is known of the value of each."""

    area: Region
    network: Network
    values: list[Value]
    columns: Columns


def restricted(network: Network, area: Region, budget: float = BUDGET, columns: int = WORK) -> Local:
    """The network with slopes, constants and caps on a set of inputs, entry by entry, and what is known of each value there.

    `budget` is of the linear relaxations, `columns` of the differences that are followed: entries, of which 2**31 take half a minute.
    """
    steps, known = list[Step](), list[Value]()
    inputs, lines, moved = iter(range(len(area.low))), Relaxations(area, budget), Columns(network, area, centred=True, budget=columns)
    for step in network.steps:
        if isinstance(step.what, Input):
            made, value = step, given(area, next(inputs))
        else:
            for s in step.sources:
                known[s] = lines.tighten(s, step.what)
            made, value = followed(step, [known[s] for s in step.sources], [network.steps[s].shape for s in step.sources])
        span = moved.add(made, known[step.sources[0]] if step.sources else None)
        value = value if span is None else inside(value, span, step)
        steps.append(lines.add(made, value))
        known.append(value)
    return Local(area, Network([_settled(step) for step in steps], network.outputs), known, moved)


def _settled(step: Step) -> Step:
    """An activation of a vector none of whose entries can switch is linear, so that it folds."""
    what = step.what
    if not isinstance(what, Slope) or not isinstance(what.low, Tensor) or len(step.shape) != 2 or step.shape[0] != 1:
        return step
    fixed = bool((what.low == what.high).all()) and tuple(what.low.shape) == step.shape
    return replace(step, what=Linear(Scale(what.low.double()), bias_error=INF)) if fixed else step
