"""Composition: the constant of each step, and of the whole network; values that part and meet again. docs/network.md#composition."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gramlip.network.steps import Attention, Input, Linear, Lipschitz, Network, Pad, Product, Shortcut, Slope, Step, Sum, Unbounded
from gramlip.norm.certify import TOGETHER, certify_all
from gramlip.norm.frequency_cells import Reals
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, Diagonal, Operator, Scale, Shape

# ---- parts: docs/network.md#parts ----------------------------------------------------------------------------------------
#
# Where `|d v|^2 <= x' G x`, x the norms of the difference on each of some disjoint parts of an earlier value and G >= 0, v has the form
# G. Forms are carried from the value where the parts part to where all of them have met.

ENTRIES = 2**20  # of values whose parts are followed
PARTS = 64  # that are told apart
FINITE = 1e60  # constants above it, and below its inverse, are not followed: no form over- or underflows
LEAST = 1e-280  # added to a form where a product of its entries may underflow
SWEEPS = 64  # of the power iteration that finds the vector for the bound of a form's eigenvalue


def coefficients(step: Step) -> Sequence[float] | None:
    """The factor of each source's difference in a sum of their norms; None if the root of the sum of squares is taken."""
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
    users, by_end = network.users(), dict[int, list[Shortcut]]()
    for i, copies in sorted(_roots(network).items(), reverse=True):  # what lies inside comes before what lies around it
        steps = _between(network, users, i, copies)
        sizes = _sizes(network, i, copies, steps)
        if not sizes:
            continue
        forms: dict[int, Reals] = {i: np.eye(len(next(iter(sizes.values()))))}
        for j in steps:
            step = network.steps[j]
            form = np.diag(sizes[j]) if j in sizes else _form(step, float(constants[j].upper), by_end.get(j, ()), forms)
            if form is not None:
                forms[j] = form
                if len(step.reads) > 1 and j not in sizes:
                    by_end.setdefault(j, []).append(Shortcut((rd.sqrt_up(perron_bound(form)),), (i,)))
    return by_end


def _form(step: Step, constant: float, ways: Sequence[Shortcut], forms: dict[int, Reals]) -> Reals | None:
    """The smallest form of a value that its step and shortcuts to it say, from those of what they read."""
    known = [Shortcut((constant,) * len(step.sources), step.sources)] if coefficients(step) is None else []
    known += [way for way in (step.shortcut, *ways) if way is not None]
    reached = [form for form in (*(_rooted(way, forms) for way in known), _added(step, forms)) if form is not None]
    return min(reached, key=perron_bound, default=None)


def _roots(network: Network) -> dict[int, list[int]]:
    """Values of which two steps or more read a part, and all steps that copy entries of them."""
    root: dict[int, int] = {}
    copies: dict[int, list[int]] = {}
    for i, step in enumerate(network.steps):
        if getattr(step.what, "copy_entries", None) is not None and math.prod(step.shape) <= ENTRIES:
            root[i] = root.get(step.sources[0], step.sources[0])
            copies.setdefault(root[i], []).append(i)
    size = [math.prod(step.shape) for step in network.steps]
    return {i: roots for i, roots in copies.items() if size[i] <= ENTRIES and sum(size[j] < size[i] for j in roots) > 1}


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
    label, parts = torch.zeros(math.prod(network.steps[root].shape), dtype=torch.int64), 1
    counts: dict[int, Tensor] = {}
    for j, count in _counted(network, root, [j for j in copies if j in steps]):
        counts[j] = count
        code = 2 * label + (count > 0)
        used = torch.bincount(code, minlength=2 * parts) > 0
        label, parts = (used.cumsum(0) - 1)[code], int(used.sum())
        if parts > PARTS:
            return {}
    if parts == 1:
        return {}
    most = {j: torch.zeros(parts, dtype=torch.int64).scatter_reduce(0, label, count, "amax") for j, count in counts.items()}
    return {j: m.double().numpy() for j, m in most.items()}


def _counted(network: Network, root: int, copies: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """For each step that copies entries of a value, how often it has each of them."""
    shape: Shape = network.steps[root].shape
    picked: dict[int, Tensor | Sequence[Tensor]] = {root: torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)}
    for j in copies:
        step = network.steps[j]
        picked[j] = read = step.what.copy_entries(picked[step.sources[0]])  # type: ignore[union-attr]
        numbers = torch.cat([t.reshape(-1) for t in ([read] if isinstance(read, Tensor) else read)]).long()
        yield j, torch.bincount(numbers, minlength=math.prod(shape))


