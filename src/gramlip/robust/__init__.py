"""Certified robustness: from the margins of a classifier and its Lipschitz constant to l2 radii, in pixels of [0, 1].

Proofs: docs/training.md#certify, and docs/local.md#radii for radii around each input. Constants are proved in floating point;
logits are taken as the model computes them, or with what rounding may have done to them (`executed=`, docs/execution.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gramlip.errors import InputError, check_integers
from gramlip.network.audit import Domain, audit
from gramlip.network.execution import ExecutionError, execution_error
from gramlip.nn.parametrize import evaluating, in_eval_mode
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import Bound, decimals
from gramlip.reports.report import Report
from gramlip.robust.margins import LocalRadii, check_classes, constant, least_favourable, numbers, pair_constants, radii, tensor

__all__ = ["EPS", "Certified", "attacked_accuracy", "certified_accuracy", "certify", "radii"]


EPS = (36 / 255, 72 / 255, 108 / 255, 255 / 255)
"""The radii that the field reports, for pixels in [0, 1]."""


@dataclass(frozen=True)
class Certified:
    """Clean and certified accuracy of `count` samples, with every sample's radius (0 for wrong labels and ties)."""

    clean: float
    certified: dict[float, float]
    radii: Tensor
    because: str

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.radii)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        by_eps = [{"eps": eps, "accuracy": share} for eps, share in self.certified.items()]
        return {"schema": 1, "count": self.count, "clean": self.clean, "certified": by_eps, "because": self.because}

    def __str__(self) -> str:
        lines = [f"clean accuracy                {100 * self.clean:6.2f} %  ({self.count} samples)"]
        lines += [f"certified at eps = {round(255 * eps, 4):>7g}/255  {100 * share:6.2f} %" for eps, share in self.certified.items()]
        return "\n".join([*lines, self.because])


def certify(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    lipschitz: float | Bound | Report | None = None,
    eps: float | Sequence[float] = EPS,
    *,
    std: float | Sequence[float] = 1.0,
    last: nn.Linear | Tensor | None = None,
    local: bool | Literal["eps"] = False,
    executed: bool = False,
    domain: Domain | None = None,
) -> Certified:
    """Clean and certified accuracy: the share of samples that are right and stay right at every distance up to `eps`.

    Args:
        model: the classifier, run in eval mode on its parameters' device, on what the loader gives.
        loader: batches (inputs, labels); inputs normalised where `std` is not 1.
        lipschitz: as for `radii`; None audits the model for the shape of the first sample, which all must have.
        eps: radii in pixels of [0, 1].
        std: as for `radii`.
        last: as for `radii`, with the constant of what comes before it.
        local: True also looks for a larger radius around each sample, which takes some constants of the network for each of them;
            "eps" only as far as `eps` asks: for a sample the search ends at the first of them that is out of its reach.
        executed: take what rounding may do to the logits off the margins, so that the radii are those of the program that runs, for
            inputs in `domain`.
        domain: (low, high) of what the loader gives and of what it may be changed to, numbers or tensors that broadcast to a sample.

    Raises:
        InputError: no samples, or numbers that cannot be used.
        UnsupportedError: `executed` of a model with calls whose rounding no rule bounds.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> certify(model, [(torch.tensor([[1.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0]))], 1.0, eps=0.5).certified
    {0.5: 0.5}
    """
    wanted, box = _checked(eps, local), _box(executed, domain)
    if last is not None and lipschitz is None:
        msg = "last was given without a constant; expected that of what comes before it: type lipschitz=gramlip.audit(body, example)"
        raise InputError(msg)
    run, radii_so_far, right = None, list[Tensor](), 0
    for inputs, labels in batches(loader):
        run = run or Run(model, inputs, Everywhere(lipschitz, std, last), wanted, local, box)
        radii_of_batch, correct = run.radii(inputs, labels)
        radii_so_far.append(radii_of_batch)
        right += correct
    if run is None:
        msg = "the loader gave no batch; expected at least one (inputs, labels)"
        raise InputError(msg)
    every = torch.cat(radii_so_far)
    shares = {e: float((every > e).double().mean()) for e in wanted}
    return Certified(right / len(every), shares, every, run.because)


