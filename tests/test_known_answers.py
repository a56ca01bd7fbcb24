"""Numbers that are known: closed forms, published values, and every trap that broke another library."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import gramlip as gl
from cases import ROUNDING, TRAPS, check, closes, every_size
from gramlip.network.audit import audit
from gramlip.testing import Case, matrix, norm, oracle

WIDTH = 1e-6


def holds(interval: gl.Bound, known: float, rtol: float = WIDTH, digits: float = 0.0) -> None:
    """The interval holds a number known to `digits` (absolute) and is narrow."""
    assert interval.lower <= known + digits
    assert interval.upper >= known - digits
    assert interval.upper <= interval.lower * (1 + rtol)


# ---- n = 20: one, two and two uneven axes --------------------------------------------------------------------------------

LINE = torch.tensor([2.0, 7, -1], dtype=torch.float64)[None, None]
SQUARE = torch.tensor([[2.0, 7, -1], [1, 3, -8], [5, -3, 1]], dtype=torch.float64)[None, None]
WIDE = SQUARE[:, :, :2]


def test_line_circular() -> None:
    holds(gl.bound(gl.Conv(LINE, 20, padding=1, padding_mode="circular"), rtol=WIDTH), 8.0056336379, digits=1e-10)


def test_square_circular() -> None:
    holds(gl.bound(gl.Conv(SQUARE, 20, padding=1, padding_mode="circular"), rtol=WIDTH), 22.9122134817, digits=1e-10)


def test_square_zero_padding() -> None:
    layer = gl.Conv(SQUARE, 20, padding=1)
    holds(gl.bound(layer, rtol=WIDTH, finite=True), 22.7275330200, digits=1e-10)
    holds(gl.bound(layer, rtol=1e-2), 22.7275330200, rtol=1e-2, digits=1e-10)


def test_square_all_frequencies() -> None:
    # 23.0046832 is the largest value on a grid of 512 points, 23.0047380194 the supremum (Nelder and Mead from the best of 2000).
    interval = gl.bound(gl.Conv(SQUARE, padding=1), rtol=WIDTH)
    grid = torch.fft.fft2(SQUARE[0, 0], s=(512, 512)).abs().max()
    assert float(grid) == pytest.approx(23.0046832, abs=5e-8)
    holds(interval, 23.0047380194, digits=1e-9)


def test_two_by_three_circular() -> None:
    holds(gl.bound(gl.Conv(WIDE, 20, padding="same", padding_mode="circular"), rtol=WIDTH), 17.2700390444, digits=1e-10)


def test_random_strided_polyphase_is_not_the_truth() -> None:
    # True 7.56, polyphase grid 7.76, stride 1 10.69 for one kernel: the order holds for any.
    case = Case("random", (4, 3, 3, 3), (7, 7), (2, 2), ((1, 1), (1, 1)), dtype=torch.float64)
    interval = gl.bound(case.operator(), rtol=1e-6, finite=True)
    polyphase = gl.bound(case.operator(), rtol=1e-6, finite=False)
    plain = gl.bound(Case("random", (4, 3, 3, 3), (7, 7), padding=((1, 1), (1, 1)), dtype=torch.float64).operator(), rtol=1e-6)
    assert case.truth * (1 - ROUNDING) <= interval.upper <= case.truth * (1 + 2e-6)
    assert interval.upper <= polyphase.upper < plain.upper / 1.1


# ---- closed forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 7, 9, 11, 15])
def test_second_difference_zero_padding(n: int) -> None:
    line = torch.tensor([1.0, -2, 1], dtype=torch.float64)
    layer = gl.Conv(torch.outer(line, line)[None, None], n, padding=1)
    known = (2 + 2 * math.cos(math.pi / (n + 1))) ** 2
    circular = (2 + 2 * math.cos(math.pi / n)) ** 2
    assert circular < known
    assert oracle(layer) == pytest.approx(known, rel=1e-13)
    holds(gl.bound(layer, rtol=WIDTH, finite=True), known, digits=1e-12)
    assert gl.bound(layer, finite=False).upper >= known * (1 - ROUNDING)


@pytest.mark.parametrize(("n", "known"), [(3, 11.657), (7, 14.805)])
def test_second_difference_in_decimals(n: int, known: float) -> None:
    assert TRAPS[f"circular-grid-n{n}-for-zeros"].truth == pytest.approx(known, abs=5e-4)


@pytest.mark.parametrize("dims", [1, 2])
def test_average_pooling_of_two(dims: int) -> None:
    pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d}[dims](2)
    assert oracle(pool, (1, *(6,) * dims)) == pytest.approx(0.5 ** (dims / 2), rel=1e-14)
    holds(gl.bound(pool, input_size=(6,) * dims), 0.5 ** (dims / 2), rtol=1e-2, digits=1e-15)


def test_average_pooling_of_k_in_two_dimensions_is_one_over_k() -> None:
    for k in (2, 3, 4):
        interval = gl.bound(nn.AvgPool2d(k), input_size=(2 * k, 3 * k))
        assert interval.lower <= 1 / k <= interval.upper <= 1.01 / k


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("size", [None, (5, 6), (9, 9)])
def test_orthogonal_kernel_is_one(mode: str, size: tuple[int, ...] | None) -> None:
    case = Case("orthogonal", (4, 4, 3, 3), (5, 6), padding=((1, 1), (1, 1)), padding_mode=mode, dtype=torch.float64)
    interval = gl.bound(case.operator(size), rtol=1e-6)
    assert 1 - 1e-13 <= interval.upper <= 1 + 1e-6
    assert interval.lower <= 1 + 1e-13
    if size is None or mode == "circular":
        assert interval.lower >= 1 - 1e-6


def test_orthogonal_matrix_is_one() -> None:
    holds(gl.bound(Case("orthogonal", (64, 64), dtype=torch.float64).operator(), rtol=WIDTH), 1.0, digits=1e-13)


@pytest.mark.parametrize(("kernel", "truth"), [(3, 9.0), (5, 25.0), (7, 49.0)])
def test_positive_kernel_is_its_sum(kernel: int, truth: float) -> None:
    case = TRAPS[f"positive-kernel-{kernel}"]
    assert case.truth == pytest.approx(truth, rel=1e-13)
    closes(case)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_torch_spectral_norm_leaves_a_positive_kernel_at_k(kernel: int) -> None:
    layer = nn.Conv2d(1, 1, kernel, padding=kernel // 2, padding_mode="circular", bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    normalised = nn.utils.parametrizations.spectral_norm(layer)
    assert oracle(normalised, (1, 8, 8)) == pytest.approx(kernel, rel=1e-5)  # not 1
    interval = gl.bound(normalised, input_size=(8, 8))
    assert interval.upper >= kernel * (1 - 1e-5)


def test_mlp_product_of_its_matrices() -> None:
    layers = _mlp()
    product = layers[0]
    for weight in layers[1:]:
        product = weight @ product
    holds(gl.bound(product, rtol=WIDTH), 36.4822296, digits=5e-8 * 10)
    chain = math.prod(float(gl.bound(weight, rtol=1e-6).upper) for weight in layers)
    assert 43.3055737 * (1 - 1e-8) <= chain <= 43.3055737 * (1 + 1e-5)


def _mlp() -> list[torch.Tensor]:
    """The small network of positive weights, from tests/data."""
    from safetensors.torch import load_file

    state = load_file(Path(__file__).parent / "data" / "mlp-2-10-30-20-2.safetensors")
    return [state[name].double() for name in sorted(state) if state[name].ndim == 2]


# ---- traps: each of these broke a published library (docs/conformance.md) -------------------------------------------------


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str) -> None:
    check(TRAPS[name])


@pytest.mark.parametrize("name", [name for name, case in TRAPS.items() if case.dims and case.padding_mode in ("zeros", "circular")])
def test_trap_at_every_size(name: str) -> None:
    case = TRAPS[name]
    every_size([c for c in (case, case.at(tuple(n + 1 for n in case.size)), case.at(tuple(n + 5 for n in case.size))) if c.runs()])


@pytest.mark.parametrize(
    "name", ["groups-multiplied", "stride-ignored", "wrong-side-of-transposed", "dilation-with-stride", "kernel-is-stride-with-dilation"]
)
def test_trap_is_not_loose_either(name: str) -> None:
    closes(TRAPS[name])


def test_groups_by_their_largest_not_their_product() -> None:
    small = gl.Conv(torch.full((4, 1, 1), 0.1), 3, groups=4)
    large = gl.Conv(torch.full((4, 1, 1), 3.0), 3, groups=4)
    holds(gl.bound(small), 0.1, rtol=1e-2, digits=1e-8)
    holds(gl.bound(large), 3.0, rtol=1e-2)


def test_a_weight_of_1e_5_is_1e_5() -> None:
    holds(gl.bound(torch.full((1, 1), 1e-5, dtype=torch.float64), rtol=WIDTH), 1e-5)


@pytest.mark.parametrize("kernel", ["zero", "laplacian", "sobel", "tiny"])
def test_no_nan(kernel: str) -> None:
    for mode in ("zeros", "circular", "reflect", "replicate"):
        interval = gl.bound(Case(kernel, (2, 2, 3, 3), (5, 5), padding=((1, 1), (1, 1)), padding_mode=mode).operator())
        assert math.isfinite(interval.lower)
        assert math.isfinite(interval.upper)
        assert (interval.upper == 0.0) == (kernel == "zero")


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("shape", [(3, 3), (7, 7), (7, 1), (4, 4)])
@pytest.mark.parametrize("kernel", ["ones", "corner", "laplacian", "zero", "tiny", "alternating"])
def test_padding_that_repeats_inputs(mode: str, shape: tuple[int, int], kernel: str) -> None:
    case = Case(kernel, (1, 1, *shape), (8, 8), padding=tuple(((k - 1) // 2, k // 2) for k in shape), padding_mode=mode)
    check(case)


def test_repeated_inputs_are_tighter_than_the_product_of_norms() -> None:
    # 7x7 Laplacian: the norm of the padding times the norm of the convolution gives 30.1.
    line = torch.zeros(3, 3, dtype=torch.float64)
    line[1] += torch.tensor([1.0, -2, 1])
    line[:, 1] += torch.tensor([1.0, -2, 1])
    for mode in ("reflect", "replicate"):
        layer = gl.Conv(line[None, None], 7, padding=1, padding_mode=mode)
        assert oracle(layer) * (1 - ROUNDING) <= gl.bound(layer).upper <= oracle(layer) * 1.01


def test_power_iteration_fills_only_the_lower_side() -> None:
    interval = gl.bound(TRAPS["power-iteration-as-a-bound"].operator(), method="power")
    assert interval.upper == math.inf
    assert interval.lower <= TRAPS["power-iteration-as-a-bound"].truth * (1 + ROUNDING)


@pytest.mark.parametrize(("geometry", "known"), [((3, 2, 1), 2.0), ((3, 1, 1), 3.0), ((2, 2, 0), 1.0)])
@pytest.mark.parametrize("size", [None, (9, 9)])
def test_overlapping_max_pooling(geometry: tuple[int, ...], known: float, size: tuple[int, ...] | None) -> None:
    interval = gl.bound(nn.MaxPool2d(*geometry), input_size=size)
    assert interval.lower == known == interval.upper


def test_max_pooling_attains_it() -> None:
    pool, x = nn.MaxPool2d(3, 2, 1), torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 3, 3] = 1.0
    assert float((pool(x) - pool(0 * x)).norm() / x.norm()) == 2.0


def test_unknown_layer_is_an_error_not_one() -> None:
    class Swish(nn.Module):
        pass

    with pytest.raises(gl.UnsupportedError, match="Swish has no rule"):
        gl.bound(Swish())


@pytest.mark.parametrize(
    "layer",
    [nn.Sequential(nn.Conv1d(2, 2, 3)), nn.ReLU(inplace=True), nn.LSTM(2, 2)],
    ids=["sequential", "activation", "recurrent"],
)
def test_what_has_no_rule_is_never_guessed(layer: nn.Module) -> None:
    with pytest.raises(gl.UnsupportedError):
        gl.bound(layer, input_size=(8,))


class Residual(nn.Module):
    """`5x + f(x)`, certified at 0.909 by a library that dropped the 5x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual map."""
        return 5 * x + self.f(x)


def test_scaled_residual_is_not_dropped() -> None:
    model = Residual()
    report = audit(model, torch.zeros(1, 4))
    jacobian = norm(matrix(model, (4,)))
    assert report.upper >= jacobian * (1 - ROUNDING)
    assert report.lower <= jacobian * (1 + ROUNDING)


def test_identity_residual_is_at_most_one_plus_f() -> None:
    class Identity(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.f(x)

    model = Identity()
    report = audit(model, torch.zeros(1, 4))
    jacobian = norm(matrix(model, (4,)))
    assert jacobian * (1 - ROUNDING) <= report.upper <= (1 + oracle(model.f, (4,))) * 1.01


@pytest.mark.parametrize("scale", [1.7e308, 5e-324, 1e-320, 2e-309])
@pytest.mark.parametrize("kernel", [False, True])
def test_a_norm_beyond_the_range_of_floats_says_so(scale: float, kernel: bool) -> None:
    weight = torch.full((3, 3, 3, 3) if kernel else (3, 3), scale, dtype=torch.float64)
    found = gl.bound(gl.Conv(weight, input_size=5, padding=1) if kernel else weight)
    beyond = found.upper == math.inf or found.lower == 0.0
    assert beyond == ("outside of the normal range of float64" in found.because)
    assert beyond or found.lower > 0.0
    assert "outside" not in gl.bound(torch.zeros(3, 3)).because + gl.bound(torch.eye(3)).because
