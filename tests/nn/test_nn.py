"""The stateless spectral norm: one-sided against the real module, then the ordinary life of a torch module."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import gramlip as gl
from gramlip import nn as gnn
from gramlip.nn import parametrize as parametrizing
from gramlip.nn.norm_op import max_gram_bound


def truth(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The norm of the layer as torch runs it: a basis through the real module in float64, then the SVD."""
    twin = copy.deepcopy(layer)
    if parametrize.is_parametrized(twin):
        parametrize.remove_parametrizations(twin, "weight")
    twin = twin.double()
    twin.bias = None
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return float(torch.linalg.matrix_norm(twin(basis).flatten(1), 2))


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6)),
    "conv, no padding": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 5)),
    "conv, stride": (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2), (3, 7, 8)),
    "conv, groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 6)),
    "conv, dilation": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 7, 7)),
    "conv, even": (lambda: nn.Conv2d(2, 3, 4, padding=2), (2, 6, 6)),
    "conv, tall": (lambda: nn.Conv2d(2, 3, (5, 1), padding=(2, 0)), (2, 6, 6)),
    "conv, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 6)),
    "conv, circular, stride": (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2, padding_mode="circular"), (3, 6, 6)),
    "conv, wide circular": (lambda: nn.Conv2d(2, 2, 3, padding=3, padding_mode="circular"), (2, 6, 6)),
    "conv, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 6)),
    "conv, replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5, 5)),
    "1d": (lambda: nn.Conv1d(3, 4, 5, padding=2), (3, 9)),
    "3d": (lambda: nn.Conv3d(1, 2, 2), (1, 4, 4, 4)),
}
FILLS = {
    "random": torch.Tensor.normal_,
    "ones": torch.Tensor.zero_,  # and then one
    "tiny": lambda w: w.normal_().mul_(1e-30),
    "denormal": lambda w: w.fill_(1e-40),
    "huge": lambda w: w.normal_().mul_(1e30),
    "alternating": lambda w: w.copy_(torch.tensor([1.0, -1.0]).repeat(-(-w.numel() // 2))[: w.numel()].reshape(w.shape)),
}


def filled(name: str, fill: str = "random") -> tuple[nn.Module, tuple[int, ...]]:
    """A layer of the table with weights of one kind, and the shape of its input."""
    torch.manual_seed(sum(map(ord, name + fill)))
    build, shape = LAYERS[name]
    layer = build()
    with torch.no_grad():
        FILLS[fill](layer.weight)
        if fill == "ones":
            layer.weight.add_(1.0)
    return layer, shape


def make(name: str, fill: str = "random", **options: object) -> tuple[nn.Module, tuple[int, ...]]:
    layer, shape = filled(name, fill)
    return gnn.spectral_norm(layer, **options), shape


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_norm_of_the_real_layer_is_at_most_the_target(name: str, fill: str, sized: bool) -> None:
    shape = LAYERS[name][1]
    layer, _ = make(name, fill, input_size=shape[1:] if sized and len(shape) > 1 else None, target=0.7)
    norm = truth(layer, shape)
    assert norm <= 0.7 * (1 + 2e-6)
    assert norm > 0.7 / 2 or not sized or name in ("conv, reflect", "conv, replicate")  # tightness: half the target at least


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv, stride", "conv, groups", "transposed"])
def test_gradient_is_that_of_the_value(name: str, soft: bool) -> None:
    layer, _ = make(name, soft=soft)
    layer = layer.double()
    weight = layer.parametrizations.weight.original.detach().requires_grad_()
    chain = layer.parametrizations.weight[0]
    assert torch.autograd.gradcheck(chain, weight, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(chain, weight)


def test_forward_mode_sees_the_norm_change() -> None:
    chain, weight = make("conv")[0].parametrizations.weight[0], torch.randn(4, 3, 3, 3)
    _, along = torch.func.jvp(chain, (weight,), (weight,))
    assert along.abs().max() < 1e-5 * chain(weight).abs().max()  # the map is homogeneous of degree zero


def test_functional_transforms_over_weights() -> None:
    layer, shape = make("conv, stride")
    weights, x = dict(layer.named_parameters()), torch.randn(5, 1, *shape)

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(5):
        loss(weights, x[i]).backward()
        for name, weight in weights.items():
            torch.testing.assert_close(each[name][i], weight.grad, rtol=1e-4, atol=1e-4)
            weight.grad = None
    several = {name: torch.stack([w.detach(), 2 * w.detach() + 0.1]) for name, w in weights.items()}
    both = torch.vmap(torch.func.grad(loss), (0, None))(several, x[0])
    for i in range(2):
        one = torch.func.grad(loss)({name: w[i] for name, w in several.items()}, x[0])
        torch.testing.assert_close({name: w[i] for name, w in both.items()}, one, rtol=1e-4, atol=1e-4)


def test_complex_weights() -> None:
    layer = gnn.spectral_norm(nn.Linear(4, 3, dtype=torch.complex64))
    assert torch.linalg.matrix_norm(layer.weight.detach().to(torch.complex128), 2) <= 1 + 1e-6


@pytest.mark.parametrize("method", [gnn.spectral_norm, gnn.spectral_rescaling])
def test_what_is_no_number_is_seen_in_all_weights(method: object) -> None:
    layer = method(nn.Linear(2, 2, bias=False))
    layer.weight = torch.tensor([[math.nan, 0.0], [0.0, 100.0]])
    assert layer.weight.isnan().all()


@pytest.mark.parametrize(("fill", "target", "least"), [(1e30, 1e10, 5e9), (2e38, 1.0, 0.5), (1e-30, 1e-20, 1e-30)])
def test_soft_at_any_scale(fill: float, target: float, least: float) -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, fill)
    assert torch.allclose(gnn.spectral_norm(layer, target=target, soft=True).weight / least, torch.ones(2, 2))


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(2, 3, 3), lambda: nn.Linear(5, 3)], ids=["conv", "linear"])
@pytest.mark.parametrize("method", [gnn.spectral_norm, gnn.spectral_rescaling])
def test_on_the_meta_device(method: object, build: object) -> None:
    layer = method(build()).to("meta")
    y = layer(torch.zeros(1, 2, 5, 5, device="meta"))
    assert y.shape[:2] == (1, 3 if y.shape[-1] == 3 and layer.weight.ndim == 4 else 2)
    y.sum().backward()
    assert layer.parametrizations.weight.original.grad.is_meta


def test_zero_stays_zero_and_its_gradient_finite() -> None:
    layer = nn.Conv2d(2, 2, 3)
    nn.init.zeros_(layer.weight)
    gnn.spectral_norm(layer)
    layer.weight.sum().backward()
    assert layer.weight.eq(0).all()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_value_is_a_function_of_the_weight_alone() -> None:
    layer, _ = make("conv")
    first = layer.weight.clone()
    for _ in range(20):
        layer(torch.randn(1, 3, 6, 6))
    assert torch.equal(first, layer.weight)
    assert torch.equal(first, layer.eval().weight)
    assert [n for n, _ in layer.named_parameters()] == ["bias", "parametrizations.weight.original"]
    assert not list(layer.buffers())


def test_soft_divides_only_above_the_target() -> None:
    small = nn.Linear(4, 4)
    nn.init.eye_(small.weight).data.mul_(0.25)
    assert torch.equal(gnn.spectral_norm(small, soft=True).weight, 0.25 * torch.eye(4))
    large, shape = make("conv", "huge", soft=True, input_size=6)
    assert 0.9 < truth(large, shape) <= 1 + 1e-6


def test_assigning_a_weight_and_the_call_of_torch() -> None:
    layer = gnn.spectral_norm(nn.Linear(3, 3), "weight", 1, 1e-12, None)
    layer.weight = 5 * torch.eye(3)
    assert torch.allclose(layer.weight, torch.eye(3))
    assert torch.equal(layer.parametrizations.weight.original, 5 * torch.eye(3))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    other = gnn.spectral_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
    assert torch.linalg.matrix_norm(other.in_proj_weight, 2) <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv", "conv, stride", "conv, circular", "transposed"])
def test_baked_weights_are_certified_in_their_own_dtype(name: str, dtype: torch.dtype) -> None:
    layer, shape = make(name, input_size=LAYERS[name][1][1:] or None)
    layer = gnn.remove(layer.to(dtype))
    size = shape[1:] or None
    assert type(layer) is type(LAYERS[name][0]())
    assert layer.weight.dtype == dtype
    assert gl.bound(layer, size).upper <= 1.0
    assert gl.bound(layer, size, rtol=1e-3).upper <= 1.0
    assert 0.9 < truth(layer, shape) <= 1.0


def test_baking_a_random_layer_many_times_never_exceeds_the_target() -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        layer = gnn.remove(gnn.spectral_norm(nn.Linear(6, 4), target=3.0))
        assert truth(layer, (6,)) <= 3.0


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 3))


