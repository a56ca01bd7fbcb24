"""Tensors of a file by name, and the readers of safetensors, NumPy, Keras, GGUF, ONNX and of the ranks of ZeRO. Some need extras."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from gramlip.errors import InputError, first_line
from gramlip.reports.output import printable
from gramlip.reports.unpickle import StoredTensor, unpickled

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{f"{letter}{bits}": f"{name}{bits}" for letter, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}


@dataclass(frozen=True)
class Entry:
    """A stored tensor: its shape and dtype are known, its values are read by `load`.

    `because` says how the numbers were made, where they are not those of the file; `out` why the reader knows this to be no map, or none
    whose norm the numbers give, and whether it is a weight. Where the tensor is `factors[2] B A`, B (m, r) and A (r, n, *k), these are
    its factors, and `load` forms it. `slices(axis, start, stop)` reads a part alone, where the format can.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]
    because: str = ""
    out: tuple[str, bool] | None = None
    factors: tuple[Entry, Entry, float] | None = None
    slices: Callable[[int, int, int], Tensor] | None = None

    def part(self, axis: int, start: int, stop: int) -> Tensor:
        """The rows (axis 0) or columns (axis 1) of a matrix from `start` to `stop`."""
        return self.load().narrow(axis, start, stop - start) if self.slices is None else self.slices(axis, start, stop)

    @staticmethod
    def of(tensor: Tensor | StoredTensor) -> Entry:
        """A tensor that is in memory already, or one that is read from its file when asked for."""
        load = tensor.load if isinstance(tensor, StoredTensor) else tensor.detach
        return Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), load)


Entries = dict[str, Entry]


@dataclass(frozen=True)
class Stored:
    """The tensors of a file by name, the parts that were passed over (the state of training), and what the report is to say of the file."""

    entries: Entries
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def line(error: Exception) -> str:
    """The first line of an error, short, or its type."""
    return printable(first_line(error).strip()[:160]) or type(error).__name__


def some(names: tuple[str, ...], most: int = 12) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def placeholders(names: tuple[str, ...]) -> tuple[str, ...]:
    """What the report is to say of names in a pickle that were not looked up."""
    return (f"Read as placeholders, neither imported nor run: {some(names)}.",) if names else ()


def extra(path: Path, package: str, name: str) -> Any:
    """A package that reads a format, or one line that says how to get it."""
    try:
        return import_module(package)
    except ImportError as error:
        msg = f"{path} needs {package}, which cannot be imported ({error}); expected it installed: type pip install gramlip[{name}]"
        raise InputError(msg) from None


# ---- safetensors ---------------------------------------------------------------------------------------------------------


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


