"""A model as a list of calls: its exported graph, which values its calls overwrite, and its calls in float64."""

from __future__ import annotations

import copy
import io
import logging
import math
import operator
import re
import sys
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef

from gramlip.errors import InputError, first_line
from gramlip.numerics.precision import scaled_float64
from gramlip.operators.linear_maps import Shape

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

    `given` has the new placeholders by the old ones; `hidden` is true where a value that lies in changed memory shares it without torch's schema saying so.
    """

    nodes: list[fx.Node]
    given: dict[fx.Node, fx.Node]
    outputs: list[fx.Node]
    constants: dict[fx.Node, Any]
    refused: dict[fx.Node, Refused]
    hidden: bool = False


def functional(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], fixed: Collection[fx.Node]) -> Functional:
    """The graph of these nodes and results, `fixed` being weights and buffers, with each in-place call out of place."""
    if not any(map(_is_mutable, nodes)):
        return Functional(list(nodes), {n: n for n in nodes}, list(outputs), {}, {})
    return _Functional(nodes, outputs, fixed).done()


def _is_mutable(node: fx.Node) -> bool:
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
            reason = self._why_not(node) if _is_mutable(node) else None
            if reason is not None:
                own = set[int]().union(*(self._maybe[t] for t in _marked(node, written=True)))
                spoiled = [self._now[n] for n in self._nodes[: self._order[node]] if self._maybe[n] & own]
                self._now[node] = self._graph.node_copy(node, self._present)
                self._refused[self._now[node]] = Refused(reason, spoiled)
            elif _is_mutable(node):
                self._write(node)
            else:
                self._now[node] = self._graph.node_copy(node, self._present)
                self._seen[node] = self._count(node)
                self._given |= {node: self._now[node]} if node.op == "placeholder" else {}
        outputs = list(map(self._present, self._outputs))
        written = {s for n in self._nodes if _is_mutable(n) for t in _marked(n, written=True) for s in self._maybe[t]}
        hidden = any(self._parent(n) is not None and not _is_view(n) for n in self._nodes if self._exact[n] & written)
        return Functional(list(self._graph.nodes), self._given, outputs, self._constants, self._refused, hidden)

    def _count(self, node: fx.Node) -> int:
        return sum(self._changes.get(s, 0) for s in self._exact[node])

    def _parent(self, node: fx.Node) -> fx.Node | None:
        """The argument in whose memory the value lies."""
        found = [n for n in node.all_input_nodes if self._exact[n] & self._exact[node]]
        return found[0] if found else None

    def _present(self, node: fx.Node) -> fx.Node:
        """The node's value after all changes so far: a view is taken again of what it is a view of."""
        if self._seen.get(node, 0) != self._count(node):
            parent = self._parent(node)
            if parent is not None:
                again = self._present(parent)
                self._now[node] = again if _is_mutable(node) else self._graph.node_copy(node, self._present)
            self._seen[node] = self._count(node)
        return self._now[node]

    def _why_not(self, node: fx.Node) -> str | None:
        """Why a call cannot be written out of place."""
        targets = list(dict.fromkeys(_marked(node, written=True)))
        own = set[int]().union(*(self._maybe[t] for t in targets))
        later = [
            n
            for n in self._nodes[: self._order[node]]
            if n not in targets
            and self._maybe[n] & own
            and (n in self._outputs or any(self._order[u] > self._order[node] for u in n.users))
        ]
        if _schema(node).arguments[0].alias_info is None or targets != [node.args[0]]:
            return "it writes into a list or by out=; expected the call out of place"
        if any(n in self._fixed for n in self._nodes if self._maybe[n] & own):
            return None if _name(node) == "detach_" else "it writes into a weight or buffer"
        if _out_of_place(node) is None:
            return "it has no form out of place; expected one"
        chain = self._chain(targets[0])
        if later and (_name(node) in _RENAMED or any(self._exact[n] != self._maybe[n] for n in (*chain, *later))):
            return f"it overwrites what {later[0].name}, read later, shares; expected the call out of place"
        renamed = any(_is_mutable(n) and _name(n) in _RENAMED[:-1] for n in chain)
        if renamed or any(len(self._exact[n]) != 1 or reads_memory(n) or _changes_type(n) for n in chain):
            return "it overwrites a part of memory that is no part of one value; expected the call out of place"
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
            whole = all(map(_is_mutable, views))
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
        held = self._graph.placeholder(f"places_{len(self._constants)}")
        held.meta["val"] = self._constants[held] = codes.reshape(shape)
        whole = self._graph.call_function(put, (self._now[root], result, held))
        whole.meta = {**node.meta, "val": root.meta["val"]}
        return whole

    def _numbers(self, root: fx.Node, views: list[fx.Node]) -> Tensor:
        """Which entries of a value the last of some views on one another, given first, has."""
        shape, numbers = shape_of(root), dict[fx.Node, Any]()

        def read(n: fx.Node) -> Any:
            return numbers[n] if n in numbers else torch.zeros(shape_of(n))

        at = numbers[root] = torch.arange(math.prod(shape)).reshape(shape)
        for n in reversed(views):
            if not _is_mutable(n):
                at = n.target(*map_arg(n.args, read), **map_arg(n.kwargs, read))  # type: ignore[operator]
            numbers[n] = at
        return at

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
    found = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), overload, None) if packet.endswith("_") else None
    return None if found is None or found._schema.is_mutable else found


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
            schema, held, shared = _schema(node), node.meta.get("val"), list[fx.Node]()
            if schema is not None or node.target is operator.getitem:
                values[node] = node.target(*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))  # type: ignore[operator,arg-type]
            else:
                values[node] = torch.empty_like(held) if isinstance(held, Tensor) else held
            if schema is not None and any(r.alias_info is not None for r in schema.returns):
                shared = list(_marked(node, written=False))
            elif schema is None and node.op == "call_function":  # a part of the graph may give back anything that it was given
                shared = node.all_input_nodes
            exact[node] = {StorageWeakRef(t.untyped_storage()).cdata for t in tensors(values[node])}
            maybe[node] = exact[node].union(*(maybe[n] for n in shared))
    return exact, maybe


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, those in lists too."""
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]  # type: ignore[reportUnknownVariableType]
    return [value] if isinstance(value, Tensor) else []


# ---- the graph -----------------------------------------------------------------------------------------------------------
#
# A model as a list of calls: the graph of `torch.export`, recurrent layers unrolled, scopes without gradients opened.
#
# What a call does to its inputs is decided by the rules; here nothing is bounded.

_LAYERS = (torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input, torch.ops.aten.gru.input, torch.ops.aten.lstm.input)
_CELLS = (
    torch.ops.aten.rnn_tanh_cell.default,
    torch.ops.aten.rnn_relu_cell.default,
    torch.ops.aten.gru_cell.default,
    torch.ops.aten.lstm_cell.default,
    torch.ops.aten.cosine_similarity.default,
)
RECURRENT = (*_LAYERS, *_CELLS)  # calls that are taken apart as torch itself defines them
_APART = {
    f"aten.{name}"
    for name in [
        "kron",
        "tensordot",
        "outer",
        "ger",
        "inner",
        "diff",
        "trapezoid",
        "gradient",
        "meshgrid",
        "cartesian_prod",
        "column_stack",
        "chain_matmul",
        "linalg_multi_dot",
        "linalg_vecdot",
        "linalg_norm",
        "linalg_matrix_norm",
        "pairwise_distance",
    ]
}  # calls that torch itself writes as others, for each of which there is a rule
_SCOPES = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # calls of a part of the graph, and where it stands


@dataclass(frozen=True)
class Program:
    """An exported model: its graph, the tensors and objects it holds, which placeholders are the user's inputs, what is refused in place.

    `hidden` as in `Functional`.
    """

    nodes: list[fx.Node]
    constants: dict[fx.Node, Any]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    refused: dict[fx.Node, Refused]
    hidden: bool


def export(model: nn.Module | torch.export.ExportedProgram, example: tuple[Tensor, ...]) -> Program:
    """The program of a module in its present mode; the module is not changed.

    Raises:
        InputError: `torch.export` refuses the model or the example, or the model returns no tensor.
    """
    try:
        with silent(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # recurrent layers keep a list of their weights
            warnings.simplefilter("ignore", FutureWarning)  # of torch to itself, where it unrolls them
            exported = model if isinstance(model, torch.export.ExportedProgram) else torch.export.export(_ordinary(model), example)
            program = _unrolled(exported)
    except (Exception, SystemExit) as error:  # torch.export raises many types; all of them mean that there is no graph
        shapes = [tuple(e.shape) for e in example]
        msg = f"{type(model).__name__} was given with inputs {shapes}; expected a model that torch.export takes: {first_line(error)}"
        raise InputError(msg) from error
    given, meant = [tuple(e.shape) for e in example], [shape_of(n) for n in program.inputs]
    if given != meant:
        msg = f"inputs of shapes {given} were given; expected those that the program was exported for: {meant}"
        raise InputError(msg)
    if not program.outputs:
        msg = f"{type(model).__name__} returns no tensor; expected a model whose forward returns at least one"
        raise InputError(msg)
    return program


def _ordinary(model: nn.Module) -> nn.Module:
    """The model, or a copy where inference mode made its weights, of which torch takes no derivatives."""
    return copy.deepcopy(model) if any(t.is_inference() for t in (*model.parameters(), *model.buffers())) else model


@contextmanager
def undisturbed() -> Generator[None, None, None]:
    """With derivatives, tensors on the CPU unless written otherwise, and no autocast, whatever the caller has set.

    The first forward derivative of a process loads functions that torch scripts, and torch warns itself that this is deprecated.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        yield


