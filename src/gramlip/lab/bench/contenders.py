"""The rows of the benchmark: our bounds against their contenders, on convolutions, on matrices, and in a step of training."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gramlip.errors import UnsupportedError
from gramlip.lab.bench.result import OURS, Claim, Entry, Options, Row, contest, count, proofs, total
from gramlip.lab.reproduce.convolutions import convolutions
from gramlip.lab.training.recipes import MODELS
from gramlip.nn import LipschitzPenalty
from gramlip.nn.parametrize import layers
from gramlip.norm.certify import certify_all
from gramlip.norm.methods import METHODS, bound
from gramlip.norm.methods.formulas import Lip_conv, operator_gram_norm
from gramlip.operators.describe import describe
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.formats import read

# ---- convolutions --------------------------------------------------------------------------------------------------------
#
# Rows on convolutions: ResNet18 at 224, the residual networks of CIFAR, every input size, nearly orthogonal layers.

STEPS = 6  # of the published method, as in its experiments
PUBLISHED, PLAIN, POWER, ZEROS = f"delattre2023 ({STEPS})", f"rfft2 and bmm ({STEPS})", "power (100)", f"{OURS}, zero padding"
GRAM = f"gram ({STEPS})"
PROOFS = f"{OURS}, its blocks and factorisations alone"
MOST_STEPS = 64


def he(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random weights of He's variance, by the inputs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * math.sqrt(2 / math.prod(shape[1:]))


def plain(kernel: Tensor, n: int, steps: int) -> float:
    """Gram iteration on the n-grid, written down plainly: one FFT, batched products, nothing else."""
    x = torch.fft.rfft2(kernel, s=(n, n)).permute(2, 3, 0, 1).flatten(0, 1).contiguous()
    if x.shape[1] < x.shape[2]:
        x = x.mH.contiguous()
    log = torch.zeros(len(x), device=x.device)
    for _ in range(steps):
        size = torch.linalg.vector_norm(x, dim=(1, 2))
        x = x / size[:, None, None]
        log = 2 * (log + size.log())
        x = torch.bmm(x.mH, x)
    norms = torch.linalg.vector_norm(x, dim=(1, 2)) ** 2.0**-steps * (log * 2.0**-steps).exp()
    return float(norms.max())


def published(op: Conv, steps: int = STEPS) -> Callable[[], float]:
    """The published method on a layer."""
    return lambda: METHODS["delattre2023"].value(op, n_iter=steps)


def gram(op: Conv) -> float:
    """The library's own Gram iteration on a layer: rounding left out, as in the published one, and written to be fast."""
    return METHODS["gram"].value(op, n_iter=STEPS)


def svd(op: Conv) -> float:
    """The norm of a circular layer, by torch's SVD in double precision."""
    found = METHODS["senderovich2022"](op)
    return (found.lower + float(found.upper)) / 2


