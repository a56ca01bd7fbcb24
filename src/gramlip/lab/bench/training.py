"""The row on training: what a penalty of every convolution adds to a step, and what each way to hold norms costs a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gramlip.lab.bench.contenders import STEPS
from gramlip.lab.bench.result import OURS, Claim, Entry, Options, Row, contest
from gramlip.lab.training.recipes import MODELS
from gramlip.nn import Cap, LipschitzPenalty, Monitor, normalised, spectral_norm_, spectral_rescaling_
from gramlip.nn.monitor import Norms
from gramlip.nn.parametrizations import TrackedSpectralNorm
from gramlip.nn.parametrize import layers
from gramlip.norm.methods.formulas import Lip_conv, operator_gram_norm
from gramlip.operators.describe import describe
from gramlip.operators.linear_maps import Conv

# ---- the penalty ---------------------------------------------------------------------------------------------------------
#
# What a penalty of every convolution adds to a step, beside the published iteration.

EVERY = 50  # calls between two searches: the penalty's own default
STEP, CALL, SEARCH = "training step", f"{OURS}, tracked call", f"{OURS}, search and call"
PUBLISHED_PENALTY, BEST = f"Lip_conv ({STEPS}), every step differentiated", f"gram ({STEPS}), gradient at the arg-max block"


def _penalty(options: Options) -> Row:
    """Forward and backward of the penalty on a ResNet-18 for 32x32 images, against the published iteration's and a step's."""
    row, batch, name = "training", 4 if options.quick else 32, "small" if options.quick else "resnet18"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MODELS[name]().to(options.device)
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    x, y = x.to(options.device), y.to(options.device)
    example = torch.zeros(1, 3, 32, 32, device=options.device)
    sized = [(module, size) for _, module, size in layers(net, example, _convolution)]
    ops = [describe(module) if size is None else describe(module, size) for module, size in sized]
    convolutions = [op for op in ops if isinstance(op, Conv)]
    penalty = LipschitzPenalty(net, example, where=_convolution, every=10**9)
    penalty()  # the first call searches

    def search() -> Tensor:
        for tracker, weights in penalty.tracked():
            tracker.search(weights)
        return penalty()

    works = {
        STEP: _backward(lambda: F.cross_entropy(net(x), y)),
        CALL: _backward(penalty),
        SEARCH: _backward(search),
        PUBLISHED_PENALTY: _in_turn([partial(_published, op) for op in convolutions]),
        BEST: _in_turn([partial(operator_gram_norm, op, STEPS) for op in convolutions]),
    }
    case = f"{name}, batch {batch}, {len(convolutions)} convolutions"
    found = Row([replace(e, value=None) for e in contest(row, case, works, options)])
    call, full = found.of(case, CALL), found.of(case, SEARCH)

    def spread(once: float, searched: float) -> float:
        return once + max(searched - once, 0.0) / EVERY

    ours = Entry(row, case, OURS, spread(call.minimum, full.minimum), spread(call.median, full.median), 1.0)
    found.entries = [ours, *(replace(e, ratio=e.median / ours.median) for e in found.entries)]
    found.notes.append(f"{OURS}: a tracked call and its share of a search, one in {EVERY} calls. All times: forward and backward.")
    found.claims = [
        Claim(row, "published Gram iteration over gramlip", found.of(case, PUBLISHED_PENALTY).median / ours.median, 5, True),
        Claim(row, "Gram iteration with the arg-max gradient over gramlip", found.of(case, BEST).median / ours.median, 5, True),
    ]
    return found


def _convolution(_: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _published(op: Conv) -> Tensor:
    assert op.sizes is not None
    return Lip_conv(op.weight, STEPS, n=op.sizes)


def _in_turn(works: list[Callable[[], Tensor]]) -> Callable[[], float]:
    """Layer by layer, so that only one graph is alive: differentiated step by step, all of them together take many GiB."""
    each = [_backward(work) for work in works]
    return lambda: sum(both() for both in each)


def _backward(work: Callable[[], Tensor]) -> Callable[[], float]:
    """Forward and backward; gradients add up in the weights, as in a step of several losses."""

    def both() -> float:
        value = work()
        value.backward()
        return value.item()

    return both


# ---- steps ---------------------------------------------------------------------------------------------------------------
#
# Whole steps: forward, backward, update and what comes after it, with each way to hold norms, against the plain step.

PLAIN, TORCHS, EXACT, RESCALED = "plain step", "torch's spectral_norm", f"{OURS}, exact=True", "spectral_rescaling_"
PENALISED, CAPPED, MONITORED, READING = "LipschitzPenalty", "Cap", "Monitor at every step", "Monitor, a reading that searches, alone"
SEARCHED = f"{OURS}, a search of all layers, alone"
BETWEEN = 100  # calls between two searches of a normalised layer: its own default
READ = 50  # steps between two readings of `LightningMonitor` and `TrainerMonitor`: their own default


def discriminator(width: int = 64) -> nn.Sequential:
    """The discriminator of SNGAN for images of 32x32, seven layers."""
    parts, channels = list[nn.Module](), 3
    for out, kernel, stride in ((1, 3, 1), (1, 4, 2), (2, 3, 1), (2, 4, 2), (4, 3, 1), (4, 4, 2)):
        parts += [nn.Conv2d(channels, out * width, kernel, stride, 1), nn.LeakyReLU(0.1)]
        channels = out * width
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * 16, 1))


def training(options: Options) -> Row:
    """The penalty beside the published iteration, then whole steps on three networks."""
    found, quick = _penalty(options), options.quick
    batch, rows, side = (4, 4, 64) if quick else (64, 128, 4096)
    small = MODELS["small"] if quick else MODELS["resnet18"]
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], set[str]]] = [
        (f"SNGAN discriminator, batch {batch}", partial(discriminator, 4 if quick else 64), (batch, 3, 32, 32), set()),
        (f"ResNet-18, batch {rows}", small, (rows, 3, 32, 32), {EXACT, RESCALED}),
        (f"linear {side}x{side}, batch 8", partial(nn.Linear, side, side), (8, side), {EXACT, RESCALED}),
    ]
    for case, build, shape, dear in cases:
        part = _steps(case, build, shape, set() if options.full or quick else dear, options)
        found.entries += part.entries
        found.notes += part.notes
        found.claims += part.claims
    return found


def _steps(case: str, build: Callable[[], nn.Module], shape: tuple[int, ...], without: set[str], options: Options) -> Row:
    made: dict[str, nn.Module] = {}
    works: dict[str, Callable[[], float]] = {}
    with torch.random.fork_rng(devices=[]):
        for name in (PLAIN, TORCHS, OURS, EXACT, RESCALED, PENALISED, CAPPED, MONITORED):
            if name not in without:
                torch.manual_seed(0)
                works[name], made[name] = _step(name, build().to(options.device), torch.randn(shape).to(options.device))
    tracked = [(layer, own.tracker) for _, layer, _, own in normalised(made[OURS]) if isinstance(own, TrackedSpectralNorm)]

    def search() -> float:
        for layer, tracker in tracked:
            tracker.search([cast("Any", layer).parametrizations.weight.original.detach()])
        return float(len(tracked))

    reading = Monitor(made[PLAIN], every=1)
    entries = contest("training", case, {**works, SEARCHED: search, READING: lambda: float(len(reading()))}, options)
    return _ratios(case, without, [replace(e, value=None) for e in entries])


def _step(name: str, model: nn.Module, x: Tensor) -> tuple[Callable[[], float], nn.Module]:
    """A step of Adam, and the model that it trains. No call of it searches: the searches' share is added afterwards."""
    example = None if isinstance(model, nn.Linear) else tuple(x.shape[1:])
    held: dict[str, Callable[[], object]] = {
        TORCHS: lambda: [parametrizations.spectral_norm(layer) for _, layer, _ in layers(model, example, None)],
        OURS: lambda: spectral_norm_(model, example, every=10**9),
        EXACT: lambda: spectral_norm_(model, example, exact=True),
        RESCALED: lambda: spectral_rescaling_(model, example),
    }
    if name in held:
        held[name]()
    for *_, own in normalised(model):
        if isinstance(own, TrackedSpectralNorm):  # as after many steps: the first ones search more often
            own.load_state_dict(own.state_dict() | {"calls": torch.tensor(1 << 20)})
    watching: dict[str, Callable[[], Norms]] = {
        PENALISED: lambda: LipschitzPenalty(model, example, every=10**9),
        CAPPED: lambda: Cap(model, _highest(model, example), example, every=10**9),
        MONITORED: lambda: Monitor(model, example, every=10**9),
    }
    norms: Any = watching[name]() if name in watching else lambda: None
    norms()  # the first call searches
    optimiser = torch.optim.Adam(model.parameters(), 1e-5)

    def step() -> float:
        optimiser.zero_grad()
        loss = F.softplus(-model(x)).mean() + (norms() if name == PENALISED else 0.0)
        loss.backward()
        optimiser.step()
        if name != PENALISED:
            norms()
        return loss.item()

    return step, model


