"""Weights from files: safe readers, and which tensor is a linear map. No code of a file is ever executed."""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from time import perf_counter
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from gramlip.errors import InputError, first_line
from gramlip.norm.certify import TOGETHER, certify_all
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, checked
from gramlip.reports.report import LayerRow, LeftOut, Report
from gramlip.reports.text import printable

# ---- safe readers --------------------------------------------------------------------------------------------------------
#
# Safe readers of weights: safetensors, sharded or not, and torch checkpoints. No code of a file is ever executed.

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{f"{letter}{bits}": f"{name}{bits}" for letter, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CONTAINERS = re.compile(
    r"checkpoint|module|net(work)?|params|weights|((model|net)_)?state|(model_)?ema|ema_model|model|((model|net|ema|model_ema)_)?state_dict"
)
_DEEPEST = 100
"""So many containers inside one another are no checkpoint: one that holds itself has no end."""
_TRAINING = re.compile(r"optim|sched|scaler|rng|callbacks|loops|hyper_parameters", re.I)


@dataclass(frozen=True)
class Entry:
    """A stored tensor: its shape and dtype are known, its values are read by `load`."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> Entry:
        """A tensor that is in memory already."""
        return Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor.detach())


Entries = dict[str, Entry]


@dataclass(frozen=True)
class Stored:
    """The tensors of a file by name, and the names of the parts that were passed over: the state of training."""

    entries: Entries
    skipped: tuple[str, ...] = ()


def read(path: Path) -> Stored:
    """The tensors of a weights file in the file's order, without containers and prefixes such as `state_dict` and `module.`.

    `.safetensors`, a sharded `.safetensors.index.json`, or a torch checkpoint (zip or legacy) read with `weights_only=True`.

    Raises:
        InputError: the file is missing, corrupt, wants to run code, or holds no tensor.
    """
    check_file(path)
    start, skipped = _first_bytes(path), list[str]()
    pickled = start[8:9] != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80")
    if path.suffix == ".json":
        entries = _sharded(path)
    elif path.suffix == ".safetensors" and pickled:
        msg = f"{path} is a torch checkpoint by its content; expected safetensors: type mv {path} {path.with_suffix('.pt')}"
        raise InputError(msg)
    elif path.suffix == ".safetensors" or start[8:9] == b"{":
        entries = _safetensors(path)
    elif pickled:
        entries = _containers(_torch(path), skipped, path)
    else:
        msg = f"{path} is no weights file; expected safetensors or a torch checkpoint: type torch.save(model.state_dict(), path)"
        raise InputError(msg)
    if not entries:
        msg = f"{path} holds no tensor; expected the weights of a model: save model.state_dict()"
        raise InputError(msg)
    return Stored(_unwrapped(entries), tuple(skipped))


def _first_bytes(path: Path) -> bytes:
    """The start of a file, by which its format is known."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        msg = f"{path} does not exist; expected a weights file or a name such as demo: check the path"
        raise InputError(msg) from None
    except OSError as error:
        msg = f"{path} cannot be opened ({error.strerror}); expected a weights file that can be read"
        raise InputError(msg) from None
    if not start:
        msg = f"{path} is empty; expected weights, as safetensors or as torch.save writes them"
        raise InputError(msg)
    return start


def check_file(path: Path) -> None:
    """InputError for a folder, and for a pipe or a device, which would keep its reader waiting."""
    if path.is_dir():
        msg = f"{path} is a folder; expected a file: type for instance {path / 'model.safetensors'}"
        raise InputError(msg)
    if path.exists() and not path.is_file():
        msg = f"{path} is no regular file but a pipe or a device; expected a file: write it to one first"
        raise InputError(msg)


def read_bytes(data: bytes, order: Sequence[str] = ()) -> Stored:
    """The tensors of a safetensors file that is in memory: first those that `order` names, in that order."""
    tensors = load_bytes(data)
    names = [*(name for name in order if name in tensors), *in_order(set(tensors).difference(order))]
    return Stored({name: Entry.of(tensors[name]) for name in names})


def in_order(names: Iterable[str]) -> list[str]:
    """Names with their numbers as numbers: safetensors sorts by the alphabet, where layer 10 stands before layer 2.

    >>> in_order(["layers.10.weight", "layers.2.weight"])
    ['layers.2.weight', 'layers.10.weight']
    """
    return sorted(names, key=lambda name: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)])


