"""Eval mode for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Generator[None, None, None]:
    """The model in eval mode; every module's own mode is put back, whatever is raised."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """The same without gradient.

    >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    >>> with evaluating(model):
    ...     model.training
    False
    >>> [m.training for m in model]
    [False, True]
    """
    with torch.no_grad(), in_eval_mode(model):
        yield
