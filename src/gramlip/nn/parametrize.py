"""Shared by the parametrizations: the layers of a model, attaching, pickling, and baking into certified plain weights."""

from __future__ import annotations

import copy
import numbers
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from gramlip.errors import InputError, UnsupportedError
from gramlip.norm.methods import bound, check_rtol
from gramlip.operators.describe import describe
from gramlip.operators.given import example_inputs, is_wrapper, unwrapped
from gramlip.operators.linear_maps import Conv, Dense, Ints

# ---- eval mode -----------------------------------------------------------------------------------------------------------


@contextmanager
def in_eval_mode(model: nn.Module) -> Generator[None, None, None]:
    """Put the model in eval mode; restore the mode of every module afterwards, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Put the model in eval mode, without gradient.

    >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    >>> with evaluating(model):
    ...     model.training
    False
    >>> [m.training for m in model]
    [False, True]
    """
    with torch.no_grad(), in_eval_mode(model):
        yield


# ---- the layers of a model -----------------------------------------------------------------------------------------------


Where = Callable[[str, nn.Module], bool]


def layers(model: nn.Module, example: Any, where: Where | None, stacklevel: int = 4) -> list[tuple[str, nn.Module, Ints | None]]:
    """The linear layers that a forward pass of `example` uses, with their input sizes; None if sizes differ or no example is given.

    Other tensors of two or more axes are named in a warning, unless `where` is given: nothing is left out silently.
    """
    model = unwrapped(model)
    args = () if example is None else example_inputs(model, example)
    if lazy := [path for path, module in model.named_modules() if any(map(is_lazy, module.parameters(recurse=False)))]:
        if example is None:
            msg = f"{lazy} have no shape yet; expected initialised layers: pass an example, or run one forward pass first"
            raise InputError(msg)
        with evaluating(model):
            model(*args)
    shared = {
        path: module
        for path, module in model.named_modules()
        if describe.dispatch(type(module)) is not describe.dispatch(object)
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim >= 2  # type: ignore[union-attr,operator]
        and (where is None or where(path, module))
    }
    if not shared:
        msg = f"{type(model).__name__} has no layer to bound; expected at least one linear or convolution layer"
        raise InputError(msg)
    if where is None and (left := _left_out(model, list(shared.values()))):
        msg = (
            f"{', '.join(left)}: no linear or convolution layer, so not among the layers; for a matrix type "
            "gramlip.nn.spectral_norm(module, name), or where=lambda path, module: True to leave them out knowingly"
        )
        warnings.warn(msg, stacklevel=stacklevel)  # points at the line of the user's code that passes the model
    if example is None:
        return [(path, module, None) for path, module in shared.items()]
    sizes: dict[str, set[tuple[int, ...]]] = {path: set() for path in shared}

    def note(path: str, axes: int) -> Callable[..., None]:
        return lambda _, given, named: sizes[path].add(tuple((given or tuple(named.values()))[0].shape[-axes:]) if axes else ())

    hooks = [(m, note(path, m.weight.ndim - 2)) for path, m in shared.items()]  # type: ignore[operator,union-attr]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        with evaluating(model):
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return [(path, m, next(iter(sizes[path])) or None if len(sizes[path]) == 1 else None) for path, m in shared.items()]


