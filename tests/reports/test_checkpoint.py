import json
import os
import re
import struct
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

import gramlip as gl
from gramlip.reports.checkpoint import Weights
from gramlip.reports.formats import read
from gramlip.reports.readers import read_bytes
from gramlip.testing.oracle import oracle

NET = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
STATE = NET.state_dict()
KEPT = ["0.weight", "3.weight"]


def weights(value, path, **options):
    torch.save(value, path, **options)
    return Weights("x", read(path))


def left_out(state):
    return {out.name: out for out in Weights("x", read_bytes(save({k: v.contiguous() for k, v in state.items()}))).sort()[1]}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": []}},
        lambda s: {"model": s, "best": torch.tensor(0.5)},
        lambda s: {"model_state_dict": s, "lr_scheduler": {"last_lr": [0.1]}},
        lambda s: {"checkpoint": {"state_dict": s}},
        lambda s: {"net": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"ema": {"n_averaged": torch.tensor(4)} | {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": nn.Parameter(v, requires_grad=v.is_floating_point()) if v.ndim else v for k, v in s.items()},
    ],
)
def test_containers_and_prefixes_are_read_as_people_save_them(tmp_path, wrap, zipped):
    source = weights(wrap(STATE), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert source.sort()[0] == KEPT
    assert torch.equal(source.operator("3.weight").weight, STATE["3.weight"])


def test_two_networks_are_both_bounded_under_their_own_names(tmp_path):
    source = weights({"model": STATE, "ema": STATE}, tmp_path / "x.pt")
    assert source.sort()[0] == [f"{part}.{name}" for part in ("model", "ema") for name in KEPT]


def test_nested_layers_keep_their_names(tmp_path):
    w = torch.ones(2, 2)
    assert weights({"params": {"a": {"weight": w}, "b": [w, w]}}, tmp_path / "x.pt").sort()[0] == ["a.weight", "b.0", "b.1"]
    assert weights({"linear": {"weight": w}}, tmp_path / "x.pt").sort()[0] == ["linear.weight"]
    assert weights(w, tmp_path / "x.pt").sort()[0] == ["weight"]


def test_names_that_would_collide_keep_their_prefix(tmp_path):
    w = torch.ones(2, 2)
    assert weights({"a": w, "module.a": w}, tmp_path / "x.pt").sort()[0] == ["a", "module.a"]
    assert weights({"a": w, "_orig_mod.a": w}, tmp_path / "x.pt").sort()[0] == ["a", "_orig_mod.a"]


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({1: 100 * torch.eye(3), "1": torch.eye(2)}, "1"),
        ({"a": {"b.c": torch.eye(3)}, "a.b": {"c": torch.eye(2)}}, "a.b.c"),
    ],
)
def test_two_tensors_of_one_name_are_refused(tmp_path, state, name):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(gl.InputError, match=rf"two tensors of the name {name}; expected a name for each"):
        read(tmp_path / "x.pt")


def test_containers_without_an_end_are_refused(tmp_path):
    deep, itself = {"weight": torch.eye(2)}, {"weight": torch.eye(2)}
    itself["model"] = itself
    for _ in range(200):
        deep = {"model": deep}
    for state in (deep, itself):
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(gl.InputError, match="more than 100 containers, or one that holds itself"):
            read(tmp_path / "x.pt")


def test_the_state_of_training_is_listed(tmp_path):
    source = weights({"state_dict": STATE, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "x.pt")
    assert [(out.name, out.reason) for out in source.sort()[1]][-1] == ("optimizer", "state of training")


def quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: sparse and nested tensors are prototypes
        return make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse_csr(), r"s\.weight is stored as torch\.sparse_csr; .*: type s\.weight\.to_dense\(\)$"),
        (lambda: torch.eye(3).to_sparse(), r"s\.weight is stored as torch\.sparse_coo; .*: type s\.weight\.to_dense\(\)$"),
        (lambda: torch.empty(3, 3, device="meta"), r"s\.weight is on the meta device; .*: load the weights$"),
        (lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), r"s\.weight is nested, .*: save what its unbind"),
    ],
)
def test_what_is_no_plain_tensor_says_what_to_type(tmp_path, make, message):
    quiet(lambda: torch.save({"s.weight": make()}, tmp_path / "x.pt"))
    with pytest.raises(gl.InputError, match=rf"^{re.escape(str(tmp_path / 'x.pt'))}: {message}"):
        quiet(lambda: Weights(str(tmp_path / "x.pt"), read(tmp_path / "x.pt")).audit())


