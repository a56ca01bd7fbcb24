"""How wide the interval of a zero-padded layer stays without its own certificate, over the input size.

Writes docs/finite.md and experiments/results/finite_width.json: `python experiments/finite_width.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import gramlip as gl
from gramlip.blocks import symbol
from gramlip.boundary import excess
from gramlip.certify import AUTO_OPERATIONS
from gramlip.finite import Certificate, Layer

ROOT = Path(__file__).resolve().parent.parent
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
    own = Certificate(Layer(op, 0), 0).cost
    return {"size": size, "blocks": blocks.rtol, "auto": auto.rtol, "operations": own, "certified": own <= AUTO_OPERATIONS}


def reflected(weight: torch.Tensor) -> dict[str, float]:
    op = gl.Conv(weight, padding=weight.shape[-1] // 2, padding_mode="reflect")
    every = gl.bound(op)
    zero = gl.bound(gl.Conv(weight, padding=weight.shape[-1] // 2))
    mass = float(torch.linalg.vector_norm(weight.double().flatten(2), dim=(0, 1)).sum()) * (1 + 1e-9)
    found = excess(op, 0, 0, mass)
    product = float(zero.upper) * symbol(op).square ** 0.5
    return {"reflect": float(every.upper), "supremum": float(zero.upper), "product": product, "excess": -1.0 if found is None else found}


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
        "For layers too large for their own certificate, reflect padding adds what the boundary contributes (theorem 12). Upper bounds",
        "for every size, beside the supremum of the symbol, which zero padding cannot exceed, and the norm of the padding map (of the",
        "worst size) times it; the smaller of the last two is what `gl.bound` returns, at its width of 1e-2:",
        "",
        "| layer | supremum | `gl.bound` with reflect | norm of the padding times the supremum |",
        "|---|---|---|---|",
    ]
    for name, edge in edges.items():
        lines.append(f"| {name} | {edge['supremum']:.4f} | {edge['reflect']:.4f} | {edge['product']:.4f} |")
    lines += ["", "Made by `python experiments/finite_width.py`.", ""]
    (ROOT / "docs" / "finite.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
