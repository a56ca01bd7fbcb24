"""Operators on tensors: arithmetic, activations, sums and norms along an axis, constants, shapes, parts and padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.onnx.registry import LARGEST, Function, Node, RefusedError, floating, plain, register, sized

# ---- arithmetic ----------------------------------------------------------------------------------------------------------

_PLAIN: dict[str, Function] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Atan": torch.atan,
    "Asinh": torch.asinh,
    "Erf": torch.erf,
    "Sign": torch.sign,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "IsNaN": torch.isnan,
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Not": torch.logical_not,
    "Where": torch.where,
    "Identity": lambda x: x,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Abs": torch.abs,
    "Mish": F.mish,
    "HardSwish": F.hardswish,
    "Softsign": lambda x: x / (1 + x.abs()),
    "Sum": lambda *xs: reduce(torch.add, xs),
    "Mean": lambda *xs: reduce(torch.add, xs) / len(xs),
    "Max": lambda *xs: reduce(torch.maximum, xs),
    "Min": lambda *xs: reduce(torch.minimum, xs),
}
for _name, _function in _PLAIN.items():
    plain(_name, _function)


@register("Div")
def _div(node: Node) -> Function:
    return torch.div if floating(node.tensor()) else partial(torch.div, rounding_mode="trunc")


@register("Mod")
def _mod(node: Node) -> Function:
    return torch.fmod if node.get("fmod", 0) else torch.remainder


@register("Pow")
def _pow(node: Node) -> Function:
    if node.known[1] and node.tensor(1).numel() == 1 and len(node.shape(1)) <= len(node.shape()):
        p = node.number(1)
        exponent = int(p) if float(p).is_integer() else p
        return lambda x, _: torch.pow(x, exponent)
    return torch.pow


@register("Cast", "CastLike")
def _cast(node: Node) -> Function:
    kind: torch.dtype = node.tensor(1).dtype if node.op == "CastLike" else node.get("to")
    return lambda x, *_: x.to(kind)


# ---- activations ---------------------------------------------------------------------------------------------------------


@register("Clip")
def _clip(node: Node) -> Function:
    ends = [node.get(name, node.number(i)) for i, name in ((1, "min"), (2, "max"))]
    if ends == [None, None]:
        return lambda x, *_: x
    return lambda x, *_: torch.clamp(x, *ends)


@register("Softplus")
def _softplus(node: Node) -> Function:
    """ONNX has no threshold: where torch has it, float64 does not see it. Idioms (`onnx.idioms`) bring their own."""
    return partial(F.softplus, beta=node.get("beta", 1.0), threshold=node.get("threshold", 50.0))


@register("LeakyRelu")
def _leaky_relu(node: Node) -> Function:
    return partial(F.leaky_relu, negative_slope=node.get("alpha", 0.01))


@register("Elu")
def _elu(node: Node) -> Function:
    return partial(F.elu, alpha=node.get("alpha", 1.0))


@register("Celu")
def _celu(node: Node) -> Function:
    return partial(F.celu, alpha=node.get("alpha", 1.0))


@register("Selu")
def _selu(node: Node) -> Function:
    """`gamma` times an ELU of `alpha`; the numbers that ONNX takes where none are given are of float32."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return lambda x: gamma * F.elu(x, alpha)


@register("HardSigmoid")
def _hard_sigmoid(node: Node) -> Function:
    """`clip(alpha x + beta, 0, 1)`: torch's own of `6 alpha x`, which is that for beta = 1/2, as 6 alpha is no rounding of a float32."""
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if beta == 0.5 and alpha > 0:
        return lambda x: F.hardsigmoid(x * (6 * alpha))
    return lambda x: torch.clamp(alpha * x + beta, 0, 1)


@register("ThresholdedRelu")
def _thresholded_relu(node: Node) -> Function:
    return lambda x: F.threshold(x, node.get("alpha", 1.0), 0.0)


@register("Shrink")
def _shrink(node: Node) -> Function:
    lambd, bias = node.get("lambd", 0.5), node.get("bias", 0.0)
    if bias == lambd:
        return partial(F.softshrink, lambd=lambd)
    if bias == 0:
        return partial(F.hardshrink, lambd=lambd)
    msg = f"lambd={lambd:g}, bias={bias:g}; expected a bias of 0 or lambd"
    raise RefusedError(msg)


