"""Sensors: named channels with units, any of which may be missing (smell, touch, motion), one token a channel.

Legend: B batch, C channels, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError
from mmllmrec.features.signal import Standardise, transformer


@dataclass(frozen=True)
class Channel:
    """One channel of a sensor: its name, and the unit of its readings (``""`` for a plain number)."""

    name: str
    unit: str = ""


class SensorEncoder(nn.Module):
    """Readings to tokens and a pooled state: (B, C) float -> pooled (B, D), tokens (B, C, D).

    token_c = v_c w_c + b_c with v_c the standardised reading, w_c and b_c learned a channel (Gorishniy et al. 2021,
    eq. 1, the feature tokenizer of FT-Transformer), then a pre-norm transformer; pooled is the mean over the channels
    that are there, a departure from the paper's class token. A channel that is missing (NaN, or False in ``present``
    (B, C) bool) has attention weight, influence and gradient exactly 0 and a zero token; a row with none is exactly
    zero. Nothing depends on the order of the channels but which column is whose: ``align`` brings another sensor's
    columns into this order, by name. Raises ``DataError`` for names that repeat and for other shapes.

    >>> feel = SensorEncoder([Channel("force", "N"), Channel("warmth", "K")], dim=8, heads=2)
    >>> pooled, tokens = feel(torch.tensor([[1.0, float("nan")]]))
    >>> pooled.shape, tokens[0, 1].abs().sum().item()
    (torch.Size([1, 8]), 0.0)
    """

    def __init__(self, channels: Sequence[Channel], *, dim: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.channels = tuple(channels)
        names = [c.name for c in self.channels]
        if not names or len(set(names)) < len(names):
            raise DataError(f"SensorEncoder: channels {names}; give at least one, each name once")
        self.pooled_width = self.token_width = dim
        self.tokens = len(names)
        self.standard = Standardise(len(names))
        bound = 1 / math.sqrt(dim)
        self.weight = nn.Parameter(torch.empty(len(names), dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(names), dim).uniform_(-bound, bound))
        self.layers = transformer(dim, layers=layers, heads=heads)

    @classmethod
    def fit(
        cls, readings: Tensor | np.ndarray, channels: Sequence[Channel] | None = None, **settings: Any
    ) -> SensorEncoder:
        """An encoder for readings like these, (B, C), each channel standardised on them, NaN left out: give the train
        items that have the sensor. Channels without names are called by their number. The weights are random."""
        readings = torch.as_tensor(readings)
        encoder = cls(channels or [Channel(str(c)) for c in range(readings.shape[1])], **settings)
        encoder.standard.fit(readings)
        return encoder

    def align(self, readings: Tensor, channels: Sequence[Channel]) -> Tensor:
        """Columns of ``channels`` (B, C') brought to this encoder's, (B, C); NaN where a channel is not among them.

        Raises ``DataError`` for a channel that this encoder does not know, or knows in another unit.
        """
        known = {c.name: (position, c.unit) for position, c in enumerate(self.channels)}
        found = readings.new_full((len(readings), len(known)), float("nan"))
        for column, channel in enumerate(channels):
            if channel.name not in known:
                raise DataError(f"channel {channel.name!r} is unknown; this encoder has {list(known)}")
            position, unit = known[channel.name]
            if channel.unit != unit:
                raise DataError(f"channel {channel.name!r} is in {channel.unit!r}; convert it to {unit!r} first")
            found[:, position] = readings[:, column]
        return found

    def forward(self, readings: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shape = (len(readings), len(self.channels))
        if readings.shape != shape or (present is not None and (present.shape != shape or present.dtype != torch.bool)):
            given = "" if present is None else f", present {tuple(present.shape)} {present.dtype}"
            raise DataError(f"SensorEncoder: readings {tuple(readings.shape)}{given}; expected (B, {shape[1]})")
        here = ~readings.isnan() if present is None else present & ~readings.isnan()
        values = self.standard(readings.masked_fill(~here, 0.0))
        x = values[..., None] * self.weight + self.bias
        # attention over nothing is NaN in some kernels: such a row is computed unmasked, then zeroed
        some = here.any(dim=1, keepdim=True)
        x = self.layers(x, src_key_padding_mask=~here & some).masked_fill(~here[..., None], 0.0)
        return x.sum(dim=1) / here.sum(dim=1, keepdim=True).clamp(min=1), x
