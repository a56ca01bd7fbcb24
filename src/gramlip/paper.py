"""The four algorithms of arXiv 2305.16173, under the paper's names. docs/methods.md."""

from __future__ import annotations

from gramlip.norm.formulas import Gram_iteration_naive, Lip_conv, Lip_dense, Power_iteration

__all__ = ["Gram_iteration_naive", "Lip_conv", "Lip_dense", "Power_iteration"]
