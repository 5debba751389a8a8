"""VBPR: matrix factorisation beside a user's taste for frozen content features.

Legend: B batch, K negatives, U users, I items, M modalities, D width of each half, F width of all features.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import Recommender, read_tensors


class VBPR(Recommender):
    """score(u, i) = gamma_u . gamma_i + theta_u . (E f_i), He and McAuley 2016, eq. 4.

    f_i are all modalities' features side by side, an absent one zero (E has no bias, so it adds nothing). An item
    without a training event has its ID absent, gamma_i = 0, and is scored by content alone. ``dim`` is the width of
    each of the two halves; ``reg`` weighs the norms of the batch's embeddings (``losses.embedding_norm``).
    ``features`` are used as given; without, ``catalog``'s are whitened to ``feature_dim`` columns a modality, fitted on
    train items. A loaded model scores with the saved features, not with those of the catalogue it is given.
    Departures: several modalities; biases beta_i and beta' f_i only with ``bias=True``; features reduced once, before
    training; the family's unsquared penalty and start (Xavier uniform for IDs, normal for E).
    """

    supports_cold_items: ClassVar[bool] = True
    warm: Tensor
    content: Tensor

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
    ):
        super().__init__(train, dim=dim, reg=reg, feature_dim=feature_dim, bias=bias)
        warm = train.item_counts > 0
        if features is None:
            if catalog is None:
                raise DataError("VBPR reads items' content: pass catalog= or features=")
            features = FeatureTable.from_catalog(catalog, fit_on=warm).whiten(warm, feature_dim)
        if len(features) != self.n_items:
            raise DataError(f"features have {len(features)} rows; there are {self.n_items} items")
        self.reg, self.modalities = reg, features.modalities
        self.users, self.items = nn.Embedding(self.n_users, 2 * dim), nn.Embedding(self.n_items, dim)
        self.project = nn.Linear(sum(features.widths.values()), dim, bias=False)
        nn.init.xavier_uniform_(self.users.weight)
        nn.init.xavier_uniform_(self.items.weight)
        nn.init.xavier_normal_(self.project.weight)
        self.biases = nn.Linear(self.project.in_features, 1, bias=False) if bias else None
        self.item_bias = nn.Parameter(torch.zeros(self.n_items)) if bias else None
        self.register_buffer("warm", torch.from_numpy(warm), persistent=False)
        self._use(features)

    def _use(self, features: FeatureTable) -> None:
        self.features = features
        self.register_buffer("content", torch.from_numpy(features.concatenated()), persistent=False)

    def _items(self, items: Tensor | slice) -> Tensor:
        """Both halves of some items' embeddings, (...,) -> (..., 2D), and the bias with ``bias=True``."""
        content, known = self.content[items], self.warm[items][..., None]
        parts = [self.items.weight[items] * known, self.project(content)]
        if self.biases is not None and self.item_bias is not None:
            parts.append(self.item_bias[items][..., None] * known + self.biases(content))
        return torch.cat(parts, dim=-1)

    def _users(self, users: Tensor | slice) -> Tensor:
        rows = self.users.weight[users]
        return rows if self.biases is None else nn.functional.pad(rows, (0, 1), value=1.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self._users(slice(None)), self._items(slice(None))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """BPR and the weighted norm of the batch's embeddings; only the batch's items are projected."""
        assert batch.negatives is not None
        u, i, j = self._users(batch.users), self._items(batch.items), self._items(batch.negatives)
        terms = {"bpr": losses.bpr((u * i).sum(-1), (u[:, None] * j).sum(-1))}
        if self.reg:  # the user's last 1, which carries the biases, is no embedding
            terms["reg"] = self.reg * losses.embedding_norm(self.users(batch.users), i, j)
        return terms

    def with_catalog(self, catalog: Catalog) -> VBPR:
        """The same weights reading another catalogue of the same items, through the maps fitted at building."""
        if catalog.item_ids != self.train_data.item_ids:
            raise DataError("VBPR.with_catalog: the catalogue's items are not those of the training events")
        table = FeatureTable.from_catalog(catalog, fit_on=self.train_data.item_counts > 0)
        other = copy.copy(self)
        other._buffers = dict(self._buffers)  # the copy shares parameters, not the features
        other._use(table.like(self.features))
        return other.to(self.device)

    def provenance(self) -> dict[str, Any]:
        """The hash of the features it reads."""
        return {"features": self.features.hash}

    def weights(self) -> dict[str, Tensor]:
        """Parameters, and the features with the maps that made them."""
        arrays = self.features.arrays()
        return super().weights() | {f"features.{k}": torch.tensor(v) for k, v in arrays.items()}

    @classmethod
    def _restore(cls, folder: Path, train: Interactions, catalog: Catalog | None, about: dict[str, Any]) -> VBPR:
        state = read_tensors(folder / "model.safetensors")
        saved = {k.removeprefix("features."): state.pop(k).numpy() for k in list(state) if k.startswith("features.")}
        features = FeatureTable.from_arrays(saved, modalities=about["modalities"])
        model = cls(train, features=features, **about["config"])
        model.load_state_dict(state)
        return model
