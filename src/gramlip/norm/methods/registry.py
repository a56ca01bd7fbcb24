"""METHODS: name -> method; every way to bound an operator, under one signature.

A method is a `Method`: called as `METHODS[name](op, rtol=..., finite=...)` it returns a `Bound`, `METHODS[name].value(op)` is
the plain published number, and `side`, `valid_for`, `source`, `reads` and `doc` say what that number is. docs/methods.md has
the table and the proofs. To add one: a function `(op, **options) -> 0-d tensor` and a line here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gramlip.norm.certify import certify
from gramlip.norm.methods import formulas, power, spectral
from gramlip.norm.methods.method import Method
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Operator


@dataclass(frozen=True)
class _Certified(Method):
    """The library's own enclosure."""

    def __call__(self, op: Operator, *, rtol: float = 1e-2, finite: bool | str = "auto") -> Bound:
        return certify(op, rtol=rtol, finite=finite)

    def value(self, op: Operator, **options: object) -> float:
        return float(certify(op, **options).upper)  # type: ignore[arg-type]


def _enclosure(op: Operator) -> Tensor:
    """A proved interval, rounding included, closed to the width asked for; its value is the upper side."""
    return torch.tensor(float(certify(op).upper), dtype=torch.float64)


_ANY = "a matrix or a convolution of any geometry"
_CIRCULAR = "a matrix or a convolution with circular padding"

METHODS: dict[str, Method] = {
    "certify": _Certified("interval", "every operator", "docs/theory.md and docs/rounding.md", "blocks", _enclosure),
    "gram": Method("upper", _ANY, "arXiv 2305.16173 on the padding theorem's grid", "blocks", spectral.gram, keeps_graph=True),
    "delattre2023": Method(
        "upper",
        f"{_CIRCULAR} and a known input size",
        "arXiv 2305.16173, algorithms 2 and 3",
        "blocks",
        spectral.delattre2023,
        spectral.is_circular,
    ),
    "sedghi2019": Method(
        "exact",
        f"{_CIRCULAR} that keeps a known input size, stride 1",
        "arXiv 1805.10408, SVD of every frequency",
        "blocks",
        spectral.sedghi2019,
        spectral.is_exact_stride_1,
    ),
    "senderovich2022": Method(
        "exact",
        f"{_CIRCULAR} that keeps a known input size, and a stride that divides it",
        "arXiv 2211.13771, polyphase form of the convolution",
        "blocks",
        spectral.senderovich2022,
        spectral.is_exact,
    ),
    "araujo2021": Method("upper", f"{_ANY} (published for odd square kernels)", "arXiv 2006.08391, LipGrid", "kernel", spectral.araujo2021),
    "singla2021": Method("upper", f"{_ANY} (published for two axes)", "arXiv 1911.10258, Fantastic Four", "kernel", formulas.singla2021),
    "norm2toep": Method(
        "upper", _ANY, "arXiv 2402.00240, Gram iteration on the kernel", "kernel", formulas.norm2toep, slack=formulas.toeplitz_roundings
    ),
    "aol": Method(
        "upper", _ANY, "arXiv 2208.03160, almost orthogonal rescaling", "kernel", formulas.aol, slack=formulas.toeplitz_roundings
    ),
    "tensor_norm": Method("estimate", f"{_ANY} (published for two axes)", "arXiv 2409.11859, tensor norm", "kernel", formulas.tensor_norm),
    "frobenius": Method("upper", _ANY, "Cauchy and Schwarz over the taps, docs/methods.md#frobenius", "kernel", formulas.frobenius),
    "torch": Method("estimate", _ANY, "arXiv 1802.05957, the reshaped kernel", "kernel", formulas.torch_reshaped),
    "power": Method(
        "lower",
        "a matrix or a convolution of known input size",
        "arXiv 1905.05406, power iteration on the layer",
        "layer",
        power.power,
        lambda op: not isinstance(op, Conv) or op.input_size is not None,
    ),
}
