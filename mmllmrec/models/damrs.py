"""DA-MRS: links that all modalities agree on, feedback weighed by how far content bears it out, and both aligned.

Legend: B batch, K negatives, U users, I items, N = U + I nodes, V views (modalities and co-consumption), D width.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation
from mmllmrec.encoders.heads import unit
from mmllmrec.encoders.item_graph import symmetric_degrees, top_of_rows
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import MultimodalModel


class DAMRS(MultimodalModel):
    """Denoising and aligning of content and feedback.

    Xv et al. 2024 (arXiv 2406.12501). A link of two items stays if their cosine is at least the mean cosine in *every*
    modality that both have; each modality's graph keeps an item's ``neighbours`` nearest of those, and a further one
    its ``neighbours`` that most users took with it (at least two). h_v = S_v Q, H their mean over the views that an
    item has, as all means over views are here, items LightGCN(i) + H_i.
    BPR's positive pair weighs mean over views of sigmoid(p_u . h_vi / |h_vi|) times exp(-2 variance), and one that
    content speaks against (below the batch's negatives) is partly turned round; ``preference_weight`` times the
    symmetric KL of sigmoid(p_u . g_i / |g_i|) and sigmoid(p_u . H_i / |H_i|) over the batch; ``relation_weight`` times
    the contrast of each view's items with those near by all views, then with those near by that view (``graded``).
    Departures: candidates of the last are the batch's items, where the published code takes all; under the softmax
    pairs are not weighed; an item without any content keeps its co-consumption.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 2,
        neighbours: int = 10,
        preference_weight: float = 1.0,
        relation_weight: float = 1e-3,
        temperature: float = 0.2,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.preference_weight, self.relation_weight = preference_weight, relation_weight
        self.temperature, self.neighbours = temperature, neighbours

    def _use(self, features: FeatureTable) -> None:
        super()._use(features)
        k = int(self.config["neighbours"])
        tables = [features.tables[m] for m in features.modalities]
        agreed = agreeing(tables, features.presence, k=k)
        graphs = [*agreed, co_consumed(self.train_data, k=k)]
        self.views = torch.nn.ModuleList(Propagation(symmetric_degrees(graph)) for graph in graphs)
        has = np.stack([np.diff(graph.indptr) > 0 for graph in graphs])
        has[-1] &= self.train_data.item_counts > 0
        self.register_buffer("has", torch.from_numpy(has), persistent=False)

    has: Tensor  # (V, I) which items have a view

    def encode(self) -> Encoded:
        users, items = self.ids()
        views = torch.stack([view(items) for view in self.views])
        out_users, out_items = self.graph(users, items)
        content = masked_mean(views, self.has[..., None])
        parts = {"views": views, "content": content, "feedback": out_items}
        return Encoded(out_users, out_items + content, parts)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``bpr`` weighed by content, or ``softmax``; ``preference`` and ``relation``."""
        encoded = self.encode()
        if self.log_scale is not None:
            return self.ranking(batch, encoded.pick) | self.auxiliary(batch, encoded)
        assert batch.negatives is not None
        u, i, j = encoded.pick(batch.users, batch.items, batch.negatives)
        gap = (u * i).sum(-1)[:, None] - (u[:, None] * j).sum(-1)
        for_it, against = self._weights(batch, encoded)
        pairs = for_it[:, None] * F.softplus(-gap) + against[:, None] * F.softplus(gap)
        return {"bpr": pairs.mean()} | self.auxiliary(batch, encoded)

    @torch.no_grad()
    def _weights(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """How far a pair counts as it is and turned round: (B,), (B,)."""
        users, views = encoded.users[batch.users], unit(encoded.parts["views"])
        of_positive = torch.sigmoid((views[:, batch.items] * users).sum(-1))  # (V, B)
        of_negative = torch.sigmoid((views[:, batch.negatives] * users[:, None]).sum(-1))
        has, theirs = self.has[:, batch.items], self.has[:, batch.negatives]
        expected = of_negative[theirs].mean() if bool(theirs.any()) else of_negative.mean()
        mean, count = masked_mean(of_positive, has), has.sum(0)
        variance = ((of_positive - mean).square() * has).sum(0) / (count - 1).clamp(min=1)
        kept = torch.where(count > 0, (mean * torch.exp(-2 * variance)).clamp(0, 1), 1.0)
        best = of_positive.masked_fill(~has, 0.0).amax(0)
        turned = (best - expected).clamp(0, 1) * (mean < expected) * (count > 0)
        return kept, turned

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        terms = {}
        users, items = batch.users.unique(), batch.items.unique()
        if batch.negatives is not None:
            items = torch.cat([batch.items, batch.negatives.flatten()]).unique()
        if self.preference_weight:
            rows = encoded.users[users]
            told = [rows @ unit(encoded.parts[name][items]).T for name in ("feedback", "content")]
            # KL of two Bernoullis, both ways: the difference of chances times the difference of logits
            apart = (torch.sigmoid(told[0]) - torch.sigmoid(told[1])) * (told[0] - told[1])
            terms["preference"] = self.preference_weight * apart.mean()
        if self.relation_weight:
            views, has = encoded.parts["views"][:, items], self.has[:, items]
            value = graded(views, has, k=self.neighbours, temperature=self.temperature)
            terms["relation"] = self.relation_weight * value
        return terms


def masked_mean(rows: Tensor, has: Tensor) -> Tensor:
    """Mean over the first dim of what is there, 0 where nothing is: (V, ...), bool that broadcasts to it -> (...)."""
    return (rows * has).sum(dim=0) / has.sum(dim=0).clamp(min=1)


def graded(views: Tensor, has: Tensor, *, k: int, temperature: float) -> Tensor:
    """Contrast of every view with graded neighbours, of the items that have it (V, C) bool: (V, C, D) -> ().

    Of view v's cosines, softmaxed over the candidates that have it, the k best in the sum of all views and v once more
    are the first grade, the k best of the others in v alone the second; -log(first / all) - log(second / (all -
    first)), sums of exp(cos / temperature), mean over items and views. Of two items that not all views have, the sum is
    V times the mean over those that both have. A view that fewer than three have is left out, and where few have it k
    is less there.
    """
    V, cost = len(views), []
    similarity = unit(views) @ unit(views).transpose(1, 2)
    there = has.to(views.dtype)
    with torch.no_grad():
        masked = similarity.masked_fill(~has[:, None], float("-inf"))
        chance = torch.softmax(masked.masked_fill_(~has.any(dim=1)[:, None, None], 0.0), dim=-1) * there[..., None]
        agreed = V * chance.sum(dim=0) / (there.T @ there).clamp(min=1)
    for v, some in enumerate(has):
        rows = some.nonzero()[:, 0]
        near = min(k, (len(rows) - 1) // 2)
        if near < 1:
            continue
        # what a view lacks is masked as a column: cutting it out of (C, C) takes twice the time of all the rest
        own = chance[v].index_select(0, rows)
        first = (agreed.index_select(0, rows) + own).masked_fill_(~some, float("-inf")).topk(near, dim=-1).indices
        second = own.scatter_(-1, first, 0.0).topk(near, dim=-1).indices
        each = torch.exp(similarity[v].index_select(0, rows) / temperature) * there[v]
        total, best = each.sum(-1), each.gather(-1, first).sum(-1)
        rest = (total - best).clamp(min=1e-9)
        cost.append(-(torch.log(best / total) + torch.log(each.gather(-1, second).sum(-1) / rest)))
    return torch.cat(cost).mean() if cost else views.sum() * 0.0


def agreeing(tables: list[np.ndarray], presence: np.ndarray, *, k: int, block: int = 512) -> list[sp.csr_matrix]:
    """A graph a modality, (I, I) of ones: an item's k nearest among those that are alike in every modality both
    have."""
    rows = [torch.nn.functional.normalize(torch.from_numpy(np.array(t)), dim=-1) for t in tables]
    here = [torch.from_numpy(np.array(presence[:, c])) for c in range(len(tables))]
    means = [(x[p].sum(0) @ x[p].sum(0)) / max(int(p.sum()), 1) ** 2 for x, p in zip(rows, here, strict=True)]
    size = len(presence)
    cells: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in tables]
    for start in range(0, size, block):
        part = slice(start, start + block)
        similar = [x[part] @ x.T for x in rows]
        both = [p[part, None] & p[None] for p in here]
        agreed = torch.stack([(s >= m) | ~b for s, m, b in zip(similar, means, both, strict=True)]).all(dim=0)
        for column, (s, b) in enumerate(zip(similar, both, strict=True)):
            value, index = s.masked_fill(~(agreed & b), -torch.inf).topk(min(k, size), dim=1)
            row, place = torch.isfinite(value).nonzero(as_tuple=True)
            cells[column].append(((row + start).numpy(), index[row, place].numpy()))
    found = []
    for parts in cells:
        ends = tuple(np.concatenate([p[side] for p in parts]) for side in (0, 1))
        found.append(sp.csr_matrix((np.ones(len(ends[0]), np.float32), ends), shape=(size, size)))
    return found


def co_consumed(train: Interactions, *, k: int, least: int = 2) -> sp.csr_matrix:
    """Items that ``least`` users or more took both of, at most k an item, and each item itself: (I, I) of ones."""
    back = train.csr.T.tocsr().astype(np.float32)
    kept = top_of_rows(back, k=k, least=least)
    kept.data[:] = 1.0
    return (kept + sp.identity(train.n_items, dtype=np.float32, format="csr")).tocsr()
