"""The published formulas: Gram iteration on blocks, on the raw taps, on the layer itself, on the symbol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gramlip.errors import InputError, check_integers
from gramlip.norm.polyphase import Symbol, blocks, grid, symbol, transform
from gramlip.numerics import precision
from gramlip.numerics.eigenvalues import check_matrices, gram_norm, reals
from gramlip.numerics.precision import gram, in_norm_precision, norm, real_dtype
from gramlip.operators.linear_maps import Conv, Dense, Ints, apply

# ---- differentiable norms of convolutions --------------------------------------------------------------------------------


def operator_gram_norm(op: Dense | Conv, n_iter: int = 6) -> Tensor:
    """Upper bound (in exact arithmetic) of the operator's norm as a 0-d tensor with its graph.

    The largest block is found without a graph; its gradient is that of the maximum: docs/methods.md#the-gradient. The memory does not
    grow with `n_iter`.

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

    For zero padding it uses a circulant of size n + p, for a stride the polyphase blocks, for groups the largest norm of them. The
    two-moment bound closes the iteration (see `gram_norm`). Values are not checked, since that would wait for the device: a weight with
    NaN gives NaN. Rounding errors are not included: for a proved interval call `gramlip.bound`.

    Args:
        weight: (c_out, c_in / groups, *k), or (c_in, c_out / groups, *k) when `transposed`; 1 to 3 kernel axes.
        input_size: spatial size of the input; None: the bound holds for every size.
        n_iter: Gram steps, at least 1.
        stride: as in `torch.nn`.
        padding_mode: "circular", "zeros" (required for a transposed convolution), or "reflect" and "replicate", for which the result
            includes the norm of the padding.
        padding: as in `gramlip.Conv`; None: half of the dilated kernel, which keeps the size at stride 1.
        dilation: as in `torch.nn`.
        groups: as in `torch.nn`.
        transposed: True for the map of `torch.nn.ConvTranspose*d`.
        output_padding: as in `torch.nn.ConvTranspose*d`.

    Returns:
        0-d real tensor in the weight's precision (float32 for half precisions); a zero weight gives zero.

    Raises:
        InputError: a geometry that torch does not accept, a weight that is not a floating-point tensor, or n_iter below 1.

    Reference: arXiv 2305.16173, algorithm 3; docs/methods.md#gram.

    >>> weight = torch.ones(1, 1, 3, 3, requires_grad=True)
    >>> norm = conv_gram_norm(weight, input_size=8)
    >>> norm.backward()
    >>> round(norm.item(), 4), round(weight.grad.sum().item(), 4)
    (9.0, 9.0)
    """
    _check_weight(weight)
    options = (padding_mode, dilation, groups, transposed, output_padding)
    parts, *geometry = _geometry(tuple(weight.shape), input_size, stride, padding, options)
    kernel, scale = _scaled(in_norm_precision(weight))
    sym = Symbol(kernel.reshape(parts, weight.shape[0] // parts, *weight.shape[1:]), *geometry)
    return (_symbol_gram_norm(sym, n_iter) * scale[0] * scale[1]).to(real_dtype(weight))


def _check_weight(weight: Any) -> None:
    if not isinstance(weight, Tensor) or not (weight.is_floating_point() or weight.is_complex()):
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        msg = f"a weight of {kind} was given; expected a tensor of real or complex floating-point numbers: type weight.double()"
        raise InputError(msg)


def _geometry(shape: tuple[int, ...], input_size: Any, stride: Any, padding: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The number of groups, and the fields of the `Symbol` other than the kernel: constants for compiled code."""
    placeholder = torch.ones((), device="cpu").expand(shape)  # the geometry does not depend on the values
    if padding is None:
        spans = Conv(placeholder, dilation=options[1]).spans
        padding = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    op = Conv(placeholder, input_size, stride, padding, *options)
    sym = symbol(op)
    return op.groups, sym.strides, sym.points, sym.padding_norm_squared, sym.exact, sym.because


# torch.compiler.assume_constant_result sets this too, but imports the compiler, which takes most of a second
_geometry._dynamo_marked_constant = True  # type: ignore[reportFunctionMemberAccess,attr-defined]