def safetensors(path: Path) -> Stored:
    """A safetensors file; its values are read from the map of the file when asked for."""
    try:
        file: Any = safe_open(path, framework="pt")  # stays open: the values are read when asked for
        names = in_order(file.keys())
        slices: dict[str, Any] = {name: file.get_slice(name) for name in names}
        dtypes: dict[str, str] = {name: s.get_dtype() for name, s in slices.items()}
        shapes: dict[str, tuple[int, ...]] = {name: tuple(s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        msg = f"{path} cannot be read as safetensors ({line(error)}); expected a whole file: fetch or save it again"
        raise InputError(msg) from None

    def entry(name: str) -> Entry:
        def part(axis: int, start: int, stop: int) -> Tensor:
            return slices[name][start:stop] if axis == 0 else slices[name][:, start:stop]

        return Entry(shapes[name], _DTYPES.get(dtypes[name], dtypes[name]), lambda: file.get_tensor(name), slices=part)

    return Stored({name: entry(name) for name in names})


# ---- arrays of NumPy -----------------------------------------------------------------------------------------------------

CHANNELS_LAST = "a kernel of 3 axes: no convolution by its name alone, and the norm depends on which axes are inputs"


def kernel(entry: Entry) -> Entry:
    """A kernel (*k, c_in, c_out) as Keras and Flax have it, in torch's order; one of 3 axes may be a projection to heads as well."""
    if len(entry.shape) < 3:
        return entry
    if len(entry.shape) == 3:
        return Entry(entry.shape, entry.dtype, entry.load, out=(CHANNELS_LAST, True))
    return _channels_first(entry)


def _channels_first(entry: Entry) -> Entry:
    axes = len(entry.shape)
    order = (axes - 1, axes - 2, *range(axes - 2))
    return Entry(tuple(entry.shape[i] for i in order), entry.dtype, lambda: entry.load().permute(order).contiguous())


def numpy_file(path: Path) -> Stored:
    """A `.npy` file, or the members of a `.npz`; pickled objects among them are left out, unread."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return Stored({"weight": _array(file, lambda: np.load(path, allow_pickle=False))})
        entries: Entries = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    name = member.removesuffix(".npy")
                    entry = _array(file, _member(path, name))
                    entries[name.replace("/", ".")] = kernel(entry) if name.rpartition("/")[2] == "kernel" else entry
        return Stored(entries)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        msg = f"{path} cannot be read as arrays of NumPy ({line(error)}); expected what numpy.savez writes: save it again"
        raise InputError(msg) from None


def _member(path: Path, name: str) -> Callable[[], Any]:
    def load() -> Any:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]

    return load


def _array(file: Any, load: Callable[[], Any]) -> Entry:
    """An array of which only the header is read."""
    version = np.lib.format.read_magic(file)
    reads = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reads(file)
    return of_array(tuple(map(int, shape)), dtype, load)


def of_array(shape: tuple[int, ...], dtype: Any, load: Callable[[], Any]) -> Entry:
    """An array of NumPy as an entry."""
    if dtype.kind not in "biufc" or dtype.char in "gG":
        return Entry(shape, str(dtype), lambda: torch.empty(0), out=(f"{dtype} entries: no numbers of a weight", False))

    def tensor() -> Tensor:
        values = load()
        return torch.from_numpy(np.array(values, dtype.newbyteorder("="), order="C"))

    return Entry(shape, str(dtype.newbyteorder("=").name), tensor)


# ---- Keras ---------------------------------------------------------------------------------------------------------------

_CONV = re.compile(r"(Separable)?Conv(olution)?[123]D(Transpose)?|(separable_)?conv[123]d(_transpose)?", re.I)
_DEPTHWISE = re.compile(r"Depthwise_?Conv[12]?D?|depthwise_kernel", re.I)


def keras(path: Path) -> Stored:
    """A `.keras` archive or an HDF5 file of weights: every dataset; kernels of convolutions in torch's order of axes."""
    h5py = extra(path, "h5py", "keras")
    try:
        source: Any = path
        classes: dict[str, str] = {}
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)  # stays open: the values are read when asked for
            source = archive.open("model.weights.h5")
            classes = _classes(archive.read("config.json")) if "config.json" in archive.namelist() else {}
        file = h5py.File(source, "r")
        classes |= _classes(file.attrs.get("model_config", "{}"))
        datasets: list[Any] = []
        file.visititems(lambda _, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        msg = f"{path} cannot be read as weights of Keras ({line(error)}); expected what model.save writes: save it again"
        raise InputError(msg) from None
    entries: Entries = {}
    skipped: dict[str, None] = {}
    for dataset in datasets:
        parts: list[str] = [part.removesuffix(":0") for part in dataset.name.strip("/").split("/")]
        if parts[0] in ("optimizer", "optimizer_weights"):
            skipped[parts[0]] = None
        else:
            entry = of_array(tuple(dataset.shape), dataset.dtype, lambda dataset=dataset: dataset[()])
            entries[".".join(parts)] = _keras_entry(parts, [classes.get(part, part) for part in parts], entry)
    return Stored(entries, tuple(skipped))


def _classes(text: str | bytes) -> dict[str, str]:
    """The class of each layer by its name, from a model's configuration."""
    classes: dict[str, str] = {}
    ahead: list[Any] = [json.loads(text)]
    while ahead:
        value = ahead.pop()
        if isinstance(value, dict):
            inner = cast("dict[str, Any]", value)
            config = inner.get("config")
            if isinstance(config, dict) and "name" in config and "class_name" in inner:
                classes[str(cast("Any", config["name"]))] = str(inner["class_name"])
            ahead += inner.values()
        elif isinstance(value, list):
            ahead += cast("list[Any]", value)
    return classes


def _keras_entry(parts: list[str], kinds: list[str], entry: Entry) -> Entry:
    """The layer's class, or its name where that is not told, says what the axes are."""
    plain = [re.sub(r"_\d+$", "", kind) for kind in kinds]
    if any(re.fullmatch(r"(?:\w*_)?embeddings?", part, re.I) for part in (*plain, parts[-1])):
        return Entry(
            entry.shape, entry.dtype, entry.load, out=("an embedding: rows that are looked up or added, no map of the input", False)
        )
    depthwise = any(_DEPTHWISE.fullmatch(part) for part in plain) or (
        parts[-1] == "0" and any(part.lower().startswith("separable") for part in plain)
    )
    if depthwise and len(entry.shape) > 2:
        axes = len(entry.shape)
        order, size = (axes - 2, axes - 1, *range(axes - 2)), (entry.shape[-2] * entry.shape[-1], 1, *entry.shape[:-2])
        return Entry(size, entry.dtype, lambda: entry.load().permute(order).reshape(size))
    if len(entry.shape) > 2 and any(_CONV.fullmatch(part) for part in plain):
        return _channels_first(entry)
    if len(entry.shape) > 2:
        return Entry(entry.shape, entry.dtype, entry.load, out=(f"{plain[-2 if len(plain) > 1 else -1]}: its axes are not known", True))
    return entry


# ---- GGUF and ONNX -------------------------------------------------------------------------------------------------------


def gguf(path: Path) -> Stored:
    """A GGUF file; what is quantised is dequantised by the package `gguf`, and named."""
    package = extra(path, "gguf", "gguf")
    try:
        tensors: list[Any] = package.GGUFReader(path).tensors
    except (ValueError, OSError, IndexError, KeyError) as error:
        msg = f"{path} cannot be read as GGUF ({line(error)}); expected a whole file: fetch it again"
        raise InputError(msg) from None
    plain = {"F64": "float64", "F32": "float32", "F16": "float16", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}

    def entry(tensor: Any) -> Entry:
        kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))

        def load() -> Tensor:
            values = tensor.data if kind in plain else package.dequantize(tensor.data, tensor.tensor_type)
            return torch.from_numpy(np.array(values)).reshape(shape)

        note = "" if kind in (*plain, "BF16") else f"dequantised from {kind} to float32 by gguf"
        return Entry(shape, plain.get(kind, "float32"), load, note)

    return Stored({tensor.name: entry(tensor) for tensor in tensors})


