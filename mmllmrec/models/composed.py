"""Any encoder x fusion x loss: the survey's table of parts, put together in one call.

Legend: B batch, K negatives, U users, I items, N = U + I nodes, M modalities, C channels (the ID and M), D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec import losses as loss_functions
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Edges, LightGraph, Propagation, mean_adjacency, normalised_adjacency
from mmllmrec.encoders.heads import unit
from mmllmrec.encoders.item_graph import companions
from mmllmrec.encoders.views import keep_edges, keep_nodes, noised
from mmllmrec.features.table import FeatureTable
from mmllmrec.fusion import FUSIONS
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import ChoosingModel, LearnedGraph

# -- encoders: what a dataclass says, and the module it makes ----------------------------------------------------------


class Plain(nn.Module):
    """Users and items as they come: matrix factorisation."""

    def forward(self, users: Tensor, items: Tensor, *, through: Propagation | None = None) -> tuple[Tensor, Tensor]:
        return users, items


class Residual(nn.Module):
    """Layers of act(W mean of neighbours) + act(V x) + start: MMGCN's convolution with the input added to every layer.
    A node that is zero and has no neighbours stays zero."""

    def __init__(self, train: Interactions, dim: int, layers: int):
        super().__init__()
        self.means = Propagation(mean_adjacency(train))
        self.neighbour = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
        self.own = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        some = np.concatenate([train.user_counts, train.item_counts]) > 0
        self.register_buffer("linked", torch.from_numpy(some)[:, None], persistent=False)

    linked: Tensor  # (N, 1) which nodes have neighbours

    def forward(self, users: Tensor, items: Tensor, *, through: Propagation | None = None) -> tuple[Tensor, Tensor]:
        start = x = torch.cat([users, items])
        for neighbour, own in zip(self.neighbour, self.own, strict=True):
            x = F.leaky_relu((through or self.means)(neighbour(x))) + F.leaky_relu(own(x)) + start
        here = self.linked | (start != 0).any(dim=-1, keepdim=True)
        first, second = (x * here).split([len(users), len(items)])
        return first, second


class Beside(nn.Module):
    """An encoder, and beside its output users' smoothed over a graph of companions."""

    def __init__(self, inner: nn.Module, graph: Propagation):
        super().__init__()
        self.inner, self.graph = inner, graph

    def forward(self, users: Tensor, items: Tensor, *, through: Propagation | None = None) -> tuple[Tensor, Tensor]:
        out_users, out_items = self.inner(users, items, through=through)
        return out_users + self.graph(out_users), out_items


class Hypergraph(nn.Module):
    """A few learned hyperedges: users and items belong to them softly, and meet there. LightGCN's output beside it.
    What is zero belongs to none."""

    def __init__(self, train: Interactions, dim: int, edges: int, layers: int):
        super().__init__()
        self.light = LightGraph(train, layers=layers)
        self.member = nn.Linear(dim, edges, bias=False)

    def forward(self, users: Tensor, items: Tensor, *, through: Propagation | None = None) -> tuple[Tensor, Tensor]:
        out_users, out_items = self.light(users, items, through=through)
        of_users, of_items = (
            torch.softmax(self.member(x), dim=-1) * (x != 0).any(dim=-1, keepdim=True) for x in (users, items)
        )
        edges = of_items.T @ out_items / max(len(items), 1)
        return out_users + unit(of_users @ edges), out_items + unit(of_items @ edges)


class Filtered(nn.Module):
    """Items through a learned complex filter along their width (``models.smore``), then LightGCN."""

    def __init__(self, train: Interactions, dim: int, layers: int):
        super().__init__()
        from mmllmrec.models.smore import SpectralFilter

        self.light, self.filter = LightGraph(train, layers=layers), SpectralFilter(dim)

    def forward(self, users: Tensor, items: Tensor, *, through: Propagation | None = None) -> tuple[Tensor, Tensor]:
        return self.light(users, self.filter(torch.fft.rfft(items.float(), norm="ortho")), through=through)  # type: ignore[no-any-return]


