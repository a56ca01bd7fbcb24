"""Geometries that no table foresaw: drawn and shrunk by hypothesis, against the real torch layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import gramlip as gl
from cases import ROUNDING, Case, check, theorem
from gramlip.testing import KERNELS

DRAWN = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


@st.composite
def layers(draw: st.DrawFn) -> Case:
    """A layer that torch accepts, small enough for the oracle."""
    dims = draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    transposed = mode == "zeros" and draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = (groups * draw(st.integers(1, 2)), draw(st.integers(1, 2)))

    def each(values: st.SearchStrategy) -> tuple:
        return tuple(draw(values) for _ in range(dims))

    case = Case(
        draw(st.sampled_from([k for k in KERNELS if k != "denormal"])),
        (*channels, *each(st.integers(1, 5))),
        each(st.integers(1, 9 - 3 * (dims - 1))),
        each(st.integers(1, 4)),
        each(st.tuples(st.integers(0, 7), st.integers(0, 7))),
        mode,
        each(st.integers(1, 4)),
        groups,
        transposed,
        each(st.integers(0, 3)) if transposed else (0,) * dims,
        draw(st.sampled_from([torch.float64, torch.float32, torch.complex64])),
        draw(st.integers(0, 5)),
    )
    assume(case.runs())
    return case


@DRAWN
@given(layers())
def test_interval_holds_the_truth(case: Case) -> None:
    check(case)


@settings(DRAWN, max_examples=400)
@given(layers())
def test_padding_theorem(case: Case) -> None:
    theorem(case)


@settings(DRAWN, max_examples=80)
@given(layers(), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_every_size_holds_at_any_size(case: Case, size: tuple[int, int]) -> None:
    other = case.at(size[: case.dims])
    assume(other.runs())
    upper = float(gl.bound(case.operator(None)).upper)
    assert upper >= case.truth * (1 - ROUNDING)
    assert upper >= other.truth * (1 - ROUNDING)


@settings(DRAWN, max_examples=150)
@given(layers())
def test_output_size_is_torchs(case: Case) -> None:
    out = case.module()(torch.zeros(1, *case.input_shape, dtype=case.dtype))
    assert tuple(out.shape[2:]) == case.operator().output_size


@settings(DRAWN, max_examples=200)
@given(layers(), st.integers(1, 3))
def test_what_torch_refuses_is_refused(case: Case, more: int) -> None:
    """Shrink the input until torch says no: the library must say no as well, with one line."""
    size = tuple(max(1, n - more) for n in case.size)
    smaller = case.at(size)
    try:
        smaller.module()(torch.zeros(1, *smaller.input_shape, dtype=case.dtype))
    except (RuntimeError, ValueError):
        with pytest.raises(gl.InputError) as error:
            smaller.operator()
        assert "\n" not in str(error.value)
    else:
        assert smaller.operator().output_size is not None


@DRAWN
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(list(KERNELS)), st.integers(0, 100), st.sampled_from([1e-2, 1e-7]))
def test_matrices(rows: int, columns: int, kernel: str, seed: int, rtol: float) -> None:
    case = Case(kernel, (rows, columns), dtype=torch.float64, seed=seed)
    interval = gl.bound(case.operator(), rtol=rtol)
    assert interval.lower * (1 - ROUNDING) <= case.truth <= interval.upper * (1 + ROUNDING)
    if kernel not in ("denormal", "zero"):
        assert interval.rtol <= rtol
