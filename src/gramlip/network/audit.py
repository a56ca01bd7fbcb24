"""`audit`: an interval for the Lipschitz constant of a whole network, layer by layer and composed; its upper side is proved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor, nn

from gramlip.errors import InputError, UnsupportedError
from gramlip.network import Effort, Watch
from gramlip.network.compose import Composition, compose, constants, kind
from gramlip.network.coupling import coupled, slopes_of_channels
from gramlip.network.fold import fold
from gramlip.network.graph import Program, export, undisturbed
from gramlip.network.in_place import reads_memory
from gramlip.network.linear_stretches import linear_stretches
from gramlip.network.local import Local, Region, columns_norm, derivative, region, region_search, restricted
from gramlip.network.lower_bound import Function, Stretch, chosen, function, stretch
from gramlip.network.ranges import capped
from gramlip.network.rules import Lowered, lower
from gramlip.network.steps import Attention, Input, Linear, Network, Pad, Product, Shortcut, Slope, Step, Sum, Unbounded, selected
from gramlip.norm.methods import check_rtol
from gramlip.numerics import rounding as rd
from gramlip.operators.given import GATHER, example_inputs, is_sharded, unwrapped
from gramlip.operators.interval import Bound, decimals
from gramlip.operators.linear_maps import Conv, Scale, Shape
from gramlip.reports.report import LayerRow, LeftOut, Report

# ---- what is accepted ----------------------------------------------------------------------------------------------------


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
    state = model.state_dict if isinstance(model, torch.export.ExportedProgram) else model.state_dict()
    bare = [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]
    if any(map(is_sharded, state.values())):
        msg = f"the weights are in shards, DTensors; expected whole ones: {GATHER}"
        raise InputError(msg)
    if bare:
        msg = f"{bare[0]} is on the meta device, without numbers; expected weights: type model.to_empty(device='cpu') and load them"
        raise InputError(msg)


def check_options(assume: object, rtol: float, effort: object, time_limit: object, seed: object, strict: object) -> None:
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
    if not _finite(effort):
        msg = f"effort={effort!r} was given; expected a finite number such as 1.0"
        raise InputError(msg)
    if time_limit is not None and not (_finite(time_limit) and time_limit >= 0):  # type: ignore[operator]
        msg = f"time_limit={time_limit!r} was given; expected seconds, at least 0, such as 60.0, or None"
        raise InputError(msg)


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Part:
    """Which entries of the input change and which of the result count, as truth values; None where all do."""

    inputs: Tensor | None
    outputs: Tensor | None

    def said(self) -> list[str]:
        """Which, in words."""
        pairs = (("inputs", self.inputs), ("outputs", self.outputs))
        return [f"{int(kept.sum())} of {len(kept)} {name}" for name, kept in pairs if kept is not None]


def _taken(lowered: Lowered) -> list[str]:
    return [f"computed weights are those that float64 gives where they {', '.join(lowered.taken)}"] if lowered.taken else []


def _restricted(network: Network, area: Region | None, part: Part) -> tuple[Network, Local | None]:
    """The folded steps on a set of inputs, from and to the chosen entries, and all that is known on the set."""
    if area is None:
        return fold(selected(capped(network), part.inputs, part.outputs)), None
    local = restricted(fold(network, biases=True), area)
    return fold(selected(local.network, part.inputs, part.outputs)), local


def _part(network: Network, inputs: Sequence[int] | None, outputs: Sequence[int] | None) -> Part:
    sizes = [math.prod(step.shape) for step in network.steps]
    counts = (
        sum(n for n, step in zip(sizes, network.steps, strict=True) if isinstance(step.what, Input)),
        sum(sizes[i] for i in network.outputs),
    )
    return Part(entries("inputs", inputs, counts[0]), entries("outputs", outputs, counts[1]))


def entries(name: str, given: Sequence[int] | None, count: int) -> Tensor | None:
    """The entries of these numbers, as truth values; a number below 0 counts from the end.

    Raises:
        InputError: no integers, none of them, or numbers that the value does not have.
    """
    if given is None:
        return None
    numbers = list(given) if isinstance(given, Sequence | range) else None
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or not -count <= n < count for n in numbers):  # type: ignore[reportUnnecessaryIsInstance]
        msg = f"{name}={given!r} was given; expected numbers of the {count} entries, flattened: type a list such as [0, 2]"
        raise InputError(msg)
    kept = torch.zeros(count, dtype=torch.bool)
    kept[torch.tensor(numbers)] = True
    return kept


# ---- audit ---------------------------------------------------------------------------------------------------------------

_KINDS: dict[type, str] = {
    Slope: "activation",
    Pad: "padding",
    Sum: "sum",
    Product: "product",
    Attention: "attention",
    Unbounded: "unbounded",
}
_GROWTH: dict[type, str] = {
    Sum: "sum of branches, against the largest of them",
    Product: "product of two values, against the larger",
    Attention: "attention of rows of bounded norm, against the largest of its inputs",
}
_NEEDS_DOMAIN = {
    Product: "a product of two values that depend on the input has no finite constant without a domain: pass domain=(low, high)",
    Attention: "dot-product attention has no finite constant (arXiv 2006.04710) without a domain: pass domain=(low, high)",
}
Domain = tuple[float, float] | tuple[Tensor, Tensor]
Example = Tensor | Sequence[Tensor] | Sequence[int]


def tensors_of(model: nn.Module | torch.export.ExportedProgram, example: Example) -> tuple[Tensor, ...]:
    """The example as real tensors; a shape stands for one sample."""
    items = example_inputs(model, example, real=True)
    for t in items:
        if not isinstance(t, Tensor):
            msg = f"an example that holds a {type(t).__name__} was given; expected tensors alone: give the model a forward pass of tensors"
            raise InputError(msg)
        if t.is_meta:
            msg = f"an example of shape {tuple(t.shape)} on the meta device was given; expected one on the CPU: type its shape"
            raise InputError(msg)
        if t.is_complex() or t.numel() == 0:
            msg = f"an example of shape {tuple(t.shape)} and {t.dtype} was given; expected real entries, at least one"
            raise InputError(msg)
    return tuple(t.clone() if t.is_inference() else t for t in items)


@undisturbed()
def audit(
    model: nn.Module | torch.export.ExportedProgram,
    example: Example,
    *,
    rtol: float = 1e-2,
    assume: Mapping[str, float] | None = None,
    domain: Domain | None = None,
    at: Tensor | Sequence[Tensor] | None = None,
    radius: float | None = None,
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    data: Tensor | None = None,
    seed: int = 0,
    effort: float = 1.0,
    time_limit: float | None = None,
    strict: bool = True,
    target: str | None = None,
    progress: Watch | None = None,
) -> Report:
    """Report with an interval for the l2 Lipschitz constant L of the network: `report.lower <= L <= report.upper`.

    The upper side is proved, rounding included, and so are both sides of the layers. The lower side is the stretch of two concrete
    inputs in float64, less the rounding of the two forward passes, which is measured and not proved.

    The model is taken as a real function of its input in the mode it is in (batch norm needs `model.eval()`); it is not changed.

    Args:
        model: a module that `torch.export` takes, or an exported program.
        example: input tensor(s) with their batch axis, or the shape of one sample, in the model's dtype and on its device.
        rtol: relative width asked of each layer's interval.
        assume: Lipschitz constants to believe, by module path, node or operation name; each stands in the report.
        domain: (low, high), two numbers or tensors that broadcast to the input: the constant is that of inputs between them.
        at: an input, and
        radius: the l2 distance from it of the inputs that the constant holds for; with a domain, of those in both.
        inputs: numbers of the entries of the flat input that change, the others staying what they are; None is all of them.
        outputs: numbers of the entries of the flat result that count; None is all of them.
        data: samples (k, *sample) from which the search for the lower side starts.
        seed: of that search.
        effort: of the search for smaller upper sides; 0 takes closed forms, a negative number plain composition.
        time_limit: seconds after which nothing more is searched for; composition is always finished.
        strict: False reports calls without a rule as unbounded instead of raising; they stand in `report.unsupported`.
        target: title of the report.
        progress: wraps the list of names of each phase, which is iterated over, such as `tqdm`.

    Raises:
        UnsupportedError: operations without a rule, all of them at once with their place in the source.
        InputError: an example, domain or assumption that cannot be used.

    Reference: docs/network.md.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    >>> report = audit(model, (2,))
    >>> report.lower <= report.upper
    True
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    check_model(model)
    check_options(assume, rtol, effort, time_limit, seed, strict)
    search = Effort(effort, time_limit, progress)
    tensors = tensors_of(model, example)
    check_inputs(tensors)
    program, lowered = _lowered(model, tensors, assume, search)
    if lowered.unsupported and strict:
        calls = "; ".join(lowered.unsupported)
        msg = f"{type(model).__name__} has {len(lowered.unsupported)} calls that no rule can bound; expected rules for all of them: {calls}"
        raise UnsupportedError(msg)
    area = region([tuple(t.shape) for t in tensors], domain, at, radius)
    problem = Problem(program, lowered, tensors, area, _part(lowered.network, inputs, outputs))
    whole, seconds = _composed(problem, rtol, search)
    above, below = _upper_side(whole, search), _lower_side(problem, data, seed, search)
    if below.value > above.value:
        _contradicted(lowered.assumed, below, above.value)
    said = problem.part.said()
    chain = "; ".join([*([] if area is None else [str(area)]), *said, above.because, *search.said, *_taken(lowered), below.because])
    return Report(
        target or type(model).__name__,
        _rows(whole, seconds),
        _left_out(whole.network),
        Bound(below.value, above.value, chain),
        tuple(lowered.assumed),
        unsupported=tuple(lowered.unsupported),
        scope=(*([] if area is None or area.centre is None else [str(area)]), *said),
    )