def onnx(path: Path) -> Stored:
    """The initializers of an ONNX model, their data beside it too; those that nodes only look up or use entry by entry are no maps."""
    package = extra(path, "onnx", "onnx")
    try:
        graph = package.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own errors have no common type
        msg = f"{path} cannot be read as ONNX ({line(error)}); expected a whole model: export it again"
        raise InputError(msg) from None
    used: dict[str, set[str]] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            used.setdefault(name, set()).add(node.op_type if i or node.op_type != "Gather" else "Gather's rows")

    def entry(tensor: Any) -> Entry:
        dtype = package.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        entry = of_array(tuple(tensor.dims), dtype, lambda: package.numpy_helper.to_array(tensor, str(path.parent)))
        ops = used.get(tensor.name, set())
        if len(tensor.dims) > 1 and ops and ops <= {*_ENTRYWISE, "Gather's rows"}:
            reason = f"used by {' and '.join(sorted(ops))} alone: no map of the input"
            return Entry(entry.shape, entry.dtype, entry.load, out=(reason, False))
        return entry

    return Stored({initializer.name: entry(initializer) for initializer in graph.initializer})


_ENTRYWISE = ("Add", "Sub", "Mul", "Div", "Where", "Pow", "PRelu", "Max", "Min", "Equal", "Less", "Greater", "BatchNormalization")


