"""Weights without their model: which tensors are linear maps, which are left out for which reason, and the audit of the maps."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from hashlib import blake2b
from math import prod
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from gramlip import distributed
from gramlip.distributed import IN_PARTS, everywhere, gathered, ranked, share, world
from gramlip.errors import InputError, out_of_memory
from gramlip.norm.certify import TOGETHER, certify_all
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, checked
from gramlip.reports.output import write_whole
from gramlip.reports.readers import Entries, Entry, Stored, line
from gramlip.reports.report import LayerRow, LeftOut, Report

NOTES = (
    "from weights alone: upper holds for every input size, stride, dilation and number of groups, and for the transposed layer; "
    "lower is that of the layer with stride 1 and without groups, over all input sizes",
    "assumed: padding with zeros, or circular padding of at most kernel - 1 in all on each axis; reflect and replicate padding may "
    "exceed upper",
)
DOMINATES = (
    "stride-1 ungrouped operator: dominates every stride, dilation, grouping and the transpose (docs/weights-alone.md), "
    "where padding is with zeros or circular by at most kernel - 1 in all (assumed)"
)
_FLOATS = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128")
_SCALES = ("{}_scale", "{}_scale_inv", "{}_scale_2", "{}_scales", "{}.scale", "{}.absmax", "scale_{}", "scale", "scales", "SCB")
_OF = r"(?:words?|chars?|vocab|tok(?:ens?)?(?:_types?)?|segments?|(?:[a-z]+_)?pos(?:itions?|itional)?|query|label)"
_EMBED = r"emb(?:d|ed|eds|edding|eddings)?"
# Whole names only: `embed` and `word_embeddings`, but not `emb_proj` or `patch_embed`, which may be linear maps without a bias.
_EMBEDDING = re.compile(rf"({_OF}_?)?{_EMBED}(_({_OF}|table|in))?|wte|wpe|shared", re.I)
_TABLE = re.compile(
    rf"(^|_)(pos|position|positional|cls|class|mask|query|register)_?({_EMBED}|enc|encodings?|tokens?|table)$|(^|_)tokens?$", re.I
)
_NORM = re.compile(r"(^|_)(norm|bn|ln|gn|layer_?norm|batch_?norm|group_?norm|rms_?norm)\d*$", re.I)
_BIAS = re.compile(r"(^|_)bias(es)?(_|$)", re.I)
Watch = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True)
class Weights:
    """Stored tensors as a source of operators; `target` is the name that the user typed.

    An audit begins nothing more after `time_limit` seconds.
    """

    target: str
    stored: Stored
    time_limit: float | None = None

    def sort(self) -> tuple[list[str], tuple[LeftOut, ...]]:
        """The names of the linear maps, and the tensors that are left out.

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

    @cached_property
    def entries(self) -> Entries:
        """The stored tensors; 8-bit codes are multiplied by their scale if its shape shows how."""
        return {name: _rescaled(name, self.stored.entries) for name in self.stored.entries}

    def operator(self, name: str) -> Dense | Conv:
        """The operator that dominates the layer of this tensor: a matrix, or a stride-1 ungrouped convolution for every input size."""
        return self._mapped(name)[0]

    def _mapped(self, name: str) -> tuple[Dense | Conv, Callable[[Bound], Bound]]:
        """The operator, and a function from its interval to that of the tensor. They differ only for a product that is never formed."""
        factors = self.entries[name].factors
        try:
            if factors is None:
                return _map(_loaded(self.entries[name], name)), lambda found: found
            left, right = (_loaded(factor, name).double() for factor in factors[:2])
        except InputError as error:
            raise self._refused(error) from error
        return low_rank(left, right, factors[2])

    def operators(self) -> Iterator[tuple[str, Dense | Conv]]:
        """Every linear map by name, read one at a time."""
        for name in self.sort()[0]:
            yield name, self.operator(name)

    def audit(self, *, rtol: float = 1e-2, watch: Watch = iter, journal: Path | None = None) -> Report:
        """The report: for each linear map an interval whose `upper` is at least the layer's norm; `watch` may show progress.

        Ranks of a process group share the work by its estimated cost, and all get the report; a matrix that takes more than a rank's
        part of all work is bounded by all together. A `journal` stores finished rows at once; rows that it holds already are not
        computed again. What is not begun within the time limit is listed as a weight without a bound; each rank bounds something.

        Proof that the operator dominates the layer: docs/weights-alone.md.

        Raises:
            InputError: NaN or infinite entries, an axis of size zero, nothing to bound, a journal of another checkpoint.
        """
        kept, left_out = self.sort()
        opened: list[Journal] = []

        def rows_before() -> dict[str, LayerRow]:
            opened.extend([] if journal is None else [Journal(journal, self._fingerprint(kept, rtol), ranked())])
            return opened[0].rows if opened else {}

        done = {name: row for rows in everywhere(rows_before) for name, row in rows.items()}
        run = _Run(self, rtol, done, opened[0] if opened else None, perf_counter())
        apart, groups = self._shared(kept)
        mine = [groups[i] for i in share([self.cost(group) for group in groups])]
        everywhere(lambda: run.look(apart, mine))
        run.in_parts(apart)
        rows = {name: row for part in everywhere(lambda: run.alone(mine, watch)) for name, row in part.items()}
        out = tuple(self._not_begun(name, journal) for name in kept if name not in rows)
        return Report(
            self.target, tuple(rows[name] for name in kept if name in rows), (*out, *left_out), notes=(*NOTES, *self.stored.notes)
        )

    def _not_begun(self, name: str, journal: Path | None) -> LeftOut:
        how = "type the same line again to go on" if journal is not None else "type --resume JOURNAL, and the same line again, to go on"
        return LeftOut(name, self.entries[name].shape, f"not begun within {self.time_limit:g} seconds (--time-limit): {how}", True)

    def _groups(self, kept: list[str]) -> list[list[str]]:
        """Groups of tensors to bound together: small tensors of one shape, up to 64 in a group."""
        groups: dict[object, list[list[str]]] = {}
        for name in kept:
            shape = self.entries[name].shape
            alike = groups.setdefault(shape if prod(shape) <= TOGETHER else name, [[]])
            if len(alike[-1]) == 64:
                alike.append([])
            alike[-1].append(name)
        return [group for alike in groups.values() for group in alike]

    def cost(self, group: list[str]) -> float:
        """The estimated work of bounding these tensors together."""
        m, n, *k = self.entries[group[0]].shape
        return float(len(group) * m * n * min(m, n) * prod(k))

    def _shared(self, kept: list[str]) -> tuple[list[str], list[list[str]]]:
        """The matrices that all ranks bound together, each dearer than a rank's part of all work; and the groups for one rank each."""
        groups = self._groups(kept)
        part = sum(self.cost(group) for group in groups) / world()
        apart = [group for group in groups if world() > 1 and self.cost(group) > part and self._may_part(group[0])]
        return [group[0] for group in apart], [group for group in groups if group not in apart]

    def _may_part(self, name: str) -> bool:
        entry = self.entries[name]
        return len(entry.shape) == 2 and entry.factors is None and prod(entry.shape) > IN_PARTS

    def _fingerprint(self, kept: list[str], rtol: float) -> dict[str, object]:
        """A fingerprint of the files and of what they hold, which ties a journal to them."""
        files = [[file.name, status.st_size, status.st_mtime_ns] for file in self.stored.files for status in (file.stat(),)]
        tensors = [[name, list(self.entries[name].shape), self.entries[name].dtype] for name in kept]
        digest = blake2b(json.dumps(tensors).encode(), digest_size=16).hexdigest()
        return {"rtol": rtol, "files": files, "tensors": digest}

    def digest(self, name: str) -> str:
        """A fingerprint of a tensor, which ties a row of a journal to it."""
        entry, digest = self.entries[name], blake2b(digest_size=16)
        for part in entry.factors[:2] if entry.factors is not None else (entry,):
            digest.update(part.load().detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def parted(self, name: str) -> Dense:
        """The matrix in parts, of which every rank reads its own."""
        entry = self.entries[name]
        m, n = entry.shape
        try:
            weight = distributed.sharded((m, n), lambda axis, start, stop: _read(lambda: entry.part(axis, start, stop), name))
            return Dense(checked(weight, name))
        except InputError as error:
            raise self._refused(error) from error

    def _refused(self, error: InputError) -> InputError:
        return InputError(f"{self.target}: {error}")

    def rows(self, names: list[str], rtol: float) -> dict[str, LayerRow]:
        """The rows of tensors that are bounded together."""
        start = perf_counter()
        maps = [self._mapped(name) for name in names]
        bounds = certify_all([op for op, _ in maps], rtol=rtol)
        seconds = (perf_counter() - start) / len(names)
        parts = zip(names, maps, bounds, strict=True)
        return {name: _row(name, op, says(bound), seconds, self.entries[name]) for name, (op, says), bound in parts}


class _Run:
    """A rank's part of an audit of weights: what is done, where it is kept, and until when something may begin."""

    def __init__(self, weights: Weights, rtol: float, done: dict[str, LayerRow], journal: Journal | None, begun: float) -> None:
        """Nothing is begun yet."""
        self._weights, self._rtol, self._done, self._journal = weights, rtol, done, journal
        self._end = math.inf if weights.time_limit is None else begun + weights.time_limit

    def look(self, apart: list[str], groups: list[list[str]]) -> None:
        """Check all tensors before the work starts: those of the journal have not changed, and, unless time is limited, all are finite.

        Matrices in parts are checked when they are read.
        """
        names = [name for group in groups for name in group]
        for name in (*apart, *names):
            self._check(name)
        for name in names if self._end == math.inf else ():
            self._weights.operator(name)

    def in_parts(self, names: list[str]) -> None:
        """Bound matrices together with the other ranks, as many at a time as there are ranks; each is kept by one of them."""
        left = [name for name in names if name not in self._done]
        for start in range(0, len(left), world()):
            batch, begun = left[start : start + world()], perf_counter()
            if any(gathered(start > 0 and begun > self._end)):
                return
            ops = [self._weights.parted(name) for name in batch]
            bounds, entries = distributed.bounds(ops, rtol=self._rtol), self._weights.entries
            seconds = (perf_counter() - begun) / len(batch)
            rows = {name: _row(name, op, b, seconds, entries[name]) for name, op, b in zip(batch, ops, bounds, strict=True)}
            self._done |= rows
            own = batch[ranked() : ranked() + 1]
            everywhere(lambda own=own, rows=rows: self._keep({name: rows[name] for name in own}))

    def alone(self, groups: list[list[str]], watch: Watch) -> dict[str, LayerRow]:
        """Bound the groups that are left, and return all rows that this rank has; the cheapest come first under a time limit."""
        done, begun = self._done, False
        names = [name for group in (groups if self._end == math.inf else sorted(groups, key=self._weights.cost)) for name in group]
        places = {name: group for group in groups for name in group}
        for name in watch([name for name in names if name not in done]):
            if begun and perf_counter() > self._end:
                break
            if name not in done:
                rows = self._weights.rows(places[name], self._rtol)
                self._keep(rows)
                done |= rows
                begun = True
        return done

    def _check(self, name: str) -> None:
        """Raise an InputError if the journal holds a row of another tensor of this name."""
        journal = self._journal
        if journal is None or name not in self._done or name not in journal.digests:
            return
        if journal.digests[name] != self._weights.digest(name):
            target = self._weights.target
            msg = f"{journal.path} is of another {target}: {name} has changed; expected the same weights: type a new --resume FILE"
            raise InputError(msg)

    def _keep(self, rows: dict[str, LayerRow]) -> None:
        if self._journal is not None and rows:
            self._journal.add(rows, {name: self._weights.digest(name) for name in rows})


def _loaded(entry: Entry, name: str) -> Tensor:
    return checked(_read(entry.load, name), name)


def _read(load: Callable[[], Tensor], name: str) -> Tensor:
    try:
        return load()
    except InputError:
        raise
    except Exception as error:  # reading the numbers of a damaged file can raise any exception
        if out_of_memory(error):
            raise
        msg = f"{name} cannot be read ({line(error)}); expected a whole file: fetch or save it again"
        raise InputError(msg) from error


def _map(weight: Tensor) -> Dense | Conv:
    return Dense(weight) if weight.ndim == 2 else Conv(weight)


def _row(name: str, op: Dense | Conv, bound: Bound, seconds: float, entry: Entry) -> LayerRow:
    because = "; ".join([bound.because, *([DOMINATES] if isinstance(op, Conv) else []), *([entry.because] if entry.because else [])])
    kind = "Dense" if isinstance(op, Dense) else f"Conv{op.dims}d"
    return LayerRow(name, kind, entry.shape, None, Bound(bound.lower, bound.upper, because), seconds)


# ---- products that are never formed --------------------------------------------------------------------------------------

_UNDERFLOW = 2.0**-950  # more than the sum of 2^70 products that were flushed to zero


def low_rank(left: Tensor, right: Tensor, scale: float) -> tuple[Dense | Conv, Callable[[Bound], Bound]]:
    """A small operator in place of `scale B A`, and the function from its interval to that of the product: docs/weights-alone.md#adapters.

    Args:
        left: B, (m, r) in float64.
        right: A, (r, n, *k) in float64.
        scale: the factor of the product.
    """
    if not bool(left.any()) or not bool(right.any()) or scale == 0.0:
        return _map(right.new_zeros(1, 1, *right.shape[2:])), lambda _: Bound(0.0, 0.0, "a factor is zero")
    small, residual, skew = _triangular(left)
    other, other_residual, other_skew = right.flatten(1), 0.0, 0.0
    if right.ndim == 2:
        other, other_residual, other_skew = _triangular(right.T)
        other = other.T
    core, size, root = small @ other, rd.frobenius_up(left), rd.sqrt_up(float(prod(right.shape[2:])))
    product = rd.mul_up(rd.frobenius_up(small), rd.frobenius_up(other))
    rounding = rd.mul_up(root, rd.add_up(rd.mul_up(rd.gamma(len(other) + 1), product), _UNDERFLOW))
    rest = rd.add_up(rd.mul_up(residual, rd.frobenius_up(right)), rd.mul_up(rd.add_up(size, residual), other_residual))
    rest = rd.mul_up(root, rest)

    def says(bound: Bound) -> Bound:
        spread = rd.mul_up(rd.sqrt_up(rd.add_up(1.0, skew)), rd.sqrt_up(rd.add_up(1.0, other_skew)))
        upper = rd.add_up(rd.mul_up(spread, rd.add_up(float(bound.upper), rounding)), rest)
        shrunk = rd.mul_down(rd.sqrt_down(max(0.0, rd.down(1.0 - skew))), rd.sqrt_down(max(0.0, rd.down(1.0 - other_skew))))
        lower = rd.down(rd.mul_down(shrunk, max(0.0, rd.down(bound.lower - rounding))) - rest)
        because = f"{bound.because}; {PRODUCT}"
        return Bound(max(0.0, rd.mul_down(abs(scale), max(0.0, lower))), rd.mul_up(abs(scale), upper), because)

    return _map(core if right.ndim == 2 else core.reshape(len(core), *right.shape[1:])), says


PRODUCT = "scale B A through the triangular factors of B and A^T, rounding included (docs/weights-alone.md)"


def _triangular(tall: Tensor) -> tuple[Tensor, float, float]:
    """R of tall = Q R, and upper bounds of the norms of `tall - Q R` and `Q^T Q - 1`."""
    q, r = torch.linalg.qr(tall)
    span, size = float(r.shape[0]), rd.frobenius_up(q)
    left = rd.frobenius_up(tall - q @ r)
    residual = rd.add_up(left, rd.mul_up(rd.gamma(span + 2), rd.add_up(rd.mul_up(size, rd.frobenius_up(r)), rd.frobenius_up(tall))))
    gram = q.T @ q
    gram.diagonal().sub_(1.0)
    skew = rd.add_up(rd.frobenius_up(gram), rd.mul_up(rd.gamma(len(tall) + 2.0), rd.add_up(rd.mul_up(size, size), span)))
    return r, rd.add_up(residual, _UNDERFLOW), rd.add_up(skew, _UNDERFLOW)


class Journal:
    """A file of finished rows, one line for each group of them; a truncated line is ignored.

    Each rank writes its own file and reads those of all ranks.

    Raises:
        InputError: the file belongs to another checkpoint or another `rtol`.
    """

    def __init__(self, path: Path, fingerprint: dict[str, object], rank: int) -> None:
        self.path = path.with_name(f"{path.name}.{rank}") if rank else path
        self.rows: dict[str, LayerRow] = {}
        self.digests: dict[str, str] = {}
        header = {"gramlip journal": 1, **fingerprint}
        for file in [path, *sorted(path.parent.glob(f"{escape(path.name)}.[0-9]*"))]:
            if file.is_file() and file.stat().st_size:
                self._read(file, header)
        if not self.path.is_file() or not self.path.stat().st_size:
            write_whole(self.path, json.dumps(header) + "\n")

    def _read(self, file: Path, header: dict[str, object]) -> None:
        whole, _, cut = file.read_bytes().rpartition(b"\n")
        try:
            first_line, *groups = [json.loads(text) for text in whole.splitlines()]
        except ValueError as error:
            msg = f"--resume {file} is damaged ({error}); expected the lines that --resume wrote: type a new name"
            raise InputError(msg) from None
        if first_line != header:
            changed = ", ".join(key for key in header if first_line.get(key) != header[key])
            msg = f"--resume {file} was written for another audit ({changed} changed); expected the same files and width: type a new name"
            raise InputError(msg)
        for group in groups:
            for row in group:
                upper = math.inf if row["upper"] is None else row["upper"]
                bound = Bound(row["lower"], upper, row["because"])
                self.rows[row["name"]] = LayerRow(row["name"], row["op"], tuple(row["weight_shape"]), None, bound, row["seconds"])
                self.digests[row["name"]] = row["digest"]
        if cut and file == self.path:
            os.truncate(file, len(whole) + 1)

    def add(self, rows: Mapping[str, LayerRow], digests: Mapping[str, str]) -> None:
        """Store rows of one group; they are on the disk when this returns."""
        text = json.dumps([row.to_dict() | {"digest": digests[name]} for name, row in rows.items()], allow_nan=False)
        with self.path.open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


def left_out_of(name: str, entries: Mapping[str, Entry], scales: Mapping[str, str]) -> LeftOut | None:
    """The reason why this tensor is not bounded, or None if it is; a weight whose layer is unknown is marked.

    `scales` gives the weight of each scale.
    """
    shape, dtype = entries[name].shape, entries[name].dtype
    if name in scales:
        return LeftOut(name, shape, "the scale of a quantised weight")
    for reason in (entries[name].out, _parametrized(name, entries), _no_map(name, entries)):
        if reason is not None:
            return LeftOut(name, shape, reason[0], reason[1])
    if dtype not in _FLOATS and _rescaled(name, entries) is entries[name]:
        return LeftOut(name, shape, _quantised(name, entries), True)
    if len(shape) > 5:
        return LeftOut(name, shape, f"{len(shape)} axes: no convolution of 1 to 3 dimensions", True)
    return None


def _scales(name: str, entries: Mapping[str, Entry]) -> list[str]:
    """The tensors beside a quantised weight that have a usual name of a scale, and fewer entries than the weight."""
    stem, dot, leaf = name.rpartition(".")
    entry = entries[name]
    if len(entry.shape) < 2 or entry.dtype in _FLOATS or not ("weight" in leaf or entry.dtype.startswith("float8")):
        return []
    beside = (f"{stem}{dot}{form.format(leaf)}" for form in _SCALES)
    return [scale for scale in beside if scale in entries and prod(entries[scale].shape) < prod(entry.shape)]


def _rescaled(name: str, entries: Mapping[str, Entry]) -> Entry:
    """An 8-bit weight times its scale: one number, one for each row or column, or one for each block of 2^k x 2^k."""
    entry, scales = entries[name], _scales(name, entries)
    if not entry.dtype.startswith("float8") or len(scales) != 1 or len(entry.shape) != 2:
        return entry
    scale, leaf = entries[scales[0]], scales[0].rpartition(".")[2]
    if scale.dtype not in _FLOATS[:4] or "weight" not in leaf:
        return entry
    sizes = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1) if len(scale.shape) == 1 else (1, 1)
    blocks = [_block(count, of) for count, of in zip(sizes, entry.shape, strict=True)]
    if None in blocks:
        return entry
    rows, columns = (block or 1 for block in blocks)

    def load() -> Tensor:
        factors = scale.load().double().reshape(sizes).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return entry.load().double() * factors[: entry.shape[0], : entry.shape[1]]  # exact: 4 bits of a code times 24 of a scale

    blocked = "" if sizes[0] in (1, entry.shape[0]) and sizes[1] in (1, entry.shape[1]) else f" in blocks of {rows}x{columns}"
    return Entry(entry.shape, "float64", load, f"{entry.dtype} codes times {leaf}{blocked}")


