"""Complex values as pairs of real numbers, and Fourier transforms of them. docs/network.md#complex-values.

Only the rules in `COMPLEX` are asked for a call with a complex value; the range of such a value is never known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.rules.affine import added, largest, matrix_product, spread
from gramlip.network.rules.registry import Call, Var, find, register
from gramlip.network.rules.shapes import PICKS, Put, aten
from gramlip.network.steps import Lipschitz, Shortcut, Unbounded
from gramlip.numerics import rounding as rd

ROUNDED = 1.0 + 2.0**-48  # the modulus of a complex number errs by a few units

# ---- half spectra --------------------------------------------------------------------------------------------------------
#
# The transform of a real signal holds one of each pair of conjugate entries. What is done alike to both of a pair keeps the
# constant of the whole spectrum, for which the transform and its inverse are isometries, up to a factor.


@dataclass(frozen=True)
class Half:
    """A value made from half the spectrum of a real signal, frequency by frequency along the last axis.

    With both of each pair counted the difference of the value is at most `factor` times that of the signal at step `origin`.

    Attributes:
        origin: the step of the signal.
        length: of the signal, along the last axis.
        factor: the constant.
        reads: numbers of the entries of the spectrum that it depends on; in place where each entry is a copy of one.
        copied: whether it is.
    """

    origin: int
    length: int
    factor: float
    reads: Tensor
    copied: bool = True

    def mixed(self, factor: float) -> Half:
        """After a map of norm at most `factor` that takes each frequency to itself."""
        return replace(self, factor=rd.mul_up(self.factor, factor), copied=False)


def _half(call: Call) -> Half | None:
    """What is known of a result made from one half spectrum, or from several of one signal; None for other results."""
    packet = call.op.rsplit(".", 1)[0]
    read = [call["src"]] if packet == "aten.copy" else call.vars
    halves = [call.known.halves.get(v.step) if isinstance(v, Var) else None for v in read]
    given = [half for half in halves if half is not None]
    if not given or len(given) < len(halves) or len({(h.origin, h.length) for h in given}) > 1:
        return None
    if packet in PICKS and len(given) == 1:
        return _picked(call, given[0])
    if packet == Put.OP:
        return _assigned(call)
    if packet in ("aten.pad", "aten.constant_pad_nd"):
        return _padded(call, given[0])
    kept = packet == "aten.neg" or (packet == "aten.copy" and read[0].shape == call.shape)
    return given[0] if kept else None


def _frequencies(shape: Sequence[int]) -> Tensor:
    return torch.arange(shape[-1], dtype=torch.float64).expand(tuple(shape))


def _picked(call: Call, half: Half) -> Half | None:
    """After a call that copies entries, each at most once, to the frequency at which they were."""
    x = call.vars[0]
    if len(x.shape) == 0 or not isinstance(kept := call.run(_frequencies(x.shape).contiguous()), Tensor):
        return None
    numbers = call.run(torch.arange(math.prod(x.shape), dtype=torch.float64).reshape(x.shape))
    if not torch.equal(kept, _frequencies(kept.shape)) or len(numbers.unique()) < numbers.numel():
        return None
    return replace(half, reads=call.run(half.reads.double()).long()) if half.copied else half


def _padded(call: Call, half: Half) -> Half | None:
    """After zeros around, where every entry stays at its own frequency."""
    if call.args.get("value") or call.args.get("mode", "constant") != "constant" or min(call.const("pad")) < 0:
        return None
    kept = call.run(_frequencies(call.vars[0].shape) + 1.0)
    return replace(half, copied=False) if bool(((kept == 0) | (kept == _frequencies(kept.shape) + 1.0)).all()) else None


def _assigned(call: Call) -> Half | None:
    """After some entries are put among zeros, or among those of another half, at their own frequencies."""
    put = Put.of(call)
    if (
        not isinstance(put.value, Var)
        or not put.once
        or not torch.equal(_frequencies(put.value.shape).reshape(-1)[put.codes[put.placed]], _frequencies(call.shape)[put.placed])
    ):
        return None
    half = call.known.halves[put.value.step]
    if not isinstance(put.base, Var):
        return replace(half, copied=False) if not bool(put.base.any()) else None
    other = call.known.halves[put.base.step]
    apart = not bool(torch.isin(half.reads, other.reads).any())
    factor = max(half.factor, other.factor) if apart else rd.hypot_up([half.factor, other.factor])
    reads = torch.cat([half.reads.reshape(-1), other.reads.reshape(-1)]).unique()
    return Half(half.origin, half.length, factor, reads, copied=False)


_TRANSFORMS = tuple(f"aten.fft_{name}{d}" for name in ("fft", "ifft", "rfft", "irfft") for d in ("", "2", "n"))
_PAIRS = (
    *(f"aten.{name}" for name in ("view_as_real", "view_as_complex", "real", "imag", "conj", "_conj")),
    *(f"aten.{name}" for name in ("conj_physical", "resolve_conj", "resolve_neg")),
)


# ---- transforms ----------------------------------------------------------------------------------------------------------


@register(*_TRANSFORMS, "aten.fft_hfft", "aten.fft_ihfft")
def _transform(call: Call) -> Var:
    """Parseval: the root of the number of points, one, or one over the root, as the transform is scaled."""
    x, name = call.var("self"), call.op.split(".")[1].removeprefix("fft_")
    axes, points = _points(call, x.shape, halved := name.startswith(("irfft", "hfft")))
    scale = _scale(math.prod(points), call.const("norm"), whole=name.startswith(("fft", "rfft", "hfft")))
    doubled = rd.sqrt_up(2.0) if halved and points[-1] > 2 else 1.0
    result = call.then(Lipschitz(rd.mul_up(scale, doubled), f"{name} of {math.prod(points)} points: docs/network.md#complex-values"), x)
    last, half = axes[-1] == len(x.shape) - 1, call.known.halves.get(x.step)
    if name.startswith(("rfft", "ihfft")) and last:
        call.known.halves[result.step] = Half(x.step, points[-1], scale, torch.arange(math.prod(result.shape)).reshape(result.shape))
    if halved and last and half is not None and not _meets_itself(half, x.shape[-1], points[-1]):
        way = Shortcut((rd.mul_up(half.factor, scale),), (half.origin,))
        call.steps[result.step] = replace(call.steps[result.step], shortcut=way)
    return result


def _scale(count: int, norm: str | None, *, whole: bool) -> float:
    """What a transform of so many points, forward if `whole`, multiplies all lengths by."""
    if norm == "ortho":
        return 1.0
    grows = whole == (norm in (None, "backward"))
    return rd.sqrt_up(float(count)) if grows else rd.up(1.0 / rd.sqrt_down(float(count)))


def _meets_itself(half: Half, size: int, points: int) -> bool:
    """Whether the frequency that is its own mirror, the last one of an even signal, is one of a pair in another."""
    return half.length % 2 == 0 and points != half.length and size > half.length // 2


def _points(call: Call, shape: Sequence[int], halved: bool) -> tuple[list[int], list[int]]:
    """The axes of a transform and the number of points along each."""
    given = call.args.get("n", call.args.get("s"))
    sizes: list[int | None] | None = [given] if isinstance(given, int) else None if given is None else list(given)
    dim = call["dim"]
    axes = [dim] if isinstance(dim, int) else list(range(-len(sizes or shape), 0)) if dim is None else list(dim)
    axes = [axis % len(shape) for axis in axes]
    points = [
        shape[axis] if size in (None, -1) else int(size)  # type: ignore[arg-type]
        for axis, size in zip(axes, sizes or [None] * len(axes), strict=True)
    ]
    return axes, [*points[:-1], call.shape[axes[-1]]] if halved else points


@register("aten.stft")
def _stft(call: Call) -> Lipschitz:
    """Each frame is a transform of its window times a part of the signal: the squares of the window at one point of the signal add up."""
    if call.args.get("center"):
        msg = "stft with center as an argument, which no rule covers; expected torch.stft, which pads before"
        raise UnsupportedError(msg)
    points, hop, window = int(call.const("n_fft")), call.const("hop_length"), call.const("window")
    hop = points // 4 if hop is None else int(hop)
    squares = torch.ones(call.const("win_length") or points, dtype=torch.float64) if window is None else window.abs().double() ** 2
    most = max(float(squares[start::hop].sum()) for start in range(hop))
    root = rd.sqrt_up(rd.mul_up(most, 1.0 + rd.gamma(len(squares) + 8.0)))
    scale = root if call.const("normalized") else rd.mul_up(root, rd.sqrt_up(float(points)))
    return Lipschitz(scale, f"stft of {points} points: docs/network.md#complex-values")


# ---- complex values ------------------------------------------------------------------------------------------------------

_COPY = (
    *PICKS,
    *aten(
        "cat concat concatenate stack hstack vstack dstack where masked_fill triu tril sum neg pad constant_pad_nd clone contiguous detach"
    ),
    *aten("detach alias lift_fresh_copy mean cumsum scatter_add index_add index_put scatter index_copy copy fill zero unfold dropout"),
    "getitem",
    Put.OP,
)
"""Operations whose rules hold for complex values too: they take norms of differences, and their matrices are real."""


_OWN = (*_TRANSFORMS, "aten.fft_hfft", "aten.fft_ihfft", *_PAIRS, "aten.stft", "aten.angle", "aten.complex")


def _as_given(call: Call) -> Any:
    rule = find(call.op)
    assert rule is not None
    return rule(call)


@register(*_PAIRS)
def _pairs(_: Call) -> Lipschitz:
    return Lipschitz(1.0, "complex numbers as pairs of real ones, or one of each pair")


@register("aten.complex")
def _complex(call: Call) -> Lipschitz:
    """Two values side by side, each entry repeated where it is broadcast."""
    return Lipschitz(rd.sqrt_up(float(max(math.prod(call.shape) // math.prod(v.shape) for v in call.vars))), "real and imaginary parts")


@register("aten.angle")
def _angle(call: Call) -> Unbounded:
    return Unbounded("an angle jumps, and turns without bound near zero; expected real and imaginary parts: torch.view_as_real")


def _sum(call: Call) -> Var | Lipschitz:
    constants = [v for v in (call["self"], call["other"]) if not isinstance(v, Var)]
    alpha = call.args.get("alpha", 1)
    if isinstance(alpha, complex):
        msg = f"{call.op} with a complex factor, which no rule covers; expected a product before"
        raise UnsupportedError(msg)
    if not constants:
        return added(call)
    factor = 1.0 if isinstance(call["self"], Var) and "rsub" not in call.op else max(1.0, abs(float(alpha)))
    return call.then(Lipschitz(factor, "a shift by a constant"), spread(call, call.vars[0], call.shape))


def _scaled(call: Call) -> Var:
    x, factor = (call["self"], call["other"]) if isinstance(call["self"], Var) else (call["other"], call["self"])
    divides = "mul" not in call.op
    if isinstance(factor, Var) or (divides and factor is call["self"]):
        msg = f"{call.op} of complex values that depend on the input; expected their real and imaginary parts: torch.view_as_real"
        raise UnsupportedError(msg)
    moduli = torch.as_tensor(factor).to(torch.complex128).abs()
    if divides and not bool(moduli.min() > 1e-300):
        return call.then(Unbounded("division by zero"), x)
    gain = rd.mul_up(1.0 / float(moduli.min()) if divides else float(moduli.max()), ROUNDED)
    result = call.then(
        Lipschitz(rd.add_up(gain, rd.TINY) if gain else 0.0, "a complex factor: its largest modulus"), spread(call, x, call.shape)
    )
    half = call.known.halves.get(x.step)
    if half is not None and x.shape == call.shape:
        call.known.halves[result.step] = half.mixed(gain)
    return result


def _einsum(call: Call) -> Var:
    value: Var = _as_given(call)
    half = call.known.halves.get(call.vars[0].step) if len(call.vars) == 1 else None
    terms, arrow, result = call["equation"].replace(" ", "").partition("->")
    term = terms.split(",")[next(i for i, v in enumerate(call["tensors"]) if isinstance(v, Var))]
    what, sources = call.steps[value.step].what, call.steps[value.step].sources
    if half is not None and arrow and term[-1:] == result[-1:] != "." and sources == (call.vars[0].step,) and isinstance(what, Lipschitz):
        call.known.halves[value.step] = half.mixed(what.upper)
    return value


def _linear(call: Call) -> Lipschitz:
    call.var("input")
    return Lipschitz(largest(call.const("weight").detach()[None]), "a complex matrix")


def _matmul(call: Call) -> Lipschitz:
    left, right = list(call.args.values())[:2]
    if isinstance(left, Var) and isinstance(right, Var):
        msg = f"{call.op} of complex values that depend on the input; expected their real and imaginary parts: torch.view_as_real"
        raise UnsupportedError(msg)
    return matrix_product(call, left, right)


COMPLEX: dict[str, Any] = {
    **dict.fromkeys((*_COPY, *_OWN), _as_given),
    **dict.fromkeys(["aten.to", "aten._to_copy", "aten.type_as"], _pairs),
    **dict.fromkeys(["aten.add", "aten.sub", "aten.rsub"], _sum),
    **dict.fromkeys(["aten.mul", "aten.div", "aten.true_divide"], _scaled),
    **dict.fromkeys(["aten.matmul", "aten.mm", "aten.bmm", "aten.mv"], _matmul),
    "aten.abs": lambda _: Lipschitz(1.0, "the modulus of a complex number", (0.0, math.inf)),
    "aten.einsum": _einsum,
    "aten.linear": _linear,
}
"""Operation -> its rule where a value in it is complex."""


def complex_value(call: Call) -> Any:
    """Apply the rule for complex values to a call.

    Raises:
        UnsupportedError: there is none.
    """
    packet = call.op.rsplit(".", 1)[0] if call.op.count(".") > 1 else call.op
    rule = COMPLEX.get(packet)
    if rule is None:
        msg = f"{call.op} of complex values, which no rule covers; expected real and imaginary parts: torch.view_as_real"
        raise UnsupportedError(msg)
    return rule(call)


def keep_half(call: Call, value: Var) -> None:
    """Remember what is known of half spectra after a call that copies entries."""
    if value.step not in call.known.halves and (half := _half(call)) is not None:
        call.known.halves[value.step] = half
