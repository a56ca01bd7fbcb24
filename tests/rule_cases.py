"""One call for each graph operation that has a rule: `CASES[op] = (call, shape of one sample)`. A new rule adds its row."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

A = torch.ops.aten
Call = Callable[[Tensor], Tensor]
W1, W2, W3 = (
    torch.linspace(-1, 1, 18).reshape(3, 2, 3),
    torch.linspace(-1, 1, 54).reshape(3, 2, 3, 3),
    torch.linspace(-1, 1, 48).reshape(3, 2, 2, 2, 2),
)
M = torch.linspace(-1, 1, 16).reshape(4, 4)
V = torch.linspace(-1, 1, 4)
MASK = torch.tensor([True, False, True, False])
L, P, Q = (2, 6), (2, 5, 5), (2, 4, 4, 4)  # samples with one, two and three spatial axes
ONE = torch.ones(2)

CASES: dict[str, tuple[Call, tuple[int, ...]]] = {}


class Map(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def entrywise(names: str) -> None:
    """Operations of one argument, entry by entry or as a view."""
    for name in names.split():
        CASES[f"aten.{name}"] = (getattr(A, name), (4,))


entrywise("abs alias atan ceil clone contiguous cos cosh detach erf exp exp2 expm1 floor frac hardshrink hardsigmoid hardswish hardtanh")
entrywise(
    "log log1p log_sigmoid mish neg positive ravel reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin sinh softplus softshrink"
)
entrywise("sqrt square tan tanh trunc celu elu gelu leaky_relu rrelu")


entrywise("lift_fresh lift_fresh_copy")


def put(name: str, call: Call, shape: tuple[int, ...] = (4,)) -> None:
    """One row."""
    CASES[f"aten.{name}"] = (call, shape)


put("_log_softmax", lambda x: A._log_softmax(x, -1, False))
put("_softmax", lambda x: A._softmax(x, -1, False))
put("log_softmax", lambda x: A.log_softmax(x, -1))
put("softmax", lambda x: A.softmax(x, -1))
put("special_log_softmax", lambda x: A.special_log_softmax(x, -1))
put("special_softmax", lambda x: A.special_softmax(x, -1))
put("cumsum", lambda x: A.cumsum(x, -1))
put("cumprod", lambda x: A.cumprod(x, -1))
put("prod", lambda x: A.prod(x, -1))
put("logsumexp", lambda x: A.logsumexp(x, [1]))
put(
    "_native_batch_norm_legit_no_training",
    lambda x: A._native_batch_norm_legit_no_training(x, 3 * ONE, ONE, ONE, 0.25 * ONE, 0.1, 1e-5)[0],
    P,
)
put("batch_norm", lambda x: A.batch_norm(x, 3 * ONE, ONE, ONE, 0.25 * ONE, False, 0.1, 1e-5, False), P)
put("instance_norm", lambda x: A.instance_norm(x, 3 * ONE, ONE, ONE, 0.25 * ONE, False, 0.1, 1e-5, False), P)
put("layer_norm", lambda x: A.layer_norm(x, [4], None, None, 0.25))
put("native_layer_norm", lambda x: A.native_layer_norm(x, [4], None, None, 0.25)[0])
put("rms_norm", lambda x: A.rms_norm(x, [4], None, 0.25))
put("group_norm", lambda x: A.group_norm(x, 2, None, None, 0.25), (4, 3))
put("_to_copy", lambda x: A._to_copy(x, dtype=torch.float64))
put("to", lambda x: A.to(x, torch.float64))
put("type_as", lambda x: A.type_as(x, M.double()))
put("_unsafe_view", lambda x: A._unsafe_view(x, [1, 2, 2]))
put("view", lambda x: A.view(x, [1, 2, 2]))
put("view_as", lambda x: A.view_as(x, M[:1]))
put("reshape", lambda x: A.reshape(x, [2, 2]))
put("reshape_as", lambda x: A.reshape_as(x, M[:1]))
put("flatten", lambda x: A.flatten(x, 1), P)
put("unflatten", lambda x: A.unflatten(x, 1, [2, 2]))
put("squeeze", lambda x: A.squeeze(x, 0))
put("unsqueeze", lambda x: A.unsqueeze(x, 0))
put("permute", lambda x: A.permute(x, [0, 2, 1]), L)
put("transpose", lambda x: A.transpose(x, 1, 2), L)
put("swapaxes", lambda x: A.swapaxes(x, 1, 2), L)
put("swapdims", lambda x: A.swapdims(x, 1, 2), L)
put("moveaxis", lambda x: A.moveaxis(x, [1], [2]), L)
put("movedim", lambda x: A.movedim(x, [1], [2]), L)
put("t", lambda x: A.t(x))
put("mT", lambda x: A.mT(x), L)
put("numpy_T", lambda x: A.numpy_T(x))
put("flip", lambda x: A.flip(x, [1]))
put("fliplr", lambda x: A.fliplr(x))
put("flipud", lambda x: A.flipud(x))
put("roll", lambda x: A.roll(x, [1], [1]))
put("rot90", lambda x: A.rot90(x, 1, [1, 2]), L)
put("topk", lambda x: A.topk(x, 2, 1)[0])
put("kthvalue", lambda x: A.kthvalue(x, 2, 1)[0])
put("median", lambda x: A.median(x, 1)[0])
put("sort", lambda x: A.sort(x)[0])
put("msort", lambda x: A.msort(x))
put("add", lambda x: x + 2 * x)
put("sub", lambda x: x - 3 * x)
put("rsub", lambda x: A.rsub(x, 2.0))
put("mul", lambda x: x * V)
put("div", lambda x: x / 4)
put("true_divide", lambda x: A.true_divide(x, 0.5))
put("pow", lambda x: A.pow(x, 2))
put("maximum", lambda x: A.maximum(x, x.flip(1)))
put("minimum", lambda x: A.minimum(x, 2 * x.flip(1)))
put("max", lambda x: A.max(x, 1)[0])
put("min", lambda x: A.min(x, 1)[0])
put("amax", lambda x: A.amax(x, [1]))
put("amin", lambda x: A.amin(x, [1]))
put("mean", lambda x: A.mean(x, [1]))
put("sum", lambda x: A.sum(x, [1]))
put("norm", lambda x: A.norm(x, 2, [1]))
put("linalg_vector_norm", lambda x: A.linalg_vector_norm(x, 2, [1]))
put("clamp", lambda x: A.clamp(x, -1, 0.5))
put("clip", lambda x: A.clip(x, -1, 0.5))
put("clamp_min", lambda x: A.clamp_min(x, 0.0))
put("clamp_max", lambda x: A.clamp_max(x, 1.0))
put("threshold", lambda x: A.threshold(x, 0.0, 0.0))
put("heaviside", lambda x: A.heaviside(x.detach(), torch.ones(())))  # torch has no derivative of it
put("prelu", lambda x: A.prelu(x, torch.tensor([-3.0])))
put("glu", lambda x: A.glu(x, 1))
put("masked_fill", lambda x: A.masked_fill(x, MASK, 0.0))
put("where", lambda x: A.where(MASK, x, -2 * x))
put("tril", lambda x: A.tril(x), L)
put("triu", lambda x: A.triu(x), L)
put("dropout", lambda x: A.dropout(x, 0.5, False))
put("alpha_dropout", lambda x: A.alpha_dropout(x, 0.5, False))
put("feature_dropout", lambda x: A.feature_dropout(x, 0.5, False), P)
put("feature_alpha_dropout", lambda x: A.feature_alpha_dropout(x, 0.5, False), P)
put("linear", lambda x: A.linear(x, M))
put("addmm", lambda x: A.addmm(V, x, M))
put("mm", lambda x: A.mm(x, M))
put("mv", lambda x: A.mv(M, x[0]))
put("baddbmm", lambda x: A.baddbmm(torch.zeros(1, 2, 2), x, torch.ones(1, 6, 2)), L)
put("einsum", lambda x: A.einsum("bij,kj->bki", [x, torch.ones(3, 6)]), L)
put("bmm", lambda x: A.bmm(x, torch.ones(1, 6, 2)), L)
put("matmul", lambda x: A.matmul(x, M))
put("scaled_dot_product_attention", lambda x: A.scaled_dot_product_attention(x, x, x), L)
put("convolution", lambda x: A.convolution(x, W2, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), P)
put("conv1d", lambda x: A.conv1d(x, W1, None, [1], [1]), L)
put("conv2d", lambda x: A.conv2d(x, W2, None, [2, 2], [1, 1]), P)
put("conv3d", lambda x: A.conv3d(x, W3), Q)
put("conv_transpose1d", lambda x: A.conv_transpose1d(x, W1.transpose(0, 1), None, [2]), L)
put("conv_transpose2d", lambda x: A.conv_transpose2d(x, W2.transpose(0, 1), None, [2, 2]), P)
put("conv_transpose3d", lambda x: A.conv_transpose3d(x, W3.transpose(0, 1)), Q)


def spatial(name: str, call: Callable[[Call, Tensor, int], Tensor]) -> None:
    """Rows for 1, 2 and 3 spatial axes; `name` has a {} for their number."""
    for d, shape in ((1, L), (2, P), (3, Q)):
        put(name.format(d), functools.partial(_call, call, getattr(A, name.format(d)), d), shape)


def _call(call: Callable[[Call, Tensor, int], Tensor], operation: Call, d: int, x: Tensor) -> Tensor:
    return call(operation, x, d)


spatial("avg_pool{}d", lambda f, x, d: f(x, [2] * d, [2] * d))
spatial("max_pool{}d", lambda f, x, d: f(x, [3] * d, [2] * d, [1] * d))
spatial("max_pool{}d_with_indices", lambda f, x, d: f(x, [3] * d, [1] * d, [1] * d)[0])
spatial("adaptive_avg_pool{}d", lambda f, x, d: f(x, [3] * d))
spatial("adaptive_max_pool{}d", lambda f, x, d: f(x, [3] * d)[0])
spatial("reflection_pad{}d", lambda f, x, d: f(x, [2, 1] * d))
spatial("replication_pad{}d", lambda f, x, d: f(x, [2, 1] * d))
spatial("upsample_nearest{}d", lambda f, x, d: f(x, [7] * d))
spatial("_upsample_nearest_exact{}d", lambda f, x, d: f(x, [7] * d))
put("upsample_linear1d", lambda x: A.upsample_linear1d(x, [9], False), L)
put("upsample_bilinear2d", lambda x: A.upsample_bilinear2d(x, [7, 9], False), P)
put("_upsample_bilinear2d_aa", lambda x: A._upsample_bilinear2d_aa(x, [3, 3], False), P)
put("upsample_bicubic2d", lambda x: A.upsample_bicubic2d(x, [7, 9], False), P)
put("_upsample_bicubic2d_aa", lambda x: A._upsample_bicubic2d_aa(x, [3, 3], False), P)
put("upsample_trilinear3d", lambda x: A.upsample_trilinear3d(x, [5, 5, 5], False), Q)
put("pad", lambda x: A.pad(x, [2, 1], "replicate"), L)
put("constant_pad_nd", lambda x: A.constant_pad_nd(x, [2, 1]), L)
put("pixel_shuffle", lambda x: A.pixel_shuffle(x, 2), (4, 3, 3))
put("pixel_unshuffle", lambda x: A.pixel_unshuffle(x, 2), (1, 4, 4))
put("channel_shuffle", lambda x: A.channel_shuffle(x, 2), (4, 3, 3))
put("cat", lambda x: A.cat([x, 2 * x], 1))
put("concat", lambda x: A.concat([x, 2 * x], 1))
put("concatenate", lambda x: A.concatenate([x, 2 * x], 1))
put("stack", lambda x: A.stack([x, x, x]))
put("hstack", lambda x: A.hstack([x, x]))
put("vstack", lambda x: A.vstack([x, x]))
put("dstack", lambda x: A.dstack([x, x]))
put("expand", lambda x: A.expand(x[:, :1], [1, 9]))
put("expand_as", lambda x: A.expand_as(x[:, :1], x))
put("broadcast_to", lambda x: A.broadcast_to(x, [5, 4]))
put("repeat", lambda x: A.repeat(x, [3, 2]))
put("repeat_interleave", lambda x: A.repeat_interleave(x, 3, 1))
put("tile", lambda x: A.tile(x, [2, 2]))
put("index", lambda x: x[:, [0, 0, 1]])
put("index_select", lambda x: A.index_select(x, 1, torch.tensor([2, 2, 0])))
put("gather", lambda x: A.gather(x, 1, torch.tensor([[0, 0, 3]])))
put("take", lambda x: A.take(x, torch.tensor([2, 2, 0])))
put("take_along_dim", lambda x: A.take_along_dim(x, torch.tensor([[0, 0, 3]]), 1))
put("unfold", lambda x: A.unfold(x, 2, 3, 1), L)
put("im2col", lambda x: A.im2col(x, [3, 3], [1, 1], [1, 1], [1, 1]), P)
put("col2im", lambda x: A.col2im(x, [2, 3], [2, 2], [1, 1], [0, 0], [1, 1]), (4, 2))
put("diag_embed", lambda x: A.diag_embed(x))
put("std", lambda x: A.std.correction(x, [1], correction=1))
put("std_mean", lambda x: A.std_mean.correction(x, [1], correction=0)[0])
put("var", lambda x: A.var.correction(x, [1], correction=0))
put("var_mean", lambda x: torch.cat(A.var_mean.correction(x, [1], correction=1)))
put("logaddexp", lambda x: A.logaddexp(x, -x))
put("logaddexp2", lambda x: A.logaddexp2(x, 2 * x))
put("hypot", lambda x: A.hypot(x, 2 * x))
put("addcmul", lambda x: A.addcmul(V, x, x, value=0.5))
put("addcdiv", lambda x: A.addcdiv(x, V, 1 + x, value=2))
put("lerp", lambda x: A.lerp.Scalar(x, 2 * x, 0.3))
put("unsafe_chunk", lambda x: A.unsafe_chunk(x, 2, 1)[0])
put("unsafe_split", lambda x: A.unsafe_split(x, 2, 1)[1])
put("unsafe_split_with_sizes", lambda x: A.unsafe_split_with_sizes(x, [1, 3], 1)[1])
put("select", lambda x: A.select(x, 1, 2))
put("slice", lambda x: x[:, 1:3])
put("narrow", lambda x: A.narrow(x, 1, 1, 2))
put("narrow_copy", lambda x: A.narrow_copy(x, 1, 1, 2))
put("diagonal", lambda x: A.diagonal(x, 0, 1, 2), L)
put("chunk", lambda x: A.chunk(x, 2, 1)[0] + A.chunk(x, 2, 1)[1])
put("split", lambda x: A.split(x, 2, 1)[0])
put("split_with_sizes", lambda x: A.split_with_sizes(x, [1, 3], 1)[1])
put("tensor_split", lambda x: A.tensor_split(x, 2, 1)[0])
put("unbind", lambda x: A.unbind(x, 1)[0] + A.unbind(x, 1)[1])
CASES["getitem"] = CASES["aten.unbind"]

AT, PLACES, FIXED = torch.tensor([2, 0, 2]), torch.tensor([[3, 0, 1]]), torch.tensor([3, 0, 1])
Z = torch.complex(M, M.flip(0))


def spectrum(name: str) -> None:
    """Rows for transforms of one, two and several axes, each seen as pairs of real numbers."""
    for end in ("", "2", "n"):
        put(f"fft_{name}{end}", functools.partial(_spectrum, getattr(A, f"fft_{name}{end}")), P)


def _spectrum(transform: Call, x: Tensor) -> Tensor:
    made = transform(x * (1 + 2j) if "_r" not in str(transform) else x)
    return A.view_as_real(made) if made.is_complex() else made


for _name in ("fft", "ifft", "rfft", "irfft"):
    spectrum(_name)
put("fft_hfft", lambda x: A.fft_hfft(x * (1 + 2j)))
put("fft_ihfft", lambda x: A.view_as_real(A.resolve_conj(A.fft_ihfft(x))))
put("fft_fftshift", lambda x: A.fft_fftshift(x))
put("fft_ifftshift", lambda x: A.fft_ifftshift(x))
put("stft", lambda x: A.view_as_real(A.stft(x, 4, 2, return_complex=True)), (9,))
put("view_as_real", lambda x: A.view_as_real(x * 1j))
put("view_as_complex", lambda x: A.view_as_complex(A.view(x, [1, 2, 2])).real)
put("real", lambda x: A.real(x * (1 + 2j)))
put("imag", lambda x: A.imag(x * (1 + 2j)))
put("conj", lambda x: A.conj(x * (1 + 2j)).imag)
put("_conj", lambda x: A._conj(x * (1 + 2j)).imag)
put("conj_physical", lambda x: A.conj_physical(x * (1 + 2j)).imag)
put("resolve_conj", lambda x: A.resolve_conj((x * (1 + 2j)).conj()).imag)
put("resolve_neg", lambda x: A.resolve_neg(x))
put("complex", lambda x: A.view_as_real(A.complex(x, 2 * x)))
put("angle", lambda x: A.angle(x * (1 + 2j)))
put("cdist", lambda x: A.cdist(x, M))
put("linalg_cross", lambda x: A.linalg_cross(x, V[:3].expand(1, 3)), (3,))
put("cross", lambda x: A.cross(x, x.flip(1), 1), (3,))
put("bilinear", lambda x: A.bilinear(x, x, torch.ones(2, 4, 4), ONE))
put("copy", lambda x: torch.zeros(2, 4).copy_(x))
put("fill", lambda x: A.fill(x, 1.0))
put("zero", lambda x: A.zero(x) + x)
put("scatter", lambda x: A.scatter(2 * x, 1, PLACES, x[:, :3]))
put("scatter_add", lambda x: A.scatter_add(x, 1, AT[None], x[:, :3]))
put("scatter_reduce", lambda x: A.scatter_reduce(x, 1, AT[None], x[:, :3], "mean"))
put("index_reduce", lambda x: A.index_reduce(x, 1, FIXED, x[:, :3], "amax"))
put("index_add", lambda x: A.index_add(x, 1, AT, x[:, :3], alpha=2))
put("index_copy", lambda x: A.index_copy(x, 1, FIXED, 2 * x[:, :3]))
put("index_fill", lambda x: A.index_fill(2 * x, 1, AT, 3.0))
put("index_put", lambda x: A.index_put(x, [None, AT], x[:, :1], True))
put("_unsafe_index_put", lambda x: A._unsafe_index_put(x, [None, FIXED], 2 * x[:, :3]))
put("slice_scatter", lambda x: A.slice_scatter(x, 2 * x[:, :2], 1, 1, 4, 2))
put("select_scatter", lambda x: A.select_scatter(x, 2 * x[:, 0], 1, 2))
put("diagonal_scatter", lambda x: A.diagonal_scatter(x, x[:, :, 0], 0, 1, 2), (3, 3))
put("embedding", lambda x: A.embedding(M, x.detach().long()))
put("max_unpool2d", lambda x: A.max_unpool2d(*A.max_pool2d_with_indices(x, [2, 2]), [4, 4]), (2, 4, 4))
put("max_unpool3d", lambda x: A.max_unpool3d(*A.max_pool3d_with_indices(x, [2, 2, 2]), [4, 4, 4], [2, 2, 2], [0, 0, 0]), Q)
put("fmod", lambda x: A.fmod(x, 2.0))
put("remainder", lambda x: A.remainder(x, 2.0))
put("floor_divide", lambda x: A.floor_divide(x.detach(), 2.0))
GRID2, GRID3 = torch.linspace(-1.2, 1, 24).reshape(1, 3, 4, 2), torch.linspace(-1, 1.1, 24).reshape(1, 2, 2, 2, 3)
put("grid_sampler", lambda x: A.grid_sampler(x, GRID2, 2, 1, False), P)
put("grid_sampler_2d", lambda x: A.grid_sampler_2d(x, GRID2, 0, 0, False), P)
put("grid_sampler_3d", lambda x: A.grid_sampler_3d(x, GRID3, 0, 2, True), Q)


def _assigned(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = 2 * x[:, :3]
    return y


CASES["put"] = (_assigned, (4,))

# Overloads beside `default` that were read against their packet's rule: the same map, or refused by it.
OVERLOADS: dict[str, str] = {
    "center": "stft",
    "two": "scatter_reduce",
    "hacked_twin": "index_put _unsafe_index_put",
    "int_Scalar": "index_fill",
    "int_Tensor": "index_fill",
    "value_reduce": "scatter",
    "reduce": "scatter",
    "src": "scatter",
    "value": "scatter",
    "float": "copy",
    "Dict_Tensor": "copy",
    "Scalar_Tensor": "remainder",
    "Tensor": "remainder floor_divide fmod copy fill add clamp clamp_max clamp_min clip div index lerp masked_fill mul narrow pow "
    "repeat_interleave rsub slice sort split sub true_divide unsafe_split",
    "Scalar": "remainder floor_divide fmod fill add div lerp masked_fill mul norm pow rsub sub true_divide where",
    "Tensor_mode": "div",
    "Scalar_mode": "div",
    "Tensor_Tensor": "pow",
    "Tensor_Scalar": "pow",
    "Tensor_hacked_twin": "index",
    "ScalarOpt_dim": "norm",
    "ScalarOpt_dim_dtype": "norm",
    "ScalarOpt_dtype": "norm",
    "ScalarOther": "where",
    "ScalarSelf": "where",
    "self": "where",
    "self_Tensor": "repeat_interleave",
    "self_int": "repeat_interleave",
    "dim_int": "prod",
    "dtype": "addmm baddbmm bmm mm to view",
    "device": "to",
    "dtype_layout": "to",
    "other": "max min to",
    "prim_Device": "to",
    "prim_dtype": "to",
    "prim_other": "to",
    "dim": "max mean median min squeeze std std_mean var var_mean",
    "correction": "std std_mean var var_mean",
    "dims": "squeeze",
    "dim_IntList": "sum",
    "int": "copy log_softmax moveaxis movedim select softmax transpose unbind unflatten",
    "intlist": "moveaxis movedim",
    "using_ints": "flatten",
    "a": "mT numpy_T",
    "indices": "tensor_split",
    "sections": "tensor_split",
    "tensor_indices_or_sections": "tensor_split",
    "sizes": "split",
    "stable": "sort",
    "list_Tensor": "index",
    "decimals": "round",
    "sublist": "einsum",
    "padding": "conv1d conv2d conv3d",
    "input": "conv_transpose2d conv_transpose3d",
    "vec": "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_trilinear3d",
}
