"""Fourier transforms and complex values against the matrices of the real modules, by a basis pushed through them in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramlip as gl
from gramlip.errors import UnsupportedError
from test_placements import Map, matrix

W = torch.randn(3, 3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
NORMS = (None, "ortho", "forward", "backward")


def check(call: Callable[[Tensor], Tensor], shape: tuple[int, ...], loose: float = 1.0 + 4e-6) -> None:
    """One-sided, and at most `loose` above."""
    truth = float(torch.linalg.matrix_norm(matrix(call, shape), 2))
    report = gl.audit(Map(call).eval(), torch.zeros(1, *shape, dtype=torch.float64), effort=-1)
    assert truth <= report.upper * (1 + 1e-12)
    assert report.upper <= loose * truth
    assert report.lower <= truth * (1 + 1e-9)


def paired(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()).flatten(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", [None, 2, 5, 8, 11])
@pytest.mark.parametrize("name", ["fft", "ifft", "rfft", "ihfft"])
def test_transforms_of_one_axis(name: str, n: int | None, norm: str | None) -> None:
    check(lambda x: paired(getattr(torch.fft, name)(x, n=n, norm=norm)), (8,), 1.5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", [None, 1, 2, 3, 8, 9])
@pytest.mark.parametrize("name", ["irfft", "hfft"])
def test_transforms_back_to_real_numbers(name: str, n: int | None, norm: str | None) -> None:
    check(lambda x: getattr(torch.fft, name)(torch.complex(x[:, :5], x[:, 5:]), n=n, norm=norm), (10,), 1.5)


@pytest.mark.parametrize("norm", NORMS)
def test_transforms_of_several_axes(norm: str | None) -> None:
    check(lambda x: paired(torch.fft.fft2(x, s=(5, 3), norm=norm)), (4, 4), 1.3)
    check(lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2), norm=norm), s=(4, 5), dim=(1, 2), norm=norm), (4, 5))
    check(lambda x: torch.fft.irfft2(torch.fft.rfft2(x, norm=norm), s=(4, 4), norm=norm), (4, 4))
    check(lambda x: torch.fft.ifftn(torch.fft.fftn(x, norm=norm), norm=norm).real, (3, 4))


def layer_1d(x: Tensor, n: int = 12) -> Tensor:
    """A spectral convolution of a neural operator."""
    return torch.fft.irfft(F.pad(torch.einsum("bix,iox->box", torch.fft.rfft(x)[..., :4], W), (0, 1)), n=n)


def layer_2d(x: Tensor) -> Tensor:
    low = torch.fft.rfft2(x)
    out = torch.zeros(x.shape[0], 3, 8, 5, dtype=torch.complex128)
    out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", low[:, :, :2, :2], W.reshape(3, 3, 2, 2))
    out[:, :, -2:, :2] = torch.einsum("bixy,ioxy->boxy", low[:, :, -2:, :2], 2j * W.reshape(3, 3, 2, 2))
    return torch.fft.irfft2(out, s=(8, 8))


def test_layers_of_neural_operators_have_the_constant_of_their_largest_frequency() -> None:
    """The pairs of conjugate frequencies cost no root of two."""
    check(layer_1d, (3, 12), 1.05)
    check(layer_2d, (3, 8, 8), 1.5)
    check(lambda x: torch.fft.irfft(torch.fft.rfft(x, n=16) * torch.fft.rfft(W[0].real, n=16), n=16)[..., :4], (3, 4), 1.6)


@pytest.mark.parametrize("n", [5, 6, 7, 8, 12])
def test_a_spectrum_of_an_even_signal_read_as_another_length(n: int) -> None:
    """The last frequency of 6 points is its own mirror, and one of a pair in 8: then nothing is saved."""
    check(lambda x: torch.fft.irfft(torch.fft.rfft(x), n=n), (6,), 1.5)
    check(lambda x: torch.fft.irfft(torch.fft.rfft(x).flip(-1), n=n), (6,), 1.5)
    check(lambda x: torch.fft.irfft(torch.fft.rfft(x)[..., 1:], n=n), (6,), 1.5)
    check(lambda x: torch.fft.irfft(torch.cat([torch.fft.rfft(x), torch.fft.rfft(x)], -1), n=n), (6,), 2.1)
    check(lambda x: torch.fft.irfft(F.pad(torch.fft.rfft(x), (1, 0)), n=n), (6,), 1.5)
    check(lambda x: torch.fft.irfft(torch.fft.rfft(x) + torch.fft.rfft(x), n=n), (6,), 1.5)


def written_twice(x: Tensor) -> Tensor:
    """The two parts read the same frequencies of the signal: their squares add up."""
    low = torch.fft.rfft(x)[:, None]
    out = torch.zeros(x.shape[0], 2, low.shape[-1], dtype=torch.complex128)
    out[:, 0] = 3 * low[:, 0]
    out[:, 1] = (4j * low)[:, 0]
    return torch.fft.irfft(out, n=6)


def test_parts_of_a_spectrum_that_read_the_same_entries_add_up() -> None:
    check(written_twice, (6,), 1.01)


@pytest.mark.parametrize("window", [torch.hann_window(8, dtype=torch.float64), torch.ones(6, dtype=torch.float64)])
def test_short_time_transforms(window: Tensor) -> None:
    check(lambda x: paired(torch.stft(x, 8, 3, len(window), window, center=False, return_complex=True)), (23,), 1.5)


def test_complex_matrices_and_factors() -> None:
    matrix_, factor = W[0, :, :3], torch.tensor([1 + 2j, -1j, 0.5])
    check(lambda x: paired(torch.complex(x[:, :3], x[:, 3:]) @ matrix_), (6,))
    check(lambda x: paired(torch.view_as_complex(x.reshape(1, 3, 2)) * factor), (6,))
    check(lambda x: paired(torch.view_as_complex(x.reshape(1, 3, 2)) / factor - 3j), (6,))
    check(lambda x: F.linear(x.to(torch.complex128), matrix_.conj()).imag, (3,), 1.5)


def test_the_modulus_is_no_entrywise_function_of_a_real_number() -> None:
    def call(x: Tensor) -> Tensor:
        return torch.fft.fft(x).abs()

    upper = gl.audit(Map(call).eval(), (6,)).upper
    for seed in range(20):
        x = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
        assert float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(call, x).reshape(6, 6), 2)) <= upper * (1 + 1e-6)


def test_what_no_rule_covers_among_complex_values_is_refused() -> None:
    for call in (lambda x: torch.fft.fft(x) * torch.fft.fft(x), lambda x: torch.tanh(torch.fft.fft(x)), lambda x: 1 / torch.fft.fft(x)):
        with pytest.raises(UnsupportedError, match="complex values"):
            gl.audit(Map(lambda x, call=call: call(x).real).eval(), (4,))


class Operator(nn.Module):
    """A Fourier neural operator with a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip, self.down = nn.Linear(2, 3), nn.Conv1d(3, 3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x).permute(0, 2, 1)
        modes = torch.einsum("bix,iox->box", torch.fft.rfft(x)[..., :4], W.to(torch.complex64))
        x = F.gelu(torch.fft.irfft(F.pad(modes, (0, 3)), n=12) + self.skip(x))
        return self.down(x.permute(0, 2, 1))


def test_a_neural_operator_is_finite_without_a_domain() -> None:
    torch.manual_seed(0)
    report = gl.audit(Operator().eval(), (12, 2))
    assert 0.0 < report.lower <= report.upper < 100 * report.lower
