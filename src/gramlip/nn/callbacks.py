"""`Monitor` in the training loops of others: `LightningMonitor` is a callback of Lightning, `TrainerMonitor` one of Hugging Face.

Each reads the norms at the first step and every `every` steps, searched afresh, and gives them to whatever logger the loop has.
Both packages are imported only when one of these names is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from gramlip.errors import InputError, check_integers
from gramlip.nn.monitor import Monitor


class _Readings:
    """The monitor of a network that is known when training begins, and the steps at which it reads."""

    def __init__(self, example: Any = None, every: int = 50, **options: Any) -> None:
        check_integers(1, every=every)
        self.every, self._make = every, lambda model: Monitor(model, example, every=1, **options)
        self.monitor: Monitor | None = None
        self._last = 0

    def begin(self, model: nn.Module, step: int) -> None:
        """A run begins, or goes on, on this network."""
        self.monitor, self._last = self._make(model), step - self.every

    def due(self, step: int) -> Monitor | None:
        """The monitor, where this step is one that reads; a step that is seen several times reads once."""
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

        All loggers of the trainer get `sigma/PATH` and `stable_rank/PATH`, and `trainer.callback_metrics` has them for other callbacks.

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
        """A callback for `transformers.Trainer` that logs the norms of its model by `trainer.log`, so wherever the trainer reports.

        `trainer.add_callback(TrainerMonitor(trainer))`.

        Args:
            trainer: whose model is read.
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


def _public(made: type) -> type:
    """The class under the name by which it is found again, as pickle asks for it."""
    made.__module__, made.__qualname__ = __name__, made.__name__
    return made


CALLBACKS: dict[str, Callable[[], type]] = {"LightningMonitor": _lightning_monitor, "TrainerMonitor": _trainer_monitor}


def __getattr__(name: str) -> Any:
    if name not in CALLBACKS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return CALLBACKS[name]()
