"""Small architectures of public packages with fresh weights, built from their configurations: nothing is loaded.

`python integrations/architectures.py` audits all of them, globally and then on [0, 1], and writes what docs/network.md shows.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1"}

from vision import timm  # isort: skip  before transformers, which imports torchvision where it is installed

import diffusers as d
import torch
import transformers as t
from monai.networks import nets
from timm.models.convnext import ConvNeXt
from timm.models.metaformer import GroupNorm1, MetaFormer, Pooling
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.starnet import StarNet
from torch import Tensor, nn
from torchvision import models as v

import gramlip as gl
from gramlip.operators.interval import decimals
from gramlip.reports.report import Report

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {"vocab_size": 20, "use_cache": False}
BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
PATCHES = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 10}
WINDOWS = {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2), "num_classes": 10}
STAGES = {"depths": (1, 1, 1, 1), "num_classes": 10}
MIXED = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 2, "num_classes": 10}
PLANES = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}


class Applied(nn.Module):
    """A module through a call of one tensor."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def of_words(module: nn.Module) -> nn.Module:
    """A language model after its embeddings."""
    return Applied(module, lambda m, x: m(inputs_embeds=x)[0])


def of_pixels(module: nn.Module) -> nn.Module:
    return Applied(module, lambda m, x: m(pixel_values=x)[0])


def responses() -> nn.Module:
    """ConvNeXt V2, whose response normalisation begins as the identity, with weights that it could have learnt."""
    model = t.ConvNextV2Model(t.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2))
    for name, weight in model.named_parameters():
        if ".grn." in name:
            nn.init.normal_(weight, std=0.1)
    return of_pixels(model)


def mixer(**options: object) -> nn.Module:
    """Patches and channels mixed in turn, with a head that is not zero, as it begins."""
    model = MlpMixer(**MIXED, **options)
    nn.init.normal_(model.head.weight, std=0.1)
    return model


def autoencoder() -> nn.Module:
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return d.AutoencoderKL(latent_channels=2, **BLOCKS, **ends)


def diffusion() -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    unet = d.UNet2DConditionModel(sample_size=8, layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, **BLOCKS, **blocks)
    text = torch.randn(1, 3, 8)
    return Applied(unet, lambda m, x: m(x, 10, text).sample)


@dataclass(frozen=True)
class Architecture:
    """How to build it, its kind, and the shape of one sample."""

    package: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


