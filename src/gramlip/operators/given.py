"""The example that a verb is given: an input, a tuple of inputs, or the shape of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.operators.linear_maps import DTYPES


def example_inputs(model: nn.Module | torch.export.ExportedProgram, example: Any, *, real: bool = False) -> tuple[Any, ...]:
    """The arguments of a forward pass; a shape stands for one sample of zeros, (1, *shape), in the model's own dtype and on its device.

    Args:
        model: a module or an exported program.
        example: a tensor, a tuple of inputs, or a shape.
        real: a shape stands for real numbers, even if the model's weights are complex.

    Raises:
        InputError: no tensor, no tuple of inputs and no shape.

    >>> example_inputs(nn.Linear(3, 2).double(), (3,))
    (tensor([[0., 0., 0.]], dtype=torch.float64),)
    """
    if isinstance(example, Tensor):
        return (example,)
    items: tuple[Any, ...] = tuple(cast("Sequence[Any]", example)) if isinstance(example, tuple | list) else ()
    shape = all(isinstance(n, Real) for n in items)
    if not items or (shape and not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in items)):
        given = repr(example) if shape and items else f"a {type(example).__name__}"
        msg = f"example={given} was given; expected a tensor, a tuple of inputs, or the shape of one sample such as (3, 224, 224)"
        raise InputError(msg)
    if not shape:
        return items
    like = _like(model)
    return (torch.zeros(1, *items, dtype=like.dtype.to_real() if real else like.dtype, device=like.device),)


def program_inputs(program: torch.export.ExportedProgram) -> list[Any]:
    """What stands for the program's own inputs in its graph: a tensor without values, or a number, each."""
    values: dict[str, Any] = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return [values.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]


def _like(model: nn.Module | torch.export.ExportedProgram) -> Tensor:
    """A tensor of the dtype and on the device that the model takes: a program's own first input, or a module's first weight.

    torch computes in no 8-bit float: such a weight is stored beside the numbers that the model works with.
    """
    if isinstance(model, nn.Module):
        return next((t for t in chain(model.parameters(), model.buffers()) if t.dtype in DTYPES), torch.empty(0))
    return next((value for value in program_inputs(model) if isinstance(value, Tensor)), torch.empty(0))
