"""Files that Keras, ONNX's exporter, gguf, PEFT and Lightning write: what is bounded, against the norms that these libraries compute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import gguf
import keras
import lightning.pytorch as pl
import numpy as np
import onnx
import peft
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gramlip as gl
from gramlip.reports.checkpoint import Weights
from gramlip.reports.formats import read


def rows(path: Path, rtol: float = 1e-4) -> dict[str, Any]:
    return {row.name: row for row in Weights(str(path), read(path)).audit(rtol=rtol).layers}


def left_out(path: Path) -> dict[str, Any]:
    return {row.name: row for row in Weights(str(path), read(path)).sort()[1]}


def norm(matrix: Any) -> float:
    return float(torch.linalg.matrix_norm(torch.as_tensor(np.asarray(matrix)).double(), 2))


def stretched(layer: Any, shape: tuple[int, ...]) -> float:
    """The norm of a Keras layer without its bias, from the images of a basis."""
    basis = np.eye(int(np.prod(shape)), dtype=np.float32).reshape(-1, *shape)
    zero = np.asarray(keras.ops.convert_to_numpy(layer(np.zeros((1, *shape), np.float32))))
    images = np.asarray(keras.ops.convert_to_numpy(layer(basis))) - zero
    return norm(images.reshape(len(basis), -1))


# ---- Keras ---------------------------------------------------------------------------------------------------------------


def keras_net() -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(5, 3, padding="same", name="first")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(x)
    x = keras.layers.SeparableConv2D(4, 5, padding="same")(x)
    x = keras.layers.Conv2DTranspose(6, 3, strides=2, padding="same")(x)
    x = keras.layers.Reshape((-1, 6))(x)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x)
    x = keras.layers.Conv1D(3, 5, padding="causal")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(7)(x))


@pytest.mark.parametrize("kind", ["x.keras", "x.weights.h5", "x.h5"])
def test_keras_layers_are_bounded_with_their_axes(tmp_path: Path, kind: str) -> None:
    model = keras_net()
    path = tmp_path / kind
    model.save_weights(path) if kind == "x.weights.h5" else model.save(path)
    found = rows(path)

    def row(layer: Any, shape: tuple[int, ...]) -> Any:
        (one,) = [row for row in found.values() if row.weight_shape == shape]
        return one

    layers = {type(layer).__name__: layer for layer in model.layers}
    for name, shape, size in (
        ("Conv2D", (5, 3, 3, 3), (6, 6, 3)),
        ("DepthwiseConv2D", (10, 1, 3, 3), (6, 6, 5)),
        ("Conv2DTranspose", (4, 6, 3, 3), (4, 4, 4)),
        ("Conv1D", (3, 6, 5), (9, 6)),
        ("Dense", (3, 7), (3,)),
    ):
        truth = stretched(layers[name], size)
        assert truth <= row(name, shape).upper * (1 + 1e-6), name
        assert row(name, shape).upper <= 3 * truth, name  # the supremum over all sizes, strides and groups
    dense = norm(layers["Dense"].get_weights()[0])
    assert dense * (1 - 1e-12) <= row("Dense", (3, 7)).upper <= (1 + 2e-4) * dense
    assert {row.weight_shape for row in found.values()} >= {(10, 1, 5, 5), (4, 10, 1, 1)}  # the two of the separable one
    heads = [row for row in left_out(path).values() if row.is_weight]
    assert len(heads) == 4  # query, key, value, output: (6, 2, 3) is no kernel
    assert all("axes" in row.reason for row in heads)


def test_an_embedding_and_a_recurrent_layer_of_keras(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Embedding(11, 4), keras.layers.LSTM(3), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    model.fit(np.ones((4, 5)), np.ones((4, 2)), verbose=0)
    model.save(tmp_path / "x.keras")
    assert {row.weight_shape for row in rows(tmp_path / "x.keras").values()} == {(4, 12), (3, 12), (3, 2)}
    out = left_out(tmp_path / "x.keras")
    assert any(row.weight_shape == (11, 4) and "embedding" in row.reason for row in out.values())
    assert any(row.reason == "state of training" for row in out.values())


# ---- GGUF ----------------------------------------------------------------------------------------------------------------


def test_gguf_plain_and_quantised(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain, wide = rng.normal(size=(16, 64)).astype(np.float32), rng.normal(size=(32, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", plain)
    writer.add_tensor("blk.0.attn_k.weight", plain.astype(np.float16))
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "BF16")]
    for kind in kinds:
        writer.add_tensor(f"blk.0.{kind.name}.weight", gguf.quantize(wide, kind), raw_dtype=kind)
    writer.add_tensor("token_embd.weight", plain)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = rows(tmp_path / "x.gguf")
    assert list(found) == ["blk.0.attn_q.weight", "blk.0.attn_k.weight", *(f"blk.0.{kind.name}.weight" for kind in kinds)]
    truths = {"attn_q": norm(plain), "attn_k": norm(plain.astype(np.float16))}
    truths |= {kind.name: norm(gguf.dequantize(gguf.quantize(wide, kind), kind)) for kind in kinds}
    for name, truth in truths.items():
        row = found[f"blk.0.{name}.weight"]
        assert row.lower <= truth * (1 + 1e-12)
        assert truth * (1 - 1e-12) <= row.upper <= truth * (1 + 2e-4)
    assert "dequantised from Q4_0 to float32 by gguf" in found["blk.0.Q4_0.weight"].bound.because
    assert "dequantised" not in found["blk.0.BF16.weight"].bound.because
    assert set(left_out(tmp_path / "x.gguf")) == {"token_embd.weight", "blk.0.attn_norm.weight"}
    (tmp_path / "short.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:200])
    with pytest.raises(gl.InputError, match="cannot be read as GGUF"):
        read(tmp_path / "short.gguf")


# ---- ONNX ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
def test_initializers_of_onnx(tmp_path: Path, external: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "fc": rng.normal(size=(6, 5)).astype(np.float16),
        "table": rng.normal(size=(9, 5)).astype(np.float32),
        "mask": rng.normal(size=(6, 6)).astype(np.float32),
        "shape": np.array([1, 2]),
    }
    helper = onnx.helper
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"]),
        helper.make_node("MatMul", ["a", "fc"], ["b"]),
        helper.make_node("Gather", ["table", "shape"], ["c"]),
        helper.make_node("Add", ["b", "mask"], ["y"]),
    ]
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    held = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [], held))
    options = {"save_as_external_data": True, "location": "data.bin", "size_threshold": 0} if external else {}
    onnx.save(model, tmp_path / "x.onnx", **options)
    found = rows(tmp_path / "x.onnx")
    assert list(found) == ["conv.weight", "fc"]
    assert norm(arrays["fc"]) <= found["fc"].upper <= norm(arrays["fc"]) * (1 + 2e-4)
    assert {name: row.is_weight for name, row in left_out(tmp_path / "x.onnx").items()} == {"table": False, "mask": False, "shape": False}
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(gl.InputError, match="cannot be read as ONNX"):
        read(tmp_path / "bad.onnx")


def test_external_data_stays_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    np.ones((4, 4), np.float32).tofile(tmp_path / "secret.bin")
    tensor = onnx.TensorProto(name="w", dims=[4, 4], data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.bin")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [tensor])
    (tmp_path / "model" / "x.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(gl.InputError, match="w cannot be read"):
        rows(tmp_path / "model" / "x.onnx")


# ---- PEFT ----------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.conv, self.emb = nn.Linear(12, 20), nn.Linear(20, 6), nn.Conv2d(3, 5, 3), nn.Embedding(10, 12)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_change_of_an_adapter_is_that_which_peft_merges(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    patterns: dict[str, Any] = {"rank_pattern": {"out": 2}, "alpha_pattern": {"fc": 3}}
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["fc", "out", "conv", "emb"], **patterns)
    net = Net()
    before = {name: getattr(net, name).weight.detach().double().clone() for name in ("fc", "out", "conv")}
    model = peft.get_peft_model(net.double(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    found = rows(tmp_path)
    assert sorted(found) == ["conv", "fc", "out"]
    merged = model.merge_and_unload()
    for name, weight in before.items():
        change = getattr(merged, name).weight.detach().double() - weight
        expected = gl.bound(change if change.ndim == 2 else gl.Conv(change), rtol=1e-4)
        assert found[name].weight_shape == tuple(change.shape)
        assert found[name].lower <= float(expected.upper) * (1 + 1e-6)
        assert float(expected.lower) * (1 - 1e-6) <= found[name].upper <= float(expected.upper) * (1 + 2e-4)


def test_dora_is_no_product(tmp_path: Path) -> None:
    peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["fc"], use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(gl.InputError, match="use_dora"):
        read(tmp_path)


# ---- Lightning -----------------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    module = Module()
    data = DataLoader(TensorDataset(torch.ones(4, 4)))
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, **options)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert list(rows(tmp_path / "x.ckpt")) == ["net.0.weight", "net.2.weight"]
    assert {"optimizer_states", "callbacks"} & set(left_out(tmp_path / "x.ckpt"))
