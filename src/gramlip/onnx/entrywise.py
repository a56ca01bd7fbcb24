"""Operators of single entries: arithmetic, comparisons, activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.onnx.registry import Function, Node, RefusedError, floating, plain, register

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