def damaged(path, kind):
    whole = save(STATE) if path.suffix == ".safetensors" else None
    if whole is None:
        torch.save({"w": torch.randn(50, 50)}, path)
        whole = path.read_bytes()
    middle = len(whole) // 2
    data = {
        "empty": b"",
        "truncated": whole[:middle],
        "short": whole[:5],
        "junk": b"no weights at all, but text",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "header": struct.pack("<Q", 2**62) + b'{"a":1}',
        "zip": b"PK\x03\x04" + bytes(40),
    }[kind]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["empty", "truncated", "short", "junk", "header"])
def test_damaged_safetensors(tmp_path, kind):
    with pytest.raises(gl.InputError, match=r"x\.safetensors"):
        read(damaged(tmp_path / "x.safetensors", kind))


@pytest.mark.parametrize("kind", ["empty", "truncated", "short", "junk", "flipped", "zip"])
def test_damaged_torch_checkpoints(tmp_path, kind):
    with pytest.raises(gl.InputError, match=r"x\.pt") as caught:
        read(damaged(tmp_path / "x.pt", kind))
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_files_without_tensors(tmp_path):
    with pytest.raises(gl.InputError, match="does not exist"):
        read(tmp_path / "missing.pt")
    with pytest.raises(gl.InputError, match="is a folder"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(gl.InputError, match="is no regular file"):
        read(tmp_path / "pipe.pt")
    torch.save({"w": torch.eye(2)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(gl.InputError, match=r"is a torch checkpoint by its content; .*: type mv .* .*checkpoint\.pt"):
        read(tmp_path / "checkpoint.safetensors")
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(gl.InputError, match="holds no tensor"):
        read(tmp_path / "x.pt")
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(gl.InputError, match="holds no tensor"):
        read(tmp_path / "x.safetensors")
    with pytest.raises(gl.InputError, match="holds nothing to bound"):
        Weights("x", read_bytes(save({"b": torch.ones(3)}))).audit()


def index(tmp_path, places):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def test_sharded_safetensors(tmp_path):
    save_file({"a": torch.ones(2, 2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(3, 2)}, tmp_path / "2.safetensors")
    found = read(index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"}))
    assert {name: entry.shape for name, entry in found.entries.items()} == {"a": (2, 2), "b": (3, 2)}


def test_a_shard_is_read_whole(tmp_path):
    save_file({"a": torch.ones(2, 2), "extra": torch.ones(3, 2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2, 2)}, tmp_path / "2.safetensors")
    places = index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert list(read(places).entries) == ["a", "b", "extra"]
    for twice in ("extra", "a"):
        save_file({"b": torch.ones(2, 2), twice: torch.ones(4, 2)}, tmp_path / "2.safetensors")
        with pytest.raises(gl.InputError, match=f"two tensors of the name {twice}"):
            read(places)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../1.safetensors"}, "beside the index"),
        ({"a": "/etc/passwd"}, "beside the index"),
        ({"a": "2.safetensors"}, "does not exist"),
        ({"c": "1.safetensors"}, "which lacks it"),
        ({"a": 3}, "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_bad_indices(tmp_path, places, message):
    save_file({"a": torch.ones(2, 2)}, tmp_path / "1.safetensors")
    with pytest.raises(gl.InputError, match=message):
        read(index(tmp_path, places))


def test_an_index_that_is_no_json(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(gl.InputError, match="no JSON"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128])
def test_every_dtype_is_bounded_from_above_and_below(tmp_path, dtype):
    torch.manual_seed(0)
    matrix, kernel = torch.randn(7, 5, dtype=torch.complex128), torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last)
    matrix = matrix.to(dtype) if dtype.is_complex else matrix.real.to(dtype)
    report = weights({"matrix": matrix, "kernel": kernel.to(dtype)}, tmp_path / "x.pt").audit()
    truth = float(torch.linalg.svdvals(matrix.to(torch.complex128))[0])
    assert report.layers[0].lower <= truth <= report.layers[0].upper <= 1.02 * truth


LAYERS = [
    (nn.Conv2d(4, 6, 3, padding=1), 7),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), 7),
    (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), 6),
    (nn.Conv2d(4, 4, (1, 3), groups=4), 5),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 5),
    (nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular"), 5),
    (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), 5),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), 4),
    (nn.Conv1d(2, 3, 4, stride=4), 12),
    (nn.Conv3d(2, 2, 2, padding=1), 3),
]


@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=lambda value: str(value)[:90])
@pytest.mark.parametrize("fill", ["random", "ones"])
def test_weights_alone_dominate_the_layer_whatever_its_geometry(layer, size, fill):
    torch.manual_seed(1)
    layer.weight.data = torch.randn_like(layer.weight) if fill == "random" else torch.ones_like(layer.weight)
    report = Weights("x", read_bytes(save({"w": layer.weight.detach()}))).audit()
    truth = oracle(layer, (layer.in_channels, *(size,) * (layer.weight.ndim - 2)))
    assert report.layers[0].upper >= truth
    assert report.layers[0].op == f"Conv{layer.weight.ndim - 2}d"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_name_the_tensor(bad):
    matrix = torch.ones(3, 3)
    matrix[1, 2] = bad
    with pytest.raises(gl.InputError, match=r"body\.fc\.weight holds NaN or infinite"):
        Weights("x", read_bytes(save({"a": torch.ones(2, 2), "body.fc.weight": matrix}))).audit()


