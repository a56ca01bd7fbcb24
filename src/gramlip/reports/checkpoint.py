"""Weights without their model: which tensor is a linear map, which is left out and why, and the audit of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from time import perf_counter

from gramlip.errors import InputError
from gramlip.norm.certify import TOGETHER, certify_all
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, checked
from gramlip.reports.readers import Entry, Stored
from gramlip.reports.report import LayerRow, LeftOut, Report

NOTES = (
    "From the weights alone: 2 axes are a matrix, 3 to 5 axes a convolution kernel (channels, channels, *kernel).",
    "upper holds for every input size, stride, dilation, number of groups, and for the transposed layer. lower is that of the stride-1 "
    "ungrouped convolution over all input sizes: a layer with a stride, groups or a small input may lie below it.",
    "Assumed: padding with zeros, or circular padding of at most kernel - 1 in all on each axis. "
    "Reflect and replicate padding may exceed upper.",
)
DOMINATES = (
    "stride-1 ungrouped operator: dominates every stride, dilation, grouping and the transpose (docs/weights-alone.md), "
    "where padding is with zeros or circular by at most kernel - 1 in all (assumed)"
)
_FLOATS = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128")
_SCALES = ("{}_scale", "{}_scale_inv", "{}_scale_2", "{}_scales", "{}.scale", "{}.absmax", "scale_{}", "scale", "scales", "SCB")
_OF = r"(?:words?|chars?|vocab|tok(?:ens?)?(?:_types?)?|segments?|(?:[a-z]+_)?pos(?:itions?|itional)?|query|label)"
_EMBED = r"emb(?:d|ed|eds|edding|eddings)?"
# The whole name: `embed` and `word_embeddings`, not `emb_proj` or `patch_embed`, which are as likely linear maps without a bias.
_EMBEDDING = re.compile(rf"({_OF}_?)?{_EMBED}(_({_OF}|table|in))?|wte|wpe|shared", re.I)
_TABLE = re.compile(
    rf"(^|_)(pos|position|positional|cls|class|mask|query|register)_?({_EMBED}|enc|encodings?|tokens?|table)$|(^|_)tokens?$", re.I
)
_NORM = re.compile(r"(^|_)(norm|bn|ln|gn|layer_?norm|batch_?norm|group_?norm|rms_?norm)\d*$", re.I)
_BIAS = re.compile(r"(^|_)bias(es)?(_|$)", re.I)
Watch = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True)
class Weights:
    """Stored tensors as a source of operators; `target` is what the user typed."""

    target: str
    stored: Stored

    def sort(self) -> tuple[list[str], tuple[LeftOut, ...]]:
        """The names of the linear maps, and what is left out.

        Raises:
            InputError: nothing to bound.
        """
        entries = self.stored.entries
        scales = {scale: name for name in entries for scale in _scales(name, entries)}
        reasons = {name: left_out_of(name, entries, scales) for name in entries}
        kept = [name for name, out in reasons.items() if out is None]
        left_out = [out for out in reasons.values() if out is not None]
        if not kept:
            first = next((out for out in left_out if out.is_weight), left_out[0] if left_out else None)
            given = f"{first.name}: {first.reason}" if first else "no tensor at all"
            advice = "type package.module:callable, which makes the model" if first and first.is_weight else "save model.state_dict()"
            msg = f"{self.target} holds nothing to bound ({given}); expected matrices or convolution kernels: {advice}"
            raise InputError(msg)
        left_out += [LeftOut(name, (), "state of training") for name in self.stored.skipped]
        return kept, tuple(left_out)

    def operator(self, name: str) -> Dense | Conv:
        """The operator that dominates the layer of this tensor: a matrix, or a stride-1 ungrouped convolution of every size."""
        try:
            weight = checked(self.stored.entries[name].load(), name)
        except InputError as error:
            msg = f"{self.target}: {error}"
            raise InputError(msg) from error
        return Dense(weight) if weight.ndim == 2 else Conv(weight)

    def operators(self) -> Iterator[tuple[str, Dense | Conv]]:
        """Every linear map by name, read one at a time."""
        for name in self.sort()[0]:
            yield name, self.operator(name)

    def audit(self, *, rtol: float = 1e-2, watch: Watch = iter) -> Report:
        """The report: for each linear map an interval with `upper` at least the layer's norm; `watch` may show progress.

        Proof that the operator dominates the layer: docs/weights-alone.md.

        Raises:
            InputError: NaN or infinite entries, an axis of size zero, nothing to bound.
        """
        kept, left_out = self.sort()
        for name in kept:  # all of them before the work starts
            self.operator(name)
        rows: dict[str, LayerRow] = {}
        for name in watch(kept):
            if name not in rows:
                rows |= self._rows(self._alike(name, kept), rtol)
        return Report(self.target, tuple(rows[name] for name in kept), left_out, notes=(*NOTES, *self.stored.notes))

    def _alike(self, name: str, kept: list[str]) -> list[str]:
        """The tensors that are bounded together with this one: those of its shape, where it is small."""
        shape = self.stored.entries[name].shape
        if prod(shape) > TOGETHER:
            return [name]
        return [other for other in kept if self.stored.entries[other].shape == shape]

    def _rows(self, names: list[str], rtol: float) -> dict[str, LayerRow]:
        start = perf_counter()
        ops = [self.operator(name) for name in names]
        bounds = certify_all(ops, rtol=rtol)
        seconds = (perf_counter() - start) / len(names)
        return {name: _row(name, op, found, seconds) for name, op, found in zip(names, ops, bounds, strict=True)}


def _row(name: str, op: Dense | Conv, found: Bound, seconds: float) -> LayerRow:
    if isinstance(op, Conv):
        found = Bound(found.lower, found.upper, f"{found.because}; {DOMINATES}")
    kind = "Dense" if isinstance(op, Dense) else f"Conv{op.dims}d"
    return LayerRow(name, kind, tuple(op.weight.shape), None, found, seconds)


def left_out_of(name: str, entries: Mapping[str, Entry], scales: Mapping[str, str]) -> LeftOut | None:
    """Why this tensor is not bounded, None where it is; a weight whose layer cannot be known from it is marked so.

    `scales` gives the weight of each scale.
    """
    shape, dtype = entries[name].shape, entries[name].dtype
    if name in scales:
        return LeftOut(name, shape, "the scale of a quantised weight")
    for reason in (entries[name].out, _parametrized(name, entries), _no_map(name, entries)):
        if reason is not None:
            return LeftOut(name, shape, reason[0], reason[1])
    if dtype not in _FLOATS:
        return LeftOut(name, shape, _quantised(name, entries), True)
    if len(shape) > 5:
        return LeftOut(name, shape, f"{len(shape)} axes: no convolution of 1 to 3 dimensions", True)
    return None


def _scales(name: str, entries: Mapping[str, Entry]) -> list[str]:
    """The tensors beside a quantised weight that have a usual name for its scale, and fewer numbers than it."""
    stem, dot, leaf = name.rpartition(".")
    entry = entries[name]
    if len(entry.shape) < 2 or entry.dtype in _FLOATS or not ("weight" in leaf or entry.dtype.startswith("float8")):
        return []
    beside = (f"{stem}{dot}{form.format(leaf)}" for form in _SCALES)
    return [scale for scale in beside if scale in entries and prod(entries[scale].shape) < prod(entry.shape)]


def _quantised(name: str, entries: Mapping[str, Entry]) -> str:
    """Why the numbers that are stored for a weight are not the layer's."""
    dtype, (stem, dot, leaf) = entries[name].dtype, name.rpartition(".")
    if scales := [scale.removeprefix(f"{stem}{dot}") for scale in _scales(name, entries)]:
        return (
            f"{dtype} entries, to be multiplied by the scale beside them, {' and '.join(scales)}: audit the model, package.module:callable"
        )
    if dtype.startswith("float8"):
        looked = f"no scale beside them such as {_SCALES[0].format(leaf)}"
        return f"{dtype} entries, and {looked}: if they are the weights themselves, type gramlip.bound(tensor)"
    return f"{dtype} entries: quantised with a scale kept elsewhere, or a format that is not read"


