"""What `bound` and its operators are given: every dtype by its values, and what has no norm refused in one line that says what to type."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gramlip as gl
from gramlip.operators.linear_maps import EIGHT_BITS

WEIGHT = torch.ones(3, 2, 3, 3)
ONE = gl.Bound(1.0, 1.0, "one")


def narrow(dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
    """Every finite number of an 8-bit float, near the middle of its range, and the same numbers by their bits."""
    bits = np.arange(256)
    ebits, bias = {"e4m3fn": (4, 7), "e4m3fnuz": (4, 8), "e5m2": (5, 15), "e5m2fnuz": (5, 16), "e8m0fnu": (8, 127)}[str(dtype)[13:]]
    mbits = 7 - ebits if ebits < 8 else 0
    field, mantissa = bits >> mbits & ((1 << ebits) - 1), bits & ((1 << mbits) - 1)
    normal = np.where((field > 0) | (ebits == 8), 1.0 + mantissa / 2**mbits, mantissa / 2**mbits)
    exponent = np.where(ebits == 8, field, np.maximum(field, 1)) - bias
    known = np.where((bits >> 7 == 1) & (ebits < 8), -1.0, 1.0) * normal * 2.0**exponent
    chosen = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = chosen.float().isfinite().numpy()
    rows = int(finite.sum()) // 8 * 8
    kept = np.flatnonzero(finite)[:rows]
    return chosen.view(torch.uint8)[torch.from_numpy(kept)].view(dtype).reshape(8, -1), known[kept].reshape(8, -1)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_eight_bits_count_with_their_values(dtype: torch.dtype) -> None:
    weight, known = narrow(dtype)
    truth = float(np.linalg.norm(known, 2))
    for found in (gl.bound(weight), gl.bound(weight, method="singla2021"), gl.bound(gl.Conv(weight[..., None], 3))):
        assert found.lower <= truth * (1 + 1e-12) <= float(found.upper) * (1 + 2e-12)
        assert found.rtol <= 1e-2 or found.lower == 0.0
    top = float(np.abs(known).max())
    assert gl.bound(gl.Diagonal(weight)).upper == top
    holed = weight.view(torch.uint8).clone()
    holed[0, 0] = {"fnuz": 0x80}.get(str(dtype)[-4:], 0xFF)
    with pytest.raises(gl.InputError, match="NaN"):
        gl.bound(holed.view(dtype))


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(2, 2)


def quiet(call: Callable[[], Tensor]) -> Tensor:
    """Tensors whose makers warn that they are old or new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


ODD = {
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
    "masked": lambda: torch.masked.masked_tensor(torch.ones(3, 3), torch.ones(3, 3, dtype=torch.bool)),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 3), torch.ones(2, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(3, 3), torch.ones(2, 3)], layout=torch.jagged),
}


