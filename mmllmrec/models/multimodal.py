"""What the multimodal systems of the literature have in common: IDs, frozen features, and graphs of both.

Legend: B batch, U users, I items, N = U + I nodes, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import LightGraph, Propagation, normalised_adjacency
from mmllmrec.encoders.item_graph import cosines, item_graph, mixed, nearest, weighted_sum
from mmllmrec.encoders.views import keep_edges, noised
from mmllmrec.features.table import FeatureTable
from mmllmrec.fusion import masked_softmax
from mmllmrec.losses import l2, mean_squares
from mmllmrec.models.content import ContentModel
from mmllmrec.models.graphs import Encoded, EncodedModel
from mmllmrec.models.vectors import rows_of


class MultimodalModel(EncodedModel, ContentModel):
    """An ``EncodedModel`` that reads frozen features, with the parts that its subclasses share.

    ``users``, ``items``: embeddings of IDs, Xavier-uniform, where a system has them (``ids``); those that no training
    event moved are absent, zero. ``graph``: LightGCN's encoder on the training events, ``layers`` deep. ``item_graph``:
    a frozen graph of items alike in features, all modalities mixed, and ``modal_graphs`` one a modality, where a
    subclass asks for them (``graphs``), with its option ``neighbours``; they are made of the features at hand, also in
    ``with_catalog``.
    """

    with_item_ids: bool = True
    graphs: str = ""  # "mixed", "modal" or "": which item graphs a system has
    weighted: bool = False  # whether an item graph's edges are cosines, or all alike

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None,
        features: FeatureTable | None,
        dim: int,
        layers: int,
        **config: Any,
    ):
        plain: dict[str, Any] = {
            k: list(v) if isinstance(v, tuple) else v for k, v in config.items()
        }  # as JSON gives it back
        super().__init__(train, catalog=catalog, features=features, dim=dim, layers=layers, **plain)
        self.dim = dim
        if self.with_item_ids:
            self.users, self.items = nn.Embedding(self.n_users, dim), nn.Embedding(self.n_items, dim)
            for table in (self.users, self.items):
                nn.init.xavier_uniform_(table.weight)
        self.graph = LightGraph(train, layers=layers)

    @property
    def item_neighbours(self) -> int:
        """Of an item in the item graphs."""
        return int(self.config["neighbours"])

    def _use(self, features: FeatureTable) -> None:
        super()._use(features)
        if not self.graphs:
            return
        k = self.item_neighbours
        each = [
            item_graph(features.tables[m], features.presence[:, column], k=k, weighted=self.weighted)
            for column, m in enumerate(features.modalities)
        ]
        if self.graphs == "modal":
            self.modal_graphs = nn.ModuleList(Propagation(matrix) for matrix in each)
        else:
            shares = _shares(self.config.get("shares"), len(each))
            self.item_graph = Propagation(mixed(each, features.presence, shares))

    def smoothed(self, items: Tensor) -> Tensor:
        """S ... S x, ``item_layers`` times over the frozen item graph: (I, D) -> (I, D); no term at all of no
        layers."""
        if not self.config["item_layers"]:
            return torch.zeros_like(items)
        for _ in range(int(self.config["item_layers"])):
            items = self.item_graph(items)
        return items

    def ids(self) -> tuple[Tensor, Tensor]:
        """Embeddings of users (U, D) and items (I, D), zero where no training event moved them."""
        return self.trained(self.users.weight, self.items.weight)

    def all_present(self) -> Tensor:
        """Who has what: (I, M) bool."""
        return torch.stack([self.present(m) for m in self.modalities], dim=1)

    def linear_each(self, dim: int, *, bias: bool = True) -> nn.ModuleList:
        """A linear map a modality, F_m -> dim."""
        return nn.ModuleList(nn.Linear(self.features.widths[m], dim, bias=bias) for m in self.modalities)

    def through(self, maps: nn.ModuleList) -> list[Tensor]:
        """Each modality's features through its map, (I, dim) a modality; an absent one is exactly zero."""
        return [layer(self.rows(m)) * self.present(m)[:, None] for m, layer in zip(self.modalities, maps, strict=True)]


