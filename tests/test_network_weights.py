"""Weights that a model computes from others, and what its calls read from memory: float64 on both sides, against 60 digits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gramlip.errors import UnsupportedError
from gramlip.network import audit
from test_rules import Map

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weight_norm_in_digits(layer: nn.Module) -> mp.mpf:
    """The spectral norm of `g v / |v|`, row by row, in 60 digits."""
    with mp.workdps(60):
        raw = layer.parametrizations.weight  # type: ignore[union-attr]
        gains, rows = raw.original0.detach().double(), raw.original1.detach().double()  # type: ignore[union-attr]
        matrix = mp.matrix(
            [[mp.mpf(float(g)) * v / mp.norm(mp.matrix(row)) for v in row] for g, row in zip(gains, rows.tolist(), strict=True)]
        )
        return mp.svd_r(matrix, compute_uv=False)[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weight_norm_is_that_of_real_numbers_in_every_type(dtype: torch.dtype) -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        layer = parametrizations.weight_norm(nn.Linear(4, 4, bias=False)).to(dtype).eval()
        report, truth = audit(layer, torch.zeros(1, 4, dtype=dtype), rtol=1e-9, effort=-1), weight_norm_in_digits(layer)
        assert report.lower <= truth <= report.upper <= truth * (1 + 1e-6), seed
        assert "those that float64 gives" in report.network.because  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.spectral_norm,
        lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
        lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
        lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    ],
    ids=["spectral norm", "householder", "cayley", "matrix exp"],
)
def test_parametrizations_are_those_of_their_weights_in_float64(wrap: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        layer = wrap(nn.Linear(4, 4)).to(dtype).eval()
        report = audit(layer, torch.zeros(1, 4, dtype=dtype), rtol=1e-9, effort=-1)
        truth = float(torch.linalg.matrix_norm(copy.deepcopy(layer).double().weight.detach(), 2))  # type: ignore[arg-type]
        assert report.lower <= truth * (1 + 1e-13)
        assert truth * (1 - 1e-13) <= report.upper <= truth * (1 + 1e-6)


class Cancelling(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(0.3 * torch.eye(2)), shift

    def forward(self, x: Tensor) -> Tensor:
        return x @ ((self.weight + self.shift) - self.shift)


@pytest.mark.parametrize("shift", [0.0, 1e8, 1e17])
def test_both_sides_take_the_same_numbers_where_computing_a_weight_cancels(shift: float) -> None:
    report = audit(Cancelling(shift), (2,))
    truth = float((torch.tensor(0.3).double() + shift) - shift)
    assert report.lower <= truth <= report.upper <= truth * (1 + 1e-5)


def test_what_a_model_makes_without_a_type_does_not_depend_on_the_default_one() -> None:
    model, found = Map(lambda x: x * torch.linspace(0.1, 0.7, 3)).eval(), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found.append(audit(model, torch.zeros(1, 3, dtype=torch.float64)).upper)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1] >= 0.7


@pytest.mark.parametrize(
    "call",
    [lambda x: x * torch.ones(4, 4).as_strided((4,), (5,)), lambda x: x * torch.ones(4).view(torch.int32).double()],
    ids=["places", "bits"],
)
def test_weights_read_from_memory_are_refused_and_have_no_lower_side(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="reads places or bits of memory"):
        audit(Map(call).eval(), (4,))
    report = audit(Map(call).eval(), (4,), strict=False)
    assert (report.lower, report.upper) == (0.0, float("inf"))


class Heads(nn.Module):
    """The attention of nanoGPT: heads are views, and joined again by a view of a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.all = nn.LayerNorm(4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, 2, c // 2).transpose(1, 2) for part in self.all(self.norm(x)).split(c, 2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(b, t, c)


def test_views_are_of_entries_whatever_the_layout() -> None:
    report = audit(Heads().eval(), (5, 4))
    assert 0.0 < report.lower <= report.upper < float("inf")
    turned = audit(Map(lambda x: 2 * x.t().view(-1)).eval(), torch.randn(3, 2).t())
    assert turned.lower <= 2.0 <= turned.upper <= 2.0 + 1e-9
