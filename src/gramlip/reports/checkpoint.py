"""Safe readers of weights: safetensors, sharded or not, and torch checkpoints. No code of a file is ever executed."""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from gramlip.errors import InputError, first_line
from gramlip.reports.report import printable

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
    skipped: list[str] = []
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


def check_file(path: Path) -> None:
    """InputError for a folder, and for a pipe or a device, which would keep its reader waiting."""
    if path.is_dir():
        msg = f"{path} is a folder; expected a file: type for instance {path / 'model.safetensors'}"
        raise InputError(msg)
    if path.exists() and not path.is_file():
        msg = f"{path} is no regular file but a pipe or a device; expected a file: write it to one first"
        raise InputError(msg)


def read_bytes(data: bytes) -> Stored:
    """The tensors of a safetensors file that is in memory."""
    return Stored({name: Entry.of(tensor) for name, tensor in sorted(load_bytes(data).items())})


def _safetensors(path: Path) -> Entries:
    try:
        file: Any = safe_open(path, framework="pt")  # stays open: the values are read when asked for
        names: list[str] = list(file.keys())
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
    found: dict[tuple[str, ...], Tensor] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Tensor):
            if path in found:
                raise _same_name(file, ".".join(path))
            if value.is_nested:
                msg = f"{file}: {'.'.join(path)} is nested, many tensors in one; expected plain ones: save what its unbind() gives"
                raise InputError(msg)
            found[path or ("weight",)] = value
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
                walk(item, (*path, str(key)))

    walk(loaded, ())
    inside = [path[:-1] for path, tensor in found.items() if tensor.ndim > 1]
    shared = 0  # how many outer keys all weights have in common, and none of them names a layer
    while inside and all(path[shared : shared + 1] == inside[0][shared : shared + 1] != () for path in inside):
        if not _CONTAINERS.fullmatch(inside[0][shared]):
            break
        shared += 1
    outer = inside[0][:shared] if inside else ()
    names = {path: ".".join(path[shared:] if path[:shared] == outer else path) for path in found}
    if len(set(names.values())) < len(names):
        names = {path: ".".join(path) for path in found}
    entries: Entries = {}
    for path, tensor in found.items():
        if names[path] in entries:
            raise _same_name(file, names[path])
        entries[names[path]] = Entry.of(tensor)
    return entries


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