def _checked(eps: float | Sequence[float], local: object) -> list[float]:
    """The radii that are asked for."""
    wanted = numbers(eps)
    if not wanted or any(not 0 <= e < math.inf for e in wanted):
        msg = f"eps={eps!r} was given; expected radii of at least 0 in pixels of [0, 1], such as 36/255"
        raise InputError(msg)
    if not isinstance(local, bool) and local != "eps":
        msg = f"local={local!r} was given; expected True, False or 'eps', which looks no further than eps"
        raise InputError(msg)
    return wanted


def _box(executed: bool, domain: Domain | None) -> Domain | None:
    """The interval of the inputs, if rounding counts."""
    if executed and domain is None:
        msg = "executed=True was given without a domain; expected where inputs lie: type domain=(0.0, 1.0) for pixels"
        raise InputError(msg)
    if not executed and domain is not None:
        msg = f"domain={domain!r} was given without executed=True, and is read for rounding alone; expected both or neither"
        raise InputError(msg)
    return domain


@dataclass(frozen=True)
class Everywhere:
    """The constants of the network for all inputs, as `radii` takes them; `lipschitz=None` stands for an audit."""

    lipschitz: float | Bound | Report | None
    std: float | Sequence[float]
    last: nn.Linear | Tensor | None


class Run:
    """A classifier and what its margins are divided by, found once for all batches."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        known: Everywhere,
        eps: Sequence[float],
        local: bool | Literal["eps"],
        box: Domain | None,
    ) -> None:
        self._model, self._known, self._least_std = model, known, min(numbers(known.std), default=1.0)
        self._shape = tuple(inputs.shape[1:]) if known.lipschitz is None or local or box is not None else None
        self._upper = _audited(model, inputs) if known.lipschitz is None else known.lipschitz
        most = decimals(constant(self._upper, known.std), upward=True)
        self._error = None if box is None else _execution(model, inputs[:1], box)
        self._around = LocalRadii(model, inputs) if local else None
        self._apart = False  # whether samples were seen to go through the model apart
        self._goals = sorted(rd.up(e / self._least_std) * (1 + 2.0**-48) for e in eps) if local == "eps" else [math.inf]
        pairs = "the pairwise norms of the last layer's rows" if known.last is not None else "sqrt(2)"
        self.because = f"margin over {pairs} times the constant {most} for pixels{AROUND if local else ''}; {_rounding(self._error)}"

    def radii(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The radius of each sample in pixels, and how many of them are right."""
        if self._shape not in (None, shape := tuple(inputs.shape[1:])):
            msg = (
                f"samples of shapes {self._shape} and {shape} were given; expected one shape, for which the constant is: type lipschitz=..."
            )
            raise InputError(msg)
        logits, truth = tensor("logits", logits_of(self._model, inputs)), labels.to(_device(self._model))
        logits = logits.byte() if logits.dtype == torch.bool else logits
        check_classes(logits, truth)
        if not self._apart and len(inputs) > 1:
            _check_apart(self._model, inputs, logits)
            self._apart = True
        sure = least_favourable(logits, truth, self._error or 0.0)
        proved = radii(sure, truth, self._upper, std=self._known.std, last=self._known.last).cpu()
        right = (logits.argmax(1) == truth) & logits.isfinite().all(1)  # the argmax of NaN is no answer
        if self._around is not None:
            proved = self._widened(self._around, inputs.cpu(), sure.cpu(), truth.cpu(), proved)
        return proved, int(right.sum())

    def _widened(self, around: LocalRadii, inputs: Tensor, sure: Tensor, truth: Tensor, least: Tensor) -> Tensor:
        """The radii around each input where they are larger; a step of one pixel moves the input by 1/std."""
        pairs, std, made = pair_constants(self._upper, self._known.last, sure), self._least_std, least.tolist()
        for i, (radius, label) in enumerate(zip(made, truth.long().tolist(), strict=True)):
            proved = rd.down(radius / std) if 0 < radius < math.inf else radius
            larger = around.radius(inputs[i : i + 1], sure[i], label, pairs[label], proved, self._goals)
            made[i] = max(radius, rd.down(larger * std))
        return torch.tensor(made, dtype=torch.float64)


