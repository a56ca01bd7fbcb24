"""The lower side: how much the network stretches some difference of two concrete inputs. docs/network.md#lower-side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from gramlip.network.effort import Effort
from gramlip.network.graph import Program, evaluate, in_float64, op_name
from gramlip.numerics import rounding as rd

MARGIN = 2.0**-20  # relative; covers the rounding of the difference of two results, of their distance and of the quotient
MOVES = 2**8  # by so many spacings of its type every value is moved, to see what the rounding of all of them may do;
TIMES = 4.0  # the larger move of the result in two draws of the signs, so many times, is taken for the rounding of one forward pass
SCALES = (1.0, 0.1, 3.0)  # of the random points where no domain is given: a normalisation is steepest near constant inputs


Weights = Mapping[fx.Node, tuple[Tensor, Tensor]]  # what the model computes from weights, and up to which errors


class Function(Protocol):
    """A network as a function of one flat vector to one flat vector."""

    def __call__(self, flat: Tensor, /, moved: torch.Generator | None = None, given: Mapping[fx.Node, Tensor] | None = None) -> Tensor:
        """The result; where signs are given, with every value on the way moved relatively by `MOVES` spacings of its type.

        `given` stands in place of weights that the model computes.
        """
        ...


@dataclass(frozen=True)
class Stretch:
    """A lower bound `value` of the Lipschitz constant, and where it was found."""

    value: float
    because: str


def function(program: Program, shapes: Sequence[tuple[int, ...]], computed: Mapping[fx.Node, Any]) -> Function:
    """The network in float64 as a function of one flat vector (all inputs joined) to one flat vector (all outputs joined).

    `computed` holds calls that are numbers, whose values do not depend on the inputs.
    """
    sizes = [math.prod(s) for s in shapes]
    constants = {n: in_float64(c) for n, c in program.constants.items()} | dict(computed)
    calls = [n for n in program.nodes if n.op == "call_function" and "_assert" not in op_name(n) and n not in computed]

    def run(flat: Tensor, /, moved: torch.Generator | None = None, given: Mapping[fx.Node, Tensor] | None = None) -> Tensor:
        values: dict[fx.Node, Any] = {**constants, **(given or {})}
        for node, part, shape in zip(program.inputs, _moved(flat, moved).split(sizes), shapes, strict=True):
            values[node] = part.reshape(shape)
        for node in calls:
            values[node] = _moved(evaluate(node, values.__getitem__), moved)
        return torch.cat([values[n].reshape(-1).double() for n in program.outputs])

    return run


def _moved(value: Any, signs: torch.Generator | None) -> Any:
    """The value, each of its entries moved up or down in modulus."""
    if signs is None:
        return value
    if isinstance(value, list | tuple):
        return [_moved(item, signs) for item in value]  # type: ignore[reportUnknownVariableType]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    up = torch.randint(0, 2, value.shape, generator=signs, dtype=value.dtype) * 2 - 1
    return value * (1 + MOVES * torch.finfo(value.dtype).eps * up)


def direction(run: Function, x: Tensor, v: Tensor, steps: int) -> Tensor:
    """The direction after power steps `v <- J' J v` at x, J the Jacobian there.

    Only where to look: what is reported is a quotient of two points, so an operation without derivatives costs tightness, not truth.
    """
    point = x.clone().requires_grad_()
    value = run(point)
    for _ in range(steps):
        image = _pushed(run, x, v)
        if not value.requires_grad:
            break
        try:
            (back,) = torch.autograd.grad(value, point, image, retain_graph=True, materialize_grads=True)
        except (NotImplementedError, RuntimeError):  # no derivative backward either
            break
        size = torch.linalg.vector_norm(back)
        if not bool(size > 0) or not bool(torch.isfinite(size)):
            break
        v = back / size
    return v


def _pushed(run: Function, x: Tensor, v: Tensor) -> Tensor:
    """J v, by forward differentiation, or by a central difference where an operation has no forward derivative."""
    try:
        return torch.func.jvp(run, (x,), (v,))[1]
    except (NotImplementedError, RuntimeError):  # torch raises either; a failure of the network itself comes again below
        with torch.no_grad():
            step = 1e-5 * max(1.0, float(torch.linalg.vector_norm(x)))
            return (run(x + step * v) - run(x - step * v)) / (2 * step)


def noise(run: Function, x: Tensor, value: Tensor, signs: torch.Generator, weights: Weights) -> float:
    """What the rounding of the forward pass and of its weights may have done to the result, measured: docs/network.md#lower-side."""
    errors = {n: torch.where(torch.rand(e.shape, generator=signs) < 0.5, -e, e) for n, (_, e) in weights.items()}
    moves: list[float] = []
    for way in (-1, 1):
        given = {n: w + way * errors[n] for n, (w, _) in weights.items()}
        moves.append(float(torch.linalg.vector_norm(run(x, signs, given) - value)))
    return TIMES * max(moves) if all(map(math.isfinite, moves)) else math.inf


