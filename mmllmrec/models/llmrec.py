"""LLMRec: what a language model wrote of users and items, beside their other content, on the user-item graph.

Legend: B batch, U users, I items, M modalities, D width, F_m width of a modality's features, P width of a profile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation, normalised_events
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel
from mmllmrec.models.vectors import means_of


class LLMRec(MultimodalModel):
    """Profiles of users, attributes of items and pairs of liked and disliked items, written beforehand.

    Wei et al. 2024 (arXiv 2311.00423). Vectors are LightGCN's plus, at unit length, each modality's projection
    propagated once to users and back (times ``content_weight``) and the profiles' projection propagated once to items
    and back (times ``profile_weight``). BPR, with the ``pruned`` share of a batch's largest losses left out as noise;
    ``pair_weight`` times BPR of the written pairs of the batch's users; ``mask_weight`` times the masked-profile loss:
    ``mask`` of the users have the mean profile in place of their own, which a decoder is to tell. An item's attributes
    are further modalities of ``features``. ``profiles`` (U, P): what was written of users, encoded; without them a
    user's profile is the mean of its items' features, a template that a language model has to beat. ``pairs`` (U, 2):
    an item written as liked and one as disliked for each user, -1 where none; without them the term is gone. Both are
    saved with the weights. An absent modality is zero. Departures: the graph is normalised on both sides and has no
    softmax at its end; the mask is drawn anew every step; the published code keeps the largest losses and drops the
    smallest.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        profiles: np.ndarray | Tensor | None = None,
        pairs: np.ndarray | Tensor | None = None,
        dim: int = 64,
        layers: int = 2,
        content_weight: float = 0.02,
        profile_weight: float = 0.7,
        pair_weight: float = 0.012,
        mask_weight: float = 1e-3,
        mask: float = 0.1,
        pruned: float = 0.1,
        reg: float = 1e-4,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals(), "profiles", "pairs"))
        if not 0 <= pruned < 1 or not 0 <= mask < 1:
            raise DataError(f"pruned={pruned}, mask={mask}: shares, 0 or more and below 1")
        self.content_weight, self.profile_weight, self.pair_weight = content_weight, profile_weight, pair_weight
        self.mask_weight, self.mask, self.pruned = mask_weight, mask, pruned
        written = means_of(train.csr, self.frozen) if profiles is None else _rows(profiles, self.n_users, "profiles")
        self.register_buffer("profiles", written.float().contiguous())
        none = torch.full((self.n_users, 2), -1)
        chosen = none if pairs is None else _rows(pairs, self.n_users, "pairs").long()
        if chosen.shape[1] != 2 or int(chosen.max()) >= self.n_items:
            raise DataError(f"pairs: items below {self.n_items}, two a user; got {tuple(chosen.shape)}")
        self.register_buffer("pairs", chosen)
        self.maps, self.told = self.linear_each(dim, bias=False), nn.Linear(self.profiles.shape[1], dim, bias=False)
        for layer in (*self.maps, self.told):
            nn.init.xavier_uniform_(layer.weight)
        self.decoder = nn.Linear(dim, self.profiles.shape[1]) if mask_weight and mask else None
        self.to_users = Propagation(normalised_events(train))
        self.to_items = Propagation(normalised_events(train).T.tocsr())

    profiles: Tensor
    pairs: Tensor

    def encode(self) -> Encoded:
        users, items = self.graph(*self.ids())
        for content in self.through(self.maps):
            of_users = self.to_users(content)
            users = users + self.content_weight * unit(of_users)
            items = items + self.content_weight * unit(self.to_items(of_users) + content)
        profiles, parts = self.profiles, {}
        if self.training and self.decoder is not None:
            masked = torch.rand(len(profiles), device=profiles.device) < self.mask
            masked[0] = True  # one at least
            profiles = torch.where(masked[:, None], profiles.mean(dim=0), profiles)
            parts["masked"] = masked
        of_items = self.to_items(self.told(profiles))
        of_users = self.to_users(of_items)
        parts |= {"profile users": of_users, "profile items": of_items}
        users, items = users + self.profile_weight * unit(of_users), items + self.profile_weight * unit(of_items)
        return Encoded(users, items, parts)

    def ranked(self, batch: Batch, vectors: Any, *, present: Tensor | None = None) -> Tensor:
        if self.log_scale is not None or not self.pruned or not self.training:
            return super().ranked(batch, vectors, present=present)
        u, i, j = vectors(batch.users, batch.items, batch.negatives)
        each = F.softplus((u[:, None] * j).sum(-1) - (u * i).sum(-1)[:, None]).mean(dim=1)
        kept = max(int(len(each) * (1 - self.pruned)), 1)
        return each.sort().values[:kept].mean()

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``pairs`` and ``mask``."""
        terms, users = {}, batch.users.unique()
        chosen = self.pairs[users]
        some = (chosen >= 0).all(dim=1)
        if self.pair_weight and bool((self.pairs >= 0).any()):
            u, liked, not_liked = encoded.users[users], *(encoded.items[chosen.clamp(min=0)[:, c]] for c in (0, 1))
            value = losses.bpr((u * liked).sum(-1), (u * not_liked).sum(-1)[:, None], mask=some[:, None])
            terms["pairs"] = self.pair_weight * value
        if self.decoder is not None and "masked" in encoded.parts:
            masked = encoded.parts["masked"]
            decoded = self.decoder(encoded.parts["profile users"][masked])
            terms["mask"] = self.mask_weight * losses.reconstruction(decoded, self.profiles[masked], power=2.0)
        return terms

    @classmethod
    def _given(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        return {"profiles": state["profiles"], "pairs": state["pairs"]}


def _rows(given: np.ndarray | Tensor, users: int, what: str) -> Tensor:
    rows = torch.as_tensor(np.asarray(given))
    if rows.ndim != 2 or len(rows) != users:
        raise DataError(f"{what} have shape {tuple(rows.shape)}; expected ({users}, ...), a row a user")
    return rows
