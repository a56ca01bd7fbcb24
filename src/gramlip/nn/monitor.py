"""`Norms`: tracked norms of a network's layers, the base of penalty and cap; `Monitor` and callbacks that log these norms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from gramlip import distributed
from gramlip.errors import InputError, check_integers
from gramlip.nn.norm_op import NormGeometry
from gramlip.nn.parametrize import Where, evaluating, in_eval_mode, layers, operator, real
from gramlip.nn.tracker import Tracker, plainly
from gramlip.numerics.precision import norm
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, Ints


def weight_of(module: nn.Module) -> Tensor:
    """The current weight of a layer."""
    return cast("Tensor", module.weight)


class Norms(nn.Module):
    """Lower estimates of the norms of a network's linear and convolution layers, for every input size, tracked from call to call.

    Args:
        model: the network. The list of layers is fixed now; their weights are read at every call.
        example: an input for one forward pass, which records input sizes (they decide how strides split), or None.
        every: calls between two searches over all frequencies; 1 searches at every call.
        steps: tracking steps per call.
        peaks: number of frequencies tracked in each group.
        torus: grid points per axis in a search.
        where: keep only layers for which `where(path, module)` is true.
        shared: with several ranks, each tracks only its share of the layers.
    """

    calls: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        *,
        every: int = 50,
        steps: int = 1,
        peaks: int = 8,
        torus: int = 8,
        where: Where | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        check_integers(1, every=every, steps=steps, peaks=peaks)
        self.every = every
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        with in_eval_mode(model):  # reading a normalised weight moves nothing
            self._layers = tuple(layers(model, example, where))
            operators = [(path, module, operator(module, "weight", size)) for path, module, size in self._layers]
            if shared:
                operators = [operators[i] for i in distributed.share([distributed.cost(op) for *_, op in operators])]
            alike = self._alike(operators, torus)
            self.trackers = nn.ModuleList(
                Tracker(geometry, [weight_of(module) for _, module in group], steps, peaks) for (geometry, *_), group in alike.items()
            )
        self._paths = [path for group in alike.values() for path, _ in group]
        self._tracked = tuple(module for group in alike.values() for _, module in group)

    def _alike(self, operators: list[tuple[str, nn.Module, Dense | Conv]], torus: int) -> dict[Any, list[tuple[str, nn.Module]]]:
        """The layers that one tracker follows, by their geometry and by the shape, dtype and device of their weights."""
        alike: dict[Any, list[tuple[str, nn.Module]]] = defaultdict(list)
        for path, module, op in operators:
            real(op, type(self).__name__)
            if weight_of(module).is_meta:
                msg = f"{path} is on the meta device; expected weights with values: type model.to_empty(device='cpu') and load them first"
                raise InputError(msg)
            weight = op.weight
            alike[NormGeometry.of(op, torus), weight.shape, weight.dtype, weight.device].append((path, module))
        return alike

    def sigmas(self) -> dict[str, Tensor]:
        """Take one tracking step, or a search if one is due; return {path: norm estimate}, scalars with their graph."""
        call, first, values = int(self.calls), 0, []
        due = self._due(call)
        for tracker, weights in self.tracked():
            tracked = [i - first for i in due if first <= i < first + len(tracker)]
            values += tracker.last() if not tracked and self._rests(tracker, call + first) else tracker(weights, tracked)
            first += len(tracker)
        plainly(self._count, self.calls)
        return dict(zip(self._paths, values, strict=True))

    def tracked(self) -> Iterator[tuple[Tracker, list[Tensor]]]:
        """Each tracker with the current weights of its layers."""
        modules = iter(self._tracked)
        for tracker in cast("list[Tracker]", list(self.trackers)):
            yield tracker, [weight_of(module) for module in islice(modules, len(tracker))]

    @property
    def geometries(self) -> list[NormGeometry]:
        """The geometry of each layer, in the order of `sigmas`."""
        return [tracker.geometry for tracker in cast("list[Tracker]", list(self.trackers)) for _ in range(len(tracker))]

    def _rests(self, tracker: Tracker, turn: int) -> bool:
        """Whether this call may reuse the last estimates; asked only if it searches none of these layers."""
        return False

    def _count(self, calls: Tensor) -> tuple[Tensor]:
        self.calls += 1
        return (calls.clone(),)

    def _due(self, call: int) -> list[int]:
        """The layers that this call searches: all in the first call, then each once in `every` calls, spread evenly."""
        count = len(self._paths)
        if call == 0:
            return list(range(count))
        return [i % count for i in range(call * count // self.every, (call + 1) * count // self.every)]

    def certify(self, rtol: float = 1e-2) -> dict[str, Bound]:
        """Return {path: certified interval} by `gramlip.bound`, for the input sizes of the example; ranks share the work."""
        sized: list[tuple[nn.Module, Ints | None]] = [(module, size) for _, module, size in self._layers]
        with in_eval_mode(nn.ModuleList(module for _, module, _ in self._layers)):
            bounds = distributed.bounds(sized, rtol=rtol)
        return {path: b for (path, *_), b in zip(self._layers, bounds, strict=True)}


# ---- monitor -------------------------------------------------------------------------------------------------------------


class Monitor(Norms):
    """Read the norms of a network during training, without changing it.

    `monitor()` returns {path: {"sigma": ..., "stable_rank": ...}}. `sigma` is a lower estimate of the layer's norm for every input
    size, tracked from call to call. `stable_rank` is `||W||_F^2 / max ||D(w)||^2`: for a matrix its stable rank, for a convolution that
    of its operator per position of the (strided) output. `monitor.certify(rtol)` returns certified intervals; with `certify_every=k`
    every k-th call adds them as "lower" and "upper". `monitor.log(writer, step)` writes the numbers of a call to a logger.

    Args:
        model: the network. The list of layers is fixed now; their weights are read at every call, in eval mode.
        example: an input, a tuple of inputs, or the shape of one sample, for one forward pass that records input sizes; None: the norms
            hold for every size.
        every: calls between two searches of a layer over all frequencies; use 1 if calls are many training steps apart.
        certify_every: calls between two certificates; None: no certificates.
        where: keep only layers for which `where(path, module)` is true.
        peaks: number of frequencies tracked in each group.
        torus: grid points per axis in a search.

    Raises:
        InputError: options that cannot be used, or a model without such layers.
        UnsupportedError: complex weights.

    Reference: docs/training.md#monitor.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> _ = nn.init.eye_(model[0].weight)
    >>> {name: round(value, 4) for name, value in Monitor(model)()["0"].items()}
    {'sigma': 1.0, 'stable_rank': 4.0}
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        every: int = 50,
        *,
        certify_every: int | None = None,
        where: Callable[[str, nn.Module], bool] | None = None,
        peaks: int = 4,
        torus: int = 8,
    ) -> None:
        check_integers(1, certify_every=1 if certify_every is None else certify_every)
        super().__init__(model, example, every=every, peaks=peaks, torus=torus, where=where)
        self.certify_every = certify_every

    def forward(self) -> dict[str, dict[str, float]]:
        """Take one tracking step; return {path: numbers of the layer}."""
        with evaluating(nn.ModuleList(self._tracked)):  # reading a normalised weight moves nothing
            sigmas = torch.stack([sigma.to(torch.float64) for sigma in self.sigmas().values()])
            sizes = [_size(weight_of(module).detach(), sigma) for module, sigma in zip(self._tracked, sigmas.tolist(), strict=True)]
        attained = [geometry.attained for geometry in self.geometries]
        ranks = (torch.stack(sizes) / sigmas * sigmas.new_tensor(attained)).square()  # a ratio of zeros is no number
        readings = zip(self._paths, *torch.stack([sigmas, ranks]).tolist(), strict=True)
        norms = {path: {"sigma": sigma, "stable_rank": rank} for path, sigma, rank in readings}
        if self.certify_every is not None and int(self.calls) % self.certify_every == 0:
            for path, interval in self.certify().items():
                norms[path] |= {"lower": float(interval.lower), "upper": float(interval.upper)}
        return norms

    def log(self, *writers: Any, step: int) -> dict[str, float]:
        """Read the norms once, write them as scalars `sigma/PATH` and `stable_rank/PATH`, and return them.

        Args:
            *writers: each a TensorBoard `SummaryWriter`, a W&B run (or `wandb` itself), or a logger of Lightning.
            step: the training step.

        Raises:
            InputError: a writer of another kind.
        """
        ways = [_way(writer) for writer in writers]
        logged = {f"{name}/{path}".rstrip("/"): value for path, numbers in self().items() for name, value in numbers.items()}
        for write in ways:
            write(logged, step)
        return logged