class Routed(nn.Module):
    """GRCN's refined graph (``Edges.routed``): users and items over events that weigh what content makes of them, the
    layers added up. GRCN's confidences, which choose among modalities, are not here."""

    def __init__(self, train: Interactions, layers: int):
        super().__init__()
        self.edges, self.layers = Edges(train), layers

    def forward(self, users: Tensor, items: Tensor, *, through: Propagation | None = None) -> tuple[Tensor, Tensor]:
        _, of_users, of_items = self.edges.routed(unit(users), unit(items), ROUNDS)
        return self.edges.layers_sum(of_users, of_items, users, items, self.layers)


ROUNDS = 3  # of routing, as GRCN has
KEEP = 0.9  # the frozen graph's share beside the learned one, as LATTICE has
ALIKE = ("item graph", "learned item graph")  # LightGCN, and items as they came smoothed over a graph of alike ones


@dataclass(frozen=True)
class Encoder:
    """``kind`` is one of ``ENCODERS``; ``layers`` of propagation, which all but "mf" have; ``neighbours`` of an item or
    a user in its graph, or the number of hyperedges, for the two item graphs, "user graph" and "hypergraph" alone. The
    item graphs are LightGCN, and beside its output items as they came, smoothed over the model's frozen ``item_graph``
    (FREEDOM's), or over ``learned`` ones, mixed by learned weights (LATTICE's)."""

    kind: str = "lightgcn"
    layers: int = 2
    neighbours: int = 10

    @property
    def graph(self) -> bool:
        """Whether events are edges that a view can drop."""
        return self.kind not in ("mf", "residual", "routed")

    @property
    def options(self) -> tuple[str, ...]:
        """What does something, of ``layers`` and ``neighbours``."""
        near = ("neighbours",) if self.kind in (*ALIKE, "user graph", "hypergraph") else ()
        return near if self.kind == "mf" else ("layers", *near)

    def build(self, model: Composed) -> nn.Module:
        """The module of a model."""
        train, dim = model.train_data, model.dim
        if self.kind == "mf":
            return Plain()
        if self.kind == "residual":
            return Residual(train, dim, self.layers)
        if self.kind == "routed":
            return Routed(train, self.layers)
        if self.kind == "hypergraph":
            return Hypergraph(train, dim, self.neighbours, self.layers)
        if self.kind == "spectral":
            return Filtered(train, dim, self.layers)
        light = LightGraph(train, layers=self.layers)
        if self.kind == "user graph":
            return Beside(light, Propagation(companions(train, k=self.neighbours)))
        return light


ENCODERS = ("mf", "lightgcn", "residual", "routed", *ALIKE, "user graph", "hypergraph", "spectral")


@dataclass(frozen=True)
class Fusion:
    """``timing`` "early": ID and modalities become one vector before the encoder; "late": each runs through the encoder
    with users of its own, and their outputs become one. ``method`` is one of ``fusion.FUSIONS``."""

    timing: str = "early"
    method: str = "sum"


TIMINGS = ("early", "late")
LOSSES = ("bpr", "softmax", "full softmax", "bce", "mse", "hinge", "adaptive hinge", "alignment")
# terms beside the ranking loss, what they need, and the survey's name for their kind
EXTRAS = {
    "modalities": "feature-based: InfoNCE of an item's modalities",
    "masking": "feature-based: what dropout hid of a vector, decoded",
    "bootstrap": "feature-based: a predictor meets the other side under dropout, no negatives",
    "edges": "structure-based: InfoNCE of two graphs with edges dropped",
    "nodes": "structure-based: InfoNCE of two graphs with nodes dropped",
    "noise": "structure-based: InfoNCE of two outputs with a little noise",
    "neighbours": "structure-based: InfoNCE of a node and its neighbourhood",
}
EXTRA = 0.2  # their temperature, and their dropout
USED_BY = {
    "temperature": ("modalities", "edges", "nodes", "noise", "neighbours"),
    "dropout": ("edges", "nodes", "masking", "bootstrap"),
}