@pytest.fixture
def model() -> nn.Sequential:
    return gnn.spectral_norm_(net(), torch.zeros(1, 3, 8, 8))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_model_wide(model: nn.Sequential, x: torch.Tensor) -> None:
    assert [p.input_size for *_, p in gnn.normalised(model)] == [(8, 8), (4, 4), None]
    assert model.training
    frozen = net()
    frozen[0].eval()
    gnn.spectral_norm_(frozen, torch.zeros(1, 3, 8, 8))
    assert [m.training for m in frozen] == [False, True, True, True, True]
    plain = gnn.remove(copy.deepcopy(model))
    assert torch.allclose(plain(x), model(x), atol=0.05)
    assert all(gl.bound(m, s, rtol=1e-3).upper <= 1.0 for m, s in [(plain[0], (8, 8)), (plain[2], (4, 4)), (plain[4], None)])
    only = gnn.spectral_norm_(net(), where=lambda path, _: path == "4", target=2.0)
    assert [(path, p.target) for path, *_, p in gnn.normalised(only)] == [("4", 2.0)]


def test_a_layer_used_at_two_sizes_is_bounded_for_every_size() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(nn.functional.avg_pool2d(self.conv(x), 2))

    ((*_, parametrization),) = gnn.normalised(gnn.spectral_norm_(Twice(), torch.zeros(1, 2, 8, 8)))
    assert parametrization.input_size is None


