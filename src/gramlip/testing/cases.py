"""The case table: geometries of torch's layers, each with a named adversary kernel; and any library's norm judged on them."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gramlip.operators.linear_maps import Conv, Dense
from gramlip.testing.oracle import oracle, torch_layer

# ---- kernels -------------------------------------------------------------------------------------------------------------

Shape = tuple[int, ...]
Maker = Callable[[Shape, torch.Generator], Tensor]


def weight(kernel: str, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A weight of this shape and dtype: the kernel `KERNELS[kernel]`; for complex types with a second draw as imaginary part.

    >>> weight("second_difference", (1, 1, 3)).flatten().tolist()
    [1.0, -2.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    real = (KERNELS | KNOWN)[kernel](shape, generator)
    if kernel == "denormal":
        real = real * (torch.finfo(dtype).tiny * 2.0**-5)
    if not dtype.is_complex:
        return real.to(dtype)
    return torch.complex(real, _random(shape, generator) * real.abs().amax()).to(dtype)


def _random(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _channels(shape: Shape, filter_: Tensor) -> Tensor:
    """The same filter from channel i to channel i, and zero between different channels."""
    return torch.eye(*shape[:2], dtype=torch.float64).reshape(*shape[:2], *(1,) * filter_.ndim) * filter_


def _outer(lines: list[Tensor]) -> Tensor:
    return reduce(lambda a, b: a[..., None] * b, lines, torch.ones((), dtype=torch.float64))


def _binomial(k: int, sign: int) -> Tensor:
    return torch.tensor([float(math.comb(k - 1, i) * sign**i) for i in range(k)], dtype=torch.float64)


def _laplacian(shape: Shape, g: torch.Generator) -> Tensor:
    filter_ = -torch.ones(shape[2:], dtype=torch.float64)
    filter_[tuple(k // 2 for k in shape[2:])] += filter_.numel()
    return _channels(shape, filter_)


def _sobel(shape: Shape, g: torch.Generator) -> Tensor:
    slope = [torch.arange(k, dtype=torch.float64) - (k - 1) / 2 for k in shape[2:3]]
    return _channels(shape, _outer([*slope, *(_binomial(k, 1) for k in shape[3:])]))


def _ones(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _corner(shape: Shape, g: torch.Generator) -> Tensor:
    filter_ = torch.zeros(shape[2:], dtype=torch.float64)
    filter_[(0,) * filter_.ndim] = 1.0
    return _channels(shape, filter_)


def _wave(shape: Shape, g: torch.Generator) -> Tensor:
    lines = [(torch.rand((), generator=g, dtype=torch.float64) * math.pi * torch.arange(k)).cos() for k in shape[2:]]
    return _random((*shape[:2], *(1,) * len(lines)), g) * _outer(lines)


def _basis(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Orthonormal columns (rows >= columns)."""
    return torch.linalg.qr(_random((rows, columns), g))[0]


def _orthogonal(shape: Shape, g: torch.Generator) -> Tensor:
    """A shift of each inner channel by its own tap, between two orthogonal matrices: all singular values are 1 at every frequency."""
    inner = min(shape[:2])
    taps = torch.zeros(inner, math.prod(shape[2:]), dtype=torch.float64)
    taps[torch.arange(inner), torch.arange(inner) % taps.shape[1]] = 1.0
    return torch.einsum("ai,bi,ip->abp", _basis(shape[0], inner, g), _basis(shape[1], inner, g), taps).reshape(shape)


def _ill_scaled(shape: Shape, g: torch.Generator) -> Tensor:
    scales = torch.logspace(0, -12, shape[0], dtype=torch.float64)
    return _random(shape, g) * scales.reshape(-1, *(1,) * (len(shape) - 1))


KERNELS: dict[str, Maker] = {
    "random": _random,
    "second_difference": lambda shape, _: _channels(shape, _outer([_binomial(k, -1) for k in shape[2:]])),  # [1, -2, 1], outer products
    "laplacian": _laplacian,  # zero mean: a zero block at frequency 0
    "sobel": _sobel,
    "ones": _ones,
    "alternating": lambda shape, g: _ones(shape, g) * _outer([(-1.0) ** torch.arange(k, dtype=torch.float64) for k in shape[2:]]),
    "corner": _corner,
    "wave": _wave,  # peaked at one frequency
    "orthogonal": _orthogonal,  # flat over all frequencies
    "near_orthogonal": lambda shape, g: _orthogonal(shape, g) + 1e-3 * _random(shape, g),
    "rank_one": lambda shape, g: _outer([_random((k,), g) for k in shape]),
    "zero": lambda shape, _: torch.zeros(shape, dtype=torch.float64),
    "tiny": lambda shape, g: 1e-30 * _random(shape, g),
    "huge": lambda shape, g: 1e30 * _random(shape, g),
    "ill_scaled": _ill_scaled,
    "denormal": _random,  # scaled below the normal range of its dtype
}


