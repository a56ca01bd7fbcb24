"""The Lipschitz interval of a whole model: its graph, its steps, what each of them costs, and several of them bounded at once.

`Effort` is what the phases of an audit share. docs/network.md#effort.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

Watch = Callable[[list[str]], Iterable[str]]


@dataclass
class Effort:
    """Limits and messages that the phases of one audit share.

    Attributes:
        amount: of the search; 0 allows closed forms alone, a negative number nothing beyond composition.
        time_limit: seconds after which no phase is begun and no search goes on; None for no limit.
        watch: wraps the names of what a phase goes through, such as `tqdm`.
        said: what was not begun, or given up, each in one phrase.
    """

    amount: float = 1.0
    time_limit: float | None = None
    watch: Watch | None = None
    said: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._end = math.inf if self.time_limit is None else time.monotonic() + self.time_limit

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._end

    def shown(self, phase: str, names: Sequence[str]) -> Iterator[int]:
        """The places of the names, one after the other, while their phase and they are shown."""
        labels = [f"{phase}: {name}" if name else phase for name in names]
        for i, _ in zip(range(len(labels)), self.watch(labels) if self.watch else labels, strict=True):
            yield i

    def say(self, phrase: str) -> None:
        """Keep a phrase for the report, once."""
        if phrase not in self.said:
            self.said.append(phrase)
