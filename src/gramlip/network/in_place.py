"""In-place calls out of place, with all that lies in the memory which they change; what a node is. docs/network.md#in-place-calls."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef

from gramlip.errors import InputError
from gramlip.operators.linear_maps import Shape

# ---- nodes ---------------------------------------------------------------------------------------------------------------

_MEMORY = ("aten.as_strided", "aten.view.dtype", "aten.set_")  # and what begins so


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, those in lists too."""
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]  # type: ignore[reportUnknownVariableType]
    return [value] if isinstance(value, Tensor) else []


def shape_of(node: fx.Node) -> Shape:
    """Shape of the value, of its first tensor where there are several."""
    value = node.meta.get("val")
    while isinstance(value, list | tuple) and value:
        value = value[0]  # type: ignore[reportUnknownVariableType]
    if not isinstance(value, Tensor):
        return ()
    if any(not isinstance(n, int) for n in value.shape):
        msg = f"{node.name} has the symbolic shape {tuple(value.shape)}; expected fixed sizes: export without dynamic_shapes"
        raise InputError(msg)
    return tuple(value.shape)


def op_name(node: fx.Node) -> str:
    """`aten.conv2d.default`, or the Python name of what is not a torch operation."""
    target: Any = node.target
    return {operator.getitem: "getitem", put: "put"}.get(target) or str(target)


def reads_memory(node: fx.Node) -> bool:
    """Whether the call reads places or bits of memory, which are others in float64."""
    return op_name(node).startswith(_MEMORY)


# ---- in-place calls ------------------------------------------------------------------------------------------------------
#
# In-place calls are written out of place, and so is what later calls read in the memory that they change. docs/network.md#in-place-calls.

_RENAMED = ("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "detach_")  # they change no number


@dataclass(frozen=True)
class Refused:
    """An in-place call that is left as it is: why, and the values that it leaves unknown."""

    reason: str
    spoiled: list[fx.Node]


def put(base: Tensor, value: Tensor, codes: Tensor) -> Tensor:
    """`base` with entries of `value` in it: `codes` has their numbers, and -1 where an entry is kept."""
    return torch.where(codes >= 0, value.reshape(-1)[codes.clamp_min(0)], base)


@dataclass(frozen=True)
class Functional:
    """A graph without in-place calls but those that are refused: what is given and returned, and constants that were added.

    `given` has the new placeholders by the old ones; `hidden` is true where a value lies in memory that changes and
    torch's schema does not say that it shares it.
    """

    nodes: list[fx.Node]
    given: dict[fx.Node, fx.Node]
    outputs: list[fx.Node]
    constants: dict[fx.Node, Any]
    refused: dict[fx.Node, Refused]
    hidden: bool = False


def functional(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], fixed: Collection[fx.Node]) -> Functional:
    """The graph of these nodes and results, `fixed` being weights and buffers, with each in-place call out of place."""
    if not any(map(is_mutable, nodes)):
        return Functional(list(nodes), {n: n for n in nodes}, list(outputs), {}, {})
    return _Functional(nodes, outputs, fixed).done()


def is_mutable(node: fx.Node) -> bool:
    """Whether a call writes into an argument."""
    return node.op == "call_function" and bool(getattr(_schema(node), "is_mutable", False))