def _given(*taps: float) -> Maker:
    return lambda shape, g: torch.tensor(taps, dtype=torch.float64).reshape(shape)


KNOWN: dict[str, Maker] = {
    "known_line": _given(2, 7, -1),
    "known_square": _given(2, 7, -1, 1, 3, -8, 5, -3, 1),
    "known_row": _given(2, 7, -1, 1, 3, -8),
}
"""Kernels of a single shape with published norms; they are not drawn for the table."""


# ---- the table -----------------------------------------------------------------------------------------------------------

Ints = tuple[int, ...]
MODES = ("zeros", "circular", "reflect", "replicate")
DTYPES = (torch.float32, torch.float64, torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32, torch.complex64)


@dataclass(frozen=True)
class Case:
    """One layer: the name of a kernel, the shape of the weight, and the geometry with the names of `torch.nn`. `nn.Linear` has no size.

    `padding` is "same" or a pair (before, after) for each axis, as in `gramlip.Conv`.

    >>> case = Case("ones", (1, 1, 3), (5,), padding=((1, 1),))
    >>> case.name, round(case.truth, 4)
    ('ones 1x1x3 n=5 p=1.1 fp32', 2.7321)
    """

    kernel: str
    shape: Ints
    size: Ints = ()
    stride: Ints = ()
    padding: str | tuple[tuple[int, int], ...] = ()
    padding_mode: str = "zeros"
    dilation: Ints = ()
    groups: int = 1
    transposed: bool = False
    output_padding: Ints = ()
    dtype: torch.dtype = torch.float32
    seed: int = 0
    label: str = ""

    def __post_init__(self) -> None:
        d = len(self.shape) - 2
        for name, usual in (("stride", 1), ("dilation", 1), ("output_padding", 0), ("padding", (0, 0))):
            if getattr(self, name) == ():
                object.__setattr__(self, name, (usual,) * d)

    @property
    def dims(self) -> int:
        """Number of spatial axes; 0 for `nn.Linear`."""
        return len(self.shape) - 2

    @property
    def name(self) -> str:
        """A name that describes the case completely, so that different cases have different names."""
        words = [self.label, self.kernel, _times(self.shape)]
        if self.dims:
            padding = self.padding if isinstance(self.padding, str) else ",".join(f"{a}.{b}" for a, b in self.padding)
            words += [
                f"n={_times(self.size)}",
                f"p={padding}" if padding.strip("0.,") else "",
                self.padding_mode if self.padding_mode != "zeros" else "",
            ]
            words += [
                f"s={_times(self.stride)}" if max(self.stride) > 1 else "",
                f"d={_times(self.dilation)}" if max(self.dilation) > 1 else "",
            ]
            words += [f"g={self.groups}" if self.groups > 1 else "", "transposed" if self.transposed else ""]
            words += [f"o={_times(self.output_padding)}" if any(self.output_padding) else ""]
        words += [_SHORT[self.dtype], f"seed={self.seed}" if self.seed else ""]
        return " ".join(filter(None, words))

    @property
    def input_shape(self) -> Ints:
        """Shape of one example."""
        return (self.shape[0] if self.transposed else self.shape[1] * self.groups, *self.size)

    @property
    def plain(self) -> bool:
        """Whether one torch layer is the whole case (unequal padding takes two)."""
        return isinstance(self.padding, str) or all(lo == hi for lo, hi in self.padding)

    @property
    def truth(self) -> float:
        """The layer's norm by the oracle, cached."""
        return _truth(self)

    def weight(self) -> Tensor:
        """The weight, in the case's dtype."""
        return weight(self.kernel, self.shape, self.dtype, self.seed)

    def module(self) -> nn.Module:
        """The real torch layer."""
        fields = self.stride, self.padding, self.padding_mode, self.dilation, self.groups, self.transposed, self.output_padding
        return torch_layer(self.weight(), *fields)

    def operator(self, input_size: Ints | None = ()) -> Conv | Dense:
        """The layer as a `gramlip` operator, at its own size or at `input_size` (None: any size)."""
        if not self.dims:
            return Dense(self.weight())
        settings = {
            name: getattr(self, name)
            for name in ("stride", "padding", "padding_mode", "dilation", "groups", "transposed", "output_padding")
        }
        return Conv(self.weight(), input_size=self.size if input_size == () else input_size, **settings)

    def at(self, size: Ints) -> Case:
        """The same layer on another input size."""
        return replace(self, size=size)

    def runs(self) -> bool:
        """Whether torch accepts this geometry."""
        if not self.dims:
            return True
        for n, k, s, d, (lo, hi), extra in zip(
            self.size, self.shape[2:], self.stride, self.dilation, self.pairs(), self.output_padding, strict=True
        ):
            span = d * (k - 1) + 1
            out = (n - 1) * s - lo - hi + span + extra if self.transposed else n + lo + hi - span + 1
            most = {"circular": n, "reflect": n - 1}.get(self.padding_mode, math.inf)
            if out < 1 or max(lo, hi) > most or (self.padding == "same" and s > 1) or (extra and extra >= max(s, d)):
                return False
        return True

    def pairs(self) -> list[tuple[int, int]]:
        """Padding (before, after) on each axis."""
        if not isinstance(self.padding, str):
            return list(self.padding)
        reach = [d * (k - 1) for k, d in zip(self.shape[2:], self.dilation, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]


_SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.complex64: "c64"}


