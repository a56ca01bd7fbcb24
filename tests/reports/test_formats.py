"""Folders and arrays, each written by the library whose format it is, and low-rank changes against the product itself."""

import collections
import enum
import json
import shutil
import subprocess
import sys
import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import gramlip as gl
from gramlip.cli import main
from gramlip.reports.checkpoint import Weights, low_rank
from gramlip.reports.formats import FOLDERS, FORMATS, read
from gramlip.reports.readers import extra
from gramlip.testing.oracle import oracle

NET = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
STATE = NET.state_dict()
KEPT = ["0.weight", "3.weight"]


def kept(path):
    return Weights("x", read(path)).sort()[0]


def holds(path, state=STATE, names=KEPT):
    source = Weights("x", read(path))
    assert sorted(source.sort()[0]) == sorted(names)
    for name in names:
        assert torch.equal(source.operator(name).weight, state[name].detach())
    return source


# ---- folders -------------------------------------------------------------------------------------------------------------


def test_a_folder_of_safetensors_is_a_target(tmp_path, capsys):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    holds(tmp_path)
    assert main(["audit", str(tmp_path), "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["target"], len(data["layers"])) == (str(tmp_path), 2)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_with_an_index_of_shards(tmp_path, suffix):
    shards = {f"model-{i}-of-2.{suffix}": {k: v for k, v in STATE.items() if (k[0] == "0") == (i == 1)} for i in (1, 2)}
    for name, part in shards.items():
        save_file(part, tmp_path / name) if suffix == "safetensors" else torch.save(part, tmp_path / name)
    places = {key: name for name, part in shards.items() for key in part}
    (tmp_path / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    holds(tmp_path)
    assert len(read(tmp_path).files) == 3


def test_one_file_alone_in_a_folder(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    holds(tmp_path)
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    holds(tmp_path)
    save_file(STATE, tmp_path / "other.safetensors")
    with pytest.raises(gl.InputError, match=r"is a folder with diffusion_pytorch_model\.safetensors, other\.safetensors; expected one"):
        read(tmp_path)


def test_a_folder_of_the_distributed_checkpoint(tmp_path):
    model = {"model": STATE, "optimizer": {"state": {"0.weight": {"exp_avg": torch.ones(3, 2, 3, 3)}}, "step": 3}, "epoch": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(model, checkpoint_id=tmp_path / "a", no_dist=True)
        dcp.save(STATE, checkpoint_id=tmp_path / "b", no_dist=True)
    assert holds(tmp_path / "a").stored.skipped == ("optimizer",)
    holds(tmp_path / "b")
    (tmp_path / "a" / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(gl.InputError):
        Weights("x", read(tmp_path / "a")).audit()


SHARDED = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(3, 5, 3), nn.Linear(7, 3))
expected = {k: v.clone() for k, v in model.state_dict().items()}
fully_shard(model)
dcp.save({"model": model.state_dict()}, checkpoint_id=sys.argv[1])
if dist.get_rank() == 0:
    torch.save(expected, sys.argv[1] + ".pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_a_folder_that_fsdp_wrote_in_shards(tmp_path):
    (tmp_path / "shard.py").write_text(SHARDED)
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*run, str(tmp_path / "shard.py"), str(tmp_path / "c")], check=True, capture_output=True, timeout=200)
    expected = torch.load(tmp_path / "c.pt", weights_only=True)
    holds(tmp_path / "c", expected, ["0.weight", "1.weight", "2.weight"])
    assert len(list((tmp_path / "c").glob("*.distcp"))) == 2


@pytest.mark.parametrize(
    "change", [lambda m: m.replace(b"__0_0.distcp", b"../0_.distcp"), lambda m: m[: len(m) // 2], lambda m: b"\x80\x02}."]
)
def test_the_metadata_of_another_place_or_none(tmp_path, change):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / ".metadata").write_bytes(change((tmp_path / ".metadata").read_bytes()))
    with pytest.raises(gl.InputError):
        Weights("x", read(tmp_path)).audit()


def test_deepspeed_folders(tmp_path):
    step = tmp_path / "global_step3"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step3\n")
    torch.save({"module": STATE, "optimizer": None, "ds_version": "0.15", "dtype": torch.float32}, step / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for place in (tmp_path, step):
        holds(place)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(gl.InputError, match="expected"):
        read(tmp_path)


class ZeroStageEnum(enum.IntEnum):
    """As DeepSpeed's own: a class that the reader must not import."""

    gradients = 2
    weights = 3


class Tied(nn.Module):
    """Two groups of parameters of odd sizes, frozen ones, buffers, and a weight under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        self.read_out = nn.Linear(7, 11, bias=False)
        self.head = nn.Linear(7, 11)
        self.head.weight = self.read_out.weight

    def groups(self):
        """Trained parameters as an optimiser has them, without the second name of one of them."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return [{n: p for n, p in trained.items() if p.ndim > 1}, {n: p for n, p in trained.items() if p.ndim == 1}]


def flat(tensors, world, *, each):
    """The parts of the ranks: each tensor cut into slices (ZeRO 3), or all of them in a row cut (ZeRO 1 and 2); NaN pads them."""
    parts = [[] for _ in range(world)]
    for tensor in tensors if each else [torch.cat([t.flatten() for t in tensors])]:
        unit = world if each else 2 * world
        padded = torch.full((-(-tensor.numel() // unit) * unit,), float("nan"), dtype=tensor.dtype)
        padded[: tensor.numel()] = tensor.detach().flatten()
        for part, slice_ in zip(parts, padded.chunk(world), strict=True):
            part.append(slice_)
    return [torch.cat(part) for part in parts]


def write_zero(folder, net, stage, world, *, module=None):
    """A step that `engine.save_checkpoint` writes: module in bfloat16, masters in float32."""
    half = {name: tensor.detach().bfloat16() for name, tensor in net.state_dict().items()}
    placeholder = torch.empty(0, dtype=torch.bfloat16)
    groups, frozen = net.groups(), {name: p for name, p in net.named_parameters() if not p.requires_grad}
    buffers = [name for name, _ in net.named_buffers()]
    folder.mkdir()
    for rank in range(world):
        states = {
            "module": {n: t if n in buffers else placeholder for n, t in half.items()} if module is None else module,
            "buffer_names": buffers,
            "param_shapes": [collections.OrderedDict((n, p.shape) for n, p in group.items()) for group in groups],
            "shared_params": {"head.weight": "read_out.weight"},
            "frozen_param_shapes": {name: p.shape for name, p in frozen.items()},
            "frozen_param_fragments": {n: flat([half[n]], world, each=True)[rank] if stage == 3 else half[n] for n in frozen},
            "ds_version": "0.15",
            "dp_world_size": world,
        }
        if stage == 3 or rank == 0:
            torch.save(states, folder / f"{f'zero_pp_rank_{rank}_' * (stage == 3)}mp_rank_00_model_states.pt")
        masters = [flat(group.values(), world, each=stage == 3)[rank] for group in groups]
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimiser = {
            "zero_stage": ZeroStageEnum(stage),
            "partition_count": world if stage == 3 else [world] * len(groups),
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(50), "step": 3}}, "param_groups": [{"lr": 0.1}]},
            key: [nn.Parameter(master) for master in masters],
        }
        prefix = "" if stage == 3 else "bf16_"
        torch.save({"optimizer_state_dict": optimiser}, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return half


@pytest.mark.parametrize("world", [1, 2, 4, 11])
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_of_zero_are_put_together(tmp_path, stage, world):
    net = Tied()
    step = tmp_path / "global_step3"
    half = write_zero(step, net, stage, world)
    (tmp_path / "latest").write_text("global_step3")
    for place in (tmp_path, step):
        stored = read(place)
        assert list(stored.entries) == list(net.state_dict())
        for name, tensor in net.state_dict().items():
            trained = name in net.groups()[0] or name in net.groups()[1] or name == "head.weight"
            expected = tensor if trained else half[name]
            entry = stored.entries[name]
            assert (entry.shape, entry.dtype) == (tuple(expected.shape), str(expected.dtype).removeprefix("torch."))
            assert torch.equal(entry.load(), expected), name
        assert any(f"from the files of {world} ranks" in note for note in stored.notes)
        assert any("ZeroStageEnum" in note for note in stored.notes)
        assert len(stored.files) == (world * 2 if stage == 3 else world + 1)
    names, out = Weights("x", read(tmp_path)).sort()
    assert sorted(names) == ["conv.weight", "frozen.weight", "head.weight", "read_out.weight"]
    assert not any(row.is_weight for row in out)


def test_zero_2_with_a_whole_module_keeps_it(tmp_path):
    net = Tied()
    half = write_zero(tmp_path / "s", net, 2, 2, module={n: t.bfloat16() for n, t in net.state_dict().items()})
    stored = read(tmp_path / "s")
    assert all(torch.equal(stored.entries[name].load(), tensor) for name, tensor in half.items())
    assert (list(stored.entries), len(stored.files)) == (list(half), 1)


def rewritten(file, change):
    states = torch.load(file, weights_only=False)
    change(states)
    torch.save(states, file)


def drop_numbers(states):
    key = next(key for key in states["optimizer_state_dict"] if key in ("fp32_flat_groups", "single_partition_of_fp32_groups"))
    states["optimizer_state_dict"][key][0] = states["optimizer_state_dict"][key][0][:-7]


def count_ranks(count):
    return lambda states: states["optimizer_state_dict"].update(partition_count=count)


def in_integers(states):
    key = next(key for key in states["optimizer_state_dict"] if key in ("fp32_flat_groups", "single_partition_of_fp32_groups"))
    states["optimizer_state_dict"][key] = [part.nan_to_num().int() for part in states["optimizer_state_dict"][key]]


def add_parameter(name, shape):
    """A whole one of ZeRO 1 and 2 that the module names, or one of no numbers among the trained ones."""

    def change(states):
        if 0 in shape:
            states["param_shapes"][0][name] = shape
        else:
            states["module"] = {**states["module"], name: torch.ones(shape)}

    return change


def of_rank(folder, number, kind="optim"):
    return sorted(folder.glob(f"*pp_rank_{number}_*{kind}_states.pt"))


def renamed(file, old, new):
    return file.with_name(file.name.replace(old, new))


DAMAGES = {
    r"lacks zero_pp_rank_1_mp_rank_00_optim_states\.pt; expected the files of 3": lambda s: [f.unlink() for f in of_rank(s, 1)],
    r"lacks zero_pp_rank_0_mp_rank_00_optim_states\.pt; expected": lambda s: [f.unlink() for f in s.glob("*optim*")],
    r"lacks zero_pp_rank_2_mp_rank_00_optim": lambda s: [f.rename(renamed(f, "rank_2", "rank_3")) for f in of_rank(s, 2)],
    r"has, beside .* zero_pp_rank_3_mp": lambda s: [shutil.copy(f, renamed(f, "rank_2", "rank_3")) for f in of_rank(s, 2)],
    r"has \d+ numbers for shapes of \d+; expected the files": lambda s: [rewritten(f, drop_numbers) for f in of_rank(s, 2)],
    r"cannot be read as states of DeepSpeed": lambda s: [f.write_bytes(b"PK\x03\x04 short") for f in of_rank(s, 2)],
    r"expected the files of 1000000000000000 ranks": lambda s: [rewritten(f, count_ranks(10**15)) for f in s.glob("*optim*")],
    r"has .* and .*rank_2_mp_rank_00_optim_states.* for one rank": lambda s: [
        shutil.copy(f, f.with_name("other_" + f.name)) for f in of_rank(s, 2)
    ],
    r"numbers of several types; expected the files": lambda s: [rewritten(f, in_integers) for f in of_rank(s, 0)],
    r"DeepSpeed \(5 of shape \(2, 2\) is no parameter\)": lambda s: [rewritten(f, add_parameter(5, (2, 2))) for f in s.glob("*model*")],
    r"DeepSpeed \('x' of shape \(0, -7\) is no": lambda s: [rewritten(f, add_parameter("x", (0, -7))) for f in s.glob("*model*")],
    r"of shape \(0, 10{30}\) is no parameter": lambda s: [rewritten(f, add_parameter("x", (0, 10**30))) for f in s.glob("*model*")],
    r"DeepSpeed \('float' object|of shape \(0\.0, 2\) is no parameter": lambda s: [
        rewritten(f, add_parameter("x", (0.0, 2))) for f in s.glob("*model*")
    ],
    r"latest cannot be read \(.*codec.*\); expected the name of": lambda s: (s / "latest").write_bytes(b"\xff\xfe"),
    r"latest cannot be read \(.*too long.*\); expected the name of": lambda s: (s / "latest").write_text("x" * 5000),
    r"2 ranks of tensor parallelism share": lambda s: [shutil.copy(f, renamed(f, "mp_rank_00", "mp_rank_01")) for f in s.glob("*.pt")],
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("message", DAMAGES)
def test_ranks_that_do_not_fit_are_one_line(tmp_path, stage, message):
    write_zero(tmp_path / "s", Tied(), stage, 3)
    DAMAGES[message](tmp_path / "s")
    with pytest.raises(gl.InputError, match=message):
        read(tmp_path / "s")


def test_a_rank_of_zero_3_without_its_states(tmp_path):
    write_zero(tmp_path / "s", Tied(), 3, 3)
    (tmp_path / "s" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(gl.InputError, match=r"lacks zero_pp_rank_1_mp_rank_00_model_states\.pt; expected the files of 3 ranks"):
        read(tmp_path / "s")


def test_groups_of_experts_are_refused(tmp_path):
    write_zero(tmp_path / "s", Tied(), 2, 2)
    for file in (tmp_path / "s").glob("*optim*"):
        rewritten(file, lambda s: s["optimizer_state_dict"].update(partition_count=[2, 1]))
    with pytest.raises(gl.InputError, match=r"shares its groups among \[2, 1\] ranks; expected one number: type engine"):
        read(tmp_path / "s")


def test_states_of_experts_and_of_a_pipeline_are_joined(tmp_path):
    experts = {f"1.experts.{k}.weight": torch.randn(2, 3) for k in range(2)}
    torch.save({"module": STATE, "num_experts": [2]}, tmp_path / "mp_rank_00_model_states.pt")
    for k, (name, tensor) in enumerate(experts.items()):
        torch.save({name: tensor}, tmp_path / f"layer_0_expert_{k}_mp_rank_00_model_states.pt")
    holds(tmp_path, STATE | experts, [*KEPT, *experts])
    for file in tmp_path.glob("*expert*"):
        file.unlink()
    for layer in (2, 10):
        torch.save({"weight": torch.full((2, 3), float(layer))}, tmp_path / f"layer_{layer:02d}-model_00-model_states.pt")
    torch.save({"module": None}, tmp_path / "mp_rank_01_model_states.pt")
    assert kept(tmp_path) == ["2.weight", "10.weight"]
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "layer_02-model_01-model_states.pt")
    with pytest.raises(gl.InputError, match=r"that 2 ranks of tensor parallelism share; expected them whole"):
        read(tmp_path)


LOADED = """
import re, sys, torch
from pathlib import Path
from gramlip.reports.formats import read
mib = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
entry = read(Path(sys.argv[1])).entries["weight"]
before = mib()
weight = entry.load()
print(mib() - before)
torch.save(weight, sys.argv[2])
"""


def test_one_slice_of_zero_is_in_memory_at_a_time(tmp_path):
    """A weight of 32 MB on 8 ranks: itself and a slice, while each file holds as much of Adam's averages."""
    net = nn.Module()
    net.weight = nn.Parameter(torch.randn(2048, 4095))
    net.groups = lambda: [{"weight": net.weight}]
    write_zero(tmp_path / "s", net, 3, 8)
    run = [sys.executable, "-W", "ignore", "-c", LOADED, str(tmp_path / "s"), str(tmp_path / "whole.pt")]
    grown = float(subprocess.run(run, check=True, capture_output=True, timeout=200).stdout)
    assert 30 < grown < 48
    assert torch.equal(torch.load(tmp_path / "whole.pt"), net.weight)


def test_folders_without_weights(tmp_path, capsys):
    assert main(["audit", str(tmp_path)]) == 2
    assert "is a folder without weights; expected one that holds adapter_config.json" in capsys.readouterr().err


# ---- arrays of NumPy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz(tmp_path, write):
    rng = np.random.default_rng(0)
    dense, half, big = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)).astype(np.float16), rng.normal(size=(3, 4)).astype(">f4")
    conv, heads = rng.normal(size=(3, 3, 2, 5)), rng.normal(size=(4, 2, 3))
    objects = np.array([{}], dtype=object)
    arrays = {"dense/w": dense, "half": half, "big": big, "a/kernel": conv, "b/kernel": heads, "steps": np.arange(3), "name": np.array("x")}
    write(tmp_path / "x.npz", **arrays, o=objects)
    source = Weights("x", read(tmp_path / "x.npz"))
    names, out = source.sort()
    assert names == ["dense.w", "half", "big", "a.kernel"]
    assert torch.equal(source.operator("big").weight, torch.from_numpy(big.astype("f4")))
    assert source.operator("a.kernel").weight.shape == (5, 2, 3, 3)
    assert source.operator("a.kernel").weight[4, 1, 2, 0] == conv[2, 0, 1, 4]
    assert [row.name for row in out if row.is_weight] == ["b.kernel"]
    assert {row.name for row in out} == {"b.kernel", "steps", "name", "o"}
    np.save(tmp_path / "x.npy", dense)
    assert torch.equal(Weights("x", read(tmp_path / "x.npy")).operator("weight").weight, torch.from_numpy(dense))
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-40])
    with pytest.raises(gl.InputError):
        read(tmp_path / "x.npz")


def test_an_npz_with_a_pickle_inside_is_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'marker')!r}, 'w')",)

    np.savez(tmp_path / "x.npz", w=np.eye(2), evil=np.array([Evil()], dtype=object), allow_pickle=True)
    assert kept(tmp_path / "x.npz")[0] == "w"
    assert not (tmp_path / "marker").exists()


# ---- extras --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start", "package"), [("x.h5", b"\x89HDF\r\n\x1a\n", "h5py"), ("x.gguf", b"GGUF", "gguf"), ("x.onnx", b"\x08", "onnx")]
)
def test_a_reader_that_is_not_installed_is_one_line(tmp_path, monkeypatch, name, start, package):
    (tmp_path / name).write_bytes(start + bytes(100))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(gl.InputError, match=rf"needs {package}, which cannot be imported .*: type pip install gramlip\[\w+\]"):
        read(tmp_path / name)
    if package == "onnx":
        with pytest.raises(gl.InputError, match=r"needs onnx, which cannot be imported .*: type pip install gramlip\[onnx\]"):
            gl.onnx.load(tmp_path / name, (3, 8, 8))


