"""An experiment is a list of tasks. The table of their rows is written after every task, so that a run can be resumed.

The experiment on training stands here too; those on single layers are in `layer_experiments`.
"""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gramlip.errors import InputError
from gramlip.lab.recipes import files
from gramlip.reports.pictures import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gramlip.lab.compare import WARM_UP, environment, timed
from gramlip.norm.methods import METHODS
from gramlip.operators.linear_maps import Conv
from gramlip.reports.output import write_whole
from gramlip.reports.pictures import save

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
        settings = {"seed": self.seed, "quick": self.quick, "trials": self.trials, "warm_up_dropped": WARM_UP, "weights_sha256": digest}
        settings |= {} if self.preset is None else {"preset": self.preset}
        return {"experiment": name} | environment(self.device) | settings


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
            header = json.loads(files["run.json"].read_text(encoding="utf-8"))
        except ValueError:
            header = {}
        different = [key for key, value in settings.items() if not isinstance(header, dict) or header.get(key) != value]  # pyright: ignore
        if different:
            msg = f"{files['run.json'].parent} holds a run with another {', '.join(different)}; expected the same: type --out NEW"
            raise InputError(msg)
    elif tables := [file for file in files.values() if file.exists()]:
        msg = f"{tables[0]} stands there without its run.json; expected both or neither: type --out with a new folder"
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