def _unrolled(exported: torch.export.ExportedProgram) -> Program:
    """The program with recurrent layers step by step, as torch itself defines them.

    They stay as they are, to be refused, where one is random, or where an in-place call overwrites memory that others
    share: torch's unrolling makes every call one out of place, and does not see that the result of an `einsum` may be a view.
    """
    program = _program(exported)
    layers = [node for node in program.nodes if node.target in RECURRENT]
    if not layers or any(map(is_random, layers)) or program.refused or program.hidden:
        return program
    found, whole = {node.target for node in layers}, torch.export.default_decompositions()
    table = {**get_decompositions([op for op in _LAYERS if op in found]), **{op: whole[op] for op in _CELLS if op in found}}
    return _program(exported.run_decompositions(table))


@contextmanager
def silent() -> Generator[None, None, None]:
    """Without torch's log, and without the graph that it prints, which would repeat in many lines what an error says in one."""
    before, written, graph = logging.root.manager.disable, io.StringIO(), ""
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(written):
            yield
    except Exception as error:
        graph = f"{error.partial_fx_graph}\n" if hasattr(error, "partial_fx_graph") else ""  # pyright: ignore
        raise
    finally:
        logging.disable(before)
        if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]
            with suppress(OSError):  # a full disk: what torch says is not worth an error
                sys.stderr.write(written.getvalue().replace(graph, ""))


