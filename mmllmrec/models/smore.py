"""SMORE: modalities filtered and fused in the frequency domain before they meet the graphs.

Legend: U users, I items, N = U + I nodes, M modalities, D width, F_m width of a modality's features.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.encoders.graph import Propagation, normalised_events
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.multimodal import SideModel


class SpectralFilter(nn.Module):
    """A learned complex filter along the embedding axis: (I, D) spectra -> (I, D).

    irfft(S * K), K (D // 2 + 1,) complex with standard normal parts: a circular convolution with a learned kernel.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.kernel = dim, nn.Parameter(torch.randn(dim // 2 + 1, 2))

    def forward(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfft(spectrum * torch.view_as_complex(self.kernel), n=self.dim, norm="ortho")


class SMORE(SideModel):
    """Denoised by a filter a modality, fused by the product of spectra, and weighed by what behaviour prefers.

    Ong and Khong 2025 (arXiv 2412.14978). y_m = rfft(W_m x_m + b_m); B_m = irfft(y_m * K_m), B_f = irfft(product of all
    y_m * K_f). IDs gated by each, Q * sigmoid(G_c B_c + g_c), run over the modality's graph of alike items, the fused
    ones over the elementwise maximum of those graphs, and reach users by the normalised events. Each modality's view is
    weighed by softmax over the coordinates of a query of the fused view; C = LightGCN's encoder; side Y = mean over
    views of sigmoid(P_c C + p_c) * view, with ``dropout`` of the gates; vectors C + Y. BPR, ``reg`` times ``losses.l2``
    of the batch's final vectors, ``contrast_weight`` times the InfoNCE of Y against C. A modality an item lacks has no
    view there (a zero in the mean), and a product of spectra is of those it has. Departures: features are frozen
    (``trained_features=True`` trains the tables, as published); nodes are de-duplicated before the contrast.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 3,
        neighbours: int = 10,
        dropout: float = 0.0,
        contrast_weight: float = 0.01,
        temperature: float = 0.2,
        reg: float = 1e-4,
        feature_dim: int = 64,
        trained_features: bool = False,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.dropout = dropout
        views = len(self.modalities) + 1  # the fused one last
        self.maps = self.linear_each(dim)
        self.filters = nn.ModuleList(SpectralFilter(dim) for _ in range(views))
        self.gates = nn.ModuleList(nn.Linear(dim, dim) for _ in range(views))
        self.preferences = nn.ModuleList(nn.Linear(dim, dim) for _ in range(views))
        self.queries = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim, bias=False)) for _ in self.modalities
        )
        self.events = Propagation(normalised_events(train))

    def _use(self, features: FeatureTable) -> None:
        super()._use(features)
        first, *rest = (graph.sparse() for graph in self.modal_graphs)  # type: ignore[operator]
        self.fused_graph = Propagation(reduce(lambda a, b: a.maximum(b), rest, first))

    def spread(self) -> tuple[Tensor, Tensor]:
        ids = self.ids()
        behaviour = torch.cat(self.graph(*ids))
        present = self.all_present()
        spectra = [torch.fft.rfft(told.float(), norm="ortho") for told in self.through(self.maps)]
        product = torch.ones_like(spectra[0])
        for column, spectrum in enumerate(spectra):
            product = product * torch.where(present[:, column, None], spectrum, torch.ones_like(spectrum))
        some = [*present.T, present.any(dim=1)]
        views = []
        for spectrum, shape, gate, graph, here in zip(
            [*spectra, product], self.filters, self.gates, [*self.modal_graphs, self.fused_graph], some, strict=True
        ):
            items = graph(ids[1] * torch.sigmoid(gate(shape(spectrum))) * here[:, None])
            views.append(torch.cat([self.events(items), items]))
        return behaviour, torch.stack(views, dim=1)

    def fused(self, behaviour: Tensor, views: Tensor, present: Tensor) -> Tensor:
        *each, whole = views.unbind(dim=1)
        each = [torch.softmax(query(whole), dim=-1) * view for query, view in zip(self.queries, each, strict=True)]
        heeded = [
            F.dropout(torch.sigmoid(preference(behaviour)), self.dropout, self.training) * view
            for preference, view in zip(self.preferences, [*each, whole], strict=True)
        ]
        return torch.stack(heeded).mean(dim=0)
