"""Parts: values that read different entries of one earlier value and meet again. docs/network.md#parts.

Where `|d v|^2 <= x' G x`, x the norms of the difference on each of some disjoint parts of an earlier value and G >= 0, v has
the form G. Forms are carried from the value where the parts part to where all of them have met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gramlip.network.steps import Attention, Network, Product, Shortcut, Step, Sum
from gramlip.numerics import rounding as rd
from gramlip.numerics.segmented import Reals
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Shape

ENTRIES = 2**20  # of values whose parts are followed
PARTS = 64  # that are told apart
FINITE = 1e60  # constants above it, and below its inverse, are not followed: no form over- or underflows
LEAST = 1e-280  # added to a form where a product of its entries may underflow
SWEEPS = 64  # of the power iteration that finds the vector for the bound of a form's eigenvalue


def coefficients(step: Step) -> Sequence[float] | None:
    """What the difference of each source counts for in a sum of their norms; None where the root of their squares counts."""
    what = step.what
    if isinstance(what, Sum):
        return [rd.sqrt_up(float(r)) for r in what.repeats]
    if isinstance(what, Product):
        a, b = what.caps or (math.inf, math.inf)
        return rd.mul_up(what.scale, b), rd.mul_up(what.scale, a)
    if isinstance(what, Attention):  # docs/network.md#attention, theorem N9
        queries, keys, values = what.rows or (math.inf,) * 3
        root = rd.sqrt_up(float(step.shape[-2]))
        reach = rd.mul_up(what.scale, values)
        return rd.mul_up(reach, keys), rd.mul_up(rd.mul_up(reach, root), queries), root
    return None


def shortcuts(network: Network, constants: Sequence[Bound]) -> dict[int, list[Shortcut]]:
    """Constants of values in earlier ones of which disjoint parts are read."""
    users, found = network.users(), dict[int, list[Shortcut]]()
    for i, copies in sorted(_roots(network).items(), reverse=True):  # what lies inside comes before what lies around it
        steps = _between(network, users, i, copies)
        sizes = _sizes(network, i, copies, steps)
        if not sizes:
            continue
        forms: dict[int, Reals] = {i: np.eye(len(next(iter(sizes.values()))))}
        for j in steps:
            step = network.steps[j]
            if j in sizes:
                forms[j] = np.diag(sizes[j])
                continue
            known = [Shortcut((float(constants[j].upper),) * len(step.sources), step.sources)] if coefficients(step) is None else []
            known += [s for s in (step.shortcut, *found.get(j, ())) if s is not None]
            ways = [_rooted(s, forms) for s in known] + [_added(step, forms)]
            reached = [form for form in ways if form is not None]
            if not reached:
                continue
            forms[j] = min(reached, key=largest)
            if len(step.reads) > 1:
                found.setdefault(j, []).append(Shortcut((rd.sqrt_up(largest(forms[j])),), (i,)))
    return found


def _roots(network: Network) -> dict[int, list[int]]:
    """Values of which two steps or more read a part, and all steps that copy entries of them."""
    root: dict[int, int] = {}
    copies: dict[int, list[int]] = {}
    for i, step in enumerate(network.steps):
        if getattr(step.what, "pick", None) is not None and math.prod(step.shape) <= ENTRIES:
            root[i] = root.get(step.sources[0], step.sources[0])
            copies.setdefault(root[i], []).append(i)
    size = [math.prod(step.shape) for step in network.steps]
    return {i: some for i, some in copies.items() if size[i] <= ENTRIES and sum(size[j] < size[i] for j in some) > 1}


def _between(network: Network, users: list[list[int]], root: int, copies: list[int]) -> list[int]:
    """The steps that depend on a value, up to where all paths from it have met."""
    ends, inside, reach = set(network.outputs), {root}, max(users[root], default=0)
    for j in range(root + 1, len(network.steps)):
        if inside.isdisjoint(network.steps[j].sources):
            continue
        inside.add(j)
        if reach <= j and j not in copies:
            break
        reach = len(network.steps) if j in ends else max(reach, *users[j])
    return sorted(inside - {root})


def _sizes(network: Network, root: int, copies: list[int], steps: list[int]) -> dict[int, Reals]:
    """For each step that copies entries, the most copies of an entry of each part; none where there is one part or too many."""
    shape: Shape = network.steps[root].shape
    picked: dict[int, Tensor | Sequence[Tensor]] = {root: torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)}
    counts: dict[int, Tensor] = {}
    label, parts = torch.zeros(math.prod(shape), dtype=torch.int64), 1
    for j in (j for j in copies if j in steps):
        step = network.steps[j]
        picked[j] = step.what.pick(picked[step.sources[0]])  # type: ignore[union-attr]
        read = picked[j]
        numbers = torch.cat([t.reshape(-1) for t in ([read] if isinstance(read, Tensor) else read)]).long()
        counts[j] = torch.bincount(numbers, minlength=len(label))
        code = 2 * label + (counts[j] > 0)
        used = torch.bincount(code, minlength=2 * parts) > 0
        label, parts = (used.cumsum(0) - 1)[code], int(used.sum())
        if parts > PARTS:
            return {}
    if parts == 1:
        return {}
    most = {j: torch.zeros(parts, dtype=torch.int64).scatter_reduce(0, label, count, "amax") for j, count in counts.items()}
    return {j: m.double().numpy() for j, m in most.items()}


def _rooted(way: Shortcut, forms: dict[int, Reals]) -> Reals | None:
    """The form of a value by the sum of the squares of others."""
    return _sum([_times(forms.get(s), f, f) for f, s in zip(way.factors, way.sources, strict=True)])


def _added(step: Step, forms: dict[int, Reals]) -> Reals | None:
    """The form of a sum: the square of a row, or of a number for all parts alike."""
    factors = coefficients(step)
    if factors is None or any(s not in forms for s in step.sources) or not max(factors) < FINITE:
        return None
    own = [forms[s] for s in step.sources]
    if max(float(form.max()) for form in own) > FINITE:
        return None
    whole = rd.add_up(*(rd.mul_up(c, rd.sqrt_up(largest(form))) for c, form in zip(factors, own, strict=True)))
    row = [
        rd.add_up(*(rd.mul_up(c, rd.sqrt_up(float(form[p, p]))) for c, form in zip(factors, own, strict=True))) for p in range(len(own[0]))
    ]
    square = np.array([[rd.mul_up(a, b) for b in row] for a in row])
    return min(square, np.diag([rd.mul_up(whole, whole)] * len(row)), key=largest)


def _times(form: Reals | None, *factors: float) -> Reals | None:
    """A form times constants, rounded upward."""
    for factor in factors:
        if form is None or not (factor == 0.0 or 1.0 / FINITE <= factor <= FINITE) or not form.max() <= FINITE:
            return None
        if factor != 1.0:
            form = np.where(form > 0.0, np.nextafter(form * factor, np.inf) + LEAST, 0.0) if factor else np.zeros_like(form)
    return form


def _sum(forms: Sequence[Reals | None]) -> Reals | None:
    """The sum of forms, rounded upward; None where one is not known."""
    total: Reals | None = None
    for form in forms:
        if form is None:
            return None
        total = form if total is None else np.where((form > 0.0) & (total > 0.0), np.nextafter(form + total, np.inf), form + total)
    return total


def largest(form: Reals) -> float:
    """Upper bound of the largest eigenvalue of a nonnegative matrix: the largest `(G v)_i / v_i`, for any v > 0; exact for diagonals."""
    if not np.count_nonzero(form - np.diag(np.diag(form))):
        return float(np.diag(form).max())
    top = float(form.max())
    scaled, v, best = form / top, np.ones(len(form)), math.inf
    for _ in range(SWEEPS):
        image = scaled @ v
        best = min(best, float((image / v).max()))
        v = np.maximum((image + v) / (image + v).max(), 1e-100)
    return rd.mul_up(rd.mul_up(best, 1.0 + 1e-12), top) + LEAST