def _size(weight: Tensor, sigma: float) -> Tensor:
    """||W||_F, in a wider precision if squares could leave the range of the weight's dtype."""
    safe = weight.dtype == torch.float64 or (weight.dtype == torch.float32 and 1e-9 < sigma < 1e9)
    return norm((weight if safe else weight.to(torch.float64)).flatten()).to(torch.float64)


def _way(writer: Any) -> Callable[[dict[str, float], int], object]:
    """The function that passes numbers to a writer. The writer is recognised by its method, so none of these packages is imported."""
    if callable(getattr(writer, "add_scalar", None)):
        return lambda found, step: [writer.add_scalar(name, value, step) for name, value in found.items()]
    if callable(getattr(writer, "log_metrics", None)):
        return lambda found, step: writer.log_metrics(found, step=step)
    if callable(getattr(writer, "log", None)):
        return lambda found, step: writer.log(found, step=step)
    msg = (
        f"a writer of type {type(writer).__name__} was given; expected a SummaryWriter, a W&B run, or a logger of Lightning: "
        "type monitor() for the numbers, and write them yourself"
    )
    raise InputError(msg)


# ---- callbacks -----------------------------------------------------------------------------------------------------------
#
# Each reads the norms at the first step and then every `every` steps, with a new search, and passes them to the loop's logger.
# Either package is imported only when its callback is asked for.