def _highest(model: nn.Module, example: Any) -> float:
    """A target that no norm exceeds, and that some are near to: those far below it are read less often."""
    return 1.1 * max(numbers["sigma"] for numbers in Monitor(model, example)().values())


def _ratios(case: str, without: set[str], entries: list[Entry]) -> Row:
    """The searches' shares added, the ratios to the plain step as a note, and what is claimed of them."""
    alone = {e.contender: e for e in entries}
    search, shares = alone[SEARCHED], {OURS: BETWEEN, PENALISED: EVERY, CAPPED: EVERY, MONITORED: EVERY}

    def whole(e: Entry) -> Entry:
        if (between := shares.get(e.contender)) is None:
            return e
        return replace(e, minimum=e.minimum + search.minimum / between, median=e.median + search.median / between)

    found = [whole(e) for e in entries]
    median = {e.contender: e.median for e in found}
    plain, read = median[PLAIN], 1.0 + median[READING] / median[PLAIN] / READ
    times = {name: value / plain for name, value in median.items() if name not in {PLAIN, SEARCHED, READING}}
    text = "; ".join(f"{name} {ratio:.3g}" for name, ratio in times.items())
    notes = [f"{case}: times the plain step: {text}; Monitor, a reading that searches every {READ} steps {read:.4g}."]
    if without:
        notes.append(f"{case}: {', '.join(sorted(without))} left out: type --full")
    linear = case.startswith("linear")
    limits = {} if linear else {OURS: 1.15, CAPPED: 1.02} | ({RESCALED: 2.0} if case.startswith("SNGAN") else {})
    claims = [Claim("training", f"{case}: {name} over the plain step", times[name], limit, False) for name, limit in limits.items()]
    claims.append(Claim("training", f"{case}: {OURS} over torch's", times[OURS] / times[TORCHS], 2.0 if linear else 1.1, False))
    if not linear:
        claims.append(Claim("training", f"{case}: Monitor read every {READ} steps, over the plain step", read, 1.02, False))
    return Row([replace(e, ratio=e.median / median[OURS]) for e in found], claims, notes)
