"""Matrices whose rows lie on several ranks: the interval from the sum of their Gram matrices, against LAPACK's singular values."""

import pytest
import torch

import gramlip as gl
from gramlip.norm.certify import certify_sum
from gramlip.norm.gram_symbol import Part, SummedGram
from gramlip.numerics import rounding as rd


def bounded(weight, cuts, rtol):
    """The interval of a tall matrix from its rows, cut at these places."""
    parts = [Part(rows) for rows in weight.tensor_split(cuts)]
    exponent = max((e for part in parts if (e := part.exponent()) is not None), default=0)
    grams, norms = zip(*(part.gram(exponent) for part in parts), strict=True)
    return certify_sum(SummedGram(sum(grams), len(weight) + len(parts), rd.hypot_up(norms), exponent), rtol, "in parts")


def check(dtype=torch.float32, shape=(60, 9), cuts=(20, 20, 47), scale=1.0, rtol=1e-6):
    """Rows of ranks on very different scales, one rank without rows."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*shape, dtype=torch.complex128, generator=generator)
    weight = weight * scale * torch.logspace(0, 2, len(weight), dtype=torch.float64)[:, None]
    weight = (weight if dtype.is_complex else weight.real).to(dtype)
    bound = bounded(weight, cuts, rtol)
    unit = 2.0 ** round(torch.tensor(scale, dtype=torch.float64).log2().item())
    wide = weight.to(torch.complex128 if dtype.is_complex else torch.float64) / unit
    norm = float(torch.linalg.svdvals(wide)[0]) * unit
    assert bound.lower <= norm * (1 + 1e-13)
    assert bound.upper >= norm * (1 - 1e-13)
    assert bound.rtol <= rtol


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("cuts", [(), (1,), (20, 20, 47), (0, 60)])
def test_the_norm_lies_in_the_interval(dtype, cuts):
    check(dtype, cuts=cuts)


@pytest.mark.parametrize("scale", [1e-290, 1e290])
def test_the_scale_is_that_of_the_largest_entry_of_all(scale):
    check(torch.float64, scale=scale)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (5, 5), (300, 130)])
def test_shapes(shape):
    check(shape=shape, cuts=(1, 2))


def test_no_rows_and_zeros():
    assert bounded(torch.zeros(4, 3), (2,), 1e-2).upper == 0.0
    one = bounded(torch.eye(3), (0, 3, 3), 1e-9)
    assert one.lower <= 1.0 <= one.upper


def test_a_width_that_rounding_forbids_is_said_to_be_wider():
    bound = bounded(torch.randn(50, 20, generator=torch.Generator().manual_seed(0)), (9,), 1e-300)
    assert "wider than asked for" in bound.because
    assert bound.rtol < 1e-9


def test_the_interval_of_one_process_is_as_wide():
    weight = torch.randn(200, 40, generator=torch.Generator().manual_seed(2)).double()
    whole, parts = gl.bound(weight, rtol=1e-3), bounded(weight, (70, 130), 1e-3)
    assert parts.upper == pytest.approx(whole.upper, rel=1e-12)
    assert parts.lower == pytest.approx(whole.lower, rel=1e-12)
