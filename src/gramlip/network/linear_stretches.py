"""Linear stretches: what is linear in one earlier value, through whatever steps, is one matrix. docs/network.md#linear-stretches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional as F

from gramlip.network import Effort
from gramlip.network.compose import SMALL, coefficients
from gramlip.network.steps import Join, Linear, LinearAction, Lipschitz, Network, Pad, Shortcut, Slice, Step, Sum, View, rough_norm
from gramlip.norm.certify import certify_all
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import Bound, decimals
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape, apply

SIDE = 2048  # of the largest matrix's smaller side
PUSHES = 4e9  # multiplications that the columns of one matrix may take,
PROOF = 2e10  # its certificate,
TOTAL = 2e10  # and all that a network's stretches may take
CHUNK = 2**22  # entries of a value for all the vectors that are pushed together


# ---- what a step does ----------------------------------------------------------------------------------------------------


def _action(step: Step, shapes: Sequence[Shape], upper: float) -> LinearAction | None:
    """The step as a linear map of its sources, up to a constant; None where it is none."""
    what = step.what
    if isinstance(what, Linear) and not what.op.weight.is_complex():
        op = what.op
        return LinearAction(lambda x: apply(op, x), rough_norm(op), what.error)
    if isinstance(what, Pad):
        pairs, mode = [p for pair in reversed(what.pairs) for p in pair], "constant" if what.mode == "zeros" else what.mode
        return LinearAction(lambda x: F.pad(x, pairs, mode), rd.sqrt_up(float(what.repeats(shapes[0]))))
    if isinstance(what, Join):
        return LinearAction(lambda *xs: torch.cat(xs, what.axis), 1.0)
    if isinstance(what, Sum):
        return LinearAction(lambda *xs: reduce(torch.add, xs).expand(step.shape), max(coefficients(step) or (1.0,)))
    if isinstance(what, Slice):
        at = (slice(None),) * what.axis + (slice(what.start, what.stop, what.step),)
        return LinearAction(lambda x: x[at], 1.0)
    if isinstance(what, View) and what.flat:
        return LinearAction(lambda x: x.reshape(step.shape), 1.0)
    if isinstance(what, Lipschitz) and what.linear is not None:
        return what.linear
    copies = what.copy_entries if isinstance(what, View | Lipschitz) else None
    return None if copies is None else LinearAction(copies, upper)


def _mixes(step: Step) -> bool:
    """Whether the step's constant is more than a number that multiplies all lengths alike."""
    scalar = isinstance(step.what, Linear) and isinstance(step.what.op, Scale) and step.what.op.weight.numel() == 1
    return not isinstance(step.what, View) and not scalar


def _operations(step: Step, shapes: Sequence[Shape]) -> float:
    """Multiplications, nearly."""
    moved = float(math.prod(step.shape) + sum(map(math.prod, shapes)))
    op = step.what.op if isinstance(step.what, Linear) else None
    if isinstance(op, Dense):
        return moved + op.weight.numel() * math.prod(step.shape[:-1])
    if isinstance(op, Conv):
        places = shapes[0] if op.transposed else step.shape
        return moved + op.weight.numel() * math.prod(places[2:]) * places[0]
    return moved


# ---- stretches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """The steps `inside` make the value `last` of the value `first`, by linear maps alone."""

    first: int
    last: int
    inside: tuple[int, ...]


def stretches(network: Network, actions: Sequence[LinearAction | None]) -> list[list[Stretch]]:
    """For each value at which linear steps end, the stretches between all values that every path to it goes through, the last ones last."""
    root: list[int] = []
    for i, (step, action) in enumerate(zip(network.steps, actions, strict=True)):
        origins = {root[s] for s in step.sources} if action is not None else set[int]()
        root.append(origins.pop() if len(origins) == 1 else i)
    users = network.users()
    apart = [any(i in network.steps[u].sources and root[u] != root[i] for u in users[i]) for i in range(len(root))]
    ends = [i for i, r in enumerate(root) if r != i and (i in network.outputs or apart[i])]
    return [stretch for i in ends if (stretch := _between(network, root[i], i))]


def _between(network: Network, first: int, last: int) -> list[Stretch]:
    needed, stack = {first, last}, [last]
    while stack:
        for s in network.steps[stack.pop()].sources:
            if s not in needed:
                needed.add(s)
                stack.append(s)
    order = sorted(needed)
    reach: dict[int, int] = {}
    for i in order[1:]:
        for s in network.steps[i].sources:
            reach[s] = i
    tuples = network.tuples()  # of which a stretch has no matrix
    cuts, far = [0], reach[first]
    for at in range(1, len(order)):
        if far <= order[at] and order[at] not in tuples:
            cuts.append(at)
        far = max(far, reach.get(order[at], 0))
    return [Stretch(order[a], order[b], tuple(order[a + 1 : b + 1])) for a, b in pairwise(cuts)]


def _joined(parts: Sequence[Stretch]) -> Stretch:
    return Stretch(parts[0].first, parts[-1].last, tuple(i for part in parts for i in part.inside))