@dataclass(frozen=True)
class Problem:
    """The model as calls and as steps, its example, and the set of inputs and the entries that the constant is of."""

    program: Program
    lowered: Lowered
    tensors: tuple[Tensor, ...]
    area: Region | None
    part: Part


def _composed(problem: Problem, rtol: float, effort: Effort) -> tuple[Whole, list[float]]:
    """The folded steps with their constants, all composed, and the seconds of each step."""
    network, local = _restricted(problem.lowered.network, problem.area, problem.part)
    constants, seconds = _constants(network, rtol, effort)
    ways = linear_stretches(network, constants, rtol, effort)
    everywhere = None if problem.area is None else lambda: _composed(replace(problem, area=None), rtol, effort)[0]
    return Whole(network, constants, ways, compose(network, constants, ways), problem.part, local, everywhere), seconds


def _contradicted(assumed: Sequence[str], below: Stretch, upper: float) -> None:
    """Two inputs are stretched by more than the upper side: an assumption that does not hold, or a wrong rule."""
    seen = f"two inputs are stretched by {decimals(below.value, upward=False)} ({below.because}), beyond {decimals(upper, upward=True)}"
    if assumed:
        msg = f"{'; '.join(assumed)}: {seen}; expected assumptions that hold: raise the constants"
        raise InputError(msg)
    msg = f"{seen}: a rule is wrong, or a rule of yours; nothing was widened"
    raise ArithmeticError(msg)