def _left_out(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    """Names of the parameters of two or more axes that belong to none of the layers."""
    covered = {id(p) for module in modules for p in module.parameters()}
    return [name for name, p in model.named_parameters() if id(p) not in covered and p.ndim >= 2]


# ---- parametrizations ----------------------------------------------------------------------------------------------------

SHRINK_ATTEMPTS = 40  # each try doubles the margin: from one rounding unit to far more than a cast can lose


class Normalised(nn.Module):
    """Base class of the parametrizations: the value of the weight has a norm of at most `target`, or close to it.

    The exact ones are functions of the weight alone and hold no tensors, so there is nothing to synchronise, save, average or freeze.
    """

    def __init__(self, input_size: Ints | None, target: float) -> None:
        super().__init__()
        self.input_size = input_size
        self.target = target

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Store an assigned weight as it is; the layer uses its normalised value."""
        return weight


def positive(name: str, value: float) -> float:
    """The value as a float; InputError unless it is positive and finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < float("inf"):
        msg = f"{name}={value!r} was given; expected a positive number such as 1.0"
        raise InputError(msg)
    return float(value)


def operator(module: nn.Module, name: str, input_size: Ints | None) -> Dense | Conv:
    """The operator whose weight is `module.name`: described by the rule of the layer for "weight", otherwise a matrix."""
    if not isinstance(module, nn.Module):
        msg = (
            f"a {type(module).__name__} was given; expected a module such as nn.Linear: type gramlip.gram_norm(matrix) for a tensor's norm"
        )
        raise InputError(msg)
    module = unwrapped(module)
    weight = getattr(module, name, None)
    if weight is not None and is_lazy(weight):
        msg = f"{type(module).__name__}.{name} has no shape yet; expected an initialised layer: run one forward pass first"
        raise InputError(msg)
    if not isinstance(weight, Tensor):
        have = [n for n, _ in module.named_parameters(recurse=False)]
        msg = f"{type(module).__name__} has no tensor {name!r}; expected the name of one of its parameters: {have}"
        raise InputError(msg)
    if name == "weight" and weight.ndim >= 2 and describe.dispatch(type(module)) is not describe.dispatch(object):
        op = describe(_shaped(module) if weight.is_meta else module, input_size)
        if isinstance(op, Dense | Conv):
            return op
    elif weight.ndim == 2:
        return Dense(_zeros(weight) if weight.is_meta else weight)
    given = f"{type(module).__name__}.{name} has shape {tuple(weight.shape)}"
    msg = f"{given}; expected a matrix, or the weight of a linear or convolution layer: type @gramlip.describe.register for your own"
    raise UnsupportedError(msg)


def _zeros(weight: Tensor) -> Tensor:
    """Zeros of the shape and dtype of a weight, in the memory of a single zero: a geometry needs no values."""
    return torch.zeros((), dtype=weight.dtype).expand(weight.shape)


def _shaped(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device that holds zeros."""
    twin = object.__new__(type(module))
    parameters = {name: p if p is None else _zeros(p) for name, p in vars(module)["_parameters"].items()}
    vars(twin).update(vars(module), _parameters=parameters)
    return twin


def real(op: Dense | Conv, what: str) -> None:
    """Refuse complex weights, which `what` does not support."""
    if op.weight.is_complex():
        msg = f"a weight of dtype {op.weight.dtype} was given to {what}; expected real weights: type gramlip.nn.spectral_norm(module)"
        raise UnsupportedError(msg)


def refuse_held(module: nn.Module, name: str, path: str = "") -> None:
    """Refuse a weight that is already normalised, or set by a hook."""
    given = f"{path or type(module).__name__}.{name}"
    if parametrize.is_parametrized(module, name):
        if any(isinstance(p, Normalised) for p in module.parametrizations[name]):  # type: ignore[union-attr,index]
            msg = (
                f"{given} is normalised already; expected a plain weight: type gramlip.nn.remove(module) first, or leave it out with where="
            )
            raise InputError(msg)
    elif name not in dict(module.named_parameters(recurse=False)) and name not in dict(module.named_buffers(recurse=False)):
        undo = f"torch.nn.utils.prune.remove(module, {name!r}), or torch.nn.utils.remove_spectral_norm(module)"
        msg = f"{given} is set by a hook before each forward pass; expected a parameter: type {undo}, first"
        raise InputError(msg)


def attach(module: nn.Module, name: str, parametrization: Normalised) -> None:
    """Register the parametrization on `module.name`, once, such that the module can still be pickled."""
    module = unwrapped(module)
    refuse_held(module, name)
    parametrize.register_parametrization(module, name, parametrization)
    _teach(type(module))


def _teach(kind: type[nn.Module]) -> None:
    """Make the class that torch created for one parametrized module picklable and copyable."""
    kind.__reduce_ex__ = _reduce  # type: ignore[assignment,method-assign]
    kind.__deepcopy__ = _deepcopy  # type: ignore[attr-defined]


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy the module with its own class, so that removing the parametrization of one leaves the other unchanged."""
    kind = type(module)
    class_ = type(kind.__name__, kind.__bases__, {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")})
    memo[id(module)] = twin = class_.__new__(class_)
    twin.__dict__ = copy.deepcopy(module.__dict__, memo)
    return twin


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle a parametrized module as its plain class, the state of that class and the parametrizations (torch refuses otherwise)."""
    plain = type(module).__mro__[1]
    get = getattr(plain, "__getstate__", None)  # every class has one from Python 3.11 on
    state = dict(get(module) if get is not None else module.__dict__)
    state["_modules"] = {k: m for k, m in module.__dict__["_modules"].items() if k != "parametrizations"}
    return _restore, (plain, state, module.parametrizations)


def _restore(plain: type[nn.Module], state: dict[str, Any], chains: nn.ModuleDict) -> nn.Module:
    module = plain.__new__(plain)
    module.__setstate__(state)
    for name in chains:  # torch makes the class and its properties; then the pickled parametrizations replace the new ones
        module.register_parameter(name, nn.Parameter(torch.zeros(())))
        parametrize.register_parametrization(module, name, nn.Identity())
    module.parametrizations = chains
    _teach(type(module))
    return module


def normalised(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Normalised]]:
    """Every (path, module, tensor name, parametrization) of gramlip in a model, each module once."""
    for path, module in list(unwrapped(model).named_modules()):
        if parametrize.is_parametrized(module) and not is_wrapper(module):  # a compiled module shows the modules of the one inside it
            for name, chain in list(module.parametrizations.items()):  # type: ignore[union-attr,operator]
                for parametrization in chain:
                    if isinstance(parametrization, Normalised):
                        yield path, module, name, parametrization


def remove(model: nn.Module, rtol: float = 1e-3) -> nn.Module:
    """Replace every parametrization of gramlip by a plain weight whose certified norm is at most its target.

    The weights keep the values that the network used. If necessary they are scaled down until `gramlip.bound(layer, input_size).upper
    <= target` holds for the stored numbers in their own dtype, at the default `rtol` and at the given one. In place.

    Args:
        model: a layer or a whole network.
        rtol: another relative width at which the certificate shall hold; the weights shrink by at most about the larger of the two.

    Raises:
        InputError: nothing to remove, or a target below what the dtype can hold.

    Reference: docs/training.md#baking.

    >>> from gramlip.nn import spectral_norm
    >>> layer = remove(spectral_norm(nn.Conv2d(2, 2, 3), target=0.5))
    >>> bound(layer).upper <= 0.5
    True
    """
    check_rtol(rtol)
    layers = list(normalised(model))
    if not layers:
        msg = f"{type(model).__name__} holds no parametrization of gramlip; expected one: type gramlip.nn.spectral_norm(module) first"
        raise InputError(msg)
    for (_, module, name, _), (weight, own) in zip(layers, _baked(model, layers, rtol), strict=True):
        if own is not None:
            module.parametrizations[name].original = own  # type: ignore[union-attr,index]
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        getattr(module, name).data.copy_(weight)
    return model


def _baked(model: nn.Module, layers: list[tuple[str, nn.Module, str, Normalised]], rtol: float) -> list[tuple[Tensor, nn.Parameter | None]]:
    """The certified weights; the model is not changed yet. A stored weight that is used elsewhere gets a new parameter here.

    Layers that share a stored weight and compute the same value from it get one common weight.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    baked: dict[int, tuple[Tensor, nn.Parameter | None]] = {}
    for original, value, members in _of_equal_value(layers, uses):
        weight = _baked_value(value, [layers[i] for i in members], rtol)
        separate = nn.Parameter(original.detach().clone(), original.requires_grad) if uses[id(original)] > 1 else None
        baked.update(dict.fromkeys(members, (weight, separate)))
    return [baked[i] for i in range(len(layers))]


def _of_equal_value(layers: list[tuple[str, nn.Module, str, Normalised]], uses: Counter[int]) -> list[tuple[Any, Tensor, list[int]]]:
    """The stored weights, the values that are computed from them, and the layers with the same of both."""
    groups: list[tuple[Any, Tensor, list[int]]] = []
    for i, (path, module, name, _) in enumerate(layers):
        original, value = getattr(module.parametrizations[name], "original", None), getattr(module, name).detach()  # type: ignore[union-attr,index]
        if not bool(value.isfinite().all()):
            msg = f"{path or type(module).__name__}.{name} holds NaN or infinite numbers; expected finite weights: nothing was removed"
            raise InputError(msg)
        same = (members for other, v, members in groups if uses[id(original)] > 1 and other is original and torch.equal(v, value))
        members = next(same, None)
        if members is None:
            groups.append((original, value, members := []))
        members.append(i)
    return groups


def _baked_value(value: Tensor, layers: list[tuple[str, nn.Module, str, Normalised]], rtol: float) -> Tensor:
    """The certified weight of layers that compute the same value."""
    path, module, name, _ = layers[0]
    limits = [(operator(module, name, norm.input_size), norm.target) for _, module, name, norm in layers]
    try:
        weight, _ = shrunk(value, limits, rtol)
        if not bool(weight.any()) and all(bool(p.any()) for p in module.parametrizations[name].parameters()):  # type: ignore[union-attr,index]
            msg = f"target={limits[0][1]:.6g} is below what {weight.dtype} can hold: all weights would be zero; expected a wider dtype"
            raise InputError(msg)
    except InputError as error:
        msg = f"{path or type(module).__name__}.{name}: {error}: nothing was removed"
        raise InputError(msg) from error
    return weight


def shrunk(value: Tensor, limits: list[tuple[Dense | Conv, float]], rtol: float) -> tuple[Tensor, float]:
    """The value scaled down until its certified norm is at most each target, at the default `rtol` and the given one; the scale."""
    weight, margin, scale = value.clone(), torch.finfo(value.dtype).eps / 4, 1.0
    for _ in range(SHRINK_ATTEMPTS):
        bounds = [
            (bound(op, rtol=width), target)
            for op, target in ((replace(op, weight=weight), t) for op, t in limits)
            for width in (1e-2, rtol)
        ]
        over = [(float(b.upper), target) for b, target in bounds if float(b.upper) > target]
        if not over:
            return weight, scale
        scale *= min(target / upper for upper, target in over) * (1 - margin)
        margin = min(2 * margin, 0.5)
        weight = (value.to(torch.promote_types(value.dtype, torch.float64)) * scale).to(value.dtype)
    (upper, target), *_ = over  # pyright: ignore[reportPossiblyUnboundVariable]
    msg = f"the certified norm stays at {upper:.6g} after {SHRINK_ATTEMPTS} tries; expected at most {target:.6g}: use a wider dtype"
    raise InputError(msg)


def each(model: nn.Module, example: Any, where: Where | None, attach_one: Callable[..., object]) -> None:
    """Call `one(module, input_size=...)` on every layer of a model; if it fails on one layer, no layer is changed."""
    chosen = layers(model, example, where)
    for path, module, size in chosen:
        refuse_held(module, "weight", path)
        operator(module, "weight", size)
    for _, module, size in chosen:
        attach_one(module, input_size=size)
