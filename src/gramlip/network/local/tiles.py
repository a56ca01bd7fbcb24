"""Columns that are zero outside of a box: convolutions need only what lies in it and around it. docs/local.md#columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gramlip.network.steps import Linear, Step, Sum
from gramlip.numerics.precision import to_float64
from gramlip.operators.linear_maps import Conv, Scale, Shape, axes

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
    made = torch.zeros(len(tile.data), *shape, dtype=torch.float64)
    cut(made, tile.box)[...] = tile.data
    return made


def size_of(box: Box, shape: Shape) -> int:
    """Entries of one column."""
    return math.prod(shape[:2]) * math.prod(b - a for a, b in box)


# ---- columns that are made -------------------------------------------------------------------------------------------------


def unit_columns(places: Tensor, lengths: Tensor, shape: Shape, blocks: int, most: int) -> list[tuple[Tensor, Tile]]:
    """A column for each place of the flat value, that long there and zero elsewhere, in tiles of at most so many columns.

    With each tile come the numbers of its columns. The axes of space are cut into so many blocks, of two places each at least.
    """
    space, made = shape[2:], list[tuple[Tensor, Tile]]()
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
            made.append((numbers, Tile(box, data.reshape(-1, *shape[:2], *(b - a for a, b in box)))))
    return made


def _coordinates(places: Tensor, shape: Shape) -> list[Tensor]:
    """Where places of the flat value lie along the axes of space."""
    found, rest = list[Tensor](), places
    for n in reversed(shape[2:]):
        found.append(rest % n)
        rest = rest // n
    return found[::-1]


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
    made = torch.zeros(len(places), len(tile.data), dtype=torch.float64)
    made[kept] = tile.data.flatten(1)[:, numbers].mT
    return made


# ---- linear steps ------------------------------------------------------------------------------------------------------------


def landing(step: Step, boxes: Sequence[Box | None], shapes: Sequence[Shape]) -> Box | None:
    """The box outside of which the result is zero, from those of the sources; None where nothing is left. A source may have none."""
    what, whole = step.what, whole_box(step.shape)
    known = [box for box in boxes if box is not None]
    if isinstance(what, Linear) and _slides(what.op):
        return _seen(what.op, known[0])
    if isinstance(what, Linear) and isinstance(what.op, Scale) and shapes[0] == step.shape:
        return known[0]
    if isinstance(what, Sum) and all(shape == step.shape for shape in shapes):
        return tuple((min(a for a, _ in ends), max(b for _, b in ends)) for ends in zip(*known, strict=True))
    return whole


def _slides(op: object) -> bool:
    return isinstance(op, Conv) and not op.transposed and op.padding_mode == "zeros" and op.sizes is not None


def _seen(op: object, box: Box) -> Box | None:
    """The outputs of a convolution that read anything in a box."""
    assert isinstance(op, Conv)
    made: list[tuple[int, int]] = []
    for axis, (a, b) in zip(axes(op), box, strict=True):
        assert axis.outputs is not None
        first = max(0, -(-(a + axis.before - axis.span + 1) // axis.stride))
        last = min(axis.outputs - 1, (b - 1 + axis.before) // axis.stride)
        if last < first:
            return None
        made.append((first, last + 1))
    return tuple(made)


def carried(step: Step, act: Act, tiles: Sequence[Tile | None], shapes: Sequence[Shape], box: Box) -> Tile:
    """Columns after a linear step, which `act` computes on whole values; `box` is that of `landing`."""
    what, known = step.what, [tile for tile in tiles if tile is not None]
    if isinstance(what, Linear) and isinstance(what.op, Conv) and _slides(what.op):
        return Tile(box, _slid(what.op, known[0], box))
    if isinstance(what, Linear) and isinstance(what.op, Scale) and shapes[0] == step.shape:
        return Tile(box, known[0].data * cut(to_float64(what.op.weight).expand(step.shape), box))
    count = len(known[0].data)
    if isinstance(what, Sum) and all(shape == step.shape for shape in shapes):
        if len(known) == 1:
            return known[0]
        made = torch.zeros(count, *step.shape[:2], *(b - a for a, b in box), dtype=torch.float64)
        for tile in known:
            cut(made, tuple((a - lo, b - lo) for (a, b), (lo, _) in zip(tile.box, box, strict=True)))[...] += tile.data
        return Tile(box, made)
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
