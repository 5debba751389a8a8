"""DiffMM: a diffusion model a modality writes a user-item graph of its own, anew every epoch.

Legend: B batch, U users, I items, N = U + I nodes, M modalities, D width, T diffusion steps, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import ClassVar

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.encoders.graph import Propagation
from mmllmrec.encoders.heads import unit
from mmllmrec.encoders.item_graph import symmetric_degrees
from mmllmrec.features.table import FeatureTable
from mmllmrec.models.base import arguments
from mmllmrec.models.graphs import Encoded
from mmllmrec.models.multimodal import WrittenGraphs


def squares(*tables: Tensor) -> Tensor:
    """The sum of the squares of all entries: ... -> ()."""
    return torch.stack([table.square().sum() for table in tables]).sum()


TIME = 10  # width of a time step's embedding


class Denoiser(nn.Module):
    """Users' rows of events with noise, and the step they were noised to -> the rows without: (B, I), (B,) -> (B,
    I)."""

    def __init__(self, items: int, hidden: int):
        super().__init__()
        self.time, self.inner, self.outer = (
            nn.Linear(TIME, TIME),
            nn.Linear(items + TIME, hidden),
            nn.Linear(hidden, items),
        )
        for layer in (self.time, self.inner, self.outer):
            nn.init.xavier_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.001)

    def forward(self, rows: Tensor, step: Tensor) -> Tensor:
        rates = 10000.0 ** (-torch.arange(TIME // 2, device=rows.device) * 2 / TIME)
        angles = step[:, None].float() * rates
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        rows = F.dropout(rows, 0.5, self.training)
        found: Tensor = self.outer(torch.tanh(self.inner(torch.cat([rows, time], dim=1))))
        return found


class DiffMM(WrittenGraphs):
    """Recommendation over the events and over what each modality's diffusion model makes of them.

    Jiang et al. 2024 (arXiv 2406.11781). Diffusion: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a denoiser tells x_0
    from x_t, weighed by the step's loss of signal-to-noise ratio, and ``signal_weight`` times the distance of its rows
    read through the modality's features from the true ones read through IDs. Each epoch the posterior means of all
    users' rows, as they are, are followed down from step T, and the ``top`` items of each become a graph A_m. With A
    the graph of events, both with self-loops: Z_m = A [P; y_m] + A [A's users; Q] + ``graph_weight`` A_m [P; Q], y_m =
    unit(act(x_m W_m)); H_0 = sum of softmax(k)_m Z_m, F = H_0 + A H_0 + ... + ``residual`` unit(H_0). BPR, ``reg``
    times the squares of all IDs, and ``contrast_weight`` times the InfoNCE of two modalities' views A_m [P; y_m], over
    A and summed as H_0 is. An absent modality is zero. Departures: the denoisers learn beside the rest, on as many
    users a step as make all of them once an epoch, by one optimiser; the contrast is of the batch's nodes, not with
    all. What is written is thus one epoch behind, and nothing in the first (published: an epoch trains the denoisers,
    writes, then recommends); only items with an event are; of what is written all is kept, where the published code
    drops half of the graph's entries an epoch and scales up the rest. It can contrast each modality's view with F
    instead, which is not here. Note that a new item keeps all of its content, by its self-loop, where a known one of
    degree d has 1 / (d + 1) of it: new items rank high.
    """

    penalty: ClassVar[Callable[..., Tensor]] = staticmethod(squares)

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog | None = None,
        features: FeatureTable | None = None,
        dim: int = 64,
        layers: int = 1,
        hidden: int = 1000,
        steps: int = 5,
        noise: float = 0.1,
        top: int = 5,
        signal_weight: float = 0.1,
        graph_weight: float = 0.2,
        residual: float = 0.5,
        contrast_weight: float = 0.01,
        temperature: float = 0.5,
        reg: float = 1e-5,
        feature_dim: int = 64,
        loss: str = "bpr",
    ):
        super().__init__(train, **arguments(locals()))
        self.layers, self.steps, self.temperature = layers, steps, temperature
        self.signal_weight, self.graph_weight, self.residual = signal_weight, graph_weight, residual
        self.contrast_weight = contrast_weight
        self.maps = self.linear_each(dim, bias=False)
        for layer in self.maps:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        self.shares = nn.Parameter(torch.zeros(len(self.modalities)))
        self.denoisers = nn.ModuleList(Denoiser(self.n_items, hidden) for _ in self.modalities)
        self.events = _with_loops(train.csr)
        kept, self.betas = schedule(steps, noise=noise)
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("learnt", torch.tensor(False))  # whether the denoisers have had an epoch
        self._start(top)

    kept: Tensor  # (T,) how much of the signal is left at a step

    learnt: Tensor

    def write(self) -> list[Tensor]:
        if not self.learnt:  # noise would be written: the events alone, for an epoch
            self.learnt = torch.ones_like(self.learnt)  # not in place: a copy may share it
            return [self.get_buffer(f"written{column}") for column in range(len(self.modalities))]
        return [self._follow(denoiser) for denoiser in self.denoisers]  # type: ignore[arg-type]

    def linked(self, chosen: sp.csr_matrix) -> list[Propagation]:
        return [_with_loops(chosen)]

    def _follow(self, denoiser: Denoiser) -> Tensor:
        """Each user's ``top`` items after the posterior means from step T down to 0: (U, top)."""
        was, found = denoiser.training, []
        denoiser.eval()
        for part in torch.arange(self.n_users).split(1024):
            x = torch.from_numpy(self.train_data.csr[part.numpy()].toarray().astype(np.float32)).to(self.device)
            for t in reversed(range(self.steps)):
                told = denoiser(x, torch.full((len(x),), t, device=x.device))
                before = float(self.kept[t - 1]) if t else 1.0
                now, beta = float(self.kept[t]), self.betas[t]
                x = (beta * before**0.5 * told + (1 - before) * (1 - beta) ** 0.5 * x) / (1 - now)
            x = x.masked_fill(~self.warm, float("-inf"))
            values, items = x.topk(self.top, dim=1)
            found.append(items.masked_fill(torch.isinf(values), -1))
        denoiser.train(was)
        return torch.cat(found)

    def encode(self) -> Encoded:
        users, items = self.ids()
        ids = torch.cat([users, items])
        weights, hidden, parts = torch.softmax(self.shares, dim=0), torch.zeros_like(ids), {}
        for column, (m, layer, written) in enumerate(zip(self.modalities, self.maps, self.links, strict=True)):
            content = unit(F.leaky_relu(layer(self.rows(m)), 0.2)) * self.present(m)[:, None]
            start = torch.cat([users, content])
            first = self.events(start)
            second = self.events(torch.cat([first[: self.n_users], items]))
            hidden = hidden + weights[column] * (first + second + self.graph_weight * written(ids))
            if self.training and self.contrast_weight:
                parts[m] = self._layered(written(start))
        whole = self._layered(hidden) + self.residual * unit(hidden)
        users, items = whole.split([self.n_users, self.n_items])
        return Encoded(users, items, parts)

    def _layered(self, x: Tensor) -> Tensor:
        total = x
        for _ in range(self.layers):
            x = self.events(x)
            total = total + x
        return total

    def penalised(self, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
        return self.users.weight, self.items.weight

    def auxiliary(self, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
        """``contrast`` of modalities' views, and ``diffusion``."""
        terms = {}
        if self.contrast_weight and len(encoded.parts) > 1:
            each = [
                self.two_views(one, other, encoded.distinct(batch), temperature=self.temperature)
                for one, other in combinations(encoded.parts.values(), 2)
            ]
            terms["contrast"] = self.contrast_weight * torch.stack(each).sum()
        terms["diffusion"] = self._diffused(len(batch))
        return terms

    def _diffused(self, size: int) -> Tensor:
        """The denoisers' loss on random users, as many as make all of them once an epoch."""
        count = max(min(round(self.n_users * size / max(len(self.train_data), 1)), self.n_users), 1)
        some = torch.randperm(self.n_users)[:count]
        x = torch.from_numpy(self.train_data.csr[some.numpy()].toarray().astype(np.float32)).to(self.device)
        step = torch.randint(0, self.steps, (count,), device=x.device)
        kept = self.kept[step][:, None]
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * torch.randn_like(x)
        ratio = self.kept / (1 - self.kept)
        weights = torch.cat([torch.ones_like(ratio[:1]), ratio[:-1] - ratio[1:]])[step]
        ids = (self.items.weight * self.warm[:, None]).detach()
        total = []
        for m, layer, denoiser in zip(self.modalities, self.maps, self.denoisers, strict=True):
            told = denoiser(noisy, step)
            content = (F.leaky_relu(layer(self.rows(m)), 0.2) * self.present(m)[:, None]).detach()
            signal = (told @ content - x @ ids).square().mean()
            total.append((weights * (x - told).square().mean(dim=1)).mean() + self.signal_weight * signal)
        return torch.stack(total).sum()


def schedule(steps: int, *, noise: float, low: float = 1e-4, high: float = 0.02) -> tuple[Tensor, list[float]]:
    """How much signal is left after each step, (T,) float32, and each step's share of noise: variances ``noise`` times
    evenly from ``low`` to ``high``, the first step's share 1e-4."""
    kept = 1 - noise * np.linspace(low, high, steps)
    betas = np.minimum(1 - kept / np.concatenate([[1.0], kept[:-1]]), 0.999)
    betas[0] = 1e-4
    return torch.from_numpy(np.cumprod(1 - betas)).float(), betas.tolist()


def _with_loops(events: sp.csr_matrix) -> Propagation:
    """D^-1/2 (A + 1) D^-1/2 of the bipartite graph of a matrix (U, I)."""
    r = events.astype(np.float32)
    size = sum(r.shape)
    adjacency = sp.bmat([[None, r], [r.T, None]], format="csr") + sp.identity(size, dtype=np.float32, format="csr")
    return Propagation(symmetric_degrees(adjacency), symmetric=True)