def test_the_extras_are_those_of_the_package():
    from importlib.metadata import metadata

    provided = metadata("gramlip").get_all("Provides-Extra")
    assert extra.__doc__
    for name in ("keras", "gguf", "onnx"):
        assert not provided or name in provided or "dev" in provided


def test_every_format_stands_in_the_documents():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    for name in (*FORMATS, *FOLDERS):
        assert f"`{name}`" in text or name in text, f"docs/formats.md lacks {name}"


# ---- low-rank changes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "r"), [(20, 30, 4), (3, 30, 8), (30, 3, 8), (3, 2, 8), (40, 40, 1), (7, 5, 7)])
@pytest.mark.parametrize("kind", ["random", "graded", "parallel", "tiny", "huge"])
def test_the_product_of_two_factors_is_bounded_without_being_formed(dtype, m, n, r, kind):
    torch.manual_seed(m + n + r)
    left, right = torch.randn(m, r, dtype=torch.float64), torch.randn(r, n, dtype=torch.float64)
    if kind == "graded":
        left, right = left * 10.0 ** -torch.arange(r).double(), right * (10.0 ** torch.arange(r).double()[:, None]).clamp(max=1e4)
    elif kind == "parallel":
        left = left[:, :1] + 1e-6 * left
    elif kind in ("tiny", "huge") and dtype not in (torch.float16,):
        left, right = (x * (1e-30 if kind == "tiny" else 1e30) for x in (left, right))
    left, right = left.to(dtype).double(), right.to(dtype).double()
    op, says = low_rank(left, right, 1.5)
    assert max(op.weight.shape) <= r
    found = says(gl.bound(op, rtol=1e-4))
    exact = 1.5 * (left.to(torch.float64) @ right)
    truth = float(torch.linalg.matrix_norm(exact, 2))
    slack = 1e-13 * 1.5 * float(left.norm() * right.norm())  # what the oracle itself rounds
    assert found.lower <= truth + slack
    assert found.upper >= truth - slack
    assert found.upper <= (1 + 2e-4) * truth + 100 * slack + 1e-200


