"""Layers without weights against the real modules: the linear ones by a basis, max pooling by its Jacobians."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import gramlip as gl


def truth(module: nn.Module, size: tuple[int, ...], channels: int = 1) -> float:
    """The norm of a linear module: a basis pushed through it in float64."""
    count = channels * int(torch.tensor(size).prod())
    basis = torch.eye(count, dtype=torch.float64).reshape(count, channels, *size)
    outputs = module(basis).flatten(1)
    return float(torch.linalg.matrix_norm(outputs, 2)) if outputs.numel() else 0.0


LINEAR = [
    (nn.AvgPool2d(2), (6, 6)),
    (nn.AvgPool2d(3, 2, 1), (7, 8)),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (8, 8)),
    (nn.AvgPool2d(3, 1, 1, count_include_pad=False), (5, 6)),
    (nn.AvgPool2d((2, 3), (1, 2), divisor_override=5), (5, 6)),
    (nn.AvgPool1d(4, 3, 2), (11,)),
    (nn.AvgPool3d(2, 1, 1), (3, 4, 3)),
    (nn.AdaptiveAvgPool2d((3, 2)), (7, 5)),
    (nn.AdaptiveAvgPool2d(1), (4, 4)),
    (nn.AdaptiveAvgPool1d(4), (10,)),
    (nn.Upsample(scale_factor=2, mode="nearest"), (4, 3)),
    (nn.Upsample(scale_factor=2, mode="bilinear"), (4, 3)),
    (nn.Upsample(size=(7, 5), mode="bilinear", align_corners=True), (4, 3)),
    (nn.Upsample(scale_factor=1.7, mode="bicubic"), (5, 6)),
    (nn.Upsample(scale_factor=0.5, mode="area"), (6, 4)),
    (nn.Upsample(scale_factor=3, mode="linear"), (5,)),
    (nn.Upsample(size=(3, 5, 4), mode="trilinear"), (2, 3, 3)),
    (nn.ReflectionPad2d((1, 2, 3, 0)), (5, 4)),
    (nn.ReplicationPad2d(2), (3, 4)),
    (nn.ReplicationPad3d(1), (2, 2, 3)),
    (nn.CircularPad2d((1, 2, 1, 1)), (4, 3)),
    (nn.ZeroPad2d(2), (3, 3)),
    (nn.Identity(), (3, 3)),
]


@pytest.mark.parametrize(("module", "size"), LINEAR, ids=[f"{m}{s}" for m, s in LINEAR])
def test_linear_map_is_enclosed(module: nn.Module, size: tuple[int, ...]) -> None:
    bound = gl.bound(module, input_size=size)
    exact = truth(module, size)
    assert bound.upper >= exact * (1 - 1e-13)
    assert bound.lower <= exact * (1 + 1e-13)
    assert bound.rtol <= 1e-2


def test_pixel_shuffle_has_norm_one() -> None:
    assert gl.bound(nn.PixelShuffle(2)).upper == 1.0 == truth(nn.PixelShuffle(2), (2, 2), channels=4)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 1), (4, 3, 2)])
def test_average_pooling_of_every_size(kernel: int, stride: int, padding: int, include: bool) -> None:
    module = nn.AvgPool1d(kernel, stride, padding, count_include_pad=include)
    bound = gl.bound(module)
    sizes = range(max(1, kernel - 2 * padding), 30)
    assert bound.upper >= max(truth(module, (n,)) for n in sizes) * (1 - 1e-13)
    assert bound.lower <= bound.upper


POOLS = [
    ((2, 2, 0, 1), 1.0),
    ((3, 2, 1, 1), 2.0),
    ((3, 1, 1, 1), 3.0),
    ((2, 1, 0, 1), 2.0),
    ((3, 2, 0, 2), None),
    (((2, 3), (3, 2), 0, 1), None),
]


@pytest.mark.parametrize(("geometry", "known"), POOLS)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pooling_is_the_root_of_the_shared_windows(geometry: tuple, known: float | None, ceil_mode: bool) -> None:
    module = nn.MaxPool2d(*geometry, ceil_mode=ceil_mode)
    size = (9, 8)
    bound = gl.bound(module, input_size=size)
    steepest = 0.0
    for i, j in itertools.product(*map(range, size)):
        x = torch.zeros(1, 1, *size, dtype=torch.float64)
        x[0, 0, i, j] = 1.0  # a peak is the maximum of every window that holds it
        steepest = max(steepest, float(module(x).square().sum().sqrt()))
    assert bound.upper >= steepest * (1 - 1e-13)
    assert bound.lower <= steepest * (1 + 1e-13)
    if known is not None:
        assert gl.bound(module).upper == known
    assert gl.bound(module).upper >= bound.upper * (1 - 1e-13)


def test_adaptive_max_pooling() -> None:
    module, size = nn.AdaptiveMaxPool2d((3, 4)), (5, 6)
    steepest = 0.0
    for i, j in itertools.product(*map(range, size)):
        x = torch.zeros(1, 1, *size, dtype=torch.float64)
        x[0, 0, i, j] = 1.0
        steepest = max(steepest, float(module(x).square().sum().sqrt()))
    bound = gl.bound(module, input_size=size)
    assert bound.lower <= steepest * (1 + 1e-13)
    assert steepest * (1 - 1e-13) <= bound.upper <= steepest * (1 + 1e-13)


@pytest.mark.parametrize(
    "module", [*(module for module, size in LINEAR if len(size) == 2), nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(3)], ids=str
)
def test_default_device_does_not_matter(module: nn.Module) -> None:
    expected = gl.bound(module, (6, 6))
    with torch.device("meta"):
        assert gl.bound(module, (6, 6)) == expected


# A single integer as the input's size, and the axes that the layer's type, mode or tuples say.
ONE_INTEGER = [
    (nn.UpsamplingNearest2d(scale_factor=2), 2),
    (nn.UpsamplingNearest2d(size=(7, 3)), 2),
    (nn.UpsamplingBilinear2d(scale_factor=2), 2),
    (nn.UpsamplingBilinear2d(size=7), 2),
    (nn.Upsample(size=(8, 8)), 2),
    (nn.Upsample(size=(8,)), 1),
    (nn.Upsample(size=[8, 5, 3], mode="nearest-exact"), 3),
    (nn.Upsample(scale_factor=(2, 2)), 2),
    (nn.Upsample(scale_factor=(2, 1.5, 1), mode="area"), 3),
    (nn.Upsample(scale_factor=2, mode="linear"), 1),
    (nn.Upsample(scale_factor=2, mode="bilinear"), 2),
    (nn.Upsample(scale_factor=2, mode="bicubic"), 2),
    (nn.Upsample(scale_factor=2, mode="trilinear"), 3),
    *((getattr(nn, f"AvgPool{d}d")(2), d) for d in (1, 2, 3)),
    *((getattr(nn, f"AdaptiveAvgPool{d}d")(3), d) for d in (1, 2, 3)),
    *((getattr(nn, f"{mode}Pad{d}d")(2), d) for mode in ("Zero", "Reflection", "Replication", "Circular") for d in (1, 2, 3)),
    (nn.AvgPool2d((2,), (1,), (1,)), 2),  # torch repeats a single number in a tuple
]


@pytest.mark.parametrize(("module", "axes"), ONE_INTEGER, ids=[str(m) for m, _ in ONE_INTEGER])
def test_an_integer_size_is_taken_for_every_axis(module: nn.Module, axes: int) -> None:
    bound, exact = gl.bound(module, 4), truth(module, (4,) * axes)
    assert bound.lower * (1 - 1e-13) <= exact <= bound.upper * (1 + 1e-13)
    assert bound == gl.bound(module, (4,) * axes)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "area"])
@pytest.mark.parametrize("how", [{"scale_factor": 2}, {"size": 8}], ids=str)
def test_an_integer_size_is_refused_where_nothing_says_the_axes(mode: str, how: dict) -> None:
    module = nn.Upsample(mode=mode, **how)
    with pytest.raises(gl.InputError, match=r"type input_size=\(4, 4\)"):
        gl.bound(module, 4)
    for axes in (1, 2, 3):
        bound, exact = gl.bound(module, (4,) * axes), truth(module, (4,) * axes)
        assert bound.lower * (1 - 1e-13) <= exact <= bound.upper * (1 + 1e-13)


REFUSED = [
    (nn.Upsample(scale_factor=(2, 3)), (4,)),
    (nn.Upsample(size=(8, 8)), (4, 4, 4)),
    (nn.Upsample(scale_factor=(2, 2), mode="linear"), 4),
    (nn.UpsamplingNearest2d(scale_factor=2), (4,)),
    (nn.Upsample(scale_factor=0.1), (4, 4)),
    (nn.Upsample(size=8, scale_factor=2), (4, 4)),
    (nn.Upsample(scale_factor=2, align_corners=True), (4, 4)),
    (nn.AvgPool2d(5), 4),
    (nn.AvgPool2d(2, divisor_override=0), 4),
    (nn.MaxPool1d(5), 4),
    (nn.MaxPool1d(2, 1, 1, 5), 4),  # a window that holds no entry
    (nn.AdaptiveAvgPool2d((3,)), 4),
    (nn.ReflectionPad2d(4), 4),
    (nn.MaxPool2d(2), True),
]


@pytest.mark.parametrize(("module", "size"), REFUSED, ids=[f"{m}{s}" for m, s in REFUSED])
def test_what_torch_refuses_is_refused_in_one_line(module: nn.Module, size: int | tuple[int, ...]) -> None:
    with pytest.raises(gl.InputError, match=r"input_size=.* was given for .*; expected .*") as caught:
        gl.bound(module, size)
    assert "\n" not in str(caught.value)


MODES = ("Zero", "Constant", "Reflection", "Replication", "Circular")


def _padding(mode: str, padding: tuple[int, ...]) -> nn.Module:
    kind = getattr(nn, f"{mode}Pad{len(padding) // 2}d")
    return kind(padding, 0.0) if mode == "Constant" else kind(padding)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_padding_that_crops(mode: str, axes: int) -> None:
    """Negative entries, to the last one and beyond; what torch refuses, or fills from memory that nobody wrote, is refused."""
    generator, taken = torch.Generator().manual_seed(0), 0
    for _ in range(120):
        padding = tuple(torch.randint(-3, 4, (2 * axes,), generator=generator).tolist())
        size = tuple(torch.randint(1, 5, (axes,), generator=generator).tolist())
        module = _padding(mode, padding)
        kept = [n + min(lo, 0) + min(hi, 0) for n, lo, hi in zip(size, padding[-2::-2], padding[::-2], strict=True)]
        unwritten = mode == "Circular" and any(max(lo, hi) > k for lo, hi, k in zip(padding[-2::-2], padding[::-2], kept, strict=True))
        try:
            exact = math.inf if unwritten else truth(module, size)
        except (RuntimeError, ValueError):
            exact = math.inf
        if exact == math.inf:
            with pytest.raises(gl.InputError, match=r"was given for .*; expected"):
                gl.bound(module, size)
            continue
        bound, taken = gl.bound(module, size), taken + (min(padding) < 0)
        assert bound.lower * (1 - 1e-13) <= exact <= bound.upper * (1 + 1e-13), (module, size)
        assert bound.rtol <= 1e-15
    assert taken > 4


CROPPED = [
    (nn.ConstantPad1d((-4, 0), 0.0), (4,), 0.0),
    (nn.ConstantPad1d((-4, 3), 0.0), (4,), 0.0),
    (nn.ZeroPad2d((0, 0, -2, -2)), (4, 3), 0.0),
    (nn.ZeroPad3d(-1), (3, 3, 3), 1.0),
    (nn.ConstantPad2d((-1, 0), 0.0), (3, 2), 1.0),  # torch pads the last axis alone
    (nn.ReflectionPad1d((-3, 0)), (4,), 1.0),
    (nn.ReplicationPad1d((4, -4)), (4,), 2.0),  # the first entry alone, four times
    (nn.AdaptiveMaxPool2d(0), (3, 3), 0.0),
]


@pytest.mark.parametrize(("module", "size", "known"), CROPPED, ids=[f"{m}{s}" for m, s, _ in CROPPED])
def test_what_a_crop_leaves(module: nn.Module, size: tuple[int, ...], known: float) -> None:
    bound = gl.bound(module, size)
    assert bound.lower == bound.upper == known


def test_constant_padding_of_every_size_keeps_an_entry_once() -> None:
    for module in (nn.ZeroPad2d(2), nn.ConstantPad1d((-4, 0), 1.0)):
        assert gl.bound(module).lower == gl.bound(module).upper == 1.0
    with pytest.raises(gl.InputError, match="expected a pair for each of 2 axes"):
        gl.bound(nn.ConstantPad2d((0, 0, 0, 0, -1, 0), 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("size", "out"), [(2, 82), (2, 110), (3, 9), (7, 25), (24, 10)])
def test_nearest_neighbours_as_the_dtype_rounds_their_places(size: int, out: int, axes: int, dtype: torch.dtype) -> None:
    """From 2 points to 82 torch takes the first 42 times in float32, 41 times in float64."""
    module, sides = nn.Upsample(size=(out, *(1,) * (axes - 1))), (size, *(1,) * (axes - 1))
    basis = torch.eye(size, dtype=dtype).reshape(size, 1, *sides)
    layouts = {1: (), 2: (torch.channels_last,), 3: (torch.channels_last_3d,)}[axes]
    bound = gl.bound(module, sides)
    for x in (basis, *(basis.repeat(1, 4, *(1,) * axes).contiguous(memory_format=layout) for layout in layouts)):
        exact = math.sqrt(float(module(x)[:, 0].flatten(1).sum(1).max()))
        assert bound.lower * (1 - 1e-15) <= exact <= bound.upper * (1 + 1e-15)


def test_a_subclass_of_another_name_has_the_same_rule() -> None:
    assert gl.bound(type("Pooling", (nn.MaxPool2d,), {})(3, 2, 1), 8) == gl.bound(nn.MaxPool2d(3, 2, 1), 8)


def test_missing_size_says_what_to_pass() -> None:
    with pytest.raises(gl.InputError, match="input_size"):
        gl.bound(nn.AdaptiveAvgPool2d(2))


def test_unknown_layer_says_what_to_register() -> None:
    with pytest.raises(gl.UnsupportedError, match=r"describe\.register"):
        gl.bound(nn.LSTM(2, 2))
