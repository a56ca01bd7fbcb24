"""The same on a GPU: every case of the table against the oracle, whatever the settings, and steps that wait for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import gramlip as gl
from cases import ROUNDING, Case, cases, holds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
TABLE = cases() if torch.cuda.is_available() else cases()[:1]
WIDE = [
    Case(kernel, shape, size, stride, tuple((k // 2, k // 2) for k in shape[2:]), mode, groups=groups, dtype=dtype)
    for mode in ("circular", "zeros", "replicate")
    for kernel, shape, size, stride, groups, dtype in (
        ("random", (64, 64, 3, 3), (5, 5), (1, 1), 1, torch.float32),
        ("near_orthogonal", (128, 128, 3), (9,), (1,), 1, torch.float64),
        ("rank_one", (96, 48, 3, 3), (5, 4), (2, 2), 2, torch.float16),
        ("ill_scaled", (140, 140, 3), (7,), (1,), 1, torch.float32),
        ("random", (48, 48, 3, 3), (4, 4), (1, 1), 1, torch.complex64),
    )
]


def moved(case: Case) -> gl.Conv | gl.Dense:
    operator = case.operator()
    return replace(operator, weight=operator.weight.cuda())


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_interval_holds_the_truth(case: Case) -> None:
    holds(case, gl.bound(moved(case)))


@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
@pytest.mark.parametrize("case", [*TABLE[::11], *WIDE], ids=lambda case: case.name)
def test_interval_without_the_finite_layers_own_certificate(case: Case, rtol: float) -> None:
    holds(case, gl.bound(moved(case), rtol=rtol, finite=False))


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_wide_layers_close(case: Case) -> None:
    interval = gl.bound(moved(case))
    holds(case, interval)
    if case.padding_mode == "circular":
        assert interval.rtol <= 1e-2


@pytest.fixture(params=["highest", "high", "medium"])
def matmul(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    assert torch.get_float32_matmul_precision() == request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_settings_of_float32_products_change_no_proof(case: Case, matmul: str) -> None:
    holds(case, gl.bound(moved(case), rtol=1e-4))


def test_intervals_of_float32_at_convergence() -> None:
    source = torch.Generator().manual_seed(0)
    for side in (2, 8, 33):
        for _ in range(40):
            weight = torch.randn(side, side, generator=source)
            truth = float(torch.linalg.svdvals(weight.double())[0])
            interval = gl.bound(gl.Dense(weight.cuda()), rtol=1e-10)
            assert interval.lower <= truth * (1 + ROUNDING)
            assert truth * (1 - ROUNDING) <= interval.upper <= truth * (1 + 2e-10)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_gram_steps_wait_for_nothing(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8, 3, 3, dtype=dtype).cuda().requires_grad_()
    gl.conv_gram_norm(weight, input_size=16).backward()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        gl.conv_gram_norm(weight, input_size=16).backward()
        gl.gram_norm(weight.flatten(1), 8).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("channels", [256, 1024, 2048])
@pytest.mark.parametrize("size", [7, None])
def test_memory_beyond_the_weights(channels: int, size: int | None) -> None:
    kernel = 3 if channels < 2048 else 2
    weight = torch.randn(channels, channels, kernel, device="cuda") / channels**0.5
    gl.bound(gl.Conv(weight, size, 1, 1))  # what the libraries keep for themselves
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = gl.bound(gl.Conv(weight, size, 1, 1))
    assert torch.cuda.max_memory_allocated() - before <= 512 << 20
    assert found.rtol <= 0.05
