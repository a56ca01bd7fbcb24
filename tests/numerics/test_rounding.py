"""Where rounding decides: directed scalars against fractions, intervals against exact arithmetic, settings left alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gramlip as gl
from cases import Case
from gramlip.norm.autocorrelation import Taps, spectral
from gramlip.norm.branch_and_bound import BranchAndBound
from gramlip.norm.finite_layer import Certificate, FiniteLayer
from gramlip.norm.gram_symbol import GramSymbol, SquaresInSingle
from gramlip.numerics import eigenvalues
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import decimals
from gramlip.testing import weight

POSITIVE = st.floats(0, 1e300, allow_nan=False)
MODERATE = st.floats(0, 1e150, allow_nan=False)
FEW = settings(max_examples=400, deadline=None, derandomize=True)
NORMAL = Fraction(rd.TINY)


# ---- scalars -------------------------------------------------------------------------------------------------------------


@FEW
@given(st.lists(POSITIVE, max_size=5))
def test_add_up(terms: list[float]) -> None:
    total = rd.add_up(*terms)
    assert total == math.inf or Fraction(total) >= sum(map(Fraction, terms))


@FEW
@given(MODERATE, MODERATE)
@example(5e-324, 0.5)
@example(1e-200, 1e-200)
def test_products(a: float, b: float) -> None:
    exact = Fraction(a) * Fraction(b)
    assert Fraction(rd.mul_up(a, b)) >= exact
    assert Fraction(rd.mul_down(a, b)) <= exact
    assert rd.mul_down(a, b) >= 0.0


@FEW
@given(POSITIVE)
@example(11.0)
@example(5e-324)
@example(3.0)
@example(2.0**-1022)
def test_roots(x: float) -> None:
    assert Fraction(rd.sqrt_up(x)) ** 2 >= Fraction(x)
    assert Fraction(rd.sqrt_down(x)) ** 2 <= Fraction(x)


def test_roots_of_the_integers() -> None:
    for n in range(1, 3000):
        assert Fraction(rd.sqrt_up(float(n))) ** 2 >= n
        assert Fraction(rd.sqrt_down(float(n))) ** 2 <= n


@FEW
@given(st.lists(st.floats(0, 1e307, allow_nan=False), max_size=4))
@example([1e-320, 1e-320])
@example([3.0, 4.0])
@example([1e-300, 1.0])
@example([1.7e308, 1.0])
def test_hypot_up(terms: list[float]) -> None:
    found = rd.hypot_up(terms)
    assert found == math.inf or Fraction(found) ** 2 >= sum(Fraction(t) ** 2 for t in terms)


@FEW
@given(st.floats(1, 1e15))
def test_gamma(n: float) -> None:
    product = Fraction(n) * Fraction(1, 2**53)
    assert Fraction(rd.gamma(n)) >= product / (1 - product)


@FEW
@given(POSITIVE)
def test_up_and_down_are_strict(x: float) -> None:
    assert rd.up(x) > x
    assert rd.down(x) < x or x == rd.down(x) == 0.0


@FEW
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_printed_decimals_are_outward(x: float) -> None:
    assert Fraction(decimals(x, upward=False)) <= Fraction(x) <= Fraction(decimals(x, upward=True))


@FEW
@given(st.tuples(MODERATE, MODERATE).map(sorted), st.tuples(MODERATE, MODERATE).map(sorted))
def test_composition_rounds_outward(a: list[float], b: list[float]) -> None:
    first, second = gl.Bound(a[0], a[1], "first"), gl.Bound(b[0], b[1], "second")
    assert Fraction((first @ second).upper) >= Fraction(a[1]) * Fraction(b[1])
    assert Fraction((first + second).upper) >= Fraction(a[1]) + Fraction(b[1])
    assert Fraction(gl.Bound.concat([first, second]).upper) ** 2 >= Fraction(a[1]) ** 2 + Fraction(b[1]) ** 2


# ---- intervals against exact arithmetic ----------------------------------------------------------------------------------


def exceeds(gram: list[list[Fraction]], square: Fraction) -> bool:
    """Whether the largest eigenvalue of a symmetric rational matrix exceeds `square`, by exact elimination of `square - gram`."""
    a = [[(square if i == j else 0) - x for j, x in enumerate(row)] for i, row in enumerate(gram)]
    for i in range(len(a)):
        if a[i][i] < 0 or (a[i][i] == 0 and any(a[i][i:])):
            return True
        if a[i][i] == 0:
            continue
        for r in range(i + 1, len(a)):
            factor = a[r][i] / a[i][i]
            a[r] = [x - factor * y for x, y in zip(a[r], a[i], strict=True)]
    return False


def exact_gram(matrix: Tensor) -> list[list[Fraction]]:
    """`A^T A` in rational arithmetic."""
    rows = [[Fraction(x) for x in row] for row in matrix.double().tolist()]
    columns = list(zip(*rows, strict=True))
    return [[sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0)) for b in columns] for a in columns]


def assert_exactly_between(matrix: Tensor, interval: gl.Bound) -> None:
    """`lower <= norm <= upper`, decided without rounding."""
    gram = exact_gram(matrix)
    assert not exceeds(gram, Fraction(interval.upper) ** 2), (interval, matrix)
    if interval.lower > 0:
        below = Fraction(interval.lower) ** 2 * (1 - Fraction(1, 10**25))
        assert exceeds(gram, below), (interval, matrix)


@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-12])
def test_thousands_of_float32_matrices_exactly(rtol: float) -> None:
    generator = torch.Generator().manual_seed(int(-math.log10(rtol)))
    for i in range(700):
        matrix = torch.randn(2 + i % 3, 2 + i % 2, generator=generator)
        assert_exactly_between(matrix, gl.bound(matrix, rtol=rtol))


def test_plain_float32_is_a_coin_toss_and_the_bound_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    below = 0
    for _ in range(60):
        matrix = torch.randn(64, 48, generator=generator)
        truth = float(torch.linalg.svdvals(matrix.double())[0])
        below += float(gl.gram_norm(matrix, n_iter=14)) < truth
        interval = gl.bound(matrix, rtol=1e-9)
        assert interval.upper >= truth * (1 - 1e-14)
        assert interval.lower <= truth * (1 + 1e-14)
    assert 10 < below < 50


def high_precision(matrix: Tensor) -> mpmath.mpf:
    """The norm to 60 digits."""
    with mpmath.workdps(60):
        a = mpmath.matrix([[mpmath.mpf(x) for x in row] for row in matrix.double().tolist()])
        return mpmath.sqrt(max(mpmath.eigsy(a.T * a, eigvals_only=True)))


def near_equal(gap: float) -> Tensor:
    """A matrix with two leading singular values `gap` apart."""
    u, v = (weight("orthogonal", (5, 5), torch.float64, seed) for seed in (1, 2))
    return u @ torch.diag(torch.tensor([1.0, 1.0 - gap, 0.5, 0.1, 0.0], dtype=torch.float64)) @ v


HARD: dict[str, Callable[[], Tensor]] = {
    "ill-scaled rows": lambda: weight("ill_scaled", (6, 4), torch.float64),
    "ill-scaled columns": lambda: weight("ill_scaled", (4, 6), torch.float64).mT,
    "ill-scaled float32": lambda: weight("ill_scaled", (5, 5)),
    "both ill-scaled": lambda: weight("ill_scaled", (5, 5), torch.float64) * torch.logspace(-12, 0, 5, dtype=torch.float64),
    "near-equal 1e-3": lambda: near_equal(1e-3),
    "near-equal 1e-9": lambda: near_equal(1e-9),
    "near-equal 1e-15": lambda: near_equal(1e-15),
    "equal": lambda: near_equal(0.0),
    "float32 denormals": lambda: weight("denormal", (4, 4)),
    "float16 denormals": lambda: weight("denormal", (4, 4), torch.float16),
    "bfloat16 denormals": lambda: weight("denormal", (4, 4), torch.bfloat16),
    "float64 denormals": lambda: weight("denormal", (4, 4), torch.float64),
    "one float32 denormal": lambda: torch.full((1, 1), 2.0**-149),
    "normal beside denormal": lambda: torch.tensor([[1.0, 1e-42], [1e-42, 1.0]]),
    "huge beside tiny": lambda: torch.tensor([[3e38, 1.0], [1e-45, 1e-30]]),
    "largest float64": lambda: torch.full((1, 1), 1.7e308, dtype=torch.float64),
    "above the range": lambda: torch.full((2, 2), 1.7e308, dtype=torch.float64),
    "rank one": lambda: weight("rank_one", (5, 4)),
    "huge": lambda: weight("huge", (4, 3)),
    "tiny": lambda: weight("tiny", (4, 3)),
}


@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-11])
@pytest.mark.parametrize("name", HARD)
def test_hard_matrices_in_high_precision(name: str, rtol: float) -> None:
    matrix = HARD[name]()
    truth = high_precision(matrix)
    interval = gl.bound(matrix, rtol=rtol)
    assert mpmath.mpf(interval.upper) >= truth * (1 - mpmath.mpf(10) ** -40)
    assert mpmath.mpf(interval.lower) <= truth * (1 + mpmath.mpf(10) ** -40)
    if rd.TINY * 1e3 < truth < 1e308:
        assert interval.rtol <= rtol
        assert_exactly_between(matrix, interval)


@pytest.mark.parametrize("name", HARD)
def test_hard_convolutions_of_every_size(name: str) -> None:
    # The taps of a 1-d kernel with one channel on each side: at frequency 0 the norm is that of their sum, below the supremum.
    matrix = HARD[name]()
    exact = sum((abs(Fraction(x)) for x in matrix.double().flatten().tolist()), Fraction(0))
    interval = gl.bound(gl.Conv(matrix.abs().reshape(1, 1, -1)))
    assert interval.upper == math.inf or Fraction(interval.upper) >= exact
    assert Fraction(interval.lower) <= exact


NARROW: dict[str, Callable[[], gl.Dense | gl.Conv]] = {
    "matrix": lambda: gl.Dense(weight("random", (3, 3))),
    "large matrix": lambda: gl.Dense(weight("random", (90, 70))),
    "complex matrix": lambda: gl.Dense(weight("random", (20, 30), torch.complex64)),
    "every size": lambda: gl.Conv(weight("random", (4, 4, 3, 3))),
    "orthogonal": lambda: gl.Conv(weight("orthogonal", (8, 8, 1, 3))),
    "three axes": lambda: gl.Conv(weight("random", (2, 2, 2, 2, 2))),
    "grid": lambda: gl.Conv(weight("random", (4, 4, 3, 3)), 9, padding=1, padding_mode="circular"),
    "finite layer": lambda: gl.Conv(weight("random", (2, 2, 3, 3)), 5, padding=1),
    "reflected": lambda: gl.Conv(weight("random", (2, 2, 3)), 7, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("name", NARROW)
def test_no_interval_is_wider_because_a_smaller_width_was_asked_for(name: str) -> None:
    """Below what rounding lets be told the targets grew by steps of the width asked for, until the budget ended: 0.02 for 1e-15."""
    op, before = NARROW[name](), math.inf
    for rtol in (1e-9, 1e-11, 1e-12, 1e-13, 1e-14, 1e-15, 1e-16):
        found = gl.bound(op, rtol=rtol)
        assert found.rtol <= before * 1.001
        assert found.rtol <= rtol or "wider than asked for" in found.because or "finite layer itself" in found.because
        before = found.rtol
    assert before < 1e-10


# ---- the result does not depend on settings, nor changes them ---------------------------------------------------------------


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Denormals flushed to zero in this thread."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Another float32 matmul precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
        assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Only deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "flush denormals": flushed,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "matmul medium": lambda: matmul_precision("medium"),
    "matmul high": lambda: matmul_precision("high"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
}
LAYERS = [
    Case("random", (6, 5)),
    Case("denormal", (4, 4)),
    Case("denormal", (4, 4), dtype=torch.float64),
    Case("random", (3, 2, 3, 3), (5, 5), padding=((1, 1), (1, 1))),
    Case("random", (3, 2, 3, 3), (6, 6), (2, 2), ((1, 1), (1, 1)), "circular"),
    Case("near_orthogonal", (3, 3, 3), (9,), padding=((1, 1),), padding_mode="reflect"),
    Case("denormal", (2, 2, 3), (5,), padding=((1, 1),), padding_mode="replicate"),
    Case("random", (4, 2, 3), (6,), groups=2, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_settings_neither_matter_nor_change(case: Case, setting: str) -> None:
    operators = [case.operator(), case.operator(None)]
    plain = [gl.bound(op) for op in operators]
    state = torch.get_rng_state()
    with SETTINGS[setting]():
        under = [gl.bound(op) for op in operators]
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(plain, under, strict=True):
        assert (a.lower, a.upper, a.because) == (b.lower, b.upper, b.because)


@pytest.mark.parametrize("setting", ["matmul medium", "deterministic"])
def test_vectors_from_single_precision_need_whole_products(setting: str) -> None:
    """A large finite layer takes its lower side's vectors from single precision, unless a setting cuts its products short."""
    case = Case("random", (64, 64, 3, 3), (3, 3), padding=((1, 1), (1, 1)))
    plain = gl.bound(case.operator(), finite=False)
    with SETTINGS[setting]():
        under = gl.bound(case.operator(), finite=False)
    for interval in (plain, under):
        assert interval.lower <= case.truth * (1 + 1e-12)
        assert interval.upper >= case.truth * (1 - 1e-12)
    assert under.lower >= plain.lower * (1 - 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flushed_denormals_do_not_become_a_zero_layer(dtype: torch.dtype) -> None:
    case = Case("denormal", (4, 4), dtype=dtype)
    op = case.operator()
    with flushed():
        interval = gl.bound(op)
    assert interval.upper >= case.truth > 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str)
