"""The oracle: a layer's norm from its action on a basis. It uses torch's layers and an SVD, and nothing of gramlip's mathematics."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.operators.linear_maps import Conv, Dense, Diagonal

Pairs = Sequence[tuple[int, int]]
_CONV: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PAD: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
}
_ROWS = 1024  # basis vectors per forward pass


def oracle(layer: nn.Module | Conv | Dense | Diagonal, input_shape: Sequence[int] | None = None) -> float:
    """The l2 norm of an affine layer's linear part, with a relative error of about 1e-13, on either side of the truth.

    It forms `matrix(layer, input_shape)` in float64 (complex128), scales it by a power of two, and computes the largest singular value.
    The cost grows as the cube of the number of input entries, so it is meant for a few hundred.

    Args:
        layer: any affine `nn.Module`, or an operator.
        input_shape: shape of one example without the batch axis; omitted for an operator, which has its own.

    Raises:
        InputError: an operator without an input size, or a module without `input_shape`.

    Reference: docs/conformance.md.

    >>> oracle(Dense(torch.diag(torch.tensor([3.0, -4.0]))))
    4.0
    """
    return norm(matrix(layer, input_shape))


def norm(a: Tensor) -> float:
    """The largest singular value of a float64 or complex128 matrix, safe for entries near the ends of the range."""
    peak = float(a.abs().amax())
    if peak == 0.0:
        return 0.0
    exponent = math.frexp(peak)[1]
    scaled = a * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2)
    return math.ldexp(float(torch.linalg.svdvals(scaled)[0]), exponent)


def matrix(layer: nn.Module | Conv | Dense | Diagonal, input_shape: Sequence[int] | None = None) -> Tensor:
    """The float64 matrix (inputs, outputs) of an affine layer's linear part: row i is the image of basis vector i.

    Raises:
        InputError: as in `oracle`.

    >>> matrix(nn.AvgPool1d(2), (1, 4))[:, 0].tolist()
    [0.5, 0.5, 0.0, 0.0]
    """
    if not isinstance(layer, nn.Module):
        input_shape = _input_shape(layer)
        layer = as_module(layer)
    if input_shape is None:
        msg = f"input_shape is missing for {type(layer).__name__}; expected the shape of one example, such as (3, 8, 8)"
        raise InputError(msg)
    values = [*layer.parameters(), *layer.buffers()]
    dtype = torch.complex128 if any(v.is_complex() for v in values) else torch.float64
    basis = torch.eye(math.prod(input_shape), dtype=dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'|Complex modules are a new feature")
        exact = copy.deepcopy(layer).to(dtype).eval()
        constant = exact(torch.zeros(1, *input_shape, dtype=dtype))
        return torch.cat([(exact(rows.reshape(-1, *input_shape)) - constant).flatten(1) for rows in basis.split(_ROWS)])


def torch_layer(
    weight: Tensor,
    stride: Sequence[int] = (),
    padding: Pairs | str = (),
    padding_mode: str = "zeros",
    dilation: Sequence[int] = (),
    groups: int = 1,
    transposed: bool = False,
    output_padding: Sequence[int] = (),
) -> nn.Module:
    """The real torch layer with this weight: `nn.Linear`, `nn.Conv*d` or `nn.ConvTranspose*d`.

    Padding with different amounts before and after, which torch's layer does not accept, becomes a padding layer in front of it (or a
    cropping layer behind it).
    """
    d = weight.ndim - 2
    if d == 0:
        return _filled(nn.Linear, weight, weight.shape[1], weight.shape[0])
    pairs = [] if isinstance(padding, str) else list(padding)
    settings = {"stride": tuple(stride), "dilation": tuple(dilation), "groups": groups, "bias": False}
    if transposed:
        return _transposed(weight, pairs, settings | {"output_padding": tuple(output_padding)})
    layer = partial(_filled, _CONV[d - 1], weight, weight.shape[1] * groups, weight.shape[0], weight.shape[2:], **settings)
    if all(lo == hi for lo, hi in pairs):
        return layer(padding=padding if isinstance(padding, str) else tuple(lo for lo, _ in pairs), padding_mode=padding_mode)
    room = tuple(x for pair in reversed(pairs) for x in pair)
    return nn.Sequential(_PAD[padding_mode][d - 1](room), layer())


def _transposed(weight: Tensor, pairs: Pairs, settings: dict[str, Any]) -> nn.Module:
    dims, channels = weight.ndim - 2, (weight.shape[0], weight.shape[1] * settings["groups"])
    layer = partial(_filled, _TRANSPOSED[dims - 1], weight, *channels, weight.shape[2:], **settings)
    if all(lo == hi for lo, hi in pairs):
        return layer(padding=tuple(lo for lo, _ in pairs))
    crop = tuple(x for lo, hi in reversed(pairs) for x in (-lo, -hi))
    return nn.Sequential(layer(), _PAD["zeros"][dims - 1](crop))


def as_module(op: Conv | Dense | Diagonal) -> nn.Module:
    """The torch layer that computes an operator."""
    if isinstance(op, Diagonal):
        return _Scale(op.weight.detach())
    if isinstance(op, Dense):
        return torch_layer(op.weight.detach())
    fields = op.stride, op.padding, op.padding_mode, op.dilation, op.groups, op.transposed, op.output_padding
    return torch_layer(op.weight.detach(), *fields)  # type: ignore[arg-type]


class _Scale(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _filled(kind: Callable[..., nn.Module], weight: Tensor, *args: Any, **settings: Any) -> nn.Module:
    """A torch layer with the given weight and no bias; the global random generator is not used."""
    if kind is nn.Linear:
        settings["bias"] = False
    module = kind(*args, device="meta", **settings)
    module.weight = nn.Parameter(weight.detach().clone())
    return module


def _input_shape(op: Conv | Dense | Diagonal) -> tuple[int, ...]:
    if isinstance(op, Diagonal):
        return tuple(op.weight.shape)
    if isinstance(op, Dense):
        return (op.weight.shape[1],)
    if op.input_size is None:
        msg = "input_size=None was given to the oracle; expected one size: type Conv(weight, input_size=8, ...)"
        raise InputError(msg)
    channels = op.weight.shape[0] if op.transposed else op.weight.shape[1] * op.groups
    return (channels, *op.input_size)  # type: ignore[misc]
