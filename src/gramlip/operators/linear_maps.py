"""Operators: frozen data that says which linear map a layer is, checked once; their axes, and functions that apply them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from gramlip.errors import InputError
from gramlip.numerics.precision import DTYPES, to_float64
from gramlip.operators.given import as_tensor, is_array_like, is_sharded, is_sparse

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Ints = int | Sequence[int]
Shape = tuple[int, ...]
MODES = ("circular", "reflect", "replicate", "zeros")
SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
EIGHT_BITS = tuple(kind for name, kind in vars(torch).items() if name.startswith("float8_"))  # the same message in every version of torch


def checked(weight: object, name: str = "weight") -> Tensor:
    """The weight as a tensor in a dtype that torch computes in; InputError if it has no finite float entries.

    An array or a nested list becomes a tensor of the same numbers. An 8-bit float tensor becomes float32, which is exact: torch has few
    functions for 8-bit floats.
    """
    if is_sparse(weight):
        msg = f"{name} is a sparse matrix; expected a dense one: type {name}.toarray(), or gramlip.bound({name}) for its norm"
        raise InputError(msg)
    if is_array_like(weight):
        weight = as_tensor(weight, name)
    if not isinstance(weight, Tensor):
        msg = f"{name} is a {type(weight).__name__}; expected a torch.Tensor of floats: type torch.as_tensor({name})"
        raise InputError(msg)
    if is_lazy(weight):
        msg = f"{name} has no shape yet; expected an initialised layer: run one forward pass first"
        raise InputError(msg)
    if weight.dtype in EIGHT_BITS:
        weight = weight.float()
    if weight.dtype not in DTYPES:
        how = f"type {name}.dequantize()" if weight.is_quantized else f"type {name}.float(), or unpack it where torch cannot"
        msg = f"{name} has dtype {weight.dtype}; expected a floating or complex dtype: {how}"
        raise InputError(msg)
    if weight.layout != torch.strided or weight.is_nested or weight.is_meta or isinstance(weight, MaskedTensor):
        kinds = {
            "on the meta device": weight.is_meta,
            "nested": weight.is_nested,
            f"stored as {weight.layout}": weight.layout != torch.strided,
        }
        kind = next((kind for kind, so in kinds.items() if so), "masked")
        how = "load the weights" if weight.is_meta else f"type {name}.{'unbind' if weight.is_nested else 'to_dense'}()"
        msg = f"{name} is {kind}; expected a dense tensor with values: {how}"
        raise InputError(msg)
    if weight.numel() == 0:
        msg = f"{name} has shape {tuple(weight.shape)}; expected every axis to be at least 1"
        raise InputError(msg)
    if not _finite(weight.detach(), name):
        msg = f"{name} holds NaN or infinite values; expected finite weights"
        raise InputError(msg)
    return weight


def _finite(weight: Any, name: str) -> bool:
    if is_sharded(weight):
        return _finite_on_all(weight, name)
    if not weight.numel():
        return True
    parts = weight.split(max(1, (1 << 22) * weight.shape[0] // weight.numel())) if weight.ndim else (weight,)
    try:
        return all(bool(torch.isfinite(part).all()) for part in parts)
    except (RuntimeError, TypeError) as error:  # a fake tensor, or another object that only looks like a tensor
        msg = f"{name} is a {type(weight).__name__} whose values cannot be read; expected a plain torch.Tensor"
        raise InputError(msg) from error


def _finite_on_all(weight: DTensor, name: str) -> bool:
    """Whether the shards of all ranks are finite, on all ranks of the mesh; nothing but the answers is sent."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if weight.device_mesh.get_coordinate() is None:
        return True  # nothing of it is here
    if any(placed.is_partial() for placed in weight.placements):
        weight = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim)
    local = weight.to_local()
    wrong = local.new_full((), not _finite(local, name), dtype=torch.float32)
    return not bool(DTensor.from_local(wrong, weight.device_mesh, [Partial()] * weight.device_mesh.ndim, run_check=False).full_tensor())


def _axes(name: str, value: object, dims: int, least: int) -> tuple[int, ...]:
    given = (value,) * dims if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(given) != dims or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in given):
        msg = f"{name}={value!r} was given; expected an integer of at least {least}, or {dims} of them"
        raise InputError(msg)
    return cast("tuple[int, ...]", given)


