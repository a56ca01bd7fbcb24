"""Entrywise functions with the exact range of their slopes, everywhere or on an interval, outward rounded. docs/network.md#activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.rules.entrywise import SLACK, SLOPES, WITHIN, exponential, kinked, on_interval
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.steps import Linear, Lipschitz, OnInterval, Product, Slice, Slope, Step, Unbounded, Within
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.linear_maps import Scale

# ---- slopes on an interval: docs/network.md#ranges -----------------------------------------------------------------------

ROOM = 1.0 + 2.0**-41  # the C library's functions are off by a few units in the last place, a power by up to 710 for that of its exponent
Reach = Callable[[float, float], Slope | None]


def _outward(low: float, high: float) -> tuple[float, float]:
    """The interval widened by `ROOM` at both ends, and by what underflows."""
    return -_up(-low), _up(high)


def _up(x: float) -> float:
    return rd.up(x * ROOM) if x >= 0.0 else -rd.down(-x / ROOM)


def _on(name: str, a: float, b: float, ends: tuple[float, float], slopes: tuple[float, float]) -> Slope:
    """The step for a function with these slopes on [a, b]; its values lie between `ends`."""
    low, high = _outward(*slopes)
    because = f"{name} of values in [{a:.6g}, {b:.6g}]: slopes in [{low:.6g}, {high:.6g}]"
    return Slope(low, high, because, _outward(*ends), (-INF, INF))


def _rising(
    name: str, value: Callable[[float], float], slopes: Callable[[float, float], tuple[float, float]], holds: Callable[[float, float], bool]
) -> Reach:
    """A function that rises, with these slopes on [a, b], where that holds."""
    return lambda a, b: _on(name, a, b, (value(a), value(b)), slopes(a, b)) if holds(a, b) else None


def _rsqrt(a: float, b: float) -> Slope | None:
    return _on("rsqrt", a, b, (0.0, 1.0 / math.sqrt(a)), (-0.5 / a / math.sqrt(a), 0.0)) if a > 1e-100 else None


def _reciprocal(a: float, b: float) -> Slope | None:
    near = min(abs(a), abs(b))
    if a <= 0.0 <= b or near < 1e-100:
        return None
    return _on("one over", a, b, (min(1 / a, 1 / b, 0.0), max(1 / a, 1 / b, 0.0)), (-1.0 / near / near, 0.0))


def _cosh(a: float, b: float) -> Slope | None:
    most = max(abs(a), abs(b))
    return _on("cosh", a, b, (1.0, math.cosh(most)), (math.sinh(min(a, 0.0)), math.sinh(max(b, 0.0)))) if most < 700 else None


def _power(exponent: float, a: float, b: float) -> Slope | None:
    """`x^p`: its slope p x^(p-1) is largest in modulus at an end of an interval on one side of zero, or of the whole for p >= 1."""
    most, whole = max(abs(a), abs(b)), exponent.is_integer()
    try:
        if exponent >= 1.0 and (whole or a >= 0.0) and most < INF:
            steep = exponent * most ** (exponent - 1.0)
            return _on(
                f"power {exponent:g}", a, b, (-(most**exponent) if a < 0 else 0.0, most**exponent), (-steep if a < 0 else 0.0, steep)
            )
        if exponent < 1.0 and (a > 0.0 or (whole and b < 0.0)):
            near, far = sorted((abs(a), abs(b)))
            steep = abs(exponent) * near ** (exponent - 1.0)
            ends = sorted((near**exponent, far**exponent if far < INF or exponent < 0 else INF))
            odd = b < 0.0 and exponent % 2 == 1
            falls = exponent < 0 and (a > 0.0 or odd)
            image = (-ends[1], -ends[0]) if odd else (ends[0], ends[1])
            return _on(f"power {exponent:g}", a, b, image, (-steep, 0.0) if falls else (0.0, steep))
    except OverflowError:
        pass  # too steep for a float
    return None


STEEP: dict[str, Reach | None] = {
    "exp": _rising("exp", math.exp, lambda a, b: (math.exp(a), math.exp(b)), lambda _, b: b < 700),
    "exp2": _rising("exp2", lambda x: 2.0**x, lambda a, b: (math.log(2.0) * 2.0**a, math.log(2.0) * 2.0**b), lambda _, b: b < 1000),
    "expm1": _rising("expm1", math.expm1, lambda a, b: (math.exp(a), math.exp(b)), lambda _, b: b < 700),
    "sqrt": _rising("sqrt", math.sqrt, lambda a, _: (0.0, 0.5 / math.sqrt(a)), lambda a, _: a > 1e-200),
    "rsqrt": _rsqrt,
    "log": _rising("log", math.log, lambda a, _: (0.0, 1.0 / a), lambda a, _: a > 1e-200),
    "log1p": _rising("log1p", math.log1p, lambda a, _: (0.0, 1.0 / (1.0 + a)), lambda a, _: a > -1.0),
    "reciprocal": _reciprocal,
    "sinh": _rising("sinh", math.sinh, lambda a, b: (1.0, math.cosh(max(-a, b))), lambda a, b: max(-a, b) < 700),
    "cosh": _cosh,
    "tan": None,
}


def _steep(name: str, call: Call) -> Unbounded:
    call.var("self")
    return Unbounded(f"{name} has unbounded slopes on what is known of its input's range", STEEP[name])


for _steep_name in STEEP:
    register(f"aten.{_steep_name}")(partial(_steep, _steep_name))


@register("aten.pow")
def _pow(call: Call) -> Unbounded | Var:
    exponent = call["exponent"]
    if not isinstance(exponent, int | float) or not isinstance(call["self"], Var):
        return Unbounded("a power with an exponent that is no number has unbounded slopes")
    x = call.var("self")
    if exponent in (1, 2):
        return x if exponent == 1 else call.then(Product("entries"), x, x)
    reason = f"the power {exponent:g} has unbounded slopes on what is known of its input's range"
    return Unbounded(reason, partial(_power, float(exponent)))


@register("aten.square")
def _square(call: Call) -> Var:
    return call.then(Product("entries"), call.var("self"), call.var("self"))


def quotient(call: Call, numerator: Var | None, denominator: Var) -> Var:
    """One over a value, times another that depends on the input where there is one."""
    reason = "division by a value that depends on the input and may be zero on what is known of its range"
    inverse = call.then(Unbounded(reason, _reciprocal), denominator, shape=denominator.shape)
    return inverse if numerator is None else call.then(Product("entries"), numerator, inverse)


# ---- slopes everywhere, outward rounded: docs/network.md#activations -----------------------------------------------------

INF = math.inf
JUMP = 1e-6  # the largest jump of a softplus that is taken for the smooth function
_NOTES = {"softplus": " (of the smooth function, without the switch at its threshold)"}


def slope(name: str) -> Slope:
    """The step of a named entrywise function."""
    low, high, image, at_zero = SLOPES[name]
    because = f"{name}: slopes in [{low:.7g}, {high:.7g}]{_NOTES.get(name, '')}"
    return Slope(low, high, because, image, at_zero, sharp=True, within=WITHIN.get(name))


for _name in SLOPES:
    if _name not in ("gelu", "gelu tanh", "softplus", "softshrink"):
        register(f"aten.{_name}")(lambda call, name=_name: slope(name))


@register("aten.softplus")
def _softplus(call: Call) -> Slope:
    """The smooth function; refused where torch's switch to the identity, at `beta x = threshold`, jumps by more than `JUMP`."""
    beta, threshold = float(call.const("beta")), float(call.const("threshold"))
    jump = float(np.logaddexp(0.0, -threshold)) / beta if beta > 0 else INF
    if not jump <= JUMP:
        msg = (
            f"softplus with beta={beta:g}, threshold={threshold:g}, which jumps by {jump:.3g} where it switches to the identity; "
            f"expected a positive beta and at most {JUMP:g}: pass a larger threshold"
        )
        raise UnsupportedError(msg)

    def value(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(beta * x))) / beta

    known = slope("softplus")
    on = on_interval(
        lambda x: F.softplus(beta * x, threshold=1e3) / beta,
        lambda x: torch.sigmoid(beta * x),
        slack=SLACK * max(1.0, 1.0 / beta),
        within=((0.0, 1.0), (0.0, INF)),
    )
    return replace(known, reach=lambda a, b: (rd.down(value(a) / ROOM), rd.up(value(b) * ROOM)), within=on)


