"""Whole models of ONNX: outputs as onnxruntime has them, the interval of the exported module, and files that are not to be read."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

import gramlip as gl
from gramlip.cli import main
from gramlip.onnx import load

# ---- graphs of a few nodes ------------------------------------------------------------------------------------------------

N = onnx.helper.make_node
FLOAT = onnx.TensorProto.FLOAT


def small(nodes: list[Any], held: dict[str, Any] | None = None, opset: int = 17, result: str = "y") -> onnx.ModelProto:
    helper = onnx.helper
    x = helper.make_tensor_value_info("x", FLOAT, [1, 4])
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (held or {}).items()]
    graph = helper.make_graph(nodes, "g", [x], [helper.make_empty_tensor_value_info(result)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)], ir_version=10)


# ---- models --------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.fc = nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.Linear(8, 5)
        self.layers = nn.Sequential(Block(6, 6, 1), Block(6, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.c, self.out = nn.Conv2d(14, 6, 3, 1, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.a(x))
        up = F.interpolate(F.leaky_relu(self.b(a)), scale_factor=2, mode="bilinear")
        return self.out(F.relu(self.c(torch.cat([a, up], 1))))


class Encoder(nn.Module):
    """Patches, positions, one encoder layer of torch, the mean and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", batch_first=True, norm_first=True)
        self.places = nn.Parameter(torch.randn(1, 4, 8) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2) + self.places).mean(1))


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        up = [nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 3, 2, 1, output_padding=1)]
        self.first, self.up = nn.Linear(8, 128), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), *up, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.first(x).view(-1, 8, 4, 4))


def depthwise() -> nn.Module:
    body = [nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.ReLU6(), nn.Conv2d(6, 8, 1), nn.GroupNorm(4, 8), nn.ELU()]
    first = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Hardswish()]
    return nn.Sequential(*first, *body, nn.AvgPool2d(3, ceil_mode=True), nn.Flatten(), nn.Linear(8 * 4, 5), nn.Softmax(-1))