@dataclass(frozen=True)
class Whole:
    """The network whose upper side is searched: the folded steps, the constant of each of them, shortcuts, and all of it composed.

    `part` says from which entries to which, `local` what is known on the set of inputs that it is meant for, None for all of them.
    `everywhere` gives the same network for all inputs where it is meant for a set.
    """

    network: Network
    constants: Sequence[Bound]
    ways: Mapping[int, Sequence[Shortcut]]
    composed: Composition
    part: Part
    local: Local | None
    everywhere: Callable[[], Whole] | None = None


@dataclass(frozen=True)
class Upper:
    """An upper side of the whole network, and why."""

    value: float
    because: str


def _composition(whole: Whole, best: float, effort: Effort) -> Upper:
    return Upper(whole.composed.upper, "; ".join([PLAIN, *whole.composed.because]))


def _coupling(whole: Whole, best: float, effort: Effort) -> Upper | None:
    """Coupling, with the slopes of each entry and, where these differ over the places of a channel, with those of channels.

    The second is left out where another way is so far below composition that it will not be needed. With it come the slopes of all
    inputs: a search may end higher with smaller slopes.
    """
    uppers = [_coupled(whole, whole.network, effort)]
    shared = slopes_of_channels(whole.network)
    if shared is not None and best * COUPLING_GAINS >= whole.composed.upper:
        uppers.append(_coupled(whole, shared, effort))
        if whole.everywhere is not None:
            uppers.append(_coupling(whole.everywhere(), best, effort))
    return min((upper for upper in uppers if upper is not None), key=lambda upper: upper.value, default=None)


