"""A model as a list of calls: its exported graph, which values its calls overwrite, and its calls in float64."""

from __future__ import annotations

import copy
import io
import logging
import operator
import re
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from gramlip.errors import InputError, first_line
from gramlip.network.in_place import Refused, functional, is_mutable, op_name, shape_of
from gramlip.numerics.precision import scaled_float64

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
_TRANSFORMS = "torch._functorch.predispatch"  # the module of the calls that begin and end `torch.vmap` and its kin
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
            program = _unrolled(_unbatched(exported))
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
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),  # it costs each call some microseconds
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        yield


def _unbatched(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with what `torch.vmap` and its kin do to calls written out: as they stand they begin a scope that an error leaves open.

    Raises:
        ValueError: derivatives of a part, of which torch keeps a tensor without numbers in place of the input; or in-place calls, which
            writing out would take out of place before it is known what shares their memory.
    """
    stored = [t for t in exported.constants.values() if isinstance(t, Tensor)]
    if any(isinstance(t, FakeTensor) or is_functorch_wrapped_tensor(t) for t in stored):
        msg = "torch.func.grad or vjp in the model, which torch.export does not follow; type torch.autograd.grad(y, x, create_graph=True)"
        raise ValueError(msg)
    nodes = [n for part in exported.graph_module.modules() if isinstance(part, fx.GraphModule) for n in part.graph.nodes]
    if not any(getattr(n.target, "__module__", "") == _TRANSFORMS for n in nodes):
        return exported
    if any(map(is_mutable, nodes)):
        msg = "in-place calls in a model with torch.vmap; type them out of place"
        raise ValueError(msg)
    return exported.run_decompositions({})


def _unrolled(exported: torch.export.ExportedProgram) -> Program:
    """The program with recurrent layers step by step, as torch itself defines them.

    They stay as they are, to be refused, where one is random, or where an in-place call overwrites memory that others
    share: torch's unrolling makes every call one out of place, and does not see that the result of an `einsum` may be a view.
    """
    program = _program(exported)
    layers = [node for node in program.nodes if node.target in RECURRENT]
    if not layers or any(map(is_random, layers)) or program.refused or program.hidden:
        return program
    recurrent, whole = {node.target for node in layers}, torch.export.default_decompositions()
    table = {**get_decompositions([op for op in _LAYERS if op in recurrent]), **{op: whole[op] for op in _CELLS if op in recurrent}}
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
    graph, ends = _opened(exported.graph_module)
    nodes = list(graph.nodes)
    given = {old.name: new for old, new in zip(exported.graph.nodes, nodes, strict=False) if old.op == "placeholder"}  # they come first
    constants = _constants(exported, given)
    inputs = [given[name] for name in signature.user_inputs if name in given]
    pairs = zip(signature.output_specs, ends, strict=True)
    outputs = [n for spec, n in pairs if spec.kind is OutputKind.USER_OUTPUT and isinstance(n, fx.Node)]
    plain = functional(nodes, outputs, constants)
    stored = {plain.given[n]: value for n, value in constants.items()} | plain.constants
    return Program(plain.nodes, stored, [plain.given[n] for n in inputs], plain.outputs, plain.refused, plain.hidden)


def _constants(exported: torch.export.ExportedProgram, given: dict[str, fx.Node]) -> dict[fx.Node, Any]:
    """The weights, buffers and other constants of a program, by their nodes."""
    signature = exported.graph_signature
    names: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_lifted_custom_objs,
    }
    constants: dict[fx.Node, Any] = {}
    for name, node in given.items():
        if name in names:
            stored = exported.state_dict.get(names[name], exported.constants.get(names[name]))
            if stored is not None:
                constants[node] = _own(stored) if isinstance(stored, Tensor) else stored
    return constants


def _own(weight: Tensor) -> Tensor:
    """The tensor without its graph; a copy where inference mode made it, since no derivative goes through such."""
    return weight.clone() if weight.is_inference() else weight.detach()


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

    tensors = [n.meta["val"] for n in read]
    with tensors[0].fake_mode:
        traced = make_fx(run, tracing_mode="fake")(*tensors)
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
    frames = [f for f in frames if "/gramlip/onnx/" not in f[0]]  # calls that stand for a node of a file, whose name counts
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


def is_random(node: fx.Node) -> bool:
    """Whether the call draws random numbers when run as it stands."""
    if node.target in _LAYERS:
        given = arguments(node, lambda n: n)
        return given["train"] and given["dropout"] > 0 and given["num_layers"] > 1  # torch drops between the layers
    target: Any = node.target
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


# ---- calls in float64: docs/network.md#computed-weights ------------------------------------------------------------------

_VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.view_as.default")
_SAME = ("aten.detach.default",)


def in_float64(value: Any, wide: torch.dtype = torch.float64) -> Any:
    """Floating numbers of any type, or a floating type, in float64 (complex128): the numbers themselves, denormal ones too.

    In `wide` where the numbers need not be the model's own.
    """
    if isinstance(value, torch.dtype):
        return wide.to_complex() if value.is_complex else wide if value.is_floating_point else value
    if not isinstance(value, Tensor) or value.dtype == in_float64(value.dtype, wide):
        return value
    return scaled_float64(value.detach(), 0)[0] if wide == torch.float64 else value.detach().to(in_float64(value.dtype, wide))


def evaluate(node: fx.Node, resolve: Callable[[fx.Node], Any], wide: torch.dtype = torch.float64) -> Any:
    """The call's result in float64, for arguments in float64; without the choices that torch makes for speed or by memory.

    All of it in `wide` where it is only to be near.
    """
    args: tuple[Any, ...] = tuple(in_float64(a, wide) for a in map_arg(node.args, resolve))
    kwargs: dict[str, Any] = {k: in_float64(v, wide) for k, v in map_arg(node.kwargs, resolve).items()}
    name, dtype = op_name(node), getattr(node.meta.get("val"), "dtype", None)
    if name in _SAME:  # derivatives go through: the function is that of its values
        return args[0]
    if name in _VIEWS:  # the layout in memory may be another here
        return args[0].reshape(args[1].shape if isinstance(args[1], Tensor) else args[1])
    if name in _IN_PLACE_OF and (result := _IN_PLACE_OF[name](*args, **kwargs)) is not None:
        return result
    if name == "aten.rms_norm.default" and (*args, None, None)[3] is None and kwargs.get("eps") is None:
        computed_in = torch.float64 if dtype == torch.float64 else torch.float32  # torch takes eps from the type
        kwargs, args = kwargs | {"eps": torch.finfo(computed_in).eps}, args[:3]
    if not node.all_input_nodes and isinstance(dtype, torch.dtype) and dtype.is_floating_point:  # `linspace`, `full`: of no type in float64
        kwargs |= {"dtype": wide} if any(a.name == "dtype" for a in node.target._schema.arguments) else {}  # type: ignore[union-attr]
    if name.startswith(("aten.empty", "aten.new_empty")):  # what is there before anything was written is nothing to rely on
        return torch.zeros(shape_of(node), dtype=in_float64(dtype, wide))
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


def _copy(x: Tensor, new: Tensor, *_: Any) -> Tensor:
    """The source of a copy, expanded to the shape of its target: torch has no derivative of the call."""
    return (new.real if new.is_complex() and not x.is_complex() else new).to(x.dtype).expand(x.shape)


_IN_PLACE_OF: dict[str, Callable[..., Tensor | None]] = {
    "aten.copy.default": _copy,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.batch_norm.default": _batch_norm,
    "aten.softplus.default": _softplus,
}
"""Operation -> the function that is called for it, with its arguments; where it returns None the operation itself is."""