def linear_stretches(network: Network, constants: Sequence[Bound], rtol: float, effort: Effort | None = None) -> dict[int, list[Shortcut]]:
    """For values that are linear in an earlier one, the certified norm of the matrix between them, where that can be formed.

    From each end the longest stretch that can be paid for is taken, then the longest one before it.
    """
    actions = [
        _action(step, [network.steps[s].shape for s in step.sources], float(constant.upper)) if step.sources else None
        for step, constant in zip(network.steps, constants, strict=True)
    ]
    by_end: dict[int, list[Shortcut]] = {}
    left, effort = TOTAL, effort or Effort()
    ends = [parts for parts in stretches(network, actions) if _gains(network, _joined(parts))]
    for k in effort.shown("linear stretches", [network.steps[parts[-1].last].name for parts in ends]):
        parts, end = ends[k], len(ends[k])
        while end > 0:
            starts = range(end) if left > 0 and not effort.over else ()
            start = next((a for a in starts if _pays(network, _joined(parts[a:end]))), end)
            form = Matrices(network, actions, constants, _joined(parts[start:end])) if start < end else None
            way = None if form is None else form.shortcut(rtol)
            left -= 0.0 if form is None else form.spent
            if way is not None:
                by_end.setdefault(parts[end - 1].last, []).append(way)
            end = start if way is not None else end - 1
    return by_end


def _gains(network: Network, stretch: Stretch) -> bool:
    """Whether the norm of the whole may be less than the product of its parts."""
    return sum(_mixes(network.steps[i]) for i in stretch.inside) > 1


