"""A model as a list of calls: the graph of `torch.export`, constants evaluated, in-place calls made plain.

What a call does to its inputs is decided by the rules; here nothing is bounded.
"""

from __future__ import annotations

import io
import logging
import operator
import re
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.fx.node import map_arg

from gramlip.errors import InputError, UnsupportedError, first_line
from gramlip.steps import Shape

_RECURRENT = (torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input, torch.ops.aten.gru.input, torch.ops.aten.lstm.input)
_PASS_THROUGH = ("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")  # may return their input itself


@dataclass(frozen=True)
class Program:
    """An exported model: its graph, the tensors and objects it holds, and which placeholders are the user's inputs."""

    nodes: list[fx.Node]
    constants: dict[fx.Node, Any]
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def export(model: nn.Module | torch.export.ExportedProgram, example: tuple[Tensor, ...]) -> Program:
    """The program of a module in its present mode; the module is not changed.

    Raises:
        InputError: `torch.export` refuses the model or the example.
    """
    try:
        with silent(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # recurrent layers keep a list of their weights
            warnings.simplefilter("ignore", FutureWarning)  # of torch to itself, where it unrolls them
            exported = model if isinstance(model, torch.export.ExportedProgram) else torch.export.export(model, example)
            unrolled = _unrolled(exported)
    except (Exception, SystemExit) as error:  # torch.export raises many types; all of them mean that there is no graph
        shapes = [tuple(e.shape) for e in example]
        msg = f"{type(model).__name__} was given with inputs {shapes}; expected a model that torch.export takes: {first_line(error)}"
        raise InputError(msg) from error
    return _program(unrolled)


def _unrolled(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Recurrent layers step by step, as torch itself defines them; everything else stays as it is."""
    found = [op for op in _RECURRENT if any(node.target is op for node in exported.graph.nodes)]
    return exported.run_decompositions(get_decompositions(found)) if found else exported


@contextmanager
def silent() -> Generator[None, None, None]:
    """Without torch's log, and without the graph that it prints, which would repeat in many lines what an error says in one."""
    before, said, graph = logging.root.manager.disable, io.StringIO(), ""
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(said):
            yield
    except Exception as error:
        graph = f"{error.partial_fx_graph}\n" if hasattr(error, "partial_fx_graph") else ""  # pyright: ignore
        raise
    finally:
        logging.disable(before)
        if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]
            with suppress(OSError):  # a full disk: what torch says is not worth an error
                sys.stderr.write(said.getvalue().replace(graph, ""))


def _program(exported: torch.export.ExportedProgram) -> Program:
    signature = exported.graph_signature
    names: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_lifted_custom_objs,
    }
    nodes = list(exported.graph.nodes)
    constants: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder" and node.name in names:
            held = exported.state_dict.get(names[node.name], exported.constants.get(names[node.name]))
            if held is not None:
                constants[node] = held.detach() if isinstance(held, Tensor) else held
    inputs = [n for n in nodes if n.op == "placeholder" and n.name in signature.user_inputs]
    outputs: list[fx.Node] = []
    for node in nodes:
        if node.op == "output":
            named = [n for n in node.all_input_nodes if n.name in signature.user_outputs]
            outputs = list(dict.fromkeys(named))
    return Program(nodes, constants, inputs, outputs)


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
    return "getitem" if target is operator.getitem else str(target)


def is_random(node: fx.Node) -> bool:
    """Whether the call draws random numbers when run as it stands."""
    target: Any = node.target
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def mutations(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For each in-place call, the value that it overwrites, where a plain call has the same meaning.

    Raises:
        UnsupportedError: a view of the overwritten value is read later, so that a plain call would mean something else.
    """
    order = {n: i for i, n in enumerate(nodes)}
    root: dict[fx.Node, fx.Node] = {}
    classes: dict[fx.Node, list[fx.Node]] = {}
    overwritten: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        schema: Any = getattr(node.target, "_schema", None)
        source = next((a for a in node.args if isinstance(a, fx.Node)), None)
        views = op_name(node) in (*_PASS_THROUGH, "getitem") or (schema is not None and any(r.alias_info for r in schema.returns))
        root[node] = root[source] if source is not None and views else node
        classes.setdefault(root[node], []).append(node)
        if schema is not None and schema.is_mutable and node.op == "call_function" and source is not None:
            overwritten[node] = source
    for node, source in overwritten.items():
        later = [
            (alias, user)
            for alias in classes[root[source]]
            if alias not in (node, source) and order[alias] < order[node]
            for user in alias.users
        ]
        read = [user for _, user in later if order[user] > order[node]]
        if read:
            msg = f"{place(node)}: {op_name(node)} overwrites what {read[0].name} reads through a view; expected the call out of place"
            raise UnsupportedError(msg)
    return overwritten
