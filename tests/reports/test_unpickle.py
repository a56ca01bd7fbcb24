"""Pickles that hold more than tensors: values are those of torch's own loader, and nothing of the file is imported or called."""

import argparse
import builtins
import collections
import io
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import gramlip as gl
from gramlip.reports import unpickle
from gramlip.reports.checkpoint import Weights
from gramlip.reports.formats import read
from gramlip.reports.unpickle import Machine, unpickled

STATE = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).state_dict()
KEPT = ["0.weight", "3.weight"]


class Hyper:
    """Hyper-parameters of a class of the user's."""

    def __init__(self):
        self.width, self.where, self.matrix = 3, pathlib.PurePosixPath("/data"), torch.eye(3)


class Slots:
    __slots__ = ("depth",)

    def __init__(self):
        self.depth = 3


class Net(nn.Module):
    """A module with a buffer that its state does not hold, and a list of others."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Conv1d(2, 3, 3)])
        self.table = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("passing", torch.randn(5, 5), persistent=False)
        self.register_buffer("kept", torch.randn(4, 4))
        self.act = nn.ReLU()


class Evil:
    """Unpickled, it would call a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def tensors(path):
    return {name: entry.load() for name, entry in read(path).entries.items()}


def same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_as_public_repositories_save_them(tmp_path, zipped):
    net = nn.Sequential(nn.Linear(3, 2))
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    value = {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "epoch": np.int64(3),
        "best_acc1": np.float64(0.5),
        "history": np.arange(6.0).reshape(2, 3),
        "optimizer": optimiser.state_dict(),
        "whole_optimizer": optimiser,
        "hyper": Hyper(),
        "slots": Slots(),
        "counts": collections.Counter("abc"),
        "lists": collections.defaultdict(list, a=[1]),
        "set": {1, 2},
        "state_dict": STATE,
    }
    torch.save(value, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    stored = read(tmp_path / "x.pth")
    expected = {f"state_dict.{name}": tensor for name, tensor in STATE.items()}
    same(tensors(tmp_path / "x.pth"), {"history": torch.arange(6.0).double().reshape(2, 3), "hyper.matrix": torch.eye(3)} | expected)
    assert stored.skipped == ("optimizer", "whole_optimizer")
    (note,) = stored.notes
    for name in ("argparse.Namespace", "test_unpickle.Hyper", "test_unpickle.Slots", "pathlib.PurePosixPath", "torch.optim.adam.Adam"):
        assert name in note
    report = Weights("x", stored).audit()
    assert note in report.notes
    assert [row.name for row in report.layers] == ["history", "hyper.matrix", *(f"state_dict.{name}" for name in KEPT)]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_has_the_names_of_its_state(tmp_path, zipped):
    net = nn.Sequential(Net(), nn.utils.prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5))
    torch.save({"model": net, "epoch": 3}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    same(dict(sorted(tensors(tmp_path / "x.pt").items())), {k: v.detach() for k, v in sorted(net.state_dict().items())})
    assert "test_unpickle.Net" in read(tmp_path / "x.pt").notes[0]


def test_a_class_that_is_nowhere_is_not_looked_for(tmp_path, monkeypatch):
    (tmp_path / "usermod.py").write_text("import pathlib\npathlib.Path('imported').touch()\nclass Config(dict):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import usermod

    torch.save({"config": usermod.Config(a=torch.ones(2, 2)), "model": STATE}, "x.pt")
    (tmp_path / "imported").unlink()
    monkeypatch.delitem(sys.modules, "usermod")
    assert Weights("x", read(tmp_path / "x.pt")).sort()[0] == ["config.a", *(f"model.{name}" for name in KEPT)]
    assert "usermod" not in sys.modules
    assert not (tmp_path / "imported").exists()


VIEWS = {
    "plain": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "cut": torch.arange(40.0).reshape(5, 8)[1:4, 2:7:2],
    "expanded": torch.ones(1, 4).expand(3, 4),
    "channels last": torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last),
    "conjugate": torch.randn(2, 3, dtype=torch.complex64).conj(),
    "negative": torch.randn(2, 3, dtype=torch.complex64).conj().imag,
    "empty": torch.ones(0, 3),
    "number": torch.tensor(2.0),
    "bool": torch.tensor([[True, False]]),
    "uint16": torch.ones(2, 2, dtype=torch.uint16),
    "float8": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "parameter": nn.Parameter(torch.ones(2, 2)),
    "bfloat16": torch.randn(2, 2, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_views_are_those_that_torch_reads(tmp_path, zipped):
    base = torch.randn(6, 6)
    value = VIEWS | {"shared": base[1:3], "shared too": base.T[2:]}
    if not zipped:  # torch itself has no storage of these types in its older format
        del value["uint16"], value["float8"]
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    same(tensors(tmp_path / "x.pt"), {k: v.detach() for k, v in torch.load(tmp_path / "x.pt", weights_only=True).items()})


ARRAYS = {
    "c": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "big endian": np.arange(6, dtype=">f4").reshape(3, 2),
    "half": np.ones((2, 2), np.float16),
    "complex": np.ones((2, 2), np.complex128) * 1j,
    "int": np.arange(3),
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol(tmp_path, protocol):
    value = collections.OrderedDict(arrays=ARRAYS, odd=[np.float32(2.5), np.array(["a"]), np.array([1, None])])
    value |= {"state": STATE} if protocol > 2 else {}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    if protocol < 2:  # no magic number tells such a file
        with io.BytesIO((tmp_path / "x.pkl").read_bytes()) as file:
            found = Machine().run(file)
        assert found["odd"][0] == 2.5
        assert torch.equal(found["arrays"]["fortran"].value.load(), torch.from_numpy(ARRAYS["fortran"].copy()))
        return
    expected = {f"arrays.{k}": torch.from_numpy(np.array(v, v.dtype.newbyteorder("="))) for k, v in ARRAYS.items()}
    same(tensors(tmp_path / "x.pkl"), expected | {f"state.{k}": v for k, v in value.get("state", {}).items()})


def test_a_tensor_that_a_function_was_to_change_is_left_out(tmp_path):
    torch.save({"codes": Evil(os.path.join, torch.ones(2, 2), torch.ones(3)), "w": torch.eye(2)}, tmp_path / "x.pt")
    source = Weights("x", read(tmp_path / "x.pt"))
    assert source.sort()[0] == ["w"]
    reasons = {out.name: (out.reason, out.is_weight) for out in source.sort()[1]}
    assert "argument of posixpath.join, which was not run" in reasons["codes.0"][0]
    assert (reasons["codes.0"][1], reasons["codes.1"][1]) == (True, False)
    assert source.audit().above(5.0) == ["codes.0 (upper inf)"]


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "bytes"])
def test_nothing_that_a_file_calls_is_run(tmp_path, how, protocol):
    path, marker = tmp_path / "x.pt", tmp_path / "marker"
    evil = [
        Evil(os.mkdir, str(marker)),
        Evil(os.system, f"touch {marker}"),
        Evil(builtins.eval, f"__import__('os').mkdir({str(marker)!r})"),
        Evil(builtins.exec, f"import os; os.mkdir({str(marker)!r})"),
        Evil(builtins.__import__, "antigravity"),
        Evil(subprocess.Popen, ["touch", str(marker)]),
        Evil(torch.load, str(marker)),
        Evil(np.load, str(marker)),
    ]
    value = {"state_dict": STATE, "evil": evil}
    if how == "pickle":
        path.write_bytes(b"\x80\x02" * (protocol < 2) + pickle.dumps({"w": np.eye(2), "evil": evil}, protocol))
    elif how == "bytes":  # a pickle in the bytes of another's storage
        inner = io.BytesIO()
        torch.save(evil, inner, _use_new_zipfile_serialization=False)
        path.write_bytes(pickle.dumps({"w": np.eye(2), "s": Evil(torch.storage._load_from_bytes, inner.getvalue())}, protocol + 3))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=how == "zip", pickle_protocol=max(protocol, 2))
    stored = read(path)
    assert not marker.exists()
    assert "antigravity" not in sys.modules
    assert Weights("x", stored).audit().layers
    if how != "bytes":
        assert all(name in stored.notes[0] for name in ("posix.mkdir", "posix.system", "eval", "exec", "Popen", "torch.serialization.load"))


INSTRUCTIONS = {
    "instance": b"(S'touch marker'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch marker'\no.",
    "stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch marker\x85R.",
    "new": b"\x80\x02cos\nsystem\nS'touch marker'\n\x85\x81.",
    "state": b"\x80\x02cbuiltins\nobject\n)\x81}S'__class__'\ncos\nsystem\nsb.",
    "setstate": b"\x80\x02cos\nsystem\n}S'__setstate__'\ncos\nsystem\nsbS'touch marker'\nb.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\ncos\npath\nS'join'\n\x86RS'a'\n\x85R.",
    "function of a function": b"\x80\x02cbuiltins\ngetattr\ncos\npath\nS'join'\n\x86R(S'a'\ntR.",
}


@pytest.mark.parametrize("code", INSTRUCTIONS.values(), ids=list(INSTRUCTIONS))
def test_instructions_that_call_make_placeholders(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    machine = Machine()
    machine.run(io.BytesIO(code))
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.pt").write_bytes(b"\x80\x02" + code)
    with pytest.raises(gl.InputError, match=r"holds no tensor"):
        read(tmp_path / "x.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def forged(shape, strides, start=0, count=4):
    """A checkpoint whose one tensor claims this shape."""
    machine = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{count}\ntQ"
    ints = lambda values: "(" + "".join(f"L{v}L\n" for v in values) + "t"  # noqa: E731
    tensor = f"ctorch._utils\n_rebuild_tensor_v2\n({machine.format(count=count)}L{start}L\n{ints(shape)}{ints(strides)}I00\nNtR"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}S'w'\n" + tensor.encode() + b"s.")
        archive.writestr("x/data/0", bytes(16))
    return data.getvalue()


BOMBS = {
    "a memo of 2**32 places": b"\x80\x02]r\xff\xff\xff\xff.",
    "bytes that are not there": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a byte array that is not there": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "text that is not there": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a byte array by its size": b"\x80\x02cbuiltins\nbytearray\nL1099511627776L\n\x85R.",
    "a frame that is not there": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"x.",
    "a key without an end": b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns.",
    "one that holds itself": b"\x80\x02}q\x00S'model'\nh\x00s.",
    "one that holds another twice": b"\x80\x02]" + b"".join(b"q%c]h%ch%c\x86a" % (i, i, i) for i in range(60)) + b".",
    "an instruction of an extension": b"\x80\x02\x82\x01.",
    "a buffer outside of the file": b"\x80\x05\x97.",
    "a stack that is empty": b"\x80\x02R.",
    "a mark that is not there": b"\x80\x02Nu.",
    "no end": b"\x80\x02" + b"}" * 1000,
    "zeros by strides": forged((1 << 30, 1 << 20), (0, 0)),
    "more than its storage": forged((3, 3), (3, 1)),
    "strides beyond": forged((2, 2), (1 << 60, 1)),
    "a negative stride": forged((2, 2), (-1, 1)),
    "a start beyond": forged((2, 2), (2, 1), start=1 << 61),
    "more numbers than the record": forged((2, 2), (2, 1), count=1 << 40),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=list(BOMBS))
def test_what_would_fill_the_memory_is_refused(tmp_path, bomb):
    (tmp_path / "x.pt").write_bytes(bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(gl.InputError, match=r"x\.pt") as caught:
        read(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # kilobytes


def test_a_tensor_of_its_whole_storage_is_none_of_those(tmp_path):
    (tmp_path / "x.pt").write_bytes(forged((2, 2), (2, 1)))
    same(tensors(tmp_path / "x.pt"), {"w": torch.zeros(2, 2)})


def test_more_instructions_than_a_checkpoint_has(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2, 2), "list": list(range(1000))}, tmp_path / "x.pt")
    monkeypatch.setattr(unpickle, "MOST_INSTRUCTIONS", 500)
    with pytest.raises(gl.InputError, match="a pickle of more than 500 instructions"):
        read(tmp_path / "x.pt")


def test_compressed_records_are_refused(tmp_path):
    torch.save({"w": torch.zeros(100, 100)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(gl.InputError, match="is compressed"):
        read(tmp_path / "y.pt")


def test_big_endian_numbers_are_refused(tmp_path):
    torch.save({"w": torch.zeros(10, 10)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(gl.InputError, match="big-endian"):
        read(tmp_path / "y.pt")


def test_torchscript_archives_give_their_weights(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(net)
        script.save(str(tmp_path / "x.pt"))
        torch.jit.freeze(script).save(str(tmp_path / "frozen.pt"))
    same(tensors(tmp_path / "x.pt"), {k: v.detach() for k, v in net.state_dict().items()})
    assert read(tmp_path / "x.pt").notes == ()
    frozen = tensors(tmp_path / "frozen.pt")
    for weight in (net[0].weight, net[3].weight):
        assert any(value.shape == weight.shape and torch.equal(value, weight) for value in frozen.values())


def test_values_are_read_when_asked_for(tmp_path):
    torch.save({"w": torch.ones(1 << 20), "v": torch.ones(2)}, tmp_path / "x.pt")
    value = unpickled(tmp_path / "x.pt").value
    (tmp_path / "x.pt").unlink()
    with pytest.raises(FileNotFoundError):
        value["w"].load()
