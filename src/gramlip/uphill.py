"""Newton steps on the size of a trigonometric polynomial: where a vector's image grows. docs/theory.md#lower-side."""

from __future__ import annotations

import numpy as np

from gramlip.arrays import Complexes, Ints, Reals

STEPS = 5


def uphill(coefficients: Complexes, positions: Ints, w: Reals) -> Reals:
    """From each w (I, axes) a few safeguarded steps up `|sum_p coefficients_p exp(-i p.w)|^2`; taps p are `positions` (taps, axes)."""
    d = positions.shape[1]
    outer = (positions[:, :, None] * positions[:, None, :]).reshape(len(positions), -1)
    moments = np.concatenate([np.ones((len(positions), 1)), positions, outer], 1).astype(np.complex128)

    def terms(w: Reals) -> tuple[Complexes, Complexes, Complexes]:
        sums = (coefficients * np.exp(-1j * (w @ positions.T))) @ moments
        return sums[:, 0], -1j * sums[:, 1 : 1 + d], -sums[:, 1 + d :].reshape(-1, d, d)

    p, first, second = terms(w)
    for _ in range(STEPS):
        slope = 2 * (p.conj()[:, None] * first).real
        bend = 2 * (p.conj()[:, None, None] * second + first.conj()[:, :, None] * first[:, None, :]).real
        values, vectors = np.linalg.eigh(bend)
        # Newton where the surface is concave, a gradient step of the same scale elsewhere
        size = np.abs(values)
        size = np.maximum(size, 1e-3 * size.max(-1, keepdims=True) + 1e-300)
        step = (vectors @ ((vectors.swapaxes(1, 2) @ slope[..., None]) / size[..., None]))[..., 0].clip(-1.0, 1.0)
        for scale in (1.0, 0.25, 0.0):
            after = terms(w + scale * step)
            better = np.abs(after[0]) > np.abs(p)
            if better.all() or scale == 0.0:
                break
            step = np.where(better[:, None], step, step * 0.25)
        move = np.where(better[:, None], scale * step, 0.0)
        if np.abs(move).max() < 1e-8:
            break
        w = w + move
        p, first, second = terms(w)
    return w