class _Readings:
    """A monitor that is made when training begins, since the network is known only then, and the steps at which it reads."""

    def __init__(self, example: Any = None, every: int = 50, **options: Any) -> None:
        check_integers(1, every=every)
        self.every, self._make = every, lambda model: Monitor(model, example, every=1, **options)
        self.monitor: Monitor | None = None
        self._last = 0

    def begin(self, model: nn.Module, step: int) -> None:
        """Start, or resume, a run on this network."""
        self.monitor, self._last = self._make(model), step - self.every

    def due(self, step: int) -> Monitor | None:
        """Return the monitor if it reads at this step, otherwise None. A step that is seen several times is read once."""
        if self.monitor is None or step - self._last < self.every:
            return None
        self._last = step
        return self.monitor


def _base(package: str, module: str, name: str) -> Any:
    if find_spec(package) is None:
        msg = f"{package} is not installed; expected it for this callback: type pip install {package}"
        raise InputError(msg)
    return getattr(import_module(module), name)


@cache
def _lightning_monitor() -> type:
    base = _base("lightning", "lightning.pytorch", "Callback")

    class LightningMonitor(base):
        """A callback for `lightning.Trainer` that logs the norms of the module that trains.

        All loggers of the trainer receive `sigma/PATH` and `stable_rank/PATH`; other callbacks find them in `trainer.callback_metrics`.

        Args:
            example: an input of the module, the shape of one sample, or None, as for `Monitor`.
            every: optimizer's steps between two readings.
            **options: those of `Monitor`; `certify_every` counts readings.

        Reference: docs/training.md#monitor.
        """

        def __init__(self, example: Any = None, every: int = 50, **options: Any) -> None:
            super().__init__()
            self._readings = _Readings(example, every, **options)

        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            self._readings.begin(pl_module, trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *of_the_batch: Any) -> None:
            if monitor := self._readings.due(trainer.global_step):
                found = monitor.log(*trainer.loggers, step=trainer.global_step)
                trainer.callback_metrics.update({name: torch.tensor(value) for name, value in found.items()})

    return _public(LightningMonitor)


@cache
def _trainer_monitor() -> type:
    base = _base("transformers", "transformers", "TrainerCallback")

    class TrainerMonitor(base):
        """A callback for `transformers.Trainer` that logs the norms of its model by `trainer.log`, to wherever the trainer reports.

        Type `trainer.add_callback(TrainerMonitor(trainer))`.

        Args:
            trainer: the trainer of the model that is read.
            example: an input of the model, the shape of one sample, or None, as for `Monitor`.
            every: optimizer's steps between two readings.
            **options: those of `Monitor`; `certify_every` counts readings.

        Reference: docs/training.md#monitor.
        """

        def __init__(self, trainer: Any, example: Any = None, every: int = 50, **options: Any) -> None:
            self._trainer, self._readings = trainer, _Readings(example, every, **options)

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self._readings.begin(given["model"], state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if monitor := self._readings.due(state.global_step):
                wanted = control.should_log  # which each log takes for done: the loss of this step is still to come
                self._trainer.log(monitor.log(step=state.global_step))
                control.should_log = wanted

    return _public(TrainerMonitor)


def _public(class_: type) -> type:
    """The class under its public name, by which pickle finds it again."""
    class_.__module__, class_.__qualname__ = __name__, class_.__name__
    return class_


CALLBACKS: dict[str, Callable[[], type]] = {"LightningMonitor": _lightning_monitor, "TrainerMonitor": _trainer_monitor}


def __getattr__(name: str) -> Any:
    if name not in CALLBACKS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return CALLBACKS[name]()
