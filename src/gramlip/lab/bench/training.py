"""The row on training: what a penalty of every convolution adds to a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gramlip.lab.bench.result import OURS, Claim, Entry, Options, Row, contest
from gramlip.lab.training.models import MODELS
from gramlip.nn import LipschitzPenalty
from gramlip.nn.model_walk import layers
from gramlip.nn.tracker import Tracker
from gramlip.norm.methods.differentiable import operator_gram_norm
from gramlip.norm.methods.paper import Lip_conv
from gramlip.operators.describe import describe
from gramlip.operators.linear_maps import Conv

EVERY = 50  # calls between two searches: the penalty's own default
STEPS = 6
STEP, CALL, SEARCH = "training step", f"{OURS}, tracked call", f"{OURS}, search and call"
PUBLISHED, BEST = f"Lip_conv ({STEPS}), every step differentiated", f"gram ({STEPS}), gradient at the arg-max block"


def training(options: Options) -> Row:
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
        for tracker in cast("list[Tracker]", list(penalty.trackers)):
            tracker.search()
        return penalty()

    works = {
        STEP: _backward(lambda: F.cross_entropy(net(x), y)),
        CALL: _backward(penalty),
        SEARCH: _backward(search),
        PUBLISHED: _in_turn([partial(_published, op) for op in convolutions]),
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
        Claim(row, "published Gram iteration over gramlip", found.of(case, PUBLISHED).median / ours.median, 5, True),
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