def _pays(network: Network, stretch: Stretch) -> bool:
    """Whether there is anything to gain, and one side of the matrix, or what of it is one sample's, may be small enough."""
    sides = [network.steps[i].shape for i in (stretch.first, stretch.last)]
    least = min(math.prod(s) // math.prod(s[:2]) if len(s) > 2 else s[-1] if s else 1 for s in sides)
    return _gains(network, stretch) and least <= SIDE


# ---- matrices ------------------------------------------------------------------------------------------------------------


@dataclass
class Matrices:
    """The matrix of a stretch: one for each part of its input that reaches entries of the result which no other part reaches.

    `spent` counts multiplications.
    """

    network: Network
    actions: Sequence[LinearAction | None]
    constants: Sequence[Bound]
    stretch: Stretch
    spent: float = 0.0

    def shortcut(self, rtol: float) -> Shortcut | None:
        """The stretch's constant; None where the matrix is too large or not finite."""
        size, error = self.rounding()
        if not size < math.inf or not error < math.inf:
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # a call that vmap takes one by one
            try:
                parts = self._parts()
                matrix = self._formed(parts, size, error)
            except RuntimeError:  # a call that torch can neither batch nor differentiate
                return None
        if matrix is None:
            return None
        matrices, columns = matrix
        lost = rd.mul_up(error, rd.sqrt_up(float(columns)))
        width = min(rtol, 1e-6) if max(min(m.shape) for m in matrices) <= SMALL else rtol
        upper = rd.add_up(max(float(b.upper) for b in certify_all([Dense(m) for m in matrices], rtol=width)), lost)
        names = [self.network.steps[i].name for i in self.stretch.inside if _mixes(self.network.steps[i])]
        shape = "x".join(map(str, matrices[0].shape))
        text = (
            f"{', '.join(dict.fromkeys(names))} are one linear map (theorem N18): {decimals(upper, upward=True)}, from its matrix {shape}"
        )
        return Shortcut((upper,), (self.stretch.first,), text)

    def rounding(self) -> tuple[float, float]:
        """Upper bounds of the norm of the map, and of what rounding does to its result for a vector of norm 1; of its adjoint too."""
        users = self.network.users()
        norms, errors = {self.stretch.first: 1.0}, {self.stretch.first: 0.0}
        for i in self.stretch.inside:
            step, action = self.network.steps[i], self.actions[i]
            assert action is not None
            factors = coefficients(step) or [1.0] * len(step.sources)
            entries = sum(math.prod(self.network.steps[s].shape) for s in step.sources) + math.prod(step.shape) + len(users[i])
            terms = 8.0 + entries + (step.what.op.weight.numel() if isinstance(step.what, Linear) else 0)
            rounding = rd.add_up(rd.mul_up(rd.gamma(terms), action.moduli), action.error)
            upper = float(self.constants[i].upper)
            norm = rd.add_up(*(rd.mul_up(c, norms[s]) for c, s in zip(factors, step.sources, strict=True)))
            before = rd.add_up(*(rd.mul_up(c, errors[s]) for c, s in zip(factors, step.sources, strict=True)))
            norms[i] = rd.mul_up(rd.add_up(upper, rounding), norm)
            errors[i] = rd.add_up(rd.mul_up(upper, before), rd.mul_up(rounding, norm), rd.mul_up(terms * entries, rd.TINY))
        return norms[self.stretch.last], errors[self.stretch.last]

    def _apply(self, x: Tensor) -> Tensor:
        values: dict[int, Tensor] = {self.stretch.first: x}
        for i in self.stretch.inside:
            action = self.actions[i]
            assert action is not None
            values[i] = action.run(*(values[s] for s in self.network.steps[i].sources))
        return values[self.stretch.last].reshape(-1)

    def _adjoint(self, y: Tensor) -> Tensor:
        zero = torch.zeros(self.network.steps[self.stretch.first].shape, dtype=torch.float64)
        back: Callable[[Tensor], tuple[Tensor]] = vjp(self._apply, zero)[1]  # type: ignore[reportAssignmentType]
        return back(y)[0].reshape(-1)

    def _cost(self) -> float:
        """Multiplications of one vector."""
        steps = self.network.steps
        return sum(_operations(steps[i], [steps[s].shape for s in steps[i].sources]) for i in self.stretch.inside)

    def _pushed(self, function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        most = max(math.prod(self.network.steps[i].shape) for i in (self.stretch.first, *self.stretch.inside))
        self.spent += self._cost() * len(vectors)
        with torch.no_grad():
            return vmap(function, chunk_size=max(1, CHUNK // most))(vectors)

    def _parts(self) -> tuple[Tensor, Tensor]:
        """For each entry of the input, and of the result, the number of its part; -1 for a result that reads nothing.

        Samples and channels are tried. A part filled with NaN shows in all that reads it, times zero too.
        """
        shape = self.network.steps[self.stretch.first].shape
        for axes in (2, 1):
            count = math.prod(shape[:axes])
            if len(shape) <= axes or count == 1 or self._cost() * count > PUSHES / 4:
                continue
            labels = torch.arange(count).repeat_interleave(math.prod(shape[axes:]))
            filled = torch.where(labels == torch.arange(count)[:, None], math.nan, 0.0).to(torch.float64).reshape(count, *shape)
            if int(self._pushed(self._apply, filled[:2]).isnan().sum(0).max()) > 1:
                continue
            reads = self._pushed(self._apply, filled).isnan()
            if int(reads.sum(0).max()) <= 1:
                return labels, torch.where(reads.any(0), reads.int().argmax(0), -1)
        size = math.prod(self.network.steps[self.stretch.last].shape)
        return torch.zeros(math.prod(shape), dtype=torch.int64), torch.zeros(size, dtype=torch.int64)

    def _formed(self, parts: tuple[Tensor, Tensor], size: float, error: float) -> tuple[list[Tensor], int] | None:
        """The different matrices of the parts, each with its smaller side first to be pushed, and how many vectors were pushed."""
        sides = [int(labels[labels >= 0].bincount().max()) if bool((labels >= 0).any()) else 0 for labels in parts]
        adjoint = sides[1] < sides[0]
        pushed, other = sides[::-1] if adjoint else sides
        if not 0 < pushed <= SIDE or self._cost() * pushed > PUSHES or float(pushed) ** 2 * other > PROOF:
            return None
        if adjoint and not self._is_adjoint(size, error):
            return None
        source, target = parts[::-1] if adjoint else parts
        places = [(source == k).nonzero()[:, 0] for k in range(int(source.max()) + 1)]
        images = self._images(places, len(source), pushed, adjoint)
        if not bool(images.isfinite().all()):
            return None
        distinct: list[Tensor] = []
        for k, at in enumerate(places):
            matrix = images[: len(at), (target == k).nonzero()[:, 0]]
            if matrix.numel() and not any(torch.equal(matrix, known) for known in distinct):
                distinct.append(matrix)
        self.spent += float(pushed) ** 2 * other * len(distinct)
        return (distinct, pushed) if distinct and self.spent <= PUSHES + PROOF else None

    def _images(self, places: Sequence[Tensor], size: int, pushed: int, adjoint: bool) -> Tensor:
        """The images of vectors, each with one entry of every part at 1; under the adjoint if that takes fewer."""
        vectors = torch.zeros(pushed, size, dtype=torch.float64)
        for at in places:
            vectors[torch.arange(len(at)), at] = 1.0
        shape = self.network.steps[self.stretch.first].shape
        return self._pushed(self._adjoint, vectors) if adjoint else self._pushed(self._apply, vectors.reshape(pushed, *shape))

    def _is_adjoint(self, size: float, error: float) -> bool:
        """Whether torch's derivative is the adjoint of the map, up to rounding: `y.A x = A* y.x` for random x and y."""
        shapes = [self.network.steps[i].shape for i in (self.stretch.first, self.stretch.last)]
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(1, math.prod(s), dtype=torch.float64, generator=generator) for s in shapes)
        image, back = self._pushed(self._apply, x.reshape(1, *shapes[0])), self._pushed(self._adjoint, y)
        room = 4.0 * (error + rd.gamma(8.0 + x.numel() + y.numel()) * size) * float(x.norm() * y.norm())
        return bool(((image * y).sum() - (back * x).sum()).abs() <= room)