# ---- the ranks of ZeRO ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The files of all ranks of DeepSpeed's ZeRO: the states of the module and, flat, one part of the optimiser's weights from each."""

    folder: Path
    models: list[dict[str, Any]]
    flat: list[list[StoredTensor]]
    stage: int
    files: tuple[Path, ...]
    names: tuple[str, ...]

    @staticmethod
    def of(folder: Path, files: dict[str, Path]) -> Ranks:
        """All ranks, in their order; InputError where one is missing."""
        kinds: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
        for name, file in files.items():
            match = re.fullmatch(r"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_\d+_(model|optim)_states\.pt", name)
            if match is None and not (name.startswith("mp_rank_") and name.endswith("model_states.pt")):
                continue
            kind, rank = (match[2], int(match[1])) if match else ("model", 0)
            if (other := kinds[kind].setdefault(rank, file)) != file:
                msg = f"{folder} has {other.name} and {name} for one rank; expected the files of one step of one run: fetch them again"
                raise InputError(msg)
        contents = {file: unpickled(file) for kind in kinds.values() for _, file in sorted(kind.items())}
        states = [contents[file].value["optimizer_state_dict"] for _, file in sorted(kinds["optim"].items())]
        stage = 3 if not states or "fp32_flat_groups" in states[0] else 2
        _complete(folder, kinds, states[0]["partition_count"] if states else max(kinds["model"]) + 1, stage)
        flat = [list(state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]) for state in states]
        if len({part.dtype for rank in flat for part in rank}) > 1:
            msg = f"{folder} has ranks with numbers of several types; expected the files of one step of one run: fetch them again"
            raise InputError(msg)
        models = [contents[file].value for _, file in sorted(kinds["model"].items())]
        names = tuple(dict.fromkeys(name for content in contents.values() for name in content.names))
        return Ranks(folder, models, flat, stage, tuple(contents), names)

    def stored(self, whole: Entries) -> Stored:
        """The tensors of the module in its order: those that are `whole` already, the rest put together when they are read."""
        first = self.models[0]
        module = cast("dict[str, Any]", first.get("module") or {})
        gathered = {name: Entry.of(tensor) for name, tensor in module.items() if isinstance(tensor, StoredTensor) and prod(tensor.shape)}
        gathered |= self.frozen() | self.trained() | whole
        for name, source in (first.get("shared_params") or {}).items():
            if source in gathered:
                gathered.setdefault(name, gathered[source])
        for name, entry in gathered.items():
            if not isinstance(cast("object", name), str) or not all(isinstance(n, int) and 0 <= n < 2**63 for n in entry.shape):
                msg = f"{name!r} of shape {entry.shape} is no parameter"
                raise ValueError(msg)
        order = [name for name in module if name in gathered]
        entries = {name: gathered[name] for name in (*order, *(name for name in gathered if name not in module))}
        note = f"Weights are those of the optimiser, from the files of {len(self.flat)} ranks; a run may round them to fewer digits."
        return Stored(entries, ("optimizer_state_dict",), (note, *placeholders(self.names)), self.files)

    def trained(self) -> Entries:
        """The parameters that were trained, from the flat groups."""
        groups = parameter_groups(self.models[0])
        if self.stage == 3:
            shapes = {name: shape for group in groups for name, shape in group.items()}
            counts = [-(-prod(shape) // len(self.flat)) for shape in shapes.values()]
            return self.placed(shapes, counts, self.flat, [sum(counts)])
        if any(len(rank) != len(groups) for rank in self.flat):
            raise self.unequal(len(groups), len(self.flat[0]), "groups")
        entries: Entries = {}
        for group, parts in zip(groups, zip(*self.flat, strict=True), strict=True):
            counts, unit = [prod(shape) for shape in group.values()], 2 * len(self.flat)
            total = sum(counts)
            entries |= self.placed(group, counts, [list(parts)], range(total, -(-total // unit) * unit + 1))
        return entries

    def frozen(self) -> Entries:
        """The parameters that were not trained: whole in ZeRO 1 and 2, a slice in the file of each rank in ZeRO 3."""
        shapes = cast("dict[str, Any]", self.models[0].get("frozen_param_shapes") or {})
        fragments = [cast("dict[str, StoredTensor]", model.get("frozen_param_fragments") or {}) for model in self.models]
        entries: Entries = {}
        for name, shape in shapes.items():
            parts = [[rank[name]] for rank in fragments]
            if self.stage == 3:
                count = -(-prod(shape) // len(parts))
                entries |= self.placed({name: shape}, [count], parts, [count])
            else:
                entries[name] = Entry.of(parts[0][0])
        return entries

    def placed(self, shapes: dict[str, Any], counts: list[int], ranks: list[list[StoredTensor]], totals: Iterable[int]) -> Entries:
        """Parameters of which each rank has `counts` entries, in a row; InputError where the numbers of a rank are not in `totals`."""
        for rank in ranks:
            have = sum(prod(tensor.shape) for tensor in rank)
            if have not in totals or any(tensor.strides != (1,) or tensor.storage is None for tensor in rank):
                raise self.unequal(sum(counts), have, "numbers")
        entries: Entries = {}
        start = 0
        for (name, shape), count in zip(shapes.items(), counts, strict=True):
            pieces = [piece for rank in ranks for piece in _between(rank, start, start + count)]
            start += count
            dtype = str(ranks[0][0].dtype).removeprefix("torch.") if ranks[0] else "float32"
            entries[name] = Entry(tuple(shape), dtype, partial(_joined, pieces, tuple(shape)))
        return entries

    def unequal(self, expected: int, given: int, what: str) -> InputError:
        """The error for shapes and flat groups that do not fit."""
        msg = f"{self.folder} has {given} {what} for shapes of {expected}; expected the files of one step of one run: fetch them again"
        return InputError(msg)


def _complete(folder: Path, kinds: dict[str, dict[int, Path]], shared: Any, stage: int) -> None:
    """InputError where a file of a rank is missing or one too many, or where groups are shared among different numbers of ranks."""
    counts = cast("list[int]", shared if isinstance(shared, list) else [shared])
    world = max(counts)
    for kind, numbered in kinds.items():
        ranks = range(world if kind == "optim" or stage == 3 else 1)
        missing = next((rank for rank in ranks if rank not in numbered), None)  # the count is the file's word: no list so long is made
        if missing is not None or max(numbered, default=-1) >= max(ranks.stop, 0):
            rank = max(numbered) if missing is None else missing
            given = f"{'has, beside those of its ranks,' if missing is None else 'lacks'} zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            msg = f"{folder} {given}; expected the files of {world} ranks: fetch those of one step of one run"
            raise InputError(msg)
    if len(set(counts)) > 1:
        msg = f"{folder} shares its groups among {counts} ranks; expected one number: type engine.save_16bit_model('whole') where it trains"
        raise InputError(msg)


def parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Names and shapes of the trained parameters, group by group; older files have one group alone."""
    shapes = model.get("param_shapes") or [] if isinstance(model, dict) else []
    return [cast("dict[str, Any]", shapes)] if isinstance(shapes, dict) else cast("list[dict[str, Any]]", shapes)


def _between(tensors: list[StoredTensor], start: int, stop: int) -> list[StoredTensor]:
    """The entries from `start` to `stop` of flat tensors that lie one behind the other."""
    pieces: list[StoredTensor] = []
    for tensor in tensors:
        size = tensor.shape[0]
        first, last = max(start, 0), min(stop, size)
        if first < last:
            pieces.append(replace(tensor, shape=(last - first,), start=tensor.start + first))
        start, stop = start - size, stop - size
    return pieces


def _joined(pieces: list[StoredTensor], shape: tuple[int, ...]) -> Tensor:
    """The numbers of the pieces, one behind the other, without what pads the last of them; one piece at a time is in memory beside them."""
    numbers, start = torch.empty(prod(shape), dtype=pieces[0].dtype if pieces else torch.float32), 0
    for piece in pieces:
        part = piece.load()[: len(numbers) - start]
        numbers[start : start + len(part)] = part
        start += len(part)
    return numbers.reshape(shape)
