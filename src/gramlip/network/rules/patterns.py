"""Several calls that are one map with a better constant than each of them: asked before the rule of the last. docs/network.md#patterns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial, reduce

import torch
from torch import Tensor

from gramlip.network.rules.activations import STEEP, probabilities
from gramlip.network.rules.enclosures import (
    FALLS,
    ROUNDS,
    Function,
    largest,
    of_one_value,
    remembered,
    slope_of,
    steepness,
    steepness_on,
    summed_up,
)
from gramlip.network.rules.entrywise import on_interval
from gramlip.network.rules.registry import Call, Radius, Var, find, pattern
from gramlip.network.rules.statistics import SLACK, lengths_on, response_on
from gramlip.network.steps import Linear, LinearAction, Lipschitz, Product, Shortcut, Slope, Step, Sum, Unbounded, Within
from gramlip.numerics import rounding as rd
from gramlip.numerics.rounding import Known, Pieces, interval, plus, power
from gramlip.operators.linear_maps import Scale, Shape

# ---- parts of a pattern --------------------------------------------------------------------------------------------------


def _reduces(call: Call, y: Var, name: str, x: Var) -> bool:
    """Whether y is the sum or mean of groups of entries of x and, broadcast, lies along them: the axes are kept, or all are reduced."""
    step = call.steps[y.step]
    return _adds_up(step, name) and step.sources == (x.step,) and _lies_along(y.shape, x.shape)


def _adds_up(step: Step, *names: str) -> bool:
    """Whether a step is a sum or a mean; one in a type of integers is none."""
    return step.op.split(".")[1:2] in ([name] for name in names) and isinstance(step.what, Lipschitz) and not step.what.assumed


def _lies_along(groups: Shape, entries: Shape) -> bool:
    """Whether one number for each group, broadcast, meets the entries of that group."""
    return groups == () or (len(groups) == len(entries) and all(g in (1, e) for g, e in zip(groups, entries, strict=True)))


def _is_square(step: Step, x: Var) -> bool:
    what = step.what
    return (
        isinstance(what, Product) and (what.kind, what.scale, step.sources) == ("entries", 1.0, (x.step, x.step)) and step.shape == x.shape
    )


def _squared(step: Step) -> int | None:
    """The step whose entries are squared."""
    what = step.what
    same = isinstance(what, Product) and (what.kind, what.scale) == ("entries", 1.0) and len(set(step.sources)) == 1
    return step.sources[0] if same else None


def _shifted(call: Call, at: int) -> tuple[int | None, float]:
    """The step that a positive number is added to, and the number; None where the step does anything else."""
    what, shape = call.steps[at].what, call.steps[at].shape
    if isinstance(what, Linear) and isinstance(what.op, Scale) and what.op.weight.numel() == 1 and float(what.op.weight) == 1.0:
        bias = torch.as_tensor(what.bias, dtype=torch.float64)
        source = call.steps[at].sources[0]
        known = bias.numel() == 1 and what.bias_error == what.error == 0.0 and 1e-200 < float(bias) < math.inf
        if known and call.steps[source].shape == shape:
            return source, float(bias)
    return None, 0.0


def _repeated(call: Call, at: int) -> int:
    """The step behind copies that broadcasting would make too."""
    while call.steps[at].op.startswith(("aten.expand", "aten.clone", "aten.broadcast_to")):
        source = call.steps[at].sources[0]
        if not _lies_along(call.steps[source].shape, call.steps[at].shape):
            break
        at = source
    return at


def _square_of_length(call: Call, at: int) -> Radius | None:
    """The square root of a value as the length of groups: of a sum or mean of squares, or of the square of a length."""
    step = call.steps[at]
    of = _squared(step)
    if of is not None:
        return call.known.radii.get(of)
    squares = step.sources[0] if _adds_up(step, "sum", "mean") else None
    of = None if squares is None else _squared(call.steps[squares])
    if of is None:
        return None
    count = math.prod(call.steps[of].shape) // max(1, math.prod(step.shape))
    return Radius(of, 1.0 if ".sum" in step.op else 1.0 / math.sqrt(count) * (1 - SLACK))


# ---- a value over its length ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Divisor:
    """`D(r)`, with r the radius: it does not fall, `D(r) / r` does not rise; at least `least`, and at least `slope` times r."""

    radius: Radius
    shape: Shape
    at: Callable[[Tensor], Tensor]
    least: float
    slope: float


def _root(radius: Radius, shape: Shape, eps: float) -> _Divisor:
    return _Divisor(radius, shape, lambda r: (r * r + eps).sqrt(), rd.sqrt_down(eps), 1.0)


def _divisor(call: Call, at: int) -> _Divisor | None:
    """A step as a function of a length that is above 0: the root of its square and a number, or lines that rise."""
    at = _repeated(call, at)
    step = call.steps[at]
    if at in call.known.roots:
        return _root(call.known.roots[at][0], step.shape, call.known.roots[at][1])
    curve = call.known.curves.get(at)
    radius = None if curve is None else call.known.radii.get(curve.base.step)
    if curve is None or radius is None:
        return None
    curves = curve.curves()
    least = curves[0](Fraction(0))
    lines = [line for c in curves for line, end in zip(c.lines, (*c.knots, Fraction(1)), strict=True) if end > 0]
    if len(curves) != 1 or curves[0].jumps() or least < Fraction(1, 10**100) or any(s < 0 or h < 0 for s, h in lines):
        return None
    curve.rely(call)
    knots = torch.tensor([float(k) for k in curves[0].knots if k > 0], dtype=torch.float64)
    ends = [(float(s), float(h)) for s, h in lines]

    def value(r: Tensor) -> Tensor:
        return torch.stack([r * s + h for s, h in ends]).gather(0, torch.bucketize(r, knots)[None])[0]

    return _Divisor(radius, step.shape, value, float(least) * (1 - SLACK), float(lines[-1][0]) * (1 - SLACK))


@pattern("aten.mul", "aten.div", "aten.true_divide")
def _over_its_length(call: Call) -> Var | None:
    """`x / D(|x|)`: what is normalised to length one, or written out as RMS or layer norm."""
    divides = "mul" not in call.op
    pairs = [(call["self"], call["other"]), (call["other"], call["self"])][: 1 if divides else 2]
    for x, scale in pairs:
        if not (isinstance(x, Var) and isinstance(scale, Var)) or x.shape != call.shape or call.args.get("rounding_mode") is not None:
            continue
        result = None
        if divides and (divisor := _divisor(call, scale.step)) is not None:
            result = _divided(call, x, divisor)
        if not divides:
            result = _times_inverse(call, x, _repeated(call, scale.step))
        if result is not None:
            call.known.radial[result.step] = x.step, ((_repeated(call, scale.step), -1 if divides else 1),)
            return result
    return None


def _times_inverse(call: Call, x: Var, at: int) -> Var | None:
    """A value times one over a function of its length, or times a number over it."""
    step = call.steps[at]
    what = step.what
    if isinstance(what, Linear) and isinstance(what.op, Scale) and what.op.weight.numel() == 1 and not what.constant:
        inner = _times_inverse(call, x, step.sources[0])
        return None if inner is None else call.then(replace(what, copy_entries=None), inner)
    divisor = _inverse(call, at)
    return None if divisor is None else _divided(call, x, divisor)


def _inverse(call: Call, at: int) -> _Divisor | None:
    """The divisor that a step is one over."""
    step = call.steps[at]
    if step.op.startswith("aten.reciprocal"):
        return _divisor(call, step.sources[0])
    if not step.op.startswith("aten.rsqrt"):
        return None
    inner, eps = _shifted(call, step.sources[0])
    radius = None if inner is None else _square_of_length(call, inner)
    return None if radius is None else _root(radius, step.shape, eps)


def _divided(call: Call, x: Var, divisor: _Divisor) -> Var | None:
    """A value, or a scaled one, over a function of its own length."""
    step, radius = call.steps[x.step], divisor.radius
    what = step.what
    of = call.known.centred.get(x.step, (None, ())) if radius.centred else (x.step, divisor.shape)
    if of != (radius.of, divisor.shape) or not _lies_along(divisor.shape, x.shape):
        scales = isinstance(what, Linear) and isinstance(what.op, Scale) and not what.constant
        if not scales or call.steps[step.sources[0]].shape != x.shape:
            return None
        inner = _divided(call, Var(step.sources[0], x.shape), divisor)
        return None if inner is None else call.then(replace(what, copy_entries=None), inner)
    return call.then(_over(divisor), x)


def _over(divisor: _Divisor) -> Lipschitz:
    slope = divisor.slope * divisor.radius.factor
    most = rd.up(1.0 / slope) if slope > 0 else math.inf
    row = most if divisor.shape == () or divisor.shape[-1] == 1 else math.inf
    because = f"a value over a function of its length that is at least {divisor.least:.6g}"
    return Lipschitz(rd.up(1.0 / divisor.least), because, (-most, most), row=row, within=partial(_divided_on, divisor, most))


def _divided_on(divisor: _Divisor, most: float, a: Tensor, b: Tensor) -> tuple[float, Tensor, Tensor]:
    """Constant and values of `x / D(|x|)` on intervals of its arguments: docs/local.md#slopes."""
    axes = [j for j in range(a.ndim) if divisor.shape == () or divisor.shape[j] == 1]
    factor, room = divisor.radius.factor, 1.0 + a.numel() * 2.0**-50 + 8 * SLACK
    least, longest = lengths_on(a, b, axes)
    below = (divisor.at(least * factor / room) * (1 - SLACK)).clamp_min(divisor.least)
    above = divisor.at(longest * factor * room) * (1 + SLACK)
    ends = torch.stack([end / d for end in (a, b) for d in (below, above)]).nan_to_num(0.0, most, -most)
    slack = SLACK * ends.abs().amax(0) + rd.TINY
    low, high = (ends.amin(0) - slack).clamp(-most, most), (ends.amax(0) + slack).clamp(-most, most)
    return float((1.0 / below).max()) * (1 + SLACK), low, high