def test_state_dict_deepcopy_pickle_and_save(model: nn.Sequential, x: torch.Tensor) -> None:
    other = gnn.spectral_norm_(net().apply(lambda m: getattr(m, "reset_parameters", lambda: None)()), torch.zeros(1, 3, 8, 8))
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    plain = {k.replace("parametrizations.weight.original", "weight") for k in model.state_dict()}
    assert plain == set(net().state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(pickle.loads(pickle.dumps(model)))):
        assert torch.equal(twin(x), model(x))
        assert type(gnn.remove(twin)[0]) is nn.Conv2d
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


def test_pickling_keeps_what_else_is_registered() -> None:
    layer = nn.Linear(3, 3)
    torch.nn.utils.parametrizations.orthogonal(layer)
    gnn.spectral_norm(layer)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)


def test_pickling_asks_the_class_for_its_state() -> None:
    cell, x = gnn.spectral_norm(nn.LSTM(3, 4), "weight_hh_l0"), torch.randn(5, 1, 3)
    twin = pickle.loads(pickle.dumps(cell))
    assert torch.equal(twin(x)[0], cell(x)[0])
    twin.weight_hh_l0 = 100 * torch.randn(16, 4)
    assert torch.linalg.matrix_norm(twin.weight_hh_l0, 2) <= 1 + 1e-6


def tied(stride: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 3, stride=stride, padding=1, bias=False))
    model[1].weight = model[0].weight
    return gnn.spectral_norm_(model, (3, 8, 8))


@pytest.mark.parametrize("stride", [1, 2])
def test_baking_tied_weights_keeps_the_network(stride: int) -> None:
    model, x = tied(stride), torch.randn(2, 3, 8, 8)
    before = model(x)
    gnn.remove(model)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
    assert max(gl.bound(layer, 8).upper for layer in model) <= 1
    assert (model[0].weight is model[1].weight) == (stride == 1)  # tied for as long as one value serves both


def test_baking_leaves_a_tied_table_alone() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    kept = model[0].weight.detach().clone()
    gnn.spectral_norm(model[1])
    gnn.remove(model)
    assert torch.equal(model[0].weight, kept)
    assert gl.bound(model[1]).upper <= 1


