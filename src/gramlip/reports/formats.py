"""Files of weights -> tensors by name: one reader for each format, in `FORMATS` and `FOLDERS` (docs/formats.md). No code of a file runs."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.reports.readers import (
    Entries,
    Entry,
    Ranks,
    Stored,
    gguf,
    keras,
    line,
    numpy_file,
    onnx,
    parameter_groups,
    placeholders,
    safetensors,
    some,
)
from gramlip.reports.unpickle import Array, Name, Placeholder, StoredTensor, Unpickled, unpickled

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CONTAINERS = re.compile(
    r"checkpoint|module|net(work)?|params|weights|((model|net)_)?state|(model_)?ema|ema_model|model|((model|net|ema|model_ema)_)?state_dict"
)
_DEEPEST = 100
"""So many containers inside one another are no checkpoint: one that holds itself has no end."""
_MOST_CONTAINERS = 1 << 22
"""A checkpoint has fewer: one that holds each of its parts many times over has no end either."""
_TRAINING = re.compile(r"optim|sched|scaler|rng|callbacks|loops|hyper_parameters", re.I)


def read(path: Path) -> Stored:
    """The tensors of a file or a folder of weights in its own order, without containers and prefixes such as `state_dict` and `module.`.

    Raises:
        InputError: it is missing, corrupt, of no known format, or holds no tensor.
    """
    stored = _folder(path) if path.is_dir() else _file(path)
    if not stored.entries:
        msg = f"{path} holds no tensor; expected the weights of a model: save model.state_dict()"
        raise InputError(msg)
    return replace(stored, entries=_unwrapped(stored.entries), files=stored.files or (path,))


def _file(path: Path) -> Stored:
    check_file(path)
    start = _first_bytes(path)
    for form in FORMATS.values():
        if form.fits(path, start):
            return form.read(path)
    msg = f"{path} is no weights file; expected one of {', '.join(FORMATS)}: type torch.save(model.state_dict(), path)"
    raise InputError(msg)


def _folder(path: Path) -> Stored:
    for pattern, reader in FOLDERS.items():
        if (files := sorted(path.glob(pattern))) and (len(files) == 1 or reader is not _file):
            return reader(files[0])
    several = [file.name for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")]
    given = f"is a folder with {', '.join(several)}" if several else "is a folder without weights"
    file = path / (several or ["model.safetensors"])[0]
    msg = f"{path} {given}; expected one that holds {', '.join(FOLDERS)}: type the file itself, {file}"
    raise InputError(msg)


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


def _indexed(path: Path) -> Stored:
    """The shards of an index, whole, since loaders read them so; they lie beside it: an index cannot point anywhere else."""
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        msg = f"{path} is no JSON ({line(error)}); expected an index with a weight_map"
        raise InputError(msg) from None
    shards: Any = cast("dict[str, Any]", index).get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in cast("dict[str, Any]", shards).values()):
        msg = f"{path} has no weight_map; expected an index: {{'weight_map': {{tensor: file}}}}"
        raise InputError(msg)
    places = cast("dict[str, str]", shards)
    parts: dict[str, Stored] = {}
    for shard in dict.fromkeys(places.values()):
        if Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
            msg = f"{path} names the shard {shard!r}; expected a .safetensors or .bin file beside the index"
            raise InputError(msg)
        if not (path.parent / shard).is_file():
            msg = f"{path} names the shard {shard}, which does not exist; expected all shards beside the index: fetch it"
            raise InputError(msg)
        parts[shard] = safetensors(path.parent / shard) if shard.endswith(".safetensors") else _pickled(path.parent / shard)
    files = {shard: part.entries for shard, part in parts.items()}
    missing = [name for name, shard in places.items() if name not in files[shard]]
    if missing:
        msg = f"{path} places {missing[0]} in {places[missing[0]]}, which lacks it; expected the shards of this index: fetch them again"
        raise InputError(msg)
    entries = {name: files[shard][name] for name, shard in places.items()}
    for shard, inside in files.items():
        for name in inside:
            if places.get(name, shard) != shard or (name not in places and name in entries):
                raise _same_name(path, name)
            entries[name] = inside[name]
    notes = tuple(dict.fromkeys(note for part in parts.values() for note in part.notes))
    return Stored(entries, (), notes, (path, *(path.parent / shard for shard in parts)))


# ---- torch's own ---------------------------------------------------------------------------------------------------------


def _pickled(path: Path) -> Stored:
    """A torch checkpoint, zip or legacy, a TorchScript archive or a plain pickle: tensors, and placeholders for all else."""
    if path.suffix == ".safetensors":
        msg = f"{path} is a torch checkpoint by its content; expected safetensors: type mv {path} {path.with_suffix('.pt')}"
        raise InputError(msg)
    try:
        content = unpickled(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything; none of it is a defect of ours
        msg = f"{path} cannot be read as a torch checkpoint ({line(error)}); expected what torch.save(model.state_dict()) writes"
        raise InputError(msg) from None
    stored = _of_pickle(path, content)
    if not stored.entries and content.names:
        msg = f"{path} holds no tensor, but what {some(content.names)} would make, which was not run; expected model.state_dict()"
        raise InputError(msg)
    return stored


def _of_pickle(path: Path, content: Unpickled) -> Stored:
    skipped = list[str]()
    entries = _containers(content.value, skipped, path)
    return Stored(entries, tuple(skipped), placeholders(content.names))


def _containers(loaded: Any, skipped: list[str], file: Path) -> Entries:
    """The tensors of a checkpoint, however nested, without the containers around them all; the state of training goes to `skipped`."""
    by_path = dict[tuple[str, ...], Entry]()
    for path, entry in _Walk(file, skipped).tensors(loaded, ()):
        if path in by_path:
            raise _same_name(file, ".".join(path))
        by_path[path] = entry
    outer = _outer_keys([path[:-1] for path, entry in by_path.items() if len(entry.shape) > 1])
    names = {path: ".".join(path[len(outer) :] if path[: len(outer)] == outer else path) for path in by_path}
    if len(set(names.values())) < len(names):
        names = {path: ".".join(path) for path in by_path}
    entries: Entries = {}
    for path, entry in by_path.items():
        if names[path] in entries:
            raise _same_name(file, names[path])
        entries[names[path]] = entry
    return entries


@dataclass
class _Walk:
    """Goes through nested containers; the state of training goes to `skipped`."""

    file: Path
    skipped: list[str]
    seen: int = 0

    def tensors(self, value: Any, path: tuple[str, ...], raw: str = "") -> Iterator[tuple[tuple[str, ...], Entry]]:
        """Every tensor with the keys that lead to it; `raw` is the function that was to make something of it."""
        value = value.value if isinstance(value, Array) else value
        if isinstance(value, StoredTensor):
            if value.kind == "nested":
                msg = f"{self.file}: {'.'.join(path)} is nested, many tensors in one; expected plain ones: save what its unbind() gives"
                raise InputError(msg)
            reason = f"an argument of {raw}, which was not run: what that makes of it is not stored"
            yield path or ("weight",), replace(Entry.of(value), out=(reason, len(value.shape) > 1) if raw else None)
            return
        parts = list(_parts(value))
        if (path and parts and _TRAINING.search(path[-1])) or any(key == "param_groups" for key, _, _ in parts):
            self.skipped.append(".".join(path))
            return
        self.seen += len(parts)
        if parts and (len(path) == _DEEPEST or self.seen > _MOST_CONTAINERS):
            given = f"{self.file} nests more than {_DEEPEST} containers, or one that holds itself"
            msg = f"{given}; expected a dict of tensors: save model.state_dict()"
            raise InputError(msg)
        for key, item, function in parts:
            yield from self.tensors(item, path if key == "" else (*path, key), function or raw)


def _parts(value: Any) -> Iterator[tuple[str, Any, str]]:
    """The items of a container by name, as `state_dict` names those of a module; the third is the function that they are arguments of."""
    if isinstance(value, dict):
        yield from ((_word(key), item, "") for key, item in cast("dict[Any, Any]", value).items())
    elif isinstance(value, list | tuple):
        yield from ((str(i), item, "") for i, item in enumerate(cast("list[Any]", value)))
    elif isinstance(value, Placeholder):
        yield from ((str(i), item, value.name) for i, item in enumerate(value.args))
        yield from ((_word(key), item, "") for key, item in value.items)
        for state in value.state if isinstance(value.state, tuple) else (value.state,):
            if isinstance(state, dict):
                yield from ((_word(key), item, "") for key, item in _attributes(cast("dict[Any, Any]", state)).items())


def _attributes(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state_dict of a pickled module: parameters, persistent buffers, and the modules inside; of other objects all attributes."""
    if "_parameters" not in state or "_modules" not in state:
        return state
    passing = cast("list[str]", state.get("_non_persistent_buffers_set") or [])
    buffers = {name: buffer for name, buffer in (state.get("_buffers") or {}).items() if name not in passing}
    return {**state["_parameters"], **buffers, **state["_modules"]}


