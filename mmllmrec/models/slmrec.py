"""SLMRec: one graph encoder a channel, and a self-supervised task that aligns the channels step by step.

Legend: C distinct items of a batch, U users, I items, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmllmrec import losses as loss_functions
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel
from mmllmrec.models.vectors import rows_of


class SLMRec(MultimodalModel):
    """LightGCN over IDs and over each modality with the same users, concatenated and mapped; fine-and-coarse spaces.

    Tao et al. 2022 (doi 10.1109/TMM.2022.3187556). Channels: X = LightGCN(P, Q), X_m = LightGCN(P, W_m x_m + b_m);
    users are W_u [X; X_1; ...], items W_i [X; X_1; ...]. Main loss: the in-batch softmax. FAC: x_0 = the item's ID
    channel; in the space of the m-th modality x_m = g_m(x_(m-1)) meets y_m = h_m(X_m) among the batch's items,
    cross-entropy of x_m . y_m / temperature; ``alignment_weight`` times their sum. An absent modality is zero before
    the graph, and its item no row of that space. Departures: the main loss is ``VectorModel``'s (logQ-corrected, known
    positives masked, learned temperature); all spaces are D wide; features are used as given, the paper brings them to
    unit length first; of its self-supervised tasks FAC alone is here, not the dropping and masking of features (FD,
    FM).
    """

    losses: ClassVar[tuple[str, ...]] = ("softmax", "bpr")

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 3,
        alignment_weight: float = 0.1,
        temperature: float = 0.2,
        reg: float = 0.0,
        feature_dim: int = 64,
        loss: str = "softmax",
    ):
        super().__init__(train, **arguments(locals()))
        self.alignment_weight, self.temperature = alignment_weight, temperature
        self.maps = self.linear_each(dim)
        channels = len(self.modalities) + 1
        self.join_users, self.join_items = nn.Linear(channels * dim, dim), nn.Linear(channels * dim, dim)
        self.spaces = nn.ModuleList(nn.Linear(dim, dim) for _ in self.modalities)
        self.into = nn.ModuleList(nn.Linear(dim, dim) for _ in self.modalities)
        for layer in (*self.maps, self.join_users, self.join_items, *self.spaces, *self.into):
            nn.init.xavier_uniform_(layer.weight)

    def encode(self) -> Encoded:
        return self._encoded(slice(None), slice(None))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        some = self.ends(batch)  # no graph follows what joins the channels: the batch's nodes are enough
        encoded = self._encoded(*some).held(*some, (self.n_users, self.n_items))
        return self.ranking(batch, encoded.pick) | self.auxiliary(batch, encoded)

    def _encoded(self, some_users: Tensor | slice, some_items: Tensor | slice) -> Encoded:
        users, items = self.ids()
        each = [items, *self.through(self.maps)]
        # one product for all channels: side by side they are as wide as all of them together
        out_users, out_items = self.graph(users.repeat(1, len(each)), torch.cat(each, dim=1))
        out_users, out_items = rows_of(out_users, some_users), rows_of(out_items, some_items)
        channels = torch.stack(out_items.split(self.dim, dim=1))
        here = self.warm | self.all_present().any(dim=1)  # elsewhere is the join's bias alone
        users = self.join_users(out_users) * self.known[some_users, None]
        return Encoded(users, self.join_items(out_items) * here[some_items, None], {"channels": channels})

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``alignment``: each modality's channel in the space that it shares with those before it."""
        if not self.alignment_weight:
            return {}
        items = batch.items.unique()
        channels = encoded.parts["channels"][:, encoded.where_items(items)]
        x, terms = channels[0], []
        for column, (m, space, into) in enumerate(zip(self.modalities, self.spaces, self.into, strict=True)):
            x = space(x)
            here = self.present(m)[items]
            one, other = x[here] / self.temperature, into(channels[column + 1][here])
            own = torch.arange(len(one), device=one.device)
            terms.append(loss_functions.matched_softmax(one, other, own) if len(own) else one.sum() + other.sum())
        return {"alignment": self.alignment_weight * torch.stack(terms).sum()}