@register("aten.softshrink")
def _softshrink(call: Call) -> Slope | Unbounded:
    lambd = float(call.const("lambd"))
    if lambd < 0:
        return Unbounded("softshrink with a negative lambd jumps")
    return replace(slope("softshrink"), within=kinked(partial(F.softshrink, lambd=lambd), [-lambd, lambd], [1.0, 0.0, 1.0]))


@register("aten.gelu")
def _gelu(call: Call) -> Slope:
    return slope("gelu" if call.const("approximate") == "none" else "gelu tanh")


@register("aten.leaky_relu")
def _leaky(call: Call) -> Slope:
    s = float(call.const("negative_slope"))
    on = kinked(partial(F.leaky_relu, negative_slope=s), [0.0], [s, 1.0])
    return Slope(min(s, 1.0), max(s, 1.0), f"leaky relu: slopes {s:.6g} and 1", sharp=True, within=on)


@register("aten.rrelu")
def _rrelu(call: Call) -> Slope:
    if call.const("training"):
        msg = "rrelu in training mode is random; expected evaluation: type model.eval()"
        raise UnsupportedError(msg)
    s = (float(call.const("lower")) + float(call.const("upper"))) / 2
    return Slope(min(s - 1e-15 * abs(s), 1.0), max(s + 1e-15 * abs(s), 1.0), f"rrelu in evaluation: slopes {s:.6g} and 1", sharp=True)


