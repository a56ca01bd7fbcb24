"""The lower side: how much the network stretches some difference of two concrete inputs. docs/network.md#lower-side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from gramlip.network import Effort
from gramlip.network.graph import Program, evaluate, in_float64
from gramlip.network.in_place import op_name
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import full_products
from gramlip.operators.linear_maps import Shape

# ---- the network as a function -------------------------------------------------------------------------------------------

MARGIN = 2.0**-20  # relative; covers the rounding of the difference of two results, of their distance and of the quotient
MOVES = 2**8  # by so many spacings of its type every value is moved, to see what the rounding of all of them may do;
TIMES = 4.0  # the larger move of the result in two draws of the signs, so many times, is taken for the rounding of one forward pass


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


def function(program: Program, shapes: Sequence[Shape], computed: Mapping[fx.Node, Any], wide: torch.dtype = torch.float64) -> Function:
    """The network in `wide` as a function of one flat vector (all inputs joined) to one flat vector (all outputs joined).

    `computed` holds calls that are numbers, whose values do not depend on the inputs.
    """
    sizes = [math.prod(s) for s in shapes]
    constants = {n: in_float64(c, wide) for n, c in (dict(program.constants) | dict(computed)).items()}
    calls = [n for n in program.nodes if n.op == "call_function" and "_assert" not in op_name(n) and n not in computed]

    def run(flat: Tensor, /, moved: torch.Generator | None = None, given: Mapping[fx.Node, Tensor] | None = None) -> Tensor:
        values: dict[fx.Node, Any] = {**constants, **(given or {})}
        for node, part, shape in zip(program.inputs, _moved(flat, moved).split(sizes), shapes, strict=True):
            values[node] = part.reshape(shape)
        for node in calls:
            values[node] = _moved(evaluate(node, values.__getitem__, wide), moved)
        return torch.cat([values[n].reshape(-1).to(wide) for n in program.outputs])

    return run


def chosen(run: Function, base: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Function:
    """The function of some entries of its input, the others as in `base`, to some of its result."""

    def part(flat: Tensor, /, moved: torch.Generator | None = None, given: Mapping[fx.Node, Tensor] | None = None) -> Tensor:
        value = run(flat if inputs is None else torch.where(inputs, flat, base.to(flat.dtype)), moved, given)
        return value if outputs is None else value[outputs]

    return part


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


# ---- what is reported ----------------------------------------------------------------------------------------------------


def noise(run: Function, x: Tensor, value: Tensor, signs: torch.Generator, weights: Weights) -> float:
    """The measured effect of the rounding of the forward pass and of its weights on the result: docs/network.md#lower-side."""
    errors = {n: torch.where(torch.rand(e.shape, generator=signs) < 0.5, -e, e) for n, (_, e) in weights.items()}
    moves: list[float] = []
    for way in (-1, 1):
        given = {n: w + way * errors[n] for n, (w, _) in weights.items()}
        moves.append(float(torch.linalg.vector_norm(run(x, signs, given) - value)))
    return TIMES * max(moves) if all(map(math.isfinite, moves)) else math.inf


def sway(run: Function, x: Tensor, along: Tensor, weights: Weights) -> float:
    """The largest change, to first order, of the result along a direction by the errors of computed weights."""
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


def quotient(run: Function, x: Tensor, y: Tensor, signs: torch.Generator, weights: Weights) -> float:
    """`|f(y) - f(x)| / |y - x|` less rounding.

    A quotient of two concrete points is at most the Lipschitz constant, whatever happens between them: no Jacobian of
    an adjacent piece at a kink can make it too large.
    """
    with torch.no_grad():
        at_x, at_y = run(x), run(y)
        gap, far = float(torch.linalg.vector_norm(y - x)), float(torch.linalg.vector_norm(at_y - at_x))
        if not 0 < gap < math.inf or not 0 < far < math.inf:
            return 0.0
        room = noise(run, x, at_x, signs, weights) + noise(run, y, at_y, signs, weights)
    room += sum(sway(run, point, (at_y - at_x) / far, weights) for point in (x, y))
    return max(0.0, rd.down((far - room) / gap * (1 - MARGIN)))


# ---- the search ----------------------------------------------------------------------------------------------------------

SCALES = (1.0, 0.1, 3.0)  # of the random points where no domain is given: a normalisation is steepest near constant inputs
STARTS = 6
STEPS = 4  # power steps a round
LENGTHS = (1e-2, 0.1, -0.1, 1.0, -1.0)  # of the steps along its last direction, relative to the point
PASSES = 3 * STEPS + len(LENGTHS) + 2  # of the network forward that a round takes as long as
BUDGET = 3e12  # multiplications and additions that they may take at effort 1; then there are fewer starts and
ROUNDS = 8  # from the best of them, unless
PATIENCE = 3  # of them in a row
BETTER = 1.003  # do not raise the quotient so much
NEAR = 0.9  # of what the search promised in the model's own precision, or else it is repeated in float64
CROP = 64  # entries an axis; larger inputs are searched on a part of that size first


