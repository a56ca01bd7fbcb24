"""`spectral_norm`: torch's parametrization, stateless and true for convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.nn.norm_op import Plan
from gramlip.nn.parametrize import Normalised, attach, each, operator, positive
from gramlip.numerics.precision import real_dtype, uncast
from gramlip.operators.linear_maps import Ints

M = TypeVar("M", bound=nn.Module)


class SpectralNorm(Normalised):
    """`weight -> weight * target / sigma(weight)`, sigma the Gram upper bound of the layer's norm; zero stays zero."""

    def __init__(self, plan: Plan, input_size: Ints | None, target: float, soft: bool, n_iter: int) -> None:
        super().__init__(input_size, target)
        self.plan, self.soft, self.n_iter = plan, soft, n_iter

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight, of the same shape and dtype; the norm is computed in float32 at least, whatever autocast says."""
        with uncast(weight):
            # A norm is homogeneous: the peak is divided out first, so that no weight is too small or too large for its square.
            peak = weight.detach().abs().amax()
            peak = torch.where(peak == 0, 1.0, peak).to(real_dtype(weight))
            shape = weight / peak  # in float32 at least
            sigma = self.plan.sigma(shape, self.n_iter)
            scale = self.target / torch.where(sigma == 0, 1.0, sigma)  # what is no number stays one that is seen
            return (shape * (torch.minimum(scale, peak) if self.soft else scale)).to(weight.dtype)

    def extra_repr(self) -> str:
        """What is asked for, and by which theorem it holds."""
        return f"target={self.target}, soft={self.soft}, n_iter={self.n_iter}, because={self.plan.because!r}"


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int | None = None,
    eps: float | None = None,
    dim: int | None = None,
    *,
    input_size: Ints | None = None,
    target: float = 1.0,
    soft: bool = False,
    n_iter: int = 6,
    torus: int = 16,
) -> M:
    """Parametrize a layer so that its l2 norm is at most `target` (up to rounding), for the map that the layer really is.

    The call of `torch.nn.utils.parametrizations.spectral_norm`, in place; undone by
    `torch.nn.utils.parametrize.remove_parametrizations`, or by `gramlip.nn.remove`, which leaves a weight certified in
    floating point. Stateless: the value is a function of the weight alone, in train and eval, at the first call and the last.
    The bound that is divided by is above the norm, by `log(c) / 2**(n_iter + 1)` at most and the grid's cosine factor.

    Args:
        module: `nn.Linear`, `nn.Conv*d`, `nn.ConvTranspose*d`, or registered with `gramlip.describe`.
        name: the tensor to normalise; other than "weight" it must be a matrix.
        n_power_iterations: accepted so that the import can be exchanged; nothing here iterates on stored vectors.
        eps: accepted likewise; no epsilon is added.
        dim: accepted likewise; the norm does not depend on which axis comes first.
        input_size: spatial size of the input; None holds for every size.
        target: any positive number.
        soft: divide only where the norm exceeds the target.
        n_iter: Gram steps.
        torus: grid points per axis; 16 costs 4 % of a 3x3 layer's norm, 32 costs 1 %.

    Returns:
        The module.

    Raises:
        InputError: options that cannot be used.
        UnsupportedError: a layer without a rule.

    Reference: arXiv 2305.16173; docs/training.md#normalise.

    >>> from gramlip import bound
    >>> conv = spectral_norm(nn.Conv2d(3, 8, 3, padding=1), input_size=(32, 32))
    >>> bound(conv, (32, 32)).lower <= 1.0
    True
    """
    del n_power_iterations, eps, dim
    if isinstance(n_iter, bool) or not isinstance(n_iter, int) or n_iter < 1:
        msg = f"n_iter={n_iter!r} was given; expected an integer of at least 1"
        raise InputError(msg)
    plan = Plan.of(operator(module, name, input_size), torus)
    attach(module, name, SpectralNorm(plan, input_size, positive("target", target), soft, n_iter))
    return module


def spectral_norm_(model: M, example: Any = None, *, where: Callable[[str, nn.Module], bool] | None = None, **options: Any) -> M:
    """`spectral_norm` on every linear and convolution layer of a model, in place: each norm is at most the target.

    Args:
        model: the network.
        example: an input, a tuple of them, or the shape of one sample, that one forward pass runs on (in eval mode, without
            gradient) to learn each layer's input size; None holds for every size. A layer seen at several sizes is normalised for
            every size.
        where: keep only layers for which `where(path, module)` holds.
        **options: those of `spectral_norm`.

    Returns:
        The model.

    >>> model = spectral_norm_(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.zeros(1, 1, 4, 4))
    >>> [type(p).__name__ for m in model for p in getattr(m, "parametrizations", {})]
    ['str', 'str']
    """
    each(model, example, where, partial(spectral_norm, **options))
    return model
