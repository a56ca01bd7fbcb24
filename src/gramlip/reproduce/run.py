"""An experiment as a list of tasks: each gives rows of a table that is written after every task, so that it can be resumed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gramlip.errors import InputError
from gramlip.figures import save
from gramlip.measure import WARM_UP, environment
from gramlip.output import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CPU = torch.device("cpu")
Row = dict[str, str | float | int]


@dataclass(frozen=True)
class Options:
    """What a run depends on; `quick` shrinks it to seconds, `weights` is a state dict's file."""

    device: torch.device = CPU
    trials: int = 5
    seed: int = 0
    quick: bool = False
    weights: Path | None = None

    def settings(self, name: str) -> dict[str, str | int | bool | None]:
        """The header that stands beside the rows: a run is only resumed under the same."""
        digest = None if self.weights is None else hashlib.sha256(self.weights.read_bytes()).hexdigest()[:16]
        own = {"seed": self.seed, "quick": self.quick, "trials": self.trials, "warm_up_dropped": WARM_UP, "weights_sha256": digest}
        return {"experiment": name} | environment(self.device) | own


@dataclass(frozen=True)
class Task:
    """One resumable step: its name is the rows' first column; `run` returns them without it."""

    name: str
    run: Callable[[], list[Row]]


@dataclass(frozen=True)
class Experiment:
    """What is measured, how it is drawn, how it is told.

    Attributes:
        name: the command's argument.
        title: one line of what it shows.
        tasks: the steps under the given options.
        draw: rows -> figure.
        tell: rows -> text, Markdown tables.
        takes_weights: whether a state dict may be given.
    """

    name: str
    title: str
    tasks: Callable[[Options], Sequence[Task]]
    draw: Callable[[list[Row]], Figure]
    tell: Callable[[list[Row]], str]
    takes_weights: bool = False


def reproduce(
    experiment: Experiment, folder: Path, options: Options, watch: Callable[[list[Task]], Iterable[Task]] = iter
) -> dict[str, Path]:
    """Run what is not yet in the folder's table, then draw and tell all of it.

    Args:
        experiment: one of `EXPERIMENTS`.
        folder: made where missing; holds run.json (the header), results.csv, figure.png and summary.md.
        options: what the run depends on.
        watch: may show progress over the tasks left.

    Returns:
        The files by name.

    Raises:
        InputError: the folder holds a run under other settings, or a table that is no such run's.
    """
    if options.weights is not None and not experiment.takes_weights:
        msg = f"weights were given to {experiment.name}, which draws its own; expected none: leave --weights out"
        raise InputError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / name for name in ("run.json", "results.csv", "figure.png", "summary.md")}
    header = _header(files, options.settings(experiment.name))
    rows = _read(files["results.csv"])
    done = {row["task"] for row in rows}
    for task in watch([t for t in experiment.tasks(options) if t.name not in done]):
        rows += [{"task": task.name} | row for row in task.run()]
        write_whole(files["results.csv"], _written(rows))
    save(experiment.draw(rows), files["figure.png"])
    told = ", ".join(f"{key} {value}" for key, value in header.items() if value is not None)
    write_whole(files["summary.md"], f"# {experiment.title}\n\n{experiment.tell(rows)}\n\n{told}\n")
    return files


def _header(files: dict[str, Path], settings: dict[str, Any]) -> dict[str, Any]:
    """The run's header: written at its start, the same when it is resumed."""
    if files["run.json"].exists():
        try:
            found = json.loads(files["run.json"].read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        different = [key for key, value in settings.items() if not isinstance(found, dict) or found.get(key) != value]  # pyright: ignore
        if different:
            msg = f"{files['run.json'].parent} holds a run with another {', '.join(different)}; expected the same: type --out NEW"
            raise InputError(msg)
    elif files["results.csv"].exists():
        msg = f"{files['results.csv']} stands there without its run.json; expected both or neither: type --out with a new folder"
        raise InputError(msg)
    write_whole(files["run.json"], json.dumps(settings, indent=2) + "\n")
    return settings


def _read(path: Path) -> list[Row]:
    """The rows so far, numbers as numbers."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and "task" not in rows[0]:
        msg = f"{path} has columns {', '.join(rows[0])}; expected a table of gramlip reproduce: type --out with a new folder"
        raise InputError(msg)
    return [{key: _number(value) for key, value in row.items()} for row in rows]


def _number(text: str) -> str | float | int:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _written(rows: list[Row]) -> str:
    columns = dict.fromkeys(key for row in rows for key in row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats in four significant digits."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in line) + " |" for line in lines)


def pick(rows: Iterable[Row], **where: object) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]