def test_integer_factors_have_a_norm_that_is_known_exactly():
    """B and A of one row of units each: the norm of their product is 6, exactly, and the interval holds it, however the sums round."""
    for m in (1, 5, 33):
        left = torch.zeros(m, 3, dtype=torch.float64)
        left[m // 2, 1] = 2.0
        right = torch.zeros(3, 9, dtype=torch.float64)
        right[1, 4] = 3.0
        op, says = low_rank(left, right, -1.0)
        found = says(gl.bound(op, rtol=1e-6))
        assert found.lower <= 6.0 <= found.upper <= 6.0 * (1 + 1e-5)


def test_products_of_two_vectors_exactly():
    """||b a|| = ||b|| ||a||, in decimals of 60 digits: what rounding left of the factors is a few units, and lies inside."""
    generator = torch.Generator().manual_seed(0)
    with localcontext() as context:
        context.prec = 60
        for m in range(2, 1500, 25):
            left, right = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((m, 1), (1, m + 3)))
            op, says = low_rank(left, right, 1.0)
            core = abs(float(op.weight))  # the norm of a matrix of one entry, exactly
            found = says(gl.Bound(core, core, ""))
            truth = sum(Decimal(x) ** 2 for x in left.flatten().tolist()) * sum(Decimal(x) ** 2 for x in right.flatten().tolist())
            assert Decimal(found.lower) ** 2 <= truth <= Decimal(float(found.upper)) ** 2
            assert found.rtol < 1e-9