@register("aten.prelu")
def _prelu(call: Call) -> Slope:
    weight: Tensor = to_float64(call.const("weight"))
    ones = [1] * len(call.shape)
    if weight.numel() > 1:
        ones[1] = weight.numel()
    w = weight.reshape(ones)
    because = f"prelu: slopes 1 and its weight, in [{float(w.min()):.6g}, {float(w.max()):.6g}]"
    on = kinked(lambda x: torch.where(x > 0, x, w * x), [0.0], [w, 1.0])
    return Slope(w.clamp(max=1.0), w.clamp(min=1.0), because, sharp=True, within=on)


@register("aten.elu")
def _elu(call: Call) -> Slope | Unbounded:
    alpha, scale, inner = (float(call.const(k)) for k in ("alpha", "scale", "input_scale"))
    if min(alpha, scale, inner) < 0:
        return Unbounded("elu with a negative constant grows exponentially")
    top = max(scale, rd.mul_up(rd.mul_up(scale, alpha), inner))
    image = (-rd.mul_up(scale, alpha), INF)
    return Slope(0.0, top, f"elu: slopes in [0, {top:.7g}]", image, sharp=True, within=exponential(alpha, scale, inner))


@register("aten.celu")
def _celu(call: Call) -> Slope | Unbounded:
    alpha = float(call.const("alpha"))
    if alpha <= 0:
        return Unbounded("celu with a negative alpha grows exponentially")
    return Slope(0.0, 1.0, "celu: slopes in [0, 1]", (-alpha, INF), sharp=True, within=exponential(alpha, 1.0, 1.0 / alpha))


@register("aten.hardtanh")
def _hardtanh(call: Call) -> Slope:
    return _clip(float(call.const("min_val")), float(call.const("max_val")))


@register("aten.clamp", "aten.clip", "aten.clamp_min", "aten.clamp_max")
def _clamp(call: Call) -> Slope:
    limits = call.args.get("min"), call.args.get("max")
    if any(isinstance(x, Var) for x in limits) or call.shape != call.var("self").shape:
        msg = "clamp with limits that depend on the input or have more entries than it, which no rule covers"
        raise UnsupportedError(msg)
    given = [default if x is None else x for x, default in zip(limits, (-INF, INF), strict=True)]
    low, high = (to_float64(x) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in given)
    if low.numel() == high.numel() == 1:
        ends = float(low), float(high)
        return replace(_clip(*ends), reach=lambda a, b: (min(max(a, ends[0]), ends[1]), min(max(b, ends[0]), ends[1])))
    between = [(float(x.min()), float(x.max())) for x in (low, high)]

    def reach(a: float, b: float) -> tuple[float, float]:  # a clamp rises with its argument and with both limits
        return min(max(a, between[0][0]), between[1][0]), min(max(b, between[0][1]), between[1][1])

    top = float(bool((low < high).any()))  # entries whose limits meet are constant
    image = (float(torch.minimum(low, high).min()), float(high.max()))
    return Slope(0.0, top, f"clamp: slopes 0 and {top:.0f}", image, (-INF, INF), reach, sharp=True)