def test_an_axis_of_size_zero_names_the_tensor():
    with pytest.raises(gl.InputError, match=r"fc\.weight has shape \(0, 3\)"):
        Weights("x", read_bytes(save({"fc.weight": torch.ones(0, 3)}))).audit()


def test_what_no_linear_map_is_made_of():
    state = {
        "bn.weight": torch.ones(3),
        "bn.bias": torch.ones(3),
        "bn.running_mean": torch.ones(3),
        "bn.num_batches_tracked": torch.tensor(3),
        "ln.weight": torch.ones(3, 4, 4),
        "ln.bias": torch.ones(3, 4, 4),
        "block.norm2.weight": torch.ones(3, 4),
        "scale": torch.tensor(2.0),
        "index": torch.ones(3, 3, dtype=torch.int64),
        "relative_position_bias_table": torch.ones(9, 2),
        "wte.weight": torch.ones(9, 2),
        "model.embed_tokens.weight": torch.ones(9, 2),
        "bert.embeddings.token_type_embeddings.weight": torch.ones(2, 2),
        "gpt_neox.embed_in.weight": torch.ones(9, 2),
        "tok_embeddings.weight": torch.ones(9, 2),
        "detr.query_embed.weight": torch.ones(9, 2),
        "pos_embed": torch.ones(1, 9, 2),
        "cls_token": torch.ones(1, 1, 2),
    }
    found = left_out(state | {"fc.weight": torch.ones(2, 2)})
    assert set(found) == set(state)
    assert not any(out.is_weight for out in found.values())
    assert all(out.reason for out in found.values())


def test_linear_maps_with_names_near_those():
    state = {
        "patch_embed.proj.weight": torch.ones(4, 3, 2, 2),
        "embed.weight": torch.ones(4, 3),
        "embed.bias": torch.ones(4),
        "embed_out.weight": torch.ones(4, 3),
        "time_embed.0.weight": torch.ones(4, 3),
        "emb_proj.weight": torch.ones(4, 3),
        "embed_hidden.weight": torch.ones(4, 3),
        "state_embed.weight": torch.ones(4, 3),
        "patch_embed.weight": torch.ones(4, 3),
        "pos_embed_proj": torch.ones(4, 3),
        "attn.in_proj_weight": torch.ones(9, 3),
        "rnn.weight_ih_l0": torch.ones(9, 3),
    }
    assert set(left_out(state)) == {"embed.bias"}


def test_weights_whose_layer_is_not_stored_are_marked(tmp_path):
    conv = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    state = {f"conv.{k}": v for k, v in conv.state_dict().items()} | {f"fc.{k}": v for k, v in normed.state_dict().items()}
    state |= {"old.weight_orig": torch.ones(2, 2), "old.weight_u": torch.ones(2), "old.weight_v": torch.ones(2)}
    state |= {"cut.weight_orig": torch.ones(2, 2), "cut.weight_mask": torch.ones(2, 2)}
    state |= {"wn.weight_g": torch.ones(2, 1), "wn.weight_v": torch.ones(2, 2)}
    state |= {
        "six": torch.ones(1, 1, 1, 1, 1, 1),
        "q.weight": torch.ones(2, 2, dtype=torch.int8),
        "f8": torch.ones(2, 2).to(torch.float8_e4m3fn),
    }
    source = weights(state | {"last.weight": torch.ones(2, 2)}, tmp_path / "x.pt")
    kept, out = source.sort()
    assert kept == ["last.weight"]
    reasons = {row.name: row.reason for row in out if row.is_weight}
    assert set(reasons) == {
        "conv.parametrizations.weight.original",
        "fc.parametrizations.weight.original1",
        "old.weight_orig",
        "cut.weight_orig",
        "wn.weight_v",
        "six",
        "q.weight",
        "f8",
    }
    assert "spectral_norm" in reasons["conv.parametrizations.weight.original"]
    assert "spectral_norm" in reasons["old.weight_orig"]
    assert "weight_norm" in reasons["fc.parametrizations.weight.original1"]
    assert "weight_norm" in reasons["wn.weight_v"]
    assert "pruning" in reasons["cut.weight_orig"]
    assert len(source.audit().above(100.0)) == len(reasons)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_quantised_weights_are_named_with_the_scale_beside_them(kind, tmp_path):
    narrow = torch.ones(4, 4).to(torch.float8_e4m3fn)
    state = {
        "a.weight": narrow.clone(),
        "a.weight_scale_inv": torch.ones(2, 2),
        "b.weight": narrow.to(torch.float8_e5m2),
        "b.weight_scale": torch.tensor(0.5),
        "c.weight": narrow.clone(),
        "d.qweight": torch.ones(4, 4, dtype=torch.int32),
        "d.scales": torch.ones(2, 4),
        "e.weight": torch.ones(4, 4, dtype=torch.int8),
        "e.SCB": torch.ones(4),
        "f.relative_index": torch.ones(4, 4, dtype=torch.int64),
        "f.scale": torch.ones(3, 3),  # no scale of an index, so a map
        "last.weight": torch.ones(2, 2),
    }
    path = tmp_path / f"x.{kind}"
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    source = Weights(str(path), read(path))
    kept, out = source.sort()
    assert sorted(kept) == ["b.weight", "f.scale", "last.weight"]
    reasons = {row.name: row.reason for row in out if row.is_weight}
    assert set(reasons) == {"a.weight", "c.weight", "d.qweight", "e.weight"}
    assert "float8_e4m3fn entries, to be multiplied by the scale beside them, weight_scale_inv: audit the model" in reasons["a.weight"]
    assert "no scale beside them such as weight_scale: if they are the weights themselves, type gramlip.bound" in reasons["c.weight"]
    assert ("scales:" in reasons["d.qweight"], "SCB:" in reasons["e.weight"]) == (True, True)
    scales = {row.name for row in out if row.reason == "the scale of a quantised weight"}
    assert scales == {"a.weight_scale_inv", "b.weight_scale", "d.scales", "e.SCB"}
    report = str(source.audit())
    assert "weight_scale_inv" in report.partition("weights without a bound")[2]
    assert len(source.audit().above(100.0)) == len(reasons)


