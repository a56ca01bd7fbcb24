"""Newton steps on the size of a trigonometric polynomial: where a vector's image grows. docs/theory.md#lower-side."""

from __future__ import annotations

import numpy as np

from gramlip.arrays import Complexes, Ints, Reals

STEPS = 5
CLOSE = 1e-5  # the next of Newton's steps is about as long as the square of this one


def uphill(coefficients: Complexes, positions: Ints, w: Reals) -> Reals:
    """From each w (I, axes) a few safeguarded steps up `|sum_p coefficients_p exp(-i p.w)|^2`; taps p are `positions` (taps, axes)."""
    d = positions.shape[1]
    outer = (positions[:, :, None] * positions[:, None, :]).reshape(len(positions), -1)
    moments = np.concatenate([np.ones((len(positions), 1)), positions, outer], 1).astype(np.complex128)

    def terms(w: Reals) -> tuple[Complexes, Complexes, Complexes]:
        sums = (coefficients * np.exp(-1j * (w @ positions.T))) @ moments
        return sums[:, 0], -1j * sums[:, 1 : 1 + d], -sums[:, 1 + d :].reshape(-1, d, d)

    now = terms(w)
    for _ in range(STEPS):
        p, first, second = now
        slope = 2 * (p.conj()[:, None] * first).real
        bend = 2 * (p.conj()[:, None, None] * second + first.conj()[:, :, None] * first[:, None, :]).real
        values, vectors = np.linalg.eigh(bend)
        # Newton where the surface is concave, a gradient step of the same scale elsewhere
        size = np.abs(values)
        size = np.maximum(size, 1e-3 * size.max(-1, keepdims=True) + 1e-300)
        step = (vectors @ ((vectors.swapaxes(1, 2) @ slope[..., None]) / size[..., None]))[..., 0].clip(-1.0, 1.0)
        after, better, close = now, *np.zeros((2, len(w)), dtype=np.bool_)
        for shorter in (1.0, 0.25, 0.25):
            step = np.where(better[:, None], step, shorter * step)
            after = terms(w + step)
            better, close = np.abs(after[0]) > np.abs(p), np.abs(step).max(-1) < CLOSE
            if (better | close).all():
                break
        w = np.where(better[:, None], w + step, w)
        if (close | ~better).all():
            break
        now = after if better.all() else terms(w)
    return w