class _Functional:
    """The graph as it is written: the present version of each node, and how many changes of its memory it has seen."""

    def __init__(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], fixed: Collection[fx.Node]) -> None:
        self._nodes, self._outputs, self._fixed = nodes, outputs, fixed
        self._order = {n: i for i, n in enumerate(nodes)}
        self._exact, self._maybe = _memory(nodes)
        self._root = {s: n for n in reversed(nodes) for s in self._exact[n]}
        self._graph, self._now = fx.Graph(), dict[fx.Node, fx.Node]()
        self._changes, self._seen = dict[int, int](), dict[fx.Node, int]()
        self._given = dict[fx.Node, fx.Node]()
        self._constants, self._refused = dict[fx.Node, Any](), dict[fx.Node, Refused]()

    def done(self) -> Functional:
        """The graph, every call in order."""
        for node in self._nodes:
            reason = self._why_not(node) if is_mutable(node) else None
            if reason is not None:
                targets_of = set[int]().union(*(self._maybe[t] for t in _marked(node, written=True)))
                spoiled = [self._now[n] for n in self._nodes[: self._order[node]] if self._maybe[n] & targets_of]
                self._now[node] = self._graph.node_copy(node, self._present)
                self._refused[self._now[node]] = Refused(reason, spoiled)
            elif is_mutable(node):
                self._write(node)
            else:
                self._now[node] = self._graph.node_copy(node, self._present)
                self._seen[node] = self._count(node)
                self._given |= {node: self._now[node]} if node.op == "placeholder" else {}
        outputs = list(map(self._present, self._outputs))
        written = {s for n in self._nodes if is_mutable(n) for t in _marked(n, written=True) for s in self._maybe[t]}
        hidden = any(self._parent(n) is not None and not _is_view(n) for n in self._nodes if self._exact[n] & written)
        return Functional(list(self._graph.nodes), self._given, outputs, self._constants, self._refused, hidden)

    def _count(self, node: fx.Node) -> int:
        return sum(self._changes.get(s, 0) for s in self._exact[node])

    def _parent(self, node: fx.Node) -> fx.Node | None:
        """The argument in whose memory the value lies."""
        parents = [n for n in node.all_input_nodes if self._exact[n] & self._exact[node]]
        return parents[0] if parents else None

    def _present(self, node: fx.Node) -> fx.Node:
        """The node's value after all changes so far: a view is taken again of what it is a view of."""
        if self._seen.get(node, 0) != self._count(node):
            parent = self._parent(node)
            if parent is not None:
                again = self._present(parent)
                self._now[node] = again if is_mutable(node) else self._graph.node_copy(node, self._present)
            self._seen[node] = self._count(node)
        return self._now[node]

    def _why_not(self, node: fx.Node) -> str | None:
        """Why a call cannot be written out of place."""
        targets = list(dict.fromkeys(_marked(node, written=True)))
        written = set[int]().union(*(self._maybe[t] for t in targets))
        later = [
            n
            for n in self._nodes[: self._order[node]]
            if n not in targets
            and self._maybe[n] & written
            and (n in self._outputs or any(self._order[u] > self._order[node] for u in n.users))
        ]
        if _schema(node).arguments[0].alias_info is None or targets != [node.args[0]]:
            return "it writes into a list or by out=; expected the call out of place"
        if any(n in self._fixed for n in self._nodes if self._maybe[n] & written):
            return None if _name(node) == "detach_" else "it writes into a weight or buffer"
        if _out_of_place(node) is None:
            return "it has no form out of place; expected one"
        chain = self._chain(targets[0])
        if later and (_name(node) in _RENAMED or any(self._exact[n] != self._maybe[n] for n in (*chain, *later))):
            return f"it overwrites what {later[0].name}, read later, shares; expected the call out of place"
        renamed = any(is_mutable(n) and _name(n) in _RENAMED[:-1] for n in chain)
        several = any(len(n.all_input_nodes) > 1 for n in chain[:-1] if not is_mutable(n))  # a view of one value has no other argument
        if renamed or several or any(len(self._exact[n]) != 1 or reads_memory(n) or _changes_type(n) for n in chain):
            return "it overwrites a part of memory that is no part of one value; expected the call out of place"
        *views, root = chain
        if _name(node) not in _RENAMED and views and (at := self._numbers(root, views)).unique().numel() < at.numel():
            return "it overwrites places that several entries of a view share, in an order that torch leaves open; expected a clone before"
        return None

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """The node, what it is a view of, and so on, to a value with memory of its own."""
        chain = [node]
        while (parent := self._parent(chain[-1])) is not None:
            chain.append(parent)
        return chain

    def _write(self, node: fx.Node) -> None:
        """An in-place call out of place, and its result put where it belongs."""
        (target,) = dict.fromkeys(_marked(node, written=True))
        result = self._graph.node_copy(node, self._present)
        result.target = _out_of_place(node)  # type: ignore[assignment]
        *views, root = self._chain(target)
        if self._changes_nothing(node, views, root):
            self._graph.erase_node(result)
            result = self._present(target)
        elif _name(node) not in _RENAMED:
            whole = all(map(is_mutable, views))
            self._now[root] = result if whole else self._placed(node, root, views, result)
            for s in self._exact[target]:
                self._changes[s] = self._changes.get(s, 0) + 1
            self._seen[root] = self._count(root)
        self._now[target] = self._now[node] = result
        self._seen[target] = self._seen[node] = self._count(node)

    def _placed(self, node: fx.Node, root: fx.Node, views: list[fx.Node], result: fx.Node) -> fx.Node:
        """The whole value after a part of it, a view of a view of it, has changed."""
        shape = shape_of(root)
        at, codes = self._numbers(root, views), torch.full((math.prod(shape),), -1)
        codes[at.reshape(-1)] = torch.arange(at.numel())
        places = self._graph.placeholder(f"places_{len(self._constants)}")
        places.meta["val"] = self._constants[places] = codes.reshape(shape)
        whole = self._graph.call_function(put, (self._now[root], result, places))
        whole.meta = {**node.meta, "val": root.meta["val"]}
        return whole

    def _numbers(self, root: fx.Node, views: list[fx.Node]) -> Tensor:
        """Which entries of a value the last of some views on one another, given first, has."""
        shape, numbers = shape_of(root), dict[fx.Node, Any]()

        def read(n: fx.Node) -> Any:
            return numbers[n] if n in numbers else torch.zeros(shape_of(n))

        at = numbers[root] = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
        for n in reversed(views):
            if not is_mutable(n):
                at = n.target(*map_arg(n.args, read), **map_arg(n.kwargs, read))  # type: ignore[operator]
            numbers[n] = at
        return at.long()

    def _changes_nothing(self, node: fx.Node, views: list[fx.Node], root: fx.Node) -> bool:
        """Whether a part is copied onto itself, as `y[0] *= 2` does at its end."""
        if _name(node) != "copy_" or not isinstance(node.args[1], fx.Node):
            return False
        *others, origin = self._chain(node.args[1])
        return origin is root and torch.equal(self._numbers(root, views), self._numbers(root, others))