def resnet18(options: Options) -> Row:
    """All convolutions of ResNet18 at 224x224: circular padding, true strides, He weights; then with zero padding."""
    row = "resnet18-224"
    layers = convolutions(32)[:3] if options.quick else convolutions()
    found = Row()
    worst: dict[bool, float] = {True: 0.0, False: 0.0}
    for i, (name, shape, stride, n) in enumerate(layers):
        op = Conv(he(shape, i).to(options.device, options.dtype), n, stride, shape[-1] // 2, "circular")
        zeros = replace(op, padding_mode="zeros")
        works = {
            OURS: lambda op=op: bound(op),
            PUBLISHED: published(op),
            PLAIN: lambda op=op, n=n: plain(op.weight, n, STEPS),
            GRAM: lambda op=op: gram(op),
            POWER: lambda op=op: METHODS["power"].value(op, n_iter=100),
            ZEROS: lambda zeros=zeros: bound(zeros, finite=False),
        }
        truth = svd(op)
        case = f"{name.removesuffix('.weight')} {'x'.join(map(str, shape))} n={n} stride {stride}"
        truths = dict.fromkeys((OURS, PUBLISHED, PLAIN, GRAM, POWER), truth)
        found.entries += contest(row, case, works, options, truths=truths, counts={w: count(works[w]) for w in (OURS, ZEROS)})
        worst[n <= 7] = max(worst[n <= 7], found.of(case, ZEROS).width or 0.0)
    each = [e for e in found.entries if e.contender == PUBLISHED]
    found.entries += total(found.entries)
    ours, theirs, simple, power, zero = (found.of("total", who) for who in (OURS, PUBLISHED, PLAIN, POWER, ZEROS))
    found.claims = [
        Claim(row, "published method over gramlip, in total", theirs.median / ours.median, 10, True),
        Claim(row, "published method over gramlip, least of the layers", min(e.ratio or 0.0 for e in each), 4, True),
        Claim(row, "100 power steps over gramlip, in total", power.median / ours.median, 1, True),
        Claim(row, "published method over its plain version, in total", theirs.median / simple.median, 1, False),
        Claim(row, "largest width of an interval", ours.width or 0.0, 1e-2, False),
        Claim(row, "zero padding over circular, in total", zero.median / ours.median, 1.5, False),
        Claim(row, "largest width with zero padding, n > 7", worst[False], 1e-2, False),
        Claim(row, "largest width with zero padding, n = 7", worst[True], 4e-2, False),
    ]
    return found


def cifar(options: Options) -> Row:
    """The convolutions of two trained residual networks for CIFAR-10, for every input size, and for the published method's own."""
    row, found = "cifar-resnet", Row()
    for name in ("resnet20",) if options.quick else ("resnet20", "resnet32"):
        path = options.models / f"{name}-cifar10.safetensors"
        if not path.is_file():
            found.notes.append(f"{name} was left out: {path} does not exist; expected its weights: type --models DIR")
            continue
        entries = read(path).entries
        weights = [e.load().to(options.device, options.dtype) for e in entries.values() if len(e.shape) == 4]
        ops = [Conv(w) for w in (weights[:4] if options.quick else weights)]
        case, sharp = f"{name}, {len(ops)} convolutions", f"{OURS}, rtol 1e-4"
        works: dict[str, Callable[[], list[Bound] | float]] = {
            OURS: lambda ops=ops: certify_all(ops, rtol=1e-2),
            sharp: lambda ops=ops: certify_all(ops, rtol=1e-4),
        }
        works[PROOFS] = proofs(works[OURS])
        sizes = (8,) if options.quick else (32, 16, 8)
        for n in sizes:
            circular = [replace(op, input_size=n, padding=1, padding_mode="circular") for op in ops]
            calls = [published(op) for op in circular]
            works[f"{OURS}, n = {n}"] = lambda circular=circular: certify_all(circular, rtol=1e-2)
            works[f"{PUBLISHED}, n = {n}"] = lambda calls=calls: sum(call() for call in calls)
            works[f"{GRAM}, n = {n}"] = lambda circular=circular: sum(map(gram, circular))
        booked = (OURS, sharp, *(f"{OURS}, n = {n}" for n in sizes))
        found.entries += contest(row, case, works, options, counts={who: count(works[who]) for who in booked})
        # a sum of norms, or a count of calls, is no norm
        found.entries = [e if e.width is not None else replace(e, value=None) for e in found.entries]
        ours = found.of(case, OURS)
        for n in sizes:
            theirs = found.of(case, f"{PUBLISHED}, n = {n}").median
            what = f"{name}: published method at n = {n} over gramlip"
            found.claims.append(Claim(row, f"{what} for every size", theirs / ours.median, 5, True))
            found.claims.append(Claim(row, f"{what} at that size", theirs / found.of(case, f"{OURS}, n = {n}").median, 5, True))
        found.claims.append(Claim(row, f"{name}: rtol 1e-4 over 1e-2", found.of(case, sharp).median / ours.median, 3, False))
    return found


def any_size(options: Options) -> Row:
    """One layer for every input size, and at sizes that grow."""
    row, channels = "any-size", 8 if options.quick else 64
    op = Conv(he((channels, channels, 3, 3), 0).to(options.device, options.dtype), None, 1, 1, "circular")
    case = f"{channels}x{channels}x3x3"
    works: dict[str, Callable[[], Bound]] = {OURS: lambda: bound(replace(op, padding_mode="zeros"))}
    for n in (64, 256, 1024):
        works[f"{OURS}, n = {n}"] = lambda n=n: bound(replace(op, input_size=n))
    found = Row(contest(row, case, works, options, counts={who: count(work) for who, work in works.items()}))
    ratio = found.of(case, f"{OURS}, n = 1024").median / found.of(case, OURS).median
    found.claims = [
        Claim(row, "n = 1024 over every size", ratio, 1.5, False),
        Claim(row, "every size over n = 1024", 1 / ratio, 1.5, False),
    ]
    return found


def nearly_orthogonal(options: Options) -> dict[str, Conv]:
    """Circular layers whose singular values all lie within 1e-3 of 1."""
    channels, n = (8, 8) if options.quick else (64, 32)
    generator = torch.Generator().manual_seed(0)

    def turn(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]

    def noise(shape: torch.Size) -> Tensor:
        # the taps' norms add up to less than 1e-3
        raw = torch.randn(shape, generator=generator)
        return raw * (9e-4 / float(torch.linalg.matrix_norm(raw.permute(2, 3, 0, 1), 2).sum()))

    one = torch.zeros(channels, channels, 3, 3)
    one[:, :, 1, 1] = turn(channels)
    # half of the channels shifted along one axis, then half along the other, between rotations: four orthogonal factors
    basis, other, last = turn(channels), turn(channels), turn(channels)
    half = torch.arange(channels) < channels // 2
    block = torch.zeros(channels, channels, 3, 3)
    for i, rows in enumerate((half, ~half)):
        for j, columns in enumerate((half, ~half)):
            block[:, :, 1 + i, 1 + j] = last @ (rows[:, None] * other * columns) @ basis
    kernels = {"orthogonal 1x1 in 3x3, perturbed": one, "block-orthogonal 3x3, perturbed": block}
    return {name: Conv((k + noise(k.shape)).to(options.device, options.dtype), n, 1, 1, "circular") for name, k in kernels.items()}


def orthogonal(options: Options) -> Row:
    """Nearly orthogonal layers, where plain Gram iteration converges slowest."""
    row, found = "orthogonal", Row()
    ratios: list[float] = []
    for name, op in nearly_orthogonal(options).items():
        truth = svd(op)
        steps = next((s for s in range(1, MOST_STEPS) if published(op, s)() <= truth * 1.01), MOST_STEPS)
        case, theirs = f"{name}, {'x'.join(map(str, op.weight.shape))} n={op.sizes[0] if op.sizes else None}", f"delattre2023 ({steps})"
        works: dict[str, Callable[[], Bound | float]] = {OURS: lambda op=op: bound(op), theirs: published(op, steps)}
        found.entries += contest(row, case, works, options, truths=dict.fromkeys(works, truth), counts={OURS: count(works[OURS])})
        ratios.append(found.of(case, theirs).ratio or 0.0)
    found.claims = [Claim(row, "published method, as many steps as 1e-2 takes, over gramlip: least", min(ratios), 10, True)]
    return found


# ---- matrices ------------------------------------------------------------------------------------------------------------
#
# Rows on matrices: a square one against its own product and factorisation, a large one by the memory that it takes.

LARGE = (8192, 28672)  # a weight of a large language model's feed-forward layer
MEMORY = 6 << 30


def dense(options: Options) -> Row:
    """A square matrix, against one product of it and one Cholesky factorisation in float64."""
    row, side = "dense", 128 if options.quick else 4096
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(options.device, options.dtype)
    wide = weight.double()
    spd = wide @ wide.mT
    spd.diagonal().add_(spd.diagonal().sum() / side)
    product, factor = f"one product, {str(options.dtype).removeprefix('torch.')}", "one Cholesky, float64"
    works: dict[str, Callable[[], Bound | float]] = {
        OURS: lambda: bound(Dense(weight)),
        product: lambda: float((weight @ weight)[0, 0]),
        factor: lambda: float(torch.linalg.cholesky_ex(spd)[0][0, 0]),
    }
    case = f"{side}x{side}"
    truth = float(torch.linalg.eigvalsh(wide.mT @ wide)[-1].sqrt())
    found = Row(contest(row, case, works, options, truths={OURS: truth}, counts={OURS: count(works[OURS])}))
    allowed = 3 * found.of(case, product).median + found.of(case, factor).median
    found.claims = [Claim(row, "gramlip over three products and a factorisation", found.of(case, OURS).median / allowed, 1, False)]
    # products and the factorisation are no contenders: their value is no norm
    found.entries = [e if e.contender == OURS else _bare(e) for e in found.entries]
    if options.full:
        _large(found, options)
    else:
        found.notes.append(f"{LARGE[0]}x{LARGE[1]} was left out: type --full")
    return found


def _bare(e: Entry) -> Entry:
    return Entry(e.row, e.case, e.contender, e.minimum, e.median, e.ratio)


def _large(found: Row, options: Options) -> None:
    """In a process of its own, so that its memory is its own: once, without warm-up."""
    shape = (64, 256) if options.quick else LARGE
    options.say(f"dense: {shape[0]}x{shape[1]}")
    command = [sys.executable, "-m", "gramlip.lab.bench.contenders", *map(str, shape), str(options.device), str(torch.get_num_threads())]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        msg = f"{shape[0]}x{shape[1]} ended with exit code {run.returncode}; expected enough memory: leave --full out"
        raise UnsupportedError(msg)
    seconds, lower, upper, memory = map(float, run.stdout.split())
    case = f"{shape[0]}x{shape[1]}, once, in a process of its own"
    found.entries.append(Entry("dense", case, OURS, seconds, seconds, 1.0, upper, upper / lower - 1, memory=int(memory)))
    found.claims.append(Claim("dense", f"{shape[0]}x{shape[1]}: memory over {MEMORY >> 30} GiB", memory / MEMORY, 1, False))
    found.claims.append(Claim("dense", f"{shape[0]}x{shape[1]}: width of the interval", upper / lower - 1, 1e-2, False))


def alone(rows: int, columns: int, device: str, threads: int) -> str:
    """Seconds, lower side, upper side and peak memory in bytes of this process, which does nothing else."""
    torch.set_num_threads(threads)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / math.sqrt(columns)
    weight = weight.to(device)
    start = perf_counter()
    found = bound(Dense(weight))
    seconds = perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if weight.is_cuda:
        memory = torch.cuda.max_memory_allocated(weight.device)
    return f"{seconds!r} {found.lower!r} {float(found.upper)!r} {memory}"


if __name__ == "__main__":
    sys.stdout.write(alone(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))


# ---- training ------------------------------------------------------------------------------------------------------------
#
# The row on training: what a penalty of every convolution adds to a step.

EVERY = 50  # calls between two searches: the penalty's own default
STEP, CALL, SEARCH = "training step", f"{OURS}, tracked call", f"{OURS}, search and call"
PUBLISHED_PENALTY, BEST = f"Lip_conv ({STEPS}), every step differentiated", f"gram ({STEPS}), gradient at the arg-max block"


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
