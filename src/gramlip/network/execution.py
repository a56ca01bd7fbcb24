"""`execution_error`: how far the floating-point program that runs may be from the function that it stands for. docs/execution.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gramlip.errors import InputError, UnsupportedError
from gramlip.network.audit import check_inputs, check_model, tensors_of
from gramlip.network.compose import coefficients, compose, constants
from gramlip.network.execution_rules import ROOM, RULES, Arithmetic, Execution, Operand, arithmetic, carried, constant
from gramlip.network.fold import fold
from gramlip.network.graph import Program, arguments, export, module_path, place, undisturbed
from gramlip.network.in_place import op_name, tensors
from gramlip.network.local import Region, region, restricted
from gramlip.network.local.intervals import Value, as_rows, restrict, whole_of
from gramlip.network.local.jacobians import Sweeps
from gramlip.network.local.relaxations import stray_of
from gramlip.network.ranges import INF, Range, capped_step
from gramlip.network.rules import Lowered, lower
from gramlip.network.steps import Input, Linear, Network, Slope, Step
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.numerics.rounding import frobenius_up, row_norms_up
from gramlip.operators.given import unwrapped
from gramlip.operators.interval import Bound, decimals
from gramlip.operators.linear_maps import apply

ROWS = 2**26  # entries of the rows of derivatives, by all values together, that are carried back from the outputs
COLUMNS = 2**27  # entries of the differences that are followed through a network to narrow its intervals
RTOL = 1e-2  # of the norms of layers


@dataclass(frozen=True)
class ExecutionError:
    """`|fl(f)(x) - f(x)|_2 <= upper` for every input of a set, and `outputs` bound the entries; `because` says for which arithmetic.

    `shares` are the calls whose rounding counts most, with what each adds to the bound of the largest entry.
    """

    upper: float
    outputs: tuple[Tensor, ...]
    because: str
    shares: tuple[tuple[str, float], ...] = ()

    @property
    def largest(self) -> float:
        """The bound of the entry that may be off by most."""
        return max(float(t.max()) for t in self.outputs)

    def __str__(self) -> str:
        worst = ", ".join(f"{name} {decimals(share, upward=True)}" for name, share in self.shares)
        text = f"|fl(f)(x) - f(x)| <= {decimals(self.upper, upward=True)}, each entry <= {decimals(self.largest, upward=True)}"
        return f"{text}\n{self.because}" + (f"\nmost of it: {worst}" if worst else "")


@undisturbed()
def execution_error(
    model: nn.Module | torch.export.ExportedProgram,
    example: Tensor | Sequence[Tensor] | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    sums: torch.dtype | None = None,
    domain: tuple[Any, Any] | None = None,
    at: Any = None,
    radius: float | None = None,
) -> ExecutionError:
    """Upper bound of what rounding does to the outputs of a model, for every input of a set.

    The function f is that of the model's weights in real numbers, the program that of its exported graph with weights, inputs and
    values in `dtype`: every operation of IEEE 754 and rounded to nearest, sums in any order, library functions within a few units.
    Inputs are numbers of `dtype`. docs/execution.md says what is assumed, proves the bound, and says what is outside.

    Args:
        model: a module in evaluation mode that `torch.export` takes, or an exported program.
        example: input tensor(s) with their batch axis, or the shape of one sample.
        dtype: float64, float32, bfloat16 or float16; None is the model's own.
        sums: in which sums are kept; None is float32 for the half types and `dtype` for the others.
        domain: (low, high), numbers or tensors that broadcast to the input.
        at: the centre of a ball of inputs.
        radius: its l2 radius.

    Raises:
        UnsupportedError: calls without a rule, all of them at once.
        InputError: no set was given, or settings under which the program's arithmetic is another.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    >>> error = execution_error(model, (2,), domain=(-1.0, 1.0))
    >>> 0.0 < error.upper < 1e-5
    True
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    check_model(model)
    given = tensors_of(model, example)
    check_inputs(given)
    area = region([tuple(t.shape) for t in given], domain, at, radius)
    if area is None:
        msg = "no set of inputs was given, and rounding grows with the numbers; expected one: type domain=(0.0, 1.0) or at=x, radius=0.25"
        raise InputError(msg)
    program = export(model, given)
    numbers = arithmetic(given[0].dtype if dtype is None else dtype, sums)
    lowered = lower(program, literal=True)
    _check(program, lowered)
    with torch.no_grad():
        return _Propagation(program, lowered, area, numbers).bound()