@dataclass(frozen=True, eq=False)
class Dense:
    """A real or complex matrix of shape (m, n), as a tensor, an array or nested lists; `because` says where it comes from.

    Raises:
        InputError: not a matrix, or entries that are not finite.

    >>> Dense(torch.eye(2)).weight.shape
    torch.Size([2, 2])
    """

    weight: Tensor
    because: str = "a matrix"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", checked(self.weight))
        if self.weight.ndim != 2:
            msg = f"weight has shape {tuple(self.weight.shape)}; expected a matrix (m, n): type gramlip.Conv(weight, ...) for a kernel"
            raise InputError(msg)


@dataclass(frozen=True, eq=False)
class Sparse:
    """A sparse matrix (m, n): a tensor of any sparse layout of torch, stored as coordinates.

    Raises:
        InputError: not a matrix, entries that are not finite, or an entry that is stored twice.

    >>> Sparse(torch.eye(3).to_sparse()).weight.values()
    tensor([1., 1., 1.])
    """

    weight: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _coordinates(self.weight))


def _coordinates(weight: Tensor) -> Tensor:
    """The sparse matrix in torch's COO layout, sorted, with its entries checked."""
    shape = tuple(weight.shape)
    if len(shape) != 2 or weight.dense_dim() or not 0 < shape[0] * shape[1] < 2**63:
        msg = f"weight is sparse of shape {shape}; expected a matrix (m, n) of single entries, each axis at least 1"
        raise InputError(msg)
    if weight.is_meta:
        checked(weight)  # raises the InputError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that a layout is in beta
        coo = weight.detach().to_sparse_coo()
    places, values = coo._indices(), coo._values()
    values = checked(values) if len(values) else checked(values.new_zeros(1))[:0]
    if bool(((places < 0) | (places >= places.new_tensor([[shape[0]], [shape[1]]]))).any()):
        msg = f"weight is sparse of shape {shape} with places outside of it; expected none there: create it with check_invariants=True"
        raise InputError(msg)
    flat = places[0] * shape[1] + places[1]
    if not bool((flat[1:] > flat[:-1]).all()):
        flat, order = flat.sort()
        places, values = places[:, order], values[order]
    if bool((flat[1:] == flat[:-1]).any()):
        msg = "weight is sparse and stores an entry twice; expected one value for each: type weight.coalesce(), or weight.sum_duplicates()"
        raise InputError(msg)
    return torch.sparse_coo_tensor(places, values, shape, is_coalesced=True, check_invariants=False)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A diagonal matrix: multiplication of each entry by a constant of its own.

    >>> Diagonal(torch.tensor([1.0, -3.0])).weight.shape
    torch.Size([2])
    """

    weight: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", checked(self.weight))


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiplication of the entries by constants, a float64 tensor that broadcasts to the value's shape."""

    weight: Tensor


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution as torch computes it (cross-correlation), in 1, 2 or 3 dimensions.

    Args:
        weight: (c_out, c_in / groups, *k), or (c_in, c_out / groups, *k) when `transposed`.
        input_size: spatial size of the input, one integer for all axes or one per axis; None: any size.
        stride: as in `torch.nn`, one integer for all axes or one per axis.
        padding: an integer, one per axis, a pair (before, after) per axis, "same" or "valid".
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        dilation: as in `torch.nn`.
        groups: as in `torch.nn`.
        transposed: True for the map of `torch.nn.ConvTranspose*d`.
        output_padding: as in `torch.nn`; only for a transposed convolution.

    Raises:
        InputError: a value that torch would refuse, or entries that are not finite; it says what was expected.

    >>> Conv(torch.ones(1, 1, 3, 3), input_size=8, padding="same").padding
    ((1, 1), (1, 1))
    """

    weight: Tensor
    input_size: Ints | None = None
    stride: Ints = 1
    padding: Ints | Sequence[tuple[int, int]] | Literal["same", "valid"] = 0
    padding_mode: str = "zeros"
    dilation: Ints = 1
    groups: int = 1
    transposed: bool = False
    output_padding: Ints = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", checked(self.weight))
        if not 3 <= self.weight.ndim <= 5:
            msg = f"weight has shape {tuple(self.weight.shape)}; expected (c_out, c_in / groups, *kernel) with 1 to 3 kernel axes"
            raise InputError(msg)
        d = self.dims
        put = object.__setattr__  # the only place where the frozen fields are set, to their normal form
        put(self, "stride", _axes("stride", self.stride, d, 1))
        put(self, "dilation", _axes("dilation", self.dilation, d, 1))
        put(self, "output_padding", _axes("output_padding", self.output_padding, d, 0))
        put(self, "padding", self._pairs())
        if self.padding_mode not in MODES:
            msg = f"padding_mode={self.padding_mode!r} is unknown; expected one of {list(MODES)}"
            raise InputError(msg)
        if self.transposed and self.padding_mode != "zeros":
            msg = f"padding_mode={self.padding_mode!r} was given for a transposed convolution; expected 'zeros'"
            raise InputError(msg)
        if any(self.output_padding) and not self.transposed:  # type: ignore[arg-type]
            msg = f"output_padding={self.output_padding} was given; expected 0, or a transposed convolution: type transposed=True"
            raise InputError(msg)
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1 or self.weight.shape[0] % self.groups:
            msg = f"groups={self.groups!r} was given for {self.weight.shape[0]} channels; expected a divisor of them"
            raise InputError(msg)
        if self.input_size is not None:
            put(self, "input_size", _axes("input_size", self.input_size, d, 1))
            self._check_size()

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return self.weight.ndim - 2

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride on each axis."""
        return cast("tuple[int, ...]", self.stride)

    @property
    def dilations(self) -> tuple[int, ...]:
        """The dilation on each axis."""
        return cast("tuple[int, ...]", self.dilation)

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """The padding (before, after) on each axis."""
        return cast("tuple[tuple[int, int], ...]", self.padding)

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The spatial size of the input; None for any size."""
        return cast("tuple[int, ...] | None", self.input_size)

    @property
    def spans(self) -> tuple[int, ...]:
        """Side of the dilated kernel on each axis."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True))  # type: ignore[arg-type]

    @property
    def output_size(self) -> tuple[int, ...] | None:
        """Spatial size of the output; None if the input size is not given."""
        if self.input_size is None:
            return None
        axes = zip(self.input_size, self.spans, self.stride, self.padding, self.output_padding, strict=True)  # type: ignore[arg-type]
        if self.transposed:
            return tuple((n - 1) * s - lo - hi + span + extra for n, span, s, (lo, hi), extra in axes)  # type: ignore[misc]
        return tuple((n + lo + hi - span) // s + 1 for n, span, s, (lo, hi), _ in axes)  # type: ignore[misc]

    def _pairs(self) -> tuple[tuple[int, int], ...]:
        if self.padding == "valid":
            return ((0, 0),) * self.dims
        if self.padding == "same":
            if any(s != 1 for s in self.stride):  # type: ignore[union-attr]
                msg = f"padding='same' was given with stride={self.stride}; expected stride 1, as in torch"
                raise InputError(msg)
            return tuple(((span - 1) // 2, span - 1 - (span - 1) // 2) for span in self.spans)
        if isinstance(self.padding, str):
            msg = f"padding={self.padding!r} is unknown; expected an integer, one per axis, 'same' or 'valid'"
            raise InputError(msg)
        if isinstance(self.padding, Sequence) and any(isinstance(p, Sequence) for p in self.padding):
            pairs = tuple(_axes("padding", p, 2, 0) for p in self.padding)
            if len(pairs) == self.dims:
                return tuple((lo, hi) for lo, hi in pairs)
            msg = f"padding={self.padding!r} was given; expected {self.dims} pairs (before, after)"
            raise InputError(msg)
        return tuple((p, p) for p in _axes("padding", self.padding, self.dims, 0))  # type: ignore[arg-type]

    def _check_size(self) -> None:
        output = self.output_size
        assert output is not None
        if min(output) < 1:
            msg = (
                f"input_size={self.input_size} with padding={self.padding} is smaller than the kernel, {self.spans} with "
                f"its dilation; expected an input at least as large: pass a larger input_size or more padding"
            )
            raise InputError(msg)
        limit = {"reflect": -1, "circular": 0}.get(self.padding_mode)
        for n, pair in zip(self.input_size, self.padding, strict=True):  # type: ignore[arg-type]
            if limit is not None and max(pair) > n + limit:  # type: ignore[type-var,operator]
                msg = (
                    f"padding={pair} was given with {self.padding_mode} mode and input size {n}; expected at most {n + limit}, as in torch"
                )
                raise InputError(msg)
        if self.transposed:
            pairs = zip(self.output_padding, self.stride, self.dilation, strict=True)  # type: ignore[arg-type]
            if any(extra >= max(s, d) for extra, s, d in pairs):
                msg = f"output_padding={self.output_padding} was given; expected less than stride or dilation, as in torch"
                raise InputError(msg)


@dataclass(frozen=True, eq=False)
class Separable:
    """One matrix for each spatial axis, the same for all channels: their Kronecker product, times a constant.

    >>> Separable((torch.eye(2), torch.ones(1, 4)), 0.5).scale
    0.5
    """

    factors: tuple[Tensor, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.factors, Sequence):
            msg = f"factors is a {type(self.factors).__name__}; expected a tuple of matrices, one for each axis: type (matrix,)"
            raise InputError(msg)
        weights = tuple(Dense(checked(factor, f"factors[{i}]")).weight for i, factor in enumerate(self.factors))
        object.__setattr__(self, "factors", weights)
        if not isinstance(self.scale, float | int) or not math.isfinite(self.scale):
            msg = f"scale={self.scale!r} was given; expected a finite number"
            raise InputError(msg)


Operator = Dense | Sparse | Diagonal | Conv | Separable


# ---- axes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution as torch defines it; `size` of the input and `outputs` of the output are None for any size."""

    size: int | None
    outputs: int | None
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def span(self) -> int:
        """Side of the dilated kernel."""
        return self.dilation * (self.kernel - 1) + 1


def index_map(axis: Axis, mode: str) -> Tensor:
    """The input position that tap p of output o reads, -1 for a padded zero; shape (k, outputs)."""
    assert axis.size is not None
    assert axis.outputs is not None
    n = axis.size
    at = torch.arange(axis.kernel)[:, None] * axis.dilation + torch.arange(axis.outputs)[None, :] * axis.stride - axis.before
    if mode == "circular":
        return at.remainder(n)
    if mode == "replicate":
        return at.clamp(0, n - 1)
    if mode == "reflect":
        period = max(2 * n - 2, 1)
        folded = at.remainder(period)
        return torch.where(folded < n, folded, period - folded)
    return torch.where((at >= 0) & (at < n), at, -1)


def axes(op: Conv) -> list[Axis]:
    """The axes of the convolution; for a transposed one, those of the convolution whose adjoint it is."""
    unknown = (None,) * op.dims
    inputs, outputs = op.sizes or unknown, op.output_size or unknown
    if op.transposed:
        inputs, outputs = outputs, inputs
    geometry = zip(inputs, outputs, op.weight.shape[2:], op.strides, op.dilations, op.pads, strict=True)
    return [Axis(n, m, k, s, d, lo, hi) for n, m, k, s, d, (lo, hi) in geometry]


# ---- operators applied ---------------------------------------------------------------------------------------------------

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def apply(op: Dense | Conv | Scale, x: Tensor) -> Tensor:
    """Apply the map, without bias, to a batch. The dtype of `x` must be that of the weight, or float64."""
    weight = op.weight if op.weight.dtype == x.dtype else to_float64(op.weight)
    if isinstance(op, Scale):
        return x * weight
    if isinstance(op, Dense):
        return x @ weight.mT
    return _transposed(op, weight, x) if op.transposed else _convolution(op, weight, x)


def matrix_of(op: Dense | Conv | Scale, shape: Shape) -> Tensor:
    """The float64 matrix (m, n) of the map on values of `shape`; for a convolution the first axis of `shape` is a batch."""
    n = math.prod(shape)
    basis = torch.eye(n, dtype=torch.float64)
    with torch.no_grad():
        images = apply(op, basis.reshape(n * shape[0], *shape[1:]) if isinstance(op, Conv) else basis.reshape(n, *shape))
    return images.reshape(n, -1).mT.contiguous()


def _convolution(op: Conv, weight: Tensor, x: Tensor) -> Tensor:
    pads = [p for pair in reversed(op.pads) for p in pair]
    if any(pads):
        x = F.pad(x, pads, mode="constant" if op.padding_mode == "zeros" else op.padding_mode)
    return _CONV[op.dims](x, weight, None, op.stride, 0, op.dilation, op.groups)


def _transposed(op: Conv, weight: Tensor, x: Tensor) -> Tensor:
    """Compute without padding, then crop: torch's function takes only one padding for both sides of an axis."""
    y = _TRANSPOSED[op.dims](x, weight, None, op.stride, 0, 0, op.groups, op.dilation)
    extras = cast("tuple[int, ...]", op.output_padding)
    crops = [c for (lo, hi), extra in zip(reversed(op.pads), reversed(extras), strict=True) for c in (-lo, extra - hi)]
    return F.pad(y, crops)
