"""ItemKNN: items like those a user took, by who else took them.

Legend: B users asked for, U users, I items.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.encoders.item_graph import top_of_rows
from mmllmrec.models.base import ClosedForm


class ItemKNN(ClosedForm):
    """Neighbourhood model: score(u, i) = sum of s_ij over the j in u's history that are among i's k nearest items.

    s_ij = |U_i n U_j| / (sqrt(|U_i| |U_j|) + shrink): cosine similarity of the items' user sets (Sarwar et al. 2001,
    section 3.1.1), shrunk towards zero where few users support it (Bell and Koren 2007, section 3). An item is not its
    own neighbour; ties go to the lower position. Departure: the weighted sum is not divided by the similarities' sum,
    which suits ratings and not implicit feedback. An item or a user without events scores 0.
    """

    def __init__(self, train: Interactions, *, k: int = 100, shrink: float = 10.0):
        super().__init__(train, k=k, shrink=shrink)
        if k < 1 or shrink < 0:
            raise DataError(f"k={k}, shrink={shrink}: give at least one neighbour and a shrinkage of 0 or more")
        self.k, self.shrink = k, shrink

    @cached_property
    def similarity(self) -> sp.csr_matrix:
        """(I, I) float32: row i holds the similarities of i's k nearest items."""
        n = self.train_data.item_counts.astype(np.float64)

        def similar(i: np.ndarray, j: np.ndarray, together: np.ndarray) -> np.ndarray:
            return (together / (np.sqrt(n[i] * n[j]) + self.shrink)).astype(np.float32)

        return top_of_rows(self.train_data.csr.T.tocsr().astype(np.float32), k=self.k, weigh=similar)

    @cached_property
    def _transposed(self) -> sp.csr_matrix:
        return self.similarity.T.tocsr()

    def score(self, users: np.ndarray | Tensor) -> Tensor:
        """Scores of all items, (B,) -> (B, I) float32."""
        return torch.from_numpy((self.taken(users) @ self._transposed).toarray())

    def with_history(self, history: Interactions) -> ClosedForm:
        _ = self._transposed  # once, here, so that every copy shares it
        return super().with_history(history)
