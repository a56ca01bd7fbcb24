"""`train`: a recipe from its name to certified results in one folder; an interrupted run is resumed."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gramlip import distributed, robust
from gramlip.errors import InputError, Terminated, first_line
from gramlip.lab import recipes
from gramlip.lab.recipes import Recipe, augmented, build, generator, normalised, recipe
from gramlip.network.audit import audit
from gramlip.nn import LipschitzPenalty, Residual, remove, spectral_norm_, spectral_rescaling_
from gramlip.nn import normalised as parametrized
from gramlip.nn.parametrize import layers
from gramlip.nn.regularise import FORMS
from gramlip.norm.formulas import operator_gram_norm
from gramlip.operators.describe import describe
from gramlip.operators.interval import Bound
from gramlip.reports.output import write_bytes_whole, write_whole

# ---- Lightning modules ---------------------------------------------------------------------------------------------------

EXAMPLE = (1, 3, 32, 32)


class Task(lightning.LightningModule):
    """A recipe's network, loss and optimiser. Randomness is a function of seed and step, so that a resumed run is the same run."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.recipe, self.seed = recipe, seed
        self.net = build(recipe.model, recipe.control)
        example = torch.zeros(EXAMPLE)
        if recipe.control == "normalised":
            spectral_norm_(self.net, example, target=recipe.target, exact=True)
        if recipe.control == "rescaled" and recipe.task == "classify":
            spectral_rescaling_(self.net, example, target=recipe.target)
        self.penalty = LipschitzPenalty(self.net, example, recipe.threshold) if recipe.control == "penalised" else None
        self.sized = layers(self.net, example, None)

    def forward(self, x: Tensor) -> Tensor:
        """The network's output for normalised input."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """The loss and its parts."""
        images, labels = batch
        source = generator(self.seed, self.global_step)
        if self.recipe.augment:
            images = augmented(images, source)
        x = normalised(images, self.recipe.mean, self.recipe.std)
        if self.recipe.task == "denoise":
            noise = torch.randn(x.shape, generator=source).to(x) * self.recipe.noise
            loss = F.mse_loss(self(x + noise), x)
        else:
            loss = F.cross_entropy(self.recipe.scale * self(x), labels)
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        extra = self._extra()
        if extra is None:
            return loss
        self.log("penalty", extra, prog_bar=True, on_step=False, on_epoch=True)
        return loss + self.recipe.strength * extra

    def _extra(self) -> Tensor | None:
        """The term added to the loss: the tracked penalty, the published Gram bound of every layer, or the norms of reshaped matrices."""
        if self.penalty is not None:
            return self.penalty()
        if self.recipe.control == "gram":
            return self._cost([operator_gram_norm(describe(m, size)) for _, m, size in self.sized])  # type: ignore[arg-type]
        if self.recipe.control == "reshaped":
            return self._cost([torch.linalg.matrix_norm(m.weight.flatten(1), 2) for _, m, _ in self.sized])  # type: ignore[operator,union-attr]
        return None

    def _cost(self, norms: list[Tensor]) -> Tensor:
        return FORMS["paper"](torch.stack(norms), self.recipe.threshold).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Accuracy, or PSNR in dB with the same noise every time."""
        images, labels = batch
        x = normalised(images, self.recipe.mean, self.recipe.std)
        if self.recipe.task == "denoise":
            noise = torch.randn(x.shape, generator=generator(1, index)).to(x) * self.recipe.noise
            self.log("psnr", psnr(self(x + noise), x), prog_bar=True)
        else:
            self.log("accuracy", (self(x).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """SGD with momentum, or Adam, with a cosine over all steps."""
        r, parameters = self.recipe, self.net.parameters()
        if r.optimiser == "adam":
            optimiser: torch.optim.Optimizer = torch.optim.Adam(parameters, r.lr, weight_decay=r.weight_decay)
        else:
            optimiser = torch.optim.SGD(parameters, r.lr, r.momentum, weight_decay=r.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def psnr(denoised: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for pixels in [0, 1], the mean over images."""
    return (-10 * (denoised.clamp(0, 1) - clean).square().mean((1, 2, 3)).log10()).mean()


class Audit(Callback):
    """Certified interval of every layer at the end of every epoch: `upper/PATH` in the logs, and `upper_product` over all of them."""

    def __init__(self, rtol: float = 1e-2) -> None:
        self.rtol = rtol

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Bound the layers, the work shared over the ranks."""
        sized: list[tuple[str, nn.Module, Any]] = pl_module.sized  # type: ignore[assignment]
        bounds = distributed.bounds([(module, size) for _, module, size in sized], rtol=self.rtol)
        for (path, *_), b in zip(sized, bounds, strict=True):
            pl_module.log(f"upper/{path}", float(b.upper), rank_zero_only=True)
        pl_module.log("upper_product", math.prod(float(b.upper) for b in bounds), rank_zero_only=True)


def chain(net: nn.Module) -> Bound:
    """Interval of a chain of residual blocks: the product of their intervals."""
    total = Bound(1.0, 1.0, "identity")
    for block in net.children():
        if isinstance(block, Residual):
            total = block.bound(EXAMPLE[2:]) @ total
    return total


# ---- runs ----------------------------------------------------------------------------------------------------------------

WRITTEN = ("last.ckpt", "logs", "weights.safetensors", "results.json")
"""The files that a run writes after `recipe.json`."""


def train(
    name: str,
    source: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    stop_after: int | None = None,
    audit_every_epoch: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Train a recipe, or resume it from a checkpoint in `out`, and return its results, the content of `results.json`.

    A finished run is not changed.

    `out` gets `last.ckpt` (written whole, after every epoch), `logs/metrics.csv`, `weights.safetensors` (baked: plain and certified)
    and `results.json`.

    Args:
        name: a name in `gramlip.lab.recipes.RECIPES`.
        source: folder of CIFAR-10's parquet files, or "uoft-cs/cifar10".
        out: folder of the run.
        seed: seed of all random numbers.
        stop_after: number of epochs after which to stop, to resume later; the schedule remains that of the whole run.
        audit_every_epoch: certify every layer after every epoch.
        **changes: fields of the recipe to change, such as `epochs=1`.

    Raises:
        InputError: unknown recipe or field, less than a batch of images, or a folder that holds another run or a damaged one.
        Terminated: SIGTERM was received; the epoch is finished and saved, and the same call resumes after it.
    """
    plan, folder = recipe(name), Path(out)
    unknown = set(changes) - set(plan.to_dict())
    if unknown:
        msg = f"{sorted(unknown)} were given; expected fields of a recipe: {sorted(plan.to_dict())}"
        raise InputError(msg)
    plan = replace(plan, **changes)
    header = {"recipe": name, "seed": seed, **plan.to_dict()}
    _check(folder, header)
    if all((folder / file).exists() for file in ("results.json", "weights.safetensors")):
        return _read(folder / "results.json")  # a finished run is not changed
    sets = [recipes.load(source, split, n) for split, n in (("train", plan.samples), ("test", plan.test_samples))]
    if (count := len(sets[0][1])) < plan.batch:
        msg = f"{count} training images were given with batch={plan.batch}; expected a whole batch: type --set batch={count}"
        raise InputError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "recipe.json", header)
    with _global_state_kept():
        return _run(plan, header, sets, folder, [_Stop(stop_after), *([Audit()] if audit_every_epoch else [])])


@contextmanager
def _global_state_kept() -> Generator[None, None, None]:
    """Restore the global state that a deterministic trainer changes, generators and environment included."""
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    state, numbers, words = random.getstate(), np.random.get_state(), dict(os.environ)  # noqa: NPY002 (what Lightning seeds)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        random.setstate(state)
        np.random.set_state(numbers)  # noqa: NPY002
        for key in set(os.environ) - set(words):
            del os.environ[key]
        os.environ.update(words)


@contextmanager
def _signals() -> Generator[None, None, None]:
    """Turn the exits 0 and 1 that Lightning makes of SIGTERM and Ctrl-C back into the original signals.

    Raises:
        Terminated: SIGTERM was received; the epoch is finished and saved.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    try:
        yield
    except SIGTERMException as error:
        raise Terminated from error
    except SystemExit as error:
        raise error.__context__ or error from None


def _run(
    plan: Recipe, header: dict[str, Any], sets: Sequence[tuple[Tensor, Tensor]], folder: Path, callbacks: list[Callback]
) -> dict[str, Any]:
    lightning.seed_everything(header["seed"], workers=True, verbose=False)
    task, last, clock = Task(plan, header["seed"]), folder / "last.ckpt", _Clock()
    trainer = _trainer(plan, folder, [clock, *callbacks])
    order = recipes.Order(len(sets[0][1]), header["seed"])
    begin = time.perf_counter()
    with _signals():
        loaders = _loader(sets[0], plan, order), _loader(sets[1], plan, None)
        trainer.fit(task, *loaders, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    done = {**header, "finished_epochs": trainer.current_epoch, "seconds": time.perf_counter() - begin}
    done["step_cpu_seconds"] = statistics.median(clock.steps) if clock.steps else None
    if trainer.current_epoch < plan.epochs:
        return done
    results = {**done, **evaluate(task, sets[1])}
    write_bytes_whole(folder / "weights.safetensors", save({k: v.contiguous() for k, v in task.net.state_dict().items()}))
    _write(folder / "results.json", results)
    return results


def _trainer(plan: Recipe, folder: Path, callbacks: list[Callback]) -> lightning.Trainer:
    # The newest under one name. Keeping "the last beside the best 0" would write it when training ends, and not before.
    checkpoint = ModelCheckpoint(folder, "last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False)
    return lightning.Trainer(
        max_epochs=plan.epochs,
        callbacks=[checkpoint, *callbacks],
        logger=_logger(folder, folder / "last.ckpt"),
        deterministic=True,
        gradient_clip_val=plan.clip,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def _logger(folder: Path, last: Path) -> CSVLogger:
    """The CSV logs; a resumed run keeps its rows up to the checkpoint, where Lightning would start an empty file."""
    file, rows = folder / "logs" / "metrics.csv", list[dict[str, str]]()
    if file.exists() and last.exists():
        done = _steps(last)
        with file.open(newline="") as text:
            rows = [row for row in csv.DictReader(text) if int(row["step"]) < done]
    logger = CSVLogger(folder, name="logs", version="")
    for row in rows:
        logger.log_metrics(cast("Any", {k: v for k, v in row.items() if v and k != "step"}), int(row["step"]))
    logger.save()
    return logger


def _steps(last: Path) -> int:
    """The number of steps that a checkpoint has completed."""
    try:
        return int(torch.load(last, weights_only=True, map_location="cpu")["global_step"])
    except Exception as error:  # a damaged file raises many kinds of errors
        msg = f"{last} is damaged ({first_line(error)}); expected what gramlip train wrote: type rm {last} to start the run again"
        raise InputError(msg) from error


class _Clock(lightning.Callback):
    """CPU seconds of every step (forward, backward and update), a measure that does not depend on other load."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._begin = 0.0

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin = time.process_time()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(time.process_time() - self._begin)


class _Stop(lightning.Callback):
    """Stop after some epochs, as an interruption would."""

    def __init__(self, after: int | None) -> None:
        self.after = after

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.after is not None and trainer.current_epoch + 1 >= self.after:
            trainer.should_stop = True


def _check(folder: Path, plan: dict[str, Any]) -> None:
    """Tie the folder to one run: its plan is written at the start, and compared at every later start."""
    file = folder / "recipe.json"
    if file.exists() and (written := _read(file)) != json.loads(json.dumps(plan)):
        changed = sorted(k for k in plan if written.get(k) != plan[k])
        msg = f"{folder} holds a run that differs in {changed}; expected another folder, or the same options to go on with it"
        raise InputError(msg)
    if not file.exists() and (written := [folder / name for name in WRITTEN if (folder / name).exists()]):
        msg = f"{written[0]} stands there without its recipe.json; expected both or neither: type --out with a new folder"
        raise InputError(msg)
    if (last := folder / "last.ckpt").exists():
        _steps(last)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        msg = f"{file} is damaged; expected what gramlip train wrote: type --out NEW"
        raise InputError(msg)
    return cast("dict[str, Any]", content)


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=1) + "\n")


def _loader(split: tuple[Tensor, Tensor], plan: Recipe, order: recipes.Order | None) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*split), plan.batch if order is not None else 500, sampler=order, drop_last=order is not None)


def evaluate(task: Task, test_set: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Bake the network in place, then certify its constant and compute accuracies or PSNR."""
    plan, net = task.recipe, task.net.cpu().eval()
    if next(iter(parametrized(net)), None) is not None:
        remove(net)
    batches = [(recipes.normalised(x, plan.mean, plan.std), y) for x, y in zip(*(t.split(500) for t in test_set), strict=True)]
    if plan.task == "denoise":
        return _denoised(plan, net, batches)
    report = audit(net, EXAMPLE[1:])
    certified = robust.certify(net, batches, report, std=plan.std)
    results = {"constant": {"lower": report.lower, "upper": report.upper}, **certified.to_dict()}
    if isinstance(net, nn.Sequential) and isinstance(last := net[-1], nn.Linear):
        features = audit(net[:-1], EXAMPLE[1:])
        pairs = robust.certify(net, batches, features, std=plan.std, last=last)
        results["certified_by_pairs"] = pairs.to_dict()["certified"]
    return results


def _denoised(plan: Recipe, net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    before, after = [], []
    for i, (x, _) in enumerate(batches):
        noisy = x + torch.randn(x.shape, generator=recipes.generator(1, i)) * plan.noise
        with torch.no_grad():
            before.append(float(psnr(noisy, x)))
            after.append(float(psnr(net(noisy), x)))
    rescaled = plan.control == "rescaled"
    report = audit(net, EXAMPLE[1:], effort=-1.0 if rescaled else 1.0)
    constant = {"lower": report.lower, "upper": float(chain(net).upper) if rescaled else report.upper}
    return {
        "constant": constant,
        "psnr_noisy": sum(before) / len(before),
        "psnr": sum(after) / len(after),
        "count": sum(len(x) for x, _ in batches),
    }
