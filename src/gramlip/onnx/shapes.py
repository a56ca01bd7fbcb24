"""Operators that place entries: shapes, parts, orders, padding, and constants."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.onnx.registry import LARGEST, Function, Node, RefusedError, register, sized

# ---- constants -----------------------------------------------------------------------------------------------------------


@register("Constant")
def _constant(node: Node) -> Function:
    if (held := node.get("value")) is None:
        kinds = {"value_float": torch.float32, "value_floats": torch.float32, "value_int": torch.int64, "value_ints": torch.int64}
        name = next((name for name in kinds if node.get(name) is not None), None)
        if name is None:
            msg = f"a constant by {', '.join(node.attributes) or 'nothing'}; expected numbers"
            raise RefusedError(msg)
        held = torch.tensor(node.get(name), dtype=kinds[name])
    return lambda: held


@register("Shape")
def _shape(node: Node) -> Function:
    part = node.shape()[slice(node.get("start", 0), node.get("end"))]
    return lambda x: torch.tensor(part, dtype=torch.int64)


@register("Size")
def _size(node: Node) -> Function:
    return lambda x: torch.tensor(node.tensor().numel())


def _list(node: Node, i: int) -> list[int]:
    value = node.constant(i)
    return [] if value is None else value.reshape(-1).tolist()


@register("ConstantOfShape")
def _constant_of_shape(node: Node) -> Function:
    shape, value = sized(_list(node, 0)), node.get("value", torch.zeros(1))
    return lambda _: value.reshape(()).expand(shape)


@register("Range")
def _range(node: Node) -> Function:
    ends = [node.number(i) for i in range(3)]
    if not ends[2] or not abs(ends[1] - ends[0]) <= LARGEST * abs(ends[2]):
        msg = f"a range from {ends[0]} to {ends[1]} by {ends[2]}"
        raise RefusedError(msg)
    made = torch.arange(*ends, dtype=node.tensor().dtype) if (ends[1] - ends[0]) * ends[2] > 0 else node.tensor().new_empty(0)
    return lambda *_: made


@register("NonZero")
def _non_zero(node: Node) -> Function:
    node.constant(0)
    return lambda x: torch.nonzero(x).t()


# ---- shapes --------------------------------------------------------------------------------------------------------------


@register("Reshape")
def _reshape(node: Node) -> Function:
    given, old = _list(node, 1), node.shape()
    shape = given if node.get("allowzero", 0) else [old[j] if n == 0 and j < len(old) else n for j, n in enumerate(given)]
    return lambda x, _: x.reshape(shape)


@register("Flatten")
def _flatten(node: Node) -> Function:
    axis, shape = node.axis(1, last=True), node.shape()
    if axis == 1:
        return partial(torch.flatten, start_dim=1) if len(shape) > 1 else lambda x: x.reshape(-1, 1)
    rows = torch.Size(shape[:axis]).numel()
    return lambda x: x.reshape(rows, -1)


@register("Transpose")
def _transpose(node: Node) -> Function:
    order = node.get("perm") or list(reversed(range(len(node.shape()))))
    return lambda x: x.permute(order)


@register("Squeeze")
def _squeeze(node: Node) -> Function:
    shape, axes = node.shape(), node.setting("axes", 1)
    dims = [j for j, n in enumerate(shape) if n == 1] if axes is None else node.axes_of(axes)
    if any(shape[j] != 1 for j in dims):
        msg = f"axes {axes} of a value of the shape {shape}; expected axes of one entry"
        raise RefusedError(msg)
    return lambda x, *_: x.squeeze(dims)


@register("Unsqueeze")
def _unsqueeze(node: Node) -> Function:
    axes: list[int] = node.setting("axes", 1) or []
    dims = sorted(node.axes_of(axes, len(node.shape()) + len(axes)))

    def run(x: Tensor, *_: Tensor) -> Tensor:
        for axis in dims:
            x = x.unsqueeze(axis)
        return x

    return run


@register("Expand")
def _expand(node: Node) -> Function:
    shape = sized(torch.broadcast_shapes(node.shape(), _list(node, 1)))
    return lambda x, _: x.expand(shape)


@register("Tile")
def _tile(node: Node) -> Function:
    times = _list(node, 1)
    sized([n * t for n, t in zip(node.shape(), times, strict=True)])
    return lambda x, _: x.repeat(times)


# ---- parts ---------------------------------------------------------------------------------------------------------------


@register("Concat")
def _concat(node: Node) -> Function:
    axis = node.axis(0)
    return lambda *xs: torch.cat(xs, axis)


@register("Split")
def _split(node: Node) -> Function:
    """Parts of given sizes, or as equal as they can be."""
    axis = node.axis(0)
    size, sizes = node.shape()[axis], node.setting("split", 1)
    if sizes is None:
        count = node.get("num_outputs", node.results)
        each = -(-size // count)
        sizes = [min(each, size - j * each) for j in range(count)]
    if sum(sizes) != size or min(sizes) < 0:
        msg = f"parts of {sizes} of an axis of {size}"
        raise RefusedError(msg)
    return lambda x, *_: torch.split(x, sizes, axis)


@register("Slice")
def _slice(node: Node) -> Function:
    starts, ends = node.setting("starts", 1), node.setting("ends", 2)
    axes = node.axes_of(node.setting("axes", 3) or range(len(starts)))
    steps = node.setting("steps", 4) or [1] * len(starts)
    cuts: list[tuple[int, range]] = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not step:
            msg = "a step of 0"
            raise RefusedError(msg)
        cuts.append((axis, range(*slice(start, end, step).indices(node.shape()[axis]))))

    def run(x: Tensor, *_: Tensor) -> Tensor:
        for axis, part in cuts:
            x = _cut(x, axis, part)
        return x

    return run


def _cut(x: Tensor, axis: int, part: range) -> Tensor:
    """These entries of an axis; torch has no steps backwards."""
    if part.step < 0 and part:
        part = range(x.shape[axis] - 1 - part[0], x.shape[axis] - part[-1], -part.step)
        x = x.flip(axis)
    return x[(slice(None),) * axis + (slice(part.start, max(part.start, part.stop), abs(part.step)),)]


@register("Gather")
def _gather(node: Node) -> Function:
    """Entries of an axis by their numbers; negative ones count from its end."""
    axis, n = node.axis(0), node.shape()[node.axis(0)]
    if not node.known[1]:
        return lambda x, at: x[(*[slice(None)] * axis, at)]
    at = _indices(node, n)
    if at.ndim == 0:
        number = int(at)
        return lambda x, _: x.select(axis, number)
    node.extra.append(at.reshape(-1))
    shape = [*node.shape()[:axis], *at.shape, *node.shape()[axis + 1 :]]
    if at.ndim == 1:
        return lambda x, _, flat: torch.index_select(x, axis, flat)
    return lambda x, _, flat: torch.index_select(x, axis, flat).reshape(shape)


@register("GatherElements")
def _gather_elements(node: Node) -> Function:
    axis = node.axis(0)
    node.extra.append(_indices(node, node.shape()[axis]))
    return lambda x, _, at: torch.gather(x, axis, at)


def _indices(node: Node, n: int) -> Tensor:
    value = node.constant(1)
    at = torch.zeros(0, dtype=torch.int64) if value is None else value.to(torch.int64)
    if bool(((at < -n) | (at >= n)).any()):
        msg = f"numbers beyond an axis of {n}"
        raise RefusedError(msg)
    return torch.where(at < 0, at + n, at)


@register("Trilu")
def _trilu(node: Node) -> Function:
    call, diagonal = torch.triu if node.get("upper", 1) else torch.tril, int(node.number(1, 0))
    return lambda x, *_: call(x, diagonal)


# ---- padding and blocks --------------------------------------------------------------------------------------------------


@register("Pad")
def _pad(node: Node) -> Function:
    mode = node.only("mode", "constant", "reflect", "edge", "wrap")
    pads, rank = node.setting("pads", 1), len(node.shape())
    dims = list(range(rank)) if not node.has(3) else node.axes_of(_list(node, 3))
    if pads is None or len(pads) != 2 * len(dims):
        msg = f"pads={pads} for {len(dims)} axes"
        raise RefusedError(msg)
    sides = [[0, 0] for _ in range(rank)]
    for j, axis in enumerate(dims):
        sides[axis] = [pads[j], pads[j + len(dims)]]
    sized([n + sum(side) for n, side in zip(node.shape(), sides, strict=True)])
    if not any(pads):
        return lambda x, *_: x
    if mode == "constant":
        value = node.get("value", node.number(2, 0.0))
        padding = [side for pair in reversed(sides) for side in pair]
        return lambda x, *_: F.pad(x, padding, value=value)
    return _reflected(node, {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode], sides)


def _reflected(node: Node, mode: str, sides: Sequence[Sequence[int]]) -> Function:
    """Padding from the entries themselves: of the axes behind the first two, at most three."""
    rank = len(sides)
    if not 3 <= rank <= 5 or any(any(side) for side in sides[:2]) or min(map(min, sides)) < 0:
        msg = f"mode={node.get('mode')!r} by {list(map(list, sides))}; expected positive numbers, of the axes behind the first two alone"
        raise RefusedError(msg)
    padding = [side for pair in reversed(sides[2:]) for side in pair]
    return lambda x, *_: F.pad(x, padding, mode=mode)


@register("DepthToSpace")
def _depth_to_space(node: Node) -> Function:
    b, mode = node.get("blocksize"), node.only("mode", "DCR", "CRD")
    n, c, h, w = _four(node)
    if mode == "CRD":
        return partial(F.pixel_shuffle, upscale_factor=b)
    c //= b * b
    return lambda x: x.reshape(n, b, b, c, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c, h * b, w * b)


@register("SpaceToDepth")
def _space_to_depth(node: Node) -> Function:
    b = node.get("blocksize")
    n, c, h, w = _four(node)
    if node.only("mode", "DCR", "CRD") == "CRD":
        return partial(F.pixel_unshuffle, downscale_factor=b)
    h, w = h // b, w // b
    return lambda x: x.reshape(n, c, h, b, w, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h, w)


def _four(node: Node) -> tuple[int, ...]:
    if len(node.shape()) != 4:
        msg = f"an input of the shape {node.shape()}; expected images"
        raise RefusedError(msg)
    return node.shape()
