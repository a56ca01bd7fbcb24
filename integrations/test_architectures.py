"""Architectures of public packages: which have a finite constant, that it is not below a stretch, and why the others have none."""

from __future__ import annotations

import math

import pytest
from architectures import ARCHITECTURES, audited

ON_A_DOMAIN = {"RegNet", "attention U-Net", "MobileNetV3"}
REFUSED = {"VQ autoencoder": "jump"}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - REFUSED.keys()))
def test_a_fresh_network_has_a_finite_interval(name: str) -> None:
    report = audited(name, (0.0, 1.0) if name in ON_A_DOMAIN else None)
    assert not report.unsupported
    assert report.lower <= report.upper < math.inf


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_none_says_why(name: str) -> None:
    report = audited(name)
    assert report.upper == math.inf
    assert any(REFUSED[name] in row.reason for row in report.left_out)