def _word(key: Any) -> str:
    return key.name if isinstance(key, Name | Placeholder) else str(cast("object", key))


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


# ---- folders -------------------------------------------------------------------------------------------------------------


def _distributed(path: Path) -> Stored:
    """A folder of torch.distributed.checkpoint (DCP, FSDP): `.metadata` tells where the pieces of each tensor lie."""
    try:
        state = cast("dict[str, Any]", unpickled(path).value.state)
        places = {
            (at["fqn"], tuple(at.get("offset") or ())): info.state for index, info in state["storage_data"].items() for at in (index.state,)
        }
        paths = {name: tuple(map(str, parts)) for name, parts in (state.get("planner_data") or {}).items()}
        skipped: dict[str, None] = {}
        entries: dict[tuple[str, ...], Entry] = {}
        for name, metadata in state["state_dict_metadata"].items():
            where = paths.get(name) or (name,)
            if _TRAINING.search(where[0].partition(".")[0]):
                skipped[where[0].partition(".")[0]] = None
            elif "chunks" in (metadata.state or {}):
                entries[where] = _pieces(path, name, metadata.state, places)
    except Exception as error:  # a damaged file can raise anything
        msg = f"{path} cannot be read as the metadata of a distributed checkpoint ({line(error)}); expected what dcp.save writes"
        raise InputError(msg) from None
    outer = _outer_keys([where[:-1] for where, entry in entries.items() if len(entry.shape) > 1])
    named = {".".join(where[len(outer) :] if where[: len(outer)] == outer else where): entry for where, entry in entries.items()}
    files = sorted({path.parent / info["relative_path"] for info in places.values()})
    return Stored(named if len(named) == len(entries) else {".".join(w): e for w, e in entries.items()}, tuple(skipped), (), (path, *files))


