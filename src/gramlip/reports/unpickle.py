"""Pickled checkpoints, read by a machine that imports nothing and calls nothing: docs/formats.md#pickles.

A pickle is a program for a stack machine. `Machine` follows it, with the few functions in `REBUILD` that make tensors, arrays and plain
containers; every other class or function of the file becomes a `Placeholder` that only holds what it was given.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from gramlip.errors import InputError

MOST_INSTRUCTIONS = 1 << 24
"""A pickle of more is no checkpoint: each can take some hundred bytes."""
MOST_REPEATED = 1 << 24
"""A tensor of more entries than its storage has, by strides of zero, may not be larger than this."""
_DEEPEST_KEY = 8
_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8},
    **{"ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
    **{"QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32},
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@dataclass(frozen=True, eq=False)
class Name:
    """A class or a function that the file names: `module.name`, never looked up."""

    name: str


@dataclass(eq=False)
class Placeholder:
    """A placeholder for the result of calling `name`: the arguments, the state and the items that the file gives it."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list[tuple[Any, Any]])


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers in the file: `read(start, count)` gives that many of its bytes; `size` is in bytes."""

    dtype: torch.dtype
    size: int
    read: Callable[[int, int], bytearray]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose values are still in the file, or one that has none that can be used: its `kind` then says which."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    start: int = 0
    storage: Storage | None = None
    flips: tuple[str, ...] = ()
    kind: str = ""

    def load(self) -> Tensor:
        """The values, read now; of a sparse tensor one that stands for its layout, of a meta tensor none."""
        if self.storage is None:
            return _STANDINS[self.kind]()
        last = self.start + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self.storage.read(self.start * self.dtype.itemsize, (last + 1 - self.start) * self.dtype.itemsize)
        values = torch.frombuffer(data, dtype=self.dtype).as_strided(self.shape, self.strides)
        values = values.conj() if "conj" in self.flips else values
        return -values if "neg" in self.flips else values


_STANDINS: dict[str, Callable[[], Tensor]] = {
    "meta": lambda: torch.empty(1, 1, device="meta"),
    "sparse_coo": lambda: torch.zeros(1, 1).to_sparse(),
    "sparse_csr": lambda: torch.zeros(1, 1).to_sparse_csr(),
    "sparse_csc": lambda: torch.zeros(1, 1).to_sparse_csc(),
    "sparse_bsr": lambda: torch.zeros(1, 1).to_sparse_bsr((1, 1)),
    "sparse_bsc": lambda: torch.zeros(1, 1).to_sparse_bsc((1, 1)),
}


def _require(holds: bool, problem: str) -> None:
    """Refuse a pickle that nothing real writes."""
    if not holds:
        raise ValueError(problem)


# ---- what is rebuilt -----------------------------------------------------------------------------------------------------


def _ints(values: Any) -> tuple[int, ...]:
    integers = tuple(cast("Iterable[Any]", values))
    _require(all(type(n) is int and 0 <= n < 1 << 62 for n in integers), f"a tensor of shape or strides {integers}")
    return cast("tuple[int, ...]", integers)


def _tensor(storage: Storage, start: int, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    """`_rebuild_tensor` and `_rebuild_tensor_v2`: a view of a storage. Its last argument may hold flags for -x and conj(x)."""
    return _view(storage.dtype, storage, start, shape, strides, rest[2] if len(rest) > 2 else None)


def _untyped(
    storage: Storage, start: int, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: torch.dtype, *rest: Any
) -> StoredTensor:
    return _view(dtype, storage, start, shape, strides, rest[0] if rest else None)


def _view(dtype: torch.dtype, storage: Storage, start: int, shape: Any, strides: Any, flags: Any) -> StoredTensor:
    sizes, steps = _ints(shape), _ints(strides)
    (first,) = _ints((start,))
    count, available = int(np.prod(sizes, dtype=object)), storage.size // dtype.itemsize
    last = first + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    _require(not count or last < available, f"a tensor of shape {sizes} reaches beyond the {available} numbers of its storage")
    _require(count <= max(available, MOST_REPEATED), f"a tensor of shape {sizes} is made of {available} numbers")
    flips = tuple(key for key, on in flags.items() if on) if isinstance(flags, dict) else ()
    return StoredTensor(dtype, sizes, steps, first, storage, flips)


def _sparse(layout: Any, data: Any) -> Any:
    kind = str(layout).removeprefix("torch.")
    values, shape = (data[1], data[2]) if kind == "sparse_coo" else (data[2], data[3])
    return StoredTensor(values.dtype, _ints(shape), kind=kind) if kind in _STANDINS else Placeholder("torch._utils._rebuild_sparse_tensor")


def _of_type(function: Any, kind: Any, args: Any, _state: Any) -> Any:
    """A subclass of Tensor: what is stored, where that is a tensor; else its parts, under the name of its class."""
    placeholder = called(function, args)
    return Placeholder(kind.name, (args, _state)) if isinstance(placeholder, Placeholder) else placeholder


@dataclass(eq=False)
class Array:
    """An array of NumPy that waits for its values."""

    value: Any = None

    def fill(self, _version: Any, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
        """Its state, as NumPy writes it."""
        self.value = _numbers(data, dtype, shape, "F" if fortran else "C")


@dataclass(eq=False)
class Kind:
    """A dtype of NumPy: its code and byte order."""

    code: str
    order: str = "<"

    def fill(self, _version: Any, order: Any, *_: Any) -> None:
        """Its state, as NumPy writes it."""
        self.order = str(order)

    def dtype(self) -> np.dtype[Any] | None:
        """NumPy's own, of numbers alone."""
        plain = re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", self.code) and self.order in "<>|="
        return np.dtype(self.order + self.code) if plain else None


