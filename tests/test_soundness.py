"""No upper bound below the truth, no lower bound above it: every case against the real torch module in float64."""

from __future__ import annotations

from collections import defaultdict

import pytest
from torch import nn

import gramlip as gl
from cases import LINEAR, ROUNDING, Case, cases, check, closes, every_size, theorem
from gramlip.testing import KERNELS
from oracle import oracle

NORMAL = 2.0**-1022  # below it an interval is [0, NORMAL]: a thread may flush what is smaller (docs/rounding.md#r1-weights)
TABLE = cases()


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_interval_holds_the_truth(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", [case for case in TABLE if case.dims], ids=lambda case: case.name)
def test_padding_theorem(case: Case) -> None:
    theorem(case)


@pytest.mark.parametrize("case", [case for case in TABLE if case.dims][::4], ids=lambda case: case.name)
def test_interval_without_the_finite_layers_own_certificate(case: Case) -> None:
    check(case, finite=False)


def test_the_table_is_large_and_even() -> None:
    convolutions = [case for case in TABLE if case.dims]
    assert sum(case.padding_mode in ("zeros", "circular") for case in convolutions) >= 2000
    assert len({case.name for case in TABLE}) == len(TABLE)
    for field, values in {
        "dims": (0, 1, 2, 3),
        "padding_mode": ("zeros", "circular", "reflect", "replicate"),
        "transposed": (False, True),
        "kernel": KERNELS,
    }.items():
        for value in values:
            assert sum(getattr(case, field) == value for case in TABLE) >= 30, (field, value)
    for mode in ("zeros", "circular", "reflect", "replicate"):
        of_mode = [case for case in convolutions if case.padding_mode == mode]
        for trait in (
            lambda case: max(case.stride) > 1,
            lambda case: max(case.dilation) > 1,
            lambda case: case.groups > 1,
            lambda case: case.padding == "same",
            lambda case: not case.plain,
            lambda case: any(k % 2 == 0 for k in case.shape[2:]),
            lambda case: any(n < k for n, k in zip(case.size, case.shape[2:], strict=True)),
            lambda case: any(n % s for n, s in zip(case.size, case.stride, strict=True)),
        ):
            assert sum(map(trait, of_mode)) >= 10


def _layers() -> list[list[Case]]:
    """Cases of one layer at several sizes, together."""
    found: dict[Case, list[Case]] = defaultdict(list)
    for case in TABLE:
        if case.dims:
            found[case.at((1,) * case.dims)].append(case)
    return list(found.values())


@pytest.mark.parametrize(
    "layer", [layer for i, layer in enumerate(_layers()) if i % 4 == 0 or layer[0].label], ids=lambda layer: layer[0].name
)
def test_interval_of_every_size_holds_at_each_size(layer: list[Case]) -> None:
    every_size(layer)


@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: kind.__name__)
def test_described_layer(kind: type) -> None:
    module, shape = LINEAR[kind]
    sized = isinstance(module, nn.Linear | nn.Identity | nn.Flatten | nn.Unflatten)
    interval = gl.bound(module) if sized else gl.bound(module, input_size=shape[1:])
    truth = oracle(module, shape)
    assert interval.upper >= truth * (1 - ROUNDING)
    assert interval.lower <= truth * (1 + ROUNDING)
    assert interval.rtol <= 1e-2


# ---- tightness: apart from soundness, with its own numbers ---------------------------------------------------------------

FLAT_AND_PEAKED = ("random", "wave", "orthogonal", "near_orthogonal", "laplacian", "ones", "rank_one")
CIRCULAR = [
    Case(k, (3, 2, 3, 3), (6, 5), padding=((1, 1), (1, 1)), padding_mode="circular", seed=s) for k in FLAT_AND_PEAKED for s in (0, 1)
]
CIRCULAR += [Case(k, (3, 2, 4, 4), (6, 6), (2, 2), ((2, 1), (1, 2)), "circular") for k in FLAT_AND_PEAKED]
EVERY = [
    Case(k, shape, (1,) * (len(shape) - 2), dilation=(d,) * (len(shape) - 2))
    for k in FLAT_AND_PEAKED
    for shape, d in (((3, 2, 5), 1), ((2, 3, 3, 3), 2))
]
SMALL = [
    Case(k, (3, 3, 3, 3), (n, n), padding=((1, 1), (1, 1)), padding_mode=mode)
    for k in FLAT_AND_PEAKED
    for n in (4, 7)
    for mode in ("zeros", "reflect", "replicate")
]


@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
@pytest.mark.parametrize("case", CIRCULAR, ids=lambda case: case.name)
def test_circular_layer_closes(case: Case, rtol: float) -> None:
    closes(case, rtol)


@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_input_size_closes(case: Case, rtol: float) -> None:
    interval = gl.bound(case.operator(None), rtol=rtol)
    assert interval.upper <= interval.lower * (1 + rtol), str(interval)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_layer_of_a_size_closes(case: Case) -> None:
    closes(case)


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (1, 5)], ids=str)
@pytest.mark.parametrize("kernel", ["random", "orthogonal", "near_orthogonal", "ill_scaled", "rank_one", "denormal", "huge"])
def test_matrix_closes(kernel: str, shape: tuple[int, int]) -> None:
    closes(Case(kernel, shape), 1e-6)


@pytest.mark.parametrize("case", [case for case in cases("zeros", "circular") if case.truth >= NORMAL][::7], ids=lambda case: case.name)
def test_small_layer_of_the_table_closes(case: Case) -> None:
    closes(case)