def _coupled(whole: Whole, network: Network, effort: Effort) -> Upper | None:
    segments = coupled(network, whole.constants, effort)
    if segments is None:
        return None
    ways = {i: list(some) for i, some in whole.ways.items()}
    for segment in segments:
        if segment.because:
            ways.setdefault(segment.last, []).append(Shortcut((segment.upper,), (segment.first,), segment.because))
    together = compose(whole.network, whole.constants, ways)
    plain = f"{PLAIN} ({decimals(whole.composed.upper, upward=True)})"
    return Upper(together.upper, "; ".join([plain, *together.because]))


def _jacobian(whole: Whole, best: float, effort: Effort) -> Upper | None:
    local, part = whole.local, whole.part
    if local is None:
        return None
    network, composed = whole.network, whole.composed
    if local.apart is not local.network:
        network = fold(selected(local.apart, part.inputs, part.outputs))
        composed = compose(network, constants(network.steps, [[network.steps[s].shape for s in step.sources] for step in network.steps]))
    derivatives = derivative(network, composed, local.area, every=part.inputs is None)
    if derivatives is None:
        return None
    against = f"{decimals(whole.composed.upper, upward=True)} by composition"
    return Upper(
        derivatives.norm(local.area, search=effort.amount > 0.0), f"bounds of the Jacobian's entries on the set, against {against}"
    )


def _columns(whole: Whole, best: float, effort: Effort) -> Upper | None:
    local, part = whole.local, whole.part
    if local is None or not local.columns.pay(part.outputs, whole.composed.upper):
        return None
    norm = columns_norm(local.apart, local.area, part.inputs, part.outputs)
    if norm == math.inf:
        return None
    against = f"{decimals(whole.composed.upper, upward=True)} by composition"
    return Upper(norm, f"the results as linear functions of the input, and what switches on the set, against {against}")


def _regions(whole: Whole, best: float, effort: Effort) -> Upper | None:
    """The steepest linear region, where few enough are expected; nothing where they turn out to be more."""
    local, part, budget = whole.local, whole.part, int(REGIONS * effort.amount)
    search = None if local is None or budget < 1 else region_search(local.apart, local.area, (part.inputs, part.outputs), budget)
    if search is None:
        return None
    norm = search.norm(lambda least: effort.over or least >= best)
    if norm is None:
        if search.budget <= 0:
            effort.say(f"linear regions given up: more than {budget} halvings")
        return None
    return Upper(
        norm, f"the steepest linear region that meets the set, against {decimals(whole.composed.upper, upward=True)} by composition"
    )


