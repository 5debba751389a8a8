"""DualGNN: a user-item graph a modality, and users who take after one another.

Legend: U users, I items, M modalities, D width, K companions, F_m width of a modality's features.
"""

from __future__ import annotations

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.graph import Propagation
from mmllmrec.encoders.item_graph import companions as companions_of
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import ModalModel


class DualGNN(ModalModel):
    """Personal weights of the modalities, smoothed over each user's companions.

    Wang et al. 2021 (IEEE TMM 25, 1074-1084, in print 2023). (U_m, V_m) = the graph encoder of modality m
    (``ModalEncoder``); items are the sum of V_m; users r_u = sum over m of b_um U_m with b free and personal, and r_u +
    sum over companions of a_uv r_v, a the softmax of the numbers of training items in common
    (``encoders.item_graph.companions``). BPR, and ``reg`` times the mean squares of the batch's preferences and of b.
    An item's absent modality adds nothing. Departures: no weights of items, which only the penalty of the published
    code sees; natural logarithm, where that has base 2; its user vector of the first modality holds the others too.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 2,
        hidden: int = 256,
        companions: int = 40,
        reg: float = 1e-3,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.companions = Propagation(companions_of(train, k=companions))

    def encode(self) -> Encoded:
        users, items = self.each(self.encoders)
        own = (self.personal[..., None] * users).sum(dim=1)
        return Encoded(own + self.companions(own), items.sum(dim=1))
