"""EASE: a linear autoencoder over items, in closed form.

Legend: B users asked for, U users, I items.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.models.base import ClosedForm


class EASE(ClosedForm):
    """Embarrassingly shallow autoencoder: score(u, .) = x_u B, where B predicts each item from all the others.

    B minimises ||X - X B||_F^2 + reg ||B||_F^2 with a zero diagonal: with P = (X^T X + reg 1)^-1, B_ij = -P_ij / P_jj
    off the diagonal (Steck 2019, eq. 8). Computed once, when first needed, in float64 by Cholesky: I^3 operations and 8
    I^2 bytes a matrix, about 0.4 GB at 7,000 items. With ``dropout`` p it is EDLAE, the autoencoder trained with that
    share of its input gone: P = (G + p / (1 - p) diag(G) + reg 1)^-1, G = X^T X (Steck 2020, eqs. 8 and 9). An item or
    a user without events scores 0.
    """

    def __init__(self, train: Interactions, *, reg: float = 200.0, dropout: float = 0.0):
        super().__init__(train, reg=reg, dropout=dropout)
        if not reg > 0:
            raise DataError(f"reg={reg}: above zero, or the Gram matrix may have no inverse")
        if not 0 <= dropout < 1:
            raise DataError(f"dropout={dropout}: a share of the events, 0 or more and below 1")
        self.reg, self.dropout = reg, dropout

    @cached_property
    def weight(self) -> np.ndarray:
        """B, (I, I) float32, zero on the diagonal."""
        x = self.train_data.csr.astype(np.float64)
        gram = torch.from_numpy((x.T @ x).toarray())
        gram.diagonal().mul_(1 + self.dropout / (1 - self.dropout)).add_(self.reg)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        b = -inverse / inverse.diagonal()
        b.fill_diagonal_(0.0)
        return b.float().numpy()

    def score(self, users: np.ndarray | Tensor) -> Tensor:
        """Scores of all items, (B,) -> (B, I) float32."""
        return torch.from_numpy(self.taken(users) @ self.weight)

    def with_history(self, history: Interactions) -> ClosedForm:
        _ = self.weight  # once, here, so that every copy shares it
        return super().with_history(history)
