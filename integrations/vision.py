"""timm and torchvision beside PyTorch's CPU build.

torchvision's compiled operators do not load there, and its first lines ask for two of them. They are declared here, without a body, so
that its Python code can be imported; no network below calls them.
"""

from __future__ import annotations

import torch

try:
    import torchvision
except RuntimeError:
    operators = torch.library.Library("torchvision", "FRAGMENT")  # as long as this object lives
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

import timm

__all__ = ["timm", "torchvision"]
