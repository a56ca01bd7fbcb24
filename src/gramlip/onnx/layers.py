"""Operators with weights or windows: matrices, convolutions, pooling, normalisation, resampling, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.onnx.registry import Function, Node, RefusedError, register, sized

# ---- matrices ------------------------------------------------------------------------------------------------------------


@register("MatMul")
def _matmul(node: Node) -> Function:
    """A product of matrices; `onnx.idioms` brings the bias of a linear layer."""
    return (lambda x, w, b: F.linear(x, w.t(), b)) if node.has(2) else torch.matmul


@register("Gemm")
def _gemm(node: Node) -> Function:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    turned = [bool(node.get(name, 0)) for name in ("transA", "transB")]
    if alpha == beta == 1 and turned == [False, True] and (not node.has(2) or len(node.shape(2)) == 1):
        return F.linear

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        product = (a.t() if turned[0] else a) @ (b.t() if turned[1] else b)
        product = product if alpha == 1 else product * alpha
        return product if c is None else product + (c if beta == 1 else c * beta)

    return run


@register("Einsum")
def _einsum(node: Node) -> Function:
    equation: str = node.get("equation", "")
    return lambda *xs: torch.einsum(equation, *xs)


# ---- codes ---------------------------------------------------------------------------------------------------------------


@register("DequantizeLinear")
def _dequantize(node: Node) -> Function:
    """`(code - zero) scale`, with one scale or one for each place along an axis."""
    if node.get("block_size", 0):
        msg = "block_size: scales of blocks"
        raise RefusedError(msg)
    axis = node.axis(1) if len(node.shape(1)) == 1 and node.tensor(1).numel() > 1 else 0
    shape = [1] * len(node.shape())
    if node.tensor(1).numel() > 1:
        shape[axis] = -1
    wide = node.tensor(1).dtype

    def run(code: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        centred = code.to(wide) if zero is None else code.to(wide) - zero.to(wide).reshape(shape)
        return centred * scale.reshape(shape)

    node.get("axis")
    return run


# ---- windows -------------------------------------------------------------------------------------------------------------


class Windows:
    """Along each spatial axis: the size, the window, its step, and how much is padded before and behind."""

    def __init__(self, node: Node, kernel: Sequence[int]) -> None:
        self.sizes = node.shape()[2:]
        n = len(self.sizes)
        self.kernel = list(kernel)
        self.stride: list[int] = node.get("strides") or [1] * n
        self.dilation: list[int] = node.get("dilations") or [1] * n
        pads: list[int] = node.get("pads") or [0] * 2 * n
        if not n or any(len(x) != n for x in (self.kernel, self.stride, self.dilation)) or len(pads) != 2 * n:
            msg = f"a window {self.kernel} of {n} axes, strides {self.stride}, dilations {self.dilation}, pads {pads}"
            raise RefusedError(msg)
        if min((*self.kernel, *self.stride, *self.dilation)) < 1 or min(pads) < 0:
            msg = f"a window {self.kernel}, strides {self.stride}, dilations {self.dilation}, pads {pads}; expected positive ones"
            raise RefusedError(msg)
        self.auto: str = node.only("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
        self.before, self.behind = pads[:n], pads[n:]
        if self.auto != "NOTSET":
            self.before, self.behind = [0] * n, [0] * n
        self.reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]

    def same(self) -> None:
        """Padding by which the output is the input's size over the step, the larger half behind, or before where `auto_pad` says lower."""
        for j, (n, s, r) in enumerate(zip(self.sizes, self.stride, self.reach, strict=True)):
            if self.auto.startswith("SAME"):
                total = max((-(-n // s) - 1) * s + r - n, 0)
                small, large = total // 2, total - total // 2
                self.before[j], self.behind[j] = (small, large) if self.auto == "SAME_UPPER" else (large, small)

    def outputs(self, ceil: bool) -> list[int]:
        """The sizes of the output; of a window that starts in what is padded behind nothing is taken."""
        sizes: list[int] = []
        for n, s, r, b, e in zip(self.sizes, self.stride, self.reach, self.before, self.behind, strict=True):
            room = n + b + e - r
            count = (-(-room // s) if ceil else room // s) + 1
            sizes.append(count - (ceil and (count - 1) * s >= n + b))
        if min(sizes) < 1:
            msg = f"a window {self.reach} on an input of the size {list(self.sizes)}, which it does not fit in"
            raise RefusedError(msg)
        return sizes

    def padding(self, behind: Sequence[int] | None = None) -> list[int]:
        """The padding at both ends of each axis, in torch's order."""
        pairs = list(zip(self.before, behind or self.behind, strict=True))
        return [side for pair in reversed(pairs) for side in pair]


def _padded(x: Tensor, padding: Sequence[int], value: float = 0.0) -> Tensor:
    return F.pad(x, list(padding), value=value) if any(padding) else x


def _kernel(node: Node) -> list[int]:
    weight = node.shape(1)
    kernel: list[int] = node.get("kernel_shape") or list(weight[2:])
    if list(weight[2:]) != kernel or len(weight) != len(node.shape()):
        msg = f"kernel_shape={kernel} with a weight of the shape {weight} on an input of the shape {node.shape()}"
        raise RefusedError(msg)
    return kernel


def _dimensional(name: str, axes: int) -> Function:
    function = getattr(F, f"{name}{axes}d", None)
    if function is None:
        msg = f"{axes} spatial axes; expected one, two or three"
        raise RefusedError(msg)
    return function


@register("Conv")
def _conv(node: Node) -> Function:
    windows, groups = Windows(node, _kernel(node)), node.get("group", 1)
    windows.same()
    call = _dimensional("conv", len(windows.kernel))
    sized([*node.shape()[:1], node.shape(1)[0], *windows.outputs(ceil=False)])
    even = windows.before == windows.behind
    padding, ahead = windows.before if even else 0, [] if even else windows.padding()
    return lambda x, w, b=None: call(_padded(x, ahead), w, b, windows.stride, padding, windows.dilation, groups)


@register("ConvTranspose")
def _conv_transpose(node: Node) -> Function:
    """A transposed convolution. Torch crops both sides alike; for other `pads` the whole result is computed and then cropped."""
    windows, groups = Windows(node, _kernel(node)), node.get("group", 1)
    call = _dimensional("conv_transpose", len(windows.kernel))
    beyond: list[int] = node.get("output_padding") or [0] * len(windows.kernel)
    full = [(m - 1) * s + r + o for m, s, r, o in zip(windows.sizes, windows.stride, windows.reach, beyond, strict=True)]
    _crop(node, windows, full)
    sizes = [f - b - e for f, b, e in zip(full, windows.before, windows.behind, strict=True)]
    if min((*windows.before, *windows.behind)) < 0 or min(sizes) < 1:
        msg = f"an output of the size {sizes} from a full one of {full}; expected a part of it"
        raise RefusedError(msg)
    sized([*node.shape()[:1], node.shape(1)[1] * groups, *full])
    options: tuple[Any, ...] = (beyond, groups, windows.dilation)
    if windows.before == windows.behind:
        return lambda x, w, b=None: call(x, w, b, windows.stride, windows.before, *options)
    parts = (..., *(slice(b, b + m) for b, m in zip(windows.before, sizes, strict=True)))
    return lambda x, w, b=None: call(x, w, b, windows.stride, 0, *options)[parts]


def _crop(node: Node, windows: Windows, full: Sequence[int]) -> None:
    """What is cut off before and behind, where the node gives the size of its output or asks for that of the input times the step."""
    wanted: list[int] | None = node.get("output_shape")
    if wanted is None and windows.auto.startswith("SAME"):
        wanted = [m * s for m, s in zip(windows.sizes, windows.stride, strict=True)]
    if wanted is not None:
        cut = [f - w for f, w in zip(full, wanted[-len(full) :], strict=True)]
        windows.before = [c // 2 if windows.auto == "SAME_UPPER" else c - c // 2 for c in cut]
        windows.behind = [c - b for c, b in zip(cut, windows.before, strict=True)]


def _pool(node: Node) -> tuple[Windows, int, bool, bool]:
    """The windows of a pooling, the number of axes, `ceil_mode`, and whether torch has just these."""
    node.single()
    windows, ceil = Windows(node, node.get("kernel_shape")), bool(node.get("ceil_mode", 0))
    windows.same()
    even = windows.before == windows.behind and all(2 * b <= k for b, k in zip(windows.before, windows.kernel, strict=True))
    windows.outputs(ceil)
    return windows, len(windows.kernel), ceil, even


def _whole(windows: Windows, ceil: bool) -> list[int]:
    """The padding with which each output's window lies inside."""
    sides = zip(windows.outputs(ceil), windows.stride, windows.reach, windows.sizes, windows.before, strict=True)
    return windows.padding([max((m - 1) * s + r - n - b, 0) for m, s, r, n, b in sides])


@register("MaxPool")
def _max_pool(node: Node) -> Function:
    windows, n, ceil, even = _pool(node)
    call = _dimensional("max_pool", n)
    if even:
        return lambda x: call(x, windows.kernel, windows.stride, windows.before, windows.dilation, ceil_mode=ceil)
    padding = _whole(windows, ceil)
    return lambda x: call(_padded(x, padding, -math.inf), windows.kernel, windows.stride, 0, windows.dilation)


@register("AveragePool")
def _average_pool(node: Node) -> Function:
    windows, n, ceil, even = _pool(node)
    call = _dimensional("avg_pool", n)
    if max(windows.dilation) > 1:
        msg = f"dilations={windows.dilation}; expected none"
        raise RefusedError(msg)
    counted = bool(node.get("count_include_pad", 0))
    if even:
        return lambda x: call(x, windows.kernel, windows.stride, windows.before, ceil_mode=ceil, count_include_pad=counted)
    padding = _whole(windows, ceil)
    ones = torch.ones(1, 1, *windows.sizes, dtype=torch.float64)
    ones = _padded(_padded(ones, windows.padding(), float(counted)), [w - p for w, p in zip(padding, windows.padding(), strict=True)])
    area = math.prod(windows.kernel)
    counts = (call(ones, windows.kernel, windows.stride) * area).round()
    if bool((counts == area).all()):
        return lambda x: call(_padded(x, padding), windows.kernel, windows.stride)
    node.extra.append(counts.to(node.tensor().dtype))
    return lambda x, by: call(_padded(x, padding), windows.kernel, windows.stride) * area / by


@register("GlobalAveragePool")
def _global_average(node: Node) -> Function:
    axes = len(node.shape()) - 2
    return partial(_dimensional("adaptive_avg_pool", axes), output_size=(1,) * axes)


@register("GlobalMaxPool")
def _global_max(node: Node) -> Function:
    dims = list(range(2, len(node.shape())))
    return lambda x: torch.amax(x, dims, keepdim=True)


# ---- normalisation -------------------------------------------------------------------------------------------------------


@register("BatchNormalization")
def _batch_norm(node: Node) -> Function:
    node.single()
    node.only("training_mode", 0)
    node.only("spatial", 1)
    eps = node.get("epsilon", 1e-5)
    return lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, False, 0.0, eps)


@register("InstanceNormalization")
def _instance_norm(node: Node) -> Function:
    eps = node.get("epsilon", 1e-5)
    return lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=eps)


@register("LayerNormalization")
def _layer_norm(node: Node) -> Function:
    node.single()
    axis, eps = node.axis(-1), node.get("epsilon", 1e-5)
    shape = node.shape()[axis:]
    return lambda x, w, b=None: F.layer_norm(x, shape, w.expand(shape), b if b is None else b.expand(shape), eps)


@register("RMSNormalization")
def _rms_norm(node: Node) -> Function:
    axis, eps = node.axis(-1), node.get("epsilon", 1e-5)
    shape = node.shape()[axis:]
    return lambda x, w: F.rms_norm(x, shape, w.expand(shape), eps)


@register("GroupNormalization")
def _group_norm(node: Node) -> Function:
    """Before version 21 weight and bias have an entry for each group."""
    groups, eps, channels = node.get("num_groups"), node.get("epsilon", 1e-5), node.shape()[1]

    def each(w: Tensor) -> Tensor:
        return w[:, None].expand(groups, channels // groups).reshape(channels) if node.opset < 21 else w

    return lambda x, w, b: F.group_norm(x, groups, each(w), each(b), eps)


@register("LRN")
def _local_response_norm(node: Node) -> Function:
    size = node.get("size", 0)
    if size % 2 == 0:
        msg = f"size={size}; expected an odd one"
        raise RefusedError(msg)
    return partial(F.local_response_norm, size=size, alpha=node.get("alpha", 1e-4), beta=node.get("beta", 0.75), k=node.get("bias", 1.0))


@register("Dropout")
def _dropout(node: Node) -> Function:
    node.single()
    if node.number(2, False):
        msg = "training_mode; expected a model in evaluation mode"
        raise RefusedError(msg)
    return lambda x, *_: x


@register("Attention")
def _attention(node: Node) -> Function:
    """Queries, keys and values, heads in an axis of their own or side by side; with a mask or without, of one call alone."""
    node.single()
    for name, expected in (("softcap", 0.0), ("qk_matmul_output_mode", 0)):
        node.only(name, expected)
    counts = [node.get("q_num_heads", 0), *[node.get("kv_num_heads", 0)] * 2]
    if any(node.has(i) for i in range(4, len(node.given))) or any(len(node.shape(i)) != (3 if counts[0] else 4) for i in range(3)):
        msg = f"values of earlier calls, or queries, keys and values of the shapes {[node.shape(i) for i in range(3)]}"
        raise RefusedError(msg)
    causal = bool(node.get("is_causal", 0))
    if causal and node.has(3):
        msg = "is_causal=1 and a mask; expected one of them"
        raise RefusedError(msg)
    queries, keys = (count or node.shape(i)[1] for i, count in enumerate(counts[:2]))
    options = {"is_causal": causal, "scale": node.get("scale"), "enable_gqa": queries != keys}

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(2, (n, -1)).transpose(1, 2) if n else x for x, n in zip((q, k, v), counts, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v, mask, **options)
        return attended.transpose(1, 2).flatten(2) if counts[0] else attended

    return run


# ---- resampling ----------------------------------------------------------------------------------------------------------


@register("Upsample", "Resize")
def _resize(node: Node) -> Function:
    """Resampling as torch has it; nearest neighbours of every kind, by their places."""
    sizes, scales, first = node.shape(), _scales(node), node.opset < 11
    mode = node.only("mode", "nearest", "linear", "cubic")
    for name, expected in (("antialias", 0), ("exclude_outside", 0), ("keep_aspect_ratio_policy", "stretch")):
        node.only(name, expected)
    outputs = sized(scales[1])
    where = "asymmetric" if first else node.get("coordinate_transformation_mode", "half_pixel")
    whole = all(n * s == m for n, m, s in zip(sizes, outputs, scales[0], strict=True))
    if where == "align_corners" and not whole:
        msg = f"align_corners from {tuple(sizes)} by {[float(s) for s in scales[0]]}; expected scales that give whole sizes"
        raise RefusedError(msg)
    if mode == "nearest":
        rounds = "floor" if first else node.get("nearest_mode", "round_prefer_floor")
        return _nearest(node, [_places(n, m, s, where, rounds) for n, m, s in zip(sizes, outputs, scales[0], strict=True)])
    if list(sizes) == outputs and whole:
        return lambda x, *_: x
    corners = where == "align_corners"
    if not corners and not (where == "half_pixel" or (where == "pytorch_half_pixel" and min(outputs[2:]) > 1)):
        msg = f"mode={mode!r} with coordinate_transformation_mode={where!r}; expected half_pixel or align_corners"
        raise RefusedError(msg)
    name = _interpolation(node, mode, outputs)
    if not whole:
        msg = f"mode={mode!r} from {tuple(sizes)} to {tuple(outputs)}; expected scales that give whole sizes"
        raise RefusedError(msg)
    return lambda x, *_: F.interpolate(x, outputs[2:], mode=name, align_corners=corners)


def _interpolation(node: Node, mode: str, outputs: Sequence[int]) -> str:
    """Torch's name of an interpolation along spatial axes alone."""
    sizes = node.shape()
    names = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    name = names.get((mode, len(sizes) - 2))
    if name is None or list(sizes[:2]) != list(outputs[:2]):
        msg = f"mode={mode!r} from {tuple(sizes)} to {tuple(outputs)}; expected spatial axes alone, one to three, or two for cubic"
        raise RefusedError(msg)
    if mode == "cubic" and node.get("cubic_coeff_a", -0.75) != -0.75:
        msg = f"cubic_coeff_a={node.get('cubic_coeff_a')}; expected -0.75"
        raise RefusedError(msg)
    return name


def _scales(node: Node) -> tuple[list[Fraction], list[int]]:
    """The scale of each axis, and the shape of the result: by a scale that of a product in float32, as onnxruntime has it."""
    shape, axes = node.shape(), node.get("axes")
    dims = list(range(len(shape))) if axes is None else node.axes_of(axes)
    by, to = node.setting("scales", 1 if node.opset < 11 else 2), None if node.opset < 11 else node.setting("sizes", 3)
    given = by or to
    if not given or len(given) != len(dims) or min(given) <= 0:
        msg = f"scales={by}, sizes={to} for an input of the shape {shape}; expected one positive number for each axis"
        raise RefusedError(msg)
    scales, outputs = [Fraction(1)] * len(shape), list(shape)
    for axis, number in zip(dims, given, strict=True):
        scales[axis] = Fraction(number) if by else Fraction(int(number), shape[axis])
        outputs[axis] = math.floor(np.float32(shape[axis]) * np.float32(number)) if by else int(number)
    return scales, outputs


_ROUNDS = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda x: math.ceil(x - Fraction(1, 2)),
    "round_prefer_ceil": lambda x: math.floor(x + Fraction(1, 2)),
}


def _places(n: int, m: int, scale: Fraction, where: str, rounds: str) -> list[int]:
    """Which entry of an axis of n each of m outputs is, in rational numbers; refused where rounding in float32 may make it another one."""
    if where not in _WHERE or rounds not in _ROUNDS:
        msg = f"coordinate_transformation_mode={where!r}, nearest_mode={rounds!r}; expected one of {', '.join(_WHERE)}"
        raise RefusedError(msg)
    short, places = np.float32(float(scale)), list[set[int]]()
    for j in range(m):
        exact, rounded = _WHERE[where](Fraction(j), scale, n, m), Fraction(float(_WHERE[where](np.float32(j), short, n, m)))
        room = 0 if exact == rounded else (abs(exact) + 1) / 2**21
        places.append({min(max(int(_ROUNDS[rounds](x)), 0), n - 1) for x in (exact - room, exact, rounded, exact + room)})
    if max(map(len, places)) > 1:
        msg = f"nearest neighbours of {n} entries by {float(scale):g} that are others in float32; expected a scale without such ties"
        raise RefusedError(msg)
    return [place for (place,) in places]


_WHERE: dict[str, Callable[[Any, Any, int, int], Any]] = {
    "half_pixel": lambda j, scale, n, m: (j + _like(j, 1, 2)) / scale - _like(j, 1, 2),
    "pytorch_half_pixel": lambda j, scale, n, m: (j + _like(j, 1, 2)) / scale - _like(j, 1, 2) if m > 1 else _like(j, 0),
    "asymmetric": lambda j, scale, n, m: j / scale,
    "align_corners": lambda j, scale, n, m: j * _like(j, n - 1) / _like(j, m - 1) if m > 1 else _like(j, 0),
}
"""From the number of an output to its place among the entries, in the type of the number."""


def _like(j: Any, numerator: int, denominator: int = 1) -> Any:
    """A fraction in the type of another number."""
    scale = Fraction(numerator, denominator)
    return scale if isinstance(j, Fraction) else type(j)(float(scale))


def _nearest(node: Node, places: list[list[int]]) -> Function:
    sizes, outputs = node.shape(), [len(at) for at in places]
    if all(at == list(range(n)) for at, n in zip(places, sizes, strict=True)):
        return lambda x, *_: x
    repeats = all(m % n == 0 and at == [j * n // m for j in range(m)] for at, n, m in zip(places, sizes, outputs, strict=True))
    if repeats and 3 <= len(sizes) <= 5 and list(sizes[:2]) == outputs[:2]:
        return lambda x, *_: F.interpolate(x, outputs[2:], mode="nearest")
    moved = [axis for axis, n in enumerate(sizes) if places[axis] != list(range(n))]
    node.extra.extend(torch.tensor(places[axis]) for axis in moved)

    def run(x: Tensor, *others: Any) -> Tensor:
        for axis, at in zip(moved, others[-len(moved) :], strict=True):
            x = torch.index_select(x, axis, at)
        return x

    return run


# ---- recurrent layers ----------------------------------------------------------------------------------------------------
#
# Step by step, with the gates in the order that ONNX stores.


class Weights(NamedTuple):
    """The weights of one direction: of the input, of the state, their biases, and those by which gates see the content."""

    w: Tensor
    r: Tensor
    wb: Tensor
    rb: Tensor
    peepholes: Sequence[Tensor | None]


State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Weights], State]
"""(input of one step, state, weights) -> the next state."""


@dataclass(frozen=True)
class Gates:
    """What a cell does to the values of its gates: bounds them by `clip`, if any, and applies the functions of its direction."""

    functions: Sequence[Function]
    clip: float | None = None
    coupled: bool = False
    reset_before: bool = True

    def apply(self, k: int, x: Tensor, weight: Tensor | None = None, content: Tensor | None = None) -> Tensor:
        """The k-th function of `x + weight content`, bounded."""
        x = x if weight is None or content is None else x + weight * content
        return self.functions[k](x if self.clip is None else x.clamp(-self.clip, self.clip))

    def lstm(self, x: Tensor, state: State, by: Weights) -> State:
        """Gates i, o, f and the new content; with `coupled` gates the content forgets what it takes in."""
        h, c = state
        i, o, f, g = (F.linear(x, by.w, by.wb) + F.linear(h, by.r, by.rb)).chunk(4, -1)
        i = self.apply(0, i, by.peepholes[0], c)
        c = (1 - i if self.coupled else self.apply(0, f, by.peepholes[2], c)) * c + i * self.apply(1, g)
        return self.apply(0, o, by.peepholes[1], c) * self.functions[2](c), c

    def gru(self, x: Tensor, state: State, by: Weights) -> State:
        """Gates z and r, and the new content, whose state is reset before or behind its matrix."""
        (h,) = state
        reads, weights, biases = F.linear(x, by.w, by.wb).chunk(3, -1), by.r.chunk(3, 0), by.rb.chunk(3, 0)
        z, reset = (self.apply(0, reads[i] + F.linear(h, weights[i], biases[i])) for i in (0, 1))
        recalled = F.linear(reset * h, weights[2], biases[2]) if self.reset_before else reset * F.linear(h, weights[2], biases[2])
        return ((1 - z) * self.apply(1, reads[2] + recalled) + z * h,)

    def rnn(self, x: Tensor, state: State, by: Weights) -> State:
        """One function of input and state."""
        return (self.apply(0, F.linear(x, by.w, by.wb) + F.linear(state[0], by.r, by.rb)),)


@dataclass(frozen=True)
class Recurrence:
    """A recurrent layer for a number of steps, cells in one or two directions; `turned` where the batch is the first axis.

    With `lengths`, the last tensor says for each step and sample whether the sample is that long: where it is not, the state stays and the
    result is 0, as all results of a sample without steps are.
    """

    steps: range
    hidden: int
    states: int
    cells: Sequence[tuple[Cell, bool]]
    turned: bool
    lengths: bool

    def __call__(self, x: Tensor, w: Tensor, r: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        """All results, and the last state."""
        alive, others = (others[-1], others[:-1]) if self.lengths else (None, others)
        b, _, *first, peepholes = (*others, *(None,) * 5)[:5]
        x = x.transpose(0, 1) if self.turned else x
        ends: list[tuple[Tensor, ...]] = []
        for k, (cell, back) in enumerate(self.cells):
            by = self.weights(k, w, r, b, peepholes)
            ends.append(self.along(x, self.start(x, first[: self.states], k), by, cell, back, alive))
        y, *last = (torch.stack(each, -3) for each in zip(*ends, strict=True))
        return (y.permute(2, 0, 1, 3), *(each.transpose(0, 1) for each in last)) if self.turned else (y, *last)

    def weights(self, k: int, w: Tensor, r: Tensor, b: Tensor | None, peepholes: Tensor | None) -> Weights:
        """Those of the k-th direction."""
        wb, rb = (w.new_zeros(w.shape[1]),) * 2 if b is None else b[k].chunk(2)
        return Weights(w[k], r[k], wb, rb, (None,) * 3 if peepholes is None else peepholes[k].chunk(3))

    def start(self, x: Tensor, first: Sequence[Tensor | None], k: int) -> State:
        """The first state of a direction: zeros unless it is given."""
        given = [s if s is None or not self.turned else s.transpose(0, 1) for s in first]
        return tuple(x.new_zeros(x.shape[1], self.hidden) if s is None else s[k] for s in given)

    def along(self, x: Tensor, state: State, by: Weights, cell: Cell, back: bool, alive: Tensor | None) -> State:
        """The results of all steps in one direction, in the order of the input, and behind them the last state."""
        results, state = list[Tensor](), state if alive is None else tuple(torch.where(alive[0], s, 0.0) for s in state)
        for t in reversed(self.steps) if back else self.steps:
            ahead = cell(x[t], state, by)
            results.append(ahead[0] if alive is None else torch.where(alive[t], ahead[0], 0.0))
            state = ahead if alive is None else tuple(torch.where(alive[t], new, old) for new, old in zip(ahead, state, strict=True))
        return torch.stack(results[::-1] if back else results), *state


_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_SETTINGS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("Sigmoid", "Tanh", "Relu", "Softsign", "Softplus"), ()),
    "LeakyRelu": (0.01,),
    "Elu": (1.0,),
    "HardSigmoid": (0.2, 0.5),
}
"""Functions of cells, with their alpha and beta by default, as far as they have them."""


def _function(name: str, settings: Sequence[float]) -> Function:
    """A function of the name with its alpha and beta, as the operator of that name computes it."""
    if name == "HardSigmoid":
        return lambda x: (x * settings[0] + settings[1]).clamp(0, 1)
    if settings:
        return (lambda x: F.elu(x, settings[0])) if name == "Elu" else (lambda x: F.leaky_relu(x, settings[0]))
    return {"Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Relu": torch.relu, "Softsign": F.softsign, "Softplus": F.softplus}[name]


@register("LSTM", "GRU", "RNN")
def _recurrent(node: Node) -> Function:
    way = node.only("direction", "forward", "reverse", "bidirectional")
    ways = [False, True] if way == "bidirectional" else [way == "reverse"]
    turned, _ = bool(node.get("layout", 0)), node.get("hidden_size")
    cells = list(zip(_cells(node, len(ways)), ways, strict=True))
    steps, lengths = node.shape()[1 if turned else 0], node.constant(4)
    if lengths is not None and bool((lengths < 0).any() | (lengths > steps).any()):
        msg = f"sequences of lengths {lengths.tolist()[:5]}; expected at most {steps}, that of the input"
        raise RefusedError(msg)
    uneven = lengths is not None and bool((lengths != steps).any())
    if lengths is not None and uneven:
        node.extra.append((torch.arange(steps)[:, None] < lengths)[..., None])
    return Recurrence(range(steps), node.shape(2)[-1], 2 if node.op == "LSTM" else 1, cells, turned, uneven)


def _cells(node: Node, ways: int) -> list[Cell]:
    """The cell of each direction."""
    names = [name.decode() if isinstance(name, bytes) else name for name in node.get("activations") or _DEFAULTS[node.op] * ways]
    clip, each = node.get("clip"), len(_DEFAULTS[node.op])
    if len(names) != ways * each or not set(names) <= set(_SETTINGS) or not (clip is None or clip > 0):
        msg = f"activations={names}, clip={clip}; expected {each} for each direction of {', '.join(_SETTINGS)}, and a clip above 0"
        raise RefusedError(msg)
    given = [iter(node.get(f"activation_{name}") or ()) for name in ("alpha", "beta")]
    functions = [_function(name, [next(values, usual) for values, usual in zip(given, _SETTINGS[name], strict=False)]) for name in names]
    coupled, reset_before = bool(node.get("input_forget", 0)), not node.get("linear_before_reset", 0)
    gates = [Gates(functions[k : k + each], clip, coupled, reset_before) for k in range(0, len(names), each)]
    return [{"LSTM": gate.lstm, "GRU": gate.gru, "RNN": gate.rnn}[node.op] for gate in gates]
