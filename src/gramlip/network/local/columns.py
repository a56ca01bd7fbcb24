"""Columns carried forward: every value as a linear function of the input, and what slopes may add to it. docs/local.md#columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gramlip.network.local.intervals import Region, Value, as_rows, chords, round_up
from gramlip.network.local.relaxations import Action, action, copies, stray_of
from gramlip.network.steps import Input, Linear, Lipschitz, Network, Slope, Step, Sum, terms
from gramlip.norm.certify import certify_all
from gramlip.numerics import rounding as rd
from gramlip.numerics.eigenvalues import cholesky
from gramlip.numerics.precision import to_float64
from gramlip.numerics.rounding import frobenius_up
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape, axes

# ---- columns in boxes --------------------------------------------------------------------------------------------------
#
# Columns that are zero outside of a box: convolutions need only what lies in it and around it.

BLOCKS = 64  # that the axes of a value are cut into, about
Box = tuple[tuple[int, int], ...]
Act = Callable[[Sequence[Tensor], bool], Tensor]


@dataclass(frozen=True)
class Tile:
    """Columns of a value of shape (batch, channels, *space), zero outside of `box`, first and last places of the axes of space.

    `data` has a row for each column, then the axes of the value, cut to the box.
    """

    box: Box
    data: Tensor


def whole_box(shape: Shape) -> Box:
    """The box of all entries."""
    return tuple((0, n) for n in shape[2:])


def cut(x: Tensor, box: Box) -> Tensor:
    """The entries of a value, or of many, in a box."""
    return x[(..., *(slice(a, b) for a, b in box))]


def dense(tile: Tile, shape: Shape) -> Tensor:
    """The columns with their zeros."""
    if tile.box == whole_box(shape):
        return tile.data
    values = torch.zeros(len(tile.data), *shape, dtype=torch.float64)
    cut(values, tile.box)[...] = tile.data
    return values


def size_of(box: Box, shape: Shape) -> int:
    """Entries of one column."""
    return math.prod(shape[:2]) * math.prod(b - a for a, b in box)


# ---- columns that are made -------------------------------------------------------------------------------------------------


def unit_columns(places: Tensor, lengths: Tensor, shape: Shape, blocks: int, most: int) -> list[tuple[Tensor, Tile]]:
    """A column for each place of the flat value, that long there and zero elsewhere, in tiles of at most so many columns.

    With each tile come the numbers of its columns. The axes of space are cut into so many blocks, of two places each at least.
    """
    space, tiles = shape[2:], list[tuple[Tensor, Tile]]()
    parts = max(1, round(blocks ** (1 / max(1, len(space)))))
    steps = [math.ceil(n / max(1, min(n // 2, parts))) for n in space]
    at = _coordinates(places, shape)
    owner = torch.zeros(len(places), dtype=torch.long)
    for x, n, step in zip(at, space, steps, strict=True):
        owner = owner * math.ceil(n / step) + x // step
    for block in owner.unique():
        for numbers in (owner == block).nonzero()[:, 0].split(max(1, most)):
            corner = [int(x[numbers[0]] // step * step) for x, step in zip(at, steps, strict=True)]
            box = tuple((c, min(c + step, n)) for c, step, n in zip(corner, steps, space, strict=True))
            data = torch.zeros(len(numbers), size_of(box, shape), dtype=torch.float64)
            data[torch.arange(len(numbers)), _inside(places[numbers], shape, box)[1]] = lengths[numbers]
            tiles.append((numbers, Tile(box, data.reshape(-1, *shape[:2], *(b - a for a, b in box)))))
    return tiles


def _coordinates(places: Tensor, shape: Shape) -> list[Tensor]:
    """Coordinates of places of the flat value along the axes of space."""
    coordinates, rest = list[Tensor](), places
    for n in reversed(shape[2:]):
        coordinates.append(rest % n)
        rest = rest // n
    return coordinates[::-1]


def _inside(places: Tensor, shape: Shape, box: Box) -> tuple[Tensor, Tensor]:
    """Which places of the flat value lie in a box, and the number of each of these in it."""
    at, count = _coordinates(places, shape), math.prod(shape[2:])
    kept = torch.ones(len(places), dtype=torch.bool)
    number = places // count
    for x, (a, b) in zip(at, box, strict=True):
        kept &= (x >= a) & (x < b)
        number = number * (b - a) + (x - a)
    return kept, number[kept]


def rows_at(tile: Tile, places: Tensor, shape: Shape) -> Tensor:
    """The entries of the columns at some places of the flat value: a row for each place."""
    kept, numbers = _inside(places, shape, tile.box)
    rows = torch.zeros(len(places), len(tile.data), dtype=torch.float64)
    rows[kept] = as_rows(tile.data)[:, numbers].mT
    return rows


# ---- linear steps ------------------------------------------------------------------------------------------------------------


def landing(step: Step, boxes: Sequence[Box | None], shapes: Sequence[Shape], copied: Tensor | None = None) -> Box | None:
    """The box outside of which the result is zero, from those of the sources; None where nothing is left. A source may have none.

    `copied` are the numbers of the entries of the source that a step copies, None for other steps.
    """
    what, whole = step.what, whole_box(step.shape)
    known = [box for box in boxes if box is not None]
    if copied is not None and len(step.shape) > 2:
        return _around(_inside(copied.reshape(-1), shapes[0], known[0])[0].reshape(step.shape))
    if isinstance(what, Linear) and _slides(what.op):
        return _seen(what.op, known[0])
    if isinstance(what, Linear) and isinstance(what.op, Scale) and shapes[0] == step.shape:
        return known[0]
    if isinstance(what, Sum) and all(shape == step.shape for shape in shapes):
        return tuple((min(a for a, _ in ends), max(b for _, b in ends)) for ends in zip(*known, strict=True))
    return whole


def _around(kept: Tensor) -> Box | None:
    """The least box that holds all entries that are kept."""
    ends = [kept.movedim(j, 0).flatten(1).any(1).nonzero()[:, 0] for j in range(2, kept.ndim)]
    return tuple((int(at[0]), int(at[-1]) + 1) for at in ends) if all(map(len, ends)) else None


def _slides(op: object) -> bool:
    return isinstance(op, Conv) and not op.transposed and op.padding_mode == "zeros" and op.sizes is not None


def _seen(op: object, box: Box) -> Box | None:
    """The outputs of a convolution that read anything in a box."""
    assert isinstance(op, Conv)
    ranges: list[tuple[int, int]] = []
    for axis, (a, b) in zip(axes(op), box, strict=True):
        assert axis.outputs is not None
        first = max(0, -(-(a + axis.before - axis.span + 1) // axis.stride))
        last = min(axis.outputs - 1, (b - 1 + axis.before) // axis.stride)
        if last < first:
            return None
        ranges.append((first, last + 1))
    return tuple(ranges)


def carried(step: Step, act: Act, tiles: Sequence[Tile | None], shapes: Sequence[Shape], box: Box, copied: Tensor | None = None) -> Tile:
    """Columns after a linear step, which `act` computes on whole values; `box` and `copied` are those of `landing`."""
    what, known = step.what, [tile for tile in tiles if tile is not None]
    if copied is not None and len(step.shape) > 2:
        part = cut(copied, box)
        kept, numbers = _inside(part.reshape(-1), shapes[0], known[0].box)
        values = torch.zeros(len(known[0].data), part.numel(), dtype=torch.float64)
        values[:, kept] = as_rows(known[0].data)[:, numbers]
        return Tile(box, values.reshape(-1, *part.shape))
    if isinstance(what, Linear) and isinstance(what.op, Conv) and _slides(what.op):
        return Tile(box, _slid(what.op, known[0], box))
    if isinstance(what, Linear) and isinstance(what.op, Scale) and shapes[0] == step.shape:
        return Tile(box, known[0].data * cut(to_float64(what.op.weight).expand(step.shape), box))
    count = len(known[0].data)
    if isinstance(what, Sum) and all(shape == step.shape for shape in shapes):
        if len(known) == 1:
            return known[0]
        values = torch.zeros(count, *step.shape[:2], *(b - a for a, b in box), dtype=torch.float64)
        for tile in known:
            cut(values, tuple((a - lo, b - lo) for (a, b), (lo, _) in zip(tile.box, box, strict=True)))[...] += tile.data
        return Tile(box, values)
    blank = [torch.zeros(count, *s, dtype=torch.float64) if t is None else dense(t, s) for t, s in zip(tiles, shapes, strict=True)]
    return Tile(box, act(blank, False))


def _slid(op: Conv, tile: Tile, box: Box) -> Tensor:
    """A zero-padded convolution of what lies in a tile, on the outputs of a box."""
    pads: list[int] = []
    for axis, (a, b), (first, end) in zip(axes(op), tile.box, box, strict=True):
        start = first * axis.stride - axis.before
        stop = (end - 1) * axis.stride - axis.before + axis.span
        pads = [a - start, stop - b, *pads]
    x = F.pad(tile.data.flatten(0, 1), pads)
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[op.dims]
    y = call(x, to_float64(op.weight), None, op.stride, 0, op.dilation, op.groups)
    return y.unflatten(0, tile.data.shape[:2])


# ---- columns -----------------------------------------------------------------------------------------------------------

INF = math.inf
MOST = 2**27  # entries of the columns of one value
WORK = 2**31  # and of those of all values together
TOGETHER = 2**24  # of them in one tile
SWITCHING = 2**12  # activations of a value that have columns
FAINT = 1e-12  # of the longest column of a step: what is shorter has none
FREE = 0.2  # of the steepest slope: where most slopes differ more from their middles, columns say nothing
NEAR = 1024  # activations of a few tiles of which the norm is taken alone
PRODUCTS = 1e11  # multiplications that a norm of what they are may take
LARGEST = 1e60  # differences and weights up to which nothing that underflows counts
LOST = 1e-150  # is added for what does


@dataclass(frozen=True)
class Group:
    """Columns that belong together, in one tile of every value: of entries of the flat input, or of activations of step `step`."""

    step: int
    numbers: Tensor


@dataclass(frozen=True)
class Form:
    """How a value differs at two points, entry by entry: by its columns times what these stand for, up to `loose`.

    `size` bounds all of it, roughly, and `most` as well as is known, where a step reads that.
    """

    tiles: Mapping[int, Tile]
    loose: Tensor
    size: Tensor
    most: Tensor | None = None


@dataclass(frozen=True)
class Near:
    """What the columns of the activations of one step stand for, where a value reads those of some tiles alone: theorem L10.

    `gram` holds the products of the activations' rows, each entry known up to `gamma` times the lengths of two rows, `loose`
    what their rows may be off by, `groups` the rows of each tile.
    """

    gram: Tensor
    loose: Tensor
    shares: float
    gamma: float
    groups: dict[int, Tensor]
    known: dict[bytes, float]

    def norms(self, tiles: Mapping[int, Tile], shape: Shape, most: float) -> Tensor:
        """For each place of a value of this shape the norm of what its columns stand for; `most` is that of all of them."""
        keys = [key for key in self.groups if key in tiles]
        reads = torch.zeros(len(keys), 1, 1, *shape[2:], dtype=torch.bool)
        for read, key in zip(reads, keys, strict=True):
            cut(read, tiles[key].box)[...] = True
        patterns, which = reads.flatten(1).mT.unique(dim=0, return_inverse=True)
        sets = [[key for key, on in zip(keys, pattern, strict=True) if on] for pattern in patterns.tolist()]
        norms = torch.tensor([self._norm(places, most) for places in sets], dtype=torch.float64)
        return norms[which].reshape(*(1,) * min(2, len(shape)), *shape[2:])

    def _norm(self, keys: Sequence[int], most: float) -> float:
        name = torch.tensor(keys).numpy().tobytes()
        if name not in self.known:
            at = torch.cat([self.groups[key] for key in keys]) if keys else torch.zeros(0, dtype=torch.long)
            self.known[name] = most if len(at) > NEAR else self._of_rows(at, most)
        return min(self.known[name], most)

    def _of_rows(self, at: Tensor, most: float) -> float:
        """The norm of the rows of a few activations, at most."""
        if len(at) == 0:
            return LOST
        gram, apart = self.gram[at[:, None], at], frobenius_up(self.loose[at]) * (1.0 + rd.gamma(8.0))
        plain, trace = rd.sqrt_up(float(len(at))), gram.diagonal().sum()[None]
        noise, x = self.gamma * trace * (1.0 + rd.gamma(8.0 * len(at))), gram.sum(0)
        for _ in range(16):
            x = gram @ (x / torch.linalg.vector_norm(x).clamp_min(1e-300))
        for slack in (1.01, 1.03, 1.1, 1.5):
            top = torch.linalg.vector_norm(x) * slack + 8.0 * noise + LOST
            if bool(cholesky(gram[None], top, noise)):
                return min(plain, most, rd.add_up(rd.mul_up(rd.sqrt_up(float(top)), self.shares), apart))
        return min(plain, most)


class Columns:
    """The values so far as linear functions of the input, and what slopes may add to them.

    Differences are those of two points of the set at the distance 1, or, with `centred`, of any point of it and the centre.
    """

    def __init__(self, network: Network, area: Region, centred: bool, budget: int = WORK) -> None:
        """Nothing is followed where that takes more than `budget` entries."""
        steps, outputs = network.steps, network.outputs
        self._area, self._outputs, self._left, self._centred = area, outputs, budget, centred
        self._unit = area.far if centred else 1.0
        self._pays = budget > 0 and area.far < LARGEST
        self._actions: list[Action | None] = [action(steps, i) if self._pays else None for i in range(len(steps))]
        self._copied = [copies(steps, i) if self._pays else None for i in range(len(steps))]
        reads = [step.sources if act is None else act[0] for step, act in zip(steps, self._actions, strict=True)]
        self._last = {s: i for i, sources in enumerate(reads) for s in sources} | dict.fromkeys(outputs, len(steps))
        self._read = {s for sources, act in zip(reads, self._actions, strict=True) if act is None for s in sources} | set(outputs)
        self._blocks = BLOCKS if any(isinstance(s.what, Linear) and isinstance(s.what.op, Conv) for s in steps) else 1
        self._chunk = max(1, TOGETHER // max(math.prod(step.shape) for step in steps))
        self._steps, self._forms, self._groups, self._inputs = list[Step](), dict[int, Form](), list[Group](), 0
        self._norms = dict[int, float]()  # of what the columns of the activations of a step stand for
        self._near = dict[int, Near]()  # and of what those of some of them stand for
        self._switches = list[tuple[Tensor, float]]()  # of these, as functions of the input, up to a rest of that norm

    def add(self, step: Step, source: Value | None = None) -> Tensor | None:
        """One more step; how much each entry of its value differs at most, where that is read and known.

        `source` is what is known of the value that it reads first.
        """
        i = len(self._steps)
        self._steps.append(step)
        if not self._pays:
            return None
        with torch.no_grad():
            form = self._form(i, step, source)
        self._forms = {s: f for s, f in self._forms.items() if self._last.get(s, -1) > i}
        if form is None or not bool((form.size < LARGEST).all()):
            return None
        if self._last.get(i, -1) > i:
            self._forms[i] = form
        return form.most

    def _form(self, i: int, step: Step, source: Value | None) -> Form | None:
        if isinstance(step.what, Input):
            return self._input(step)
        act = self._actions[i]
        reads = step.sources if act is None else act[0]
        if not reads or any(s not in self._forms for s in reads):  # a call without a rule may have lost what it reads
            return None
        form = self._forms[step.sources[0]] if act is None else None
        if form is not None and isinstance(step.what, Slope) and tuple(form.loose.shape) == step.shape:
            return self._activated(i, step.what, form, source)
        return None if act is None else self._mapped(i, step, act, [self._forms[s] for s in act[0]])

    def _pay(self, entries: int) -> bool:
        """Whether that many more entries of one value can be paid for."""
        self._left -= entries
        return entries <= MOST and self._left >= 0

    def _input(self, step: Step) -> Form | None:
        size, tiles = math.prod(step.shape), dict[int, Tile]()
        if not self._pay(size * size if self._blocks == 1 else size * size // self._blocks):
            return None
        places, ones = torch.arange(size), torch.ones(size, dtype=torch.float64)
        for numbers, tile in unit_columns(places, ones, step.shape, self._blocks, self._chunk):
            tiles[len(self._groups)] = tile
            self._groups.append(Group(-1, self._inputs + numbers))
        self._inputs += size
        zero = torch.zeros(step.shape, dtype=torch.float64)
        return self._measured(Form(tiles, zero, zero + self._unit), True)

    def _mapped(self, i: int, step: Step, act: Action, forms: Sequence[Form]) -> Form | None:
        """A linear step."""
        shapes, source = [tuple(f.loose.shape) for f in forms], self._copied[i]
        copied = None if source is None else source[1]
        read = {key: [f.tiles.get(key) for f in forms] for key in dict.fromkeys(key for f in forms for key in f.tiles)}
        landed = {key: landing(step, [tile and tile.box for tile in tiles], shapes, copied) for key, tiles in read.items()}
        boxes = {key: box for key, box in landed.items() if box is not None}
        if not self._pay(sum(len(self._groups[key].numbers) * size_of(box, step.shape) for key, box in boxes.items())):
            return None
        mapped = {key: carried(step, act[1], read[key], shapes, box, copied) for key, box in boxes.items()}
        return self._measured(Form(mapped, *self._rest(i, step, act[1], forms)), i in self._read)

    def _rest(self, i: int, step: Step, act: Act, forms: Sequence[Form]) -> tuple[Tensor, Tensor]:
        """`loose` and `size` of the form of a linear step, from those that it reads."""
        what, wide = step.what, sum(f.loose.numel() for f in forms)
        products = terms(what.op) if isinstance(what, Linear) else wide if isinstance(what, Lipschitz) else len(forms)
        gamma = rd.gamma(8.0 * (products + 8))
        loose = act([(f.loose + gamma * f.size)[None] for f in forms], True)[0] * (1.0 + gamma) + LOST
        size = act([f.size[None] for f in forms], True)[0]
        if stray := stray_of(self._steps, i):
            loose = round_up(loose + rd.mul_up(stray, rd.hypot_up(frobenius_up(f.size) for f in forms)))
        return loose, size * (1.0 + gamma) + loose

    def _activated(self, i: int, what: Slope, form: Form, source: Value | None) -> Form | None:
        """An activation: its middle slopes, and a column of its own for each entry that differs most from them, as many as fit."""
        assert form.most is not None
        shape = tuple(form.loose.shape)
        middle, half, free = self._slopes(what, shape, source)
        if (self._centred and free > SWITCHING and 2 * free > half.numel()) or not self._pay(
            sum(tile.data.numel() for tile in form.tiles.values())
        ):
            return None
        gamma = 1.0 + rd.gamma(8.0)
        tiles = {key: Tile(tile.box, tile.data * cut(middle, tile.box)) for key, tile in form.tiles.items()}
        loose = (middle.abs() * (form.loose + rd.gamma(8.0) * form.most)) * gamma + LOST
        moved = (half * form.most * gamma).reshape(-1)
        places = moved.topk(min(int((moved > FAINT * moved.max()).sum()), SWITCHING)).indices.sort().values
        weights = moved[places] + (1.0 + half.reshape(-1)[places]) * LOST
        moved = moved.index_fill(0, places, 0.0)
        if len(places):
            self._norms[i] = self._norm_of_switches(i, form, places)
        for numbers, tile in unit_columns(places, weights, shape, self._blocks, self._chunk):
            tiles[len(self._groups)] = tile
            if i in self._near:
                self._near[i].groups[len(self._groups)] = numbers
            self._groups.append(Group(i, places[numbers]))
        loose = round_up(loose + moved.reshape(shape))
        return self._measured(Form(tiles, loose, (middle.abs() + half) * form.most * gamma + loose), i in self._read)

    def _slopes(self, what: Slope, shape: Shape, source: Value | None) -> tuple[Tensor, Tensor, int]:
        """The middles of an activation's slopes, by how much they differ from these, and how many of them do so by far."""
        known = self._centred and source is not None and isinstance(source.low, Tensor)
        low, high = chords(what, source) if known and source is not None else (what.low, what.high)
        low, high = (torch.as_tensor(end, dtype=torch.float64).expand(shape) for end in (low, high))
        middle = low + (high - low) / 2
        half = torch.maximum(high - middle, middle - low)
        half = torch.where(half > 0, half * (1 + 2.0**-50) + rd.TINY, 0.0)
        return middle, half, int((half > FREE * torch.maximum(low.abs(), high.abs()).max()).sum())

    # ---- how much a value differs at most ------------------------------------------------------------------------------------

    def _measured(self, form: Form, wanted: bool) -> Form:
        """A form with the bounds of its differences, where they are read: theorems L8 and L10."""
        if not wanted:
            return form
        sums, count = dict[int, list[Tensor]](), dict[int, int]()
        boxed = self._boxed()
        for key, tile in form.tiles.items():
            group, data = self._groups[key], tile.data
            square, plain = sums.setdefault(group.step, [torch.zeros_like(form.loose), torch.zeros_like(form.loose)])
            count[group.step] = count.get(group.step, 0) + len(data)
            flat = as_rows(data)
            ones = torch.ones(len(data), dtype=torch.float64)
            cut(square, tile.box)[...] += (ones @ flat.square()).reshape(data.shape[1:])
            if group.step >= 0 or boxed:
                weights = self._area.halves[group.numbers] if group.step < 0 else ones
                cut(plain, tile.box)[...] += (weights @ flat.abs()).reshape(data.shape[1:])
        most = torch.zeros_like(form.loose)
        for step, (square, plain) in sums.items():
            room = 1.0 + rd.gamma(2.0 * count[step] + 16.0)
            norm = self._unit if step < 0 else self._norms[step]
            near = norm if step not in self._near else self._near[step].norms(form.tiles, tuple(form.loose.shape), norm)
            length = square.sqrt() * (near * room) + LOST
            most = most + (torch.minimum(length, plain * room) if step >= 0 or boxed else length)
        return replace(form, most=torch.minimum(most * (1.0 + rd.gamma(4.0 * len(sums) + 8.0)) + form.loose * (1.0 + 2.0**-50), form.size))

    def _boxed(self) -> bool:
        """Whether a box cuts into the ball, or there is none."""
        return self._centred and not bool((self._area.halves >= self._area.radius * (1.0 - 2.0**-30)).all())

    def _norm_of_switches(self, i: int, form: Form, places: Tensor) -> float:
        """The l2 norm of what the columns of some activations will stand for, from the form of their arguments: theorem L10."""
        assert form.most is not None
        shape, scale = tuple(form.loose.shape), form.most.reshape(-1)[places].clamp_min(LOST)
        plain = rd.sqrt_up(float(len(places)))
        rows = {key: rows_at(tile, places, shape) / scale[:, None] for key, tile in form.tiles.items()}
        parts = self._parts(rows)
        loose = form.loose.reshape(-1)[places] / scale
        apart = frobenius_up(loose) * (1.0 + rd.gamma(8.0))
        if not self._centred:
            blank = torch.zeros(len(places), 0, dtype=torch.float64)
            rest = rd.add_up(_joint([part for step, part in parts.items() if step >= 0], 1e-2, plain), apart)
            self._switches.append((parts.get(-1, blank), min(rest, 2.0 * plain)))
        if self._blocks > 1:
            self._near[i] = self._gram(rows, parts, loose)
        return min(plain, rd.add_up(_joint(list(parts.values()), 1e-2, plain), apart))

    def _gram(self, rows: Mapping[int, Tensor], parts: Mapping[int, Tensor], loose: Tensor) -> Near:
        """The products of the rows of all activations that may switch, with shares of the steps: theorem L10."""
        lengths = {step: _length(part) for step, part in parts.items() if part.numel() and bool(part.any())}
        total, gram = sum(lengths.values()), torch.zeros(len(loose), len(loose), dtype=torch.float64)
        for key, columns in rows.items():
            step = self._groups[key].step
            at = columns.any(1).nonzero()[:, 0]
            if step in lengths and len(at):
                part = columns[at] * ((self._unit if step < 0 else self._norms[step]) * math.sqrt(total / lengths[step]))
                gram[at[:, None], at] += part @ part.mT
        count = float(sum(part.shape[1] for part in parts.values()))
        shares = rd.sqrt_up(rd.add_up(*(length / total for length in lengths.values()))) if lengths else 1.0
        return Near(gram, loose, shares * (1.0 + rd.gamma(8.0)), rd.gamma(8.0 * (count + 16.0)), {}, {})

    def _parts(self, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Matrices of columns, those of each step joined, times the norm of what they stand for; step -1 are those of the input."""
        joined: dict[int, list[Tensor]] = {}
        for key, columns in rows.items():
            joined.setdefault(self._groups[key].step, []).append(columns)
        return {step: torch.cat(blocks, 1) * (self._unit if step < 0 else self._norms[step]) for step, blocks in joined.items()}

    # ---- what they say of the results ----------------------------------------------------------------------------------------

    def followed(self) -> bool:
        """Whether the results are known as linear functions."""
        return all(i in self._forms for i in self._outputs)

    def rows(self) -> Tensor | None:
        """How far each entry of the results is from that at the centre, over the distance of the inputs, at most."""
        if not self.followed() or not self._centred or self._boxed():
            return None
        known = [self._forms[i].most for i in self._outputs]
        return torch.cat([round_up(most / self._unit).reshape(-1) for most in known if most is not None])

    def pay(self, outputs: Tensor | None, known: float) -> bool:
        """Whether columns of two points are worth their time: around the centre no row of theirs is above what is `known` already."""
        rows = self.rows()
        if rows is None:
            return self.followed()
        return float((rows if outputs is None else rows[outputs]).max()) < known

    def norm(self, inputs: Tensor | None, outputs: Tensor | None) -> float:
        """Upper bound of the norm of the difference of the results, from and to some entries of inputs and results; None are all."""
        if not self.followed():
            return INF
        forms = [self._forms[i] for i in self._outputs]
        loose = torch.cat([f.loose.reshape(-1) for f in forms])
        rows: dict[int, Tensor] = {}
        for key in sorted({key for f in forms for key in f.tiles}):
            group, count = self._groups[key], len(self._groups[key].numbers)
            matrix = torch.cat([self._results(f, key, count) for f in forms], 1)
            if outputs is not None:
                matrix = matrix[:, outputs]
            rows[key] = (matrix[inputs[group.numbers]] if inputs is not None and group.step < 0 else matrix).mT
        loose = loose if outputs is None else loose[outputs]
        parts = self._parts(rows)
        if -1 not in parts:
            return frobenius_up(loose)
        middle = parts.pop(-1)
        extra = {step: part / self._norms[step] for step, part in parts.items()}
        switched = min(_joint(list(parts.values()), 1e-2, INF), self._switched_together(extra))
        apart = rd.add_up(_upper(middle, 1e-6), switched)
        return rd.add_up(min(apart, _joint([middle, *parts.values()], 1e-3, apart)), frobenius_up(loose))

    def _switched_together(self, extra: Mapping[int, Tensor]) -> float:
        """The norm that the activations of all steps together may add to the results: theorem L9."""
        if not extra or not self._switches:
            return INF
        alike = [part for part, _ in self._switches if part.shape[1] == self._area.entries]
        every, wide = torch.cat(list(extra.values()), 1), sum(len(part) for part, _ in self._switches)
        if len(alike) < len(self._switches) or float(wide) * self._area.entries * min(wide, self._area.entries) > PRODUCTS:
            return INF
        rest = rd.hypot_up(rest for _, rest in self._switches)
        return rd.mul_up(_upper(every, 1e-2), rd.add_up(_upper(torch.cat(alike), 1e-2), rest))

    def _results(self, form: Form, key: int, count: int) -> Tensor:
        tile = form.tiles.get(key)
        return (
            torch.zeros(count, form.loose.numel(), dtype=torch.float64) if tile is None else as_rows(dense(tile, tuple(form.loose.shape)))
        )


def _upper(matrix: Tensor, rtol: float) -> float:
    """Upper bound of the norm of a matrix, each of whose entries has been computed with a rounding or two."""
    if matrix.numel() == 0:
        return 0.0
    contiguous = matrix.contiguous()
    return rd.add_up(float(certify_all([Dense(contiguous)], rtol=rtol)[0].upper), rd.mul_up(rd.gamma(8.0), frobenius_up(contiguous)))


def _joint(parts: Sequence[Tensor], rtol: float, known: float) -> float:
    """Upper bound of the norm of a sum of matrices times vectors of length 1 each: theorem L10.

    One quick way where the other would cost too much, or where `known` is not above it.
    """
    parts = [part for part in parts if part.numel() and bool(part.any())]
    if not parts:
        return 0.0
    lengths = [_length(part) for part in parts]
    total, wide = sum(lengths), sum(part.shape[1] for part in parts)
    shares = [length / total for length in lengths]
    if min(shares) > 1e-12 and _products(len(parts[0]), wide) <= PRODUCTS and max(lengths) < known:
        joined = torch.cat([part / math.sqrt(share) for part, share in zip(parts, shares, strict=True)], 1)
        return rd.mul_up(_upper(joined, rtol), rd.sqrt_up(rd.add_up(*shares)))
    return rd.add_up(*(_upper(part, rtol) if _products(*part.shape) <= PRODUCTS else _sums(part) for part in parts))


def _products(m: int, n: int) -> float:
    """Multiplications of a matrix with its adjoint, the smaller way."""
    return float(m) * n * min(m, n)


def _length(matrix: Tensor) -> float:
    """About the norm of a matrix."""
    x = matrix.abs().sum(0)
    for _ in range(8):
        x = matrix.mT @ (matrix @ (x / torch.linalg.vector_norm(x)))
    return max(float(torch.linalg.vector_norm(x)) ** 0.5, 1e-300)


def _sums(matrix: Tensor) -> float:
    """Upper bound of the norm of a matrix: the root of its largest row sum times its largest column sum."""
    size = matrix.abs()
    room = 1.0 + rd.gamma(float(sum(matrix.shape)) + 16.0)
    return min(rd.sqrt_up(rd.mul_up(float(size.sum(0).max()) * room, float(size.sum(1).max()) * room)), float(frobenius_up(matrix)) * room)


def columns_norm(network: Network, area: Region, inputs: Tensor | None, outputs: Tensor | None) -> float:
    """Upper bound of the constant of a network on the set that its slopes are restricted to, from and to some entries; None are all."""
    columns = Columns(network, area, centred=False)
    for step in network.steps:
        columns.add(step)
    return columns.norm(inputs, outputs)