def test_nothing_is_removed_where_a_weight_is_no_number() -> None:
    model = gnn.spectral_norm_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model[1].parametrizations.weight.original.data.fill_(math.inf)
    with pytest.raises(gl.InputError, match="nothing was removed"):
        gnn.remove(model)
    assert len(list(gnn.normalised(model))) == 2


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return gnn.spectral_norm_(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


@pytest.mark.parametrize(("rtol", "message"), [(-1, "rtol=-1"), (1e-30, "stays at")])
def test_nothing_is_removed_where_remove_cannot_end(rtol: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair()
    stored = copy.deepcopy(model.state_dict())
    if rtol > 0:
        rtol = 1e-3
        true = parametrizing.bound
        high = gl.Bound(0.0, 2.0, "of the second layer, whatever is tried")
        weights = [p.detach() for p in (model[1].weight,)]
        monkeypatch.setattr(
            parametrizing, "bound", lambda op, **k: high if torch.allclose(unit(op.weight), unit(weights[0])) else true(op, **k)
        )
    with pytest.raises(gl.InputError, match=message):
        gnn.remove(model, rtol=rtol)
    assert len(list(gnn.normalised(model))) == 2
    assert all(torch.equal(a, b) for a, b in zip(stored.values(), model.state_dict().values(), strict=True))


def unit(weight: torch.Tensor) -> torch.Tensor:
    return weight / weight.norm()


@pytest.mark.parametrize("target", [1e-7, 1e-8])
def test_a_target_below_what_the_dtype_holds_is_refused(target: float) -> None:
    model = nn.Sequential(gnn.spectral_norm(nn.Linear(4, 4)), gnn.spectral_norm(nn.Linear(4, 4).half(), target=target))
    with pytest.raises(gl.InputError, match=r"1\.weight: target=1e-0. is below what torch.float16 can hold.*nothing was removed"):
        gnn.remove(model)
    assert len(list(gnn.normalised(model))) == 2
    zero = nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    assert gnn.remove(gnn.spectral_norm(zero)).weight.eq(0).all()


@pytest.mark.parametrize("method", [gnn.spectral_norm_, gnn.spectral_rescaling_])
def test_a_model_built_on_the_meta_device(method: object) -> None:
    with torch.device("meta"):
        model = net()
    method(model, (3, 8, 8))
    assert [p.input_size for *_, p in gnn.normalised(model)] == [(8, 8), (4, 4), None]
    model.to_empty(device="cpu")
    model.load_state_dict(method(net(), (3, 8, 8)).state_dict())
    for module in (model[0], model[2], model[4]):
        with torch.no_grad():
            module.parametrizations.weight.original.mul_(100)
        size = module.weight.shape[1] * 64 if module.weight.ndim == 4 else 64
        assert 0.1 < truth(module, (module.weight.shape[1], 8, 8) if module.weight.ndim == 4 else (size,)) <= 1 + 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 8), [3, 8, 8]])
def test_a_shape_is_of_the_numbers_that_the_model_has(dtype: torch.dtype, shape: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 2)).to(dtype)
    assert [p.input_size for *_, p in gnn.normalised(gnn.spectral_norm_(model, shape))] == [(8, 8), None]


def test_what_no_rule_covers_is_named() -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "e": nn.Embedding(4, 4), "b": nn.Bilinear(2, 2, 2), "l": nn.Linear(3, 3)})

    for method in (gnn.spectral_norm_, gnn.spectral_rescaling_, gnn.LipschitzPenalty):
        with pytest.warns(UserWarning, match=r"^a.in_proj_weight, e.weight, b.weight: no linear or convolution layer"):
            method(build())
    gnn.spectral_norm_(build(), where=lambda path, module: True)


def test_lazy_layers_and_calls_by_keyword_are_normalised_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3), nn.LazyLinear(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(input=x).flatten(1))

    found = list(gnn.normalised(gnn.spectral_norm_(Net(), (3, 8, 8))))
    assert [(path, p.input_size) for path, _, _, p in found] == [("conv", (8, 8)), ("head", None)]


def test_a_model_that_is_refused_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), gnn.spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(gl.InputError, match="normalised already"):
        gnn.spectral_norm_(model)
    assert type(model[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(2, 2), prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5))
    with pytest.raises(gl.InputError, match=r"1.weight is set by a hook.*type torch.nn.utils.prune.remove"):
        gnn.spectral_norm_(model)
    assert type(model[0]) is nn.Linear

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    with pytest.raises(gl.UnsupportedError, match="forward of its own"):
        gnn.spectral_norm_(model)
    assert type(model[0]) is nn.Linear


def test_average_of_weights(model: nn.Sequential, x: torch.Tensor) -> None:
    average = AveragedModel(model)
    for value in (1.0, 3.0):
        with torch.no_grad():
            model[4].parametrizations.weight.original.fill_(value)
        average.update_parameters(model)
    assert torch.allclose(average.module[4].parametrizations.weight.original, torch.tensor(2.0))
    assert truth(average.module[4], (64,)) <= 1 + 1e-6
    assert average(x).isfinite().all()


