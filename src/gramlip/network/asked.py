"""What `audit` accepts: everything else ends in one line that says what was given, what was expected and what to type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.norm.bound import check_rtol
from gramlip.operators.wrappers import GATHER, is_sharded


def check_inputs(tensors: Sequence[Tensor]) -> None:
    """A Lipschitz constant is of inputs that change by small amounts: not of token numbers, nor of masks."""
    for i, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            given = f"input {i} of shape {tuple(tensor.shape)} has entries of {tensor.dtype}, which no real number can change by a little"
            msg = f"{given}; expected floating-point inputs: give the part of the model after its embeddings"
            raise InputError(msg)


def check_model(model: object) -> None:
    """A module or a program, whose weights have numbers."""
    if not isinstance(model, nn.Module | torch.export.ExportedProgram):
        msg = f"a {type(model).__name__} was given; expected an nn.Module or an exported program: type an nn.Module whose forward calls it"
        raise InputError(msg)
    held = model.state_dict if isinstance(model, torch.export.ExportedProgram) else model.state_dict()
    bare = [name for name, value in held.items() if isinstance(value, Tensor) and value.is_meta]
    if any(map(is_sharded, held.values())):
        msg = f"the weights are in shards, DTensors; expected whole ones: {GATHER}"
        raise InputError(msg)
    if bare:
        msg = f"{bare[0]} is on the meta device, without numbers; expected weights: type model.to_empty(device='cpu') and load them"
        raise InputError(msg)


def check_options(assume: object, domain: object, rtol: float, effort: object, seed: object, strict: object) -> None:
    """The options of `audit`, as its docstring has them."""
    check_rtol(rtol)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        msg = f"seed={seed!r} was given; expected an integer from 0 to 2**63 - 1 such as 0"
        raise InputError(msg)
    if not isinstance(strict, bool):
        msg = f"strict={strict!r} was given; expected True or False"
        raise InputError(msg)
    if not isinstance(assume, Mapping | None):
        msg = f"assume={assume!r} was given; expected constants by name such as {{'body.norm': 1.0}}"
        raise InputError(msg)
    for name, value in (assume or {}).items():  # type: ignore[reportUnknownVariableType]
        if not _finite(value) or value < 0:
            msg = f"assume={name}={value!r} was given; expected a finite constant of at least 0 such as {name}=1.0"
            raise InputError(msg)
    if domain is not None and not (
        isinstance(domain, Sequence) and len(domain) == 2 and all(map(_finite, domain)) and domain[0] < domain[1]
    ):
        msg = f"domain={domain!r} was given; expected two finite numbers, the lower first: type a tuple such as (0.0, 1.0)"
        raise InputError(msg)
    if not _finite(effort):
        msg = f"effort={effort!r} was given; expected a finite number such as 1.0"
        raise InputError(msg)


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
