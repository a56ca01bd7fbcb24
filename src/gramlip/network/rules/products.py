"""Matrix products of two values that depend on the input, and dot-product attention. docs/network.md#attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.steps import Attention, Linear, Lipschitz, Product, Step, View
from gramlip.numerics import rounding as rd
from gramlip.operators.linear_maps import Scale


def product(call: Call, left: Var, right: Var) -> Var:
    """The matrix product of two values; attention where the left one is a softmax of another such product.

    Batch axes that are broadcast repeat the factor.
    """
    pair = [_spread(call, v, (*call.shape[:-2], *v.shape[-2:])) for v in (left, right)]
    scores = _scores(call, left)
    if scores is not None and pair[0] is left and pair[1] is right:
        queries, keys = (Var(at, call.steps[at].shape) for at in scores[:2])
        return call.then(Attention(scores[2], transposed=True), queries, keys, right)
    return call.then(Product("matrix"), *pair)


def _spread(call: Call, x: Var, shape: tuple[int, ...]) -> Var:
    if x.shape == shape:
        return x
    repeats = math.prod(shape) // math.prod(x.shape)
    return call.then(Lipschitz(rd.sqrt_up(float(repeats)), f"each matrix repeated {repeats} times", same_range=True), x, shape=shape)


def _unviewed(call: Call, step: Step) -> Step:
    """The step before views that only split or join the axes in front of the last two."""
    while isinstance(step.what, View) and step.what.flat and step.shape[-2:] == call.steps[step.sources[0]].shape[-2:]:
        step = call.steps[step.sources[0]]
    return step


def _scores(call: Call, weights: Var) -> tuple[int, int, float] | None:
    """Queries, keys (transposed) and scale where the value is `softmax(scale Q K' + constants)` over its last axis."""
    step = _unviewed(call, call.steps[weights.step])
    if "softmax" not in step.op or "log" in step.op or not isinstance(step.what, Lipschitz) or step.what.row != 1.0:
        return None
    inner, scale = _unviewed(call, call.steps[step.sources[0]]), 1.0
    while isinstance(inner.what, Linear) and isinstance(inner.what.op, Scale):
        scale = rd.mul_up(scale, rd.add_up(float(inner.what.op.weight.abs().max()), inner.what.error))
        inner = _unviewed(call, call.steps[inner.sources[0]])
    if not isinstance(inner.what, Product) or inner.what.kind != "matrix" or inner.shape[-2:] != weights.shape[-2:]:
        return None
    return inner.sources[0], inner.sources[1], rd.mul_up(scale, inner.what.scale)


@register("aten.scaled_dot_product_attention")
def _attention(call: Call) -> Var:
    q, k, v = (call.var(n) for n in ("query", "key", "value"))
    if float(call.const("dropout_p")) > 0 or call.args.get("enable_gqa"):
        msg = "attention with dropout or grouped queries, which no rule covers"
        raise UnsupportedError(msg)
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        msg = f"attention of shapes {q.shape}, {k.shape} and {v.shape}; expected equal axes before the last two"
        raise UnsupportedError(msg)
    mask = call.const("attn_mask")
    empty = isinstance(mask, Tensor) and bool(((~mask if mask.dtype == torch.bool else mask == -math.inf).all(-1)).any())
    scale = call.const("scale")
    factor = rd.up(1 / rd.sqrt_down(q.shape[-1])) if scale is None else abs(float(scale))
    return call.then(Attention(factor, empty=empty), q, k, v)