REGIONS = 2**15  # halvings of linear regions that a search of effort 1 may take: about three seconds
COUPLING_GAINS = 100.0  # times less than composition, at most, is expected of coupling
PLAIN = "product of layers, sum at residuals, root of squares at joins"
WAYS: dict[str, Callable[[Whole, float, Effort], Upper | None]] = {
    "composition": _composition,
    "columns": _columns,
    "jacobian": _jacobian,
    "regions": _regions,
    "coupling": _coupling,
}
"""Name -> an upper side of the whole, from the best so far, None where it has none; composition comes first and is always finished."""


def _upper_side(whole: Whole, effort: Effort) -> Upper:
    """The smallest of all ways that the effort allows; of equal ones the first."""
    best = Upper(math.inf, PLAIN)
    for name, way in WAYS.items():
        if name != "composition" and (effort.amount < 0 or best.value in {0.0, math.inf}):
            continue
        if name != "composition" and effort.over:
            effort.say(f"{name} not begun: the time was up")
            continue
        candidate = way(whole, best.value, effort)
        if candidate is not None and (candidate.value < best.value or name == "composition"):
            best = candidate
    return best


def _lowered(
    model: nn.Module | torch.export.ExportedProgram, tensors: tuple[Tensor, ...], assume: Mapping[str, float] | None, effort: Effort
) -> tuple[Program, Lowered]:
    """The model's calls, and its steps."""
    program: Program | None = None
    for _ in effort.shown("export", [""]):
        program = export(model, tensors)
    assert program is not None
    return program, lower(program, assume)


@undisturbed()
def steps_of(model: nn.Module | torch.export.ExportedProgram, example: Example) -> Network:
    """The folded steps of a model; calls without a rule are unbounded steps."""
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    return fold(lower(export(model, tensors_of(model, example))).network)


def _constants(network: Network, rtol: float, effort: Effort) -> tuple[list[Bound], list[float]]:
    steps, groups = network.steps, _alike(network.steps)
    known: dict[int, tuple[Bound, float]] = {}
    for i in effort.shown("layers", [step.name for step in steps]):
        group = groups.get(i, [])
        begin = time.perf_counter()
        bounds = _bounds([(steps[j], [steps[s].shape for s in steps[j].sources]) for j in group], rtol)
        seconds = (time.perf_counter() - begin) / max(1, len(group))
        known |= {j: (bound, seconds) for j, bound in zip(group, bounds, strict=True)}
    return [known[i][0] for i in range(len(steps))], [known[i][1] for i in range(len(steps))]


def _alike(steps: Sequence[Step]) -> dict[int, list[int]]:
    """The steps that are searched together, by the first of them."""
    alike: dict[object, list[int]] = {}
    for i, step in enumerate(steps):
        operators = kind(step)
        alike.setdefault(i if operators is None else operators, []).append(i)
    return {group[0]: group for group in alike.values()}


def _bounds(items: Sequence[tuple[Step, Sequence[Shape]]], rtol: float) -> list[Bound]:
    """The constants of steps that are searched together; an error names the step."""
    try:
        return constants([step for step, _ in items], [shapes for _, shapes in items], rtol)
    except InputError as error:
        if len(items) > 1:
            return [_bounds([item], rtol)[0] for item in items]
        msg = f"{items[0][0].name}: {error}"
        raise InputError(msg) from error


