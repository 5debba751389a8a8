"""VBPR: matrix factorisation beside a user's taste for frozen content features.

Legend: B batch, C some items, U users, I items, M modalities, D width of each half, F width of all features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.content import ContentModel
from mmllmrec.models.vectors import rows_of


class VBPR(ContentModel):
    """score(u, i) = gamma_u . gamma_i + theta_u . (E f_i), He and McAuley 2016, eq. 4.

    f_i are all modalities' features side by side (``ContentModel``), an absent one zero (E has no bias, so it adds
    nothing). An item without a training event has its ID absent, gamma_i = 0, and is scored by content alone; under BPR
    a user without one keeps its random start. ``dim``
    is the width of each of the two halves; ``reg`` weighs the norms of the batch's embeddings
    (``losses.embedding_norm``). With ``loss="softmax"`` the cosine is of both halves together. Departures: several
    modalities; biases beta_i and beta' f_i only with ``bias=True`` (a cosine has no place for them: BPR alone);
    features reduced once, before training; the family's unsquared penalty and start (Xavier uniform for IDs, normal
    for E).
    """

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        reg: float = 1e-2,
        feature_dim: int = 64,
        bias: bool = False,
        loss: str = "bpr",
    ):
        options: dict[str, Any] = {"dim": dim, "reg": reg, "bias": bias}
        super().__init__(train, catalog=catalog, features=features, feature_dim=feature_dim, loss=loss, **options)
        if bias and loss != "bpr":
            raise DataError(f"bias=True: a cosine has no biases; use loss='bpr', not loss={loss!r}")
        self.users, self.items = nn.Embedding(self.n_users, 2 * dim), nn.Embedding(self.n_items, dim)
        self.project = nn.Linear(self.width, dim, bias=False)
        nn.init.xavier_uniform_(self.users.weight)
        nn.init.xavier_uniform_(self.items.weight)
        nn.init.xavier_normal_(self.project.weight)
        self.biases = nn.Linear(self.width, 1, bias=False) if bias else None
        self.item_bias = nn.Parameter(torch.zeros(self.n_items)) if bias else None

    def _items(self, items: Tensor | slice) -> Tensor:
        """Both halves of some items' embeddings, (...,) -> (..., 2D), and the bias with ``bias=True``."""
        content, known = rows_of(self.frozen, items), self.warm[items][..., None]
        parts = [rows_of(self.items.weight, items) * known, self.project(content)]
        if self.biases is not None and self.item_bias is not None:
            parts.append(self.item_bias[items][..., None] * known + self.biases(content))
        return torch.cat(parts, dim=-1)

    def vectors(self, users: Tensor | slice, *items: Tensor | slice) -> tuple[Tensor, ...]:
        rows = rows_of(self.users.weight, users)
        rows = rows if self.biases is None else nn.functional.pad(rows, (0, 1), value=1.0)
        return rows, *(self._items(i) for i in items)

    def penalised(self, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
        # the user's last 1, which carries the biases, is no embedding
        return rows_of(self.users.weight, batch.users), *rows[1:]

    def _folded(self, users: Tensor, items: Tensor) -> Tensor:
        if self.biases is None:
            return super()._folded(users, items)
        return torch.cat([super()._folded(users[:, :-1], items[:, :-1]), users[:, -1:]], dim=1)