@pattern("aten.sqrt")
def _length(call: Call) -> Var | None:
    """The root of a sum or mean of squares, to which a number may be added: a length, or a smooth one."""
    at = call.var("self").step
    inner, eps = _shifted(call, at)
    radius = _square_of_length(call, at if inner is None else inner)
    if radius is None:
        return None
    squared = _squared(call.steps[at if inner is None else inner])
    source = radius.of if squared is None else squared
    value = _as_length(call, Radius(source, 1.0 if squared is not None else radius.factor), eps)
    if inner is None:
        call.known.radii[value.step] = radius
    else:
        call.known.roots[value.step] = radius, eps
    return value


def _as_length(call: Call, radius: Radius, eps: float = 0.0) -> Var:
    """The length of groups itself as a value, or `sqrt(length^2 + eps)`."""
    x = Var(radius.of, call.steps[radius.of].shape)
    root = math.sqrt(math.prod(x.shape) // max(1, math.prod(call.shape))) * radius.factor

    def reach(low: float, high: float) -> tuple[float, float]:
        least, most = (math.hypot(root * end, math.sqrt(eps)) for end in (max(low, -high, 0.0), max(-low, high)))
        return least * (1 - 8 * SLACK), most * (1 + 8 * SLACK) + rd.TINY

    upper = 1.0 if radius.factor == 1.0 else rd.up(radius.factor * (1 + 4 * SLACK))
    return call.then(Lipschitz(upper, "the l2 norm is 1-Lipschitz", (rd.sqrt_down(eps), math.inf), reach), x)


# ---- means, curves and exponentials ---------------------------------------------------------------------------------------


@pattern("aten.sub")
def _centred(call: Call) -> Var | None:
    """`x - mean(x)`: a projection."""
    x, mean = call["self"], call["other"]
    if not (isinstance(x, Var) and isinstance(mean, Var)) or call.args.get("alpha", 1) != 1:
        return None
    if not _reduces(call, mean, "mean", x) or x.shape != call.shape:
        return None
    averages = getattr(call.steps[mean.step].what, "linear", None)
    linear = None if averages is None else LinearAction(lambda value: value - averages.run(value), 2.0)
    value = call.then(Lipschitz(1.0, "a value less its mean: a projection", reach=_apart, linear=linear), x)
    call.known.centred[value.step] = x.step, mean.shape
    return value


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low - high) * (1 + SLACK) - rd.TINY, (high - low) * (1 + SLACK) + rd.TINY


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
    what = Slope(-1.0, 1.0, "sqrt(x^2 + c): slopes in (-1, 1)", (least, math.inf), (least, rd.sqrt_up(shift)), sharp=True)
    return _also_as_written(call, what, x)


