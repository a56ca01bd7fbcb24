"""Several calls that are one map with a better constant than each of them: asked before the rule of the last. docs/network.md#patterns."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from gramlip.network.rules.registry import Call, Var, pattern
from gramlip.network.rules.statistics import SLACK
from gramlip.network.steps import Linear, Lipschitz, Product, Slope, Step
from gramlip.numerics import rounding as rd
from gramlip.operators.linear_maps import Scale


@pattern("aten.sub")
def _centred(call: Call) -> Var | None:
    """`x - mean(x)`: a projection."""
    x, mean = call["self"], call["other"]
    if not (isinstance(x, Var) and isinstance(mean, Var)) or call.args.get("alpha", 1) != 1:
        return None
    if not _reduces(call, mean, "mean", x) or x.shape != call.shape:
        return None
    return call.then(Lipschitz(1.0, "a value less its mean: a projection", reach=_apart), x)


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low - high) * (1 + SLACK) - rd.TINY, (high - low) * (1 + SLACK) + rd.TINY


def _reduces(call: Call, y: Var, name: str, x: Var) -> bool:
    """Whether y is the sum or mean of groups of entries of x and, broadcast, lies along them: the axes are kept, or all are reduced."""
    step = call.steps[y.step]
    return step.op.split(".")[1:2] == [name] and step.sources == (x.step,) and (len(y.shape) == len(x.shape) or y.shape == ())


@pattern("aten.mul", "aten.div", "aten.true_divide")
def _normalised(call: Call) -> Var | None:
    """`x / sqrt(w |x|^2 + eps)` with the l2 norm of groups of entries: what RMS norm is written as."""
    divides = "mul" not in call.op
    pairs = [(call["self"], call["other"]), (call["other"], call["self"])][: 1 if divides else 2]
    for x, scale in pairs:
        if not (isinstance(x, Var) and isinstance(scale, Var)) or x.shape != call.shape or call.args.get("rounding_mode") is not None:
            continue
        if not call.steps[scale.step].op.startswith("aten.sqrt" if divides else "aten.rsqrt"):
            continue
        inner, eps = _shifted(call, call.steps[scale.step].sources[0])
        summed = None if inner is None else Var(inner, call.steps[inner].shape)
        squares = None if summed is None else call.steps[summed.step].sources[:1]
        if summed is None or not squares or not _is_square(call.steps[squares[0]], x):
            continue
        square = Var(squares[0], x.shape)
        means = _reduces(call, summed, "mean", square)
        if not means and not _reduces(call, summed, "sum", square):
            continue
        most = rd.sqrt_up(float(math.prod(x.shape) // math.prod(summed.shape))) if means else 1.0
        row = most if summed.shape == () or summed.shape[-1] == 1 else math.inf
        because = f"a value over the root of its square and eps: at most 1/sqrt(eps) = {1 / math.sqrt(eps):.6g}"
        return call.then(Lipschitz(rd.up(1.0 / rd.sqrt_down(eps)), because, (-most, most), row=row), x)
    return None


def _is_square(step: Step, x: Var) -> bool:
    what = step.what
    return (
        isinstance(what, Product) and (what.kind, what.scale, step.sources) == ("entries", 1.0, (x.step, x.step)) and step.shape == x.shape
    )


def _shifted(call: Call, at: int) -> tuple[int | None, float]:
    """The step that a positive number is added to, and the number; None where the step does anything else."""
    what, shape = call.steps[at].what, call.steps[at].shape
    if isinstance(what, Linear) and isinstance(what.op, Scale) and what.op.weight.numel() == 1 and float(what.op.weight) == 1.0:
        bias = torch.as_tensor(what.bias, dtype=torch.float64)
        source = call.steps[at].sources[0]
        known = bias.numel() == 1 and what.slip == what.error == 0.0 and 1e-200 < float(bias) < math.inf
        if known and call.steps[source].shape == shape:
            return source, float(bias)
    return None, 0.0


@pattern("aten.div", "aten.true_divide")
def _softsign(call: Call) -> Var | None:
    """`x / (c + |x|)`, c > 0: slopes `c / (c + |x|)^2`."""
    x, below = call["self"], call["other"]
    curve = call.known.curves.get(below.step) if isinstance(x, Var) and isinstance(below, Var) else None
    if curve is None or curve.base != x or call.args.get("rounding_mode") is not None:
        return None
    curves = curve.curves()
    height = curves[0](Fraction(0))
    if len(curves) > 1 or height < Fraction(1, 10**100) or (curves[0].lines, curves[0].knots) != (((-1, height), (1, height)), (0,)):
        return None
    curve.rely(call)
    return call.then(Slope(0.0, float(1 / height) * (1 + SLACK), "x / (c + |x|): slopes in [0, 1/c]", (-1.0, 1.0)), x)


@pattern("aten.sqrt")
def _smooth_modulus(call: Call) -> Var | None:
    """`sqrt(x^2 + c)`, c > 0: slopes `x / sqrt(x^2 + c)`."""
    inner, shift = _shifted(call, call.var("self").step)
    if inner is None:
        return None
    x = Var(call.steps[inner].sources[0], call.shape)
    if not _is_square(call.steps[inner], x) or call.steps[x.step].shape != call.shape:
        return None
    least = rd.sqrt_down(shift)
    return call.then(Slope(-1.0, 1.0, "sqrt(x^2 + c): slopes in (-1, 1)", (least, math.inf), (least, rd.sqrt_up(shift)), sharp=True), x)
