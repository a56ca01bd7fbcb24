"""`describe`: one registered rule per torch layer; users register their own the same way."""

from __future__ import annotations

from functools import singledispatch

from torch import Tensor, nn

from gramlip.bound import Bound
from gramlip.errors import InputError, UnsupportedError
from gramlip.operators import Conv, Dense, Diagonal, Ints, Operator, Separable


@singledispatch
def describe(module: object, input_size: Ints | None = None) -> Operator | Bound:
    """The linear operator that a layer is, or its Lipschitz interval where that is a known constant.

    Register your own with `@describe.register` on a function `(module: MyLayer, input_size=None) -> operator`.

    Raises:
        UnsupportedError: no rule for this type.

    >>> describe(nn.Linear(3, 2)).weight.shape
    torch.Size([2, 3])
    """
    msg = (
        f"{type(module).__name__} has no rule; expected a layer that gramlip knows: "
        f"type @gramlip.describe.register on a function (module: {type(module).__name__}, input_size=None) -> operator"
    )
    raise UnsupportedError(msg)


@describe.register
def _(module: Conv | Dense | Diagonal | Separable, input_size: Ints | None = None) -> Operator | Bound:
    if input_size is not None:
        msg = f"input_size={input_size!r} was given beside an operator; expected it inside: Conv(weight, input_size=...)"
        raise InputError(msg)
    return module


@describe.register
def _(module: Tensor, input_size: Ints | None = None) -> Dense:
    return Dense(module)


@describe.register
def _(module: nn.Linear, input_size: Ints | None = None) -> Dense:
    return Dense(module.weight)


@describe.register(nn.Conv1d)
@describe.register(nn.Conv2d)
@describe.register(nn.Conv3d)
def _(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, input_size: Ints | None = None) -> Conv:
    return Conv(
        module.weight,
        input_size=input_size,
        stride=module.stride,
        padding=module.padding,  # type: ignore[arg-type]
        padding_mode=module.padding_mode,
        dilation=module.dilation,
        groups=module.groups,
    )


@describe.register(nn.ConvTranspose1d)
@describe.register(nn.ConvTranspose2d)
@describe.register(nn.ConvTranspose3d)
def _(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, input_size: Ints | None = None) -> Conv:
    return Conv(
        module.weight,
        input_size=input_size,
        stride=module.stride,
        padding=module.padding,  # type: ignore[arg-type]
        dilation=module.dilation,
        groups=module.groups,
        transposed=True,
        output_padding=module.output_padding,
    )