def _check(program: Program, lowered: Lowered) -> None:
    """Refuse, all at once, what no rule covers: calls, casts, and weights that the model computes."""
    refused = list(lowered.unsupported)
    for node in program.nodes:
        if node.op == "call_function" and node in lowered.places and _name(node) not in RULES:
            refused.append(f"{place(node)}: {op_name(node)} has no rule for its rounding")
        if node in lowered.places and _cast(program, node):
            refused.append(f"{place(node)}: {op_name(node)} changes the dtype; expected a program in one dtype")
        read = node in lowered.computed and any(user in lowered.places for user in node.users)
        if read and any(t.is_floating_point() for t in tensors(lowered.computed[node])):
            refused.append(f"{place(node)}: {op_name(node)} computes a weight; expected plain weights: type gramlip.nn.remove(model)")
    if refused:
        msg = f"{len(refused)} calls whose rounding no rule can bound; expected rules for all of them: {'; '.join(dict.fromkeys(refused))}"
        raise UnsupportedError(msg)


def _cast(program: Program, node: fx.Node) -> bool:
    """Whether a call gives floating numbers of another type than the input's."""
    wanted = program.inputs[0].meta["val"].dtype
    return any(t.is_floating_point() and t.dtype != wanted for t in tensors(node.meta.get("val")))


def _name(node: fx.Node) -> str:
    return op_name(node).removeprefix("aten.").split(".")[0].rstrip("_")


