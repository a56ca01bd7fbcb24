"""The rows of the benchmark: bounds and their contenders on convolutions, on matrices, on networks and in a training step."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gramlip.demo import demo
from gramlip.errors import UnsupportedError
from gramlip.lab.bench.result import OURS, Entry, Options, Row, proofs, total
from gramlip.lab.layer_experiments import convolutions
from gramlip.lab.recipes import MODELS, basic_blocks
from gramlip.network.audit import audit
from gramlip.nn import Cap, LipschitzPenalty, Monitor, normalised, spectral_norm_, spectral_rescaling_
from gramlip.nn.monitor import Norms
from gramlip.nn.parametrizations import TrackedSpectralNorm
from gramlip.nn.parametrize import layers
from gramlip.norm.certify import certify_all
from gramlip.norm.formulas import Lip_conv, operator_gram_norm
from gramlip.norm.methods import METHODS, bound
from gramlip.operators.describe import describe
from gramlip.operators.interval import Bound, decimals
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.formats import read

# ---- convolutions --------------------------------------------------------------------------------------------------------

STEPS = 6  # steps of the published method, as in its experiments
PUBLISHED, FFT, POWER, ZEROS = f"delattre2023 ({STEPS})", f"rfft2 and bmm ({STEPS})", "power (100)", f"{OURS}, zero padding"
GRAM = f"gram ({STEPS})"
PROOFS = f"{OURS}, its blocks and factorisations alone"
MOST_STEPS = 64


def he(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random weights with He's variance for the number of inputs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * math.sqrt(2 / math.prod(shape[1:]))


def plain(kernel: Tensor, n: int, steps: int) -> float:
    """Gram iteration on the n-grid in its simplest form: one FFT and batched products."""
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
    """The library's Gram iteration on a layer, without rounding, as in the published one."""
    return METHODS["gram"].value(op, n_iter=STEPS)


def svd(op: Conv) -> float:
    """The norm of a circular layer, by torch's SVD in double precision."""
    certified = METHODS["senderovich2022"](op)
    return (certified.lower + float(certified.upper)) / 2


