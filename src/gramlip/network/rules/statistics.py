"""Sums, means, norms and deviations of entries. docs/network.md#selections."""

from __future__ import annotations

import math

from gramlip.errors import UnsupportedError
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.steps import Lipschitz, Product
from gramlip.numerics import rounding as rd

SLACK = 2.0**-40  # relative, of a few roundings


@register("aten.sum", "aten.mean")
def _mean(call: Call) -> Lipschitz:
    x = call.var("self")
    count = math.prod(x.shape) // max(1, math.prod(call.shape))
    root = rd.sqrt_up(float(count))
    if ".sum" in call.op:
        return Lipschitz(root, f"sum over {count} entries: the root of their number", same_range=True, times=float(count))
    return _average(count)


def _average(count: int) -> Lipschitz:
    upper = rd.up(1.0 / rd.sqrt_down(float(count))) if count > 1 else 1.0
    return Lipschitz(upper, f"mean over {count} entries: one over the root of their number", same_range=True)


@register("aten.cumsum")
def _cumsum(call: Call) -> Lipschitz:
    x, axis = call.var("self"), int(call.const("dim"))
    n = x.shape[axis] if x.shape else 1
    upper = 0.5 / math.sin(math.pi / (4 * n + 2)) * (1 + 2.0**-48)
    return Lipschitz(upper, f"running sum over {n} entries: docs/network.md#selections")


@register("aten.linalg_vector_norm", "aten.norm")
def _norm(call: Call) -> Lipschitz:
    if call.args.get("ord", call.args.get("p")) not in (2, 2.0, None):
        msg = f"{call.op} of another order than 2, which no rule covers"
        raise UnsupportedError(msg)
    x = call.var("self")
    root = math.sqrt(math.prod(x.shape) // max(1, math.prod(call.shape)))

    def reach(low: float, high: float) -> tuple[float, float]:
        least, most = max(low, -high, 0.0), max(-low, high)
        return least * root * (1 - SLACK), most * root * (1 + SLACK) + rd.TINY

    return Lipschitz(1.0, "the l2 norm is 1-Lipschitz", reach=reach)


@register("aten.std", "aten.std_mean", "aten.var", "aten.var_mean")
def _spread(call: Call) -> Var | tuple[Var, Var]:
    """The norm of what is left without the mean, over a root; its square; each with the mean where both are asked for."""
    x, name = call.var("self"), call.op.split(".")[1]
    count = math.prod(x.shape) // max(1, math.prod(call.shape))
    correction = call.args.get("correction", 1.0)
    rest = count - float(call.args.get("unbiased", True) if correction is None or "unbiased" in call.args else correction)
    if rest <= 0:
        msg = f"{call.op} of {count} entries with the divisor {rest:g}, which is not positive"
        raise UnsupportedError(msg)
    upper = rd.up(1.0 / rd.sqrt_down(rest)) if count > 1 else 0.0

    def reach(low: float, high: float) -> tuple[float, float]:
        return 0.0, (high - low) / 2 * math.sqrt(count / rest) * (1 + SLACK) + rd.TINY

    value = call.then(Lipschitz(upper, f"standard deviation of {count} entries: docs/network.md#selections", reach=reach), x)
    if "var" in name:
        value = call.then(Product("entries"), value, value)
    if "mean" not in name:
        return value
    return value, call.then(_average(count), x)