def _block(count: int, of: int) -> int | None:
    """The number of entries of an axis that share a scale: all, one, or the power of two that gives this number of blocks."""
    if count in (1, of):
        return of // count
    powers = [1 << k for k in range(4, 10) if -(-of // (1 << k)) == count]
    return powers[0] if len(powers) == 1 else None


def _quantised(name: str, entries: Mapping[str, Entry]) -> str:
    """The reason why the stored numbers of a weight are not those of the layer, or None."""
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
    """Tensors from which torch computes the layer's weight, which itself is not in the file."""
    matrix = len(entries[name].shape) > 1
    what, tensor = "a parametrization", name
    if (match := re.search(r"(?:^|\.)parametrizations\.\w+\.", name)) is not None:
        stem, rest = name[: match.end()], name[match.end() :]
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
    """Tensors that are not part of a linear map of the input."""
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
        reason = "the scale of a normalisation: one axis" if leaf in ("weight", "gamma", "scale") else "a vector: no matrix"
    elif (bias is not None and bias.shape == entry.shape) or (leaf == "weight" and _NORM.search(module)):
        reason = "the scale of a normalisation, entry by entry"
    elif _TABLE.search(leaf) or (axes == 2 and bias is None and _EMBEDDING.fullmatch(module if leaf == "weight" else leaf)):
        reason = "named as an embedding: rows that are looked up or added, no map of the input"
    return None if reason is None else (reason, False)