def _program(exported: torch.export.ExportedProgram) -> Program:
    signature = exported.graph_signature
    names: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_lifted_custom_objs,
    }
    graph, ends = _opened(exported.graph_module)
    nodes = list(graph.nodes)
    given = {old.name: new for old, new in zip(exported.graph.nodes, nodes, strict=False) if old.op == "placeholder"}  # they come first
    constants: dict[fx.Node, Any] = {}
    for name, node in given.items():
        if name in names:
            held = exported.state_dict.get(names[name], exported.constants.get(names[name]))
            if held is not None:
                constants[node] = _own(held) if isinstance(held, Tensor) else held
    inputs = [given[name] for name in signature.user_inputs if name in given]
    pairs = zip(signature.output_specs, ends, strict=True)
    outputs = [n for spec, n in pairs if spec.kind is OutputKind.USER_OUTPUT and isinstance(n, fx.Node)]
    plain = functional(nodes, outputs, constants)
    held = {plain.given[n]: value for n, value in constants.items()} | plain.constants
    return Program(plain.nodes, held, [plain.given[n] for n in inputs], plain.outputs, plain.refused, plain.hidden)


def _own(held: Tensor) -> Tensor:
    """The tensor without its graph; a copy where inference mode made it, since no derivative goes through such."""
    return held.clone() if held.is_inference() else held.detach()