def _rooted(way: Shortcut, forms: dict[int, Reals]) -> Reals | None:
    """The form of a value by the sum of the squares of others."""
    return _sum([_times(forms.get(s), f, f) for f, s in zip(way.factors, way.sources, strict=True)])


def _added(step: Step, forms: dict[int, Reals]) -> Reals | None:
    """The form of a sum: the square of a row, or of a number for all parts alike."""
    factors = coefficients(step)
    if factors is None or any(s not in forms for s in step.sources) or not max(factors) < FINITE:
        return None
    read = [forms[s] for s in step.sources]
    if max(float(form.max()) for form in read) > FINITE:
        return None
    whole = rd.add_up(*(rd.mul_up(c, rd.sqrt_up(perron_bound(form))) for c, form in zip(factors, read, strict=True)))
    row = [
        rd.add_up(*(rd.mul_up(c, rd.sqrt_up(float(form[p, p]))) for c, form in zip(factors, read, strict=True)))
        for p in range(len(read[0]))
    ]
    square = np.array([[rd.mul_up(a, b) for b in row] for a in row])
    return min(square, np.diag([rd.mul_up(whole, whole)] * len(row)), key=perron_bound)


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


def perron_bound(form: Reals) -> float:
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


# ---- composition: docs/network.md#composition ----------------------------------------------------------------------------

SMALL = 256  # matrices with a side of at most this are closed to 1e-6: it costs next to nothing


def constants(steps: Sequence[Step], shapes: Sequence[Sequence[Shape]], rtol: float = 1e-2) -> list[Bound]:
    """Interval of each step's own Lipschitz constant in all its sources joined; 1 for sums, joins and products, which `compose` treats.

    `shapes` are those of each step's sources. Steps of equal `kind` are searched together.
    """
    bounds: dict[int, Bound] = {}
    by_width: dict[float, list[tuple[int, Operator]]] = {}
    for i, (step, given) in enumerate(zip(steps, shapes, strict=True)):
        what = step.what
        if not isinstance(what, Linear):
            bounds[i] = _fixed(what, given)
        elif what.known is not None:
            bounds[i] = _widened(what, what.known)
        else:
            by_width.setdefault(_width(what.op, rtol), []).append((i, Diagonal(what.op.weight) if isinstance(what.op, Scale) else what.op))
    for width, items in by_width.items():
        for (i, _), bound in zip(items, certify_all([op for _, op in items], rtol=width), strict=True):
            what = steps[i].what
            assert isinstance(what, Linear)
            bounds[i] = _widened(what, bound)
    return [bounds[i] for i in range(len(steps))]


def _width(op: Conv | Dense | Scale, rtol: float) -> float:
    """The relative width for the interval of an operator."""
    return min(rtol, 1e-6) if isinstance(op, Dense) and min(op.weight.shape) <= SMALL else rtol


def kind(step: Step) -> object:
    """Equal for steps that cost little more together than alone; None for what stands alone."""
    what = step.what
    if not isinstance(what, Linear) or what.known is not None or what.op.weight.numel() > TOGETHER:
        return None
    return type(what.op), tuple(what.op.weight.shape)


def _widened(what: Linear, bound: Bound) -> Bound:
    if what.error == 0.0:
        return bound
    lower = max(0.0, rd.down(bound.lower - what.error))
    return Bound(lower, rd.add_up(float(bound.upper), what.error), f"{bound.because}; rounding of the fold or of computed weights added")


def _fixed(what: object, shapes: Sequence[Shape]) -> Bound:
    if isinstance(what, Slope):
        upper = max(float(x.abs().max()) if isinstance(x, Tensor) else abs(x) for x in (what.low, what.high))
        return Bound(upper * (1 - 2.0**-39) if what.sharp and upper < math.inf else 0.0, upper, what.because)
    if isinstance(what, Lipschitz):
        return Bound(0.0, what.upper, what.because)
    if isinstance(what, Pad):
        most = what.repeats(shapes[0])
        return Bound(rd.sqrt_down(float(most)), rd.sqrt_up(float(most)), f"{what.mode} padding: an entry occurs at most {most} times")
    if isinstance(what, Unbounded):
        return Bound(0.0, math.inf, what.reason)
    return Bound(0.0, 1.0, "")