def _scaled(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The tensor divided by a power of two no larger than its largest entry, and that power as two factors, each representable."""
    exponent = torch.frexp(x.detach().abs().amax())[1] - 1
    unit = torch.ones((), dtype=x.real.dtype if x.is_complex() else x.dtype, device=x.device)
    scale = torch.ldexp(unit, exponent // 2), torch.ldexp(unit, exponent - exponent // 2)
    return x / scale[0] / scale[1], scale


# ---- arXiv 2305.16173 ----------------------------------------------------------------------------------------------------
#
# They do not cover rounding, zero padding and stride, as the rest of gramlip does. For a proved interval call `gramlip.bound`;
# for training call `gramlip.gram_norm` and `gramlip.conv_gram_norm`, whose memory does not grow with the steps. Here autograd
# differentiates every step.


def Power_iteration(G: Tensor, Niter: int = 100, *, generator: torch.Generator | None = None) -> Tensor:
    """Lower estimate of the spectral norm by power iteration from a random start (algorithm 1).

    Args:
        G: matrices (..., m, n), real or complex.
        Niter: steps; each takes a product with G and one with its adjoint.
        generator: random generator of the start vector; None: torch's global one.

    Returns:
        Tensor of shape (...): `||G u||` at the last unit vector u; up to rounding never above the norm.

    >>> Power_iteration(torch.diag(torch.tensor([3.0, 4.0])), 50).item()
    4.0
    """
    _check(G, Niter)
    u = torch.randn(*G.shape[:-2], G.shape[-1], 1, dtype=G.dtype, device=G.device, generator=generator)
    u = u / _size(u)
    for _ in range(Niter):
        v = _direction(G @ u)
        u = _direction(G.mH @ v)
    image = G @ u
    peak = image.abs().amax(dim=(-2, -1), keepdim=True)
    image = image / torch.where(peak > 0, peak, 1.0)
    return peak[..., 0, 0] * norm(image, 2)


def Lip_dense(G: Tensor, Niter: int = 6) -> Tensor:
    """Upper bound, in exact arithmetic, of the spectral norm by rescaled Gram iteration (algorithm 2).

    Args:
        G: matrices (..., m, n), real or complex.
        Niter: Gram steps; 0 is the Frobenius norm. The relative error is at most log(rank) / 2^(Niter + 1).

    Returns:
        Tensor of shape (...), the Schatten norm of order 2^(Niter + 1).

    >>> round(Lip_dense(torch.diag(torch.tensor([3.0, 4.0])), 5).item(), 5)
    4.0
    """
    _check(G, Niter)
    tall = G if G.shape[-2] >= G.shape[-1] else G.mH
    peak = reals(G.detach()).abs().amax(-1)[..., None, None]
    x, log = _gram_iterate(tall / torch.where(peak > 0, peak, 1.0), Niter, 2)
    root = 2.0**-Niter
    return (peak * _root(norm(x, 2, keepdim=True), root) * (log * root).exp())[..., 0, 0]


def _gram_iterate(x: Tensor, steps: int, axes: int) -> tuple[Tensor, Tensor]:
    """The iterate after Gram steps, rescaled before each by its norm over the last axes, and the logarithm of what it is scaled by."""
    log = x.real.new_zeros(())
    for step in range(steps):
        size = _size(x, axes)
        x = x / size
        log = 2 * (log + size.log())
        x = x @ x if step else gram(x)  # the iterates are Hermitian after the first product
    return x, log


def Lip_conv(K: Tensor, Niter: int = 6, *, n: int | Sequence[int], n0: int | None = None) -> Tensor:
    """Upper bound, in exact arithmetic, of a circular convolution of stride 1 (algorithm 3).

    Args:
        K: kernel (c_out, c_in, *k).
        Niter: Gram steps at every frequency.
        n: input size, an integer or one per axis. If the kernel is larger, its taps wrap around and are added, not cropped.
        n0: points per side of a smaller grid, at least 2 (k - 1). The result then includes the factor `prod_j (1 - (k_j - 1) /
            n0)^(-1/2)`, which is the paper's for square kernels, and holds for every n.

    Returns:
        0-d tensor: the largest bound over the frequencies.

    >>> round(Lip_conv(torch.ones(1, 1, 3, 3), n=8).item(), 4)
    9.0
    """
    if not isinstance(K, Tensor) or K.ndim < 3:
        given = tuple(K.shape) if isinstance(K, Tensor) else type(K).__name__
        msg = f"K of {given} was given; expected (c_out, c_in, *k): type gramlip.paper.Lip_dense for a matrix"
        raise InputError(msg)
    sides = list(n) if isinstance(n, Sequence) else [n] * (K.ndim - 2)
    if len(sides) != K.ndim - 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        msg = f"n={n!r} was given; expected an integer of at least 1, or {K.ndim - 2} of them"
        raise InputError(msg)
    factor = 1.0
    if n0 is not None:
        sides = [n0] * len(sides)
        factor = oversampling(list(K.shape[2:]), n0)
    return factor * Lip_dense(transform(K[None], sides), Niter).amax()


def Gram_iteration_naive(G: Tensor, Niter: int = 6) -> Tensor:
    """Gram iteration without rescaling (algorithm 4): over- or underflows after a few steps, as the paper shows.

    Args:
        G: matrices (..., m, n), real or complex.
        Niter: Gram steps.

    Returns:
        Tensor of shape (...): the Schatten norm of order 2^(Niter + 1), or infinity, NaN or zero after an over- or underflow.

    >>> Gram_iteration_naive(torch.full((2, 2), 1e8), 6).isfinite().item()
    False
    """
    _check(G, Niter)
    x = G if G.shape[-2] >= G.shape[-1] else G.mH
    for _ in range(Niter):
        x = gram(x)
    return _root(norm(x, 2), 2.0**-Niter)


def oversampling(kernel: Sequence[int], samples: int) -> float:
    """The published factor from a grid of `samples` points per side to all frequencies: docs/methods.md#oversampling."""
    if not isinstance(samples, int) or samples < 2 * (max(kernel) - 1) or samples < 1:
        msg = f"{samples} samples a side were given for a kernel of {tuple(kernel)}; expected at least {max(1, 2 * (max(kernel) - 1))}"
        raise InputError(msg)
    return math.prod((1 - (k - 1) / samples) ** -0.5 for k in kernel)


def _size(x: Tensor, axes: int = 2) -> Tensor:
    """l2 norms over the last axes as divisors: zero is replaced by one."""
    size = norm(x, axes, keepdim=True)
    return torch.where(size > 0, size, 1.0)


def _root(size: Tensor, power: float) -> Tensor:
    """The power of a norm; at zero, where it has no derivative, both value and gradient are zero."""
    return torch.where(size == 0, 0.0, torch.where(size == 0, 1.0, size) ** power)


def _direction(x: Tensor, axes: int = 2) -> Tensor:
    """The unit vector of x, which its last axes hold, without over- or underflow; zero stays zero."""
    peak = x.detach().abs().amax(dim=tuple(range(-axes, 0)), keepdim=True)
    x = x / torch.where(peak > 0, peak, 1.0)
    return x / _size(x, axes)


def _check(G: Tensor, Niter: int) -> None:
    check_matrices("G", G)
    check_integers(0, Niter=Niter)


# ---- raw taps: bounds of the symbol at every frequency, for any padding and any input size -------------------------------


def frobenius(op: Dense | Conv) -> Tensor:
    """`sqrt(taps) ||K||_F`, by Cauchy and Schwarz over the taps; the Frobenius norm of a matrix."""
    sym = symbol(op)
    norms = norm(sym.kernel.flatten(1))
    return math.sqrt(sym.padding_norm_squared * math.prod(sym.kernel.shape[3:])) * norms.amax()


def torch_reshaped(op: Dense | Conv) -> Tensor:
    """The norm of the reshaped kernel, by which `torch.nn.utils.parametrizations.spectral_norm` divides once it has converged."""
    weight = op.weight
    if isinstance(op, Conv) and op.transposed:
        weight = weight.transpose(0, 1)
    return top_singular_value(weight.flatten(1))


def singla2021(op: Dense | Conv, n_iter: int | None = None) -> Tensor:
    """Fantastic Four: sqrt(taps) times the smallest norm of the unfoldings, with each kernel axis on the row or the column side.

    `n_iter=None` takes exact norms of the unfoldings, an upper bound; a number takes that many power steps, as published,
    and the value may then fall below the bound that it estimates.
    """
    sym = symbol(op)
    dims = sym.kernel.ndim - 3
    factor = math.sqrt(sym.padding_norm_squared * math.prod(sym.kernel.shape[3:]))
    least = None
    for sides in product((True, False), repeat=dims):
        rows = [1, *(3 + j for j in range(dims) if sides[j])]
        columns = [2, *(3 + j for j in range(dims) if not sides[j])]
        height = math.prod(sym.kernel.shape[i] for i in rows)
        unfolding = sym.kernel.permute(0, *rows, *columns).reshape(sym.kernel.shape[0], height, -1)
        value = (top_singular_value(unfolding) if n_iter is None else Power_iteration(unfolding, n_iter)).amax()
        least = value if least is None else torch.minimum(least, value)
    assert least is not None
    return factor * least


def norm2toep(op: Dense | Conv, n_iter: int = 3) -> Tensor:
    """Gram iteration on the kernel itself, `A <- A* A` as convolutions without wrap, closed by the largest absolute row sum.

    The self-convolutions are products on a grid of `2^n_iter (k - 1) + 1` points per side, large enough that no tap wraps around.
    """
    sym = symbol(op)
    kernel = sym.kernel if sym.kernel.shape[1] >= sym.kernel.shape[2] else sym.kernel.transpose(1, 2)
    return math.sqrt(sym.padding_norm_squared) * _row_sum(kernel, n_iter)


def aol(op: Dense | Conv) -> Tensor:
    """AOL: the largest of `sqrt(sum |K* K|)` over the input channels; AOL divides each channel by its own."""
    sym = symbol(op)
    flipped = isinstance(op, Conv) and op.transposed
    return math.sqrt(sym.padding_norm_squared) * _row_sum(sym.kernel.transpose(1, 2) if flipped else sym.kernel, 1)


def tensor_norm(op: Dense | Conv, n_iter: int = 30, starts: int = 4) -> Tensor:
    """sqrt(taps) times the complex spectral norm of the kernel as a tensor, by alternating maximisation from seeded starts.

    The maximisation may stop at a local maximum, below the bound that it estimates.
    """
    sym = symbol(op)
    shape = sym.kernel.shape[1:]
    wide = torch.complex128 if sym.kernel.dtype in (torch.float64, torch.complex128) else torch.complex64
    generator = torch.Generator().manual_seed(0)
    best = torch.zeros((), dtype=torch.float64)
    for tensor in sym.kernel.to(wide):
        for _ in range(starts):
            factors = [_unit(torch.randn(k, generator=generator, dtype=wide).to(tensor.device)) for k in shape]
            best = torch.maximum(best, _maximised(tensor, factors, n_iter).cpu().to(best.dtype))
    return math.sqrt(sym.padding_norm_squared * math.prod(shape[2:])) * best


def _maximised(tensor: Tensor, factors: list[Tensor], n_iter: int) -> Tensor:
    """The largest value of the tensor that alternating maximisation over the unit factors reaches."""
    value = torch.zeros(())
    for _ in range(n_iter):
        for axis in range(len(factors)):
            image = _contract(tensor, factors, axis)
            value = norm(image, image.ndim)
            factors[axis] = _unit(image.conj())
    return value


def top_singular_value(matrices: Tensor) -> Tensor:
    """The largest singular value of each matrix, from the Hermitian product on the smaller side."""
    peak = matrices.abs().amax(dim=(-2, -1), keepdim=True)
    tall = matrices / torch.where(peak > 0, peak, 1.0)
    tall = tall if tall.shape[-2] >= tall.shape[-1] else tall.mH
    return peak[..., 0, 0] * torch.linalg.eigvalsh(gram(tall))[..., -1].clamp(min=0).sqrt()


def toeplitz_roundings(op: Dense | Conv, n_iter: int = 3) -> float:
    """The rounding margin of `norm2toep`: docs/methods.md#rounding."""
    sym = symbol(op)
    taps = math.prod(2**n_iter * (k - 1) + 1 for k in sym.kernel.shape[3:])
    return 2.0**-53 * 64 * (16 + math.log2(taps)) * (min(sym.kernel.shape[1:3]) * taps) ** 2


def _row_sum(kernel: Tensor, n_iter: int) -> Tensor:
    """max_i (sum_j sum_q |A_ij,q|)^(2^-n_iter) of the n_iter-th Gram iterate A of kernels (groups, m, n, *k)."""
    peak = kernel.abs().amax()
    sides = [2**n_iter * (k - 1) + 1 for k in kernel.shape[3:]]
    x = transform(kernel / torch.where(peak > 0, peak, 1.0), sides)
    x, log = _gram_iterate(x, n_iter, x.ndim)
    if sides:
        dims = list(range(1, 1 + len(sides)))
        x = torch.fft.ifftn(x, s=sides, dim=dims) if kernel.is_complex() else torch.fft.irfftn(x, s=sides, dim=dims)
    sums = x.abs().flatten(1, -3).sum(1).sum(-1) if sides else x.abs().sum(-1)
    return peak * (sums.amax() ** (2.0**-n_iter)) * (log.squeeze() * 2.0**-n_iter).exp()


def _contract(tensor: Tensor, factors: list[Tensor], keep: int) -> Tensor:
    """The tensor contracted with every factor except one."""
    for axis in reversed(range(len(factors))):
        if axis > keep:
            tensor = tensor @ factors[axis]
    for axis in range(keep):
        tensor = torch.tensordot(factors[axis], tensor, dims=1)
    return tensor


def _unit(x: Tensor) -> Tensor:
    return x / _size(x, x.ndim)


# ---- power iteration -----------------------------------------------------------------------------------------------------


def power(op: Dense | Conv, n_iter: int = 100, seed: int = 0) -> Tensor:
    """Power iteration with the layer's true padding, stride and adjoint: `||A x||` at the last unit vector x."""
    layer = partial(apply, op)
    shape = [1, op.weight.shape[1]]
    if isinstance(op, Conv):
        shape[1] = op.weight.shape[0] if op.transposed else op.weight.shape[1] * op.groups
        shape += cast("tuple[int, ...]", op.input_size)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=op.weight.dtype).to(op.weight.device)
    x = _direction(x, x.ndim)
    adjoint = cast("Callable[[Tensor], tuple[Tensor]]", torch.func.vjp(layer, x)[1])
    for _ in range(n_iter):
        (x,) = adjoint(_direction(layer(x), x.ndim))
        x = _direction(x, x.ndim)
    image = layer(x)
    return norm(image, image.ndim)