def _clip(low: float, high: float) -> Slope:
    if low >= high:
        return Slope(0.0, 0.0, "clamp to one value", (high, high), (high, high), sharp=True)
    zero = min(max(0.0, low), high)
    on = kinked(lambda x: x.clamp(low, high), [low, high], [0.0, 1.0, 0.0])
    return Slope(0.0, 1.0, f"clamp to [{low:.6g}, {high:.6g}]: slopes 0 and 1", (low, high), (zero, zero), sharp=True, within=on)


@register("aten.threshold")
def _threshold(call: Call) -> Slope | Unbounded:
    level, value = float(call.const("threshold")), float(call.const("value"))
    if level != value:
        return Unbounded(f"threshold jumps at {level:.6g} to {value:.6g}")
    return _clip(level, INF)


@register("aten.hardshrink", "aten.sign", "aten.round", "aten.floor", "aten.ceil", "aten.trunc", "aten.heaviside", "aten.frac", "aten.fmod")
@register("aten.remainder", "aten.floor_divide")
def _jump(call: Call) -> Unbounded:
    return Unbounded(f"{call.op.split('.')[1]} jumps")


def gated(call: Call, x: Var, gate: Var) -> Slope | None:
    """The step for `x sigmoid(b x)`, `x (1 + erf(b x))`, `x relu6(x + 3)` and `x hardsigmoid(b x)`, which are activations; else None."""
    if x.shape != gate.shape:
        return None
    outer = _constants_before(call, gate.step)
    top = next(reversed(outer))  # the first function before the gate: the gate is `scale f + lift`
    (scale, lift, unsure), step = outer[top], call.steps[top]
    if not isinstance(step.what, Slope) or len(step.sources) != 1:
        return None
    inner, constants = _constants_before(call, step.sources[0]), _constants_before(call, x.step)
    at = next((k for k in inner if k in constants), None)
    if at is None or constants[at][1] != 0 or constants[at][0] <= 0:
        return None
    factor, shift, error = inner[at][0] / constants[at][0], inner[at][1], inner[at][2] + constants[at][2]  # of f's argument, from x
    if unsure > 0 or error > 1e-6 or not all(1e-100 < constant < 1e100 for constant in (factor, abs(scale))):
        return None
    if step.op.startswith("aten.erf") and shift == 0 and scale == lift > 0:
        return _gate("gelu", 2 * scale, factor, f"x (1 + erf(b x)) times {float(scale):.6g}", error, math.sqrt(2.0))
    if (scale, lift) != (1, 0):
        return None
    if step.op.startswith("aten.sigmoid") and shift == 0:
        return _gate("silu", scale, factor, "x sigmoid(b x)", error)
    if step.op.startswith("aten.hardsigmoid") and shift == 0:
        return _gate("hardswish", scale, factor, "x hardsigmoid(b x)", error)
    if error == 0 and (factor, shift) == (1, 3) and _is_relu6(step):
        return Slope(-3.0, 9.0, "x relu6(x + 3): six times hardswish, slopes in [-3, 9]", (-2.25, INF), sharp=True)
    return None


def _constants_before(call: Call, step: int) -> dict[int, tuple[Fraction, Fraction, float]]:
    """Steps of which this one is `factor v + shift`, itself first, by one constant for all entries; and the relative error of these."""
    known = {step: (Fraction(1), Fraction(0), 0.0)}
    while True:
        what = call.steps[step].what
        if (
            not isinstance(what, Linear)
            or not isinstance(what.op, Scale)
            or what.op.weight.numel() > 1
            or torch.as_tensor(what.bias).numel() > 1
            or what.bias_error > 0
            or not math.isfinite(float(what.bias) + float(what.op.weight))
            or float(what.op.weight) == 0
        ):
            return known
        factor, shift, error = known[step]
        step = call.steps[step].sources[0]
        by = float(what.op.weight)
        more = 2.0 * what.error / abs(by)
        known[step] = (factor * Fraction(by), shift + factor * Fraction(float(what.bias)), error + more)


def _gate(name: str, scale: Fraction, factor: Fraction, written: str, error: float, root: float = 1.0) -> Slope:
    """`scale / b` times a named function of `b x`, with b = `root factor` known up to a relative error: docs/network.md#activations."""
    activation = slope(name)
    b, grow, room = root * float(factor), float(scale), error + 2.0**-48
    if (b, grow, error) == (1.0, 1.0, 0.0):
        return replace(activation, because=f"{written}: {activation.because}")
    low, high = (outward(outward(float(s) * grow)) for s, outward in ((activation.low, rd.down), (activation.high, rd.up)))
    image = (-rd.up(-activation.image[0] * grow / b * (1 + 4 * room)), INF)
    assert activation.within is not None
    on = _rescaled(activation.within, b, grow, room)
    return replace(activation, low=low, high=high, because=f"{written}: {activation.because}", image=image, within=on)


