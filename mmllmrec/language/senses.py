"""What no language model reads, as words: each item's sound or scent by the cluster of its features, "sound b".

Legend: I items, F columns, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase

import numpy as np

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError
from mmllmrec.features.table import FeatureTable

SENSES = {"audio": "sound", "sensor": "scent"}  # a modality's word
MOST = 12  # clusters a modality


def heard(
    catalog: Catalog, *, fit_on: np.ndarray, senses: Mapping[str, str] = SENSES, most: int = MOST
) -> list[list[str]]:
    """Words for the modalities in ``senses`` that a catalogue has, a list an item, empty for one that has none of them.

    Training-free features (``FeatureTable.from_catalog``), standardised, in K clusters by ``clusters``, both fitted on
    the items of ``fit_on`` (I,) bool. Letters are of no account: what they stand for is counted from who took them.
    """
    some = [m for m in catalog.modalities if m in senses]
    found: list[list[str]] = [[] for _ in range(len(catalog))]
    if not some:
        return found
    table = FeatureTable.from_catalog(catalog, fit_on=fit_on, modalities=some).standardise(fit_on)
    for column, modality in enumerate(table.modalities):
        here = table.presence[:, column]
        known = here & np.asarray(fit_on, dtype=bool)
        if known.sum() < 4:
            continue
        rows = table.tables[modality]
        for item, code in zip(np.flatnonzero(here), clusters(rows[known], rows[here], most=most), strict=True):
            found[item].append(f"{senses[modality]} {ascii_lowercase[code]}")
    return found


def beside(lines: Sequence[str], words: Sequence[Sequence[str]]) -> list[str]:
    """Lines of items (I,), empty for none, with what is ``heard`` of them after each."""
    return [", ".join(filter(None, [line, *more])) for line, more in zip(lines, words, strict=True)]


def clusters(rows: np.ndarray, others: np.ndarray, *, most: int = MOST) -> np.ndarray:
    """The nearest of K centres of k-means on ``rows`` (N, F) for each of ``others`` (I, F): (I,) int.

    K, of 2 to ``most``, has the largest simplified silhouette on ``rows``: the mean of (b - a) / b, a and b the
    distances to the nearest centre and to the next one (Hruschka et al. 2004). Seeded; the same rows give the same
    clusters. Raises ``DataError`` for fewer than three rows and for ``most`` outside 2..26.
    """
    import faiss

    if not 2 <= most <= len(ascii_lowercase) or len(rows) < 3:
        letters = len(ascii_lowercase)
        raise DataError(f"most={most}, {len(rows)} rows: ask for 2 to {letters} clusters of three rows or more")
    rows, others = (np.ascontiguousarray(x, dtype=np.float32) for x in (rows, others))
    best: tuple[float, np.ndarray] = (-1.0, np.zeros(len(others), dtype=np.int64))
    for k in range(2, min(most, len(rows) - 1) + 1):
        options = {"niter": 50, "nredo": 10, "seed": 1, "min_points_per_centroid": 1}
        means = faiss.Kmeans(rows.shape[1], k, max_points_per_centroid=len(rows), **options)
        means.train(rows)
        near = np.sqrt(np.maximum(means.index.search(rows, 2)[0], 0.0))
        silhouette = float(np.mean((near[:, 1] - near[:, 0]) / np.maximum(near[:, 1], 1e-12)))
        if silhouette > best[0]:
            best = silhouette, means.index.search(others, 1)[1][:, 0]
    return best[1]