def by(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    """The rows of each value of a column, in the order in which the values come first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(row)
    return groups


def numbers(rows: Iterable[Row], key: str, scale: float = 1.0) -> list[float]:
    """A column of numbers, scaled."""
    return [scale * float(row[key]) for row in rows]


# ---- one layer -----------------------------------------------------------------------------------------------------------

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


# ---- section 5.4 -------------------------------------------------------------------------------------------------------
#
# Training with nothing, with the Gram penalty, with the tracked one and with spectral normalisation, on CIFAR-10, by
# the recipes of `gramlip.lab.train`. A run that stops goes on from its last epoch, in the folder `runs` beside the
# table.

CONTROLS = {"plain": "plain", "gram": "Gram penalty (the paper's)", "penalised": "tracked penalty", "normalised": "spectral normalisation"}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("resnet18", {}),
    "small": ("small", {"epochs": 4, "samples": 20_000, "test_samples": 5_000}),
    "quick": ("small", {"epochs": 2, "samples": 64, "test_samples": 32, "batch": 16}),
}
"""Name -> network, and the fields of its recipes that are changed."""
LOOKS = {
    "plain": ("#000000", "o", "-"),
    "gram": ("#009E73", "D", "--"),
    "penalised": ("#D55E00", "s", "-."),
    "normalised": ("#0072B2", "^", ":"),
}
PERCENT = 100.0


def preset(options: Options) -> str:
    """The preset to run: `quick`, the one asked for, or by the device the paper's or the small one."""
    return "quick" if options.quick else options.preset or ("paper" if options.device.type == "cuda" else "small")


def tasks(options: Options) -> list[Task]:
    """One task for each control.

    Raises:
        InputError: no data, or a device other than the one that the trainer takes.
    """
    if options.data is None:
        msg = "training needs images; expected a folder of CIFAR-10's parquet files, or uoft-cs/cifar10: type --data DIR"
        raise InputError(msg)
    for split in ("train", "test"):  # before anything is written
        files(options.data, split)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device.type != device:
        msg = f"--device {options.device} was given; expected {device}, which the trainer takes on this machine: type --device {device}"
        raise InputError(msg)
    name = preset(options)
    return [Task(f"{name} {control}", partial(_run, name, control, options.data, options)) for control in CONTROLS]


def _run(name: str, control: str, data: str, options: Options) -> list[Row]:
    """One row for each epoch, from the log, and a last one for the certified network."""
    model, changes = PRESETS[name]
    recipe = model if control == "plain" else f"{model}-{control}"
    folder = options.scratch / recipe
    place: Row = {"control": control, "model": model}
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # the trainer's own bar
        warnings.filterwarnings("ignore", module="lightning")
        try:
            done = _trainer()(recipe, data, folder, seed=options.seed, **changes)
        except SystemExit as stopped:  # how the trainer passes an interruption on
            raise KeyboardInterrupt from stopped
    if "constant" not in done:
        msg = f"{folder} stopped after {done['finished_epochs']} of {done['epochs']} epochs; expected all: type the same again to go on"
        raise InputError(msg)
    fields = ("epochs", "samples", "batch", "optimiser", "lr", "strength", "threshold", "target", "seconds", "count")
    last: Row = {field: done[field] if done[field] is not None else "all" for field in fields}
    last |= {"accuracy": done["clean"], "lower": done["constant"]["lower"], "upper": done["constant"]["upper"]}
    last |= {f"certified {e['eps']:.4f}": e["accuracy"] for e in done.get("certified_by_pairs", done["certified"])}
    return [*(place | row for row in _epochs(folder / "logs" / "metrics.csv")), place | {"kind": "end"} | last]


def _trainer() -> Callable[..., dict[str, Any]]:
    try:
        module = import_module("gramlip.lab.train")
    except ImportError as error:
        msg = f'training needs {error.name}, which is not installed; expected the extra: type pip install "gramlip[train]"'
        raise InputError(msg) from error
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return module.train


def _epochs(log: Path) -> list[Row]:
    """The log of each epoch: the trainer writes validation and training in lines of their own."""
    merged: dict[int, Row] = {}
    with open(log, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            row = merged.setdefault(int(line["epoch"]), {"kind": "epoch", "epoch": int(line["epoch"]) + 1})
            row |= {key: float(line[key]) for key in ("accuracy", "loss", "penalty", "upper_product") if line.get(key)}
    return [merged[epoch] for epoch in sorted(merged)]


def draw(rows: list[Row]) -> Figure:
    """Accuracy and the product of the certified norms over the epochs; certified accuracy against the radius."""
    page, (accuracy, product, certified) = figure(3, width=4.2, height=3.8)
    _draw_epochs(accuracy, rows, "accuracy", PERCENT, "test accuracy (%)")
    _draw_epochs(product, rows, "upper_product", 1.0, "product of the certified layer norms")
    product.set_yscale("log")
    for control, of_control in by(rows, "control").items():
        radii, shares = zip(*_radii(pick(of_control, kind="end")[0]), strict=True)
        certified.plot(radii, [PERCENT * share for share in shares], **_style(control))
    certified.set(xlabel="radius in pixels of [0, 1], l2", ylabel="certified accuracy (%)", ylim=(-2, None))
    page.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return page


def _draw_epochs(ax: Axes, rows: list[Row], field: str, scale: float, label: str) -> None:
    """A field of the log over the epochs, a line for each control."""
    for control, of_control in by(rows, "control").items():
        known = _logged(of_control, field)
        ax.plot(numbers(known, "epoch"), numbers(known, field, scale), **_style(control))
    ax.set(xlabel="epoch", ylabel=label)
    ax.locator_params(axis="x", integer=True)


def _style(control: str) -> dict[str, Any]:
    colour, marker, line = LOOKS[control]
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "label": CONTROLS[control]}


def _logged(rows: list[Row], field: str) -> list[Row]:
    """The epochs whose log has the field."""
    return [row for row in pick(rows, kind="epoch") if row.get(field, "") != ""]


def _radii(end: Row) -> list[tuple[float, float]]:
    """(radius, certified accuracy), the clean accuracy at 0 first."""
    known = [(float(key.split()[1]), float(value)) for key, value in end.items() if key.startswith("certified ")]
    return [(0.0, float(end["accuracy"])), *known]


def tell(rows: list[Row]) -> str:
    """Accuracy, certified accuracy and constant of each control."""
    lines: list[list[object]] = []
    ends = pick(rows, kind="end")
    for end in ends:
        shares = [f"{PERCENT * share:.1f}" for _, share in _radii(end)]
        logged = [f"{product:.4g}" for product in numbers(_logged(pick(rows, control=end["control"]), "upper_product"), "upper_product")]
        head = [CONTROLS[str(end["control"])], *shares, float(end["lower"]), float(end["upper"])]
        lines.append([*head, " -> ".join(dict.fromkeys((logged[0], logged[-1]))), float(end["seconds"])])
    first, penalised = ends[0], pick(ends, control="gram")[0]
    radii = [f"at {round(255 * radius)}/255" for radius, _ in _radii(first)[1:]]
    head = ("control", "test accuracy, %", *(f"certified {r}, %" for r in radii))
    head = (*head, "constant, lower", "constant, upper", "product of layer norms, first and last epoch", "seconds")
    facts = (
        f"Network {first['model']}, {first['epochs']} epochs of {first['samples']} training images in batches of {first['batch']}, "
        f"{first['optimiser']} from {first['lr']}, cosine; penalties of strength {penalised['strength']} above {first['threshold']}, "
        f"normalised to {first['target']}; {first['count']} test images."
    )
    settings_text = (
        "Certified accuracy is by pairs of classes, the constant that of the whole network for pixels; the product is over the layers' "
        "certified norms, for normalised weights. Seconds include the audit after every epoch."
    )
    return f"{facts}\n\n{markdown(head, lines)}\n\n{settings_text}"


TRAINING = Experiment("training", "Regularised training on CIFAR-10 (paper, section 5.4)", tasks, draw, tell, takes=("data", "preset"))