class ModalEncoder(nn.Module):
    """A user table and a two-layer map of one modality's features, on the user-item graph: -> (U, D), (I, D).

    X = rows of [P; W_2 act(W_1 x)] at unit length; X + A X + A^2 X + ... for ``layers`` products, a sum. The encoder of
    DualGNN (Wang et al. 2021), DRAGON (Zhou et al. 2023), MENTOR (Xu et al. 2025). An item without the modality is
    zero at the start, and what its users make of it afterwards.
    """

    def __init__(self, users: int, width: int, *, dim: int, hidden: int, layers: int):
        super().__init__()
        self.preference = nn.Parameter(torch.empty(users, dim))
        nn.init.xavier_normal_(self.preference)
        self.map = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, dim))
        self.layers = layers

    def forward(
        self, rows: Tensor, present: Tensor, known: Tensor, propagation: Propagation, *, noise: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``noise``: the length of a random vector in each node's orthant, added after every product (``SimGCL``)."""
        users = F.normalize(self.preference, dim=-1) * known[:, None]
        layer = torch.cat([users, F.normalize(self.map(rows), dim=-1) * present[:, None]])
        total = layer
        for _ in range(self.layers):
            layer = propagation(layer)
            if noise:
                layer = noised(layer, noise)
            total = total + layer
        first, second = total.split([len(users), len(rows)])
        return first, second


class ModalModel(MultimodalModel):
    """A ``MultimodalModel`` without item IDs: a ``ModalEncoder`` a modality, and users with weights of their own.

    ``personal`` (U, M), free, about 1 / M at the start: how much each user heeds each modality. Under BPR ``reg``
    weighs the mean squares of the batch's preferences and of ``personal``.
    """

    with_item_ids = False

    def __init__(self, train: Interactions, *, dim: int, hidden: int, layers: int, **config: Any):
        super().__init__(train, dim=dim, hidden=hidden, layers=layers, **config)
        self.encoders = self.modal_encoders()
        self.personal = nn.Parameter(nn.init.xavier_normal_(torch.empty(self.n_users, len(self.modalities))))
        self.personal.data = torch.softmax(self.personal.data, dim=1)

    def modal_encoders(self) -> nn.ModuleList:
        """A new ``ModalEncoder`` a modality."""
        size = {"dim": self.dim, "hidden": int(self.config["hidden"]), "layers": int(self.config["layers"])}
        widths = self.features.widths
        return nn.ModuleList(ModalEncoder(self.n_users, widths[m], **size) for m in self.modalities)

    def each(self, encoders: nn.ModuleList, *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Every modality's users and items: (U, M, D), (I, M, D)."""
        found = [
            encoder(self.rows(m), self.present(m), self.known, self.graph.propagation, noise=noise)
            for m, encoder in zip(self.modalities, encoders, strict=True)
        ]
        return torch.stack([u for u, _ in found], dim=1), torch.stack([i for _, i in found], dim=1)

    def ranking(self, batch: Batch, vectors: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
        terms = {self.loss_name: self.ranked(batch, vectors)}
        if self.reg and self.loss_name == "bpr":
            preferences = (e.preference[batch.users] for e in self.encoders)  # type: ignore[union-attr, index]
            terms["reg"] = self.reg * mean_squares(*preferences, self.personal)
        return terms


class LearnedGraph(nn.Module):
    """Item graphs that are learned: a modality's frozen one, and one of what a linear map makes of its features.

    A_m = keep S_m + (1 - keep) L(cosines of W_m x to the ``neighbours`` nearest), S_m the same graph of x itself and L
    the normalisation by row sums (``encoders.item_graph``): Zhang et al. 2021 (LATTICE, arXiv 2104.09036), negative
    cosines cut at 0 as in the paper. Who is near is chosen once an epoch (``choose``), how near is computed, with a
    gradient, in every step; the published code computes both in an epoch's first step alone, and mixes the learned
    graphs before it normalises them, where here, as in the paper, each is normalised.
    """

    def __init__(self, model: MultimodalModel, *, dim: int, neighbours: int, keep: float):
        super().__init__()
        self.keep, self.k = keep, neighbours
        self.maps = model.linear_each(dim)
        for column in range(len(model.modalities)):
            size = min(neighbours, max(int(model.all_present()[:, column].sum()), 1))
            self.register_buffer(f"near{column}", torch.zeros(model.n_items, size, dtype=torch.long))
        self.choose(model)

    @torch.no_grad()
    def choose(self, model: MultimodalModel) -> None:
        """Choose each item's neighbours by the maps as they are."""
        for column, near in enumerate(self._nearest(model)):
            self.get_buffer(f"near{column}").copy_(near)

    def _nearest(self, model: MultimodalModel) -> list[Tensor]:
        told = model.through(self.maps)
        return [nearest(x, self.k, present=model.present(m))[0] for m, x in zip(model.modalities, told, strict=True)]

    def forward(self, model: MultimodalModel, each: Sequence[Tensor]) -> list[Tensor]:
        """A modality's x (I, D) over its graph: M of them -> as many. Neighbours are chosen anew outside training."""
        told = model.through(self.maps)
        chosen = [self.get_buffer(f"near{c}") for c in range(len(told))] if self.training else self._nearest(model)
        found = []
        for m, x, rows, near, frozen in zip(model.modalities, each, told, chosen, model.modal_graphs, strict=True):
            present = model.present(m)
            values = cosines(rows, near).clamp(min=0.0) * (present[:, None] & present[near])
            half = values.sum(dim=1).clamp(min=1e-12).rsqrt() * present
            learned = weighted_sum(near, values * half[:, None] * half[near], x)
            found.append(self.keep * frozen(x) + (1 - self.keep) * learned)
        return found

    def mixed(self, model: MultimodalModel, x: Tensor, mixture: Tensor) -> Tensor:
        """x (I, D) over every modality's graph, mixed by the softmax of ``mixture`` (M,) over what each item has."""
        weights = masked_softmax(mixture.expand(len(x), -1), model.all_present())
        return (weights[..., None] * torch.stack(self(model, [x] * mixture.numel()), dim=1)).sum(dim=1)


class ChoosingModel(MultimodalModel):
    """A ``MultimodalModel`` that can have a ``LearnedGraph``, ``learned``, whose neighbours are chosen once an
    epoch."""

    learned: LearnedGraph | None

    def begin_epoch(self, rng: np.random.Generator, *, resumed: bool = False) -> None:
        if self.learned is not None and not resumed:
            self.learned.choose(self)

    def weights(self) -> dict[str, Tensor]:
        """What is saved: not the neighbours of a training epoch, which no score reads, and of which another catalogue
        may have fewer."""
        return {k: v for k, v in super().weights().items() if not k.startswith("learned.near")}


class LearnedModel(ChoosingModel):
    """LATTICE and MICRO: a ``LearnedGraph`` beside the frozen ones; BPR's penalty is ``losses.l2`` of the batch's final
    vectors."""

    learned: LearnedGraph
    penalty: ClassVar[Callable[..., Tensor]] = staticmethod(l2)
    graphs = "modal"
    weighted = True

    def __init__(self, train: Interactions, *, dim: int, neighbours: int, keep: float, item_layers: int, **config: Any):
        shape = {"dim": dim, "neighbours": neighbours, "keep": keep, "item_layers": item_layers}
        super().__init__(train, **shape, **config)  # type: ignore[arg-type]
        self.item_layers = item_layers
        self.learned = LearnedGraph(self, dim=dim, neighbours=neighbours, keep=keep)


class PrunedGraph(EncodedModel):
    """A model that trains on a sample of the training events, drawn anew every epoch, and is used on all of them.

    ``prune`` is the share of events left out, those between popular nodes first (``encoders.views.keep_edges``). Raises
    ``DataError`` where that is no share, or all.
    """

    def __init__(self, train: Interactions, *, prune: float, **config: Any):
        super().__init__(train, prune=prune, **config)
        if not 0 <= prune < 1:
            raise DataError(f"prune={prune}: the share of events to leave out, 0 or more and below 1")
        self.prune = prune

    def begin_epoch(self, rng: np.random.Generator, *, resumed: bool = False) -> None:
        if self.prune > 0:
            kept = keep_edges(self.train_data, 1 - self.prune, rng=rng, by_degree=True)
            adjacency = normalised_adjacency(self.train_data, keep=kept)
            self.sampled = Propagation(adjacency, symmetric=True).to(self.device)

    @property
    def through_graph(self) -> Propagation | None:
        """The epoch's sample in training; None, all events, elsewhere."""
        sampled: Any = self._modules.get("sampled") if self.training else None
        return sampled  # type: ignore[no-any-return]


class WrittenGraphs(MultimodalModel):
    """A model with a user-item graph a modality of its own making: MMSSL, DiffMM.

    ``written{m}`` (U, top): items of each user, chosen once an epoch, saved with the weights; -1 where none. ``links``
    are what ``linked`` makes of them. A subclass defines ``write`` and ``linked``, and calls ``_start`` when it is
    made.
    """

    top: int  # items of a user

    def _start(self, top: int) -> None:
        self.top = min(top, self.n_items)
        for column in range(len(self.modalities)):
            self.register_buffer(f"written{column}", torch.full((self.n_users, self.top), -1))
        self._link()

    @abstractmethod
    def write(self) -> list[Tensor]:
        """Items of each user, (U, top) a modality, by the weights as they are."""

    @abstractmethod
    def linked(self, chosen: sp.csr_matrix) -> list[Propagation]:
        """What to multiply by, of one modality's chosen items, (U, I) of ones."""

    def begin_epoch(self, rng: np.random.Generator, *, resumed: bool = False) -> None:
        if not resumed:
            with torch.no_grad():
                for column, items in enumerate(self.write()):
                    self.get_buffer(f"written{column}").copy_(items)
        self._link()

    def with_catalog(self, catalog: Catalog) -> Self:
        other = super().with_catalog(catalog)
        for column in range(len(self.modalities)):  # its own to write
            other.register_buffer(f"written{column}", self.get_buffer(f"written{column}").clone())
        return other

    def _link(self) -> None:
        self.links = self.graphs_of([self.get_buffer(f"written{c}") for c in range(len(self.modalities))])

    def graphs_of(self, written: Sequence[Tensor]) -> nn.ModuleList:
        """What to multiply by, of items of each user, (U, top) a modality."""
        graphs = []
        for items in (chosen.cpu().numpy() for chosen in written):
            users = np.repeat(np.arange(self.n_users), items.shape[1])
            some = self.known.cpu().numpy()[users] & (items.ravel() >= 0)
            cells = np.ones(int(some.sum()), dtype=np.float32), (users[some], items.ravel()[some])
            graphs += self.linked(sp.csr_matrix(cells, shape=(self.n_users, self.n_items)))
        return nn.ModuleList(graphs).to(self.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._link()  # the graphs are those of the items that were loaded


class SideModel(MultimodalModel):
    """Vectors are ``behaviour`` plus ``side``, which ``fused`` makes of each node's own rows: MGCN, SMORE.

    What no graph follows is computed for the nodes of a batch alone: (behaviour + side) of a step's users, positives
    and negatives is the same as that of all nodes, cut to them. A subclass defines ``spread`` and ``fused``.
    """

    penalty: ClassVar[Callable[..., Tensor]] = staticmethod(l2)
    graphs = "modal"
    weighted = True

    @abstractmethod
    def spread(self) -> tuple[Tensor, Tensor]:
        """What graphs make of IDs and content, for all nodes: behaviour (N, D), views (N, V, D)."""

    @abstractmethod
    def fused(self, behaviour: Tensor, views: Tensor, present: Tensor) -> Tensor:
        """Side vectors of some nodes: (n, D), (n, V, D), (n, M) bool -> (n, D)."""

    def encode(self) -> Encoded:
        everyone = torch.arange(self.n_users + self.n_items, device=self.known.device)
        return self._encoded(everyone[: self.n_users], everyone[: self.n_items])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        some = self.ends(batch)
        encoded = self._encoded(*some).held(*some, (self.n_users, self.n_items))
        return self.ranking(batch, encoded.pick) | self.auxiliary(batch, encoded)

    def _encoded(self, users: Tensor, items: Tensor) -> Encoded:
        behaviour, views = self.spread()
        whole = len(users) == self.n_users and len(items) == self.n_items
        if not whole:
            nodes = torch.cat([users, items + self.n_users])
            behaviour, views = rows_of(behaviour, nodes), rows_of(views, nodes)
        everything = torch.ones(len(users), len(self.modalities), dtype=torch.bool, device=users.device)
        side = self.fused(behaviour, views, torch.cat([everything, self.all_present()[items]]))
        first, second = (behaviour + side).split([len(users), len(items)])
        return Encoded(first, second, {"behaviour": behaviour, "side": side})

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``contrast``: what content says of a node, and what behaviour says."""
        return side_contrast(self, batch, encoded)


def side_contrast(model: MultimodalModel, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
    """InfoNCE of the batch's distinct nodes, ``side`` against ``behaviour``, one way, users and items apart."""
    weight = float(model.config["contrast_weight"])
    if not weight:
        return {}
    side, behaviour = encoded.parts["side"], encoded.parts["behaviour"]
    temperature = float(model.config["temperature"])
    value = model.two_views(side, behaviour, encoded.distinct(batch), temperature=temperature)
    return {"contrast": weight * value}


def _shares(given: Sequence[float] | None, modalities: int) -> np.ndarray:
    if given is None:
        return np.full(modalities, 1 / modalities)
    if len(given) != modalities or min(given) < 0 or sum(given) <= 0:
        raise DataError(f"shares={list(given)}: give one a modality, {modalities} here, none below 0 and one above")
    return np.asarray(given, dtype=np.float64) / sum(given)