# ---- the symbol on a grid ------------------------------------------------------------------------------------------------


def gram_bound(op: Dense | Conv, n_iter: int = 6) -> Tensor:
    """Gram iteration on the blocks of the padding theorem's grid, closed by the two-moment bound; differentiable.

    Zero padding takes n + p points, a stride the polyphase blocks; for every input size it takes the 32-point grid with its factor.
    """
    return operator_gram_norm(op, n_iter)


def delattre2023(op: Dense | Conv, n_iter: int = 6) -> Tensor:
    """Gram iteration as published: every frequency of the full n-grid, with the stride ignored and the Frobenius norm at the end."""
    if isinstance(op, Dense):
        return Lip_dense(op.weight, n_iter)
    sym = symbol(replace(op, stride=1))
    matrices = transform(sym.kernel, [p for p in sym.points if p is not None])
    return math.sqrt(sym.padding_norm_squared) * Lip_dense(matrices, n_iter).amax()


def sedghi2019(op: Dense | Conv) -> Tensor:
    """The largest singular value over all frequencies of the n-grid, by SVD."""
    return _largest_singular_value(op)


def senderovich2022(op: Dense | Conv) -> Tensor:
    """The largest singular value over the n / s-grid of the polyphase kernel, by SVD."""
    return _largest_singular_value(op)