@dataclass(frozen=True)
class Pair:
    """Two points, and the quotient that the search saw for them."""

    value: float
    x: Tensor
    y: Tensor


class Points(Protocol):
    """A convex set of flat inputs."""

    def inside(self, flat: Tensor) -> Tensor:
        """The vector moved into the set."""
        ...

    def drawn(self, normal: Tensor, number: int) -> Tensor:
        """A point of the set, the one of this number, from normally distributed entries."""
        ...

    def scale(self, x: Tensor) -> float:
        """The length of the longest steps from a point."""
        ...

    def cut(self, part: tuple[slice, ...]) -> Points:
        """The set for a part of the one input."""
        ...


class Everywhere:
    """All inputs."""

    def inside(self, flat: Tensor) -> Tensor:
        """The vector itself."""
        return flat

    def drawn(self, normal: Tensor, number: int) -> Tensor:
        """The entries, of one standard deviation after the other."""
        return normal * SCALES[number % len(SCALES)]

    def scale(self, x: Tensor) -> float:
        """The length of the vector, or 1."""
        return max(float(torch.linalg.vector_norm(x)), 1.0)

    def cut(self, part: tuple[slice, ...]) -> Everywhere:
        """All smaller inputs."""
        del part
        return self


@dataclass(frozen=True)
class Ascent:
    """The search in one precision, for inputs in a set; `room` is what rounding takes from a difference at a point."""

    run: Function
    wide: torch.dtype
    points: Points
    room: Callable[[Tensor, Tensor], float]

    def round(self, x: Tensor, v: Tensor) -> Pair:
        """The best pair of power steps `v <- J' (f(x + t v) - f(x))` at x, J the Jacobian there, and of steps along the last v.

        An operation without a derivative costs tightness, not truth.
        """
        x, v = x.to(self.wide), v.to(self.wide)
        point, v = x.clone().requires_grad_(), v / torch.linalg.vector_norm(v)
        try:
            value = self.run(point)
        except RuntimeError:  # a sum in a type of integers has values, but no derivative
            value = self.run(x)
        base, scale = value.detach(), self.points.scale(x)
        room, close = self.room(x, base), max(1e-4, 2 * math.sqrt(torch.finfo(self.wide).eps))
        best = Pair(0.0, x, x)
        for _ in range(STEPS if value.requires_grad else 0):
            pair, image = self.tried(x, base, close * scale * v, room)
            best = max(best, pair, key=lambda p: p.value)
            if (back := _pulled(value, point, image)) is None:
                break
            v = back
        for length in (close, *LENGTHS):
            best = max(best, self.tried(x, base, length * scale * v, room)[0], key=lambda p: p.value)
        return best

    def tried(self, x: Tensor, base: Tensor, move: Tensor, room: float) -> tuple[Pair, Tensor]:
        """The pair of x, where the result is `base`, and x + move; and the difference of the results."""
        y = self.points.inside(x + move)
        gap = float(torch.linalg.vector_norm(y - x))
        with torch.no_grad():
            image = self.run(y) - base
        far = float(torch.linalg.vector_norm(image)) - room
        return Pair(max(0.0, far / gap) if gap > 0 and math.isfinite(far) else 0.0, x, y), image

    def on(self, best: Pair, rounds: int, effort: Effort) -> Pair:
        """The best pair of rounds that each go on from the end of the one before, until `PATIENCE` of them brought next to nothing."""
        now, idle = best, 0
        for _ in range(rounds):
            if now.value == 0.0 or idle == PATIENCE or effort.over:
                break
            now = self.round(now.y, now.y - now.x)
            idle = 0 if now.value > BETTER * best.value else idle + 1
            best = max(best, now, key=lambda p: p.value)
        return best


def _pulled(value: Tensor, point: Tensor, image: Tensor) -> Tensor | None:
    """The unit vector along the derivative at the point of the result's product with an image; None where there is none."""
    try:
        (back,) = torch.autograd.grad(value, point, image, retain_graph=True, materialize_grads=True)
    except (NotImplementedError, RuntimeError):  # no derivative
        return None
    size = torch.linalg.vector_norm(back)
    return back / size if 0 < float(size) < math.inf else None


