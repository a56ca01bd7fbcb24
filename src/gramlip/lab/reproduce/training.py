"""Section 5.4: training with nothing, with the Gram penalty, with the tracked one and with spectral normalisation, on CIFAR-10.

Runs the recipes of `gramlip.lab.train`; a run that stops goes on from its last epoch, in the folder `runs` beside the table.
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
from gramlip.lab.reproduce.run import Experiment, Options, Row, Task, markdown, pick
from gramlip.reports.pictures import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROLS = {
    "plain": "plain",
    "gram": "Gram penalty (the paper's)",
    "penalised": "tracked penalty",
    "normalised": "spectral normalisation",
}
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
    """What is run: `quick`, the preset asked for, or by the device the paper's or the small one."""
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
    taken = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device.type != taken:
        msg = f"--device {options.device} was given; expected {taken}, which the trainer takes on this machine: type --device {taken}"
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
            found = _trainer()(recipe, data, folder, seed=options.seed, **changes)
        except SystemExit as stopped:  # how the trainer passes an interruption on
            raise KeyboardInterrupt from stopped
    if "constant" not in found:
        msg = f"{folder} stopped after {found['finished_epochs']} of {found['epochs']} epochs; expected all: type the same again to go on"
        raise InputError(msg)
    fields = ("epochs", "samples", "batch", "optimiser", "lr", "strength", "threshold", "target", "seconds", "count")
    last: Row = {field: found[field] if found[field] is not None else "all" for field in fields}
    last |= {"accuracy": found["clean"], "lower": found["constant"]["lower"], "upper": found["constant"]["upper"]}
    last |= {f"certified {e['eps']:.4f}": e["accuracy"] for e in found.get("certified_by_pairs", found["certified"])}
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
    """What was logged after each epoch: the trainer writes validation and training in lines of their own."""
    merged: dict[int, Row] = {}
    with open(log, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            row = merged.setdefault(int(line["epoch"]), {"kind": "epoch", "epoch": int(line["epoch"]) + 1})
            row |= {key: float(line[key]) for key in ("accuracy", "loss", "penalty", "upper_product") if line.get(key)}
    return [merged[epoch] for epoch in sorted(merged)]


def draw(rows: list[Row]) -> Figure:
    """Accuracy and the product of the certified norms over the epochs; certified accuracy against the radius."""
    made, (accuracy, product, certified) = figure(3, width=4.2, height=3.8)
    for control in dict.fromkeys(str(row["control"]) for row in rows):
        colour, marker, line = LOOKS[control]
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "label": CONTROLS[control]}
        some = pick(rows, control=control, kind="epoch")
        for ax, field, scale in ((accuracy, "accuracy", PERCENT), (product, "upper_product", 1.0)):
            known = [r for r in some if r.get(field, "") != ""]
            ax.plot([float(r["epoch"]) for r in known], [scale * float(r[field]) for r in known], **style)
        radii = _radii(pick(rows, control=control, kind="end")[0])
        certified.plot([r for r, _ in radii], [PERCENT * share for _, share in radii], **style)
    for ax, title in ((accuracy, "test accuracy (%)"), (product, "product of the certified layer norms")):
        ax.set(xlabel="epoch", ylabel=title)
        ax.locator_params(axis="x", integer=True)
    product.set_yscale("log")
    certified.set(xlabel="radius in pixels of [0, 1], l2", ylabel="certified accuracy (%)", ylim=(-2, None))
    made.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return made


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
        known = [r for r in pick(rows, control=end["control"], kind="epoch") if r.get("upper_product", "") != ""]
        logged = [f"{float(r['upper_product']):.4g}" for r in known]
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