def araujo2021(op: Dense | Conv, samples: int = 50) -> Tensor:
    """LipGrid: the largest Frobenius norm of the symbol over a grid of the torus, times the oversampling factor.

    The grid has `samples` distinct points per side of [0, 2 pi): the two ends of the period are the same point and count once.
    """
    sym = symbol(op)
    if not sym.points:
        return norm(sym.kernel, sym.kernel.ndim)
    kernel = sym.kernel.flatten(3).movedim(3, 1).flatten(2)  # (groups, taps, m n)
    sides = list(sym.kernel.shape[3:])
    products = precision.gram(kernel.mH)  # inner products of taps: ||D(w)||_F^2 is a quadratic form in the waves
    unit = torch.eye(kernel.shape[1], dtype=kernel.dtype, device=kernel.device).reshape(1, -1, 1, *sides)
    waves = transform(unit, [samples] * len(sides)).flatten(0, -3)[..., 0]  # (points, taps)
    products = products.to(waves.dtype)
    squares = ((waves @ products) * waves.conj()).real.sum(-1)
    return math.sqrt(sym.padding_norm_squared) * oversampling(sides, samples) * squares.amax().clamp(min=0).sqrt()


def is_circular(op: Dense | Conv) -> bool:
    """A matrix, or a circular convolution of known input size."""
    return isinstance(op, Dense) or (op.padding_mode == "circular" and op.input_size is not None)


def is_exact(op: Dense | Conv) -> bool:
    """A matrix, or a circular convolution that its blocks represent exactly."""
    return is_circular(op) and symbol(op).exact


def is_exact_stride_1(op: Dense | Conv) -> bool:
    """Whether the method is exact and the stride 1."""
    return is_exact(op) and (isinstance(op, Dense) or all(s == 1 for s in op.stride))  # type: ignore[union-attr]


def _largest_singular_value(op: Dense | Conv) -> Tensor:
    symbol = blocks(op)
    return symbol.factor * torch.linalg.svdvals(symbol.matrices).amax()
