"""What the parametrizations share: attaching them to a layer, pickling, walking a model, and baking into certified plain weights."""

from __future__ import annotations

import copy
import numbers
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from gramlip.errors import InputError, UnsupportedError
from gramlip.layers import describe
from gramlip.nn.modes import evaluating
from gramlip.norm import bound
from gramlip.operators import Conv, Dense, Ints

TRIES = 40  # each try widens the margin twofold: from one rounding unit to far more than a cast can lose


class Normalised(nn.Module):
    """Base of the parametrizations: a weight's value with a norm of at most `target`, as a function of the weight alone.

    It holds no tensors: nothing to synchronise, save, average or freeze.
    """

    def __init__(self, input_size: Ints | None, target: float) -> None:
        super().__init__()
        self.input_size = input_size
        self.target = target

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning a weight stores it; what the layer then uses is its normalised value."""
        return weight


def positive(name: str, value: float) -> float:
    """The value as a float, refused unless positive and finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < float("inf"):
        msg = f"{name}={value!r} was given; expected a positive number such as 1.0"
        raise InputError(msg)
    return float(value)


def operator(module: nn.Module, name: str, input_size: Ints | None) -> Dense | Conv:
    """The operator whose weight is `module.name`: by its rule for "weight", otherwise a matrix."""
    weight = getattr(module, name, None)
    if weight is not None and is_lazy(weight):
        msg = f"{type(module).__name__}.{name} has no shape yet; expected an initialised layer: run one forward pass first"
        raise InputError(msg)
    if not isinstance(weight, Tensor):
        have = [n for n, _ in module.named_parameters(recurse=False)]
        msg = f"{type(module).__name__} has no tensor {name!r}; expected the name of one of its parameters: {have}"
        raise InputError(msg)
    if name == "weight" and describe.dispatch(type(module)) is not describe.dispatch(object):
        op = describe(module, input_size)
        if isinstance(op, Dense | Conv):
            return op
    elif weight.ndim == 2:
        return Dense(weight)
    given = f"{type(module).__name__}.{name} has shape {tuple(weight.shape)}"
    msg = f"{given}; expected a matrix, or the weight of a linear or convolution layer: type @gramlip.describe.register for your own"
    raise UnsupportedError(msg)


def real(op: Dense | Conv, what: str) -> None:
    """Refuse complex weights, which `what` does not take."""
    if op.weight.is_complex():
        msg = f"a weight of dtype {op.weight.dtype} was given to {what}; expected real weights: type gramlip.nn.spectral_norm(module)"
        raise UnsupportedError(msg)


def refuse_normalised(module: nn.Module, name: str, path: str = "") -> None:
    """Refuse a weight that is normalised already."""
    if parametrize.is_parametrized(module, name) and any(isinstance(p, Normalised) for p in module.parametrizations[name]):  # type: ignore[union-attr,index]
        given = f"{path or type(module).__name__}.{name} is normalised already"
        msg = f"{given}; expected a plain weight: type gramlip.nn.remove(module) first, or leave it out of a model with where="
        raise InputError(msg)


def attach(module: nn.Module, name: str, parametrization: Normalised) -> None:
    """Register it on `module.name`, once, so that the whole module can still be pickled."""
    refuse_normalised(module, name)
    parametrize.register_parametrization(module, name, parametrization)
    _teach(type(module))


