"""Calls of the graph in float64: what both sides take the weights, and all that the model computes from them, to be.

docs/network.md#computed-weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from gramlip.network.graph import op_name
from gramlip.numerics.exact_cast import widen

_VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.view_as.default")
_SAME = ("aten.detach.default", "aten.detach_.default")
_MEMORY = ("aten.as_strided", "aten.view.dtype", "aten.set_")  # and what begins so


def widened(value: Any) -> Any:
    """Floating numbers of any type, or a floating type, in float64 (complex128): the numbers themselves, denormal ones too."""
    if isinstance(value, torch.dtype):
        return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value
    if not isinstance(value, Tensor) or value.dtype == widened(value.dtype):
        return value
    return widen(value.detach(), 0)[0]


def reads_memory(node: fx.Node) -> bool:
    """Whether the call reads places or bits of memory, which are others in float64."""
    return op_name(node).startswith(_MEMORY)


def evaluate(node: fx.Node, resolve: Callable[[fx.Node], Any]) -> Any:
    """The call's result in float64, for arguments in float64; without the choices that torch makes for speed or by memory."""
    args: tuple[Any, ...] = tuple(map(widened, map_arg(node.args, resolve)))
    kwargs: dict[str, Any] = {k: widened(v) for k, v in map_arg(node.kwargs, resolve).items()}
    name, held = op_name(node), getattr(node.meta.get("val"), "dtype", None)
    if name == "aten.scaled_dot_product_attention.default":  # the fused kernel has no forward derivative
        q, k, v, *others = args
        mask, dropout, causal = (*others, *(None, 0.0, False)[len(others) :])
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, None, **kwargs)[0]
    if name == "aten.batch_norm.default" and not args[5]:  # in evaluation mode; its forward derivative is slow
        x, weight, bias, mean, var, *_ = args
        shape = [-1 if j == 1 else 1 for j in range(x.ndim)]
        gain = (var + args[7]).rsqrt() if weight is None else weight * (var + args[7]).rsqrt()
        shift = -mean * gain if bias is None else bias - mean * gain
        return x * gain.reshape(shape) + shift.reshape(shape)
    if name == "aten.softplus.default":  # the function that its rule bounds, without the switch at a threshold
        x, *others = args
        beta = float(others[0] if others else kwargs.get("beta", 1.0))
        return torch.logaddexp(torch.zeros_like(x), beta * x) / beta
    if name == "aten.rms_norm.default" and (*args, None, None)[3] is None and kwargs.get("eps") is None:
        wide = torch.float64 if held == torch.float64 else torch.float32  # torch takes eps from the type
        kwargs, args = kwargs | {"eps": torch.finfo(wide).eps}, args[:3]
    if not node.all_input_nodes and isinstance(held, torch.dtype) and held.is_floating_point:  # `linspace`, `full`: of no type in float64
        kwargs |= {"dtype": torch.float64} if any(a.name == "dtype" for a in node.target._schema.arguments) else {}  # type: ignore[union-attr]
    if name in _SAME:  # derivatives go through: the function is that of its values
        return args[0]
    if name in _VIEWS:  # the layout in memory may be another here
        return args[0].reshape(args[1].shape if isinstance(args[1], Tensor) else args[1])
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.to(widened(result.dtype)) if isinstance(result, Tensor) else result
