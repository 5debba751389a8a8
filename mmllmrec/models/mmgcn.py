"""MMGCN: a graph network a modality, held together by one ID embedding.

Legend: B batch, U users, I items, N = U + I nodes, M modalities, D width, F_m width of a modality, L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation, mean_adjacency
from mmllmrec.encoders.heads import unit
from mmllmrec.features.table import FeatureTable
from mmllmrec.losses import mean_squares
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel

COMBINE = ("concat", "add")


class ModalLayer(nn.Module):
    """One layer of one modality's graph: neighbours' mean, own vector and ID -> (N, D)."""

    def __init__(self, width: int, dim: int, *, combine: str):
        super().__init__()
        self.neighbour = nn.Linear(width, width, bias=False)
        self.own = nn.Linear(width, dim)
        self.combine, self.join = combine, nn.Linear(width + dim if combine == "concat" else width, dim)
        for layer in (self.neighbour, self.own, self.join):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, x: Tensor, ids: Tensor, means: Callable[[Tensor], Tensor]) -> Tensor:
        passed = F.leaky_relu(means(self.neighbour(x)))
        own = F.leaky_relu(self.own(x)) + ids
        if self.combine == "concat":
            return F.leaky_relu(self.join(torch.cat([passed, own], dim=1)))
        return F.leaky_relu(self.join(passed) + own)


class MMGCN(MultimodalModel):
    """Modality-specific convolutions whose layers add the node's ID: the sum over modalities is the node.

    Wei et al. 2019 (ACM MM). X^(0) = unit rows of [P_m; x_m], P_m a preference a user; per layer h = act(mean of the
    neighbours' W_1 x), own = act(W_2 x) + ID, and X' = act(W_3 [h; own]) (``combine="concat"``) or act(W_3 h + own)
    (``"add"``). A modality wider than ``hidden`` is first projected to that. BPR, and ``reg`` times the mean squares of
    the batch's IDs and preferences. An item without an event has no ID and no neighbours: its own vector is left,
    in the modalities it has. Departures: the published code penalises the first modality's preferences alone, and of
    all users; it never trains IDs and preferences (``train_ids=False``), divides the sum by M, always concatenates, and
    projects the first modality alone.
    """

    with_item_ids = False

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 3,
        hidden: int = 256,
        combine: str = "concat",
        train_ids: bool = True,
        reg: float = 1e-4,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        if combine not in COMBINE:
            raise DataError(f"combine={combine!r}: one of {COMBINE}")
        self.node = nn.Parameter(torch.empty(self.n_users + self.n_items, dim), requires_grad=train_ids)
        nn.init.xavier_normal_(self.node)
        widths = {m: self.features.widths[m] for m in self.modalities}
        self.shrink = nn.ModuleList(nn.Linear(w, hidden) if w > hidden else nn.Identity() for w in widths.values())
        widths = {m: min(w, hidden) for m, w in widths.items()}
        self.preferences = nn.ParameterList(
            nn.Parameter(nn.init.xavier_normal_(torch.empty(self.n_users, w)), requires_grad=train_ids)
            for w in widths.values()
        )
        self.stacks = nn.ModuleList(
            nn.ModuleList(ModalLayer(w if depth == 0 else dim, dim, combine=combine) for depth in range(layers))
            for w in widths.values()
        )
        self.means = Propagation(mean_adjacency(train))

    def encode(self) -> Encoded:
        users, items = self.trained(*self.node.split([self.n_users, self.n_items]))
        ids = torch.cat([users, items])
        total = torch.zeros_like(ids)
        contents = self.through(self.shrink)
        for m, content, preference, stack in zip(self.modalities, contents, self.preferences, self.stacks, strict=True):
            x = torch.cat([unit(preference) * self.known[:, None], unit(content)])
            for layer in stack:  # type: ignore[attr-defined, union-attr]
                x = layer(x, ids, self.means)
            here = torch.cat([self.known, self.present(m) | self.warm])  # elsewhere are the layers' biases alone
            total = total + x * here[:, None]
        users, items = total.split([self.n_users, self.n_items])
        return Encoded(users, items)

    def ranking(self, batch: Batch, vectors: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
        terms = {self.loss_name: self.ranked(batch, vectors)}
        if self.reg and self.loss_name == "bpr" and self.node.requires_grad:
            items = torch.cat([batch.items, batch.negatives.flatten()]) + self.n_users  # type: ignore[union-attr]
            preferences = (p[batch.users] for p in self.preferences)
            terms["reg"] = self.reg * mean_squares(self.node[batch.users], self.node[items], *preferences)
        return terms