def _pieces(path: Path, name: str, metadata: dict[str, Any], places: dict[Any, dict[str, Any]]) -> Entry:
    """A tensor in pieces, put together when it is read: NaN stays where none lies, and is refused then."""
    properties = metadata["properties"].state
    dtype = cast("torch.dtype", properties["dtype"] if isinstance(properties, dict) else properties[0])
    shape, pieces = tuple(metadata["size"]), [piece.state for piece in metadata["chunks"]]

    def load() -> Tensor:
        whole = torch.full(shape, float("nan"), dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        for piece in pieces:
            at, size = tuple(piece["offsets"]), tuple(piece["sizes"])
            place = places[name, at]
            if Path(place["relative_path"]).name != place["relative_path"] or place.get("transform_descriptors"):
                msg = f"{path} places {name} in {place['relative_path']}, transformed or elsewhere; expected plain files beside it"
                raise InputError(msg)
            with (path.parent / place["relative_path"]).open("rb") as file:
                file.seek(place["offset"])
                data = file.read(place["length"])
            part = unpickled(BytesIO(data)).value.load().reshape(size)
            whole[tuple(slice(start, start + count) for start, count in zip(at, size, strict=True))] = part
        return whole

    if sum(prod(piece["sizes"]) for piece in pieces) != prod(shape):
        msg = f"the pieces of {name} are not those of its shape {shape}"
        raise ValueError(msg)
    return Entry(shape, str(dtype).removeprefix("torch."), load)


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------------


def _deepspeed(path: Path) -> Stored:
    """A folder of DeepSpeed: the states of the module, or the optimiser's weights where the ranks of ZeRO share them."""
    try:
        folder = path.parent / path.read_text().strip() if path.name == "latest" else path.parent
        files = {file.name: file for file in sorted(folder.glob("*_states.pt"), key=lambda file: file.name)}
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({line(error)}); expected the name of a training step: type the folder of that step"
        raise InputError(msg) from None
    states = [file for name, file in files.items() if name.endswith("model_states.pt")]
    if not states or not folder.resolve().is_relative_to(path.parent.resolve()):
        msg = f"{path} names {folder.name}, where no model_states.pt lies; expected a folder of a training step: type that folder"
        raise InputError(msg)
    layers = [file for file in states if re.fullmatch(r"layer_\d+-model_\d+-model_states\.pt", file.name)]
    slices = {match[1] for file in layers or states if (match := re.search(r"(?:mp_rank|-model)_(\d+)", file.name))}
    if len(slices) > 1:
        msg = f"{folder} holds weights that {len(slices)} ranks of tensor parallelism share; expected them whole: "
        msg += "type engine.save_16bit_model('whole') where it trains, or export them by the library that split them"
        raise InputError(msg)
    try:
        if not layers and not any(file.name.startswith("mp_rank_") for file in states):
            return Ranks.of(folder, files).stored({})
        return _whole_states(folder, files, layers)
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        msg = f"{folder} cannot be read as states of DeepSpeed ({line(error)}); expected what engine.save_checkpoint writes"
        raise InputError(msg) from None


def _whole_states(folder: Path, files: dict[str, Path], layers: list[Path]) -> Stored:
    """Whole states of the module: one file, or one for each layer of a pipeline, and those of experts.

    Parameters that these lack are taken from the optimiser's weights.
    """
    module = [] if layers else [file for name, file in files.items() if name.startswith("mp_rank_") and name.endswith("model_states.pt")]
    experts = [file for name, file in files.items() if re.fullmatch(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt", name)]
    contents = {file: unpickled(file) for file in (*layers, *module, *experts)}
    parts = {file: _of_module(file, content) for file, content in contents.items()}
    entries: Entries = {}
    for file, part in parts.items():
        layer = f"{int(re.findall(r'[0-9]+', file.name)[0])}." if file in layers else ""
        entries |= {layer + name.removeprefix("module."): entry for name, entry in part.entries.items()}
    named = [name.removeprefix("module.") for file in module for group in parameter_groups(contents[file].value) for name in group]
    filled = {name: entry for name, entry in entries.items() if prod(entry.shape)}
    if any(name not in filled for name in named):
        return Ranks.of(folder, files).stored(filled)
    notes = tuple(dict.fromkeys(note for part in parts.values() for note in part.notes))
    skipped = tuple(dict.fromkeys(name for part in parts.values() for name in part.skipped))
    return Stored(entries, skipped, notes, tuple(parts))


def _of_module(file: Path, content: Unpickled) -> Stored:
    """The states of a module; beside them a file has the state of training, and copies of the parameters that are not trained."""
    states = cast("dict[str, Any]", content.value)
    if not isinstance(states.get("module"), dict):
        return _of_pickle(file, content)
    skipped = tuple(key for key, part in states.items() if part and key != "module" and _TRAINING.search(key))
    return replace(_of_pickle(file, replace(content, value=states["module"])), skipped=skipped)


# ---- adapters ------------------------------------------------------------------------------------------------------------


def _adapter(path: Path) -> Stored:
    """A folder of PEFT's LoRA: for each layer the change `scale B A` of its weight, as two factors that are never multiplied out."""
    weights = next((file for name in ("safetensors", "bin") if (file := path.with_name(f"adapter_model.{name}")).is_file()), None)
    if weights is None:
        msg = f"{path.parent} has an adapter_config.json, but no adapter_model.safetensors; expected both: save the adapter again"
        raise InputError(msg)
    stored = _file(weights)
    try:
        config = cast("dict[str, Any]", json.loads(path.read_bytes()))
        other = [key for key, value in config.items() if value and (key.startswith("use_") or key in _CHANGED) and key != "use_rslora"]
        if config.get("peft_type") != "LORA" or other:
            msg = f"{path} is of type {config.get('peft_type')} {' '.join(other)}; expected LORA, whose change of a weight is a product: "
            msg += "type package.module:callable, which merges it"
            raise InputError(msg)
        entries: Entries = {}
        for name, entry in stored.entries.items():
            name = name.removeprefix("base_model.model.")
            match = re.fullmatch(r"(.+)\.lora_(A|B)((?:\.\w+)?)\.weight", name)
            if match is None:
                table = "lora_embedding_" in name
                entries[name] = replace(entry, out=("the change of an embedding, no map of the input", False)) if table else entry
            elif match[2] == "A":
                pair = stored.entries.get(f"{_before(stored, name)}{match[1]}.lora_B{match[3]}.weight")
                entries[f"{match[1]}{match[3]}"] = _change(entry, pair, _scale(config, match[1], entry.shape[0]))
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        msg = f"{path} cannot be read as the configuration of an adapter ({line(error)}); expected what save_pretrained writes"
        raise InputError(msg) from None
    note = "Each row is the change scale B A that the adapter adds to a layer's weight, not the sum of both."
    return Stored(entries, stored.skipped, (*stored.notes, note), (path, weights))


_CHANGED = ("velora_config", "monteclora_config", "kasa_config")


def _before(stored: Stored, name: str) -> str:
    return "base_model.model." if f"base_model.model.{name}" in stored.entries else ""


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    """PEFT's factor: alpha / r, or alpha / sqrt(r); a pattern names a layer by the end of its name."""
    patterns = cast("dict[str, Any]", config.get("alpha_pattern") or {})
    strange = [pattern for pattern in patterns if not re.fullmatch(r"[\w.]+", pattern)]
    if strange:
        msg = f"alpha_pattern has {strange[0]!r}; expected names of layers"
        raise ValueError(msg)
    alphas = [alpha for pattern, alpha in patterns.items() if layer == pattern or layer.endswith(f".{pattern}")]
    alpha = float((alphas or [config["lora_alpha"]])[0])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _change(right: Entry, left: Entry | None, scale: float) -> Entry:
    """The product of B (m, r), or (m, r, 1, ...), and A (r, n, *k)."""
    if left is None or len(left.shape) < 2 or left.shape[1] != right.shape[0] or prod(left.shape[2:]) != 1 or len(right.shape) > 5:
        return replace(right, out=("a factor of a change whose other one does not fit", True))

    def load() -> Tensor:
        product = left.load().double().flatten(1) @ right.load().double().flatten(1)
        return (scale * product).reshape(left.shape[0], *right.shape[1:])

    flat = Entry((left.shape[0], left.shape[1]), left.dtype, lambda: left.load().flatten(1))
    return Entry((left.shape[0], *right.shape[1:]), "float64", load, factors=(flat, right, scale))


# ---- the formats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A format: the test that recognises a file by its path and first bytes, and the reader."""

    fits: Callable[[Path, bytes], bool]
    read: Callable[[Path], Stored]


def _zip_with(path: Path, start: bytes, part: str) -> bool:
    """Whether a zip archive has a member whose name ends so."""
    if start[:4] != b"PK\x03\x04" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(part) for name in archive.namelist())


def _suffix(suffix: str) -> Callable[[Path, bytes], bool]:
    return lambda path, _: path.suffix == suffix


def _starts(magic: bytes, at: int = 0) -> Callable[[Path, bytes], bool]:
    return lambda _, start: start[at : at + len(magic)] == magic


FORMATS: dict[str, Format] = {
    "an index of shards": Format(_suffix(".json"), _indexed),
    "safetensors": Format(_starts(b"{", 8), safetensors),
    "a NumPy archive": Format(partial(_zip_with, part=".npy"), numpy_file),
    "a NumPy array": Format(_starts(b"\x93NUMPY"), numpy_file),
    "a Keras archive": Format(partial(_zip_with, part="model.weights.h5"), keras),
    "HDF5": Format(_starts(b"\x89HDF"), keras),
    "GGUF": Format(_starts(b"GGUF"), gguf),
    "ONNX": Format(_suffix(".onnx"), onnx),
    "a torch checkpoint": Format(lambda _, start: start[:4] == b"PK\x03\x04" or start[:1] == b"\x80", _pickled),
    "safetensors by its name": Format(_suffix(".safetensors"), safetensors),
}
"""Formats of a file of weights; the first that fits reads it."""

FOLDERS: dict[str, Callable[[Path], Stored]] = {
    "adapter_config.json": _adapter,
    "*.safetensors.index.json": _file,
    "model.safetensors": _file,
    "*.bin.index.json": _file,
    "pytorch_model.bin": _file,
    ".metadata": _distributed,
    "latest": _deepspeed,
    "*model_states.pt": _deepspeed,
    "*.safetensors": _file,
}
"""Files that mark a folder of weights -> the reader of that file; the first that is present counts."""