def test_a_factor_of_zeros_gives_exactly_zero():
    op, says = low_rank(torch.zeros(4, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64), 2.0)
    assert (says(gl.bound(op)).lower, says(gl.bound(op)).upper) == (0.0, 0.0)


def adapter(folder, state, **config):
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": False, "alpha_pattern": {}} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(prefix="base_model.model."):
    torch.manual_seed(0)
    return {
        f"{prefix}fc.lora_A.weight": torch.randn(4, 12),
        f"{prefix}fc.lora_B.weight": torch.randn(20, 4),
        f"{prefix}conv.lora_A.weight": torch.randn(4, 3, 3, 3),
        f"{prefix}conv.lora_B.weight": torch.randn(5, 4, 1, 1),
        f"{prefix}emb.lora_embedding_A": torch.randn(4, 10),
        f"{prefix}emb.lora_embedding_B": torch.randn(12, 4),
        f"{prefix}head.weight": torch.randn(3, 3),
    }


@pytest.mark.parametrize(
    ("config", "scales"), [({}, (1.5, 1.5)), ({"use_rslora": True}, (3.0, 3.0)), ({"alpha_pattern": {"fc": 3}}, (0.75, 1.5))]
)
def test_an_adapter_is_the_change_that_it_adds(tmp_path, config, scales):
    state = factors()
    report = Weights("x", read(adapter(tmp_path, state, **config))).audit(rtol=1e-4)
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["fc", "conv", "head.weight"] or sorted(rows) == ["conv", "fc", "head.weight"]
    change = scales[0] * state["base_model.model.fc.lora_B.weight"].double() @ state["base_model.model.fc.lora_A.weight"].double()
    truth = float(torch.linalg.matrix_norm(change, 2))
    assert rows["fc"].lower <= truth * (1 + 1e-12)
    assert truth * (1 - 1e-12) <= rows["fc"].upper <= truth * (1 + 1e-3)
    assert rows["fc"].weight_shape == (20, 12)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    left, right = state["base_model.model.conv.lora_B.weight"].flatten(1), state["base_model.model.conv.lora_A.weight"].flatten(1)
    conv.weight.data = scales[1] * (left @ right).reshape(5, 3, 3, 3)
    assert rows["conv"].upper >= oracle(conv, (3, 7, 7)) * (1 - 1e-6)
    assert rows["conv"].upper <= float(gl.bound(conv).upper) * 1.02
    assert rows["conv"].weight_shape == (5, 3, 3, 3)
    assert any("adapter adds" in note for note in report.notes)


def test_a_journal_of_an_adapter(tmp_path):
    source = Weights("x", read(adapter(tmp_path, factors())))
    whole = source.audit(journal=tmp_path / "j")
    assert Weights("x", read(tmp_path)).audit(journal=tmp_path / "j").to_dict() == whole.to_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"use_dora": True}, "LORA use_dora; expected LORA"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern has"),
        ({"lora_alpha": "x"}, "could not convert"),
    ],
)
def test_adapters_that_are_no_product(tmp_path, config, message):
    with pytest.raises(gl.InputError, match=message):
        read(adapter(tmp_path, factors(), **config))


def test_factors_that_do_not_fit_are_weights_without_a_bound(tmp_path):
    state = factors()
    state["base_model.model.fc.lora_B.weight"] = torch.randn(20, 3)
    state["base_model.model.two.lora_A.weight"] = torch.randn(4, 12)
    out = Weights("x", read(adapter(tmp_path, state))).sort()[1]
    assert {row.name for row in out if row.is_weight} == {"fc", "two"}