def _rescaled(within: Within, b: float, scale: float, room: float) -> Within:
    """`scale / b` times a function of `b x` on intervals, of a b with a relative error of less than `room`."""

    def wide(x: Tensor, side: float, by: float) -> Tensor:
        return (x * by + side * (4 * room * by * x.abs() + rd.TINY)).nan_to_num(side * INF, INF, -INF)

    def on(a: Tensor, c: Tensor) -> OnInterval:
        inner = within(wide(a, -1.0, b), wide(c, 1.0, b))
        ends = (wide(x, side, by) for x, side, by in zip(inner, (-1.0, 1.0) * 2, (scale, scale, scale / b, scale / b), strict=True))
        return OnInterval(*ends)

    return on


def _is_relu6(step: Step) -> bool:
    """Whether it clips to [0, 6]; a clamp between tensors has an image too, which holds those of all its entries."""
    clips = step.op.split(".")[1] in ("relu6", "hardtanh", "clamp", "clip")
    return clips and isinstance(step.what, Slope) and (step.what.image, step.what.at_zero) == ((0.0, 6.0), (0.0, 0.0))


@register("aten.softmax", "aten._softmax", "aten.special_softmax")
def _softmax(call: Call) -> Lipschitz:
    if len(call.shape) == 0 or call.shape[int(call.const("dim"))] == 1:
        return Lipschitz(0.0, "softmax of one entry is constant", (1.0, 1.0))
    axis = int(call["dim"]) % len(call.shape)
    row = 1.0 if axis == len(call.shape) - 1 else INF
    return Lipschitz(0.5, "softmax: at most 1/2 in the l2 norm", (0.0, 1.0), row=row, within=partial(probabilities, axis))


def probabilities(axis: int, a: Tensor, b: Tensor) -> tuple[float, Tensor, Tensor]:
    """Constant and values of the softmax on intervals of its arguments: docs/local.md#slopes."""
    top = b.amax(axis, keepdim=True)
    small, large = torch.exp(a - top), torch.exp(b - top)
    room = a.shape[axis] * 2.0**-50
    others = [e.sum(axis, keepdim=True) for e in (small, large)]
    above = large / (large + (others[0] * (1 - room) - small).clamp_min(0.0))
    below = small / (small + (others[1] * (1 + room) - large).clamp_min(0.0))
    low, high = (below.nan_to_num(0.0) - SLACK).clamp(0.0, 1.0), (above.nan_to_num(1.0) + SLACK).clamp(0.0, 1.0)
    spread = 2 * torch.maximum(low * (1 - low), high * (1 - high))
    steepest = torch.where((low <= 0.5) & (high >= 0.5), 0.5, spread).max()
    return min(0.5, float(steepest) + SLACK), low, high


@register("aten.log_softmax", "aten._log_softmax", "aten.special_log_softmax")
def _log_softmax(call: Call) -> Lipschitz:
    n = call.shape[int(call.const("dim"))] if call.shape else 1
    upper = 0.0 if n == 1 else rd.sqrt_up(float(n))
    return Lipschitz(upper, f"log-softmax over {n} entries: at most the root of {n}", (-INF, 0.0))


@register("aten.logsumexp")
def _logsumexp(call: Call) -> Lipschitz:
    count = math.prod(call.var("self").shape) // max(1, math.prod(call.shape))
    more = math.log(count)

    def reach(low: float, high: float) -> tuple[float, float]:  # between log(n exp(low)) and log(n exp(high))
        rounding = [(abs(x) + more) * (ROOM - 1) if abs(x) < INF else 0.0 for x in (low, high)]
        return low + more - rounding[0], high + more + rounding[1]

    return Lipschitz(1.0, "logsumexp: its gradient is a probability vector", reach=reach)


@register("aten.glu")
def _glu(call: Call) -> Var:
    x = call.var("self")
    axis = int(call.const("dim")) % len(x.shape)
    half = x.shape[axis] // 2
    value = call.then(Slice(axis, 0, half), x)
    gate = call.then(slope("sigmoid"), call.then(Slice(axis, half, 2 * half), x))
    return call.then(Product("entries"), value, gate)