def resnet18(options: Options) -> Row:
    """All convolutions of ResNet18 at 224x224: circular padding, true strides, He weights; then with zero padding."""
    result = Row("resnet18-224")
    widths: dict[bool, list[float]] = {True: [], False: []}  # of the intervals with zero padding, by whether n <= 7
    for i, (name, shape, stride, n) in enumerate(convolutions(32)[:3] if options.quick else convolutions()):
        op = Conv(he(shape, i).to(options.device, options.dtype), n, stride, shape[-1] // 2, "circular")
        case = f"{name.removesuffix('.weight')} {'x'.join(map(str, shape))} n={n} stride {stride}"
        truths = dict.fromkeys((OURS, PUBLISHED, FFT, GRAM, POWER), svd(op))
        result.contest(case, _on_one_layer(op, n), options, truths=truths, counted=(OURS, ZEROS))
        widths[n <= 7].append(result.of(case, ZEROS).width or 0.0)
    _claim_resnet18(result, {small: max(of_size, default=0.0) for small, of_size in widths.items()})
    return result


def _claim_resnet18(result: Row, widths: dict[bool, float]) -> None:
    least = min(e.ratio or 0.0 for e in result.entries if e.contender == PUBLISHED)
    result.entries += total(result.entries)
    ours, theirs, simple, power, zero = (result.of("total", who) for who in (OURS, PUBLISHED, FFT, POWER, ZEROS))
    result.at_least("published method over gramlip, in total", theirs.median / ours.median, 10)
    result.at_least("published method over gramlip, least of the layers", least, 4)
    result.at_least("100 power steps over gramlip, in total", power.median / ours.median, 1)
    result.at_most("published method over its plain version, in total", theirs.median / simple.median, 1)
    result.at_most("largest width of an interval", ours.width or 0.0, 1e-2)
    result.at_most("zero padding over circular, in total", zero.median / ours.median, 1.5)
    result.at_most("largest width with zero padding, n > 7", widths[False], 1e-2)
    result.at_most("largest width with zero padding, n = 7", widths[True], 4e-2)


def _on_one_layer(op: Conv, n: int) -> dict[str, Callable[[], Bound | float]]:
    zeros = replace(op, padding_mode="zeros")
    return {
        OURS: lambda: bound(op),
        PUBLISHED: published(op),
        FFT: lambda: plain(op.weight, n, STEPS),
        GRAM: lambda: gram(op),
        POWER: lambda: METHODS["power"].value(op, n_iter=100),
        ZEROS: lambda: bound(zeros, finite=False),
    }


def cifar(options: Options) -> Row:
    """The convolutions of two trained residual networks for CIFAR-10, for every input size, and at the size of the published method."""
    result = Row("cifar-resnet")
    for name in ("resnet20",) if options.quick else ("resnet20", "resnet32"):
        path = options.models / f"{name}-cifar10.safetensors"
        if path.is_file():
            weights = [e.load().to(options.device, options.dtype) for e in read(path).entries.values() if len(e.shape) == 4]
            _trained(result, name, [Conv(w) for w in (weights[:4] if options.quick else weights)], options)
        else:
            result.notes.append(f"{name} was left out: {path} does not exist; expected its weights: type --models DIR")
    # a sum of norms or a number of calls is no norm
    result.entries = [e if e.width is not None else replace(e, value=None) for e in result.entries]
    return result


def _trained(result: Row, name: str, ops: list[Conv], options: Options) -> None:
    """Entries and claims of one network's convolutions."""
    case, sharp, sizes = f"{name}, {len(ops)} convolutions", f"{OURS}, rtol 1e-4", (8,) if options.quick else (32, 16, 8)
    works: dict[str, Callable[[], list[Bound] | float]] = {
        OURS: lambda: certify_all(ops, rtol=1e-2),
        sharp: lambda: certify_all(ops, rtol=1e-4),
    }
    works[PROOFS] = proofs(works[OURS])
    for n in sizes:
        circular = [replace(op, input_size=n, padding=1, padding_mode="circular") for op in ops]
        calls = [published(op) for op in circular]
        works[f"{OURS}, n = {n}"] = lambda circular=circular: certify_all(circular, rtol=1e-2)
        works[f"{PUBLISHED}, n = {n}"] = lambda calls=calls: sum(call() for call in calls)
        works[f"{GRAM}, n = {n}"] = lambda circular=circular: sum(map(gram, circular))
    result.contest(case, works, options, counted=(OURS, sharp, *(f"{OURS}, n = {n}" for n in sizes)))
    ours = result.of(case, OURS).median
    for n in sizes:
        theirs, text = result.of(case, f"{PUBLISHED}, n = {n}").median, f"{name}: published method at n = {n} over gramlip"
        result.at_least(f"{text} for every size", theirs / ours, 5)
        result.at_least(f"{text} at that size", theirs / result.of(case, f"{OURS}, n = {n}").median, 5)
    result.at_most(f"{name}: rtol 1e-4 over 1e-2", result.of(case, sharp).median / ours, 3)


def any_size(options: Options) -> Row:
    """One layer for every input size, and at growing sizes."""
    result, channels = Row("any-size"), 8 if options.quick else 64
    op = Conv(he((channels, channels, 3, 3), 0).to(options.device, options.dtype), None, 1, 1, "circular")
    case = f"{channels}x{channels}x3x3"
    works: dict[str, Callable[[], Bound]] = {OURS: lambda: bound(replace(op, padding_mode="zeros"))}
    for n in (64, 256, 1024):
        works[f"{OURS}, n = {n}"] = lambda n=n: bound(replace(op, input_size=n))
    result.contest(case, works, options, counted=works)
    ratio = result.of(case, f"{OURS}, n = 1024").median / result.of(case, OURS).median
    result.at_most("n = 1024 over every size", ratio, 1.5)
    result.at_most("every size over n = 1024", 1 / ratio, 1.5)
    return result


def nearly_orthogonal(options: Options) -> dict[str, Conv]:
    """Circular layers whose singular values all lie within 1e-3 of 1."""
    channels, n = (8, 8) if options.quick else (64, 32)
    generator = torch.Generator().manual_seed(0)

    def turn(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]

    def noise(shape: torch.Size) -> Tensor:
        # the norms of these taps sum to less than 1e-3
        raw = torch.randn(shape, generator=generator)
        return raw * (9e-4 / float(torch.linalg.matrix_norm(raw.permute(2, 3, 0, 1), 2).sum()))

    identity = torch.zeros(channels, channels, 3, 3)
    identity[:, :, 1, 1] = turn(channels)
    kernels = {
        "orthogonal 1x1 in 3x3, perturbed": identity,
        "block-orthogonal 3x3, perturbed": _block_orthogonal(turn(channels), turn(channels), turn(channels)),
    }
    return {name: Conv((k + noise(k.shape)).to(options.device, options.dtype), n, 1, 1, "circular") for name, k in kernels.items()}


def _block_orthogonal(basis: Tensor, middle: Tensor, last: Tensor) -> Tensor:
    """Half of the channels shifted along one axis, then half along the other, between rotations: orthogonal factors."""
    half = torch.arange(len(basis)) < len(basis) // 2
    kernel = torch.zeros(*basis.shape, 3, 3)
    for i, rows in enumerate((half, ~half)):
        for j, columns in enumerate((half, ~half)):
            kernel[:, :, 1 + i, 1 + j] = last @ (rows[:, None] * middle * columns) @ basis
    return kernel


def orthogonal(options: Options) -> Row:
    """Nearly orthogonal layers, where plain Gram iteration converges slowest."""
    result, ratios = Row("orthogonal"), list[float]()
    for name, op in nearly_orthogonal(options).items():
        truth = svd(op)
        steps = next((s for s in range(1, MOST_STEPS) if published(op, s)() <= truth * 1.01), MOST_STEPS)
        case, theirs = f"{name}, {'x'.join(map(str, op.weight.shape))} n={op.sizes[0] if op.sizes else None}", f"delattre2023 ({steps})"
        works: dict[str, Callable[[], Bound | float]] = {OURS: lambda op=op: bound(op), theirs: published(op, steps)}
        result.contest(case, works, options, truths=dict.fromkeys(works, truth), counted=(OURS,))
        ratios.append(result.of(case, theirs).ratio or 0.0)
    result.at_least("published method, as many steps as 1e-2 takes, over gramlip: least", min(ratios), 10)
    return result


# ---- matrices ------------------------------------------------------------------------------------------------------------

LARGE = (8192, 28672)  # a weight of a large language model's feed-forward layer
MEMORY = 6 << 30


def dense(options: Options) -> Row:
    """A square matrix, against one product of it and one Cholesky factorisation in float64."""
    result, side = Row("dense"), 128 if options.quick else 4096
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(options.device, options.dtype)
    wide = weight.double()
    spd = wide @ wide.mT
    spd.diagonal().add_(spd.diagonal().sum() / side)
    case, product, factor = f"{side}x{side}", f"one product, {str(options.dtype).removeprefix('torch.')}", "one Cholesky, float64"
    works: dict[str, Callable[[], Bound | float]] = {
        OURS: lambda: bound(Dense(weight)),
        product: lambda: float((weight @ weight)[0, 0]),
        factor: lambda: float(torch.linalg.cholesky_ex(spd)[0][0, 0]),
    }
    truth = float(torch.linalg.eigvalsh(wide.mT @ wide)[-1].sqrt())
    result.contest(case, works, options, truths={OURS: truth}, counted=(OURS,))
    allowed = 3 * result.of(case, product).median + result.of(case, factor).median
    result.at_most("gramlip over three products and a factorisation", result.of(case, OURS).median / allowed, 1)
    # the product and the factorisation are no contenders: their value is not a norm
    result.entries = [e if e.contender == OURS else replace(e, value=None) for e in result.entries]
    if options.full:
        _large(result, options)
    else:
        result.notes.append(f"{LARGE[0]}x{LARGE[1]} was left out: type --full")
    return result


def _large(result: Row, options: Options) -> None:
    """Run a large matrix once in a separate process, without warm-up, to measure its memory."""
    shape = (64, 256) if options.quick else LARGE
    options.say(f"dense: {shape[0]}x{shape[1]}")
    command = [sys.executable, "-m", "gramlip.lab.bench.contenders", *map(str, shape), str(options.device), str(torch.get_num_threads())]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        msg = f"{shape[0]}x{shape[1]} ended with exit code {run.returncode}; expected enough memory: leave --full out"
        raise UnsupportedError(msg)
    seconds, lower, upper, memory = map(float, run.stdout.split())
    case = f"{shape[0]}x{shape[1]}, once, in a process of its own"
    result.entries.append(Entry("dense", case, OURS, seconds, seconds, 1.0, upper, upper / lower - 1, memory=int(memory)))
    result.at_most(f"{shape[0]}x{shape[1]}: memory over {MEMORY >> 30} GiB", memory / MEMORY, 1)
    result.at_most(f"{shape[0]}x{shape[1]}: width of the interval", upper / lower - 1, 1e-2)


def alone(rows: int, columns: int, device: str, threads: int) -> str:
    """Seconds, lower bound, upper bound and peak memory in bytes of this process, which does nothing else."""
    torch.set_num_threads(threads)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / math.sqrt(columns)
    weight = weight.to(device)
    start = perf_counter()
    enclosure = bound(Dense(weight))
    seconds = perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if weight.is_cuda:
        memory = torch.cuda.max_memory_allocated(weight.device)
    return f"{seconds!r} {enclosure.lower!r} {float(enclosure.upper)!r} {memory}"


# ---- whole networks ------------------------------------------------------------------------------------------------------

PASS = "forward and backward"
WANTED = {"demo": 5.0, "denoiser-256": 15.0, "resnet18-224": 30.0, "resnet50-224": 120.0, "vit-b16-224": 120.0}  # seconds, two threads


class _Residual(nn.Module):
    """A branch and a shortcut, then ReLU."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def _bottlenecks(blocks: tuple[int, ...]) -> list[nn.Module]:
    """The stages of a deep ResNet: convolutions of 1, 3 and 1 between a narrow and a wide number of channels."""
    stages: list[nn.Module] = []
    last = 64
    for level, many in enumerate(blocks):
        width = 64 * 2**level
        for stride in (2 if level else 1, *(1,) * (many - 1)):
            parts = [*_conv(last, width, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU(), *_conv(width, 4 * width, 1)]
            same = stride == 1 and last == 4 * width
            stages.append(_Residual(nn.Sequential(*parts), nn.Sequential(*([] if same else _conv(last, 4 * width, 1, stride)))))
            last = 4 * width
    return stages


def _resnet(stages: list[nn.Module], width: int) -> nn.Module:
    """ResNet for 1000 classes at 224, from its stages and their last number of channels."""
    stem = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


class _Encoder(nn.Module):
    """A layer of a vision transformer, norms before the branches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


class _ViT(nn.Module):
    """ViT-B/16 without its class token: the mean over patches instead."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, width, 16, 16), nn.Parameter(0.02 * torch.randn(1, 196, width))
        self.layers, self.norm = nn.Sequential(*(_Encoder(width, heads) for _ in range(depth))), nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


def _denoiser(width: int) -> nn.Module:
    inner = [m for _ in range(2) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(width, 1, 3, padding=1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "demo": (demo, (3, 32, 32)),
    "denoiser-256": (partial(_denoiser, 64), (1, 256, 256)),
    "resnet18-224": (lambda: _resnet(basic_blocks(), 512), (3, 224, 224)),
    "resnet50-224": (lambda: _resnet(_bottlenecks((3, 4, 6, 3)), 2048), (3, 224, 224)),
    "vit-b16-224": (_ViT, (3, 224, 224)),
}


def networks(options: Options) -> Row:
    """The audit of whole networks with default options: random weights, except for the trained demo."""
    result = Row("audit")
    for case, (build, shape) in ({"denoiser-12": (partial(_denoiser, 3), (1, 12, 12))} if options.quick else NETWORKS).items():
        options.say(f"{result.name}: {case}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, x = build().eval(), torch.randn(1, *shape, requires_grad=True)
        once, begin = _passes(model, x, options.trials), perf_counter()
        report = audit(model, shape)
        seconds, middle = perf_counter() - begin, once[len(once) // 2]
        width = report.upper / report.lower - 1 if report.lower else math.inf
        result.entries.append(Entry(result.name, case, OURS, seconds, seconds, 1.0, report.upper, width))
        result.entries.append(Entry(result.name, case, PASS, once[0], middle, middle / seconds))
        ends = f"[{decimals(report.lower, upward=False)}, {decimals(report.upper, upward=True)}]"
        result.notes.append(f"{case}: {seconds:.1f} s, {seconds / middle:.0f} times a forward and a backward pass; {ends}")
        if case in WANTED:
            result.at_most(f"seconds of {case}", seconds, WANTED[case])
    return result


def _passes(model: nn.Module, x: Tensor, trials: int) -> list[float]:
    """Seconds of a forward and a backward pass, in rising order; two more that come first do not count."""
    seconds: list[float] = []
    for _ in range(2 + trials):
        begin = perf_counter()
        model(x).square().sum().backward()
        seconds.append(perf_counter() - begin)
    return sorted(seconds[2:])


if __name__ == "__main__":
    sys.stdout.write(alone(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))


# ---- training: the penalty -----------------------------------------------------------------------------------------------

EVERY = 50  # calls between two searches: the penalty's own default
STEP, CALL, SEARCH = "training step", f"{OURS}, tracked call", f"{OURS}, search and call"
PUBLISHED_PENALTY, BEST = f"Lip_conv ({STEPS}), every step differentiated", f"gram ({STEPS}), gradient at the arg-max block"


def _penalty(options: Options) -> Row:
    """Forward and backward pass of the penalty on a ResNet-18 for 32x32 images, against those of the published iteration and a step."""
    batch, name = (4, "small") if options.quick else (32, "resnet18")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MODELS[name]().to(options.device)
        x, y = (t.to(options.device) for t in (torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))))
    example = torch.zeros(1, 3, 32, 32, device=options.device)
    sized = [describe(module) if size is None else describe(module, size) for _, module, size in layers(net, example, _convolution)]
    convolutions = [op for op in sized if isinstance(op, Conv)]
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
        PUBLISHED_PENALTY: _in_turn([partial(Lip_conv, op.weight, STEPS, n=op.sizes) for op in convolutions if op.sizes]),
        BEST: _in_turn([partial(operator_gram_norm, op, STEPS) for op in convolutions]),
    }
    return _spread(f"{name}, batch {batch}, {len(convolutions)} convolutions", works, options)


def _spread(case: str, works: dict[str, Callable[[], float]], options: Options) -> Row:
    """Time the penalty's parts and its contenders; the entry of the library is a call and its share of a search."""
    result = Row("training")
    result.contest(case, works, options)
    call, full = result.of(case, CALL), result.of(case, SEARCH)
    minimum, median = (
        once + max(searched - once, 0.0) / EVERY for once, searched in ((call.minimum, full.minimum), (call.median, full.median))
    )
    ours = Entry(result.name, case, OURS, minimum, median, 1.0)
    result.entries = [ours, *(replace(e, value=None, ratio=e.median / median) for e in result.entries)]
    result.notes.append(f"{OURS}: a tracked call and its share of a search, one in {EVERY} calls. All times: forward and backward.")
    result.at_least("published Gram iteration over gramlip", result.of(case, PUBLISHED_PENALTY).median / median, 5)
    result.at_least("Gram iteration with the arg-max gradient over gramlip", result.of(case, BEST).median / median, 5)
    return result


def _convolution(_: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _in_turn(works: list[Callable[[], Tensor]]) -> Callable[[], float]:
    """Run layer by layer, so that only one graph exists at a time: all graphs together would take many GiB."""
    each = [_backward(work) for work in works]
    return lambda: sum(step() for step in each)


def _backward(work: Callable[[], Tensor]) -> Callable[[], float]:
    """Forward and backward pass; gradients accumulate in the weights, as in a step with several losses."""

    def both() -> float:
        value = work()
        value.backward()
        return value.item()

    return both


# ---- training: steps -----------------------------------------------------------------------------------------------------

UNCONSTRAINED, TORCHS, EXACT, RESCALED = "plain step", "torch's spectral_norm", f"{OURS}, exact=True", "spectral_rescaling_"
PENALISED, CAPPED, MONITORED, READING = "LipschitzPenalty", "Cap", "Monitor at every step", "Monitor, a reading that searches, alone"
SEARCHED = f"{OURS}, a search of all layers, alone"
BETWEEN = 100  # calls between two searches of a normalised layer: its own default
READ = 50  # steps between two readings of `LightningMonitor` and `TrainerMonitor`: their own default


def discriminator(width: int = 64) -> nn.Sequential:
    """The discriminator of SNGAN for 32x32 images, with seven layers."""
    parts, channels = list[nn.Module](), 3
    for out, kernel, stride in ((1, 3, 1), (1, 4, 2), (2, 3, 1), (2, 4, 2), (4, 3, 1), (4, 4, 2)):
        parts += [nn.Conv2d(channels, out * width, kernel, stride, 1), nn.LeakyReLU(0.1)]
        channels = out * width
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * 16, 1))