def _also_as_written(call: Call, what: Slope, x: Var) -> Var:
    """The value of a pattern, which functions of one value read as it was written."""
    rule = find(call.op)
    assert rule is not None
    step = rule(call)
    assert isinstance(step, Unbounded)
    written = call.then(step, call.var("self"))
    value = call.then(what, x)
    call.known.written[value.step] = written.step
    return value


@pattern("aten.div", "aten.true_divide")
def _softmax(call: Call) -> Var | None:
    """`exp(z) / sum(exp(z))`, where z may be x less the largest entry of each group: the softmax of x."""
    powers, total = call["self"], call["other"]
    if not (isinstance(powers, Var) and isinstance(total, Var)) or powers.shape != call.shape or call.args.get("rounding_mode") is not None:
        return None
    step = call.steps[powers.step]
    if not _is_exp(step):
        return None
    if not _reduces(call, Var(_repeated(call, total.step), total.shape), "sum", powers):
        return None
    groups = call.steps[_repeated(call, total.step)].shape
    at = step.sources[0]
    less = _less_its_largest(call, at, groups)
    at = at if less is None else less
    axes = [j for j, n in enumerate(call.shape) if n > 1 and (groups == () or groups[j] == 1)]
    within = partial(probabilities, axes[0]) if len(axes) == 1 else None
    row = 1.0 if groups == () or groups[-1] == 1 else math.inf
    what = Lipschitz(0.5, "a softmax written out: at most 1/2 in the l2 norm", (0.0, 1.0), row=row, within=within)
    return call.then(what, Var(at, call.shape))