def _teach(kind: type[nn.Module]) -> None:
    """Give the class that torch made for one parametrized module a way to be pickled and copied."""
    kind.__reduce_ex__ = _reduce  # type: ignore[assignment,method-assign]
    kind.__deepcopy__ = _deepcopy  # type: ignore[attr-defined]


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with a class of its own: removing the parametrization of one leaves the other alone, which torch's copy does not."""
    kind = type(module)
    own = type(kind.__name__, kind.__bases__, {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")})
    memo[id(module)] = twin = own.__new__(own)
    twin.__dict__ = copy.deepcopy(module.__dict__, memo)
    return twin


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle a parametrized module as its plain class, that class's state and the parametrizations (torch refuses otherwise)."""
    plain = type(module).__mro__[1]
    get = getattr(plain, "__getstate__", None)  # every class has one from Python 3.11 on
    state = dict(get(module) if get is not None else module.__dict__)
    state["_modules"] = {k: m for k, m in module.__dict__["_modules"].items() if k != "parametrizations"}
    return _restore, (plain, state, module.parametrizations)


def _restore(plain: type[nn.Module], state: dict[str, Any], chains: nn.ModuleDict) -> nn.Module:
    module = plain.__new__(plain)
    module.__setstate__(state)
    for name in chains:  # torch makes the class and its properties; what was registered is put back as it was, not made anew
        module.register_parameter(name, nn.Parameter(torch.zeros(())))
        parametrize.register_parametrization(module, name, nn.Identity())
    module.parametrizations = chains
    _teach(type(module))
    return module


def normalised(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Normalised]]:
    """Every (path, module, tensor name, parametrization) of ours in a model, each module once."""
    for path, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            for name, chain in list(module.parametrizations.items()):  # type: ignore[union-attr,operator]
                for parametrization in chain:
                    if isinstance(parametrization, Normalised):
                        yield path, module, name, parametrization


def remove(model: nn.Module, rtol: float = 1e-3) -> nn.Module:
    """Bake: replace every parametrization of gramlip by a plain weight whose certified norm is at most its target.

    The weights keep the values that the network used, shrunk, where `gramlip.bound` asks for it, until
    `gramlip.bound(layer, input_size).upper <= target` holds for the stored numbers in their own dtype, at the default width and at
    `rtol`. In place.

    Args:
        model: a layer or a whole network.
        rtol: another width at which the certificate holds; the weights shrink by at most about the wider of the two.

    Raises:
        InputError: nothing to remove, or a target below what the dtype can hold.

    Reference: docs/training.md#baking.

    >>> from gramlip.nn import spectral_norm
    >>> layer = remove(spectral_norm(nn.Conv2d(2, 2, 3), target=0.5))
    >>> bound(layer).upper <= 0.5
    True
    """
    found = list(normalised(model))
    if not found:
        msg = f"{type(model).__name__} holds no parametrization of gramlip; expected one: type gramlip.nn.spectral_norm(module) first"
        raise InputError(msg)
    for path, module, name, _ in found:
        if not bool(getattr(module, name).isfinite().all()):
            msg = f"{path or type(module).__name__}.{name} holds NaN or infinite numbers; expected finite weights: nothing was removed"
            raise InputError(msg)
    _untie(model, found)
    for path, module, name, parametrization in found:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        try:
            shrink(module, name, parametrization.input_size, parametrization.target, rtol)
        except InputError as error:
            msg = f"{path or type(module).__name__}.{name}: {error}"
            raise InputError(msg) from error
    return model


def _untie(model: nn.Module, found: Iterable[tuple[str, nn.Module, str, Normalised]]) -> None:
    """Give a stored weight that has other users a copy for each value that is made from it: baking writes into what is stored."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    twins: dict[int, list[tuple[Tensor, nn.Parameter]]] = defaultdict(list)
    for _, module, name, _ in found:
        chain: Any = module.parametrizations[name]  # type: ignore[union-attr,index]
        original: Any = getattr(chain, "original", None)
        if uses[id(original)] > 1:
            value = getattr(module, name).detach()
            same = [twin for other, twin in twins[id(original)] if torch.equal(other, value)]
            chain.original = same[0] if same else nn.Parameter(original.detach().clone(), original.requires_grad)
            twins[id(original)].append((value, chain.original))


def shrink(module: nn.Module, name: str, input_size: Ints | None, target: float, rtol: float) -> None:
    """Scale `module.name` down, in its own dtype, until its certified norm is at most `target` by default and at `rtol`."""
    weight: Tensor = getattr(module, name).data
    start, margin = weight.detach().clone(), torch.finfo(weight.dtype).eps / 4
    scale = 1.0
    for _ in range(TRIES):
        op = operator(module, name, input_size)
        upper = max(float(bound(op).upper), float(bound(op, rtol=rtol).upper))
        if upper <= target:
            return
        scale *= target / upper * (1 - margin)
        margin = min(2 * margin, 0.5)
        weight.copy_((start.to(torch.promote_types(start.dtype, torch.float64)) * scale).to(weight.dtype))
    msg = f"the certified norm stays at {upper:.6g} after {TRIES} tries; expected at most the target {target:.6g}: use a wider dtype"  # pyright: ignore[reportPossiblyUnboundVariable]
    raise InputError(msg)


def each(model: nn.Module, example: Any, where: Callable[[str, nn.Module], bool] | None, one: Callable[..., object]) -> None:
    """`one(module, input_size=...)` on every layer of a model, none of which is changed where one is normalised already."""
    chosen = layers(model, example, where)
    for path, module, _ in chosen:
        refuse_normalised(module, "weight", path)
    for _, module, size in chosen:
        one(module, input_size=size)


def layers(model: nn.Module, example: Any, where: Callable[[str, nn.Module], bool] | None) -> list[tuple[str, nn.Module, Ints | None]]:
    """The linear layers that a forward pass of `example` uses, with their input sizes; None where sizes differ or none is given.

    An example is an input, a tuple of them, or the shape of one sample.
    """
    shape = isinstance(example, tuple) and bool(example) and all(isinstance(n, int) for n in example)
    args = (torch.zeros(1, *example),) if shape else example if isinstance(example, tuple) else (example,)
    if lazy := [path for path, module in model.named_modules() if any(map(is_lazy, module.parameters(recurse=False)))]:
        if example is None:
            msg = f"{lazy} have no shape yet; expected initialised layers: pass an example, or run one forward pass first"
            raise InputError(msg)
        with evaluating(model):
            model(*args)
    found = {
        path: module
        for path, module in model.named_modules()
        if describe.dispatch(type(module)) is not describe.dispatch(object)
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim >= 2  # type: ignore[union-attr,operator]
        and (where is None or where(path, module))
    }
    if not found:
        msg = f"{type(model).__name__} has no layer to bound; expected at least one linear or convolution layer"
        raise InputError(msg)
    if example is None:
        return [(path, module, None) for path, module in found.items()]
    sizes: dict[str, set[tuple[int, ...]]] = {path: set() for path in found}

    def note(path: str, axes: int) -> Callable[..., None]:
        return lambda _, given, named: sizes[path].add(tuple((given or tuple(named.values()))[0].shape[-axes:]) if axes else ())

    hooks = [(m, note(path, m.weight.ndim - 2)) for path, m in found.items()]  # type: ignore[operator,union-attr]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        with evaluating(model):
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return [(path, m, next(iter(sizes[path])) or None if len(sizes[path]) == 1 else None) for path, m in found.items()]