@dataclass(frozen=True)
class Composition:
    """The network's constant, each step's (from the input to its value), and each step's share of the logarithm of the whole.

    `because` has the reasons of the shortcuts that the constant goes through.
    """

    upper: float
    lips: tuple[float, ...]
    parts: tuple[float, ...] | None
    because: tuple[str, ...] = ()


def compose(network: Network, constants: Sequence[Bound], ways: Mapping[int, Sequence[Shortcut]] | None = None) -> Composition:
    """The constant of the whole: products along chains, sums at residuals, roots of squares at joins, shortcuts; rounded upward.

    `ways` are shortcuts to values, by their numbers, beside those that the steps have.

    `parts` adds up to the logarithm of the constant of the network: docs/network.md#shares. None where it is zero or infinite.
    """
    lips: list[float] = []
    used: dict[int, Shortcut] = {}
    offered = shortcuts(network, constants)
    for i, (step, constant) in enumerate(zip(network.steps, constants, strict=True)):
        lips.append(rd.mul_up(float(constant.upper), _joined(step, [lips[s] for s in step.sources])))
        for way in (step.shortcut, *offered.get(i, ()), *(ways or {}).get(i, ())):
            if way is not None and (upper := rd.hypot_up(_terms(way, [lips[s] for s in way.sources]))) < lips[i]:
                lips[i], used[i] = upper, way
    ends = [lips[i] for i in network.outputs]
    upper = ends[0] if len(ends) == 1 else rd.hypot_up(ends)
    return Composition(upper, tuple(lips), _parts(network, lips, used, upper), _reasons(network, used))


def _reasons(network: Network, used: Mapping[int, Shortcut]) -> tuple[str, ...]:
    """Why the shortcuts hold that the constants of the outputs go through."""
    seen, stack = set[int](), list(network.outputs)
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            stack += used[i].sources if i in used else network.steps[i].sources
    return tuple(text for i in sorted(seen) if i in used and (text := used[i].because))


def _terms(way: Shortcut, lips: Sequence[float]) -> list[float]:
    """The constants of what a shortcut reads, times its factors."""
    return list(map(rd.mul_up, way.factors, lips))


def _joined(step: Step, lips: list[float]) -> float:
    """The constant of what the step reads, all sources together."""
    if isinstance(step.what, Input | Unbounded):
        return 1.0  # an unbounded step may have lost its sources with its rule: it is infinite whatever it reads
    factors = coefficients(step)
    return rd.hypot_up(lips) if factors is None else rd.add_up(*map(rd.mul_up, factors, lips))


def _shares(step: Step, way: Shortcut | None, lips: Sequence[float]) -> list[tuple[int, float]]:
    """What a step's constant comes from, and the share of each in it: derivatives of its logarithm, which add up to 1."""
    sources = step.sources if way is None else way.sources
    largest = max(lips[s] for s in sources)
    values = [lips[s] / largest for s in sources]
    factors = None if way is not None else coefficients(step)
    if factors is None:
        return list(zip(sources, _squared(values if way is None else _terms(way, values)), strict=True))
    terms = [c * x if x else 0.0 for c, x in zip(factors, values, strict=True)]  # what does not move may have an infinite factor
    return [(s, t / math.fsum(terms)) for s, t in zip(sources, terms, strict=True)]


def _squared(values: Sequence[float]) -> list[float]:
    """The share of each square in the sum of the squares."""
    top = max(values)
    terms = [(t / top) ** 2 for t in values]  # squares of tiny ones would be zero
    return [t / math.fsum(terms) for t in terms]


def _parts(network: Network, lips: list[float], used: dict[int, Shortcut], upper: float) -> tuple[float, ...] | None:
    if not 0.0 < upper < math.inf:
        return None
    flow, parts = [0.0] * len(lips), [0.0] * len(lips)
    for i, share in zip(network.outputs, _squared([lips[i] for i in network.outputs]), strict=True):
        flow[i] += share
    for i in reversed(range(len(lips))):
        if flow[i] == 0.0 or not network.steps[i].sources:
            continue
        below = 0.0
        for s, share in _shares(network.steps[i], used.get(i), lips):
            flow[s] += flow[i] * share
            below += share * math.log(lips[s]) if share else 0.0
        parts[i] = flow[i] * (math.log(lips[i]) - below)
    return tuple(parts)