def _lower_side(problem: Problem, data: Tensor | None, seed: int, effort: Effort) -> Stretch:
    program, lowered, area, part = problem.program, problem.lowered, problem.area, problem.part
    if program.refused or any(map(reads_memory, program.nodes)):
        return Stretch(0.0, "no lower side: what an in-place call overwrites, or what is read from memory by place, is not followed")
    if any(read.op == "get_attr" for node in program.nodes for read in node.all_input_nodes):
        return Stretch(0.0, "no lower side: a part that a call such as `torch.cond` runs is not followed")
    shapes = [tuple(t.shape) for t in problem.tensors]

    def build(given: Sequence[Shape], wide: torch.dtype) -> Function:
        run = function(program, given, lowered.computed, wide)
        base = torch.zeros(sum(map(math.prod, given)), dtype=torch.float64)
        return chosen(run, base if area is None or list(given) != shapes else area.inside(base), part.inputs, part.outputs)

    _check_data(data, shapes)
    weights = {n: (value, error) for n, error in lowered.errors.items() if isinstance(value := lowered.computed[n], Tensor)}
    of_program = [t for t in (*problem.tensors, *program.constants.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    around = area is not None and area.centre is not None  # differences of close points need all digits
    wide = torch.float64 if around or any(t.dtype == torch.float64 for t in of_program) else torch.float32
    return stretch(build, shapes, effort, wide=wide, data=data, points=area, seed=seed, weights=weights)


def _check_data(data: object, shapes: Sequence[Shape]) -> None:
    """Samples of the input, finite and stacked, or none."""
    size = sum(map(math.prod, shapes))
    if data is not None and not (
        isinstance(data, Tensor) and data.ndim and len(data) and data[0].numel() == size and data.isfinite().all()
    ):
        given = f"of shape {tuple(data.shape)}" if isinstance(data, Tensor) else repr(type(data).__name__)
        msg = f"data {given} was given; expected a tensor of finite samples of shape {shapes[0]}, stacked along the first axis"
        raise InputError(msg)


def _rows(whole: Whole, seconds: Sequence[float]) -> tuple[LayerRow, ...]:
    rows: list[LayerRow] = []
    parts = whole.composed.parts or []
    total = math.log(whole.composed.upper) if parts else 0.0
    comparable = 0 < sum(map(abs, parts)) <= 2 * abs(total)  # parts that all but cancel are no shares of what is left
    for i, (step, constant) in enumerate(zip(whole.network.steps, whole.constants, strict=True)):
        if isinstance(step.what, Linear | Sum | Product | Attention) or constant.upper != 1.0:
            rows.append(_row(whole, i, seconds[i], parts[i] / total if comparable else None))
    return tuple(rows)


def _row(whole: Whole, i: int, seconds: float, share: float | None) -> LayerRow:
    step, constant = whole.network.steps[i], whole.constants[i]
    what, sizes = step.what, whole.network.steps[step.sources[0]].shape[2:] if step.sources else None
    if isinstance(what, Linear):
        size = what.op.input_size if isinstance(what.op, Conv) else None
        op = None if isinstance(what.op, Scale) else what.op
        return LayerRow(step.name, type(what.op).__name__, tuple(what.op.weight.shape), size, constant, seconds, share, op)  # type: ignore[arg-type]
    label = _KINDS.get(type(what), "map")
    if isinstance(what, Sum | Product | Attention):
        lips, largest = whole.composed.lips, max(whole.composed.lips[s] for s in step.sources)
        constant = Bound(0.0, rd.up(lips[i] / largest) if 0 < largest < math.inf else lips[i], _GROWTH[type(what)])
    return LayerRow(step.name, f"{label} ({step.op.removeprefix('aten.').split('.')[0]})", (), sizes, constant, seconds, share)


def _left_out(network: Network) -> tuple[LeftOut, ...]:
    """Nodes without a finite constant, each with its reason and place."""
    left: list[LeftOut] = []
    for step in network.steps:
        what, reason = step.what, None
        if isinstance(what, Unbounded):
            reason = what.reason
        elif (isinstance(what, Product) and what.caps is None) or (isinstance(what, Attention) and what.rows is None):
            before = [network.steps[s] for s in step.sources]
            if not any(isinstance(s.what, Unbounded) and s.place == step.place for s in before):  # a quotient says it once
                reason = _NEEDS_DOMAIN[type(what)]
        if reason is not None:
            left.append(LeftOut(step.name, (), f"unbounded: {reason} ({step.place})"))
    return tuple(left)
