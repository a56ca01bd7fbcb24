"""Trains the two networks that ship with gramlip on CIFAR-10: `demo`, plain, and `demo-regularised`, with a Gram penalty.

    OMP_NUM_THREADS=1 python experiments/train_demo.py demo
    OMP_NUM_THREADS=1 python experiments/train_demo.py demo-regularised

Each writes NAME.safetensors and NAME.log to src/gramlip/data. The last epoch is kept; no choice is made on the test images.
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import gramlip as gl
from gramlip.demo import DemoNet

ROOT = Path(__file__).resolve().parent.parent
STRENGTH = {"demo": 0.0, "demo-regularised": 0.05}
STEPS, GRID, EVERY = 3, 6, 4
BATCH, PEAK_LR, MOMENTUM, DECAY = 128, 0.2, 0.9, 5e-4


def cifar10(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images as uint8 (N, 3, 32, 32) and labels (N,); decoded once, then kept in runs/."""
    cache = ROOT / "runs" / f"cifar10-{split}.npz"
    if not cache.exists():
        table = pq.read_table(folder / f"{split}-00000-of-00001.parquet")
        images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["img"].to_pylist()]
        cache.parent.mkdir(exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, images=np.stack(images).transpose(0, 3, 1, 2), labels=table["label"].to_numpy())
        part.replace(cache)
    with np.load(cache) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def as_batch(images: Tensor) -> Tensor:
    """Pixels in [0, 1], channels last in memory."""
    return images.float().div(255).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, pad: int = 4) -> Tensor:
    """Each image shifted by up to `pad` pixels over a black border and mirrored at random."""
    n, _, side, _ = images.shape
    padded = F.pad(images, (pad,) * 4)
    rows = torch.randint(2 * pad + 1, (n, 1)) + torch.arange(side)
    columns = torch.randint(2 * pad + 1, (n, 1)) + torch.arange(side)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def norms_of(net: DemoNet) -> Tensor:
    """The Gram norms of the linear maps: the penalty is the sum of their logarithms where above zero.

    A convolution counts twice: as it is, and with the scale of the batch normalisation behind it, without which shrinking
    the kernel would change nothing. The gradient of the second goes to that scale alone: the kernel has the first.
    Logarithms, and a gradient proportional to the scale itself: a channel that is nearly dead has a gain of hundreds, under
    which any other step overshoots, while this one makes its scale decay.
    """
    norms = [gl.gram_norm(net.head.weight, STEPS)]
    for unit in net.modules():
        if isinstance(unit, nn.Sequential):
            conv, norm = unit.conv, unit.norm
            fixed = norm.weight.detach()
            scale = fixed * (1 + fixed * (norm.weight - fixed))
            gain = scale / (norm.running_var + norm.eps).sqrt()
            grid = GRID if conv.kernel_size[0] > 1 else conv.stride[0]
            for weight in (conv.weight, gain[:, None, None, None] * conv.weight.detach()):
                norms.append(gl.conv_gram_norm(weight, grid, STEPS, conv.stride, groups=conv.groups))
    return torch.stack(norms)


def excess(norms: Tensor) -> float:
    """What the norms exceed one by, summed."""
    return torch.relu(norms - 1).sum().item()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the network, in float32, classifies as labelled."""
    net.eval()
    hits = sum(int((net(as_batch(x)).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    return hits / len(labels)


def epoch(net: DemoNet, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, schedule, strength: float) -> str:
    """One pass in random order, the penalty in one of EVERY steps at EVERY times the strength; what was measured, in words."""
    net.train()
    losses, hits, seen = [], [], []
    for step, index in enumerate(torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(as_batch(augmented(images[index])))
        loss = F.cross_entropy(logits.float(), labels[index])
        losses.append(loss.item())
        hits.append((logits.argmax(1) == labels[index]).float().mean().item())
        if strength and step % EVERY == 0:
            norms = norms_of(net)
            seen.append(excess(norms))
            loss = loss + EVERY * strength * torch.relu(norms.log()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    over = np.mean(seen or [excess(norms_of(net))])
    return f"cross-entropy {np.mean(losses):.4f}  training accuracy {np.mean(hits):.4f}  excess of the norms {over:.4f}"


def main() -> None:
    """Train, measure, write the weights and the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STRENGTH)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "cifar10")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "gramlip" / "data")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines: list[str] = []

    def log(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    strength = STRENGTH[args.name]
    torch.manual_seed(args.seed)
    train, test = cifar10(args.data, "train"), cifar10(args.data, "test")
    net = DemoNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), PEAK_LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    steps = args.epochs * (len(train[1]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, steps, pct_start=0.25, cycle_momentum=False)
    images = f"{len(train[1])} training and {len(test[1])} test images"
    log(f"{args.name}: DemoNet on CIFAR-10 (JPEG), {images}, {args.epochs} epochs of batch {BATCH}")
    log(f"seed {args.seed}, SGD momentum {MOMENTUM}, one-cycle to {PEAK_LR}, weight decay {DECAY}, crops and mirrors, bfloat16 autocast")
    gram = f"Gram steps {STEPS}, grid {GRID}, one in {EVERY} steps"
    log(f"penalty {strength} * sum relu(log norm), {gram}; torch {torch.__version__}")
    for number in range(1, args.epochs + 1):
        log(f"epoch {number:2d}  {epoch(net, *train, optimizer, schedule, strength)}")
    final = accuracy(net, *test)
    log(f"test accuracy {final:.4f}")
    metadata = {
        "architecture": "gramlip.demo:DemoNet",
        "data": "CIFAR-10 (JPEG)",
        "seed": str(args.seed),
        "epochs": str(args.epochs),
        "penalty": str(strength),
        "test_accuracy": f"{final:.4f}",
        "gramlip": gl.__version__,
        "torch": torch.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, args.out / f"{args.name}.safetensors", metadata=metadata)
    (args.out / f"{args.name}.log").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
