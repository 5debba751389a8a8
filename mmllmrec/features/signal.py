"""What encoders of signals share: standardisation inside the module, and a small transformer.

Legend: B batch, N tokens, D width; "..." any leading dims.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError


class Standardise(nn.Module):
    """x -> (x - mean) / std on the last dim: (..., D) -> (..., D).

    ``mean`` and ``std`` (D,) are buffers, so they are saved with the weights and move with the module; they start as 0
    and 1 until ``fit``. A constant column becomes zero; NaN stays NaN.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit(self, rows: Tensor) -> Self:
        """Take mean and standard deviation (divisor n) of ``rows`` (..., D), NaN left out; give train items only.

        A column without any value keeps mean 0 and scale 0. Raises ``DataError`` for another width or no rows at all.
        """
        rows = rows.reshape(-1, rows.shape[-1]).double()
        if not len(rows) or rows.shape[1] != len(self.mean):
            raise DataError(f"cannot standardise {len(self.mean)} columns on rows of shape {tuple(rows.shape)}")
        here = ~rows.isnan()
        count = here.sum(0).clamp(min=1)
        mean = rows.nan_to_num(0.0).sum(0) / count
        deviation = ((rows - mean).masked_fill(~here, 0.0).square().sum(0) / count).sqrt()
        largest = rows.nan_to_num(0.0).abs().amax(0)
        varies = deviation > 1e-6 * largest.clamp(min=1e-30)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, 1 / deviation, 0.0))
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


def transformer(dim: int, *, layers: int, heads: int) -> nn.TransformerEncoder:
    """A pre-norm transformer without dropout, its feed-forward twice as wide: (B, N, D) -> (B, N, D), last norm
    included. Raises ``DataError`` for heads that do not divide ``dim``."""
    if layers < 1 or heads < 1 or dim % heads:
        raise DataError(f"dim={dim}, layers={layers}, heads={heads}: heads must divide dim, and layers be at least 1")
    layer = nn.TransformerEncoderLayer(
        dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