def _times(numbers: Ints) -> str:
    return "x".join(map(str, numbers))


@functools.cache
def _truth(case: Case) -> float:
    return oracle(case.module(), case.input_shape)


# ---- the table: a seeded draw from the product of all values of each setting -------------------------------------------

KERNEL_SIDES = {1: (1, 2, 3, 3, 4, 5, 7), 2: (1, 2, 3, 3, 4, 5), 3: (1, 2, 3)}
INPUT_SIDES = {1: (1, 2, 3, 4, 5, 7, 8), 2: (1, 2, 3, 4, 5, 6), 3: (1, 2, 3, 4)}
CHANNELS = {
    1: ((1, 1, 1), (2, 3, 1), (3, 2, 1), (4, 4, 4), (4, 2, 2)),
    2: ((1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 2, 2), (4, 2, 2)),
    3: ((1, 1, 1), (2, 1, 1), (2, 2, 2)),
}
COUNTS = {"zeros": (360, 520, 120), "circular": (360, 520, 120), "reflect": (140, 200, 40), "replicate": (140, 200, 40)}  # 1, 2, 3 axes
LIMIT = 400  # input or output entries at most, so that the oracle stays fast


def cases(*modes: str) -> tuple[Case, ...]:
    """The table for these padding modes (all four by default): random geometries, adversaries, traps. It is the same on every machine.

    >>> len(cases("zeros", "circular")) > 2000
    True
    """
    return tuple(case for mode in modes or MODES for case in _table(mode))


@functools.cache
def _table(mode: str) -> tuple[Case, ...]:
    table = [c for c in TRAPS.values() if c.padding_mode == mode] + list(_adversaries(mode))
    for d in (1, 2, 3):
        table += _drawn(mode, d)
    return tuple({case.name: case for case in table}.values())


def _drawn(mode: str, dims: int) -> list[Case]:
    """Geometries drawn axis by axis, two input sizes for each layer where two fit."""
    rng = random.Random(f"{mode} {dims}")
    drawn: list[Case] = []
    while len(drawn) < COUNTS[mode][dims - 1]:
        case = _draw(rng, mode, dims, len(drawn))
        sizes = {tuple(rng.choice(INPUT_SIDES[dims]) for _ in range(dims)) for _ in range(4)}
        drawn += [c for c in map(case.at, sorted(sizes)) if c.runs() and _fits(c)][:2]
    return drawn[: COUNTS[mode][dims - 1]]