def _parametrized(name: str, entries: Mapping[str, Entry]) -> tuple[str, bool] | None:
    """Tensors from which torch computes the weight that the layer uses: that weight is not in the file."""
    matrix = len(entries[name].shape) > 1
    what, tensor = "a parametrization", name
    if (found := re.search(r"(?:^|\.)parametrizations\.\w+\.", name)) is not None:
        stem, rest = name[: found.end()], name[found.end() :]
        if not rest.startswith("original"):
            return "a part of a parametrization", False
        what = "weight_norm" if f"{stem}original1" in entries else "spectral_norm" if f"{stem}0._u" in entries else what
        matrix = matrix and rest != "original0"
    elif name.endswith("_orig"):
        tensor = name.removesuffix("_orig")
        what = "pruning" if f"{tensor}_mask" in entries else "spectral_norm" if f"{tensor}_u" in entries else what
    elif name.endswith(("_u", "_v", "_mask")) and f"{name.rpartition('_')[0]}_orig" in entries:
        return "what torch's spectral_norm or pruning keeps beside a weight", False
    elif name.endswith(("_g", "_v")) and {f"{name[:-2]}_g", f"{name[:-2]}_v"} <= set(entries):
        what, matrix = "weight_norm", name.endswith("_v")
    else:
        return None
    return f"raw tensor of {what}: the layer's own weight is not stored; remove it before saving (remove_parametrizations)", matrix


def _no_map(name: str, entries: Mapping[str, Entry]) -> tuple[str, bool] | None:
    """Tensors that no linear map of the input is made of."""
    entry, (stem, _, leaf) = entries[name], name.rpartition(".")
    module, axes = stem.rpartition(".")[2], len(entry.shape)
    bias = entries.get(f"{stem}.bias" if stem else "bias")
    reason = None
    if leaf in ("running_mean", "running_var", "num_batches_tracked"):
        reason = "running statistics of a normalisation"
    elif entry.dtype == "bool" or (entry.dtype not in _FLOATS and "int" in entry.dtype and "weight" not in leaf):
        reason = f"{entry.dtype} entries: a counter, an index or a mask"
    elif axes == 0:
        reason = "a single number"
    elif _BIAS.search(leaf):
        reason = "a bias: added, stretches nothing"
    elif axes == 1:
        reason = "one axis: the scale of a normalisation" if leaf in ("weight", "gamma", "scale") else "one axis: no matrix"
    elif (bias is not None and bias.shape == entry.shape) or (leaf == "weight" and _NORM.search(module)):
        reason = "the scale of a normalisation, entry by entry"
    elif _TABLE.search(leaf) or (axes == 2 and bias is None and _EMBEDDING.fullmatch(module if leaf == "weight" else leaf)):
        reason = "named as an embedding: rows that are looked up or added, no map of the input"
    return None if reason is None else (reason, False)
