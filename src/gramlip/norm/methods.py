"""`METHODS`, a registry of all methods that bound an operator, under one signature; and `bound`, which calls them.

`METHODS[name](op, rtol=..., finite=...)` returns a `Bound`; `METHODS[name].value(op)` is the published number. The fields `side`,
`valid_for`, `source`, `reads` and `doc` describe that number. docs/methods.md has the table and the proofs. To add a method, write a
function `(op, **options) -> 0-d tensor` and a line here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gramlip.errors import InputError
from gramlip.norm import formulas
from gramlip.norm.certify import certify
from gramlip.norm.polyphase import grid, symbol
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import on_cpu
from gramlip.operators.describe import describe
from gramlip.operators.given import GATHER, is_sharded
from gramlip.operators.interval import Bound, scaled
from gramlip.operators.linear_maps import Conv, Dense, Ints, Operator

Side = Literal["exact", "upper", "lower", "estimate", "interval"]
Reads = Literal["blocks", "kernel", "layer"]
_Number = TypeVar("_Number", float, Tensor)
FAR = 500  # exponents of powers of two whose product with a gradient may over- or underflow


@dataclass(frozen=True)
class Method:
    """One way to bound an operator.

    `method.value(op, **options)` is the value of the published formula in the weight's own precision; rounding may put it on the wrong
    side of the truth. `method(op)` is a `Bound`: the formula in float64, moved outward by a rounding margin (docs/methods.md#rounding).
    It stands in `lower` or in `upper`; an estimate stands in neither.

    Attributes:
        side: what the formula is in exact arithmetic: "exact", "upper", "lower", "estimate" (either side), or "interval" for a method
            that proves both sides.
        valid_for: the operators that it accepts, in words.
        source: arXiv id and formula.
        reads: its input: "blocks" (the matrices of each frequency), "kernel" (the taps) or "layer" (it applies the layer).
        formula: (op, **options) -> 0-d tensor.
        accepts: operator -> whether the formula is valid for it.
        slack: operator -> the rounding margin, as a multiple of the Frobenius bound.
        keeps_graph: whether `Bound.upper` is a tensor with its graph if the weight requires grad.
    """

    side: Side
    valid_for: str
    source: str
    reads: Reads
    formula: Callable[..., Tensor]
    accepts: Callable[[Dense | Conv], bool] = lambda op: True
    slack: Callable[[Dense | Conv], float] | None = None
    keeps_graph: bool = False

    @property
    def doc(self) -> str:
        """The docstring of the formula, in a sentence or two."""
        return (self.formula.__doc__ or "").split("\n\n", 1)[0].replace("\n    ", " ")

    def value(self, op: Operator, **options: object) -> float:
        """The value of the published formula, in the weight's precision (float32 for half precisions).

        Raises:
            InputError: an operator that the method is not valid for.
        """
        with torch.no_grad(), on_cpu():
            op, exponent = _scaled(self._suited(op))
            return _times_power(float(self.formula(op, **options)), exponent)

    def __call__(self, op: Operator, *, rtol: float = 1e-2, finite: bool | str = "auto") -> Bound:
        """The value as a `Bound`. `rtol` and `finite` are accepted for the common signature and ignored.

        Raises:
            InputError: an operator that the method is not valid for.
        """
        op = self._suited(op)
        with torch.set_grad_enabled(self.keeps_graph and torch.is_grad_enabled()), on_cpu():
            wide = torch.complex128 if op.weight.is_complex() else torch.float64
            op, exponent = _scaled(replace(op, weight=op.weight.to(wide)))
            value = self.formula(op)
            margin = (self.slack or roundings)(op) * frobenius_bound(op)
        because = f"{self.source} (docs/methods.md); {self._side(op)}"
        if not bool(op.weight.detach().any()):
            return Bound(0.0, 0.0, f"{because}; all weights are zero")
        if value.requires_grad:
            return Bound(0.0, _times_power(value + margin, exponent), because)
        below = max(rd.down(float(value) - margin), 0.0) if self.side in ("exact", "lower") else 0.0
        above = rd.up(float(value) + margin) if self.side in ("exact", "upper") else math.inf
        return scaled(below, above, exponent, because)

    def _side(self, op: Dense | Conv) -> str:
        margin = f"float64 with a margin for rounding of {(self.slack or roundings)(op):.1g} of the Frobenius bound"
        return {
            "exact": f"exact, singular values as LAPACK gives them, {margin}",
            "upper": f"upper bound, {margin}",
            "lower": f"lower estimate, {margin}; nothing above is known",
            "estimate": "an estimate that may be on either side of the norm, so nothing is claimed",
            "interval": "",
        }[self.side]

    def _suited(self, op: Operator) -> Dense | Conv:
        if not isinstance(op, Dense | Conv) or not self.accepts(op):
            msg = f"{describe_geometry(op)} was given; expected {self.valid_for}, for which {self.source} holds: type method='certify'"
            raise InputError(msg)
        if op.weight.dtype in (torch.float16, torch.bfloat16):
            return replace(op, weight=op.weight.float())
        return op


def _scaled(op: Dense | Conv) -> tuple[Dense | Conv, int]:
    """The operator divided by a power of two, so that no formula over- or underflows, and the exponent of that power."""
    exponent = math.frexp(float(op.weight.detach().abs().max()))[1]
    if abs(exponent) < 16:
        return op, 0
    return replace(op, weight=_times_power(op.weight, -exponent)), exponent


def _times_power(x: _Number, exponent: int) -> _Number:
    """The value times a power of two, in two steps since 2.0**1024 is not a float.

    For large exponents the gradient skips the factor, which would overflow.
    """
    if isinstance(x, Tensor) and x.requires_grad and abs(exponent) > FAR:
        return cast("Tensor", _Far.apply(x, exponent))
    return x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


class _Far(torch.autograd.Function):
    """Multiply by a power of two, but pass the gradient on unchanged.

    The norm scales with the weight, so the factors before and after it cancel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: int) -> Tensor:
        return _times_power(x.detach(), exponent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[reportIncompatibleMethodOverride]
        return grad, None


def describe_geometry(op: object) -> str:
    """The operator in a few words, for an error message."""
    if isinstance(op, Conv):
        size = "every input size" if op.input_size is None else f"input size {'x'.join(map(str, op.input_size))}"  # type: ignore[arg-type]
        kind = "a transposed convolution" if op.transposed else "a convolution"
        return f"{kind} with padding_mode={op.padding_mode!r}, stride={op.stride}, padding={op.padding} and {size}"
    return f"a {type(op).__name__}"


def frobenius_bound(op: Dense | Conv) -> float:
    """`sqrt(taps) ||K||_F`, an upper bound of the layer's norm and the scale of the rounding margin."""
    sym = symbol(op)
    kernel = sym.kernel.detach().flatten(1)
    taps = math.prod(sym.kernel.shape[3:])
    return math.sqrt(sym.padding_norm_squared * taps) * float(torch.linalg.vector_norm(kernel, dim=1).max())


def roundings(op: Dense | Conv) -> float:
    """A multiple of the unit roundoff that covers the formula's float64 evaluation: docs/methods.md#rounding."""
    sym = symbol(op)
    m, n = sym.kernel.shape[1:3]
    points = math.prod(grid(sym)[0]) if sym.points else 1
    transform = 32 * math.sqrt(points) * (2 + math.log2(points))
    return rd.UNIT * (16 * sym.kernel[0].numel() + 16 * min(m, n) * (m + n + 4) + transform + 4096)


@dataclass(frozen=True)
class _Certified(Method):
    """The certified method of this library."""

    def __call__(self, op: Operator, *, rtol: float = 1e-2, finite: bool | str = "auto") -> Bound:
        return certify(op, rtol=rtol, finite=finite)

    def value(self, op: Operator, **options: object) -> float:
        return float(certify(op, **options).upper)  # type: ignore[arg-type]


def _enclosure(op: Operator) -> Tensor:
    """A proved interval, rounding included, closed to `rtol`; its value is the upper end."""
    return torch.tensor(float(certify(op).upper), dtype=torch.float64)


_ANY = "a matrix or a convolution of any geometry"
_CIRCULAR = "a matrix or a convolution with circular padding"

METHODS: dict[str, Method] = {
    "certify": _Certified("interval", "every operator", "docs/theory.md and docs/rounding.md", "blocks", _enclosure),
    "gram": Method("upper", _ANY, "arXiv 2305.16173 on the padding theorem's grid", "blocks", formulas.gram_bound, keeps_graph=True),
    "delattre2023": Method(
        "upper",
        f"{_CIRCULAR} and a known input size",
        "arXiv 2305.16173, algorithms 2 and 3",
        "blocks",
        formulas.delattre2023,
        formulas.is_circular,
    ),
    "sedghi2019": Method(
        "exact",
        f"{_CIRCULAR} that keeps a known input size, stride 1",
        "arXiv 1805.10408, SVD of every frequency",
        "blocks",
        formulas.sedghi2019,
        formulas.is_exact_stride_1,
    ),
    "senderovich2022": Method(
        "exact",
        f"{_CIRCULAR} that keeps a known input size, and a stride that divides it",
        "arXiv 2211.13771, polyphase form of the convolution",
        "blocks",
        formulas.senderovich2022,
        formulas.is_exact,
    ),
    "araujo2021": Method("upper", f"{_ANY} (published for odd square kernels)", "arXiv 2006.08391, LipGrid", "kernel", formulas.araujo2021),
    "singla2021": Method("upper", f"{_ANY} (published for two axes)", "arXiv 1911.10258, Fantastic Four", "kernel", formulas.singla2021),
    "norm2toep": Method(
        "upper", _ANY, "arXiv 2402.00240, Gram iteration on the kernel", "kernel", formulas.norm2toep, slack=formulas.toeplitz_roundings
    ),
    "aol": Method(
        "upper", _ANY, "arXiv 2208.03160, almost orthogonal rescaling", "kernel", formulas.aol, slack=formulas.toeplitz_roundings
    ),
    "tensor_norm": Method("estimate", f"{_ANY} (published for two axes)", "arXiv 2409.11859, tensor norm", "kernel", formulas.tensor_norm),
    "frobenius": Method("upper", _ANY, "Cauchy and Schwarz over the taps, docs/methods.md#frobenius", "kernel", formulas.frobenius),
    "torch": Method("estimate", _ANY, "arXiv 1802.05957, the reshaped kernel", "kernel", formulas.torch_reshaped),
    "power": Method(
        "lower",
        "a matrix or a convolution of known input size",
        "arXiv 1905.05406, power iteration on the layer",
        "layer",
        formulas.power,
        lambda op: not isinstance(op, Conv) or op.input_size is not None,
    ),
}


# ---- bound ---------------------------------------------------------------------------------------------------------------


WIDEST = 1e6  # a larger relative width would need no proof at all


def bound(
    x: nn.Module | Tensor | Operator | ArrayLike,
    input_size: Ints | None = None,
    *,
    rtol: float = 1e-2,
    method: str = "certify",
    finite: bool | str = "auto",
) -> Bound:
    """A certified interval for the l2 norm (largest singular value) of a layer: `lower <= ||A||_2 <= upper`, rounding included.

    Args:
        x: a layer (`nn.Linear`, `nn.Conv*d`, `nn.ConvTranspose*d`, or one registered with `gramlip.describe`), an operator, or a
            matrix: a tensor, an array, nested lists, a sparse matrix of torch or SciPy, or a `LinearOperator` of SciPy with one small
            side.
        input_size: spatial size of the input; None: the bound holds for every size.
        rtol: requested relative width `upper / lower - 1`; `because` says so if it is not reached.
        method: a name in `METHODS`; a published method that gives only a lower estimate leaves `upper` infinite.
        finite: whether to close the interval on the finite zero-padded layer of this size, instead of all frequencies: True always,
            False never, "auto" if it is cheap.

    Raises:
        InputError: weights, sizes or options that cannot be used.
        UnsupportedError: a layer without a rule.

    Reference: docs/theory.md; arXiv 2305.16173.

    >>> import torch
    >>> bound(torch.diag(torch.tensor([3.0, 4.0]))).upper >= 4.0
    True
    """
    check_rtol(rtol)
    if not isinstance(method, str) or method not in METHODS:
        msg = f"method={method!r} is unknown; expected one of {sorted(METHODS)}"
        raise InputError(msg)
    if not isinstance(finite, bool) and not (isinstance(finite, str) and finite == "auto"):
        msg = f"finite={finite!r} was given; expected True, False or 'auto'"
        raise InputError(msg)
    op = describe(x) if input_size is None else describe(x, input_size)
    if is_sharded(getattr(op, "weight", None)):
        msg = f"a weight in shards (DTensor) was given; expected a whole one: {GATHER}"
        raise InputError(msg)
    return op if isinstance(op, Bound) else METHODS[method](op, rtol=rtol, finite=finite)


def check_rtol(rtol: float) -> None:
    """Raise an InputError unless `rtol` is a positive number of at most `WIDEST`."""
    if not isinstance(rtol, float | int) or isinstance(rtol, bool) or not 0 < rtol <= WIDEST:
        msg = f"rtol={rtol!r} was given; expected a positive number such as 1e-2, and at most {WIDEST:g}"
        raise InputError(msg)