@pytest.mark.parametrize(
    ("shape", "scale", "blocks"),
    [
        ((6, 4), (), (6, 4)),
        ((6, 4), (1,), (6, 4)),
        ((6, 4), (6,), (1, 4)),
        ((6, 4), (6, 1), (1, 4)),
        ((6, 4), (1, 4), (6, 1)),
        ((200, 130), (2, 2), (128, 128)),
        ((64, 96), (4, 6), (16, 16)),
        ((256, 128), (2, 1), (128, 128)),
    ],
)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_weights_are_bounded_times_their_scale(shape, scale, blocks, kind):
    codes = (4 * torch.randn(shape)).to(kind)
    factors = torch.rand(scale) + 0.5
    report = Weights("x", read_bytes(save({"a.weight": codes, "a.weight_scale_inv": factors}))).audit(rtol=1e-4)
    truth = codes.double()
    for i in range(shape[0]):
        for j in range(shape[1]):
            at = (i // blocks[0], j // blocks[1])
            truth[i, j] *= float(factors.reshape(-1)[0] if factors.numel() == 1 else factors.reshape(-(-shape[0] // blocks[0]), -1)[at])
    norm = float(torch.linalg.matrix_norm(truth, 2))
    assert norm / (1 + 1e-4) <= report.layers[0].lower <= norm <= report.layers[0].upper <= norm * (1 + 1e-4)
    assert f"{str(kind).removeprefix('torch.')} codes times weight_scale_inv" in report.layers[0].bound.because


@pytest.mark.parametrize(("shape", "scale"), [((200, 130), (3, 2)), ((6, 4), (4,)), ((6, 4), (2, 2)), ((2, 6, 4), (2, 1, 1))])
def test_a_scale_whose_shape_does_not_say_how_it_multiplies(shape, scale):
    state = {"a.weight": torch.ones(shape).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(scale), "w": torch.eye(2)}
    kept, out = Weights("x", read_bytes(save(state))).sort()
    assert kept == ["w"]
    assert [row.name for row in out if row.is_weight] == ["a.weight"]


def test_a_file_of_quantised_weights_alone_names_their_scale(tmp_path):
    state = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)}
    with pytest.raises(gl.InputError, match=r"a\.weight: float8_e4m3fn entries.*weight_scale_inv.*type package\.module:callable"):
        weights(state, tmp_path / "x.pt").audit()


def test_a_file_of_parametrised_layers_alone_says_what_to_type(tmp_path):
    conv = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    with pytest.raises(gl.InputError, match=r"parametrizations\.weight\.original: raw tensor .*: type package\.module:callable"):
        weights(conv.state_dict(), tmp_path / "x.pt").audit()


def test_an_ordered_dict_keeps_its_order(tmp_path):
    state = OrderedDict((name, torch.ones(2, 2)) for name in ("z", "a", "m"))
    assert [row.name for row in weights(state, tmp_path / "x.pt").audit().layers] == ["z", "a", "m"]
