"""An experiment is a list of tasks. The table of their rows is written after every task, so that a run can be resumed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gramlip.errors import InputError
from gramlip.lab.compare import WARM_UP, environment, timed
from gramlip.norm.methods import METHODS
from gramlip.operators.linear_maps import Conv
from gramlip.reports.output import write_whole
from gramlip.reports.pictures import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CPU = torch.device("cpu")
Row = dict[str, str | float | int]


@dataclass(frozen=True)
class Options:
    """The options of a run.

    Attributes:
        device: the device to run on.
        trials: timed runs of each method.
        seed: seed of all random numbers.
        quick: shrink the experiment to seconds.
        weights: the file of a state dict.
        data: folder of images, or the name of a data set on the hub.
        preset: a preset of the experiment; None: chosen by the device.
        scratch: folder in which a task may store the state from which it resumes.
    """

    device: torch.device = CPU
    trials: int = 5
    seed: int = 0
    quick: bool = False
    weights: Path | None = None
    data: str | None = None
    preset: str | None = None
    scratch: Path = Path("runs")

    def settings(self, name: str) -> dict[str, str | int | bool | None]:
        """The settings in the header; a run is resumed only under the same settings."""
        digest = None if self.weights is None else hashlib.sha256(self.weights.read_bytes()).hexdigest()[:16]
        own = {"seed": self.seed, "quick": self.quick, "trials": self.trials, "warm_up_dropped": WARM_UP, "weights_sha256": digest}
        own |= {} if self.preset is None else {"preset": self.preset}
        return {"experiment": name} | environment(self.device) | own


@dataclass(frozen=True)
class Task:
    """One resumable step. Its name is the first column of its rows; `run` returns the rows without it."""

    name: str
    run: Callable[[], list[Row]]


@dataclass(frozen=True)
class Experiment:
    """An experiment: its measurements, its figure and its summary.

    Attributes:
        name: the command's argument.
        title: one line that describes it.
        tasks: options -> tasks.
        draw: rows -> figure.
        tell: rows -> text, Markdown tables.
        takes: which of the options "weights", "data" and "preset" it accepts.
    """

    name: str
    title: str
    tasks: Callable[[Options], Sequence[Task]]
    draw: Callable[[list[Row]], Figure]
    tell: Callable[[list[Row]], str]
    takes: tuple[str, ...] = ()


def reproduce(
    experiment: Experiment, folder: Path, options: Options, watch: Callable[[list[Task]], Iterable[Task]] = iter
) -> dict[str, Path]:
    """Run the tasks that are not yet in the folder's table, then make the figure and the summary.

    Args:
        experiment: one of `EXPERIMENTS`.
        folder: created if missing; holds run.json (the header), results.csv, figure.png and summary.md.
        options: the options of the run.
        watch: wraps the iteration over the remaining tasks, for instance to show progress.

    Returns:
        The files by name.

    Raises:
        InputError: the folder holds a run under other settings, or a table of something else.
    """
    for option in ("weights", "data", "preset"):
        if getattr(options, option) is not None and option not in experiment.takes:
            msg = f"--{option} was given to {experiment.name}, which has no use for it; expected none: leave --{option} out"
            raise InputError(msg)
    options = replace(options, scratch=folder / "runs")
    every = experiment.tasks(options)
    _make(folder)
    files = {name: folder / name for name in ("run.json", "results.csv", "figure.png", "summary.md")}
    header = _header(files, options.settings(experiment.name))
    rows = table(files["results.csv"])
    done = {row["task"] for row in rows}
    for task in watch([t for t in every if t.name not in done]):
        rows += [{"task": task.name} | row for row in task.run()]
        write_whole(files["results.csv"], _written(rows))
    save(experiment.draw(rows), files["figure.png"])
    settings_text = ", ".join(f"{key} {value}" for key, value in header.items() if value is not None)
    write_whole(files["summary.md"], f"# {experiment.title}\n\n{experiment.tell(rows)}\n\n{settings_text}\n")
    return files


def _make(folder: Path) -> None:
    """Create the folder, and check that files can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--out {folder} cannot be made ({error.strerror}); expected a folder that can be written: type --out DIR"
        raise InputError(msg) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        msg = f"--out {folder} cannot be written; expected a folder that can be: type --out DIR"
        raise InputError(msg)


def _header(files: dict[str, Path], settings: dict[str, Any]) -> dict[str, Any]:
    """The header of the run: written at the start, and checked on resume."""
    if files["run.json"].exists():
        try:
            found = json.loads(files["run.json"].read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        different = [key for key, value in settings.items() if not isinstance(found, dict) or found.get(key) != value]  # pyright: ignore
        if different:
            msg = f"{files['run.json'].parent} holds a run with another {', '.join(different)}; expected the same: type --out NEW"
            raise InputError(msg)
    elif there := [file for file in files.values() if file.exists()]:
        msg = f"{there[0]} stands there without its run.json; expected both or neither: type --out with a new folder"
        raise InputError(msg)
    write_whole(files["run.json"], json.dumps(settings, indent=2) + "\n")
    return settings


def table(path: Path) -> list[Row]:
    """The rows so far, with numbers parsed."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any("task" not in row or None in row or None in row.values() for row in rows):
        msg = f"{path} is no table of gramlip reproduce, or a torn one; expected whole rows with a task: type --out with a new folder"
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


# ---- one layer -----------------------------------------------------------------------------------------------------------
#
# Methods with the options of the paper's tables, measured on a layer.

Choice = tuple[str, dict[str, object]]


def measured(op: Conv, choices: Sequence[Choice], options: Options) -> list[Row]:
    """Value and time of each method; methods that are not valid for the layer are left out."""
    rows: list[Row] = []
    for method, settings in choices:
        try:
            value, seconds = timed(lambda m=method, s=settings: METHODS[m].value(op, **s), options.device, options.trials)
        except InputError:
            continue
        row: Row = {"method": method, "settings": as_text(settings), "side": METHODS[method].side, "value": value}
        rows.append(row | {"seconds": seconds})
    return rows


def as_text(settings: dict[str, object]) -> str:
    """Settings in a word: the number of steps or samples as the paper puts it in parentheses."""
    return " ".join(str(value) for value in settings.values())


def title(row: Row) -> str:
    """`method (settings)` as in the paper's tables."""
    return f"{row['method']} ({row['settings']})" if row["settings"] != "" else str(row["method"])