class Composed(ChoosingModel):
    """Encoder x fusion (timing x method) x loss, with any of the self-supervised ``extras``.

    ``Composed(train, catalog=catalog, encoder=Encoder("item graph"), fusion=Fusion("late", "attentive"), loss="bpr",
    extras={"modalities": 0.1})``. A channel is the ID (``ids=True``) or a modality, through a linear map without bias;
    ``ENCODERS``, ``fusion.FUSIONS``, ``LOSSES`` and ``EXTRAS`` name the parts, which other models use as well. Under
    late fusion a user has a vector a channel, and their mean meets the fused item; with "mf", which changes nothing
    before the fusion, that is the same function as early. An absent channel has no part in a fusion, but where its
    encoder makes one of neighbours. ``item_graph``: of the items alike in the features at hand, all modalities
    counting alike, also in ``with_catalog``, as the learned ones are. ``reg`` is of the pairwise and pointwise losses;
    alignment comes with half of the uniformity of users and of items. ``negatives`` are drawn for these losses alone;
    ``temperature`` and ``dropout`` are of the ``extras`` (the InfoNCE of views; what views, masking and bootstrap leave
    out). Raises ``DataError`` where parts have no meaning together: one channel and nothing to fuse with late timing,
    an option that the encoder, or every extra, has no use for, the heuristic without IDs, views of a graph that the
    encoder does not have, ``extras`` of modalities with fewer than two, and two extras that would make the same
    views.
    """

    losses: ClassVar[tuple[str, ...]] = LOSSES
    with_item_ids = False

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        encoder: Encoder | Mapping[str, Any] = Encoder(),
        fusion: Fusion | Mapping[str, Any] = Fusion(),
        loss: str = "bpr",
        extras: Mapping[str, float] | None = None,
        ids: bool = True,
        dim: int = 64,
        negatives: int = 1,
        temperature: float = EXTRA,
        dropout: float = EXTRA,
        reg: float = 1e-4,
        feature_dim: int = 64,
    ):
        encoder = encoder if isinstance(encoder, Encoder) else Encoder(**encoder)
        fusion = fusion if isinstance(fusion, Fusion) else Fusion(**fusion)
        self.graphs = {"item graph": "mixed", "learned item graph": "modal"}.get(encoder.kind, "")
        self.weighted = encoder.kind == "learned item graph"
        super().__init__(
            train,
            catalog=catalog,
            features=features,
            layers=encoder.layers,
            encoder=asdict(encoder),
            fusion=asdict(fusion),
            loss=loss,
            extras=dict(extras or {}),
            ids=ids,
            dim=dim,
            negatives=negatives,
            temperature=temperature,
            dropout=dropout,
            reg=reg,
            feature_dim=feature_dim,
        )
        self.parts = encoder, fusion
        self.extras = dict(extras or {})
        channels = (["ID"] if ids else []) + list(self.modalities)
        options = {"temperature": temperature, "dropout": dropout}
        _check(encoder, fusion, loss, self.extras, channels, negatives, options)
        self.config.pop("layers")
        del self.graph
        self.temperature, self.dropout, self.by_id = temperature, dropout, ids
        self.negatives = negatives if loss in ("bpr", "bce", "mse", "hinge", "adaptive hinge") else 0
        tables = len(channels) if fusion.timing == "late" else 1
        self.tables_of_users = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(self.n_users, dim)) for _ in range(tables)
        )
        if ids:
            self.item_ids = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.n_items, dim)))
        self.maps = self.linear_each(dim, bias=False)
        self.fuse = FUSIONS[fusion.method](dim, len(channels))
        self.encoders = nn.ModuleList(encoder.build(self) for _ in range(tables))
        if {"masking", "bootstrap"} & self.extras.keys():
            self.predictor = nn.Linear(dim, dim)
        self.learned = None
        if encoder.kind == "learned item graph":
            self.learned = LearnedGraph(self, dim=dim, neighbours=encoder.neighbours, keep=KEEP)
            self.mixture = nn.Parameter(torch.zeros(len(self.modalities)))
        self.register_buffer("counts", torch.from_numpy(train.item_counts.astype(np.float32)), persistent=False)
        self.views: list[Propagation] = []

    @property
    def name(self) -> str:
        encoder, fusion = self.parts
        return f"{encoder.kind}, {fusion.timing} {fusion.method}, {self.loss_name}"

    @property
    def item_neighbours(self) -> int:
        return Encoder(**self.config["encoder"]).neighbours

    def begin_epoch(self, rng: np.random.Generator, *, resumed: bool = False) -> None:
        super().begin_epoch(rng, resumed=resumed)
        for name, keep in (("edges", keep_edges), ("nodes", keep_nodes)):
            if name in self.extras:
                kept = [keep(self.train_data, 1 - self.dropout, rng=rng) for _ in range(2)]
                graphs = [normalised_adjacency(self.train_data, keep=k) for k in kept]
                self.views = [Propagation(graph, symmetric=True).to(self.device) for graph in graphs]

    # -- encoding -----------------------------------------------------------------------------------------------------

    def channels(self) -> tuple[Tensor, Tensor]:
        """Items before encoder and fusion (I, C, D), and which of them are present (I, C) bool."""
        rows, present = self.through(self.maps), [self.present(m) for m in self.modalities]
        if self.by_id:
            rows, present = [self.item_ids * self.warm[:, None], *rows], [self.warm, *present]
        return torch.stack(rows, dim=1), torch.stack(present, dim=1)

    def encode(self, through: Propagation | None = None) -> Encoded:
        rows, present = self.channels()
        late = self.parts[1].timing == "late"
        users = [table * self.known[:, None] for table in self.tables_of_users]
        starts = rows.unbind(dim=1) if late else [self._fused(rows, present)]
        each = [f(u, i, through=through) for f, u, i in zip(self.encoders, users, starts, strict=True)]
        if self.parts[0].kind in ALIKE:
            alike = self._alike(torch.cat(list(starts), dim=1)).split(self.dim, dim=1)
            each = [(u, i + near) for (u, i), near in zip(each, alike, strict=True)]
        if not late:
            return Encoded(each[0][0], each[0][1], {"channels": rows, "present": present})
        out = torch.stack([i for _, i in each], dim=1)
        # an encoder may give a channel to an item that lacks it, by its neighbours
        here = present | (out.detach() != 0).any(dim=-1)
        mean = torch.stack([u for u, _ in each]).mean(dim=0)
        return Encoded(mean, self._fused(out, here), {"channels": out, "present": here})

    def _alike(self, items: Tensor) -> Tensor:
        if self.learned is not None:
            return self.learned.mixed(self, items, self.mixture)
        smoothed: Tensor = self.item_graph(items)
        return smoothed

    def _fused(self, rows: Tensor, present: Tensor) -> Tensor:
        extra = {"counts": self.counts} if self.parts[1].method == "heuristic" else {}
        fused: Tensor = self.fuse(rows, present, **extra)[0]
        return fused

    # -- losses -------------------------------------------------------------------------------------------------------

    def log_candidates(self, batch: Batch) -> float:
        return math.log(self.n_items) if self.loss_name == "full softmax" else super().log_candidates(batch)

    def ranking(self, batch: Batch, vectors: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
        name = self.loss_name
        if name in ("bpr", "softmax"):
            return super().ranking(batch, vectors)
        if name == "full softmax":
            users, rows = batch.users.unique(return_inverse=True)
            u, q = vectors(users, slice(None))
            known = torch.from_numpy(self.train_data.csr[users.cpu().numpy()].toarray() > 0).to(q.device)
            mask = known | ~self.item_present
            return {name: loss_functions.sampled_softmax(u, q, batch.items, mask=mask, rows=rows)}
        if name == "alignment":
            u, i = vectors(batch.users, batch.items)
            spread = sum(loss_functions.uniformity(x) for x in (u, i) if len(x) > 1)
            return {name: loss_functions.alignment(u, i) + spread / 2}
        u, i, j = vectors(batch.users, batch.items, batch.negatives)
        positive, negative = (u * i).sum(-1), (u[:, None] * j).sum(-1)
        terms = {name: getattr(loss_functions, name.replace(" ", "_"))(positive, negative)}
        if self.reg:
            terms["reg"] = self.reg * self.penalty(u, i, j)
        return terms

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """A term for each of ``extras``, named after it."""
        found = {name: getattr(self, f"_{name}")(batch, encoded) for name in self.extras if name != "nodes"}
        if "nodes" in self.extras:
            found["nodes"] = self._edges(batch, encoded)
        return {name: self.extras[name] * value for name, value in found.items()}

    def _pair(self, one: Encoded, other: Encoded, batch: Batch) -> Tensor:
        users, items = batch.users.unique(), batch.items.unique()
        pairs = (one.users[users], other.users[users]), (one.items[items], other.items[items])
        return torch.stack([loss_functions.info_nce(a, b, temperature=self.temperature) for a, b in pairs]).sum()

    def _modalities(self, batch: Batch, encoded: Encoded) -> Tensor:
        items, first = batch.items.unique(), int(self.by_id)
        rows, present = encoded.parts["channels"][items], encoded.parts["present"][items]
        total = rows.sum() * 0.0
        for a in range(first, rows.shape[1]):
            for b in range(a + 1, rows.shape[1]):
                both = present[:, a] & present[:, b]
                if bool(both.any()):
                    total = total + loss_functions.info_nce(rows[both, a], rows[both, b], temperature=self.temperature)
        return total

    def _masking(self, batch: Batch, encoded: Encoded) -> Tensor:
        rows = encoded.items[batch.items.unique()]
        return loss_functions.reconstruction(self.predictor(F.dropout(rows, self.dropout)), rows)

    def _bootstrap(self, batch: Batch, encoded: Encoded) -> Tensor:
        u, i = encoded.users[batch.users], encoded.items[batch.items]
        to_users, to_items = (F.dropout(x.detach(), self.dropout) for x in (u, i))
        boot = loss_functions.bootstrap
        return (boot(self.predictor(u), to_items) + boot(self.predictor(i), to_users)) / 2

    def _edges(self, batch: Batch, encoded: Encoded) -> Tensor:
        if not self.views:  # outside of ``fit``
            self.begin_epoch(np.random.default_rng(0))
        one, other = (self.encode(view) for view in self.views)
        return self._pair(one, other, batch)

    def _noise(self, batch: Batch, encoded: Encoded) -> Tensor:
        def noisy(x: Tensor) -> Tensor:
            return noised(x, 0.1)

        one, other = (Encoded(noisy(encoded.users), noisy(encoded.items)) for _ in range(2))
        return self._pair(one, other, batch)

    def _neighbours(self, batch: Batch, encoded: Encoded) -> Tensor:
        light = next(module for module in self.encoders.modules() if isinstance(module, LightGraph))
        nodes = light.propagation(torch.cat([encoded.users, encoded.items]))
        around = Encoded(*nodes.split([self.n_users, self.n_items]))
        return self._pair(encoded, around, batch)


def _check(
    encoder: Encoder,
    fusion: Fusion,
    loss: str,
    extras: Mapping[str, float],
    channels: list[str],
    negatives: int,
    options: Mapping[str, float],
) -> None:
    """Raise ``DataError`` for parts that are unknown, or have no meaning together; ``options`` are of the extras."""
    for what, value, known in (
        ("encoder kind", encoder.kind, ENCODERS),
        ("fusion timing", fusion.timing, TIMINGS),
        ("fusion method", fusion.method, tuple(FUSIONS)),
        ("loss", loss, LOSSES),
        *(("extras", name, tuple(EXTRAS)) for name in extras),
    ):
        if value not in known:
            raise DataError(f"{what} {value!r}: one of {list(known)}")
    for option in ("layers", "neighbours"):
        given = getattr(encoder, option)
        if option not in encoder.options and given != getattr(Encoder, option):
            raise DataError(f"{option}={given}: the encoder {encoder.kind!r} has no use for it; leave it out")
    for option, amount in options.items():
        if amount != EXTRA and not extras.keys() & set(USED_BY[option]):
            raise DataError(f"{option}={amount}: it is of the extras {USED_BY[option]}; leave it out")
    if len(channels) < 2 and fusion.timing == "late":
        raise DataError(f"late fusion of {channels} alone: there is nothing to fuse; use timing='early', or ids=True")
    if fusion.method == "heuristic" and "ID" not in channels:
        raise DataError("the heuristic weighs an item's ID by its events: it has no meaning with ids=False")
    if loss == "adaptive hinge" and negatives < 2:
        raise DataError(f"negatives={negatives}: the adaptive hinge takes the hardest of several; give 2 or more")
    views = [name for name in ("edges", "nodes", "neighbours") if name in extras]
    if views and not encoder.graph:
        raise DataError(f"extras {views} are views of a graph, and the encoder {encoder.kind!r} has none to drop from")
    if len(channels) - ("ID" in channels) < 2 and "modalities" in extras:
        raise DataError(f"extras 'modalities' need two modalities or more, not {channels}")
    if {"edges", "nodes"} <= extras.keys():
        raise DataError("extras 'edges' and 'nodes' are two ways to make the same two views: choose one")