def conv(**options: Any) -> Callable[[], object]:
    return lambda: gl.bound(gl.Conv(WEIGHT, **options))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "packed": (lambda: gl.bound(torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)), "unpack"),
    **{
        name: (lambda call=call: gl.bound(quiet(call)), {"quantized": "dequantize", "masked": "masked"}.get(name, "nested"))
        for name, call in ODD.items()
    },
    "fake": (lambda: gl.bound(fake()), "plain torch.Tensor"),
    "kernel": (lambda: gl.bound(WEIGHT), r"type gramlip\.Conv"),
    "lazy": (lambda: gl.bound(nn.LazyLinear(3)), "one forward pass"),
    "lazy convolution": (lambda: gl.bound(nn.LazyConv2d(3, 3), 8), "one forward pass"),
    **{
        f"{name}={value!r}": (conv(**{"input_size": 8, name: value}), f"{name}=.* was given; expected an integer")
        for name, values in {
            "input_size": (32.0, {8, 9}, True, (8,)),
            "stride": (None, 1.0, {1, 2}),
            "dilation": (1.5, None),
            "padding": (None, 1.0, ((1.0, 1), (1, 1))),
            "output_padding": (None,),
        }.items()
        for value in values
    },
    "endless padding": (conv(input_size=16, padding=10**6), "type a smaller padding, or input_size=None"),
    "output padding": (conv(output_padding=1), "type transposed=True"),
    "scale": (lambda: gl.Separable((torch.eye(2),), float("nan")), "scale=nan was given"),
    "no scale": (lambda: gl.Separable((torch.eye(2),), None), "scale=None was given"),  # type: ignore[arg-type]
    "factors": (lambda: gl.Separable(torch.eye(2)), r"type \(matrix,\)"),  # type: ignore[arg-type]
    **{f"finite={value!r}": (lambda value=value: gl.bound(torch.eye(2), finite=value), "finite=") for value in (0, 1, np.False_, "no")},
    **{f"method={value!r}": (lambda value=value: gl.bound(torch.eye(2), method=value), "method=") for value in ([], None, "no")},
    **{f"rtol={value!r}": (lambda value=value: gl.bound(torch.eye(2), rtol=value), "at most 1e") for value in (0, True, 1e160, "1")},
    "ends": (lambda: gl.Bound(3.0, 2.0, ""), "lower <= upper"),
    "negative": (lambda: gl.Bound(-1.0, 2.0, ""), "0 <= lower"),
    "nan": (lambda: gl.Bound(0.0, float("nan"), ""), "lower <= upper"),
    **{
        f"nan in {name}": (lambda verb=verb: verb([ONE, gl.Bound(0.0, torch.tensor(float("nan")), "bad")]), r"NaN was given \(bad\)")
        for name, verb in {
            "max": gl.Bound.max,
            "max, the other way": lambda both: gl.Bound.max(both[::-1]),
            "concat": gl.Bound.concat,
            "sum": sum,
            "chain": lambda both: gl.Bound(0.0, 0.0, "zero") @ both[1],
        }.items()
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str) -> None:
    call, says = REFUSED[name]
    with pytest.raises(gl.InputError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


def test_bounds_combine_with_bounds_alone() -> None:
    for wrong in (lambda: ONE + 1, lambda: 1 + ONE, lambda: ONE @ 2, lambda: ONE + None):  # type: ignore[operator]
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
    assert float(sum([ONE, ONE]).upper) >= 2.0  # type: ignore[union-attr]


def test_a_bound_with_a_graph_is_copied() -> None:
    found = gl.bound(nn.Linear(3, 3), method="gram")
    assert copy.deepcopy([found])[0].upper is found.upper


VALUES = [[1.5, -2.0, 0.25], [0.0, 3.0, 1.0]]
TENSOR = torch.tensor(VALUES, dtype=torch.float64)


class Elsewhere:
    """An array of another library, by NumPy's protocol."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if isinstance(self.values, Exception):
            raise self.values
        return np.asarray(self.values, dtype=dtype)


def frozen() -> np.ndarray:
    array = np.array(VALUES)
    array.flags.writeable = False
    return array


ARRAYS: dict[str, Callable[[], object]] = {
    **{
        str(np.dtype(kind)): (lambda kind=kind: np.array(VALUES, dtype=kind))
        for kind in ("f2", "f4", "f8", "c8", "c16", ">f4", ">c16", "g", "G")
    },
    "lists": lambda: VALUES,
    "tuples": lambda: tuple(map(tuple, VALUES)),
    "rows": lambda: [np.array(row) for row in VALUES],
    "tensors": lambda: list(TENSOR),
    "scalars": lambda: [[np.float32(x) for x in row] for row in VALUES],
    "fractions": lambda: [[Fraction(x) for x in row] for row in VALUES],
    "decimals": lambda: [[Decimal(x) for x in row] for row in VALUES],
    "complex": lambda: [[complex(x) for x in row] for row in VALUES],
    "integers and floats": lambda: [[1.5, -2, 0.25], [0, 3, 1]],
    "objects": lambda: np.array(VALUES, dtype=object),
    "matrix": lambda: quiet(lambda: np.matrix(VALUES)),
    "mirrored": lambda: np.array(VALUES)[:, ::-1],
    "transposed": lambda: np.array(VALUES, order="F"),
    "read-only": frozen,
    "elsewhere": lambda: Elsewhere(VALUES),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_lists_are_matrices(name: str) -> None:
    expected = gl.bound(TENSOR)
    for found in (gl.bound(ARRAYS[name]()), gl.bound(gl.Dense(ARRAYS[name]()))):  # type: ignore[arg-type]
        assert found.lower == pytest.approx(expected.lower, rel=1e-12)
        assert float(found.upper) == pytest.approx(float(expected.upper), rel=1e-12)


def test_operators_take_arrays() -> None:
    kernel = np.arange(1.0, 37.0).reshape(2, 2, 3, 3)
    assert gl.bound(gl.Conv(kernel, 5)) == gl.bound(gl.Conv(torch.from_numpy(kernel), 5))
    assert gl.bound(gl.Conv(kernel.tolist(), 5)) == gl.bound(gl.Conv(torch.from_numpy(kernel), 5))
    assert gl.bound(gl.Diagonal(np.array([1.0, -3.0]))).upper == 3.0
    assert gl.bound(gl.Separable((np.eye(2), [[2.0]]))) == gl.bound(
        gl.Separable((torch.eye(2, dtype=torch.float64), torch.tensor([[2.0]])))
    )
    assert gl.distributed.bounds([np.array(VALUES)]) == [gl.bound(TENSOR)]


NO_MATRIX: dict[str, tuple[Callable[[], object], str]] = {
    **{
        f"array of {kind}": (lambda kind=kind: np.ones((2, 2)).astype(kind), r"is an array of .*; expected floating.*astype\(float\)")
        for kind in ("i1", "u1", "i8", "?", "U3", "m8", "V8")
    },
    "empty": (lambda: [], "expected every axis to be at least 1"),
    "no columns": (lambda: np.ones((3, 0)), "expected every axis to be at least 1"),
    "one axis": (lambda: [1.0, 2.0], "expected a matrix"),
    "three axes": (lambda: np.ones((2, 2, 2)), r"type gramlip\.Conv"),
    "a number": (lambda: np.float64(3.0), "expected a matrix"),
    "NaN": (lambda: [[float("nan"), 1.0]], "NaN or infinite"),
    "NaN among fractions": (lambda: [[Decimal("nan"), Fraction(1)]], "NaN or infinite"),
    "infinity": (lambda: np.array([[np.inf]]), "NaN or infinite"),
    "ragged": (lambda: [[1.0, 2.0], [3.0]], "holds a list; expected nested lists of numbers, all rows of the same length"),
    "words": (lambda: [["1.0"]], "holds a str"),
    "truth values": (lambda: [[True, False]], "holds a bool"),
    "nothing": (lambda: [[None, 1.0]], "holds a NoneType"),
    "tensors with a graph": (lambda: [torch.ones(2, requires_grad=True)], "no array"),
    "an integer between floats": (lambda: [[2**53 + 1, 0.5]], "which float64 rounds"),
    "a fraction": (lambda: [[Fraction(1, 3)]], "which float64 rounds"),
    "a decimal": (lambda: [[Decimal("0.1")]], "which float64 rounds"),
    "too large": (lambda: [[10**400]], "that float64 does not"),
    **(
        {"long doubles": (lambda: np.array([[1 + EPS]], dtype=np.longdouble), "which float64 rounds")}
        if (EPS := np.finfo(np.longdouble).eps) < np.finfo(np.float64).eps  # they are doubles on some machines
        else {}
    ),
    "masked": (lambda: np.ma.masked_array(np.ones((2, 2)), mask=np.eye(2)), r"masked array.*filled"),
    "on a GPU": (lambda: Elsewhere(TypeError("implicit conversion")), r"no array \(implicit conversion\)"),
}


@pytest.mark.parametrize("name", NO_MATRIX)
def test_what_is_no_matrix_of_floats_is_refused(name: str) -> None:
    make, says = NO_MATRIX[name]
    for call in (gl.bound, gl.Dense):
        with pytest.raises(gl.InputError, match=says) as error:
            call(make())  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", ["a name", 3.0, None, {1.0}, {"a": 1.0}, np.ndarray, object()], ids=lambda x: type(x).__name__)
def test_what_is_neither_a_layer_nor_a_matrix_has_no_rule(other: object) -> None:
    with pytest.raises(gl.UnsupportedError, match="has no rule"):
        gl.bound(other)  # type: ignore[arg-type]


FAR_OUT = {
    "matrix": lambda m: m,
    "sparse": lambda m: m.to_sparse(),
    "diagonal": lambda m: gl.Diagonal(m * 1.5),
    "separable": lambda m: gl.Separable((m, m.clamp(max=1.0))),
    "convolution": lambda m: gl.Conv(m[None, None], 3),
    "of every size": lambda m: gl.Conv(m[None, None], stride=2, padding=1, padding_mode="replicate"),
}


@pytest.mark.parametrize("kind", FAR_OUT)
@pytest.mark.parametrize("value", [1.1e308, 1e-310], ids=str)
def test_a_norm_outside_of_the_range_of_float64_says_so(kind: str, value: float) -> None:
    if kind == "diagonal" and value > 1:
        value, m = math.inf, torch.full((2, 2), 1.7e308, dtype=torch.float64) * (1 + 1j)
        found = gl.bound(gl.Diagonal(m))
    else:
        m = torch.full((2, 2), value, dtype=torch.float64)
        found = gl.bound(FAR_OUT[kind](m))
    says = "may be" if kind == "of every size" and value > 1 else "is"  # whose lower side comes from another layer
    assert f"the norm {says} outside of the normal range of float64 (2.2e-308 to 1.8e308)" in found.because
    ends = (sys.float_info.max, math.inf) if value > 1 else (0.0, sys.float_info.min)
    assert (found.lower, found.upper) == ends


@pytest.mark.parametrize("name", gl.METHODS)
def test_methods_say_that_a_norm_is_outside_of_the_range(name: str) -> None:
    small = gl.bound(torch.full((2, 2), 1e-310, dtype=torch.float64), method=name)
    assert ("outside of the normal range" in small.because) == (gl.METHODS[name].side != "estimate")
    ordinary = gl.bound(torch.full((2, 2), 1e-300, dtype=torch.float64), method=name)
    assert "outside of the normal range" not in ordinary.because


def test_a_norm_at_the_edge_of_the_range_may_be_outside() -> None:
    edge = torch.tensor([[sys.float_info.max, sys.float_info.max / 2**30]], dtype=torch.float64)
    assert "the norm may be outside of the normal range" in gl.bound(edge).because
    assert "range" not in gl.bound(edge / 2).because
    assert gl.bound(torch.zeros(2, 2, dtype=torch.float64)).because.count("range") == 0
    assert gl.bound(gl.Separable((torch.eye(2),), 0.0)).upper == 0.0
