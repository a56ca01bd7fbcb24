"""What slopes alone can prove of residual networks: `python experiments/residual_bounds.py`; fills a table of docs/network.md.

Ideas that are published, on the CIFAR-10 ResNets, beside the coupled bound of `audit`, and a floor: slopes of 0 and 1 whose product of
matrices stretches a vector so much that no method which knows the slopes alone can say less. The floor is a witness (float64); the
ideas are estimated by power iteration and not proved, which favours them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models

from gramlip import audit
from gramlip.operators.interval import decimals

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "models"
RESULT = ROOT / "experiments" / "results" / "residual_bounds.json"
PAGE = ROOT / "docs" / "network.md"
POINTS = 8  # an axis of the torus on which weighted norms are searched


class Residual:
    """A CIFAR ResNet as its folded kernels: pre-activations q_k, of which each branch is linear in activations before it."""

    def __init__(self, model: nn.Module, size: int = 32) -> None:
        def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
            gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            return (conv.weight * gain[:, None, None, None]).detach().double()

        blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
        self.stem = folded(model.conv1, model.bn1)
        self.blocks = [(folded(b.conv1, b.bn1), folded(b.conv2, b.bn2), b.stride, b.room) for b in blocks]
        self.head = model.linear.weight.detach().double()
        self.shapes = [(1, len(self.stem), size, size)]
        for one, _, stride, _ in self.blocks:
            size //= stride
            self.shapes += [(1, len(one), size, size)] * 2
        self.input = (1, self.stem.shape[1], self.shapes[0][2], self.shapes[0][3])

    def run(self, act: Callable[[int, Tensor | None], Tensor | None], x: Tensor | None = None) -> Tensor:
        """The result where activation k maps its argument, None for zero, by `act`; biases left out."""
        h = act(0, None if x is None else F.conv2d(x, self.stem, padding=1))
        for b, (one, two, stride, room) in enumerate(self.blocks):
            a = act(2 * b + 1, None if h is None else F.conv2d(h, one, stride=stride, padding=1))
            q = None if a is None else F.conv2d(a, two, padding=1)
            if h is not None:
                skip = h if stride == 1 else F.pad(h[:, :, ::stride, ::stride], (0, 0, 0, 0, room, room))
                q = skip if q is None else q + skip
            h = act(2 * b + 2, q)
        assert h is not None
        return self.head @ h.mean((2, 3))[0]


def largest(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], rounds: int = 12) -> float:
    """The norm of a linear function by power iteration, from below."""
    x, size = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0.0
    for _ in range(rounds):
        x = (x / x.norm()).requires_grad_(True)
        y = function(x)
        (x,) = torch.autograd.grad(y, x, y.detach())
        size = float(y.detach().norm())
    return size


def floor(net: Residual, seeds: int = 2, rounds: int = 40) -> float:
    """The most that slopes of 0 and 1, chosen layer by layer, were seen to stretch a vector."""
    best = 0.0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        slopes = [torch.randint(0, 2, s, generator=generator).double() for s in net.shapes]
        v = torch.randn(net.input, dtype=torch.float64, generator=generator)
        for turn in range(rounds):
            for _ in range(3):
                v = (v / v.norm()).detach().requires_grad_(True)
                y = net.run(lambda k, q, slopes=slopes: slopes[k] * q, v)
                (v,) = torch.autograd.grad(y, v, y.detach())
            best, u, v = max(best, float(y.detach().norm())), y.detach(), v / v.norm()
            for k in range(len(slopes)) if turn % 2 else reversed(range(len(slopes))):
                slopes[k].requires_grad_(True)
                (gain,) = torch.autograd.grad((net.run(lambda j, q, slopes=slopes: slopes[j] * q, v) * u).sum(), slopes[k])
                slopes[k] = (gain > 0).double()
    return best


def averaged(net: Residual) -> float:
    """Activations as (1 + S)/2 with |S| <= 1 (arXiv 1903.01014), on the graph: t_k <= |M_kx| + sum_j |M_kj| t_j over the linear ways."""
    count = len(net.shapes)
    reach = {-1: 1.0}
    for k in range(count + 1):
        reach[k] = 0.0
        for j in range(-1, k):

            def way(z: Tensor, j: int = j, k: int = k) -> Tensor:
                """From the part `S q` of activation j, or the input, to the argument of activation k, or the result."""
                seen: list[Tensor] = []

                def act(i: int, q: Tensor | None) -> Tensor | None:
                    if i == k and q is not None:
                        seen.append(q)
                    return 0.5 * z if i == j else None if q is None else 0.5 * q

                out = net.run(act, z if j < 0 else None)
                return seen[0] if seen else out

            reach[k] += largest(way, net.input if j < 0 else net.shapes[j]) * reach[j]
    return reach[count]


def moduli(net: Residual) -> float:
    """The norm of the network of the moduli of all weights, all slopes 1."""
    positive = Residual.__new__(Residual)
    positive.stem, positive.head, positive.input = net.stem.abs(), net.head.abs(), net.input
    positive.blocks = [(one.abs(), two.abs(), stride, room) for one, two, stride, room in net.blocks]
    return largest(lambda x: positive.run(lambda _, q: q, x), net.input, 30)


class Weighted:
    """A convolution's symbol on a small torus, and its norm between weighted norms, by power steps that go on from the last ones."""

    def __init__(self, weight: Tensor, stride: int) -> None:
        rows, columns, *kernel = weight.shape
        waves = torch.arange(POINTS) / POINTS
        symbol = torch.zeros(POINTS, POINTS, rows, columns, stride, stride, dtype=torch.complex64)
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                (a, p), (b, q) = divmod(i - 1, stride), divmod(j - 1, stride)
                wave = torch.exp(2j * math.pi * (a * waves[:, None] + b * waves[None, :])).to(torch.complex64)
                symbol[..., p, q] += wave[:, :, None, None] * weight[:, :, i, j].float()
        self.symbol = symbol.reshape(POINTS**2, rows, columns, stride**2)
        self.vector = torch.ones(POINTS**2, columns * stride**2, 1, dtype=torch.complex64)

    def norm(self, out: Tensor, inside: Tensor) -> Tensor:
        """The norm with logarithms of the weights of the result's and the argument's channels."""
        matrix = (self.symbol * (out.exp()[:, None, None] * (-inside).exp()[None, :, None])).flatten(2)
        with torch.no_grad():
            for _ in range(3):
                self.vector = matrix.mH @ (matrix @ self.vector)
                self.vector = self.vector / (self.vector.norm(dim=1, keepdim=True) + 1e-30)
        return (matrix @ self.vector).norm(dim=(1, 2)).max()


def weighted(net: Residual, steps: int) -> tuple[float, float]:
    """The product of the layers in weighted norms |D x|, D a positive diagonal by channels, which activations leave as they are.

    Without weights, and with the best ones that gradient steps found.
    """
    stem = Weighted(net.stem, 1)
    layers = [(Weighted(one, stride), Weighted(two, 1), room) for one, two, stride, room in net.blocks]
    logs = [torch.zeros(shape[1], requires_grad=True) for shape in net.shapes]

    def product() -> Tensor:
        total, d = stem.norm(logs[0], torch.zeros(net.stem.shape[1])), logs[0]
        for b, (one, two, room) in enumerate(layers):
            inner, outer = logs[2 * b + 1], logs[2 * b + 2]
            skip = (outer[room : room + len(d)] - d).max().exp()
            total, d = total * (one.norm(inner, d) * two.norm(outer, inner) + skip), outer
        pooled = net.head.float() * (-d).exp() / math.sqrt(math.prod(net.shapes[-1][2:]))
        return (total * torch.linalg.matrix_norm(pooled, 2)).log()

    with torch.no_grad():
        for _ in range(10):
            plain = float(product())
    search, best = torch.optim.Adam(logs, lr=0.03), plain
    for step in range(steps):
        search.param_groups[0]["lr"] = 0.03 if step < steps / 2 else 0.01
        search.zero_grad()
        value = product()
        value.backward()
        search.step()
        best = min(best, float(value.detach()))
    return math.exp(plain), math.exp(best)


def methods(model: nn.Module, efforts: list[float], steps: int) -> dict[str, Callable[[], float]]:
    """Each idea by its name, the cheap ones and those that prove something first."""
    net = Residual(model)
    return {
        "floor of all that knows slopes alone": lambda: floor(net),
        "product of layers (`effort=-1`)": lambda: audit(model, (3, 32, 32), effort=-1).upper,
        **{f"coupling, `effort={e:g}`": lambda e=e: audit(model, (3, 32, 32), effort=e).upper for e in efforts},
        "weighted norms, searched": lambda: weighted(net, steps)[1],
        "averaged operators": lambda: averaged(net),
        "moduli of all weights": lambda: moduli(net),
    }


def table(found: list[dict[str, object]]) -> str:
    """The rows for docs/network.md."""
    head = "| network | method | bound | CPU seconds |\n|---|---|---|---|\n"
    shown = ({**row, "value": decimals(row["value"], upward=not str(row["method"]).startswith("floor"))} for row in found)  # type: ignore[arg-type]
    return head + "".join("| {network} | {method} | {value} | {seconds:.0f} |\n".format(**row) for row in shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--efforts", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--networks", nargs="*", default=["resnet20-cifar10", "resnet32-cifar10"])
    parser.add_argument("--only", default="", help="methods whose name holds this; the others keep their rows")
    given = parser.parse_args()
    for name in given.networks:
        model = models.CifarResNet((int(name[6:8]) - 2) // 6)
        model.load_state_dict(load_file(SHARED / f"{name}.safetensors"), strict=False)
        for method, value in methods(model.eval(), given.efforts, given.steps).items():
            if given.only in method:
                begun = process_time()
                row = {"network": name, "method": method, "value": value(), "seconds": process_time() - begun}
                print(json.dumps(row), flush=True)
                kept(row)


def kept(row: dict[str, object]) -> None:
    """The row written in the place of an older one, and the table with it."""
    old = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    found = sorted(
        [r for r in old if (r["network"], r["method"]) != (row["network"], row["method"])] + [row], key=lambda r: (r["network"], r["value"])
    )
    RESULT.write_text(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": found}, indent=1) + "\n")
    begin, end = "<!-- residual_bounds -->\n", "<!-- end -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(before + begin + table(found) + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()
