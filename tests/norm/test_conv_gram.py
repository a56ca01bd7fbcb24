"""conv_gram_norm: the paper's bound for the real layer, with the gradient of the arg-max block."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gramlip as gl
from gramlip.errors import InputError
from gramlip.norm.polyphase import blocks
from gramlip.testing.cases import cases

GEOMETRIES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "circular": ((3, 2, 3, 3), {"input_size": 5}),
    "odd and even sizes": ((2, 3, 3, 2), {"input_size": (6, 5)}),
    "zeros": ((3, 2, 3, 3), {"input_size": 5, "padding_mode": "zeros"}),
    "stride": ((3, 2, 3, 3), {"input_size": 6, "stride": 2, "padding_mode": "zeros"}),
    "circular stride": ((3, 2, 3, 3), {"input_size": 6, "stride": (2, 3)}),
    "groups": ((4, 2, 3), {"input_size": 7, "groups": 2}),
    "depthwise": ((4, 1, 3, 3), {"input_size": 7, "groups": 4}),
    "dilation": ((2, 2, 3, 3), {"input_size": 8, "dilation": (1, 2), "padding_mode": "zeros"}),
    "1d": ((3, 2, 4), {"input_size": 9}),
    "3d": ((2, 2, 2, 3, 2), {"input_size": 4, "stride": (1, 2, 1), "padding_mode": "zeros"}),
    "every size": ((3, 2, 3, 3), {"input_size": None, "padding_mode": "zeros"}),
    "transposed": (
        (3, 2, 3, 3),
        {"input_size": 5, "stride": 2, "transposed": True, "padding_mode": "zeros", "padding": 1, "output_padding": 1},
    ),
    "wraps": ((2, 2, 5, 5), {"input_size": 3, "padding": 2}),
}


def kernel(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain(weight: Tensor, n_iter: int, geometry: dict[str, Any]) -> Tensor:
    """The same by autograd through all blocks."""
    settings = {"padding_mode": "circular"} | geometry
    if "padding" not in settings:
        spans = gl.Conv(weight, dilation=settings.get("dilation", 1)).spans
        settings["padding"] = [((s - 1) // 2, s - 1 - (s - 1) // 2) for s in spans]
    found = blocks(gl.Conv(weight, **settings))
    return found.factor * gl.gram_norm(found.matrices, n_iter).max()


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("n_iter", [1, 4])
def test_value_and_gradient_are_those_of_autograd(name: str, n_iter: int) -> None:
    shape, geometry = GEOMETRIES[name]
    weight = kernel(*shape)
    ours, theirs = gl.conv_gram_norm(weight, n_iter=n_iter, **geometry), plain(weight, n_iter, geometry)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    ours, theirs = torch.autograd.grad(ours, weight)[0], torch.autograd.grad(theirs, weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradcheck(name: str) -> None:
    shape, geometry = GEOMETRIES[name]
    norm = functools.partial(gl.conv_gram_norm, n_iter=3, **geometry)
    assert gradcheck(norm, kernel(*shape))
    assert gradgradcheck(norm, kernel(*shape))


def test_never_below_the_layer() -> None:
    seen = 0
    for case in cases("zeros", "circular")[::11]:
        if not case.dims or case.dtype != torch.float64:
            continue
        options = {
            name: getattr(case, name)
            for name in ("stride", "padding", "padding_mode", "dilation", "groups", "transposed", "output_padding")
        }
        value = gl.conv_gram_norm(case.weight(), case.size, **options).item()
        assert value >= case.truth * (1 - 1e-10), case.name
        seen += 1
    assert seen > 30


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("n_iter", range(1, 21))
def test_finite_for_any_scale_and_number_of_steps(scale: float, n_iter: int) -> None:
    weight = (kernel(3, 2, 3, 3, dtype=torch.float32).detach() * scale).requires_grad_()
    norm = gl.conv_gram_norm(weight, input_size=5, n_iter=n_iter)
    norm.backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
    truth = gl.METHODS["sedghi2019"].value(gl.Conv(weight.detach(), 5, padding=1, padding_mode="circular"))
    assert float(norm.detach()) >= truth * (1 - 1e-5)
    assert float((weight.grad.double() * weight.detach().double()).sum()) == pytest.approx(float(norm.detach()), rel=1e-4)


def test_zero_weight() -> None:
    weight = torch.zeros(3, 2, 3, 3, requires_grad=True)
    norm = gl.conv_gram_norm(weight)
    norm.backward()
    assert weight.grad is not None
    assert (norm.item(), float(weight.grad.abs().max())) == (0.0, 0.0)


def test_gradient_comes_from_one_frequency() -> None:
    weight = kernel(3, 2, 3, 3)
    gradient = torch.autograd.grad(gl.conv_gram_norm(weight, input_size=6, n_iter=20), weight)[0]
    spectrum = torch.fft.fftn(gradient, s=(8, 8), dim=(2, 3)).flatten(2).movedim(2, 0)
    # One wave at w and its conjugate: every matrix of coefficients is a combination of one rank-one matrix and its conjugate.
    assert int((torch.linalg.svdvals(gradient.flatten(0, 1).flatten(1)) > 1e-10).sum()) <= 2
    assert spectrum.isfinite().all()


def test_memory_does_not_grow_with_the_steps() -> None:
    def saved(n_iter: int) -> int:
        sizes: list[int] = []
        weight = kernel(8, 8, 3, 3)

        def keep(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        with saved_tensors_hooks(keep, lambda x: x):
            gl.conv_gram_norm(weight, input_size=16, n_iter=n_iter)
        return sum(sizes)

    assert saved(1) == saved(20) < 10 * 8 * 8 * 9


@pytest.mark.parametrize("entry", [3e38, 1e-44])
def test_entries_at_the_ends_of_the_range(entry: float) -> None:
    weight = torch.zeros(1, 1, 3)
    weight[0, 0, 1] = entry
    value = gl.conv_gram_norm(weight.requires_grad_(), 8)
    value.backward()
    assert value.item() == pytest.approx(weight[0, 0, 1].item(), rel=1e-6)
    assert torch.equal(weight.grad, torch.ones(1, 1, 3))


def test_the_default_device_does_not_matter() -> None:
    weight = torch.randn(2, 2, 3)
    with torch.device("meta"):
        value = gl.conv_gram_norm(weight, 8)
    assert torch.equal(value, gl.conv_gram_norm(weight, 8))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_8_bits(dtype: torch.dtype) -> None:
    weight = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(gl.conv_gram_norm(weight, 8), gl.conv_gram_norm(weight.float(), 8))
    assert torch.equal(gl.gram_norm(weight.flatten(1)), gl.gram_norm(weight.float().flatten(1)))


def test_half_precision_and_complex() -> None:
    weight = kernel(3, 2, 3, 3)
    reference = gl.conv_gram_norm(weight, 6)
    half = gl.conv_gram_norm(weight.detach().bfloat16(), 6)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(reference.item(), rel=1e-2)
    turned = (weight.detach() * torch.tensor(1j, dtype=torch.complex128)).requires_grad_()
    torch.testing.assert_close(gl.conv_gram_norm(turned, 6), reference)
    assert gradcheck(functools.partial(gl.conv_gram_norm, input_size=6, n_iter=3), turned)


def test_vmap() -> None:
    batch = torch.stack([kernel(4, 2, 3, 3, seed=i).detach() for i in range(3)])
    norm = functools.partial(gl.conv_gram_norm, input_size=6, groups=2)
    torch.testing.assert_close(torch.vmap(norm)(batch), torch.stack([norm(w) for w in batch]))
    torch.testing.assert_close(torch.vmap(torch.func.grad(norm))(batch), torch.stack([torch.func.grad(norm)(w) for w in batch]))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 6},
        {"input_size": (6, 5), "stride": 2, "padding_mode": "zeros"},
        {"input_size": None, "groups": 2, "padding_mode": "reflect"},
        {"input_size": 5, "transposed": True, "stride": 2, "padding": 1, "padding_mode": "zeros", "output_padding": 1},
        {"input_size": 6, "dilation": 2, "padding": [(1, 2), (2, 0)]},
    ],
)
def test_compile_in_one_graph(options: dict[str, Any], backend: str) -> None:
    torch._dynamo.reset()
    weight = kernel(4, 2, 3, 3)
    norm = functools.partial(gl.conv_gram_norm, **options)
    compiled = torch.compile(norm, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(weight), norm(weight))
    ours, theirs = torch.autograd.grad(compiled(weight), weight)[0], torch.autograd.grad(norm(weight), weight)[0]
    torch.testing.assert_close(ours, theirs)


def test_errors() -> None:
    with pytest.raises(InputError, match="padding_mode='symmetric'"):
        gl.conv_gram_norm(torch.ones(1, 1, 3), padding_mode="symmetric")
    with pytest.raises(InputError, match="smaller than the kernel"):
        gl.conv_gram_norm(torch.ones(1, 1, 5), 3, padding=0, padding_mode="zeros")
    for weight in (torch.ones(1, 1, 3, dtype=torch.int32), [[[1.0]]]):
        with pytest.raises(InputError, match="floating-point"):
            gl.conv_gram_norm(weight)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n_iter=0"):
        gl.conv_gram_norm(torch.ones(1, 1, 3), n_iter=0)
    assert gl.conv_gram_norm(torch.full((1, 1, 3), torch.nan)).isnan()


class _Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: a tensor that is copied from or to the host. A meta tensor's values cannot be read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        found = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor) and x.ndim]
        assert len({x.device.type for x in found}) <= 1, f"{func} between devices"
        return result


@pytest.mark.parametrize("name", GEOMETRIES)
def test_nothing_waits_for_the_device(name: str) -> None:
    shape, geometry = GEOMETRIES[name]
    weight = torch.empty(shape, device="meta", requires_grad=True)
    with _Waits():
        gl.conv_gram_norm(weight, **geometry).backward()
    assert weight.grad is not None
