"""Intervals and tests over users. Legend: n users, R resamples."""

from __future__ import annotations

import numpy as np

from mmllmrec.seed import generator


def interval(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a mean over users by the normal approximation: mean -+ z s / sqrt(n); (n,) -> (low, high)."""
    from scipy.stats import norm

    half = norm.ppf(0.5 + level / 2) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(values.mean() - half), float(values.mean() + half)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b over the same users: (n,), (n,) -> 95% percentile interval (low, high) and a two-sided p.

    Users are resampled with replacement (Efron and Tibshirani 1993, chapters 13 and 16); p is twice the smaller share
    of resampled means on one side of 0, never below 2 / (R + 1). Raises ``ValueError`` on other lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} users: a paired test needs the same ones")
    difference = np.asarray(a, dtype=np.float64) - b
    rng = generator(seed, "bootstrap")
    means = np.concatenate(
        [
            rng.multinomial(len(difference), np.full(len(difference), 1 / len(difference)), size=block) @ difference
            for block in np.diff([*range(0, resamples, 250), resamples])
        ]
    ) / len(difference)
    low, high = np.percentile(means, [2.5, 97.5])
    side = min((means <= 0).sum(), (means >= 0).sum())
    return float(low), float(high), float(min(1.0, 2 * (side + 1) / (resamples + 1)))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of a family of p-values: (m,) -> (m,), Holm 1979.

    >>> holm(np.array([0.01, 0.04, 0.03])).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected
