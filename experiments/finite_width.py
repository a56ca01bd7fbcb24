"""How wide the interval of a zero-padded layer stays without its own certificate, over the input size.

Writes docs/finite.md and experiments/results/finite_width.json: `python experiments/finite_width.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

import gramlip as gl
from gramlip.norm.certify import AUTO_OPERATIONS
from gramlip.norm.finite_layer import Certificate, FiniteLayer
from gramlip.norm.polyphase import symbol

ROOT = Path(__file__).resolve().parent.parent
LARGE = 32  # of the layers with reflect padding
SIZES = (3, 4, 5, 7, 8, 10, 14, 20, 28, 40, 56)


def kernels() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    second = torch.tensor([1.0, -2.0, 1.0])
    found = {
        "Laplacian": (second[:, None] * second)[None, None],
        "ones, 1 channel": torch.ones(1, 1, 3, 3),
        "He, 4 channels": torch.randn(4, 4, 3, 3, generator=generator) * (2 / 36) ** 0.5,
        "He, 16 channels": torch.randn(16, 16, 3, 3, generator=generator) * (2 / 144) ** 0.5,
        "He, 64 channels": torch.randn(64, 64, 3, 3, generator=generator) * (2 / 576) ** 0.5,
        "He 5x5, 16 channels": torch.randn(16, 16, 5, 5, generator=generator) * (2 / 400) ** 0.5,
    }
    trained = ROOT.parent / "shared" / "models" / "resnet20-cifar10.safetensors"
    if trained.exists():
        from safetensors.torch import load_file

        weights = load_file(str(trained))
        for name in ("layer1.0.conv1", "layer2.1.conv2", "layer3.1.conv1"):
            found[f"ResNet-20 {name}"] = weights[f"{name}.weight"]
    return found


def row(weight: torch.Tensor, size: int) -> dict[str, object]:
    op = gl.Conv(weight, input_size=size, padding=weight.shape[-1] // 2)
    blocks = gl.bound(op, finite=False)
    auto = gl.bound(op)
    own = Certificate(FiniteLayer(op, 0), 0).cost
    return {"size": size, "blocks": blocks.rtol, "auto": auto.rtol, "operations": own, "certified": own <= AUTO_OPERATIONS}


def reflected(weight: torch.Tensor) -> dict[str, float]:
    op = gl.Conv(weight, LARGE, padding=weight.shape[-1] // 2, padding_mode="reflect")
    sized = gl.bound(op, finite=False)
    every = gl.bound(replace(op, input_size=None))
    zero = gl.bound(replace(op, input_size=None, padding_mode="zeros"))
    factors = {"product": op, "product_every": replace(op, input_size=None)}
    products = {name: float(zero.upper) * symbol(one).square ** 0.5 for name, one in factors.items()}
    return {
        "reflect": float(sized.upper),
        "lower": sized.lower,
        "reflect_every": float(every.upper),
        "supremum": float(zero.upper),
        **products,
    }


def main() -> None:
    rows = {name: [row(weight, size) for size in SIZES if size >= weight.shape[-1] // 2 + 1] for name, weight in kernels().items()}
    edges = {name: reflected(weight) for name, weight in kernels().items() if weight.shape[0] <= 16}
    results = ROOT / "experiments" / "results"
    results.mkdir(exist_ok=True)
    meta = {"torch": torch.__version__, "rtol": 1e-2, "limit": AUTO_OPERATIONS}
    (results / "finite_width.json").write_text(json.dumps({"meta": meta, "rows": rows, "reflect": edges}, indent=1) + "\n")
    lines = [
        "# Zero-padded layers of given size",
        "",
        "Without its own certificate a zero-padded layer is bounded by the circulant of size n + p (theorem 4), which lies above it. The",
        "width `upper / lower - 1` of the interval with `finite=False`, whose lower side is the layer's own Rayleigh quotient, asked for",
        "at 1e-2:",
        "",
        "| layer | " + " | ".join(f"n={n}" for n in SIZES) + " |",
        "|---" * (len(SIZES) + 1) + "|",
    ]
    for name, found in rows.items():
        by = {r["size"]: r for r in found}
        cells = [f"{by[n]['blocks']:.1e}" + ("*" if by[n]["certified"] else "") if n in by else "" for n in SIZES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        'An asterisk marks the sizes at which `finite="auto"` takes the layer\'s own certificate where the blocks leave it wider than',
        f"asked for (estimated operations below {AUTO_OPERATIONS:.0e}): there the interval closes to 1e-2, and on request to 1e-6. "
        "The gap to",
        "the circulant falls as 1/n^2. It is largest for kernels such as the Laplacian, whose norm sits at one sharp frequency.",
        "",
        "## Reflect padding",
        "",
        "For layers too large for their own certificate, reflect padding adds what the boundary contributes (theorem 12). At",
        f"n = {LARGE} and for every size, of which the smallest are the worst: the supremum of the symbol, which zero padding "
        "cannot exceed, the",
        "lower and upper side of `gl.bound` with `finite=False`, and the norm of the padding map times the supremum, at a width of 1e-2:",
        "",
        f"| layer | supremum | n = {LARGE}: lower | upper | padding times supremum | every size: upper | padding times supremum |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, edge in edges.items():
        cells = [edge[key] for key in ("supremum", "lower", "reflect", "product", "reflect_every", "product_every")]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
    lines += ["", "Made by `python experiments/finite_width.py`.", ""]
    (ROOT / "docs" / "finite.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
