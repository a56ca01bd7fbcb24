"""The layers of a model that the verbs of `gramlip.nn` work on, with the input sizes that one forward pass shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gramlip.errors import InputError
from gramlip.nn.modes import evaluating
from gramlip.operators.describe import describe
from gramlip.operators.given import example_inputs
from gramlip.operators.linear_maps import Ints
from gramlip.operators.wrappers import unwrapped

Where = Callable[[str, nn.Module], bool]


def layers(model: nn.Module, example: Any, where: Where | None) -> list[tuple[str, nn.Module, Ints | None]]:
    """The linear layers that a forward pass of `example` uses, with their input sizes; None where sizes differ or none is given.

    Other tensors of two axes or more are named in a warning, unless `where` chooses: nothing is left out silently.
    """
    model = unwrapped(model)
    args = () if example is None else example_inputs(model, example)
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
    if where is None and (left := _left_out(model, list(found.values()))):
        msg = (
            f"{', '.join(left)}: no linear or convolution layer, so not among the layers; for a matrix type "
            "gramlip.nn.spectral_norm(module, name), or where=lambda path, module: True to leave them out knowingly"
        )
        warnings.warn(msg, stacklevel=4)
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


def _left_out(model: nn.Module, found: list[nn.Module]) -> list[str]:
    """Names of the parameters of two axes or more that belong to none of the layers."""
    taken = {id(p) for module in found for p in module.parameters()}
    return [name for name, p in model.named_parameters() if id(p) not in taken and p.ndim >= 2]
