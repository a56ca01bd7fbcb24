"""The small runs of docs/training.md: trains each recipe with `gramlip.lab.train`, keeps the logs, and writes the table into the page.

    OMP_NUM_THREADS=1 python experiments/training.py            # every recipe that has no results yet
    python experiments/training.py --table                      # the table alone, from the results

Results and logs: experiments/results/training/RECIPE.json and RECIPE.csv; work in progress: runs/training/RECIPE.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import statistics
import warnings
from pathlib import Path

import torch

import gramlip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "training"
PAGE = ROOT / "docs" / "training.md"
NAMES = {
    "small": "plain",
    "small-penalised": "penalised, tracked (`LipschitzPenalty`)",
    "small-gram": "penalised, the published Gram bound at every step",
    "small-gram-equal": "penalised, the published Gram bound, for the time of the tracked one",
    "small-reshaped": "penalised, norm of the reshaped kernel",
    "small-normalised": "normalised (`spectral_norm_`)",
    "small-rescaled": "rescaled (`spectral_rescaling_`)",
}
DENOISERS = {"denoiser": "unconstrained (`x - f(x)`)", "denoiser-rescaled": "1-Lipschitz (`Residual`)"}


def stem(name: str, seed: int) -> str:
    return f"{name}-seed{seed}" if seed else name


def train(name: str, data: str, seed: int) -> None:
    """One run."""
    from gramlip.lab.train import train

    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    folder = ROOT / "runs" / "training" / stem(name, seed)
    results = train(name, data, folder, seed=seed)
    results |= {
        "gramlip": gramlip.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{stem(name, seed)}.json").write_text(json.dumps(results, indent=1) + "\n")
    shutil.copy(folder / "logs" / "metrics.csv", RESULTS / f"{stem(name, seed)}.csv")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table() -> str:
    """Both tables in Markdown, from the files alone."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    lines = ["| control | clean, % | at 36/255, % | at 72/255 | at 108/255 | at 255/255 | constant, lower | upper | CPU ms a step |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, title in NAMES.items():
        if name in found:
            r = found[name]
            shares = [percent(entry["accuracy"]) for entry in r["certified_by_pairs"]]
            lines.append(
                f"| {title} | {percent(r['clean'])} | {' | '.join(shares)} | {r['constant']['lower']:.3g} | {r['constant']['upper']:.3g} "
                f"| {1e3 * r['step_cpu_seconds']:.0f} |"
            )
    lines += [
        "",
        "| denoiser | PSNR of the noisy images, dB | PSNR after, dB | constant, lower | constant, upper |",
        "|---|---|---|---|---|",
    ]
    for name, title in DENOISERS.items():
        if name in found:
            r = found[name]
            constant = f"{r['constant']['lower']:.4g} | {r['constant']['upper']:.4g}"
            lines.append(f"| {title} | {r['psnr_noisy']:.2f} | {r['psnr']:.2f} | {constant} |")
    plans = [r for name, r in found.items() if name in NAMES]
    epochs = " or ".join(str(v) for v in sorted({r["epochs"] for r in plans}))
    counts = " or ".join(str(v) for v in sorted({r["count"] for r in plans}))
    seconds = statistics.median(r["seconds"] for r in plans) if plans else 0.0
    lines += [
        "",
        f"Classifiers: {epochs} epochs of all of CIFAR-10's training images, {counts} test images, seed 0; {len(plans)} runs on one thread "
        f"of a shared machine, of {seconds:.0f} s in the median.",
    ]
    for name, r in found.items():
        if r["seed"]:
            lines.append(
                f"Seed {r['seed']}, {NAMES[name.partition('-seed')[0]]}: {percent(r['clean'])} clean, "
                f"{percent(r['certified_by_pairs'][0]['accuracy'])} at 36/255, constant {r['constant']['upper']:.3g}."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*NAMES, *DENOISERS], metavar="RECIPE")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "cifar10"))
    parser.add_argument("--seed", type=int, default=0, help="results of seeds other than 0 are kept as RECIPE-seedN")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for name in [] if args.table else args.names:
        if not (RESULTS / f"{stem(name, args.seed)}.json").exists():
            train(name, args.data, args.seed)
    before, _, rest = PAGE.read_text().partition("<!-- results -->\n")
    after = rest.partition("<!-- end of results -->")[2]
    PAGE.write_text(f"{before}<!-- results -->\n{table()}\n<!-- end of results -->{after}")


if __name__ == "__main__":
    main()