def training(options: Options) -> Row:
    """The penalty against the published iteration, then whole steps on three networks."""
    result, quick = _penalty(options), options.quick
    batch, rows, side = (4, 4, 64) if quick else (64, 128, 4096)
    dear = set[str]() if options.full or quick else {EXACT, RESCALED}
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], set[str]]] = [
        (f"SNGAN discriminator, batch {batch}", partial(discriminator, 4 if quick else 64), (batch, 3, 32, 32), set()),
        (f"ResNet-18, batch {rows}", MODELS["small" if quick else "resnet18"], (rows, 3, 32, 32), dear),
        (f"linear {side}x{side}, batch 8", partial(nn.Linear, side, side), (8, side), dear),
    ]
    for case, build, shape, without in cases:
        _steps(result, case, build, shape, without, options)
    return result


def _steps(result: Row, case: str, build: Callable[[], nn.Module], shape: tuple[int, ...], without: set[str], options: Options) -> None:
    models: dict[str, nn.Module] = {}
    works: dict[str, Callable[[], float]] = {}
    with torch.random.fork_rng(devices=[]):
        for name in (UNCONSTRAINED, TORCHS, OURS, EXACT, RESCALED, PENALISED, CAPPED, MONITORED):
            if name not in without:
                torch.manual_seed(0)
                works[name], models[name] = _step(name, build().to(options.device), torch.randn(shape).to(options.device))
    tracked = [(layer, how.tracker) for _, layer, _, how in normalised(models[OURS]) if isinstance(how, TrackedSpectralNorm)]

    def search() -> float:
        for layer, tracker in tracked:
            tracker.search([cast("Any", layer).parametrizations.weight.original.detach()])
        return float(len(tracked))

    reading = Monitor(models[UNCONSTRAINED], every=1)
    timed = Row(result.name)
    timed.contest(case, {**works, SEARCHED: search, READING: lambda: float(len(reading()))}, options)
    entries = _with_searches(timed.entries)
    result.entries += entries
    _compare_steps(result, case, {e.contender: e.median for e in entries})
    if without:
        result.notes.append(f"{case}: {', '.join(sorted(without))} left out: type --full")