def _draw(rng: random.Random, mode: str, dims: int, number: int) -> Case:
    transposed = mode == "zeros" and rng.random() < 0.3
    groups, channels = _drawn_channels(rng, dims, transposed)
    kernel = tuple(rng.choice(KERNEL_SIDES[dims]) for _ in range(dims))
    stride = tuple(rng.choice((1, 1, 2, 3)) for _ in range(dims))
    dilation = tuple(rng.choice((1, 1, 2, 3)) for _ in range(dims))
    padding: str | tuple[tuple[int, int], ...] = tuple(_pair(rng, d * (k - 1)) for k, d in zip(kernel, dilation, strict=True))
    if not transposed and max(stride) == 1 and rng.random() < 0.3:
        padding = "same"
    extra = tuple(rng.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)) if transposed else (0,) * dims
    values, dtype = rng.choice(list(KERNELS)), DTYPES[number % len(DTYPES)]
    if dtype == torch.float16 and values in ("tiny", "huge", "ill_scaled"):
        values = "random"
    return Case(values, (*channels, *kernel), (1,) * dims, stride, padding, mode, dilation, groups, transposed, extra, dtype, number)


def _drawn_channels(rng: random.Random, dims: int, transposed: bool) -> tuple[int, Ints]:
    """The number of groups, and the first two sides of the weight."""
    out, inner, groups = rng.choice(CHANNELS[dims])
    return groups, (groups * max(1, inner // groups), max(1, out // groups)) if transposed else (out, inner // groups)


def _pair(rng: random.Random, reach: int) -> tuple[int, int]:
    """Padding before and after an axis on which the kernel reaches so far."""
    half = reach // 2
    return rng.choice(((half, reach - half), (0, 0), (half + 1, half + 1), (reach + 1, reach + 1), (0, half + 1), (reach, 0)))


def _fits(case: Case) -> bool:
    pads = [lo + hi for lo, hi in case.pairs()]
    grown = math.prod(n * (s if case.transposed else 1) + p + 3 for n, s, p in zip(case.size, case.stride, pads, strict=True))
    return math.prod(case.input_shape) <= LIMIT and grown * case.shape[0] <= 4 * LIMIT


def _adversaries(mode: str) -> Iterator[Case]:
    """Every named kernel on common layers, in every dtype that can hold it; for zero padding also square and tall matrices."""
    for kernel in KERNELS:
        for dtype in _SHORT:
            if dtype == torch.float16 and kernel in ("tiny", "huge", "ill_scaled"):
                continue
            if mode == "zeros":
                yield from (Case(kernel, shape, dtype=dtype) for shape in ((6, 6), (9, 4), (3, 8), (1, 5)))
            yield Case(kernel, (3, 2, 3), (7,), padding=((1, 1),), padding_mode=mode, dtype=dtype)
            yield Case(kernel, (2, 2, 3, 3), (5, 5), padding=((1, 1), (1, 1)), padding_mode=mode, dtype=dtype)
        yield Case(kernel, (2, 2, 3, 3), (6, 6), (2, 2), ((1, 1), (1, 1)), mode)
        yield Case(kernel, (2, 2, 7, 1), (8, 3), padding=((3, 3), (0, 0)), padding_mode=mode)
        yield Case(kernel, (4, 1, 3, 3), (4, 4), padding=((1, 1), (1, 1)), padding_mode=mode, groups=4)
        yield Case(kernel, (1, 1, 3, 3, 3), (3, 3, 3), padding=((1, 1),) * 3, padding_mode=mode)


# ---- the traps: each of these broke a published library ----------------------------------------------------------------


def _square(kernel: str, k: int, n: int, p: int, label: str, mode: str = "zeros", c: int = 1, **more: object) -> Case:
    return Case(kernel, (c, c, k, k), (n, n), padding=((p, p), (p, p)), padding_mode=mode, label=label, **more)  # type: ignore[arg-type]


TRAPS: dict[str, Case] = {
    case.label: case
    for case in (
        Case("random", (16, 1, 3, 3), (4, 4), padding=((1, 1), (1, 1)), groups=16, label="groups-multiplied"),
        *(_square("second_difference", 3, n, 1, f"circular-grid-n{n}-for-zeros") for n in (3, 5, 7, 9, 11)),
        _square("random", 3, 8, 1, "unknown-size-taken-as-k", c=2),
        Case("wave", (1, 1, 7), (7,), padding=((3, 3),), padding_mode="circular", dtype=torch.float64, seed=6, label="between-grid-points"),
        _square("random", 5, 3, 2, "input-smaller-than-kernel", c=2),
        _square("random", 7, 4, 3, "input-smaller-than-kernel-circular", "circular", 2),
        _square("random", 3, 5, 2, "circular-padding-2-for-k3", "circular", 2),
        _square("random", 3, 5, 3, "circular-padding-3-for-k3", "circular", 2),
        *(_square("random", k, 6, k // 2, f"even-kernel-{k}", "circular", 2) for k in (2, 4)),
        Case("random", (2, 2, 2, 2), (6, 6), padding="same", label="even-kernel-same"),
        Case("second_difference", (1, 1, 7, 1), (8, 8), padding=((3, 3), (0, 0)), label="tall-kernel-7x1"),
        Case("second_difference", (1, 1, 7, 1), (7, 8), padding=((3, 3), (0, 0)), label="tall-kernel-7x1-odd"),
        Case("random", (2, 2, 7, 1), (8, 8), padding=((3, 3), (0, 0)), padding_mode="circular", label="tall-kernel-7x1-circular"),
        _square("random", 3, 9, 0, "kernel-is-stride-with-dilation", c=2, stride=(3, 3), dilation=(2, 2)),
        _square("random", 2, 6, 1, "kernel-is-stride-circular", "circular", 2, stride=(2, 2)),
        _square("ones", 3, 8, 2, "dilation-with-stride", c=2, stride=(2, 2), dilation=(2, 2)),
        _square("ones", 3, 12, 1, "dilation-with-stride-circular", "circular", stride=(2, 2), dilation=(2, 2)),
        _square("ones", 3, 7, 1, "stride-does-not-divide", "circular", 2, stride=(2, 2)),
        *(_square(kernel, 3, 5, 1, f"reflect-{kernel}", "reflect") for kernel in ("ones", "corner", "laplacian", "tiny", "zero")),
        *(_square(kernel, 3, 5, 1, f"replicate-{kernel}", "replicate") for kernel in ("ones", "corner", "laplacian", "tiny", "zero")),
        _square("ones", 7, 7, 3, "reflect-7x7-ones", "reflect"),
        _square("laplacian", 7, 7, 3, "replicate-7x7-laplacian", "replicate"),
        Case("random", (6, 1, 3), (1,), (6,), ((8, 8),), "replicate", groups=6, seed=23, label="phases-read-one-input"),
        Case("random", (6, 2, 3, 2, 3), (1, 1, 3), (5, 5, 4), ((5, 5), (3, 3), (2, 2)), "replicate", groups=3, label="groups-and-phases"),
        _square("random", 3, 6, 1, "stride-ignored", c=3, stride=(2, 2)),
        Case("random", (64, 48), label="fp32-rounding"),
        Case("tiny", (8, 8), label="epsilon-in-a-normalisation"),
        _square("zero", 3, 5, 1, "zero-weight", c=2),
        _square("laplacian", 3, 6, 1, "zero-mean", "circular"),
        Case("near_orthogonal", (32, 32), label="power-iteration-as-a-bound"),
        _square("ones", 3, 5, 1, "positive-kernel-3", "circular"),
        _square("ones", 5, 5, 2, "positive-kernel-5", "circular"),
        _square("ones", 7, 7, 3, "positive-kernel-7", "circular"),
        Case("sobel", (1, 1, 3), (3,), (2,), transposed=True, label="wrong-side-of-transposed"),
        _square("ones", 3, 4, 1, "transposed-with-stride", c=2, transposed=True, stride=(2, 2)),
        Case("ones", (2, 1, 3), (4,), (2,), ((0, 0),), transposed=True, output_padding=(1,), label="output-padding"),
        Case("known_line", (1, 1, 3), (20,), padding=((1, 1),), padding_mode="circular", label="known-8.0056"),
        _square("known_square", 3, 20, 1, "known-22.9122", "circular"),
        _square("known_square", 3, 20, 1, "known-22.7275"),
        Case("known_row", (1, 1, 2, 3), (20, 20), padding="same", padding_mode="circular", label="known-17.2700"),
    )
}


# ---- conformance ---------------------------------------------------------------------------------------------------------

ROUNDING = 1e-12  # accuracy of the oracle: a value closer than this to the truth is not called false
VERDICTS = {
    "sound": "not below the truth and not too loose",
    "loose": "not below the truth, but too large",
    "open": "no upper bound claimed (infinite)",
    "below": "an upper bound below the truth",
    "above": "a lower bound above the truth",
    "nan": "not a number",
    "failed": "an exception",
}


@dataclass(frozen=True)
class Row:
    """One case: the claim, the true norm, the verdict (a key of `VERDICTS`), and the exception, if any."""

    case: Case
    truth: float
    lower: float
    upper: float
    verdict: str
    note: str = ""

    @property
    def ratio(self) -> float:
        """Claimed upper bound over truth."""
        if self.truth == 0.0:
            return 1.0 if self.upper == 0.0 else math.inf
        return self.upper / self.truth


@dataclass(frozen=True)
class Conformance:
    """The results of all cases; printing shows the counts and the worst cases of each kind of failure."""

    rows: tuple[Row, ...]
    loose: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases for each verdict."""
        verdicts = Counter(row.verdict for row in self.rows)
        return {verdict: verdicts[verdict] for verdict in VERDICTS}

    @property
    def sound(self) -> bool:
        """Whether no claim was false: none below, above or NaN (failures make no claim)."""
        return not any(self.counts[verdict] for verdict in ("below", "above", "nan"))

    def of(self, verdict: str) -> tuple[Row, ...]:
        """The rows with this verdict, the worst first."""
        rows = (row for row in self.rows if row.verdict == verdict)
        return tuple(sorted(rows, key=lambda row: row.ratio, reverse=verdict == "loose"))

    def __str__(self) -> str:
        lines = [", ".join(f"{n} {verdict}" for verdict, n in self.counts.items() if n) + f" of {len(self.rows)} cases"]
        for verdict in ("below", "above", "nan", "failed", "loose"):
            lines += [f"{verdict:>6}  {_claim(row):<28}  {row.case.name}" for row in self.of(verdict)[:5]]
        return "\n".join(lines)


def conformance(fn: Callable[..., object], table: Iterable[Case] | None = None, *, loose: float = 1.5) -> Conformance:
    """Runs a norm function over the table and judges each answer against the oracle, one-sidedly.

    Args:
        fn: called as `fn(module, input_size)` with a fresh torch layer (`nn.Linear`, `nn.Conv*d`, `nn.ConvTranspose*d`) and its
            spatial size, () for a linear layer. It returns an upper bound, a pair (lower, upper) or an object with these
            two attributes.
        table: cases to run; by default all of `cases()` that are a single torch layer.
        loose: an upper bound above this multiple of the truth is called loose.

    Reference: docs/conformance.md.

    >>> print(conformance(lambda module, input_size: module.weight.detach().norm(), [Case("ones", (1, 1, 3), (5,))]))
    1 below of 1 cases
     below  1.73205 of 2.52434            ones 1x1x3 n=5 fp32
    """
    chosen = [case for case in cases() if case.plain] if table is None else table
    return Conformance(tuple(_judge(fn, case, loose) for case in chosen), loose)


def _judge(fn: Callable[..., object], case: Case, loose: float) -> Row:
    truth = case.truth
    try:
        lower, upper = _interval(fn(case.module(), case.size))
    except Exception as error:  # any exception of the library is its result
        return Row(case, truth, 0.0, math.inf, "failed", f"{type(error).__name__}: {error}")
    return Row(case, truth, lower, upper, _verdict(truth, lower, upper, loose))


def _verdict(truth: float, lower: float, upper: float, loose: float) -> str:
    if math.isnan(lower) or math.isnan(upper):
        return "nan"
    if upper < truth * (1 - ROUNDING):
        return "below"
    if lower > truth * (1 + ROUNDING):
        return "above"
    if upper == math.inf:
        return "open"
    return "loose" if upper > loose * truth else "sound"


def _interval(answer: Any) -> tuple[float, float]:
    if isinstance(answer, tuple):
        return _number(answer[0]), _number(answer[1])  # type: ignore[reportUnknownArgumentType]
    if hasattr(answer, "lower") and hasattr(answer, "upper"):
        return _number(answer.lower), _number(answer.upper)
    return 0.0, _number(answer)


def _number(x: Any) -> float:
    return float(x.detach() if isinstance(x, Tensor) else x)


def _claim(row: Row) -> str:
    if row.verdict == "failed":
        return row.note[:28]
    value = row.lower if row.verdict == "above" else row.upper
    return f"{value:.6g} of {row.truth:.6g}"