def _numbers(data: Any, kind: Any, shape: Any, order: Any) -> Any:
    """An array over bytes, or over text that stands for them, of which nothing is copied before it is read."""
    dtype = kind.dtype() if isinstance(kind, Kind) else None
    if dtype is None or not isinstance(data, bytes | bytearray | str):
        return data if isinstance(data, list) else Placeholder("numpy.ndarray")

    def read(start: int, count: int) -> bytearray:
        part = data[start : start + count]
        raw = np.frombuffer(part.encode("latin-1") if isinstance(part, str) else part, dtype)
        return bytearray(raw.astype(dtype.newbyteorder("=")).tobytes())

    sizes = _ints(shape)
    axes = range(len(sizes))
    inner = [sizes[:i] if order == "F" else sizes[i + 1 :] for i in axes]
    dtype_ = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    return _view(dtype_, Storage(dtype_, len(data), read), 0, sizes, [int(np.prod(part, dtype=object)) for part in inner], None)


def _scalar(kind: Any, data: Any = b"") -> Any:
    value = _numbers(data, kind, (), "C")
    return value.load().item() if isinstance(value, StoredTensor) else value


def _storage_of_bytes(data: Any) -> Any:
    """A storage that was pickled on its own holds a file of torch in its bytes."""
    if not isinstance(data, bytes):
        msg = "tensors in a pickle of a protocol below 3"
        raise ValueError(msg)
    return _opened(BytesIO(data), Machine(), None)


def _same(value: Any = (), *_: Any) -> Any:
    """A container made of another is that one: a copy at every call could fill the memory."""
    return value


def _dict(*args: Any) -> dict[Any, Any]:
    """An OrderedDict, a defaultdict (whose factory is left), a Counter."""
    pairs = args[-1] if args and isinstance(args[-1], dict | list) else ()
    if isinstance(pairs, dict):
        return cast("dict[Any, Any]", pairs)
    pairs_read = {_key(key): value for key, value in cast("Iterable[tuple[Any, Any]]", pairs)}
    if isinstance(pairs, list):
        cast("list[Any]", pairs).clear()  # a copy at every call could fill the memory: no real file makes two dicts of one list
    return pairs_read


def _reconstructed(kind: Any, base: Any, state: Any) -> Placeholder:
    """`copyreg._reconstructor`: an object of protocol 0 and 1."""
    return Placeholder(kind.name, (base, state)) if state is not None else Placeholder(kind.name)


REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _untyped,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._utils._rebuild_qtensor": lambda storage, start, shape, strides, *_: _view(storage.dtype, storage, start, shape, strides, None),
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype, shape, *_: StoredTensor(dtype, _ints(shape), kind="meta"),
    "torch._utils._rebuild_nested_tensor": lambda *_: StoredTensor(torch.float32, (), kind="nested"),
    "torch._utils._rebuild_device_tensor_from_numpy": _same,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _same,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._tensor._rebuild_from_type": _of_type,
    "torch.storage._load_from_bytes": _storage_of_bytes,
    "torch.serialization._get_layout": _same,
    "torch.Size": _same,
    "torch.device": lambda *args: ":".join(map(str, args)),
    "torch.jit._pickle.restore_type_tag": _same,
    **{f"torch.jit._pickle.build_{kind}list": _same for kind in ("int", "double", "bool", "tensor")},
    **{f"{numpy}.multiarray._reconstruct": lambda *_: Array() for numpy in ("numpy.core", "numpy._core")},
    **{f"{numpy}.multiarray.scalar": _scalar for numpy in ("numpy.core", "numpy._core")},
    **{f"{numpy}.numeric._frombuffer": _numbers for numpy in ("numpy.core", "numpy._core")},
    "numpy.dtype": lambda code, *_: Kind(str(code)),
    "_codecs.encode": _same,
    **{f"collections.{name}": _dict for name in ("OrderedDict", "defaultdict", "Counter")},
    **{f"{module}.{kind}": _same for module in ("builtins", "__builtin__") for kind in ("list", "tuple", "set", "frozenset", "bytearray")},
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
}
"""Names that a pickle may call -> the function called instead. No class or function of the file is among them."""


def called(function: Any, args: Any) -> Any:
    """The stand-in for `function(*args)`: the result of one of `REBUILD`, or a placeholder."""
    name = function.name if isinstance(function, Name | Placeholder) else type(function).__name__
    given = tuple(args)
    return REBUILD[name](*given) if isinstance(function, Name) and name in REBUILD else Placeholder(name, given)


def _key(key: Any, depth: int = 0) -> Any:
    """The key, where it can be hashed: a name, a number, an object by its identity, or a tuple of these that is not too deep."""
    if isinstance(key, tuple) and depth < _DEEPEST_KEY:
        for part in cast("tuple[Any, ...]", key):
            _key(part, depth + 1)
        return cast("Any", key)
    if isinstance(key, str | int | float | bytes | None | Name | Placeholder | StoredTensor | torch.dtype):
        return key
    msg = f"a dict with a key of type {type(key).__name__}"
    raise ValueError(msg)


# ---- the machine ---------------------------------------------------------------------------------------------------------

_MARK = Name("mark")