@register("Gelu")
def _gelu(node: Node) -> Function:
    return partial(F.gelu, approximate=node.only("approximate", "none", "tanh"))


@register("Swish")
def _swish(node: Node) -> Function:
    alpha = node.get("alpha", 1.0)
    return F.silu if alpha == 1 else lambda x: x * torch.sigmoid(alpha * x)


@register("PRelu")
def _prelu(node: Node) -> Function:
    """One slope, or one for each channel, as torch has it; others entry by entry."""
    shape, slopes = node.shape(), node.shape(1)
    wide = (1,) * (len(shape) - len(slopes)) + slopes
    if node.known[1] and all(n == 1 for j, n in enumerate(wide) if j != 1):
        return lambda x, s: F.prelu(x, s.reshape(-1))
    return lambda x, s: torch.relu(x) - s * torch.relu(-x)


# ---- along an axis -------------------------------------------------------------------------------------------------------


def _along(function: Callable[..., Tensor]) -> Callable[[Node], Function]:
    """Softmax and its logarithm. Before version 13 all axes from `axis` on are one."""

    def build(node: Node) -> Function:
        if node.opset >= 13:
            return partial(function, dim=node.axis(-1))
        axis, shape = node.axis(1), node.shape()
        if axis == len(shape) - 1 or all(n == 1 for n in shape[axis + 1 :]):
            return partial(function, dim=axis)
        return lambda x: function(x.flatten(axis), dim=axis).reshape(shape)

    return build


register("Softmax")(_along(F.softmax))
register("LogSoftmax")(_along(F.log_softmax))


@register("CumSum")
def _cumsum(node: Node) -> Function:
    node.only("exclusive", 0)
    node.only("reverse", 0)
    axis = int(node.number(1))
    return lambda x, _: torch.cumsum(x, axis)


def _reduction(function: Callable[..., Tensor]) -> Callable[[Node], Function]:
    """A function of entries along axes; without axes of all, or of none if `noop_with_empty_axes` says so."""

    def build(node: Node) -> Function:
        axes, keep = node.setting("axes", 1), bool(node.get("keepdims", 1))
        if node.get("noop_with_empty_axes", 0) and not axes:
            if node.op not in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"):
                msg = "noop_with_empty_axes of an operator that changes single entries"
                raise RefusedError(msg)
            return lambda x, *_: x
        dims = sorted(node.axes_of(axes or range(len(node.shape()))))
        return (lambda x, *_: function(x, dim=dims, keepdim=keep)) if dims else lambda x, *_: function(x[None], dim=[0], keepdim=False)

    return build


def _root_of_squares(x: Tensor, *, dim: Any, keepdim: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 2, dim=dim, keepdim=keepdim)


def _mean(x: Tensor, *, dim: list[int], keepdim: bool) -> Tensor:
    """Over the axes of an image, or of a volume, it is a pooling, which is bounded as such."""
    axes = x.ndim - 2
    if 2 <= axes <= 3 and dim == list(range(2, x.ndim)):
        pooled = getattr(F, f"adaptive_avg_pool{axes}d")(x, (1,) * axes)
        return pooled if keepdim else pooled.flatten(1)
    return torch.mean(x, dim=dim, keepdim=keepdim)


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceMean": _mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL1": lambda x, **options: torch.sum(x.abs(), **options),
    "ReduceL2": _root_of_squares,
    "ReduceSumSquare": lambda x, **options: torch.sum(x * x, **options),
    "ReduceLogSum": lambda x, **options: torch.log(torch.sum(x, **options)),
    "ReduceLogSumExp": torch.logsumexp,
}
for _name, _of in _REDUCTIONS.items():
    register(_name)(_reduction(_of))


@register("ReduceProd")
def _product(node: Node) -> Function:
    if not all(node.known):
        msg = "a product of many entries of a value"
        raise RefusedError(msg)
    node.get("noop_with_empty_axes")
    dims = node.axes_of(node.setting("axes", 1) or range(len(node.shape())))
    keep = bool(node.get("keepdims", 1))
    return lambda x, *_: reduce(lambda y, dim: torch.prod(y, dim, keepdim=keep), sorted(dims, reverse=True), x)


