"""Every entry of METHODS: never on the wrong side of the real torch layer, refused where it does not hold, with its source."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import gramlip as gl
from gramlip.errors import InputError
from gramlip.norm.methods import METHODS
from gramlip.testing.cases import Case, cases

PUBLISHED = sorted(set(METHODS) - {"certify"})
SLOW = ("power", "tensor_norm")  # hundreds of steps for each case
TABLE = [case for case in cases() if case.truth >= 0.0][::9]  # every ninth case of all geometries and adversaries
ORACLE = 1e-12  # rounding of the oracle


def kernel(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def circular(weight: torch.Tensor, n: int, **options: object) -> gl.Conv:
    half = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in weight.shape[2:]]
    return gl.Conv(weight, n, padding=half, padding_mode="circular", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_never_on_the_wrong_side(name: str) -> None:
    method, accepted = METHODS[name], 0
    for case in TABLE[:: 5 if name in SLOW else 1]:
        try:
            bound = method(case.operator())
        except InputError:
            continue
        accepted += 1
        assert bound.lower <= case.truth * (1 + ORACLE), (case.name, bound.lower, case.truth)
        assert bound.upper >= case.truth * (1 - ORACLE), (case.name, bound.upper, case.truth)
        if method.side in ("lower", "estimate"):
            assert bound.upper == (math.inf if bool(case.weight().any()) else 0.0)
        if method.side == "exact":
            assert bound.upper - bound.lower <= 1e-10 * METHODS["frobenius"].value(case.operator()) + 1e-307, case.name
    assert accepted >= 10


SIZED = ("delattre2023", "power", "sedghi2019", "senderovich2022")  # defined at one input size


@pytest.mark.parametrize("name", PUBLISHED)
def test_holds_for_every_input_size(name: str) -> None:
    method = METHODS[name]
    for mode, weight in (("zeros", kernel(2, 2, 3, 3)), ("circular", kernel(2, 3, 3, seed=1))):
        geometry = {"padding": 1, "padding_mode": mode}
        if name in SIZED:
            with pytest.raises(InputError, match=r"circular|input size"):
                method(gl.Conv(weight, **geometry))  # type: ignore[arg-type]
            continue
        bound = method(gl.Conv(weight, **geometry))  # type: ignore[arg-type]
        for n in (3, 6, 9):
            size = (n,) * (weight.ndim - 2)
            case = Case("random", tuple(weight.shape), size, padding=((1, 1),) * len(size), padding_mode=mode, dtype=torch.float64)
            module = case.module()
            with torch.no_grad():
                module.weight.copy_(weight)  # type: ignore[union-attr,operator]
            assert bound.upper >= gl.testing.oracle(module, case.input_shape) * (1 - ORACLE)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.side in ("exact", "upper", "lower", "estimate", "interval")
    assert method.reads in ("blocks", "kernel", "layer")
    assert re.search(r"arXiv \d{4}\.\d{5}|docs/", method.source)
    assert method.valid_for
    assert len(method.doc) > 20


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, 1e-300, 1e300])
def test_scale(name: str, scale: float) -> None:
    method = METHODS[name]
    op = circular(kernel(3, 2, 3, 3), 5)
    scaled = circular(kernel(3, 2, 3, 3) * scale, 5)
    assert method.value(scaled) == pytest.approx(method.value(op) * scale, rel=1e-6, abs=0.0)
    bound, plain = method(scaled), method(op)
    if scale == 0.0:
        assert (bound.lower, bound.upper) == (0.0, 0.0)
    else:
        assert bound.lower == pytest.approx(plain.lower * scale, rel=1e-9)
        assert bound.upper == pytest.approx(float(plain.upper) * scale, rel=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_complex_and_half_weights(name: str) -> None:
    for dtype in (torch.complex128, torch.bfloat16):
        weight = kernel(3, 2, 3, 3).to(dtype)
        if dtype.is_complex:
            weight = weight + 1j * kernel(3, 2, 3, 3, seed=1)
        truth = METHODS["sedghi2019"](circular(weight, 5))
        bound = METHODS[name](circular(weight, 5))
        assert bound.lower <= truth.upper
        assert bound.upper >= truth.lower


def test_known_answers() -> None:
    for weight, n, expected in (
        ([[[2.0, 7.0, -1.0]]], 20, 8.0056336379),
        ([[[[2.0, 7.0, -1.0], [1.0, 3.0, -8.0], [5.0, -3.0, 1.0]]]], 20, 22.9122134817),
        ([[[[2.0, 7.0, -1.0], [1.0, 3.0, -8.0]]]], 20, 17.2700390444),
    ):
        op = circular(torch.tensor(weight, dtype=torch.float64), n)
        for name, options in {"sedghi2019": {}, "senderovich2022": {}, "delattre2023": {"n_iter": 14}, "gram": {"n_iter": 14}}.items():
            assert METHODS[name].value(op, **options) == pytest.approx(expected, rel=1e-6), name
        assert expected * (1 - 1e-3) <= METHODS["power"].value(op, n_iter=1000) <= expected * (1 + 1e-10)


def test_polyphase_is_exact_where_the_stride_divides_the_size() -> None:
    case = Case("random", (3, 2, 3, 3), (6, 6), (2, 3), ((1, 1), (1, 1)), "circular", dtype=torch.float64)
    assert METHODS["senderovich2022"].value(case.operator()) == pytest.approx(case.truth, rel=1e-12)
    with pytest.raises(InputError, match="stride that divides"):
        METHODS["senderovich2022"](case.at((5, 5)).operator())
    with pytest.raises(InputError, match="stride 1"):
        METHODS["sedghi2019"](case.operator())


def test_the_circular_grid_is_refused_for_zero_padding() -> None:
    line = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    op = gl.Conv(torch.outer(line, line)[None, None], input_size=7, padding=1)
    for name in ("sedghi2019", "senderovich2022", "delattre2023"):
        with pytest.raises(InputError, match="circular"):
            METHODS[name](op)
    assert METHODS["gram"](op).upper >= (2 + 2 * math.cos(math.pi / 8)) ** 2


def test_an_unknown_size_is_never_taken_for_that_of_the_kernel() -> None:
    for name in ("delattre2023", "sedghi2019", "senderovich2022", "power"):
        with pytest.raises(InputError, match="every input size"):
            METHODS[name].value(gl.Conv(kernel(1, 1, 3, 3), padding=1, padding_mode="circular"))


def test_groups_take_the_maximum_never_the_product() -> None:
    weight = 0.1 * kernel(8, 1, 3, 3)
    op = circular(weight, 6, groups=8)
    truth = max(METHODS["sedghi2019"].value(circular(w[None], 6)) for w in weight)
    for name in sorted(METHODS):
        if METHODS[name].side in ("exact", "upper", "interval"):
            assert METHODS[name].value(op) >= truth * (1 - 1e-12), name
    for name in ("sedghi2019", "senderovich2022", "gram", "delattre2023"):
        assert METHODS[name].value(op) == pytest.approx(truth, rel=1e-6)


def test_torch_is_what_torch_divides_by() -> None:
    for layer in (nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Linear(5, 4)):
        layer = layer.double()
        op = gl.describe(layer) if isinstance(layer, nn.Linear) else gl.describe(layer, 8)
        weight = layer.weight.detach().clone()
        normalised = nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=500)
        ratio = weight.norm() / normalised.weight.detach().norm()
        assert METHODS["torch"].value(op) == pytest.approx(float(ratio), rel=1e-9)


def test_power_uses_the_true_geometry() -> None:
    for case in TABLE[::40]:
        if case.dims:
            value = METHODS["power"].value(case.operator(), n_iter=1000)
            assert value == pytest.approx(case.truth, rel=2e-2, abs=1e-300), case.name


def test_fantastic_four() -> None:
    weight = kernel(4, 3, 3, 5)
    op = gl.Conv(weight, padding=1)
    unfoldings = [
        weight.permute(p).reshape(r, -1) for p, r in (((0, 2, 1, 3), 12), ((0, 3, 1, 2), 20), ((0, 1, 2, 3), 4), ((0, 2, 3, 1), 60))
    ]
    expected = math.sqrt(15) * min(float(torch.linalg.matrix_norm(u, 2)) for u in unfoldings)
    assert METHODS["singla2021"].value(op) == pytest.approx(expected, rel=1e-12)
    assert METHODS["singla2021"].value(op, n_iter=3) <= expected * (1 + 1e-12)


def test_lipgrid_counts_distinct_points() -> None:
    weight = kernel(2, 3, 3, 3)
    angles = torch.arange(10, dtype=torch.float64) * (2 * math.pi / 10)
    waves = torch.exp(-1j * angles[:, None] * torch.arange(3))
    symbol = torch.einsum("oixy,ax,by->aboi", weight.to(waves.dtype), waves, waves)
    expected = float(torch.linalg.vector_norm(symbol, dim=(-2, -1)).max()) / (1 - 2 / 10)
    assert METHODS["araujo2021"].value(gl.Conv(weight), samples=10) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="expected at least 4"):
        METHODS["araujo2021"].value(gl.Conv(weight), samples=3)


def test_norm2toep_is_gram_iteration_on_the_taps() -> None:
    weight = kernel(3, 3, 3)
    taps, steps = weight, 2
    for _ in range(steps):
        k = taps.shape[-1]
        taps = torch.nn.functional.conv1d(taps.transpose(0, 1), taps.transpose(0, 1), padding=k - 1)
    expected = float(taps.abs().sum((1, 2)).max()) ** (2.0**-steps)
    assert METHODS["norm2toep"].value(gl.Conv(weight), n_iter=steps) == pytest.approx(expected, rel=1e-12)
    assert METHODS["norm2toep"].value(gl.Conv(weight), n_iter=1) == pytest.approx(METHODS["aol"].value(gl.Conv(weight)), rel=1e-12)


def test_gram_keeps_its_graph() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    upper = gl.bound(layer, 8, method="gram").upper
    assert isinstance(upper, torch.Tensor)
    upper.backward()
    gradient = layer.weight.grad
    assert gradient is not None
    assert float((gradient * layer.weight.detach()).sum()) == pytest.approx(float(upper.detach()), rel=1e-5)  # homogeneous of degree 1
    assert isinstance(gl.bound(layer, 8, method="singla2021").upper, float)
    with torch.no_grad():
        assert isinstance(gl.bound(layer, 8, method="gram").upper, float)


@pytest.mark.parametrize("scale", [1.7e308, 1e290, 1e-290, 1e-310])
def test_gradients_at_the_ends_of_the_range(scale: float) -> None:
    weight = (torch.tensor([[1.0, 0.0], [0.2, 0.5]], dtype=torch.float64) * scale).requires_grad_()
    gl.bound(weight, method="gram").upper.backward()
    near = torch.tensor([[1.0, 0.0], [0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    torch.linalg.matrix_norm(near, 2).backward()
    assert torch.allclose(weight.grad, near.grad, atol=1e-3)


def test_refuses_other_operators() -> None:
    with pytest.raises(InputError, match=f"a Diagonal was given; expected {METHODS['gram'].valid_for}"):
        METHODS["gram"](gl.Diagonal(torch.ones(2)))