def _step(name: str, model: nn.Module, x: Tensor) -> tuple[Callable[[], float], nn.Module]:
    """A step of Adam, and the model that it trains. No call searches: the cost of the searches is added afterwards."""
    example = None if isinstance(model, nn.Linear) else tuple(x.shape[1:])
    changes: dict[str, Callable[[], object]] = {
        TORCHS: lambda: [parametrizations.spectral_norm(layer) for _, layer, _ in layers(model, example, None)],
        OURS: lambda: spectral_norm_(model, example, every=10**9),
        EXACT: lambda: spectral_norm_(model, example, exact=True),
        RESCALED: lambda: spectral_rescaling_(model, example),
    }
    if name in changes:
        changes[name]()
    for *_, parametrization in normalised(model):
        if isinstance(parametrization, TrackedSpectralNorm):  # as after many steps; the first steps search more often
            parametrization.load_state_dict(parametrization.state_dict() | {"calls": torch.tensor(1 << 20)})
    watching: dict[str, Callable[[], Norms]] = {
        PENALISED: lambda: LipschitzPenalty(model, example, every=10**9),
        CAPPED: lambda: Cap(model, 1.1 * max(norm["sigma"] for norm in Monitor(model, example)().values()), example, every=10**9),
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


def _with_searches(entries: list[Entry]) -> list[Entry]:
    """Entries with the share of a search that a call takes on average, and without values."""
    search = next(e for e in entries if e.contender == SEARCHED)
    calls = {OURS: BETWEEN, PENALISED: EVERY, CAPPED: EVERY, MONITORED: EVERY}

    def whole(e: Entry) -> Entry:
        share = 1 / calls[e.contender] if e.contender in calls else 0.0
        return replace(e, value=None, minimum=e.minimum + share * search.minimum, median=e.median + share * search.median)

    summed = [whole(e) for e in entries]
    ours = next(e.median for e in summed if e.contender == OURS)
    return [replace(e, ratio=e.median / ours) for e in summed]


def _compare_steps(result: Row, case: str, medians: dict[str, float]) -> None:
    """Add the note of ratios to the plain step, and the claims."""
    plain = medians[UNCONSTRAINED]
    read = 1.0 + medians[READING] / plain / READ
    times = {name: value / plain for name, value in medians.items() if name not in {UNCONSTRAINED, SEARCHED, READING}}
    text = "; ".join(f"{name} {ratio:.3g}" for name, ratio in times.items())
    result.notes.append(f"{case}: times the plain step: {text}; Monitor, a reading that searches every {READ} steps {read:.4g}.")
    linear = case.startswith("linear")
    limits = {} if linear else {OURS: 1.15, CAPPED: 1.02} | ({RESCALED: 2.0} if case.startswith("SNGAN") else {})
    for name, limit in limits.items():
        result.at_most(f"{case}: {name} over the plain step", times[name], limit)
    result.at_most(f"{case}: {OURS} over torch's", times[OURS] / times[TORCHS], 2.0 if linear else 1.1)
    if not linear:
        result.at_most(f"{case}: Monitor read every {READ} steps, over the plain step", read, 1.02)