def _less_its_largest(call: Call, at: int, groups: Shape) -> int | None:
    """The x of `x - amax(x)`, one largest entry for each group."""
    step = call.steps[at]
    if not step.op.startswith("aten.sub.") or not isinstance(step.what, Sum) or len(step.sources) != 2:
        return None
    x, other = step.sources
    while call.steps[other].op == step.op and call.steps[other].name == step.name and len(call.steps[other].sources) == 1:
        what = call.steps[other].what
        if isinstance(what, Linear) and (what.constant or not (isinstance(what.op, Scale) and bool((what.op.weight == -1.0).all()))):
            return None
        other = call.steps[other].sources[0]
    largest = call.steps[other]
    return x if largest.op.startswith("aten.amax") and largest.sources == (x,) and largest.shape == groups else None


@pattern("aten.exp")
def _gaussian(call: Call) -> Var | None:
    """`exp(-c x^2)`, c > 0, entry by entry or with the length of groups for x: slopes of at most `sqrt(2 c / e)`."""
    at, sign, low, high = call.var("self").step, 1.0, 1.0, 1.0
    while isinstance(what := call.steps[at].what, Linear) and isinstance(what.op, Scale) and not what.constant:
        weight, at = what.op.weight.double(), call.steps[at].sources[0]
        sign *= math.copysign(1.0, float(weight.flatten()[0]))
        sizes = (weight * weight.sign().flatten()[0]).aminmax()
        low, high = low * (float(sizes.min) - what.error), rd.mul_up(high, rd.add_up(float(sizes.max), what.error))
        if not low > 0.0 or call.steps[at].shape != call.shape:
            return None
    of, radius = _squared(call.steps[at]), _square_of_length(call, at)
    if sign > 0 or (of is None and radius is None):
        return None
    x = _as_length(call, radius) if of is None and radius is not None else Var(of or 0, call.shape)
    steep = rd.up(math.sqrt(2 * high / math.e) * (1 + SLACK))
    within = _gaussian_on(high, steep) if high <= low * (1 + SLACK) else None
    what = Slope(-steep, steep, f"exp(-c x^2), c at most {high:.6g}: slopes up to sqrt(2c/e)", (0.0, 1.0), (1.0, 1.0), within=within)
    return _also_as_written(call, what, x)