class Machine:
    """Follows one pickle; `found` gathers the names that became placeholders, in the order of the file."""

    def __init__(self, persistent: Callable[[Any], Any] | None = None, placeholders: dict[str, None] | None = None) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.persistent = persistent
        self.found = {} if placeholders is None else placeholders

    def run(self, stream: IO[bytes]) -> Any:
        """The object of the pickle that begins here; the stream stands behind it then.

        Raises:
            ValueError, IndexError, TypeError, ...: no pickle, or one that nothing real writes.
        """
        self.stack.clear()
        self.memo.clear()
        for count, (op, arg, _) in enumerate(pickletools.genops(stream)):
            if count >= MOST_INSTRUCTIONS:
                msg = f"a pickle of more than {MOST_INSTRUCTIONS} instructions"
                raise ValueError(msg)
            if (step := _STEPS.get(op.name)) is not None:
                step(self, arg)
            elif op.name in _CONSTANTS:
                self.stack.append(arg)
            elif op.name not in ("PROTO", "FRAME", "STOP"):
                msg = f"the instruction {op.name}"
                raise ValueError(msg)
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        """The objects pushed since the last mark, without the mark."""
        i = len(self.stack) - 1
        while self.stack[i] is not _MARK:
            i -= 1
        items = self.stack[i + 1 :]
        del self.stack[i:]
        return items

    def make(self, function: Any, args: Any) -> None:
        """Push what stands for a call."""
        result = called(function, args)
        if isinstance(result, Placeholder):
            self.found[result.name] = None
        self.stack.append(result)

    def fill(self, pairs: list[Any]) -> None:
        """Put keys and values, alternating, into the container on top."""
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(target, dict):
                target[_key(key)] = value
            elif isinstance(target, Placeholder):
                target.items.append((key, value))

    def extend(self, items: list[Any]) -> None:
        """Put items behind those of the list, or the set, on top."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Placeholder):
            target.items += enumerate(items, len(target.items))

    def build(self, state: Any) -> None:
        """Give the object on top its state."""
        target = self.stack[-1]
        if isinstance(target, Array | Kind):
            target.fill(*state)
        elif isinstance(target, Placeholder):
            target.state = state

    def refer(self, key: Any) -> None:
        """Push what the file around this pickle holds under a key."""
        if self.persistent is None:
            msg = "a reference to another file"
            raise ValueError(msg)
        self.stack.append(self.persistent(key))

    def name(self, name: str) -> None:
        """Push a name; a dtype stands for itself."""
        self.stack.append(_DTYPES.get(name) or Name(name))

    def top(self, count: int) -> list[Any]:
        """The last items of the stack, popped."""
        items = self.stack[len(self.stack) - count :]
        _require(len(items) == count, "more items popped than pushed")
        del self.stack[len(self.stack) - count :]
        return items


def _push(value: Callable[[Machine, Any], Any]) -> Callable[[Machine, Any], None]:
    return lambda m, arg: m.stack.append(value(m, arg))


def _memoize(m: Machine, index: Any) -> None:
    m.memo[len(m.memo) if index is None else index] = m.stack[-1]


def _stack_global(m: Machine) -> None:
    module, name = m.top(2)
    m.name(f"{module}.{name}")


def _instance(m: Machine, name: Any) -> None:
    args = m.since_mark()
    m.make(Name(name.replace(" ", ".")), args) if name is not None else m.make(args[0], args[1:])


def _new(m: Machine, keywords: bool) -> None:
    parts = m.top(3 if keywords else 2)
    m.make(parts[0], (*parts[1], parts[2]) if keywords and parts[2] else parts[1])


_CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "NONE": _push(lambda m, _: None),
    "NEWTRUE": _push(lambda m, _: True),
    "NEWFALSE": _push(lambda m, _: False),
    "EMPTY_LIST": _push(lambda m, _: []),
    "EMPTY_DICT": _push(lambda m, _: {}),
    "EMPTY_TUPLE": _push(lambda m, _: ()),
    "EMPTY_SET": _push(lambda m, _: []),
    "MARK": _push(lambda m, _: _MARK),
    "POP": lambda m, _: m.top(1).clear(),
    "POP_MARK": lambda m, _: m.since_mark().clear(),
    "DUP": _push(lambda m, _: m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _push(lambda m, index: m.memo[index])),
    **{f"TUPLE{n}": _push(lambda m, _, n=n: tuple(m.top(n))) for n in (1, 2, 3)},
    "TUPLE": _push(lambda m, _: tuple(m.since_mark())),
    "LIST": _push(lambda m, _: m.since_mark()),
    "FROZENSET": _push(lambda m, _: m.since_mark()),
    "DICT": _push(lambda m, _: _dict(list(zip((items := m.since_mark())[::2], items[1::2], strict=True)))),
    "APPEND": lambda m, _: m.extend(m.top(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.fill(m.top(2)),
    "SETITEMS": lambda m, _: m.fill(m.since_mark()),
    "GLOBAL": lambda m, name: m.name(name.replace(" ", ".")),
    "STACK_GLOBAL": lambda m, _: _stack_global(m),
    "INST": _instance,
    "OBJ": lambda m, _: _instance(m, None),
    "NEWOBJ": lambda m, _: _new(m, False),
    "NEWOBJ_EX": lambda m, _: _new(m, True),
    "REDUCE": lambda m, _: m.make(*m.top(2)),
    "BUILD": lambda m, _: m.build(m.top(1)[0]),
    "PERSID": lambda m, key: m.refer(key),
    "BINPERSID": lambda m, _: m.refer(m.top(1)[0]),
}
"""Instruction -> what the machine does. Those for extensions and buffers outside of the file are not among them."""


# ---- torch's files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpickled:
    """The content of a file, and the names of its classes and functions that were not imported."""

    value: Any
    names: tuple[str, ...]


def unpickled(source: Path | IO[bytes]) -> Unpickled:
    """The content of a torch checkpoint (zip or legacy), a TorchScript archive or a plain pickle; tensors are read when asked for.

    Raises:
        InputError: a file whose records do not have their checksums.
        Exception: any, for a file that is damaged or that nothing real wrote.
    """
    machine = Machine()
    if isinstance(source, Path):
        with source.open("rb") as file:
            value = _opened(file, machine, source)
    else:
        value = _opened(source, machine, None)
    return Unpickled(_settled(value), tuple(name for name in machine.found if not name.startswith("__torch__.")))


def _opened(file: IO[bytes], machine: Machine, path: Path | None) -> Any:
    start = file.read(4)
    file.seek(0)
    return _zipped(file, machine, path) if start == b"PK\x03\x04" else legacy(file, machine, path)


def _settled(value: Any) -> Any:
    return value.value if isinstance(value, Array) else value


def _reader(file: IO[bytes], path: Path | None, offset: int) -> Callable[[int, int], bytearray]:
    """Reads from the file at this place, opened again each time, so that nothing is held in between."""

    def read(start: int, count: int) -> bytearray:
        if path is None:
            file.seek(offset + start)
            return _exactly(file, count)
        with path.open("rb") as again:
            again.seek(offset + start)
            return _exactly(again, count)

    return read


def _exactly(file: IO[bytes], count: int) -> bytearray:
    data = bytearray(count)
    _require(cast("Any", file).readinto(data) == count, "the file ends before its numbers do")
    return data


def _zipped(file: IO[bytes], machine: Machine, path: Path | None = None) -> Any:
    """A zip archive of torch: `data.pkl`, in a TorchScript archive `constants.pkl` too, and one record of bytes for each storage."""
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
        if bad is not None:
            msg = f"{path} is damaged: {bad} does not have its checksum; expected a whole file: fetch or save it again"
            raise InputError(msg)
        records = {info.filename: info for info in archive.infolist()}
        root = next(name for name in records if name.rpartition("/")[2] == "data.pkl").removesuffix("data.pkl")
        _require(f"{root}byteorder" not in records or archive.read(f"{root}byteorder") == b"little", "numbers in big-endian order")

        def member(folder: str) -> Any:
            def storage(key: Any) -> Storage:
                _, kind, name, _, count = key
                return _record(file, path, records[f"{root}{folder}/{name}"], _STORAGES[kind.name.rpartition(".")[2]], count)

            machine.persistent = storage
            with archive.open(f"{root}{folder}.pkl") as stream:
                return machine.run(stream)

        value = member("data")
        constants = member("constants") if f"{root}constants.pkl" in records else ()
        return {"": value, "constants": constants} if constants else value  # no name before those of the module itself


def _record(file: IO[bytes], path: Path | None, info: zipfile.ZipInfo, dtype: torch.dtype, count: int) -> Storage:
    """The bytes of a record, which lie in the file as they are."""
    _require(info.compress_type == zipfile.ZIP_STORED, f"{info.filename} is compressed")
    size = count * dtype.itemsize
    _require(0 <= size <= info.file_size, f"{info.filename} holds fewer than {count} numbers")
    file.seek(info.header_offset)
    header = _exactly(file, 30)
    offset = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return Storage(dtype, size, _reader(file, path, offset))


def legacy(file: IO[bytes], machine: Machine, path: Path | None = None) -> Any:
    """Torch's older format, pickles in a row and the storages behind them; or a plain pickle, which has no storages."""
    storages: dict[str, list[Any]] = {}

    def persistent(key: Any) -> Any:
        if key[0] == "module":
            return key[1]
        _, kind, name, _, count, view = key
        dtype = _STORAGES[kind.name.rpartition(".")[2]]
        root, first = (name, 0) if view is None else (view[0], view[1])
        place = storages.setdefault(str(root), [None, dtype, count])

        def read(start: int, size: int) -> bytearray:
            return place[0](start + first * dtype.itemsize, size)

        return Storage(dtype, count * dtype.itemsize, read)

    machine.persistent = persistent
    value = machine.run(file)
    if value != _MAGIC:
        return value
    machine.run(file)  # the protocol
    machine.run(file)  # the machine it was written on
    value = machine.run(file)
    keys = machine.run(file)
    for key in keys:
        dtype = storages[key][1]
        size = int.from_bytes(_exactly(file, 8), "little") * dtype.itemsize
        offset = file.tell()
        _require(storages[key][2] * dtype.itemsize <= size and file.seek(0, 2) >= offset + size, "the file ends before its numbers do")
        storages[key][0] = _reader(file, path, offset)
        file.seek(offset + size)
    _require(all(place[0] is not None for place in storages.values()), "a tensor without its numbers")
    return value
