"""DRAGON: a graph encoder a modality side by side, then one hop over alike users and one over alike items.

Legend: U users, I items, M modalities, D width a modality, K companions, F_m width of a modality's features.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.graph import Propagation
from mmllmrec.encoders.item_graph import companions as companions_of
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import ModalModel


class DRAGON(ModalModel):
    """Dyadic relations: modalities concatenated, users by personal weights, and both over homogeneous graphs.

    Zhou et al. 2023 (arXiv 2301.12097). (U_m, V_m) = the graph encoder of modality m (``ModalEncoder``). Items V =
    [V_1; ...; V_M] plus V over the frozen graph of alike items; users H = [w_u1 U_1; ...; w_uM U_M], w free and
    personal, plus H over their ``companions`` (``encoders.item_graph.companions``). BPR, and ``reg`` times the mean
    squares of the batch's preferences and of w. ``shares`` (M,): how much each modality counts in the item graph, alike
    by default (published: 0.1 image, 0.9 text). An absent modality's part of an item is what the graph makes of it.
    Departure: natural logarithm, where the published code has base 2.
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
        reg: float = 1e-3,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.companions = Propagation(companions_of(train, k=companions))

    def encode(self) -> Encoded:
        users, items = self.each(self.encoders)
        users, items = (self.personal[..., None] * users).flatten(1), items.flatten(1)
        return Encoded(users + self.companions(users), items + self.smoothed(items))