def perceptron() -> nn.Module:
    first = [nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 16), nn.SiLU()]
    return nn.Sequential(*first, nn.Linear(16, 16), nn.PReLU(16), nn.Linear(16, 16), nn.Hardsigmoid(), nn.Linear(16, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, (3, 12, 12)),
    "u-net": (UNet, (3, 8, 8)),
    "encoder": (Encoder, (3, 8, 8)),
    "generator": (Generator, (8,)),
    "depthwise": (depthwise, (3, 12, 12)),
    "perceptron": (perceptron, (8,)),
}
EXPORTS = [(11, False), (17, False), (18, True), (23, True)]  # versions of the operators, and torch's two exporters
NO_RULE = {("encoder", 11)}  # torch itself does not export it in this version


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose statistics are not those of a fresh one."""
    torch.manual_seed(0)
    model = make().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
    return model


def exported(model: nn.Module, shape: tuple[int, ...], path: Path, opset: int, dynamo: bool, **options: Any) -> Path:
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(1, *shape),), path, opset_version=opset, dynamo=dynamo, verbose=False, **options)
    return path


def session(path: Path) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    made = onnxruntime.InferenceSession(path, options)
    name = made.get_inputs()[0].name
    return lambda x: torch.cat([torch.from_numpy(made.run(None, {name: sample[None].numpy()})[0]) for sample in x])


@pytest.mark.parametrize(("opset", "dynamo"), EXPORTS)
@pytest.mark.parametrize("name", MODELS)
def test_an_export_computes_and_is_bounded_as_the_module(tmp_path: Path, name: str, opset: int, dynamo: bool) -> None:
    if (name, opset) in NO_RULE:
        return
    make, shape = MODELS[name]
    model = trained(make)
    path = exported(model, shape, tmp_path / "x.onnx", opset, dynamo)
    found, run = load(path), session(path)
    x = torch.randn(4, *shape)
    assert torch.allclose(found(x), run(x), rtol=1e-4, atol=1e-5)
    report, expected = (gl.audit(m, shape, effort=0.0, rtol=1e-4) for m in (found, model))
    if name != "encoder":  # of which torch exports the attention in pieces
        assert report.upper == pytest.approx(expected.upper, rel=1e-4)
    assert report.upper <= 1.1 * expected.upper
    near = x + 1e-2 * torch.randn_like(x)
    quotients = (run(near) - run(x)).flatten(1).norm(dim=1) / (near - x).flatten(1).norm(dim=1)
    assert report.upper >= quotients.max()
    assert report.lower >= quotients.max() / 10


@pytest.mark.parametrize(("opset", "dynamo"), [(14, False), (18, True)])
def test_activations_that_are_exported_in_pieces(tmp_path: Path, opset: int, dynamo: bool) -> None:
    layers = [nn.Softplus(2.0, 15.0), nn.Mish(), nn.GELU(), nn.SiLU(), nn.GELU("tanh"), nn.Softplus()]
    for i, layer in enumerate(layers if dynamo else layers[1:]):
        path = exported(nn.Sequential(layer), (5,), tmp_path / f"{i}.onnx", opset, dynamo)
        found = load(path)
        within = 2e-5 if isinstance(layer, nn.GELU) and layer.approximate == "tanh" else 1e-6  # its curve is enclosed, not known
        assert gl.audit(found, (5,)).upper == pytest.approx(gl.audit(layer, (5,)).upper, rel=within)
        x = 20 * torch.randn(30, 5)
        assert torch.allclose(found(x), session(path)(x), rtol=1e-5, atol=1e-5)


IDIOMS: dict[str, tuple[list[Any], dict[str, Any], list[str]]] = {
    "quotient": (
        [N("Sqrt", ["v"], ["s"]), N("Div", ["one", "s"], ["t"]), N("Mul", ["t", "x"], ["y"])],
        {"one": np.float32(1)},
        ["Sqrt_0", "Mul_2"],
    ),
    "inverse": ([N("Sqrt", ["v"], ["s"]), N("Reciprocal", ["s"], ["t"]), N("Mul", ["x", "t"], ["y"])], {}, ["Sqrt_0", "Mul_2"]),
    "linear": ([N("MatMul", ["x", "w"], ["p"]), N("Add", ["b", "p"], ["y"])], {}, ["MatMul_0"]),
    "masked": (
        [N("Softmax", ["x"], ["p"]), N("IsNaN", ["p"], ["n"]), N("Where", ["n", "zero", "p"], ["y"])],
        {"zero": np.float32(0)},
        ["Softmax_0", "Where_2"],
    ),
    "bias of a value": ([N("MatMul", ["x", "w"], ["p"]), N("Add", ["x", "p"], ["y"])], {}, ["MatMul_0", "Add_1"]),
    "bias of a matrix": ([N("MatMul", ["x", "w"], ["p"]), N("Add", ["p", "w"], ["y"])], {}, ["MatMul_0", "Add_1"]),
}


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_compute_the_same(tmp_path: Path, name: str) -> None:
    nodes, held, calls = IDIOMS[name]
    rng = np.random.default_rng(0)
    w, b, v = (x.astype(np.float32) for x in (rng.normal(size=(4, 4)), rng.normal(size=4), rng.uniform(1, 2, size=(1, 4))))
    onnx.save(small(nodes, {"w": w, "b": b, "v": v} | held), tmp_path / "x.onnx")
    found = load(tmp_path / "x.onnx")
    assert found.calls == calls
    x = torch.randn(3, 4)
    assert torch.allclose(found(x), session(tmp_path / "x.onnx")(x), atol=1e-6)


def test_what_is_like_an_idiom_is_left_as_it_is(tmp_path: Path) -> None:
    nodes = [N("Softplus", ["x"], ["s"]), N("Tanh", ["s"], ["t"]), N("Mul", ["s", "t"], ["y"])]
    onnx.save(small(nodes), tmp_path / "x.onnx")
    assert load(tmp_path / "x.onnx").calls == ["Softplus_0", "Tanh_1", "Mul_2"]
    nodes = [N("Sqrt", ["x"], ["s"]), N("Div", ["k", "s"], ["t"]), N("Mul", ["x", "t"], ["y"])]
    onnx.save(small(nodes, {"k": np.float32(2)}), tmp_path / "x.onnx")
    assert load(tmp_path / "x.onnx").calls == ["Sqrt_0", "Div_1", "Mul_2"]
    nodes = [N("Greater", ["x", "k"], ["g"]), N("Softplus", ["x"], ["s"]), N("Div", ["s", "k"], ["d"]), N("Where", ["g", "x", "d"], ["y"])]
    onnx.save(small(nodes, {"k": np.float32(2)}), tmp_path / "x.onnx")
    assert load(tmp_path / "x.onnx").calls[-1] == "Where_3"


def test_names_are_those_of_the_module(tmp_path: Path) -> None:
    model = trained(ResNet)
    found = load(exported(model, (3, 12, 12), tmp_path / "x.onnx", 18, True))
    names = {row.name.partition(" ")[0] for row in gl.audit(found, found.example, effort=-1).layers}
    assert {"stem", "layers.0.conv1", "layers.1.conv2", "layers.1.shortcut", "fc"} <= names


def test_a_file_without_sizes_is_read_for_one(tmp_path: Path) -> None:
    """With open sizes an exporter leaves shape arithmetic in the graph."""
    model = trained(UNet)
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    path = exported(model, (3, 8, 8), tmp_path / "x.onnx", 17, False, input_names=["x"], dynamic_axes=axes)
    with pytest.raises(gl.InputError, match=r"takes x of shape \(\?, 3, \?, \?\); expected the shape without the batch"):
        load(path)
    x = torch.randn(2, 3, 12, 8)
    found = load(path, (3, 12, 8))
    assert torch.allclose(found(x), session(path)(x), rtol=1e-4, atol=1e-5)
    assert gl.audit(found, (3, 12, 8), effort=-1).upper == pytest.approx(gl.audit(model, (3, 12, 8), effort=-1).upper, rel=1e-4)
    with pytest.raises(gl.InputError, match="for which the model was read"):
        found(torch.zeros(2, 3, 8, 8))


def test_several_inputs_and_half_precision(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 5)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x) + y, torch.relu(self.a(x))

    torch.manual_seed(0)
    model, path = Two().eval().half(), tmp_path / "x.onnx"
    given = (torch.randn(3, 4).half(), torch.randn(3, 5).half())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, given, path, dynamo=False)
    found = load(path)
    assert [x.dtype for x in found.example] == [torch.float16] * 2
    for made, wanted in zip(found(*given), model(*given), strict=True):
        assert torch.allclose(made, wanted, rtol=1e-2, atol=1e-3)
    assert gl.audit(found, found.example).upper == pytest.approx(gl.audit(model, given).upper, rel=1e-2)
    with pytest.raises(gl.InputError, match="expected a shape for each by its name: type --input onnx::Gemm_0=3,224,224"):
        load(path, (4,))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_bounded_no_less_closely_than_the_module(tmp_path: Path, kind: type[nn.Module]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = kind(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][:, -1])

    torch.manual_seed(0)
    model, path, x = Last().eval(), tmp_path / "x.onnx", torch.randn(1, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=False)
    found = load(path)
    assert torch.allclose(found(x), model(x), rtol=1e-5, atol=1e-6)
    options: dict[str, Any] = {"domain": (-1.0, 1.0), "effort": -1}
    made, wanted = gl.audit(found, found.example, **options), gl.audit(model, (5, 3), **options)
    assert made.upper <= 1.01 * wanted.upper
    assert made.lower == pytest.approx(wanted.lower, rel=1e-3)
    for _ in range(20):
        point = torch.rand(1, 5, 3, dtype=torch.float64) * 2 - 1
        slope = torch.autograd.functional.jacobian(model.double(), point).reshape(2, -1)
        assert made.upper >= float(torch.linalg.matrix_norm(slope, 2))


# ---- the command line ----------------------------------------------------------------------------------------------------


def test_a_file_is_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(perceptron)
    path = str(exported(model, (8,), tmp_path / "x.onnx", 17, False))
    assert main(["audit", path, "--input", "8", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["network"]["upper"] == pytest.approx(gl.audit(model, (8,)).upper, rel=1e-2)
    assert main(["audit", path, "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["network"] is None
    assert "its weights alone are bounded, for every input size; type --input" in said.err
    assert main(["audit", path, "--input", "9"]) == 2
    assert "of shape (1, 8), and 9 was given" in capsys.readouterr().err


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures in the layout of CIFAR-10's parquet files."""
    held = []
    for i in range(3):
        written = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(written, "PNG")
        held.append({"bytes": written.getvalue(), "path": f"{i}.png"})
    (tmp_path / "pictures").mkdir()
    table = pyarrow.table({"img": held, "label": [0, 1, 2]})
    parquet.write_table(table, tmp_path / "pictures" / "test-00000-of-00001.parquet")
    return tmp_path / "pictures"