class _Propagation:
    """Errors of the program's values, call by call: entry by entry, and in norm; and the network with slopes where both runs are."""

    def __init__(self, program: Program, lowered: Lowered, area: Region, numbers: Arithmetic) -> None:
        self._program, self._places, self._numbers, self._area = program, lowered.places, numbers, area
        self._computed, self._network = lowered.computed, lowered.network
        self._exact = restricted(lowered.network, area, columns=COLUMNS).values
        self._steps, self._constants = list[Step](), list[Bound]()
        self._errors, self._norms, self._rounded = dict[int, Any](), dict[int, float](), dict[int, Tensor]()
        self._at: dict[fx.Node, Any] = {}
        self._fresh: dict[int, Tensor] = {}  # of values that folding drops: errors that arose since the last one that it keeps
        self._linear, (self._kept, self._folded) = _norms_of(self._network), _folded(self._network)

    def bound(self) -> ExecutionError:
        """The least of the three bounds: docs/execution.md#theorem."""
        for node in self._program.nodes:
            if node in self._places:
                self._at[node] = self._places[node]
                self._execute(node)
                if any(i is not None and not self._norms[i] < INF for i in _flat(self._at[node])):
                    return self._without(node)
        ends = self._network.outputs
        shapes = [self._network.steps[i].shape for i in ends]
        norms = [self._norms[i] for i in ends]
        entries = [self._errors[i].clamp_max(self._norms[i]) for i in ends]
        rows, shares = self._by_rows()
        if rows is not None:
            sizes = [math.prod(shape) for shape in shapes]
            entries = [torch.minimum(e, r.reshape(s)) for e, r, s in zip(entries, rows.split(sizes), shapes, strict=True)]
        whole = min(rd.hypot_up(norms), frobenius_up(torch.cat([e.reshape(-1) for e in entries])))
        return ExecutionError(whole, tuple(entries), self._because(), shares)

    def _without(self, node: fx.Node) -> ExecutionError:
        """No bound, since the rounding of a call has none on the set."""
        outputs = tuple(torch.full(self._network.steps[i].shape, INF, dtype=torch.float64) for i in self._network.outputs)
        reason = f"{module_path(node)}: {op_name(node)} may overflow, or divide by what rounding does not tell from zero"
        return ExecutionError(INF, outputs, f"{reason}; {self._because()}")

    def _because(self) -> str:
        sums = "" if self._numbers.sums == self._numbers.dtype else f", sums in {str(self._numbers.sums).removeprefix('torch.')}"
        text = str(self._numbers.dtype).removeprefix("torch.")
        return f"{text}{sums}, any order of summation, {self._area}; as proved in docs/execution.md"

    # ---- one call --------------------------------------------------------------------------------------------------------

    def _execute(self, node: fx.Node) -> None:
        """The steps of a call, and the error of its value."""
        last = max((i for i in _flat(self._at[node]) if i is not None), default=-1)
        begin = len(self._steps)
        for i in range(begin, last + 1):
            self._follow(i)
        if node.op != "call_function" or last < begin:  # an input, a value known before, or one that no output reads
            return
        call = self._call(node, self._errors.__getitem__)
        came = carried(call)
        if not isinstance(came, Tensor) and came is not None:  # parts of a value
            self._errors[last] = [part.abs() * ROOM for part in came]
            return
        came = self._by_step(last, self._errors.__getitem__) if came is None else came.abs() * ROOM
        came = came.clamp_max(self._norms[last]).broadcast_to(self._network.steps[last].shape)
        call = replace(call, size=_moduli(self._exact[last]) + came)
        lost = (RULES[call.name](call) * ROOM).broadcast_to(came.shape).nan_to_num(INF, INF)
        lost = torch.where(call.size + lost <= self._numbers.largest, lost, INF)
        self._rounded[last], self._errors[last] = lost, came + lost
        self._norms[last] = min(rd.add_up(self._norms[last], frobenius_up(lost)), frobenius_up(self._errors[last]))
        self._fold(node, last, lost)

    def _fold(self, node: fx.Node, i: int, lost: Tensor) -> None:
        """The norm at a step where linear steps end that fold into one map, by the norm of that map: docs/execution.md#theorem."""
        if i in self._kept and i not in self._folded:  # no map ends here, and later ones begin with this value
            return
        came = carried(self._call(node, self._fresh_at))
        fresh = self._by_step(i, self._fresh_at) if came is None else came.abs() * ROOM
        fresh = (fresh + lost).nan_to_num(INF, INF)
        if i not in self._kept:
            self._fresh[i] = fresh
            return
        source, map_ = self._folded[i]
        whole = rd.add_up(rd.mul_up(map_, self._norms[source]), frobenius_up(fresh) if bool(fresh.isfinite().all()) else INF)
        self._norms[i] = min(self._norms[i], whole)

    def _fresh_at(self, i: int) -> Any:
        """Errors of a value that arose since the last value that folding keeps: none at such a value, anything where it is not followed."""
        if i in self._fresh:
            return self._fresh[i]
        fill, low = 0.0 if i in self._kept else INF, self._exact[i].low
        return torch.full_like(low, fill) if isinstance(low, Tensor) else [torch.full_like(t, fill) for t in low]

    def _follow(self, i: int) -> None:
        """A step where both the exact and the executed arguments are, and what it makes of their errors in norm."""
        step = self._network.steps[i]
        if isinstance(step.what, Input):
            self._steps.append(step)
            self._constants.append(Bound(0.0, 1.0, ""))
            self._errors[i], self._norms[i] = torch.zeros(step.shape, dtype=torch.float64), 0.0
            return
        sources = [self._wide(s) for s in step.sources]
        shapes = [self._network.steps[s].shape for s in step.sources]
        self._steps.append(capped_step(restrict(step, sources), [v.whole for v in sources], shapes))
        constant = self._linear.get(i) or constants([self._steps[i]], [shapes], RTOL)[0]
        self._constants.append(constant)
        norms, factors = [self._norms[s] for s in step.sources], coefficients(self._steps[i])
        joined = rd.hypot_up(norms) if factors is None else rd.add_up(*map(rd.mul_up, factors, norms))
        self._norms[i] = rd.mul_up(float(constant.upper), joined)
        low, every = self._exact[i].low, self._norms[i]
        self._errors[i] = torch.full_like(low, every) if isinstance(low, Tensor) else [torch.full_like(t, every) for t in low]

    def _wide(self, i: int) -> Value:
        """Intervals of a value that hold it in both runs."""
        value, error = self._exact[i], self._errors[i]
        if not isinstance(value.low, Tensor):
            pairs = list(zip(value.low, value.high, error, strict=True))
            return Value([lo - e for lo, _, e in pairs], [hi + e for _, hi, e in pairs], Range(-INF, INF, INF, INF))
        low, high = value.low - error * ROOM, value.high + error * ROOM
        return Value(low, high, whole_of(low, high, Range(-INF, INF, INF, INF), tuple(low.shape)))

    def _by_step(self, i: int, errors: Callable[[int], Any]) -> Tensor:
        """Errors through an entrywise function by its slopes, through a linear map by its moduli; infinite in other steps."""
        step, before = self._steps[i], self._network.steps[i].sources
        what, unknown = step.what, torch.full(step.shape, INF, dtype=torch.float64)
        if len(before) != 1 or not isinstance(error := errors(before[0]), Tensor):
            return unknown
        if isinstance(what, Slope):
            return error * torch.maximum(*(torch.as_tensor(end, dtype=torch.float64).abs() for end in (what.low, what.high))) * ROOM
        if isinstance(what, Linear) and not what.op.weight.is_complex():
            stray = rd.mul_up(what.error, frobenius_up(error)) if what.error else 0.0
            return apply(replace(what.op, weight=to_float64(what.op.weight).abs()), error) * ROOM + stray
        return unknown

    def _call(self, node: fx.Node, errors: Callable[[int], Any]) -> Execution:
        def operand(n: fx.Node) -> Any:
            if n in self._at:
                values = [self._operand(i, errors(i)) for i in _flat(self._at[n])]
                return values[0] if len(values) == 1 else values
            value = self._computed.get(n, self._program.constants.get(n))
            return constant(value, self._numbers) if isinstance(value, Tensor) and value.is_floating_point() else value

        target: Any = node.target
        return Execution(_name(node), target, arguments(node, operand), torch.zeros(()), self._numbers)

    def _operand(self, i: int, error: Any) -> Any:
        value = self._wide(i)
        if isinstance(value.low, Tensor):
            return Operand(_moduli(value), error, value.low, value.high)
        parts = zip(value.low, value.high, error, strict=True)
        return [Operand(torch.maximum(lo.abs(), hi.abs()), e, lo, hi) for lo, hi, e in parts]

    # ---- rows of derivatives ---------------------------------------------------------------------------------------------

    def _by_rows(self) -> tuple[Tensor | None, tuple[tuple[str, float], ...]]:
        """Errors of the outputs, flat and joined, each rounding times the derivative of what follows; and the calls that count most."""
        network = Network(self._steps, self._network.outputs)
        total = sum(math.prod(self._network.steps[i].shape) for i in network.outputs)
        composed = compose(network, self._constants)
        if total * sum(math.prod(step.shape) for step in network.steps) > ROWS or not composed.upper < INF:
            return None, ()
        sweeps = Sweeps(network, composed)
        added: dict[int, Tensor] = {}
        for i, rows in sweeps.back(network.outputs, spread=True).items():
            if not isinstance(self._errors[i], Tensor):
                return None, ()
            blocked = sweeps.actions[i] is None and i not in sweeps.middle and not isinstance(network.steps[i].what, Input)
            added[i] = self._at_outputs(network.steps, i, as_rows(rows.most(sweeps.gamma)), blocked)
        whole = sum(added.values(), torch.zeros(total, dtype=torch.float64)) * ROOM
        worst = int(whole.argmax())
        first = sorted(added, key=lambda i: -float(added[i][worst]))[:3]
        return whole, tuple((network.steps[i].name, float(added[i][worst])) for i in first)

    def _at_outputs(self, steps: Sequence[Step], i: int, most: Tensor, blocked: bool) -> Tensor:
        """What a step's rounding makes of the outputs, its rows of derivatives being `most`; where they end here, what all errors make."""
        errors = self._errors[i] if blocked else self._rounded.get(i, torch.zeros(steps[i].shape, dtype=torch.float64))
        added = (most @ errors.reshape(-1) * ROOM).nan_to_num(INF, INF)
        if blocked:
            added = torch.minimum(added, (row_norms_up(most) * self._norms[i]).nan_to_num(INF, INF))
        if stray := stray_of(steps, i):
            added = added + row_norms_up(most) * rd.mul_up(stray, rd.hypot_up(self._norms[s] for s in steps[i].sources))
        return added


def _norms_of(network: Network) -> dict[int, Bound]:
    """Norms of all linear steps, which are searched together."""
    steps = network.steps
    linear = [i for i, step in enumerate(steps) if isinstance(step.what, Linear)]
    bounds = constants([steps[i] for i in linear], [[steps[s].shape for s in steps[i].sources] for i in linear], RTOL)
    return dict(zip(linear, bounds, strict=True))


def _folded(network: Network) -> tuple[set[int], dict[int, tuple[int, float]]]:
    """The values that folding keeps; and where one linear step is left of some: the value that it reads, and its norm."""
    whole = fold(Network([replace(step, place=str(i)) for i, step in enumerate(network.steps)], network.outputs))
    place = [int(step.place) for step in whole.steps]
    ends = {place[i]: (place[whole.steps[i].sources[0]], float(norm.upper)) for i, norm in _norms_of(whole).items()}
    return set(place), ends


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:  # type: ignore[reportUnknownVariableType]
            yield from _flat(item)
    else:
        yield value


def _moduli(value: Value) -> Tensor:
    return torch.maximum(value.low.abs(), value.high.abs())
