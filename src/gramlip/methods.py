"""METHODS: name -> function; every way to bound an operator, under one signature."""

from __future__ import annotations

from collections.abc import Callable

from gramlip.bound import Bound
from gramlip.certify import certify

METHODS: dict[str, Callable[..., Bound]] = {"certify": certify}