def test_a_file_is_certified_as_the_module(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).eval()
    path = exported(model, (3, 32, 32), tmp_path / "x.onnx", 17, False)
    assert main(["certify", str(path), "--data", str(pictures), "--eps", "1/255", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    x, y = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])
    lipschitz = gl.audit(model, (3, 32, 32))
    results = [gl.robust.certify(m, [(x, y)], lipschitz, [1 / 255]).to_dict() for m in (model, load(path))]
    assert results[0]["certified"] == results[1]["certified"]
    assert found["count"] == 3


# ---- files that are not to be read ---------------------------------------------------------------------------------------

FOUR = np.ones((4, 4), np.float32)
BAD: dict[str, tuple[onnx.ModelProto, str]] = {
    "huge": (
        small([N("ConstantOfShape", ["n"], ["z"]), N("Add", ["x", "z"], ["y"])], {"n": np.array([2**40, 4])}),
        "a value of the shape (1099511627776, 4); expected at most",
    ),
    "huge range": (small([N("Range", ["a", "b", "c"], ["y"])], {"a": 0, "b": 2**60, "c": 1}), "a range from 0 to 1152921504606846976 by 1"),
    "nothing before": (small([N("MatMul", ["x", "w"], ["y"])]), "MatMul_0 takes 'w', which no node before it makes"),
    "nothing made": (small([N("Relu", ["x"], ["z"])]), "returns y, which no node makes"),
    "shapes": (
        small([N("MatMul", ["x", "w"], ["y"])], {"w": FOUR[:3]}),
        "MatMul_0 (MatMul) cannot be applied to inputs of shapes [(1, 4), (3, 4)]",
    ),
    "old": (small([N("Relu", ["x"], ["y"])], opset=6), "uses version 6 of ONNX's operators; expected 7 to"),
    "no attribute": (small([N("MaxPool", ["x"], ["y"])]), "MaxPool_0"),
    "axis": (small([N("Softmax", ["x"], ["y"], axis=5)]), "Softmax: axis [5] of 2 axes (Softmax_0)"),
    "training": (small([N("Dropout", ["x", "r", "t"], ["y"])], {"r": np.float32(0.5), "t": True}), "Dropout: training_mode"),
    "all at once": (
        small(
            [
                N("ArgMax", ["x"], ["a"], name="best"),
                N("Mine", ["x"], ["c"], domain="mine"),
                N("Hardmax", ["c"], ["d"]),
                N("Shrink", ["x"], ["e"], bias=0.2),
                N("Add", ["a", "e"], ["y"]),
            ],
            {"k": np.array([1])},
        ),
        "ArgMax (best); mine.Mine (Mine_1); Hardmax (Hardmax_2); Shrink: lambd=0.5, bias=0.2; expected a bias of 0 or lambd (Shrink_3)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_graph_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    model, said = BAD[name]
    onnx.save(model, tmp_path / "x.onnx")
    assert main(["audit", str(tmp_path / "x.onnx"), "--input", "4"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"not a model", b"\x08\x0a"])
def test_a_damaged_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    assert main(["audit", str(tmp_path / "x.onnx"), "--input", "4"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_no_cut_of_a_file_is_another_error(tmp_path: Path) -> None:
    whole = small([N("MatMul", ["x", "w"], ["z"]), N("Relu", ["z"], ["y"])], {"w": FOUR}).SerializeToString()
    path = tmp_path / "x.onnx"
    for n in range(0, len(whole), 3):
        path.write_bytes(whole[:n])
        with contextlib.suppress(gl.InputError, gl.UnsupportedError):
            load(path, (4,))
    for n in range(len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 0x55]) + whole[n + 1 :])
        with contextlib.suppress(gl.InputError, gl.UnsupportedError):
            load(path, (4,))


@pytest.mark.parametrize(
    ("place", "told", "said"),
    [
        ("../secret.bin", {}, "which is no file in the folder of the model"),
        ("link.bin", {}, "which is no file in the folder of the model"),
        ("missing.bin", {}, "which is no file in the folder of the model"),
        ("", {}, "which is no file in the folder of the model"),
        ("short.bin", {}, "64 bytes from 0 of short.bin for 64 bytes"),
        ("whole.bin", {"offset": "4"}, "64 bytes from 4 of whole.bin"),
        ("whole.bin", {"length": "32"}, "32 bytes from 0 of whole.bin for 64 bytes"),
    ],
)
def test_data_beside_the_model(tmp_path: Path, place: str, told: dict[str, str], said: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    FOUR.tofile(tmp_path / "secret.bin")
    FOUR.tofile(folder / "whole.bin")
    FOUR[:3].tofile(folder / "short.bin")
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")

    def write(place: str, told: dict[str, str]) -> Path:
        tensor = onnx.TensorProto(name="w", dims=[4, 4], data_type=FLOAT, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": place, **told}.items():
            tensor.external_data.add(key=key, value=value)
        model = small([N("MatMul", ["x", "w"], ["y"])])
        model.graph.initializer.append(tensor)
        (folder / "x.onnx").write_bytes(model.SerializeToString())
        return folder / "x.onnx"

    assert torch.equal(load(write("whole.bin", {}), (4,))(torch.ones(1, 4)), torch.full((1, 4), 4.0))
    with pytest.raises(gl.InputError, match=said):
        load(write(place, told), (4,))
