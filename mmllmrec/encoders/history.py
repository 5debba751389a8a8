"""The history tower: a user as what its events say, whoever the user is.

Legend: B users, I items, L events of a history, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError


@dataclass
class Moments:
    """Mean (D,) and covariance (D, D) of the items that training knows: what a history is held against."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, items: Tensor) -> Self:
        """Of items (I, D); zero where there are none."""
        items = items.float()
        mean = items.mean(dim=0) if len(items) else items.new_zeros(items.shape[1])
        centred = items - mean
        return cls(mean, centred.T @ centred / max(len(items), 1))

    @property
    def variance(self) -> Tensor:
        """tr(C) / D, and never quite 0, ()."""
        return self.covariance.diagonal().mean() + 1e-8

    def discriminant(self, difference: Tensor, ridge: Tensor | float) -> Tensor:
        """(C + ridge tr(C)/D I)^-1 of differences of means, (B, D) -> (B, D)."""
        identity = torch.eye(len(self.mean), device=difference.device)
        found: Tensor = torch.linalg.solve(self.covariance + ridge * self.variance * identity, difference.T).T
        return found


class HistoryEncoder(nn.Module):
    """Events to a user: tokens (B, L, D), present (B, L) bool, sums (B, D), counts (B,) -> (B, D).

    discriminant: g (C + r tr(C)/D I)^-1 (sums - n mean) / (n + k), with mean and C the ``Moments`` of the catalogue.
    It is Fisher's linear discriminant between a user's items and all items (Fisher 1936; Hastie et al. 2009, eq. 4.9),
    its mean shrunk by k events towards nothing known: an inner product with it is a log-odds. g, k and r are learned,
    one number each. On top, a correction: a small pre-norm transformer over the centred tokens with a learned query
    (Sun et al. 2019 without positions), whose output map starts at zero. Histories have no order here. ``sums`` and
    ``counts`` are over the whole history, tokens over at most ``length`` of its events. A user without events is
    exactly zero. ``layers=0`` leaves the correction out. Raises ``DataError`` on other shapes.
    """

    trains: ClassVar[bool] = True

    def __init__(self, dim: int, *, layers: int = 1, heads: int = 4, length: int = 32):
        super().__init__()
        self.length = length
        self.log_shrink = nn.Parameter(torch.tensor(4.0).log())
        self.log_ridge = nn.Parameter(torch.tensor(1.0).log())
        self.log_gain = nn.Parameter(torch.tensor(0.0))
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)
        if not layers:
            self.query.requires_grad_(False)
            self.out.requires_grad_(False)

    def discriminant(self, sums: Tensor, counts: Tensor, moments: Moments) -> Tensor:
        """The closed form alone, (B, D)."""
        ridge, shrink, gain = (x.float().exp() for x in (self.log_ridge, self.log_shrink, self.log_gain))
        mean = (sums - counts[:, None] * moments.mean) / (counts[:, None] + shrink)
        return gain * moments.discriminant(mean, ridge)

    def forward(self, tokens: Tensor, present: Tensor, sums: Tensor, counts: Tensor, moments: Moments) -> Tensor:
        if tokens.shape[:2] != present.shape or sums.shape != (len(tokens), tokens.shape[2]):
            raise DataError(
                f"history: tokens {tuple(tokens.shape)}, present {tuple(present.shape)}, sums {tuple(sums.shape)}; "
                "expected (B, L, D), (B, L) and (B, D)"
            )
        # a solve needs single precision; the correction takes that of its parameters
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            found = self.discriminant(sums.float(), counts.float(), moments)
            if len(self.layers):
                x = (tokens - moments.mean) / moments.variance.sqrt()
                x = x.masked_fill(~present[..., None], 0.0).to(self.query.dtype)
                x = torch.cat([self.query.expand(len(x), 1, -1), x], dim=1)
                absent = F.pad(~present, (1, 0), value=False)
                for layer in self.layers:
                    x = layer(x, src_key_padding_mask=absent)
                found = found + self.out(x[:, 0]).float() * present.any(dim=1, keepdim=True)
            return found


class HistoryMean(nn.Module):
    """Events to a user without a learned number: D/2 times the mean of the items' content, zero without events.

    The frozen baseline of ``HistoryEncoder``, called alike: sums (B, D), counts (B,) -> (B, D). D/2 is what the
    discriminant multiplies by at its initial ridge where content of unit length varies alike in all directions
    (C = I/D), so that scores are of its size; a mean without it would weigh next to nothing beside an item's bias.
    """

    trains: ClassVar[bool] = False
    length = 1  # tokens are not read

    def forward(self, tokens: Tensor, present: Tensor, sums: Tensor, counts: Tensor, moments: Moments) -> Tensor:
        with torch.autocast(sums.device.type, enabled=False):
            return sums.shape[1] / 2 * sums.float() / counts.float().clamp(min=1)[:, None]


HISTORIES: dict[str, Callable[[int], HistoryEncoder | HistoryMean]] = {
    "transformer": HistoryEncoder,
    "discriminant": lambda dim: HistoryEncoder(dim, layers=0),
    "mean": lambda dim: HistoryMean(),
}
