"""In-place calls: which values they overwrite, and where a call out of place would mean something else. docs/network.md#in-place-calls."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class Write:
    """A call that overwrites `targets`; `shared` are other values in the same memory that are read later.

    `refusal` says why the call is not what it is out of place, with its first argument as the one result; None where it is.
    """

    targets: list[fx.Node]
    shared: list[fx.Node]
    refusal: str | None


def writes(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> dict[fx.Node, Write]:
    """Every in-place call of a graph with these results."""
    mutable = [node for node in nodes if node.op == "call_function" and getattr(_schema(node), "is_mutable", False)]
    if not mutable:
        return {}
    order, memory = {n: i for i, n in enumerate(nodes)}, _memory(nodes)
    found: dict[fx.Node, Write] = {}
    for node in mutable:
        targets = list(dict.fromkeys(_marked(node, written=True)))
        own = set[int]().union(*(memory[t] for t in targets))
        shared = [
            n
            for n in nodes[: order[node]]
            if n not in targets and memory[n] & own and (n in outputs or any(order[user] > order[node] for user in n.users))
        ]
        refusal = None
        if shared:
            refusal = f"it overwrites what {shared[0].name}, read later, shares; expected the call out of place"
        elif _schema(node).arguments[0].alias_info is None or targets != [node.args[0]]:
            refusal = "it writes into a list or by out=; expected the call out of place"
        found[node] = Write(targets, shared, refusal)
    return found


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _marked(node: fx.Node, written: bool) -> Iterator[fx.Node]:
    """The arguments that torch's schema marks as shared with the result, or as written to; those inside lists too."""
    for i, spec in enumerate(_schema(node).arguments):
        if spec.alias_info is not None and (spec.alias_info.is_write or not written):
            value = node.args[i] if i < len(node.args) else node.kwargs.get(spec.name)
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, fx.Node):
                    yield item


def _memory(nodes: Sequence[fx.Node]) -> dict[fx.Node, set[int]]:
    """Numbers of the pieces of memory that each value lies in: what the schema says, and what torch does on tensors without values.

    Both are asked: the schema of `einsum`, `dropout` or `conv` is silent on whether the result may be the argument itself.
    """
    values: dict[fx.Node, Any] = {}
    memory: dict[fx.Node, set[int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in nodes:
            schema, held, shared = _schema(node), node.meta.get("val"), list[fx.Node]()
            if schema is not None or node.target is operator.getitem:
                values[node] = node.target(*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))  # type: ignore[operator,arg-type]
            else:
                values[node] = torch.empty_like(held) if isinstance(held, Tensor) else held
            if schema is not None and any(r.alias_info is not None for r in schema.returns):
                shared = list(_marked(node, written=False))
            elif schema is None and node.op == "call_function":  # a part of the graph may give back anything that it was given
                shared = node.all_input_nodes
            memory[node] = {StorageWeakRef(t.untyped_storage()).cdata for t in tensors(values[node])}.union(*(memory[n] for n in shared))
    return memory


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, those in lists too."""
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]  # type: ignore[reportUnknownVariableType]
    return [value] if isinstance(value, Tensor) else []
