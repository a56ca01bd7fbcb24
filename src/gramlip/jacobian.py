"""The lower side: how much the network stretches some difference of two concrete inputs. docs/network.md#lower-side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from gramlip import rounding as rd
from gramlip.graph import Program, op_name

MARGIN = 2.0**-20  # relative; covers the rounding of the difference of two results, of their distance and of the quotient
MOVES = 2**8  # by so many spacings of its type every value is moved, to see what the rounding of all of them may do;
DRAWS = 2  # the largest move of the result in so many draws of the signs,
TIMES = 4.0  # so many times, is taken for the rounding of one forward pass
_WIDE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64) | dict.fromkeys(
    (torch.complex64, torch.complex32), torch.complex128
)
SCALES = (1.0, 0.1, 3.0)  # of the random points where no domain is given: a normalisation is steepest near constant inputs


class Function(Protocol):
    """A network as a function of one flat vector to one flat vector."""

    def __call__(self, flat: Tensor, /, moved: torch.Generator | None = None) -> Tensor:
        """The result; where signs are given, with every value on the way moved relatively by `MOVES` spacings of its type."""
        ...


@dataclass(frozen=True)
class Stretch:
    """A lower bound `value` of the Lipschitz constant, and where it was found."""

    value: float
    because: str


def function(program: Program, shapes: Sequence[tuple[int, ...]]) -> Function:
    """The network in float64 as a function of one flat vector (all inputs joined) to one flat vector (all outputs joined)."""
    sizes = [math.prod(s) for s in shapes]
    constants = {n: _double(c) for n, c in program.constants.items()}

    def run(flat: Tensor, /, moved: torch.Generator | None = None) -> Tensor:
        values: dict[fx.Node, Any] = dict(constants)
        for node, part, shape in zip(program.inputs, _moved(flat, moved).split(sizes), shapes, strict=True):
            values[node] = part.reshape(shape)
        for node in program.nodes:
            if node.op == "call_function" and "_assert" not in op_name(node):
                write = program.writes.get(node)
                for target in write.targets if write else ():  # it may be a leaf or shared: a copy is overwritten, which later calls read
                    values[target] = values[target].clone()
                values[node] = _moved(_call(node, values), moved)
        return torch.cat([values[n].reshape(-1).double() for n in program.outputs])

    return run


def _double(constant: Any) -> Any:
    if not isinstance(constant, Tensor) or not (constant.is_floating_point() or constant.is_complex()):
        return constant
    return constant.to(torch.complex128 if constant.is_complex() else torch.float64)


def _moved(value: Any, signs: torch.Generator | None) -> Any:
    """The value, each of its entries moved up or down in modulus."""
    if signs is None:
        return value
    if isinstance(value, list | tuple):
        return [_moved(item, signs) for item in value]  # type: ignore[reportUnknownVariableType]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    up = torch.randint(0, 2, value.shape, generator=signs, dtype=value.dtype) * 2 - 1
    return value * (1 + MOVES * torch.finfo(value.dtype).eps * up)


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    given: tuple[Any, ...] = map_arg(node.args, values.__getitem__)
    kwargs: dict[str, Any] = dict(map_arg(node.kwargs, values.__getitem__))
    args: tuple[Any, ...] = tuple(_WIDE.get(a, a) if isinstance(a, torch.dtype) else a for a in given)
    kwargs = {k: _WIDE.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
    if op_name(node) == "aten.scaled_dot_product_attention.default":  # the fused kernel has no forward derivative
        q, k, v, *others = args
        mask, dropout, causal = (*others, *(None, 0.0, False)[len(others) :])
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, None, scale=kwargs.get("scale"))[0]
    if op_name(node) == "aten.batch_norm.default" and not args[5]:  # in evaluation mode; its forward derivative is slow
        x, weight, bias, mean, var, *_ = args
        shape = [-1 if j == 1 else 1 for j in range(x.ndim)]
        gain = (var + args[7]).rsqrt() if weight is None else weight * (var + args[7]).rsqrt()
        shift = -mean * gain if bias is None else bias - mean * gain
        return x * gain.reshape(shape) + shift.reshape(shape)
    if op_name(node) == "aten.softplus.default":  # the function that its rule bounds, without the switch at a threshold
        x, *others = args
        beta = float(others[0] if others else kwargs.get("beta", 1.0))
        return torch.logaddexp(torch.zeros_like(x), beta * x) / beta
    if op_name(node) == "aten.rms_norm.default" and (*args, None, None)[3] is None and kwargs.get("eps") is None:
        wide = torch.float64 if node.meta["val"].dtype == torch.float64 else torch.float32  # torch takes eps from the type
        kwargs, args = kwargs | {"eps": torch.finfo(wide).eps}, args[:3]
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.to(_WIDE.get(result.dtype, result.dtype)) if isinstance(result, Tensor) else result


def direction(run: Function, x: Tensor, v: Tensor, steps: int) -> Tensor:
    """The direction after power steps `v <- J' J v` at x, J the Jacobian there.

    Only where to look: what is reported is a quotient of two points, so an operation without derivatives costs tightness, not truth.
    """
    point = x.clone().requires_grad_()
    value = run(point)
    for _ in range(steps):
        image = _pushed(run, x, v)
        if not value.requires_grad:
            break
        (back,) = torch.autograd.grad(value, point, image, retain_graph=True, materialize_grads=True)
        size = torch.linalg.vector_norm(back)
        if not bool(size > 0) or not bool(torch.isfinite(size)):
            break
        v = back / size
    return v


def _pushed(run: Function, x: Tensor, v: Tensor) -> Tensor:
    """J v, by forward differentiation, or by a central difference where an operation has no forward derivative."""
    try:
        return torch.func.jvp(run, (x,), (v,))[1]
    except (NotImplementedError, RuntimeError):  # torch raises either; a failure of the network itself comes again below
        with torch.no_grad():
            step = 1e-5 * max(1.0, float(torch.linalg.vector_norm(x)))
            return (run(x + step * v) - run(x - step * v)) / (2 * step)


def noise(run: Function, x: Tensor, value: Tensor, signs: torch.Generator) -> float:
    """What the rounding of the forward pass may have done to its result, measured: docs/network.md#lower-side."""
    moves = [float(torch.linalg.vector_norm(run(x, signs) - value)) for _ in range(DRAWS)]
    return TIMES * max(moves) if all(map(math.isfinite, moves)) else math.inf


