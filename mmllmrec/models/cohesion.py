"""COHESION: content refined by the ID before the graph, three graphs after it, and more gradient for weak modalities.

Legend: B batch, K negatives, U users, I items, N = U + I nodes, M modalities and the ID, D width of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation
from mmllmrec.encoders.heads import unit
from mmllmrec.encoders.item_graph import companions as companions_of
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel, PrunedGraph


class COHESION(MultimodalModel, PrunedGraph):
    """Dual-stage fusion over a composite graph.

    Xu et al. 2025 (arXiv 2504.04452). Early: h_m = sqrt((e^2 + f_m^2) / 2 + 1e-8), elementwise, f_m a two-layer map of
    modality m's features, or of the ID e itself for the ID's channel. Each channel runs over the user-item graph with a
    user table of its own, from unit length, layers weighed by their cosine with the start and summed with it; channels
    are concatenated,
    and users over their ``companions``, items over the frozen graph of alike items are added. BPR of s = sum over
    channels of a_m p_m . q_m, a = 1 - softmax over m of how much m sets the positive above the negative, without
    gradient: a channel that cannot tell yet weighs more. All weigh alike when scoring, and in the softmax, where there
    is no one negative. ``prune``: see ``PrunedGraph``; ``shares`` (M,): how much each modality counts in the item
    graph, alike by default (published: 0.1 image, 0.9 text). Under BPR ``reg`` weighs the mean squares of the batch's
    users in every channel's table (published: in the modalities' alone). An absent modality has f_m = 0. Departures:
    the ID's channel is trained (published code: without gradient); natural logarithm; scores are of the whole graph.
    """

    graphs = "mixed"

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 2,
        item_layers: int = 1,
        hidden: int = 256,
        neighbours: int = 10,
        shares: Sequence[float] | None = None,
        companions: int = 40,
        prune: float = 0.0,
        reg: float = 1e-4,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.layers = layers
        widths = [dim, *self.features.widths.values()]
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(w, hidden), nn.LeakyReLU(), nn.Linear(hidden, dim)) for w in widths
        )
        self.preferences = nn.ParameterList(nn.init.xavier_normal_(torch.empty(self.n_users, dim)) for _ in widths)
        del self.users  # a table a channel takes its place
        nn.init.xavier_normal_(self.items.weight)
        self.companions = Propagation(companions_of(train, k=companions))

    def encode(self) -> Encoded:
        ids = self.items.weight * self.warm[:, None]
        inputs = [(ids, self.warm), *((self.rows(m), self.present(m)) for m in self.modalities)]
        found = []
        for (rows, present), layer, preference in zip(inputs, self.maps, self.preferences, strict=True):
            told = layer(rows) * present[:, None]
            mixed = (((ids.square() + told.square()) / 2) + 1e-8).sqrt() * (present | self.warm)[:, None]
            found.append(self._refined(torch.cat([preference * self.known[:, None], mixed])))
        users, items = torch.cat(found, dim=1).split([self.n_users, self.n_items])
        return Encoded(users + self.companions(users), items + self.smoothed(items))

    def _refined(self, nodes: Tensor) -> Tensor:
        """Layers of one channel, each weighed by its cosine with the start, and the start: (N, D) -> (N, D)."""
        propagation = self.through_graph or self.graph.propagation
        own = unit(nodes)
        layer = total = own
        for _ in range(self.layers):
            passed = propagation(layer)
            layer = F.cosine_similarity(passed, own, dim=-1)[:, None] * passed
            total = total + layer
        return total

    def ranking(self, batch: Batch, vectors: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
        if self.log_scale is not None:
            return super().ranking(batch, vectors)
        u, i, j = vectors(batch.users, batch.items, batch.negatives)
        channels = len(self.preferences)
        by_channel = (x.unflatten(-1, (channels, -1)) for x in (u[:, None], i[:, None], j))
        p, q, n = by_channel
        positive, negative = (p * q).sum(-1), (p * n).sum(-1)  # (B, 1, C), (B, K, C)
        weights = 1 - torch.softmax((positive - negative).detach(), dim=-1)
        gap = (weights * (negative - positive)).sum(-1)
        terms = {"bpr": losses.bpr(torch.zeros_like(gap[:, 0]), gap)}
        if self.reg:
            terms["reg"] = self.reg * losses.mean_squares(*(table[batch.users] for table in self.preferences))
        return terms
