"""Intervals and tests over users. Legend: n users, R resamples, U users of a dataset, M rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Difference:
    """What ``clustered_bootstrap`` finds of a less b: the difference, and relative to b, each with its 95% interval."""

    difference: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float
    p: float


def over_seeds(values: Sequence[tuple[np.ndarray, np.ndarray]], n_users: int) -> np.ndarray:
    """Each user's mean over the seeds that rank it: [(users (n,), values (n,)), ...] a seed -> (U,), NaN for a user
    whom none ranks."""
    total, count = np.zeros(n_users), np.zeros(n_users)
    for users, value in values:
        total[users] += value
        count[users] += 1
    return np.divide(total, count, out=np.full(n_users, np.nan), where=count > 0)


def first_row(means: np.ndarray) -> np.ndarray:
    """The mean of the first row alone, (..., M) -> (...)."""
    first: np.ndarray = means[..., 0]
    return first


def clustered_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    *,
    combine: Callable[[np.ndarray], np.ndarray] = first_row,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap over users clustered over seeds: a user's values in all seeds are resampled together.

    a, b (U, M): a column a row of the table, each user's mean over the seeds that rank it (``over_seeds``), NaN where
    none does, in the same cells. A resample draws users with replacement, as often as there are users with a value;
    ``combine`` turns the rows' means over users, (..., M) -> (...), into the number that is compared (the harmonic mean
    of two rows, say). 95% percentile intervals; p is two-sided, twice the smaller share of resampled differences on one
    side of 0, never below 2 / (R + 1) (as ``paired_bootstrap``). Seeds are not resampled: three are too few. The
    relative ones are NaN where b is 0, and their bounds infinite where it is 0 in a resample. Raises ``ValueError``
    when the users differ or none has a value.
    """
    here = ~np.isnan(a)
    if a.shape != b.shape or not np.array_equal(here, ~np.isnan(b)):
        raise ValueError(f"{a.shape} and {b.shape}: a paired test needs the same users on the same rows")
    some = here.any(axis=1)
    if not here.any(axis=0).all():
        raise ValueError("no user has a value on a row: there is nothing to compare")
    weights, left, right = here[some].astype(np.float64), np.nan_to_num(a[some]), np.nan_to_num(b[some])
    n = len(weights)
    rng = generator(seed, "clustered bootstrap")
    drawn = []
    for block in np.diff([*range(0, resamples, 250), resamples]):
        w = rng.multinomial(n, np.full(n, 1 / n), size=block).astype(np.float64)
        size = np.maximum(w @ weights, 1e-12)
        drawn.append((combine((w @ left) / size), combine((w @ right) / size)))
    x, y = (np.concatenate(side) for side in zip(*drawn, strict=True))
    counts = weights.sum(axis=0)
    mine, theirs = float(combine(left.sum(0) / counts)), float(combine(right.sum(0) / counts))
    low, high = np.percentile(x - y, [2.5, 97.5])
    # a resample in which b is 0 has no bound above; the percentiles are draws, since nothing lies between one and that
    ratio = np.divide(x, y, out=np.full_like(x, np.inf), where=y > 0) - 1
    share_low, share_high = np.percentile(ratio, [2.5, 97.5], method="inverted_cdf")
    side = min((x <= y).sum(), (x >= y).sum())
    p = min(1.0, 2 * (side + 1) / (resamples + 1))
    relative = mine / theirs - 1 if theirs > 0 else float("nan")
    numbers = (mine - theirs, low, high, relative, share_low, share_high, p)
    return Difference(*(float(v) for v in numbers))


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
