"""What `bound` and its operators are given: every dtype by its values, and what has no norm refused in one line that says what to type."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gramlip as gl
from gramlip.operators import EIGHT_BITS

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
