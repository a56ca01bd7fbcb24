"""`describe`: one registered rule per torch layer; users register their own the same way."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import singledispatch
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gramlip.errors import InputError, UnsupportedError
from gramlip.numerics import rounding as rd
from gramlip.numerics.devices import on_cpu
from gramlip.numerics.exact_cast import exact, exponent_of
from gramlip.operators.convert import formed, held, is_array_like, is_linear_operator, is_sparse, sparse_tensor
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import SPARSE, Conv, Dense, Diagonal, Ints, Operator, Separable, Sparse, checked
from gramlip.operators.wrappers import hooked, hooks, is_wrapper, unwrapped

FORWARD = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl")  # what a layer's map is made of
WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)  # hooks of torch that set a tensor before each forward pass, and do no more


def _unknown(module: object, input_size: Ints | None = None) -> Operator | Bound:
    if isinstance(module, nn.Module) and is_wrapper(module) and (found := hooks(module)):
        raise hooked(module, found[0])
    if is_linear_operator(module):
        if (matrix := held(module)) is not None:
            return describe(matrix)
        return Dense(checked(formed(module)), "the matrix of a LinearOperator, of what it returns for unit vectors (assumed linear)")
    if is_sparse(module):
        return Sparse(sparse_tensor(module))
    if is_array_like(module):
        return Dense(checked(module))
    msg = (
        f"{type(module).__name__} has no rule; expected a layer that gramlip knows: "
        f"type @gramlip.describe.register on a function (module: {type(module).__name__}, input_size=None) -> operator"
    )
    raise UnsupportedError(msg)


class _Describe:
    """The linear operator that a layer is, or its Lipschitz interval where that is a known constant.

    Register your own with `@describe.register` on a function `(module: MyLayer, input_size=None) -> operator`. A layer is what its
    forward pass in eval mode computes: torch's `weight_norm`, `spectral_norm`, pruning and parametrizations count as they stand, and
    a layer inside `torch.compile`, `DataParallel` or `DistributedDataParallel` is the layer.

    Raises:
        UnsupportedError: no rule for this type, a subclass with a forward pass of its own and no rule, or a hook that may change the map.

    >>> describe(nn.Linear(3, 2)).weight.shape
    torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self._rules = singledispatch(_unknown)
        self.register, self.dispatch, self.registry = self._rules.register, self._rules.dispatch, self._rules.registry

    def __call__(self, module: object, input_size: Ints | None = None) -> Operator | Bound:
        size = () if input_size is None else (input_size,)
        with on_cpu():
            if isinstance(module, nn.Module) and self.dispatch(type(module)) is _unknown:
                module = unwrapped(module)
            if not isinstance(module, nn.Module) or self.dispatch(type(module)) is _unknown:
                return self._rules(module, *size)
            kind = next((c for c in type(module).__mro__ if c in self.registry), type(module))
            with _resting(module):
                return self._rules(_current(module, kind), *size)


describe = _Describe()


@contextmanager
def _resting(module: nn.Module) -> Generator[None]:
    """Its parametrizations in eval mode, so that none takes a step for being read."""
    parts = [part for part in module.parametrizations.modules() if part.training] if is_parametrized(module) else []  # type: ignore[union-attr]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part in parts:
            part.training = True


def _current(module: nn.Module, kind: type) -> nn.Module:
    """The module as its next forward pass in eval mode finds it; refused where that may be another map than the one of `kind`."""
    name = type(module).__name__
    own = [f for f in FORWARD if f in vars(module) or getattr(type(module), f, None) is not getattr(kind, f, None)]
    if own and kind.forward is not nn.Module.forward:  # the rule of a class without a forward pass is one for its subclasses
        msg = (
            f"{name} has a {own[0]} of its own; expected that of {kind.__name__}, whose rule this is: "
            f"type @gramlip.describe.register on a function (module: {name}, input_size=None) -> operator"
        )
        raise UnsupportedError(msg)
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        msg = f"{name} has no shape yet; expected an initialised layer: run one forward pass first"
        raise InputError(msg)
    own_hooks = hooks(module)
    setting = [hook for hook in own_hooks if isinstance(hook, WEIGHTS)]
    if unknown := [hook for hook in own_hooks if hook not in setting]:
        raise hooked(module, unknown[0])
    if not setting:
        return module
    twin = object.__new__(type(module))
    vars(twin).update(vars(module), training=False)
    for hook in setting:
        hook(twin, ())
    return twin


@describe.register
def _(module: Conv | Dense | Diagonal | Separable | Sparse, input_size: Ints | None = None) -> Operator | Bound:
    if input_size is not None:
        msg = f"input_size={input_size!r} was given beside an operator; expected it inside: Conv(weight, input_size=...)"
        raise InputError(msg)
    return module


@describe.register
def _(module: Tensor, input_size: Ints | None = None) -> Dense | Sparse:
    return Sparse(module) if module.layout in SPARSE else Dense(module)


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


@describe.register(nn.BatchNorm1d)
@describe.register(nn.BatchNorm2d)
@describe.register(nn.BatchNorm3d)
@describe.register(nn.SyncBatchNorm)
def _(module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm, input_size: Ints | None = None) -> Bound:
    """Batch norm in eval mode multiplies each channel by `weight / sqrt(running_var + eps)`: docs/rounding.md#batch-norm."""
    name = type(module).__name__
    weight, variance = cast("Tensor | None", module.weight), module.running_var
    if module.training:
        msg = f"{name} in training mode depends on the whole batch; expected evaluation mode: type module.eval()"
        raise UnsupportedError(msg)
    if variance is None:
        msg = f"{name} without running statistics depends on the whole batch; expected them: type track_running_stats=True and train it"
        raise UnsupportedError(msg)
    spread = exact(checked(variance, "running_var")) + module.eps
    if not bool((spread >= rd.TINY).all()):
        msg = f"running_var + eps of {name} is {float(spread.min())}; expected positive variances: type load_state_dict with trained ones"
        raise InputError(msg)
    if weight is None:
        weight = torch.ones_like(spread)
    elif exponent_of(checked(weight.detach())) is None:
        return Bound(0.0, 0.0, "batch norm in evaluation mode; all weights are zero")
    largest, slack = float((exact(weight).abs() / spread.sqrt()).max()), rd.gamma(5)
    lower = rd.mul_down(min(largest, sys.float_info.max), rd.down(1.0 - slack))
    upper = rd.add_up(rd.mul_up(largest, rd.up(1.0 + slack)), rd.TINY)
    return Bound(lower, upper, "batch norm in evaluation mode: largest modulus of weight / sqrt(running_var + eps)")
