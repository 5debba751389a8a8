"""Nearest neighbours over any embedding, by FAISS.

Legend: N vectors held, Q queries, D width, K neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from mmllmrec.data.interactions import DataError


class Index:
    """Vectors (N, D) by their place, searched exactly for the largest inner product, or cosine.

    ``which`` (N,) bool limits what is held; a zero vector, which stands for something absent, never is where
    ``cosine``. Raises ``DataError`` for what is not finite, and when nothing is left to hold.

    >>> Index(np.eye(3, dtype=np.float32)).nearest(np.float32([[2, 1, 0]]), k=2)[0].tolist()
    [[0, 1]]
    """

    def __init__(self, vectors: np.ndarray | Tensor, *, cosine: bool = True, which: np.ndarray | None = None):
        import faiss

        self.cosine = cosine
        table = self._rows(vectors)
        held = np.ones(len(table), dtype=bool) if which is None else np.asarray(which, dtype=bool)
        if cosine:
            held = held & (np.abs(table).max(axis=1, initial=0) > 0)
        self.places = np.flatnonzero(held)
        if not len(self.places):
            raise DataError("an index of no vectors: none is left that is not zero")
        self.width = table.shape[1]
        self._faiss: Any = faiss.IndexFlatIP(self.width)
        self._faiss.add(np.ascontiguousarray(table[self.places]))

    def __len__(self) -> int:
        return len(self.places)

    def nearest(
        self, queries: np.ndarray | Tensor, *, k: int, besides: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places and scores of the nearest K = min(k, what is held) of each query: (Q, D) -> (Q, K) int64, (Q, K)
        float32, best first.

        ``besides`` (Q,) are places that a query must not find, its own say; where no other is left the place is -1.
        """
        table = self._rows(queries)
        if table.shape[1] != self.width:
            raise DataError(f"queries of width {table.shape[1]}: the index holds vectors of {self.width}")
        wanted = min(k + (besides is not None), len(self.places))
        score, row = self._faiss.search(table, wanted)
        place = self.places[row]
        if besides is not None:
            own = place == np.asarray(besides)[:, None]
            order = np.argsort(own, axis=1, kind="stable")  # what is not to be found comes last
            place, score = np.take_along_axis(np.where(own, -1, place), order, 1), np.take_along_axis(score, order, 1)
        return place[:, :k], score[:, :k]

    def _rows(self, vectors: np.ndarray | Tensor) -> np.ndarray:
        table = vectors.detach().cpu().numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)
        table = np.ascontiguousarray(table, dtype=np.float32)
        if table.ndim != 2 or not np.isfinite(table).all():
            raise DataError(f"vectors of shape {table.shape}: give a finite table, (N, D)")
        if self.cosine:
            table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        return table