def _safetensors(path: Path) -> Entries:
    try:
        file: Any = safe_open(path, framework="pt")  # stays open: the values are read when asked for
        names = in_order(file.keys())
        slices: dict[str, Any] = {name: file.get_slice(name) for name in names}
        dtypes: dict[str, str] = {name: s.get_dtype() for name, s in slices.items()}
        shapes: dict[str, tuple[int, ...]] = {name: tuple(s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        msg = f"{path} cannot be read as safetensors ({_line(error)}); expected a whole file: fetch or save it again"
        raise InputError(msg) from None

    def loader(name: str) -> Callable[[], Tensor]:
        return lambda: file.get_tensor(name)

    return {name: Entry(shapes[name], _DTYPES.get(dtypes[name], dtypes[name]), loader(name)) for name in names}


def _sharded(path: Path) -> Entries:
    """The shards of an index, whole, since loaders read them so; they lie beside it: an index cannot point anywhere else."""
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        msg = f"{path} is no JSON ({_line(error)}); expected a safetensors index with a weight_map"
        raise InputError(msg) from None
    shards: Any = cast("dict[str, Any]", index).get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in cast("dict[str, Any]", shards).values()):
        msg = f"{path} has no weight_map; expected a safetensors index: {{'weight_map': {{tensor: file}}}}"
        raise InputError(msg)
    places = cast("dict[str, str]", shards)
    files: dict[str, Entries] = {}
    for shard in dict.fromkeys(places.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            msg = f"{path} names the shard {shard!r}; expected a .safetensors file beside the index"
            raise InputError(msg)
        if not (path.parent / shard).is_file():
            msg = f"{path} names the shard {shard}, which does not exist; expected all shards beside the index: fetch it"
            raise InputError(msg)
        files[shard] = _safetensors(path.parent / shard)
    missing = [name for name, shard in places.items() if name not in files[shard]]
    if missing:
        msg = f"{path} places {missing[0]} in {places[missing[0]]}, which lacks it; expected the shards of this index: fetch them again"
        raise InputError(msg)
    entries = {name: files[shard][name] for name, shard in places.items()}
    for shard, held in files.items():
        for name in held:
            if places.get(name, shard) != shard or (name not in places and name in entries):
                raise _same_name(path, name)
            entries[name] = held[name]
    return entries


def _torch(path: Path) -> Any:
    """What `torch.load(weights_only=True)` returns; refused where it would need more than tensors and plain containers."""
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        msg = (
            f"{path} is a pickle, and one can make torch {torch.__version__} run code (CVE-2026-24747); expected torch 2.10 or newer: "
            f"type pip install --upgrade torch, or save the weights as safetensors"
        )
        raise InputError(msg)
    try:
        _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        wanted = [found[1]] if found else _globals(path)
        asks = f"it wants to run {', '.join(wanted)}" if wanted else "its pickle is none that torch.save writes"
        msg = f"{path} was refused, unexecuted: {asks}; expected tensors alone: save model.state_dict(), or safetensors"
        raise InputError(msg) from None
    except Exception as error:  # a damaged file can raise anything; none of it is a defect of ours
        msg = f"{path} cannot be read as a torch checkpoint ({_line(error)}); expected what torch.save(model.state_dict()) writes"
        raise InputError(msg) from None


def _check_sums(path: Path) -> None:
    """Refuse a zip file whose records do not have their checksums: torch itself reads on."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        msg = f"{path} is damaged: {bad} does not have its checksum; expected a whole file: fetch or save it again"
        raise InputError(msg)


def _globals(path: Path) -> list[str]:
    """What the pickles of a file import, found by reading their instructions without following them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return list(_imports(BytesIO(b"".join(archive.read(n) for n in archive.namelist() if n.endswith("/data.pkl")))))
    with path.open("rb") as file:
        return list(_imports(file))


def _imports(stream: IO[bytes]) -> Iterator[str]:
    strings = ["?", "?"]
    try:
        while True:
            for code, arg, _ in pickletools.genops(stream):
                if code.name in ("GLOBAL", "INST"):
                    yield str(arg).replace(" ", ".")
                elif code.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif isinstance(arg, str):
                    strings.append(arg)
    except Exception:  # the end of the pickles, or what only looks like one
        return


def _containers(loaded: Any, skipped: list[str], file: Path) -> Entries:
    """The tensors of a checkpoint, however nested, without the containers around them all; the state of training goes to `skipped`."""
    found = dict[tuple[str, ...], Tensor]()
    for path, tensor in _tensors(loaded, (), skipped, file):
        if path in found:
            raise _same_name(file, ".".join(path))
        found[path] = tensor
    outer = _outer_keys([path[:-1] for path, tensor in found.items() if tensor.ndim > 1])
    names = {path: ".".join(path[len(outer) :] if path[: len(outer)] == outer else path) for path in found}
    if len(set(names.values())) < len(names):
        names = {path: ".".join(path) for path in found}
    entries: Entries = {}
    for path, tensor in found.items():
        if names[path] in entries:
            raise _same_name(file, names[path])
        entries[names[path]] = Entry.of(tensor)
    return entries


def _tensors(value: Any, path: tuple[str, ...], skipped: list[str], file: Path) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor inside of nested containers with the keys that lead to it."""
    if isinstance(value, Tensor):
        if value.is_nested:
            msg = f"{file}: {'.'.join(path)} is nested, many tensors in one; expected plain ones: save what its unbind() gives"
            raise InputError(msg)
        yield path or ("weight",), value
    elif isinstance(value, Mapping | list | tuple):
        whole = cast("Mapping[Any, Any] | list[Any]", value)
        if (path and _TRAINING.search(path[-1])) or "param_groups" in whole:
            skipped.append(".".join(path))
            return
        if len(path) == _DEEPEST:
            given = f"{file} nests more than {_DEEPEST} containers, or one that holds itself"
            msg = f"{given}; expected a dict of tensors: save model.state_dict()"
            raise InputError(msg)
        for key, item in whole.items() if isinstance(whole, Mapping) else enumerate(whole):
            yield from _tensors(item, (*path, str(key)), skipped, file)


def _outer_keys(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The keys that all paths begin with, as long as none of them names a layer."""
    shared = 0
    while paths and all(path[shared : shared + 1] == paths[0][shared : shared + 1] != () for path in paths):
        if not _CONTAINERS.fullmatch(paths[0][shared]):
            break
        shared += 1
    return paths[0][:shared] if paths else ()


def _same_name(file: Path, name: str) -> InputError:
    return InputError(f"{file} holds two tensors of the name {name}; expected a name for each: save model.state_dict()")


def _unwrapped(entries: Entries) -> Entries:
    """Names without what DataParallel, torch.compile and FSDP put before them, unless two would become one."""
    names = {name: _WRAPPERS.sub("", name) for name in entries}
    while all(name.startswith("module.") for name, entry in zip(names.values(), entries.values(), strict=True) if len(entry.shape) > 1):
        stripped = {old: name.removeprefix("module.") for old, name in names.items()}
        if stripped == names:
            break
        names = stripped
    return {names[old]: entry for old, entry in entries.items()} if len(set(names.values())) == len(names) else entries


def _line(error: Exception) -> str:
    """The first line of an error, short, or its type."""
    return printable(first_line(error).strip()[:160]) or type(error).__name__


# ---- weights without their model -----------------------------------------------------------------------------------------
#
# Weights alone, without their model: which tensor is a linear map, which is left out and why, and the audit of them.

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
_EMBED = r"emb(?:ed|eds|edding|eddings)?"
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
        return Report(self.target, tuple(rows[name] for name in kept), left_out, notes=NOTES)

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
    for reason in (_parametrized(name, entries), _no_map(name, entries)):
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
        reason = "the scale of a normalisation: one axis" if leaf in ("weight", "gamma", "scale") else "a vector: no matrix"
    elif (bias is not None and bias.shape == entry.shape) or (leaf == "weight" and _NORM.search(module)):
        reason = "the scale of a normalisation, entry by entry"
    elif _TABLE.search(leaf) or (axes == 2 and bias is None and _EMBEDDING.fullmatch(module if leaf == "weight" else leaf)):
        reason = "named as an embedding: rows that are looked up or added, no map of the input"
    return None if reason is None else (reason, False)