@register("LpNormalization")
def _lp_normalization(node: Node) -> Function:
    p, axis = node.only("p", 2, 1), node.axis(-1)
    return lambda x: x / torch.linalg.vector_norm(x, p, dim=axis, keepdim=True)


# ---- constants -----------------------------------------------------------------------------------------------------------


@register("Constant")
def _constant(node: Node) -> Function:
    if (value := node.get("value")) is None:
        kinds = {"value_float": torch.float32, "value_floats": torch.float32, "value_int": torch.int64, "value_ints": torch.int64}
        name = next((name for name in kinds if node.get(name) is not None), None)
        if name is None:
            msg = f"a constant by {', '.join(node.attributes) or 'nothing'}; expected numbers"
            raise RefusedError(msg)
        value = torch.tensor(node.get(name), dtype=kinds[name])
    return lambda: value


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
    numbers = torch.arange(*ends, dtype=node.tensor().dtype) if (ends[1] - ends[0]) * ends[2] > 0 else node.tensor().new_empty(0)
    return lambda *_: numbers


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
        count = node.get("num_outputs", node.outputs)
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


_REDUCED = {"max": "amax", "min": "amin"}


@register("ScatterElements")
def _scatter_elements(node: Node) -> Function:
    axis, reduction = node.axis(0), node.only("reduction", "none", "add", "max", "min")
    at = _indices(node, node.shape()[axis])
    node.extra.append(at)
    if reduction == "none":
        _check_distinct(
            torch.stack(torch.meshgrid(*map(torch.arange, at.shape), indexing="ij")).index_copy(0, torch.tensor(axis), at[None])
        )
        return lambda x, _, y, at: torch.scatter(x, axis, at, y)
    if reduction == "add":
        return lambda x, _, y, at: torch.scatter_add(x, axis, at, y)
    return lambda x, _, y, at: torch.scatter_reduce(x, axis, at, y, _REDUCED[reduction])


@register("ScatterND")
def _scatter_nd(node: Node) -> Function:
    reduction, at = node.only("reduction", "none", "add"), _places(node)
    node.extra.extend(at)
    if reduction == "none":
        _check_distinct(torch.stack(at))
    return lambda x, _, y, *at: torch.index_put(x, at, y, accumulate=reduction == "add")


@register("GatherND")
def _gather_nd(node: Node) -> Function:
    node.only("batch_dims", 0)
    node.extra.extend(_places(node))
    return lambda x, _, *at: x[at]


@register("TopK")
def _top_k(node: Node) -> Function:
    node.single()  # the places depend on the input
    axis, k = node.axis(-1), node.get("k", node.number(1))
    if k is None or not 0 < k <= node.shape()[axis]:
        msg = f"the largest {k} of {node.shape()[axis]}"
        raise RefusedError(msg)
    largest, ordered = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    return lambda x, *_: torch.topk(x, int(k), axis, largest, ordered)[0]


def _places(node: Node) -> list[Tensor]:
    """The places along the first axes, one tensor for each: the last axis of the indices is taken apart."""
    value = node.constant(1)
    if value is None or not value.ndim or not 0 < value.shape[-1] <= len(node.shape()):
        msg = f"indices of shape {None if value is None else tuple(value.shape)} for a value of shape {node.shape()}"
        raise RefusedError(msg)
    return [_within(at.to(torch.int64), n) for at, n in zip(value.unbind(-1), node.shape(), strict=False)]


def _check_distinct(places: Tensor) -> None:
    """RefusedError where two of the places (axes, ...) are one: which entry stays is not said."""
    flat = places.flatten(1)
    if flat.unique(dim=1).shape[1] < flat.shape[1]:
        msg = "two entries are written to one place"
        raise RefusedError(msg)


def _within(at: Tensor, n: int) -> Tensor:
    if bool(((at < -n) | (at >= n)).any()):
        msg = f"numbers beyond an axis of {n}"
        raise RefusedError(msg)
    return torch.where(at < 0, at + n, at)


def _indices(node: Node, n: int) -> Tensor:
    value = node.constant(1)
    return _within(torch.zeros(0, dtype=torch.int64) if value is None else value.to(torch.int64), n)


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