def _opened(module: fx.GraphModule) -> tuple[fx.Graph, tuple[Any, ...]]:
    """A copy of the graph in which every call of a part of it, such as a scope of `torch.no_grad`, is replaced by what it calls.

    Gradients and lower precision are no part of the function that is bounded.
    """
    graph = fx.Graph()
    return graph, _copied(module, graph, {})


def _copied(module: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """The module's nodes written into the graph; what it returns."""
    for node in module.graph.nodes:
        if node.op == "output":
            return tuple(map_arg(node.args[0], values.__getitem__))
        part = _SCOPES.get(str(node.target)) if node.op == "call_function" else None
        if part is not None:
            inside = getattr(module, node.args[part].target)
            given = map_arg(node.args[part + 1 :], values.__getitem__)
            places = [n for n in inside.graph.nodes if n.op == "placeholder"]
            values[node] = _copied(inside, graph, dict(zip(places, given, strict=True)))
        elif node.op == "call_function" and op_name(node).rsplit(".", 1)[0] in _APART:
            values[node] = _apart(node, graph, values)
        elif node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
            values[node] = values[node.args[0]][node.args[1]]
        elif node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    return ()


def _apart(node: fx.Node, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    """A call written into the graph as the calls that torch itself makes of it."""
    read = node.all_input_nodes

    def run(*given: Tensor) -> Any:
        place = dict(zip(read, given, strict=True)).__getitem__
        return node.target(*map_arg(node.args, place), **map_arg(node.kwargs, place))  # type: ignore[operator]

    held = [n.meta["val"] for n in read]
    with held[0].fake_mode:
        traced = make_fx(run, tracing_mode="fake")(*held)
    inside = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), (values[n] for n in read), strict=True))
    for n in traced.graph.nodes:
        if n.op == "output":
            return map_arg(n.args[0], inside.__getitem__)
        if n not in inside:
            inside[n] = graph.node_copy(n, inside.__getitem__)
            inside[n].meta |= {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
    return None


def place(node: fx.Node) -> str:
    """Where in the user's source the call stands: `file:line`, or the module's path where no source is known."""
    frames: list[tuple[str, str]] = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    mine = [f for f in frames if "/torch/nn/" not in f[0]] or frames
    return f"{mine[-1][0]}:{mine[-1][1]}" if mine else module_path(node)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module, or the node's own name outside of any."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return paths[-1].removeprefix("L['self'].") if paths else node.name


def arguments(node: fx.Node, resolve: Callable[[fx.Node], Any]) -> dict[str, Any]:
    """The call's arguments by name, defaults included, nodes replaced by what `resolve` gives."""
    args = map_arg(node.args, resolve)
    kwargs = map_arg(node.kwargs, resolve)
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    given: dict[str, Any] = {}
    for i, spec in enumerate(schema.arguments):
        if i < len(args):
            given[spec.name] = args[i]
        elif spec.name in kwargs:
            given[spec.name] = kwargs[spec.name]
        else:
            given[spec.name] = spec.default_value
    return given


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


def is_random(node: fx.Node) -> bool:
    """Whether the call draws random numbers when run as it stands."""
    if node.target in _LAYERS:
        given = arguments(node, lambda n: n)
        return given["train"] and given["dropout"] > 0 and given["num_layers"] > 1  # torch drops between the layers
    target: Any = node.target
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


# ---- calls in float64 ----------------------------------------------------------------------------------------------------
#
# Calls of the graph in float64: what both sides take the weights, and all that the model computes from them, to be.
#
# docs/network.md#computed-weights.

_VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.view_as.default")
_SAME = ("aten.detach.default", "aten.detach_.default")
_MEMORY = ("aten.as_strided", "aten.view.dtype", "aten.set_")  # and what begins so


def in_float64(value: Any, wide: torch.dtype = torch.float64) -> Any:
    """Floating numbers of any type, or a floating type, in float64 (complex128): the numbers themselves, denormal ones too.

    In `wide` where the numbers need not be the model's own.
    """
    if isinstance(value, torch.dtype):
        return wide.to_complex() if value.is_complex else wide if value.is_floating_point else value
    if not isinstance(value, Tensor) or value.dtype == in_float64(value.dtype, wide):
        return value
    return scaled_float64(value.detach(), 0)[0] if wide == torch.float64 else value.detach().to(in_float64(value.dtype, wide))


def reads_memory(node: fx.Node) -> bool:
    """Whether the call reads places or bits of memory, which are others in float64."""
    return op_name(node).startswith(_MEMORY)


def evaluate(node: fx.Node, resolve: Callable[[fx.Node], Any], wide: torch.dtype = torch.float64) -> Any:
    """The call's result in float64, for arguments in float64; without the choices that torch makes for speed or by memory.

    All of it in `wide` where it is only to be near.
    """
    args: tuple[Any, ...] = tuple(in_float64(a, wide) for a in map_arg(node.args, resolve))
    kwargs: dict[str, Any] = {k: in_float64(v, wide) for k, v in map_arg(node.kwargs, resolve).items()}
    name, held = op_name(node), getattr(node.meta.get("val"), "dtype", None)
    if name in _SAME:  # derivatives go through: the function is that of its values
        return args[0]
    if name in _VIEWS:  # the layout in memory may be another here
        return args[0].reshape(args[1].shape if isinstance(args[1], Tensor) else args[1])
    if name in _IN_PLACE_OF and (result := _IN_PLACE_OF[name](*args, **kwargs)) is not None:
        return result
    if name == "aten.rms_norm.default" and (*args, None, None)[3] is None and kwargs.get("eps") is None:
        own = torch.float64 if held == torch.float64 else torch.float32  # torch takes eps from the type
        kwargs, args = kwargs | {"eps": torch.finfo(own).eps}, args[:3]
    if not node.all_input_nodes and isinstance(held, torch.dtype) and held.is_floating_point:  # `linspace`, `full`: of no type in float64
        kwargs |= {"dtype": wide} if any(a.name == "dtype" for a in node.target._schema.arguments) else {}  # type: ignore[union-attr]
    if name.startswith(("aten.empty", "aten.new_empty")):  # what is there before anything was written is nothing to rely on
        return torch.zeros(shape_of(node), dtype=in_float64(held, wide))
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.to(in_float64(result.dtype, wide)) if isinstance(result, Tensor) else result


def _attention(q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any) -> Tensor:
    """The plain formula: the fused kernel has no forward derivative."""
    mask, dropout, causal = (*others, *(None, 0.0, False)[len(others) :])
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, None, **options)[0]


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, training: bool, momentum: float, eps: float, *_: Any
) -> Tensor | None:
    """In evaluation mode a product and a sum: the forward derivative of torch's call is slow."""
    if training:
        return None
    shape = [-1 if j == 1 else 1 for j in range(x.ndim)]
    gain = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * gain if bias is None else bias - mean * gain
    return x * gain.reshape(shape) + shift.reshape(shape)


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """The function that its rule bounds, without the switch at a threshold."""
    return torch.logaddexp(torch.zeros_like(x), float(beta) * x) / float(beta)


_IN_PLACE_OF: dict[str, Callable[..., Tensor | None]] = {
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.batch_norm.default": _batch_norm,
    "aten.softplus.default": _softplus,
}
"""Operation -> the function that is called for it, with its arguments; where it returns None the operation itself is."""
