"""The differentiable norm of a convolution: Gram iteration on its blocks, gradient at the arg-max block alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.norm.symbol.polyphase import Symbol, grid, symbol, transform
from gramlip.numerics.gram_iteration import gram_norm
from gramlip.numerics.precision import real_dtype, wide
from gramlip.operators.linear_maps import Conv, Dense, Ints


def operator_gram_norm(op: Dense | Conv, n_iter: int = 6) -> Tensor:
    """Upper bound (in exact arithmetic) of the operator's norm as a 0-d tensor with its graph.

    The arg-max block is found without a graph and alone carries the gradient, which there is that of the maximum:
    docs/methods.md#the-gradient. Memory does not grow with `n_iter`.

    >>> operator_gram_norm(Dense(torch.diag(torch.tensor([3.0, 4.0]))), n_iter=8).item()
    4.0
    """
    return gram_norm(op.weight, n_iter) if isinstance(op, Dense) else _symbol_gram_norm(symbol(op), n_iter)


def _symbol_gram_norm(sym: Symbol, n_iter: int) -> Tensor:
    sides, factor, _ = grid(sym)
    with torch.no_grad():
        norms = gram_norm(transform(sym.kernel.detach(), sides), n_iter)
        place = norms.flatten().argmax()
    frequency: list[Tensor] = []
    for side, half in zip(reversed(sides), reversed(norms.shape[1:]), strict=True):
        frequency.append((place % half).to(norms.dtype) * (2 * math.pi / side))
        place = place // half
    block = sym.at(torch.stack(frequency[::-1])[None]).index_select(0, place[None])[0, 0]
    return factor * gram_norm(block, n_iter)


def conv_gram_norm(
    weight: Tensor,
    input_size: Ints | None = 32,
    n_iter: int = 6,
    stride: Ints = 1,
    padding_mode: str = "circular",
    *,
    padding: Ints | Sequence[tuple[int, int]] | Literal["same", "valid"] | None = None,
    dilation: Ints = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: Ints = 0,
) -> Tensor:
    """Upper bound (in exact arithmetic) of a convolution's spectral norm, differentiable: the paper's bound.

    Zero padding uses a circulant of size n + p, stride the polyphase blocks, groups the largest of them. The two-moment
    bound closes the iteration (see `gram_norm`). Values are not checked, so that nothing waits for the device: a weight
    with NaN gives NaN. Rounding is not included: for a proved interval call `gramlip.bound`.

    Args:
        weight: (c_out, c_in / groups, *k), or (c_in, c_out / groups, *k) when `transposed`; 1 to 3 kernel axes.
        input_size: spatial size of the input; None holds for every size.
        n_iter: Gram steps, at least 1.
        stride: as in `torch.nn`.
        padding_mode: "circular", "zeros" (for a transposed convolution), or "reflect" and "replicate", times the norm of the padding.
        padding: as in `gramlip.Conv`; None is half of the dilated kernel, which keeps the size at stride 1.
        dilation: as in `torch.nn`.
        groups: as in `torch.nn`.
        transposed: the map of `torch.nn.ConvTranspose*d`.
        output_padding: as in `torch.nn.ConvTranspose*d`.

    Returns:
        0-d real tensor in the weight's precision (float32 for half precisions); a zero weight gives zero.

    Raises:
        InputError: a geometry that torch does not accept, a weight that is no floating-point tensor, or n_iter below 1.

    Reference: arXiv 2305.16173, algorithm 3; docs/methods.md#gram.

    >>> weight = torch.ones(1, 1, 3, 3, requires_grad=True)
    >>> norm = conv_gram_norm(weight, input_size=8)
    >>> norm.backward()
    >>> round(norm.item(), 4), round(weight.grad.sum().item(), 4)
    (9.0, 9.0)
    """
    if not isinstance(weight, Tensor) or not (weight.is_floating_point() or weight.is_complex()):
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        msg = f"a weight of {kind} was given; expected a tensor of real or complex floating-point numbers: type weight.double()"
        raise InputError(msg)
    options = (padding_mode, dilation, groups, transposed, output_padding)
    parts, *geometry = _geometry(tuple(weight.shape), input_size, stride, padding, options)
    kernel, scale = _scaled(wide(weight))
    sym = Symbol(kernel.reshape(parts, weight.shape[0] // parts, *weight.shape[1:]), *geometry)
    return (_symbol_gram_norm(sym, n_iter) * scale[0] * scale[1]).to(real_dtype(weight))


@torch.compiler.assume_constant_result  # type: ignore[reportUntypedFunctionDecorator]
def _geometry(shape: tuple[int, ...], input_size: Any, stride: Any, padding: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Groups, and strides, points, square, exact and because of the `Symbol`: numbers, which compiled code takes as they are."""
    placeholder = torch.ones((), device="cpu").expand(shape)  # a geometry needs no values
    if padding is None:
        spans = Conv(placeholder, dilation=options[1]).spans
        padding = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    op = Conv(placeholder, input_size, stride, padding, *options)
    sym = symbol(op)
    return op.groups, sym.strides, sym.points, sym.square, sym.exact, sym.because


def _scaled(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The tensor over a power of two no larger than its largest entry, in two factors since one may not be representable."""
    exponent = torch.frexp(x.detach().abs().amax())[1] - 1
    one = torch.ones((), dtype=x.real.dtype if x.is_complex() else x.dtype, device=x.device)
    scale = torch.ldexp(one, exponent // 2), torch.ldexp(one, exponent - exponent // 2)
    return x / scale[0] / scale[1], scale
