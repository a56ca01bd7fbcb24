"""Certified robustness: from the margins of a classifier and its Lipschitz constant to l2 radii, in pixels of [0, 1].

Proofs: docs/training.md#certify, and docs/local.md#radii for radii around each input. Constants are proved in floating point;
logits are taken as the model computes them, or with what rounding may have done to them (`executed=`, docs/execution.md).
"""

from gramlip.robust.accuracy import EPS, Certified, attacked_accuracy, certified_accuracy, certify
from gramlip.robust.margins import radii

__all__ = ["EPS", "Certified", "attacked_accuracy", "certified_accuracy", "certify", "radii"]