ARCHITECTURES: dict[str, Architecture] = {
    "BERT": Architecture("transformers", lambda: of_words(t.BertModel(t.BertConfig(vocab_size=20, **SMALL))), (6, 16)),
    "GPT-2": Architecture(
        "transformers", lambda: of_words(t.GPT2Model(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **WORDS))), (6, 16)
    ),
    "Llama": Architecture("transformers", lambda: of_words(t.LlamaModel(t.LlamaConfig(num_key_value_heads=1, **WORDS, **SMALL))), (6, 16)),
    "Qwen2": Architecture("transformers", lambda: of_words(t.Qwen2Model(t.Qwen2Config(num_key_value_heads=1, **WORDS, **SMALL))), (6, 16)),
    "T5 encoder": Architecture(
        "transformers",
        lambda: of_words(t.T5EncoderModel(t.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))),
        (6, 16),
    ),
    "Mamba": Architecture(
        "transformers",
        lambda: of_words(t.MambaModel(t.MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **WORDS))),
        (6, 16),
    ),
    "ViT": Architecture("transformers", lambda: of_pixels(t.ViTModel(t.ViTConfig(image_size=16, patch_size=8, **SMALL))), (3, 16, 16)),
    "Swin": Architecture(
        "transformers",
        lambda: of_pixels(t.SwinModel(t.SwinConfig(image_size=32, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4))),
        (3, 32, 32),
    ),
    "ConvNeXt": Architecture(
        "transformers", lambda: of_pixels(t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4))), (3, 32, 32)
    ),
    "ConvNeXt V2": Architecture("transformers", responses, (3, 32, 32)),
    "ResNet": Architecture(
        "transformers",
        lambda: of_pixels(t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))),
        (3, 32, 32),
    ),
    "RegNet": Architecture(
        "transformers",
        lambda: of_pixels(t.RegNetModel(t.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8))),
        (3, 32, 32),
    ),
    "Wav2Vec2": Architecture(
        "transformers",
        lambda: Applied(
            t.Wav2Vec2Model(
                t.Wav2Vec2Config(
                    vocab_size=20,
                    conv_dim=[8, 8],
                    conv_stride=[5, 2],
                    conv_kernel=[10, 3],
                    num_conv_pos_embeddings=4,
                    num_conv_pos_embedding_groups=2,
                    **SMALL,
                )
            ),
            lambda m, x: m(x)[0],
        ),
        (200,),
    ),
    "U-Net of diffusion, to a text": Architecture("diffusers", diffusion, (4, 8, 8)),
    "encoder to latents": Architecture("diffusers", lambda: Applied(autoencoder(), lambda m, x: m.encode(x).latent_dist.mean), (3, 16, 16)),
    "decoder of latents": Architecture("diffusers", lambda: Applied(autoencoder(), lambda m, x: m.decode(x).sample), (2, 8, 8)),
    "diffusion transformer": Architecture(
        "diffusers",
        lambda: Applied(
            d.DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                num_layers=1,
                sample_size=8,
                norm_num_groups=4,
                num_embeds_ada_norm=10,
            ),
            lambda m, x: m(x, timestep=torch.tensor([1]), class_labels=torch.tensor([1])).sample,
        ),
        (4, 8, 8),
    ),
    "VQ autoencoder": Architecture(
        "diffusers",
        lambda: Applied(d.VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8), lambda m, x: m(x).sample),
        (3, 8, 8),
    ),
    "U-Net": Architecture("monai", lambda: nets.UNet(channels=(4, 8), strides=(2,), num_res_units=1, **PLANES), (1, 16, 16)),
    "attention U-Net": Architecture("monai", lambda: nets.AttentionUnet(channels=(4, 8), strides=(2,), **PLANES), (1, 16, 16)),
    "SegResNet": Architecture("monai", lambda: nets.SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), **PLANES), (1, 16, 16)),
    "DenseNet": Architecture("monai", lambda: nets.DenseNet(init_features=4, growth_rate=2, block_config=(1, 1), **PLANES), (1, 32, 32)),
    "DynUNet": Architecture("monai", lambda: nets.DynUNet(2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8]), (1, 16, 16)),
    "ViT of timm": Architecture("timm", lambda: timm.create_model("vit_tiny_patch16_224", **PATCHES), (3, 32, 32)),
    "DeiT III": Architecture("timm", lambda: timm.create_model("deit3_small_patch16_224", **PATCHES), (3, 32, 32)),
    "CaiT": Architecture("timm", lambda: timm.create_model("cait_xxs24_224", **PATCHES), (3, 32, 32)),
    "EVA-02": Architecture("timm", lambda: timm.create_model("eva02_tiny_patch14_224", **PATCHES | {"img_size": 28}), (3, 28, 28)),
    "Swin of timm": Architecture("timm", lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **WINDOWS), (3, 56, 56)),
    "Swin V2": Architecture("timm", lambda: timm.create_model("swinv2_tiny_window8_256", img_size=64, **WINDOWS), (3, 64, 64)),
    "ConvNeXt of timm": Architecture("timm", lambda: ConvNeXt(dims=(8, 8, 16, 16), **STAGES), (3, 64, 64)),
    "MLP-Mixer": Architecture("timm", mixer, (3, 32, 32)),
    "ResMLP": Architecture("timm", lambda: mixer(mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine), (3, 32, 32)),
    "PoolFormer": Architecture(
        "timm",
        lambda: MetaFormer(depths=(1, 1), dims=(8, 16), token_mixers=Pooling, norm_layers=GroupNorm1, num_classes=10),
        (3, 32, 32),
    ),
    "StarNet": Architecture("timm", lambda: StarNet(base_dim=8, **STAGES), (3, 64, 64)),
    "MobileNetV3": Architecture("timm", lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), (3, 32, 32)),
    "MobileNetV4": Architecture("timm", lambda: timm.create_model("mobilenetv4_conv_small_035", num_classes=10), (3, 32, 32)),
    "RegNetX": Architecture("timm", lambda: timm.create_model("regnetx_002", num_classes=10), (3, 32, 32)),
    "SqueezeNet": Architecture("torchvision", lambda: v.squeezenet1_1(num_classes=10), (3, 64, 64)),
    "ShuffleNet V2": Architecture("torchvision", lambda: v.shufflenet_v2_x0_5(num_classes=10), (3, 64, 64)),
    "MobileNetV2": Architecture("torchvision", lambda: v.mobilenet_v2(width_mult=0.25, num_classes=10), (3, 32, 32)),
    "GoogLeNet": Architecture("torchvision", lambda: v.googlenet(num_classes=10, aux_logits=False, init_weights=False), (3, 64, 64)),
    "ViT of torchvision": Architecture("torchvision", lambda: v.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10), (3, 32, 32)),
}


def audited(name: str, domain: tuple[float, float] | None = None) -> Report:
    """The report of a fresh network."""
    torch.manual_seed(0)
    given = ARCHITECTURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gl.audit(given.build().eval(), given.shape, effort=-1, strict=False, domain=domain)


def row(name: str) -> dict[str, object]:
    """What the audit gives globally and, where that is infinite, on [0, 1]."""
    whole = audited(name)
    on = whole if whole.upper < math.inf else audited(name, (0.0, 1.0))
    reason = on.left_out[0].reason.partition(" (/")[0].removeprefix("unbounded: ") if on.left_out else ""
    return {
        "package": ARCHITECTURES[name].package,
        "name": name,
        "lower": on.lower,
        "upper": on.upper if on.upper < math.inf else None,
        "where": "refused" if not on.upper < math.inf else "globally" if on is whole else "on [0, 1]",
        "reason": reason if not on.upper < math.inf else "",
    }


def table(rows: list[dict[str, object]]) -> str:
    """The rows as docs/network.md has them."""
    lines = ["| package | network | finite | at least | at most |", "|---|---|---|---|---|"]
    for r in rows:
        finite = f"no: {r['reason']}" if r["upper"] is None else r["where"]
        ends = [decimals(r["lower"], upward=False, digits=3), "" if r["upper"] is None else decimals(r["upper"], upward=True, digits=3)]
        lines.append(f"| {r['package']} | {r['name']} | {finite} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "experiments/results/architectures.json")
    rows = []
    for name in ARCHITECTURES:
        rows.append(row(name))
        print(rows[-1], flush=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    page = Path("docs/network.md")
    before, rest = page.read_text().split("<!-- architectures -->\n")
    page.write_text(f"{before}<!-- architectures -->\n{table(rows)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}")
