"""LLMRec: what a language model wrote of users and items, beside their other content, on the user-item graph.

Legend: B batch, U users, I items, M modalities, D width, F_m width of a modality's features, P width of a profile.
"""

from __future__ import annotations

from dataclasses import replace
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
    and back (times ``profile_weight``). BPR of the batch and, for the ``pair_share`` of it whose users have one, of
    written pairs, with the ``pruned`` share of the largest losses left out as noise; ``reg`` times
    ``losses.embedding_norm`` of the batch's final vectors; ``mask_weight`` times the masked-profile loss: ``mask`` of
    the users have the mean profile in place of their own, which a decoder is to tell from theirs after items and back,
    at a cost of (1 - cos)^2. An item's attributes are further modalities of ``features``. ``profiles`` (U, P): what was
    written of users, encoded; without them a user's profile is the mean of its items' features, also of those of
    another catalogue: a template that a language model has to beat. ``pairs`` (U, 2): an item written as liked and one
    as disliked for each user, -1 where none. Both are saved with the weights. A local language model's are
    ``language.profiles.Profiles.as_modality`` (attributes) and ``of_users``, and ``language.rerank.Reranked.pairs``. An
    absent modality is zero. Departures: an item keeps its own projection beside what comes back, without which a new
    one had nothing; attributes weigh as other content does (published: 0.005); the graph is normalised on both sides
    and has no softmax at its end; the mask is drawn anew every step, of users alone (published: of items' attributes
    too); there is no BPR of profiles against attributes, nor of a modality alone; the published code keeps the largest
    losses and drops the smallest, 0.71 or 0.4 of them. Raises ``DataError`` for shares out of range, for other shapes,
    and for ``pairs`` under the softmax, which has no pairs.
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
        pair_share: float = 0.1,
        mask_weight: float = 1e-5,
        mask: float = 0.1,
        pruned: float = 0.1,
        reg: float = 1e-4,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals(), "profiles", "pairs"))
        if not (0 <= pruned < 1 and 0 <= mask < 1 and 0 <= pair_share <= 1):
            raise DataError(f"pruned={pruned}, mask={mask}, pair_share={pair_share}: shares; the first two below 1")
        if pairs is not None and loss != "bpr":
            raise DataError(f"pairs are terms of BPR: loss={loss!r} takes none")
        self.content_weight, self.profile_weight, self.pair_share = content_weight, profile_weight, pair_share
        self.mask_weight, self.mask, self.pruned = mask_weight, mask, pruned
        if profiles is not None:
            self.written = True
            self.register_buffer("profiles", _rows(profiles, self.n_users, "profiles").float().contiguous())
        none = torch.full((self.n_users, 2), -1)
        chosen = none if pairs is None else _rows(pairs, self.n_users, "pairs").long()
        if chosen.shape[1] != 2 or int(chosen.max()) >= self.n_items:
            raise DataError(f"pairs: items below {self.n_items}, two a user; got {tuple(chosen.shape)}")
        self.register_buffer("pairs", chosen, persistent=pairs is not None)
        self.maps, self.told = self.linear_each(dim, bias=False), nn.Linear(self.profiles.shape[1], dim, bias=False)
        for layer in (*self.maps, self.told):
            nn.init.xavier_uniform_(layer.weight)
        self.decoder = nn.Linear(dim, self.profiles.shape[1]) if mask_weight and mask else None
        self.to_users = Propagation(normalised_events(train))
        self.to_items = Propagation(normalised_events(train).T.tocsr())

    profiles: Tensor
    pairs: Tensor
    written = False  # whether profiles were given, and are saved

    def _use(self, features: FeatureTable) -> None:
        super()._use(features)
        if not self.written:
            self.register_buffer("profiles", means_of(self.train_data.csr, self.frozen), persistent=False)

    def encode(self) -> Encoded:
        users, items = self.graph(*self.ids())
        for content in self.through(self.maps):
            of_users = self.to_users(content)
            users = users + self.content_weight * unit(of_users)
            items = items + self.content_weight * unit(self.to_items(of_users) + content)
        profiles, parts = self.profiles, {}
        if self.training and self.decoder is not None and bool(self.known.any()):
            order = torch.rand(len(profiles), device=profiles.device).masked_fill(~self.known, 2.0)
            masked = self.known & ((order < self.mask) | (order == order.min()))  # one at least
            profiles = torch.where(masked[:, None], profiles[self.known].mean(dim=0), profiles)
            parts["masked"] = masked
        of_items = self.to_items(self.told(profiles))
        of_users = self.to_users(of_items)
        parts |= {"profile users": of_users, "profile items": of_items}
        users, items = users + self.profile_weight * unit(of_users), items + self.profile_weight * unit(of_items)
        return Encoded(users, items, parts)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return super().loss(self._with_pairs(batch))

    def _with_pairs(self, batch: Batch) -> Batch:
        """The batch, and at its end written pairs of a random ``pair_share`` of its users."""
        if batch.negatives is None or not bool((self.pairs >= 0).any()):
            return batch
        chosen = self.pairs[batch.users]
        drawn = (chosen >= 0).all(dim=1) & (torch.rand(len(chosen), device=chosen.device) < self.pair_share)
        liked, disliked = chosen[drawn].unbind(dim=1)
        return replace(
            batch,
            users=torch.cat([batch.users, batch.users[drawn]]),
            items=torch.cat([batch.items, liked]),
            negatives=torch.cat([batch.negatives, disliked[:, None].expand(-1, batch.negatives.shape[1])]),
        )

    def pairwise(self, u: Tensor, i: Tensor, j: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if not self.pruned or not self.training or mask is not None:
            return super().pairwise(u, i, j, mask=mask)
        each = F.softplus((u[:, None] * j).sum(-1) - (u * i).sum(-1)[:, None]).mean(dim=1)
        return each.sort().values[: max(int(len(each) * (1 - self.pruned)), 1)].mean()

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``mask``."""
        if self.decoder is None or "masked" not in encoded.parts:
            return {}
        masked = encoded.parts["masked"]
        decoded = self.decoder(encoded.parts["profile users"][masked])
        return {"mask": self.mask_weight * losses.reconstruction(decoded, self.profiles[masked], power=2.0)}

    @classmethod
    def _given(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        return {name: state[name] for name in ("profiles", "pairs") if name in state}


def _rows(given: np.ndarray | Tensor, users: int, what: str) -> Tensor:
    rows = torch.as_tensor(given).detach().cpu()
    if rows.ndim != 2 or len(rows) != users:
        raise DataError(f"{what} have shape {tuple(rows.shape)}; expected ({users}, ...), a row a user")
    return rows