def _gaussian_on(c: float, steep: float) -> Within:
    turns = [(1 / math.sqrt(2 * c), -steep), (-1 / math.sqrt(2 * c), steep)]

    def slope(x: Tensor) -> Tensor:
        return (-2 * c * x * torch.exp(-c * x * x)).nan_to_num(0.0)

    return on_interval(lambda x: torch.exp(-c * x * x), slope, turns, [0.0], 4 * SLACK * (1 + steep), ((-steep, steep), (0.0, 1.0)))


# ---- functions of one value: docs/network.md#enclosures ------------------------------------------------------------------

GAIN = 0.99  # of what the parts of a sum say: above it they are left as they are


@pattern("aten.add", "aten.sub", "aten.mul", "aten.div", "aten.true_divide")
def _of_one_value(call: Call) -> Var | None:
    """The sum, product or quotient as its rule has it, then as one function of an earlier value where that says more."""
    rule = find(call.op)
    if len(call.vars) < 2 or any(v.shape != call.shape for v in call.vars) or call.args.get("rounding_mode") is not None or rule is None:
        return None
    result = rule(call)
    what = call.steps[result.step].what if isinstance(result, Var) else None
    if not isinstance(result, Var) or not isinstance(what, Sum | Product) or call.vars[0] == call.vars[1]:
        return result if isinstance(result, Var) else None
    functions = of_one_value(call, [result.step])
    for f in functions[: 1 if isinstance(what, Sum) else None]:
        function = remembered(call, ("slopes", f.key), lambda f=f: slope_of(f, "a function of one value", GAIN * summed_up(f)))
        if function is not None:
            value = call.then(function, Var(min(f.base), call.shape))
            call.known.written[value.step] = result.step
            return value
    if functions and isinstance(what, Product):
        f = functions[0]
        short = Shortcut((math.inf,), tuple(f.base), within=(partial(steepness_on, f),))
        call.steps[result.step] = replace(call.steps[result.step], shortcut=short)
    return result


@pattern("aten.log", "aten.log1p")
def _softplus(call: Call) -> Var | None:
    """`log(1 + exp(x))`."""
    at = call.var("self").step
    power, one = (at, 1.0) if "log1p" in call.op else _shifted(call, at)
    if power is None or one != 1.0 or not _is_exp(call.steps[power]) or call.steps[power].shape != call.shape:
        return None
    x = Var(call.steps[power].sources[0], call.shape)
    softplus = replace(call, op="aten.softplus.default", args={"self": x, "beta": 1.0, "threshold": 1e3})
    rule = find(softplus.op)
    what = None if rule is None else rule(softplus)
    return softplus.then(what, x) if isinstance(what, Slope) else None


def _is_exp(step: Step) -> bool:
    """Whether a step is an exponential; a Gaussian's step reads the length, not its square."""
    return step.op.startswith("aten.exp.") and isinstance(step.what, Unbounded)


@pattern(*(f"aten.{name}" for name in (*STEEP, "pow", *FALLS, "sin", "cos")))
def _of_a_function(call: Call) -> Var | None:
    """A function of a function, one of which has no constant, such as `1 / (1 + exp(-x))` or `tanh(x^2)`, as one of an earlier value."""
    rule = find(call.op)
    what = rule(call) if rule is not None and len(call.vars) == 1 and call.vars[0].shape == call.shape else None
    if not isinstance(what, Slope | Unbounded):
        return None
    value = call.then(what, call.vars[0])
    for f in of_one_value(call, [value.step]):
        kinds = [type(call.steps[i].what) for i in f.inner if not isinstance(call.steps[i].what, Linear | Sum)]
        if len(kinds) == 1 or set(kinds) == {Slope}:
            continue
        function = remembered(call, ("slopes", f.key), lambda f=f: slope_of(f, "a function of one value", math.inf))
        if function is not None:
            last, value = value, call.then(function, Var(min(f.base), call.shape))
            call.known.written[value.step] = last.step
            break
    return value