def _check_apart(model: nn.Module, inputs: Tensor, logits: Tensor) -> None:
    """Refuse a model whose logits for a sample depend on the others of its batch: a radius is of one that changes alone.

    Raises:
        InputError: such a model, by more than rounding makes of another size of the batch.
    """
    rounding = torch.finfo(logits.dtype).eps ** (1 / 3) if logits.is_floating_point() else 0.0  # 0.005 for float32
    for at, place in (0, "first"), (-1, "last"):  # the first one alone may not depend on others, as in a sum of all before
        sample, given = logits[at].double(), "alone"
        try:
            alone = tensor("logits", logits_of(model, inputs[at:] if at else inputs[:1])).double()
        except (RuntimeError, ValueError):  # a model for batches of one size, or statistics of one sample
            alone, given = tensor("logits", logits_of(model, inputs[at].expand_as(inputs))).double()[at], "among samples equal to it"
        off = _most_off(alone, sample)
        if off > rounding * float(sample.abs().nan_to_num(0.0, 0.0).max()):
            given = f"the logits of the {place} sample in a batch of {len(inputs)} differ by {off:.3g} from those of the sample {given}"
            msg = (
                f"{given}; expected a model that treats samples apart, as batch norm does by running statistics: type batches of one sample"
            )
            raise InputError(msg)


def _most_off(alone: Tensor, sample: Tensor) -> float:
    """The largest difference of the logits of a sample; infinite where they are not as many, or NaN on one side alone."""
    if alone.numel() != sample.numel() or not torch.equal(alone.isnan().flatten(), sample.isnan().flatten()):
        return math.inf
    return float((alone.flatten() - sample.flatten()).abs().nan_to_num(0.0).max())


AROUND = "; or over the constants of pairs of classes around each input, where that is more"


def _audited(model: nn.Module, inputs: Tensor) -> Report:
    with evaluating(model):
        return audit(model, inputs[:1].to(_device(model)))


def _rounding(error: ExecutionError | None) -> str:
    """The sentence about the allowance for rounding."""
    if error is None:
        return "logits as the model computes them"
    return f"less {decimals(4 * error.largest, upward=True)} for the rounding of both programs ({error.because})"


def _execution(model: nn.Module, sample: Tensor, domain: Domain) -> ExecutionError:
    """The effect of rounding on the logits of a sample of the domain."""
    with in_eval_mode(model):
        return execution_error(model, sample.to(_device(model)), domain=domain)


def certified_accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    eps: float = EPS[0],
    *,
    lipschitz: float | Bound | Report | None = None,
    **options: Any,
) -> float:
    """Certified accuracy at one radius; arguments as for `certify`. Never above the accuracy under any attack of that radius.

    >>> batch = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    >>> certified_accuracy(nn.Identity(), [batch], 0.5, lipschitz=1.0)
    1.0
    """
    if len(numbers(eps)) != 1:
        msg = f"eps={eps!r} was given; expected one radius such as 36/255: type certify(...).certified for several"
        raise InputError(msg)
    if options.get("local") is True:
        options["local"] = "eps"
    (share,) = certify(model, loader, lipschitz, eps, **options).certified.values()
    return share