def sway(run: Function, x: Tensor, along: Tensor, weights: Weights) -> float:
    """What the errors of computed weights move the result by along a direction, to first order, all of them at their worst."""
    if not weights:
        return 0.0
    given = {n: value.clone().requires_grad_() for n, (value, _) in weights.items()}
    try:
        with torch.enable_grad():
            slopes = torch.autograd.grad(run(x, given=given) @ along, list(given.values()), materialize_grads=True)
    except (NotImplementedError, RuntimeError):  # an operation without derivatives
        return math.inf
    moves = [float((slope.abs() * error).sum()) for slope, (_, error) in zip(slopes, weights.values(), strict=True)]
    return TIMES * sum(moves) if all(map(math.isfinite, moves)) else math.inf


def secant(run: Function, x: Tensor, v: Tensor, lo: float, hi: float, signs: torch.Generator, weights: Weights) -> tuple[float, Tensor]:
    """The largest quotient `|f(x + t v) - f(x)| / |t v|` over some t of both signs, less rounding, and the best point reached.

    A quotient of two concrete points is at most the Lipschitz constant, whatever happens between them: no Jacobian of
    an adjacent piece at a kink can make it too large.
    """
    best, where, image = 0.0, x, None
    base = run(x)
    room = noise(run, x, base, signs, weights)
    scale = max(float(torch.linalg.vector_norm(x)), 1.0)
    for step in (sign * 10.0**exponent for sign in (1, -1) for exponent in (-4, -2, -1, 0)):
        y = (x + scale * step * v).clamp(lo, hi)
        gap, there = float(torch.linalg.vector_norm(y - x)), run(y)
        if gap > 0:
            value = (float(torch.linalg.vector_norm(there - base)) - 2 * room) / gap
            if value > best:
                best, where, image = value, y, there
    if image is None:
        return 0.0, x
    gap, far = float(torch.linalg.vector_norm(where - x)), float(torch.linalg.vector_norm(image - base))
    room += noise(run, where, image, signs, weights) + sum(sway(run, point, (image - base) / far, weights) for point in (x, where))
    return (far - room) / gap * (1 - MARGIN), where


def stretch(
    run: Function,
    size: int,
    effort: Effort,
    *,
    data: Tensor | None = None,
    domain: tuple[float, float] | None = None,
    seed: int = 0,
    starts: int = 3,
    rounds: int = 3,
    steps: int = 4,
    weights: Weights | None = None,
) -> Stretch:
    """A lower bound of the Lipschitz constant, from power iteration on Jacobians and ascent over the points.

    Args:
        run: from `function`.
        size: entries of its input.
        effort: whose time ends the search, but for its first round.
        data: points (k, size) to start from; else uniform in the domain, or normal with standard deviations in `SCALES`.
        domain: interval of each input entry.
        seed: of the random numbers; the result depends on it and on nothing else.
        starts: number of starting points.
        rounds: power iterations a start, each at the best point that the one before reached.
        steps: power steps a round.
        weights: computed weights that are known up to errors, and these.
    """
    generator, signs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    lo, hi = domain or (-math.inf, math.inf)
    best, found = 0.0, "no point stretched"
    names = [f"start {start}" for start in range(starts)]
    for start in effort.shown("lower side", names):
        if start and effort.over:
            continue
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        if data is not None:
            x = data[start % len(data)].double().reshape(-1) + 1e-6 * noise
        elif domain is not None:
            x = lo + (hi - lo) * torch.rand(size, generator=generator, dtype=torch.float64)
        else:
            x = noise * SCALES[start % len(SCALES)]
        v = torch.randn(size, generator=generator, dtype=torch.float64)
        v, x = v / torch.linalg.vector_norm(v), x.clamp(lo, hi)
        for i in range(rounds):
            v = direction(run, x, v, steps)
            with torch.no_grad():
                value, x = secant(run, x, v, lo, hi, signs, weights or {})
            if value > best:
                best, found = value, f"start {start}, round {i}"
    origin = "data" if data is not None else "random points"
    how = "lower side: a difference of two inputs in float64, less its rounding (measured, not proved)"
    return Stretch(rd.down(best), f"{how}, from {origin}, seed {seed}, {found}")