def operations(run: Function, x: Tensor) -> int:
    """Multiplications and additions of one pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(x)
    return counter.get_total_flops()


def window(shapes: Sequence[Shape]) -> tuple[slice, ...] | None:
    """The middle part of an input of more than `CROP` entries an axis, all channels; None where there is nothing to cut."""
    if len(shapes) != 1 or not 3 <= len(shapes[0]) <= 5 or max(shapes[0][2:]) <= CROP:
        return None
    starts = [max(0, (n - CROP) // 2) for n in shapes[0][2:]]
    return (slice(None), slice(None), *(slice(a, a + min(n, CROP)) for a, n in zip(starts, shapes[0][2:], strict=True)))


@dataclass(frozen=True)
class Search:
    """The search for a pair: `build` gives the network for inputs of given shapes in a type, `starts` are points and directions."""

    build: Callable[[Sequence[Shape], torch.dtype], Function]
    shapes: Sequence[Shape]
    starts: Sequence[tuple[Tensor, Tensor]]
    points: Points
    weights: Weights
    signs: torch.Generator
    effort: Effort

    def best(self, wide: torch.dtype) -> Pair:
        """The best pair that is met in a precision, of a part of a large input first."""
        ascent, part = self._ascent(self.shapes, wide, self.points), window(self.shapes)
        pair = None if part is None or wide == torch.float64 else self._on_part(ascent, part)
        return self._from(ascent, self.starts) if pair is None else ascent.on(pair, 1, self.effort)

    def _from(self, ascent: Ascent, starts: Sequence[tuple[Tensor, Tensor]]) -> Pair:
        """The best pair of a round from each start, and of rounds from the best of these."""
        amount = max(1.0, self.effort.amount)
        rounds = BUDGET * amount / (PASSES * max(1, operations(ascent.run, starts[0][0].to(ascent.wide))))
        starts = starts[: max(1, int(min(rounds, 1e6) / 2))]
        pairs: list[Pair] = []
        for i in self.effort.shown("lower side", [f"start {n}" for n in range(len(starts))]):
            if not pairs or not self.effort.over:
                x, v = starts[i]
                pairs.append(ascent.round(ascent.points.inside(x), v))
        return ascent.on(max(pairs, key=lambda p: p.value), int(min(ROUNDS * amount, max(1.0, rounds / 2))), self.effort)

    def _ascent(self, shapes: Sequence[Shape], wide: torch.dtype, points: Points) -> Ascent:
        run = self.build(shapes, wide)

        def room(x: Tensor, value: Tensor) -> float:
            return 2 * noise(run, x, value, self.signs, self.weights) if wide == torch.float64 else 0.0

        return Ascent(run, wide, points, room)

    def _on_part(self, ascent: Ascent, part: tuple[slice, ...]) -> Pair | None:
        """The best pair that differs within a part of the input; None where the network takes no smaller inputs, or stretches none."""
        shape = self.shapes[0]

        def cut(x: Tensor) -> Tensor:
            return x.reshape(shape)[part].reshape(-1)

        sides = (*shape[:2], *(s.stop - s.start for s in part[2:]))
        inner = self._ascent([sides], ascent.wide, self.points.cut(part))
        try:
            pairs = self._from(inner, [(cut(x), cut(v)) for x, v in self.starts])
        except (RuntimeError, IndexError, ValueError, TypeError):  # what torch raises where sizes do not fit: the whole input then
            return None
        x = self.points.inside(self.starts[0][0].to(ascent.wide)).clone()
        x.reshape(shape)[part] = pairs.x.reshape(sides)
        move = torch.zeros_like(x)
        move.reshape(shape)[part] = (pairs.y - pairs.x).reshape(sides)
        with torch.no_grad():
            pair = ascent.tried(x, ascent.run(x), move, 0.0)[0]
        return pair if pair.value > 0 else None


def stretch(
    build: Callable[[Sequence[Shape], torch.dtype], Function],
    shapes: Sequence[Shape],
    effort: Effort,
    *,
    wide: torch.dtype = torch.float64,
    data: Tensor | None = None,
    points: Points | None = None,
    seed: int = 0,
    weights: Weights | None = None,
) -> Stretch:
    """A lower bound of the Lipschitz constant, from power iteration on Jacobians and ascent over the points.

    Args:
        build: the network for inputs of given shapes in a type, as `function` makes it.
        shapes: of its inputs.
        effort: how many rounds, and until when.
        wide: the model's own type; the search runs in float32 where that is not float64 and products are not cut short.
        data: points (k, size) to start from; else random ones of the set, or normal ones with standard deviations in `SCALES`.
        points: the set of inputs; all of them where there is none.
        seed: of the random numbers; the result depends on it and on nothing else, as long as time is not up.
        weights: computed weights that are known up to errors, and these.
    """
    points = points or Everywhere()
    starts, signs = _starts(sum(map(math.prod, shapes)), data, points, seed), torch.Generator().manual_seed(seed)
    search = Search(build, shapes, starts, points, weights or {}, signs, effort)
    exact, value = build(shapes, torch.float64), 0.0
    for precision in (torch.float32, torch.float64):
        if precision == torch.float32 and (wide == torch.float64 or not full_products()):
            continue
        pair = search.best(precision)
        value = max(value, quotient(exact, points.inside(pair.x.double()), points.inside(pair.y.double()), signs, search.weights))
        if value >= NEAR * pair.value > 0 or effort.over:
            break
    how = "lower side: a difference of two inputs in float64, less its rounding (measured, not proved)"
    return Stretch(value, f"{how}, from {'random points' if data is None else 'data'}, seed {seed}")


def _starts(size: int, data: Tensor | None, points: Points, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Points to start from, each with a direction."""
    generator = torch.Generator().manual_seed(seed)
    starts: list[tuple[Tensor, Tensor]] = []
    for number in range(STARTS):
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        x = points.drawn(x, number) if data is None else data[number % len(data)].detach().double().reshape(-1) + 1e-6 * x
        starts.append((x, torch.randn(size, generator=generator, dtype=torch.float64)))
    return starts