def test_flushed_denormals_count_in_a_diagonal(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    diagonal = torch.tensor([3.0, -2.0]).to(dtype) * torch.tensor(info.tiny * info.eps, dtype=dtype)
    exact = max(Fraction(abs(x)) for x in diagonal.to(torch.complex128).real.tolist())
    with flushed():
        interval = gl.bound(gl.Diagonal(diagonal))
    assert 0 < Fraction(interval.lower) <= exact <= Fraction(interval.upper) or interval.lower == 0.0 < exact <= rd.TINY <= interval.upper


class Faint(torch.nn.Module):
    """Denormal constants where rules and folds read them: the norm is that of the product, `size^2`."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.register_buffer("size", torch.full((2,), size))
        self.linear = torch.nn.Linear(2, 2)
        self.linear.weight.data = torch.eye(2) * size

    def forward(self, x: Tensor) -> Tensor:
        return self.size * self.linear(x)


def test_flushed_denormals_count_in_a_network() -> None:
    model = Faint(1e-40).eval()
    exact = Fraction(float(model.size[0])) ** 2
    with flushed():
        upper = gl.audit(model, (2,), effort=-1).upper
    assert Fraction(upper) >= exact * (1 - Fraction(1, 10**12)) > 0


class Mixed(torch.nn.Module):
    """A denormal constant among the constants of one call."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.register_buffer("size", torch.full((2,), 1e-40))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.size, x)


@pytest.mark.parametrize(
    "call",
    [lambda size, x: torch.einsum("i,i,bi->bi", torch.ones(2), size, x), lambda size, x: torch.lerp(torch.zeros(2), x, size)],
    ids=["einsum", "lerp"],
)
def test_flushed_denormals_count_among_the_constants_of_a_call(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Mixed(call).eval()
    exact = Fraction(float(model.size[0]))
    with flushed():
        upper = gl.audit(model, (2,), effort=-1).upper
    assert Fraction(upper) >= exact > 0


# ---- weights as they come --------------------------------------------------------------------------------------------------


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "requires grad": lambda w: w.clone().requires_grad_(),
    "parameter": lambda w: torch.nn.Parameter(w.clone()),
    "channels last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed storage": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided view": lambda w: torch.stack([w, w], -1).flatten(-2)[..., ::2],
    "expanded": lambda w: w[..., :1].expand(w.shape),
    "conjugate view": lambda w: torch.complex(w, w).conj(),
    "imaginary part": lambda w: torch.complex(0 * w, w).imag,
    "negative view": lambda w: torch.complex(0 * w, -w).conj().imag,
    "inference tensor": lambda w: _inference(w),
    "inner graph": lambda w: w.clone().requires_grad_() * 1.0,
}


def _inference(w: Tensor) -> Tensor:
    with torch.inference_mode():
        return w.clone()


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_any_form_and_nothing_changed_in_place(form: str) -> None:
    w = FORMS[form](weight("random", (3, 2, 3, 3)))
    twin = w.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    before = w.detach().clone()
    for options in (
        {"input_size": 5, "padding": 1},
        {"padding": 1},
        {"input_size": 6, "stride": 2, "padding": 1, "padding_mode": "circular"},
    ):
        found, expected = gl.bound(gl.Conv(w, **options)), gl.bound(gl.Conv(twin, **options))
        assert (found.lower, found.upper) == (expected.lower, expected.upper)
    assert torch.equal(before, w.detach())
    assert w.grad_fn is None or w.requires_grad


def test_scaling_by_a_power_of_two_scales_the_interval() -> None:
    case = Case("random", (3, 2, 3, 3), (5, 5), padding=((1, 1), (1, 1)), dtype=torch.float64)
    base = gl.bound(case.operator())
    for exponent in (-900, -100, -1, 1, 100, 900):
        op = gl.Conv(case.weight() * 2.0**exponent, 5, padding=1)
        found = gl.bound(op)
        assert (found.lower, found.upper) == (math.ldexp(base.lower, exponent), math.ldexp(base.upper, exponent))


def read_by_all(kernel: Tensor, outputs: int) -> gl.Conv:
    """A layer of one input, which replicate padding makes every tap of so many outputs read."""
    pad = outputs + kernel.shape[2] - 2
    return gl.Conv(kernel, input_size=1, padding=[(pad // 2, pad - pad // 2)], padding_mode="replicate")


@pytest.mark.parametrize("finite", ["auto", True])
@pytest.mark.parametrize("rtol", [1e-13, 1e-12, 3e-12])
def test_thousands_of_outputs_that_read_one_input_exactly(rtol: float, finite: bool | str) -> None:
    """Equal products, whose roundings go one way: a quarter of a million in one entry of the layer's Gram matrix."""
    tap, taps, outputs = float.fromhex("0x1.75fc2dp-1"), 11, 2001
    square = Fraction(tap) ** 2 * taps**2 * outputs
    found = gl.bound(read_by_all(torch.full((1, 1, taps), tap, dtype=torch.float64), outputs), rtol=rtol, finite=finite)
    assert Fraction(found.lower) ** 2 <= square <= Fraction(float(found.upper)) ** 2


@pytest.mark.parametrize("shape", [(1, 1, 11), (1, 2, 7), (2, 1, 301)], ids=str)
def test_the_error_of_a_layers_gram_matrix_counts_every_product(shape: tuple[int, ...]) -> None:
    outputs = 4 if shape[0] == 2 else 2001
    layer = FiniteLayer(read_by_all(torch.full(shape, 0.7, dtype=torch.float64), outputs), 0)
    certificate = Certificate(layer, 0)
    products = max(map(len, certificate.pairs.values())) * shape[0 if certificate.on_inputs else 1]
    assert certificate.noise(1.0) >= rd.gamma(float(products)) * outputs


def test_no_sum_of_finite_weights_is_refused() -> None:
    """Taps that meet add up beyond the largest number: an upper side of infinity, no word of weights that are not finite."""
    kernel = torch.full((1, 1, 3), 1.7e308, dtype=torch.float64)
    for mode in ("reflect", "replicate", "circular"):
        found = gl.bound(gl.Conv(kernel, input_size=2, padding=1, padding_mode=mode))
        assert found.lower > 1e308
        assert found.upper == math.inf


@pytest.mark.parametrize(("n", "m"), [(1500, 3001), (301, 97)])
def test_interpolation_is_within_the_error_that_is_allowed_for_it(n: int, m: int) -> None:
    """Places far from the origin lose as many digits as they have: their weights are not within a few units."""
    matrix = torch.nn.functional.interpolate(torch.eye(n, dtype=torch.float64)[:, None], size=m, mode="linear")[:, 0].mT
    off = torch.zeros(m, n, dtype=torch.float64)
    for j in range(m):
        place = max(Fraction(n, m) * Fraction(2 * j + 1, 2) - Fraction(1, 2), Fraction(0))
        i, part = int(place), place - int(place)
        for at, share in ((i, 1 - part), (min(i + 1, n - 1), part)):
            off[j, at] += float(Fraction(float(matrix[j, at])) - share) if at < n - 1 else 0.0
    worst = math.sqrt(float(off.abs().sum(0).max() * off.abs().sum(1).max()))
    assert 2.0**-53 * n / 8 < worst < (2.0**-44 + 2.0**-46 * n) * math.sqrt(max(m / n, 0.25))


@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize("complex_", [False, True])
def test_blocks_in_single_precision_err_by_no_more_than_their_noise(complex_: bool, scale: float) -> None:
    """R2: channels of very different scale, several groups, frequencies on no grid; against the same blocks in double."""
    dtype = torch.complex128 if complex_ else torch.float64
    kernel = torch.randn(2, 9, 6, 3, 2, dtype=dtype) * torch.tensor([1.0, scale]).repeat(3)[:, None, None]
    double, single = GramSymbol(kernel), GramSymbol(kernel)
    assert single.mix(1e-2)
    index, group = np.random.default_rng(0).integers(997, size=(200, 2)), np.arange(200) % 2
    wide, narrow = (gram.at(group, index, (997, 997)) for gram in (double, single))
    assert narrow.dtype == torch.complex64
    error = torch.linalg.matrix_norm(wide - narrow.to(wide.dtype), 2)
    assert 0 < float(error.max()) <= max(single.noise) + max(double.noise)
    assert bool((error <= torch.tensor(single.noise)[group]).all())


def test_blocks_are_formed_in_single_precision_only_where_the_width_allows_it() -> None:
    kernel = torch.randn(1, 8, 8, 3, 3)
    assert not GramSymbol(kernel).mix(1e-9)
    for rtol, dtype in ((1e-2, torch.complex64), (1e-6, torch.complex128)):
        search = BranchAndBound(GramSymbol(kernel), (None, None))
        search.start(rtol)
        assert search.cache.blocks(np.array([3, 5])).dtype == dtype


@pytest.mark.parametrize("kernel", ["random", "smooth", "signs"])
@pytest.mark.parametrize("shape", [(128, 130, 3, 3), (160, 128, 2, 2), (2, 128, 128, 3)], ids=str)
def test_squares_in_single_precision_are_within_their_error(kernel: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn(shape if len(shape) > 3 else (1, *shape), generator=generator)
    draw = draw if draw.ndim == 5 or shape[0] == 2 else draw[None]
    k = {"random": draw, "smooth": 1 + 0.01 * draw, "signs": draw.sign()}[kernel]
    axes = k.ndim - 3
    single, double = GramSymbol(k, rtol=1.0, frequencies=1), GramSymbol(k, rtol=1e-6, frequencies=1)
    assert isinstance(single.strategy, SquaresInSingle)
    assert not isinstance(double.strategy, SquaresInSingle)
    index = np.random.default_rng(3).integers(7, size=(5, axes))
    for group in range(k.shape[0]):
        groups = np.full(5, group)
        gap = single.at(groups, index, (7,) * axes).to(torch.complex128) - double.at(groups, index, (7,) * axes)
        assert float(torch.linalg.matrix_norm(gap, 2).max()) <= single.noise[group]


def test_few_wide_blocks_hold_the_norm() -> None:
    """Grids so small that blocks are squared one by one, against an FFT and SVDs in double."""
    generator = torch.Generator().manual_seed(5)
    for scale in (1.0, 1e-6):
        kernel = torch.randn(144, 128, 3, 3, generator=generator)
        kernel[:64] *= scale
        blocks = torch.fft.fft2(kernel.double(), s=(5, 5)).permute(2, 3, 0, 1)
        norm = float(torch.linalg.matrix_norm(blocks, 2).max())
        for rtol in (1e-2, 1e-3, 1e-6):
            interval = gl.bound(gl.operators.linear_maps.Conv(kernel, input_size=5, padding=1, padding_mode="circular"), rtol=rtol)
            assert norm * (1 - 1e-12) <= interval.upper <= norm * (1 + rtol)
            assert interval.lower <= norm * (1 + 1e-12)


@pytest.mark.parametrize("order", [1, 16, 63, 64, 101, 104, 112, 128, 129, 131, 132, 256, 260, 320])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_neither_added_rows_nor_the_place_of_the_factor_change_a_verdict(order: int, single: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(order)
    x = torch.randn(3, order, order, generator=generator, dtype=dtype)
    g = x @ x.mH / order
    top = torch.linalg.eigvalsh(g)[:, -1]
    noise = torch.zeros(3, dtype=torch.float64)
    room = 4 * eigenvalues.single_shift(order) if single else 1e-9
    assert bool(eigenvalues.cholesky(g, top * (1 + room), noise, single=single).all())
    assert not bool(eigenvalues.cholesky(g, top * (1 - 1e-14), noise, single=single).any())


@pytest.mark.parametrize("single", [False, True])
def test_cholesky_proves_nothing_that_the_noise_allows_to_be_false(single: bool) -> None:
    """Blocks whose noise is as large as themselves and whose computed eigenvalues are negative but one, just above what noise leaves."""
    generator, noise = torch.Generator().manual_seed(0), torch.ones(200, dtype=torch.float64)
    u = torch.nn.functional.normalize(torch.randn(200, 64, generator=generator, dtype=torch.float64), dim=-1)
    g = (1 + 3e-8) * u[:, :, None] * u[:, None] - torch.eye(64, dtype=torch.float64)
    assert not bool(eigenvalues.cholesky(g, noise + 1e-9, noise, single=single).any())


def test_blocks_that_are_used_up_are_proved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigenvalues, "LARGE_BYTES", 0)
    x = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    g = x @ x.mH
    top = torch.linalg.eigvalsh(g)[:, -1]
    noise = torch.full_like(top, 1e-13)
    for factor, proved in ((1 + 1e-9, True), (1 - 1e-9, False)):
        kept = g.clone()
        assert eigenvalues.cholesky(kept, top * factor, noise).tolist() == [proved] * 3
        assert torch.equal(kept, g)
        assert eigenvalues.cholesky(kept, top * factor, noise, overwrite=True).tolist() == [proved] * 3


@pytest.mark.parametrize("entry", [0.1, 0.3, 0.7])
def test_norms_of_large_taps_are_bounds_of_sums_of_millions_of_squares(entry: float) -> None:
    """R4: constant entries, whose sums err by more than a thousand units."""
    found = torch.full((2, 1, 2048, 2048), entry, dtype=torch.float64)
    taps = Taps.__new__(Taps)
    taps.found, taps._odd = found, None
    assert Fraction(float(taps.sizes[0, 0])) >= 2048 * Fraction(entry)
    assert Fraction(float(spectral(found[1])[0])) >= 2048 * Fraction(entry)


def test_growth_in_single_precision_errs_by_less_than_is_added() -> None:
    factor = torch.full((1, 3000, 3000), 0.1)
    exact = (3000 * Fraction(float(factor[0, 0, 0]))) ** 2
    assert exact <= Fraction(float(eigenvalues._growth(factor)[0])) * (1 + Fraction(1, 1000))
    assert rd.gamma(2.0 * eigenvalues.SINGLE_ORDER + 8, 2.0**-24) < 1e-3
    assert eigenvalues.single_shift(eigenvalues.SINGLE_ORDER) < math.inf == eigenvalues.single_shift(eigenvalues.SINGLE_ORDER + 1)