def test_autocast_does_not_void_it(model: nn.Sequential, x: torch.Tensor) -> None:
    outside = model[2].weight.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model[2].weight, outside)
        model(x).float().sum().backward()
    assert model[2].parametrizations.weight.original.grad.dtype == torch.float32


def test_matmul_precision_is_neither_used_nor_changed() -> None:
    layer, _ = make("conv")
    exact, before = layer.weight.clone(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.allclose(layer.weight, exact, rtol=1e-6, atol=0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model: nn.Sequential, x: torch.Tensor, reentrant: bool) -> None:
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


def test_several_forwards_before_a_backward_and_cached(model: nn.Sequential, x: torch.Tensor) -> None:
    (model(x).sum() + model(2 * x).sum()).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with parametrize.cached():
        assert model[0].weight is model[0].weight
        (model(x).sum() + model(2 * x).sum()).backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-4, atol=1e-5) for a, p in zip(plain, model.parameters(), strict=True))


def test_the_index_that_compiled_code_gets_is_aligned() -> None:
    blocks = torch.eye(4) * torch.linspace(1 - 1e-6, 1, 30)[:, None, None]  # no estimate rules any of them out
    _, index = max_gram_bound(blocks, 6)
    assert index.item() == 29
    assert index.storage_offset() == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = gnn.spectral_norm_(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)))
    x = torch.randn(2, 2, 4, 4)
    model(x).sum().backward()
    expected = model[0].parametrizations.weight.original.grad.clone()
    model.zero_grad()
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):  # inductor calling what torch itself has deprecated
            warnings.filterwarnings("ignore", category=category, module=r"torch\.")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        y = compiled(x)
        y.sum().backward()
    assert torch.allclose(y, model(x))
    assert torch.allclose(model[0].parametrizations.weight.original.grad, expected, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_export_before_and_after_baking(model: nn.Sequential, x: torch.Tensor, strict: bool) -> None:
    program = torch.export.export(model, (x,), strict=strict)
    assert torch.allclose(program.module()(x), model(x))
    gnn.remove(model)
    program = torch.export.export(model, (x,), strict=strict)
    assert "gramlip" not in str(program.graph)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gnn.spectral_norm(nn.ReLU()), "has no tensor 'weight'"),
        (lambda: gnn.spectral_norm(nn.Linear(2, 2), target=0.0), "target=0.0"),
        (lambda: gnn.spectral_norm(nn.Linear(2, 2), target="1"), "target='1'"),
        (lambda: gnn.spectral_norm(nn.Linear(2, 2), torus=2), "torus=2"),
        (lambda: gnn.spectral_norm(nn.Linear(2, 2), torus=5.5), "torus=5.5"),
        (lambda: gnn.spectral_norm(nn.Linear(2, 2), n_iter=1.5), "n_iter=1.5"),
        (lambda: gnn.spectral_norm(nn.LazyLinear(2)), "run one forward pass first"),
        (lambda: gnn.spectral_norm(gnn.spectral_norm(nn.Linear(2, 2))), "normalised already"),
        (lambda: gnn.spectral_norm(nn.Linear(2, 2), "bias"), "expected a matrix"),
        (lambda: gnn.remove(nn.Linear(2, 2)), "holds no parametrization"),
        (lambda: gnn.spectral_norm_(nn.ReLU()), "has no layer"),
        (lambda: gnn.spectral_norm(torch.ones(3, 3)), "a Tensor was given; expected a module"),
        (lambda: gnn.spectral_norm(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).to("meta")), "meta device"),
        (lambda: gnn.spectral_norm(prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)), "set by a hook"),
        (lambda: gnn.spectral_norm_(nn.Linear(2, 2), {"x": torch.zeros(1, 2)}), "example=a dict was given"),
        (lambda: gnn.spectral_norm_(nn.Linear(2, 2), (2.0,)), r"example=\(2.0,\) was given"),
        (lambda: gnn.spectral_norm_(nn.LazyLinear(2)), "pass an example"),
        (lambda: gnn.spectral_norm(nn.Conv2d(1, 1, 3), input_size=2), "smaller than the kernel"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises((gl.InputError, gl.UnsupportedError), match=message):
        call()