def attacked_accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    eps: float = EPS[0],
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    steps: int = 50,
    restarts: int = 1,
) -> float:
    """Accuracy under an l2 attack of radius `eps`: the empirical side, never below the certified accuracy at that radius.

    Projected gradient descent of the foolbox library, on pixels in [0, 1].

    Args:
        model: the classifier, which takes `(pixels - mean) / std`.
        loader: batches (pixels, labels); **pixels in [0, 1]**, not normalised.
        eps: radius.
        mean: of the input normalisation, by channel; None is 0.
        std: likewise; None is 1.
        steps: of the attack.
        restarts: from random points; a sample counts as right only if all of them fail.

    Raises:
        InputError: foolbox is not installed, there are no samples, or nothing is tried.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> attacked_accuracy(model, [(torch.tensor([[0.9, 0.0]]), torch.tensor([0]))], 0.5)
    1.0
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that foolbox imports
            foolbox: Any = import_module("foolbox")
    except ImportError as error:
        msg = 'attacks need foolbox, which is not installed; expected the extra: type pip install "gramlip[attack]"'
        raise InputError(msg) from error
    check_integers(1, steps=steps, restarts=restarts)
    if len(numbers(eps)) != 1 or not 0 <= (radius := numbers(eps)[0]) < math.inf:
        msg = f"eps={eps!r} was given; expected one radius of at least 0 in pixels of [0, 1], such as 36/255"
        raise InputError(msg)
    preprocessing, right, count = _preprocessing(mean, std), 0, 0
    with in_eval_mode(model):
        target = foolbox.PyTorchModel(model, bounds=(0, 1), preprocessing=preprocessing, device=_device(model))
        attack = foolbox.attacks.L2ProjectedGradientDescentAttack(steps=steps)
        for pixels, labels in batches(loader):
            if not bool(((pixels >= 0) & (pixels <= 1)).all()):
                given = f"pixels from {float(pixels.min()):.4g} to {float(pixels.max()):.4g} were given"
                msg = f"{given}; expected pixels in [0, 1]: pass mean and std here in place of normalising in the loader"
                raise InputError(msg)
            truth = labels.to(_device(model))
            kept = torch.ones_like(truth, dtype=torch.bool)
            for _ in range(restarts):
                _, _, broken = attack(target, pixels.to(_device(model)), truth, epsilons=radius)
                kept &= ~broken
            right, count = right + int(kept.sum()), count + len(labels)
    if not count:
        msg = "the loader gave no batch; expected at least one (pixels, labels)"
        raise InputError(msg)
    return right / count


def _preprocessing(mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> dict[str, Any] | None:
    """The normalisation as foolbox takes it, from numbers, sequences, arrays or tensors; None where there is none."""
    if mean is None and std is None:
        return None
    shifts, scales = [0.0] if mean is None else numbers(mean), [1.0] if std is None else numbers(std)
    if not shifts or not all(map(math.isfinite, shifts)) or not scales or not all(0 < s < math.inf for s in scales):
        msg = f"mean={mean!r}, std={std!r} were given; expected the finite numbers that are subtracted and the positive ones divided by"
        raise InputError(msg)
    channels = max(len(shifts), len(scales))
    if {len(shifts), len(scales)} - {1, channels}:
        msg = f"mean has {len(shifts)} channels and std {len(scales)}; expected the same number of both"
        raise InputError(msg)
    wide = (values * channels if len(values) == 1 else values for values in (shifts, scales))
    return dict(zip(("mean", "std"), wide, strict=True), axis=-3)


def batches(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs that a loader gives, the labels as a tensor; refused where it gives something else."""
    for batch in loader:
        if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[0], Tensor):
            given = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
            msg = f"the loader gave a {given}; expected (inputs, labels), a tensor first: type ((b[0], b[1]) for b in loader)"
            raise InputError(msg)
        yield batch[0], tensor("labels", batch[1])


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's output in eval mode, without gradient; the modes are put back."""
    with evaluating(model):
        return model(inputs.to(_device(model)))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