def _name(node: fx.Node) -> str:
    return op_name(node).split(".")[1]


def _out_of_place(node: fx.Node) -> Any:
    """The same operation that gives a new value: `aten.add` for `aten.add_`; None where torch has none."""
    packet, _, overload = op_name(node).removeprefix("aten.").partition(".")
    functional = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), overload, None) if packet.endswith("_") else None
    return None if functional is None or functional._schema.is_mutable else functional


def _changes_type(node: fx.Node) -> bool:
    """Whether a view is of another type than what it is a view of: complex numbers as pairs."""
    kinds = {v.dtype for n in (node, *node.all_input_nodes) for v in tensors(n.meta.get("val"))}
    return node.op == "call_function" and len({k.is_complex for k in kinds}) > 1 and _is_view(node)


def _is_view(node: fx.Node) -> bool:
    """Whether torch's schema says that the result lies in the memory of an argument."""
    return _schema(node) is None or any(r.alias_info is not None for r in _schema(node).returns)


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


def _memory(nodes: Sequence[fx.Node]) -> tuple[dict[fx.Node, set[int]], dict[fx.Node, set[int]]]:
    """Numbers of the pieces of memory that each value lies in: by a run on tensors without values, and where it might by the schema too.

    Both are asked: the schema of `einsum`, `dropout` or `conv` is silent on whether the result may be the argument itself.
    """
    values: dict[fx.Node, Any] = {}
    exact: dict[fx.Node, set[int]] = {}
    maybe: dict[fx.Node, set[int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in nodes:
            schema, value, shared = _schema(node), node.meta.get("val"), list[fx.Node]()
            if schema is not None or node.target is operator.getitem:
                values[node] = node.target(*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))  # type: ignore[operator,arg-type]
            else:
                values[node] = torch.empty_like(value) if isinstance(value, Tensor) else value
            if schema is not None and any(r.alias_info is not None for r in schema.returns):
                shared = list(_marked(node, written=False))
            elif schema is None and node.op == "call_function":  # a part of the graph may give back anything that it was given
                shared = node.all_input_nodes
            exact[node] = {StorageWeakRef(t.untyped_storage()).cdata for t in tensors(values[node])}
            maybe[node] = exact[node].union(*(maybe[n] for n in shared))
    return exact, maybe
