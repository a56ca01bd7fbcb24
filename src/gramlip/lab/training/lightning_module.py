"""The Lightning modules: classification and denoising, with what keeps the constant down, and the audit during training."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from gramlip import distributed
from gramlip.lab.training.data import augmented, generator, normalised
from gramlip.lab.training.models import build
from gramlip.lab.training.recipes import Recipe
from gramlip.nn import LipschitzPenalty, Residual, spectral_norm_, spectral_rescaling_
from gramlip.nn.model_walk import layers
from gramlip.nn.penalty import FORMS
from gramlip.norm.methods.differentiable import operator_gram_norm
from gramlip.operators.describe import describe
from gramlip.operators.interval import Bound

EXAMPLE = (1, 3, 32, 32)


class Task(lightning.LightningModule):
    """A recipe's network, loss and optimiser. Randomness is a function of seed and step, so that a resumed run is the same run."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.recipe, self.seed = recipe, seed
        self.net = build(recipe.model, recipe.control)
        example = torch.zeros(EXAMPLE)
        if recipe.control == "normalised":
            spectral_norm_(self.net, example, target=recipe.target)
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
        """What is added to the loss: the tracked penalty, the published Gram bound of every layer, or the reshaped matrices' norms."""
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


def psnr(found: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for pixels in [0, 1], the mean over images."""
    return (-10 * (found.clamp(0, 1) - clean).square().mean((1, 2, 3)).log10()).mean()


class Audit(Callback):
    """Certified interval of every layer at the end of every epoch: `upper/PATH` in the logs, and `upper_product` over all of them."""

    def __init__(self, rtol: float = 1e-2) -> None:
        self.rtol = rtol

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Bound the layers, the work shared over the ranks."""
        sized: list[tuple[str, nn.Module, Any]] = pl_module.sized  # type: ignore[assignment]
        found = distributed.bounds([(module, size) for _, module, size in sized], rtol=self.rtol)
        for (path, *_), b in zip(sized, found, strict=True):
            pl_module.log(f"upper/{path}", float(b.upper), rank_zero_only=True)
        pl_module.log("upper_product", math.prod(float(b.upper) for b in found), rank_zero_only=True)


def chain(net: nn.Module) -> Bound:
    """Interval of a chain of residual blocks: the product of theirs."""
    total = Bound(1.0, 1.0, "identity")
    for block in net.children():
        if isinstance(block, Residual):
            total = block.bound(EXAMPLE[2:]) @ total
    return total
