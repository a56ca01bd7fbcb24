"""Batch, layer, group, instance and RMS norm. docs/network.md#normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.rules.affine import most
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.steps import Linear, Lipschitz, Unbounded
from gramlip.numerics import rounding as rd
from gramlip.numerics.exact_cast import exact
from gramlip.operators.linear_maps import Scale


@register("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.instance_norm")
def _batch_norm(call: Call) -> Linear | Unbounded | Lipschitz | Var:
    training = call.args.get("training", call.args.get("use_input_stats", False))
    mean, var = call.const("running_mean"), call.const("running_var")
    if "instance_norm" in call.op and training:
        x = call.var("input")
        return normalised(call, x, math.prod(x.shape[2:]), call.const("weight"), call.const("bias"), float(call.const("eps")))
    if training or mean is None:
        msg = "batch norm in training mode depends on the whole batch; expected evaluation mode: type model.eval()"
        raise UnsupportedError(msg)
    spread = exact(var) + float(call.const("eps"))
    if not bool((spread > 0).all()):
        return Unbounded("batch norm divides by a running variance plus eps that is not positive")
    gain = (1.0 if call.const("weight") is None else exact(call.const("weight"))) / spread.sqrt()
    bias, moved = torch.zeros_like(gain) if call.const("bias") is None else exact(call.const("bias")), exact(mean) * gain
    none = call.const("weight") is not None and not bool(call.const("weight").any())
    error = 0.0 if none else rd.add_up(rd.mul_up(rd.gamma(5), float(gain.abs().max())), rd.TINY)
    # what is left of the bias may be small beside its rounding; a gain that was flushed moves the mean by more than TINY
    slip = rd.add_up(
        rd.mul_up(rd.gamma(8), float((bias.abs() + moved.abs()).max())), rd.mul_up(rd.TINY, 2.0 + float(exact(mean).abs().max()))
    )
    shape = [-1 if j == 1 else 1 for j in range(len(call.shape))]
    return Linear(Scale(gain.reshape(shape)), error, (bias - moved).reshape(shape), slip=slip)


def normalised(call: Call, x: Var, count: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Lipschitz | Unbounded | Var:
    """Normalisation of groups of `count` entries to variance 1, then a gain: docs/network.md#normalisation."""
    top = 1.0 if weight is None else rd.add_up(float(exact(weight).abs().max()), most(call.error_of("weight")))
    if eps <= 0:
        return Unbounded("normalisation without eps has no finite constant near constant inputs")
    upper = rd.up(rd.mul_up(top, rd.up(1.0 / rd.sqrt_down(eps)))) if count > 1 else 0.0
    reach = rd.sqrt_up(float(count))
    because = f"normalisation of {count} entries: at most 1/sqrt(eps) = {1 / math.sqrt(eps):.6g}"
    shift = 0.0 if bias is None else rd.add_up(float(exact(bias).abs().max()), most(call.error_of("bias")))
    edge = rd.add_up(rd.mul_up(top, reach), shift)
    row = rd.add_up(rd.mul_up(top, reach), rd.mul_up(reach, shift)) if x.shape[-1] == count else math.inf
    return Lipschitz(upper, f"{because}, times the largest gain {top:.6g}", (-edge, edge), row=row)


@register("aten.layer_norm", "aten.native_layer_norm")
def _layer_norm(call: Call) -> Lipschitz | Unbounded | Var:
    count = math.prod(call.const("normalized_shape"))
    return normalised(call, call.var("input"), count, call.const("weight"), call.const("bias"), float(call.const("eps")))


@register("aten.group_norm")
def _group_norm(call: Call) -> Lipschitz | Unbounded | Var:
    x = call.var("input")
    count = math.prod(x.shape[1:]) // int(call.const("num_groups"))
    return normalised(call, x, count, call.const("weight"), call.const("bias"), float(call.const("eps")))


@register("aten.rms_norm")
def _rms_norm(call: Call) -> Lipschitz | Unbounded | Var:
    eps = call.const("eps")
    count = max(2, math.prod(call.const("normalized_shape")))
    default = torch.finfo(torch.float64 if call.dtype == torch.float64 else torch.float32).eps
    return normalised(call, call.var("input"), count, call.const("weight"), None, default if eps is None else float(eps))