@pattern("aten.pow", "aten.square", "aten.mul")
def _square_of_a_function(call: Call) -> Var | None:
    """A square, which other patterns look for, with what it is as a function of an earlier value."""
    rule = find(call.op)
    two = "pow" not in call.op or (isinstance(call["exponent"], int | float) and call["exponent"] == 2)
    if rule is None or not two or len(call.vars) != 1 + ("mul" in call.op) or call.vars[0] != call.vars[-1]:
        return None
    result = rule(call)
    if not isinstance(result, Var):
        return None
    for f in of_one_value(call, [result.step]):
        if len(f.inner) > 1 and (size := remembered(call, ("joined", f.key), lambda f=f: largest(f, steepness))) < math.inf:
            call.steps[result.step] = replace(call.steps[result.step], shortcut=Shortcut((size,), tuple(f.base), "a square"))
            break
    return result


# ---- a value times functions of the length of its groups: docs/network.md#radial-maps ------------------------------------


@pattern("aten.mul", "aten.div", "aten.true_divide")
def _radial(call: Call) -> Var | None:
    """`x g(|x|)`, where g may be put together from several calls, some before and some after x."""
    divides, rule = "mul" not in call.op, find(call.op)
    pairs = [(call["self"], call["other"]), (call["other"], call["self"])][: 1 if divides else 2]
    for value, scale in pairs:
        if not (isinstance(value, Var) and isinstance(scale, Var)) or rule is None or call.args.get("rounding_mode") is not None:
            continue
        at, factors = call.known.radial.get(value.step, (value.step, ()))
        factors = (*factors, (_repeated(call, scale.step), -1 if divides else 1))
        x = Var(at, call.steps[at].shape)
        f = None if x.shape != call.shape else _of_length(call, x, factors)
        if f is None:
            continue
        signs = tuple(sign for _, sign in factors)
        top = largest(f, partial(_stretch, signs), signs=(1.0,), rounds=2 * ROUNDS)
        result = call.then(_radial_step(f, signs, call.steps[factors[0][0]].shape, top), x) if top < math.inf else rule(call)
        if isinstance(result, Var):
            call.known.radial[result.step] = at, factors
            return result
    return None


def _of_length(call: Call, x: Var, factors: Sequence[tuple[int, int]]) -> Function | None:
    """Factors as functions of the length of groups of x, one number for each group."""
    shapes = {call.steps[at].shape for at, _ in factors}
    if len(shapes) != 1 or not _lies_along(groups := shapes.pop(), x.shape):
        return None
    base: dict[int, Callable[[Pieces], Known]] = {}
    for at in range(x.step + 1, len(call.steps)):
        if call.steps[at].shape == groups and (start := _length_start(call, at, x.step)) is not None:
            base[at] = start
    return Function.of(call, base, [at for at, _ in factors]) if base else None


def _length_start(call: Call, at: int, x: int) -> Callable[[Pieces], Known] | None:
    """What a step is of the length of groups of x: a multiple of it, of its square, or the root of its square and a number."""
    known = call.known
    if at in known.radii and not known.radii[at].centred and known.radii[at].of == x:
        return partial(_multiple, 1, known.radii[at].factor, 0.0)
    if at in known.roots and known.roots[at][0].of == x and not known.roots[at][0].centred:
        return partial(_multiple, 1, known.roots[at][0].factor, known.roots[at][1])
    radius = _square_of_length(call, at) if isinstance(call.steps[at].what, Lipschitz | Product | Linear) else None
    if radius is not None and radius.of == x and not radius.centred and _squared(call.steps[at]) is None:
        return partial(_multiple, 2, radius.factor, 0.0)
    return None