def secant(run: Function, x: Tensor, v: Tensor, lo: float, hi: float, signs: torch.Generator) -> tuple[float, Tensor]:
    """The largest quotient `|f(x + t v) - f(x)| / |t v|` over some t of both signs, less rounding, and the best point reached.

    A quotient of two concrete points is at most the Lipschitz constant, whatever happens between them: no Jacobian of
    an adjacent piece at a kink can make it too large.
    """
    best, where, image = 0.0, x, None
    base = run(x)
    room = noise(run, x, base, signs)
    scale = max(float(torch.linalg.vector_norm(x)), 1.0)
    for step in (sign * 10.0**exponent for sign in (1, -1) for exponent in (-4, -2, -1, 0)):
        y = (x + scale * step * v).clamp(lo, hi)
        gap, there = float(torch.linalg.vector_norm(y - x)), run(y)
        if gap > 0:
            value = (float(torch.linalg.vector_norm(there - base)) - 2 * room) / gap
            if value > best:
                best, where, image = value, y, there
    if image is None:
        return 0.0, x
    gap, room = float(torch.linalg.vector_norm(where - x)), room + noise(run, where, image, signs)
    return (float(torch.linalg.vector_norm(image - base)) - room) / gap * (1 - MARGIN), where


def stretch(
    run: Function,
    size: int,
    *,
    data: Tensor | None = None,
    domain: tuple[float, float] | None = None,
    seed: int = 0,
    starts: int = 3,
    rounds: int = 3,
    steps: int = 4,
) -> Stretch:
    """A lower bound of the Lipschitz constant, from power iteration on Jacobians and ascent over the points.

    Args:
        run: from `function`.
        size: entries of its input.
        data: points (k, size) to start from; else uniform in the domain, or normal with standard deviations in `SCALES`.
        domain: interval of each input entry.
        seed: of the random numbers; the result depends on it and on nothing else.
        starts: number of starting points.
        rounds: power iterations a start, each at the best point that the one before reached.
        steps: power steps a round.
    """
    generator, signs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    lo, hi = domain or (-math.inf, math.inf)
    best, found = 0.0, "no point stretched"
    for start in range(starts):
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        if data is not None:
            x = data[start % len(data)].double().reshape(-1) + 1e-6 * noise
        elif domain is not None:
            x = lo + (hi - lo) * torch.rand(size, generator=generator, dtype=torch.float64)
        else:
            x = noise * SCALES[start % len(SCALES)]
        v = torch.randn(size, generator=generator, dtype=torch.float64)
        v, x = v / torch.linalg.vector_norm(v), x.clamp(lo, hi)
        for i in range(rounds):
            v = direction(run, x, v, steps)
            with torch.no_grad():
                value, x = secant(run, x, v, lo, hi, signs)
            if value > best:
                best, found = value, f"start {start}, round {i}"
    origin = "data" if data is not None else "random points"
    why = f"lower side: a difference of two inputs in float64, less its rounding as measured, from {origin}, seed {seed}, {found}"
    return Stretch(rd.down(best), why)