def _multiple(k: int, factor: float, eps: float, pieces: Pieces) -> Known:
    """`(c t)^k`, or `sqrt(c^2 t^2 + eps)`, for a c that is at least `factor` and hardly above it."""
    c = interval(factor, factor if factor == 1.0 else factor * (1 + 8 * SLACK))
    if eps == 0.0:
        return pieces.start(k, power(c, k))
    return pieces.root(pieces.scaled(pieces.start(2, power(c, 2)), interval(1.0), interval(eps)), 1)


def _profile(signs: Sequence[int], known: Sequence[Known], pieces: Pieces) -> Known:
    """g, the product of all factors."""
    return reduce(
        lambda f, g: pieces.product(f, g, False), (f if sign > 0 else pieces.inverse(f) for f, sign in zip(known, signs, strict=True))
    )


def _stretch(signs: Sequence[int], known: Sequence[Known], pieces: Pieces) -> Tensor:
    """The larger of `|g|` and `|g + t g'|`."""
    g = pieces.joined(_profile(signs, known, pieces))
    return torch.maximum(g.value.abs().amax(-1), plus(g.value, g.grown).abs().amax(-1))


def _radial_step(f: Function, signs: Sequence[int], groups: Shape, top: float) -> Lipschitz:
    def reach(known: Sequence[Known], pieces: Pieces) -> Tensor:
        return pieces.product(pieces.start(1, interval(1.0)), _profile(signs, known, pieces), False).value.abs().amax(-1)

    most = largest(f, reach, signs=(1.0,), rounds=ROUNDS // 2)
    row = most if groups == () or groups[-1] == 1 else math.inf
    return Lipschitz(top, f"a value times a function of its length: slopes up to {top:.6g}", (-most, most), row=row)


# ---- channels times their length over the mean length of all (ConvNeXt V2): docs/network.md#radial-maps ------------------


@pattern("aten.mul")
def _response(call: Call) -> Var | None:
    """`x_c |x_c| / (mean |x_k| + eps)` over groups of entries of x."""
    for x, scale in ((call["self"], call["other"]), (call["other"], call["self"])):
        if not (isinstance(x, Var) and isinstance(scale, Var)) or x.shape != call.shape:
            continue
        parts = _over_its_mean(call, _repeated(call, scale.step), x.step)
        if parts is not None and len(groups := call.steps[parts[0]].shape) == len(x.shape):
            means, eps = call.steps[parts[1]].shape or (1,) * len(groups), parts[2]
            count = math.prod(groups) // max(1, math.prod(means))
            upper = rd.mul_up(float(count), rd.sqrt_up(float(count)))
            because = f"global response normalisation of {count} channels: at most the power 3/2 of their number"
            return call.then(Lipschitz(upper, because, within=partial(response_on, groups, means, eps)), x)
    return None


def _over_its_mean(call: Call, at: int, x: int) -> tuple[int, int, float] | None:
    """The lengths of groups of x, their means and the number added to these, where a step is the one over the sum of the others."""
    step = call.steps[at]
    if not isinstance(step.what, Product) or (step.what.kind, step.what.scale) != ("entries", 1.0):
        return None
    lengths, inverse = step.sources
    radius, over = call.known.radii.get(lengths), call.steps[inverse].what
    if radius is None or (radius.of, radius.factor, radius.centred) != (x, 1.0, False) or not isinstance(over, Unbounded):
        return None
    if over.within is not STEEP["reciprocal"] or call.steps[inverse].op != step.op:
        return None
    below = call.steps[inverse].sources[0]
    while isinstance(what := call.steps[below].what, Lipschitz) and what.same_range and call.steps[below].op == step.op:
        below = call.steps[below].sources[0]  # copies that the quotient makes
    mean, eps = _shifted(call, below)
    if mean is None or not _reduces(call, Var(mean, call.steps[mean].shape), "mean", Var(lengths, call.steps[lengths].shape)):
        return None
    return lengths, mean, eps
