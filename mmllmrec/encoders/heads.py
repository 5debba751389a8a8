"""What stands between the towers' states and an item's vector: whitening, a head a path, and their fusion.

Legend: B items, V width of states, M paths, D output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError
from mmllmrec.fusion import FUSIONS

EARLY = "early"
KEEP, SHRINK = 48, 0.3  # axes of a tower's states, and what is added to their variances, as a share of the mean one


def unit(x: Tensor) -> Tensor:
    """L2-normalised rows; a zero row stays zero."""
    return F.normalize(x, dim=-1)


@dataclass
class Content:
    """What a model makes of items: fused (B, D), and its parts: vectors {path: (B, D)} (``early`` and a path a
    modality, zero where absent), present {path: (B,) bool}, and the fusion's weights (B, M)."""

    fused: Tensor
    vectors: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None


class Whiten(nn.Module):
    """States of a tower -> uncorrelated columns of unit variance: (B, V) -> (B, K). Fitted once, before training.

    States of pretrained towers share a large mean and vary in few directions: a linear map on them as they are hardly
    trains, and one on all of them at unit variance hears mostly noise. x is ``widths`` parts side by side; of each,
    (x - mean) V_k diag(lambda_k + ``shrink`` tr/V)^-1/2 with its k = ``keep`` largest eigenpairs of the covariance
    (fewer where it is narrower). Until ``fit`` it is the first k columns of each. Mean and map are buffers: they are
    saved, and do not train.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, widths: Sequence[int], *, keep: int = KEEP):
        super().__init__()
        self.widths, self.keep = tuple(widths), keep
        self.register_buffer("mean", torch.zeros(sum(widths)))
        self.register_buffer("matrix", torch.block_diag(*(torch.eye(w, min(w, keep)) for w in widths)))

    @property
    def width(self) -> int:
        """K, the columns it gives."""
        return self.matrix.shape[1]

    @torch.no_grad()
    def fit(self, rows: Tensor, *, shrink: float = SHRINK) -> None:
        """Fit mean and map on rows (n, V)."""
        rows = rows.double()
        mean = rows.mean(dim=0)
        maps = []
        for part in (rows - mean).split(self.widths, dim=1):
            variance, axes = torch.linalg.eigh(part.T @ part / max(len(rows), 1))
            keep = min(part.shape[1], self.keep)
            variance, axes = variance.flip(0)[:keep], axes.flip(1)[:, :keep]
            floor = shrink * part.square().mean() + 1e-12
            # an axis without variance gets no say, however the solver turned it
            scale = torch.where(variance > 1e-9 * variance.max(), (variance.clamp(min=0) + floor).rsqrt(), 0.0)
            maps.append(axes * scale)
        self.mean.copy_(mean)
        self.matrix.copy_(torch.block_diag(*maps))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = (x - self.mean) @ self.matrix
        return found


class Heads(nn.Module):
    """States of several kinds -> one vector of an item, early and late at once, by presence.

    early: e = LN(W x + V gelu(U x)) over states side by side, x = [f_1; ...; f_N; presence], an absent one zero: the
    hidden layer is there because tastes for combinations are not linear in what is said. late: l_m = LN(W_m f_m), a
    path a kind. fused: a fusion over {e, l_1, ..., l_M} masked by presence (``fusion.FUSIONS``).

    ``widths`` {kind: K} are the states; ``paths`` what is fused, of "early" and kinds; ``early`` the kinds that are
    read early, all without it. States that are trained from nothing do not belong there: they learn which item is
    which, and a network that can tell items apart does not look for what combines. Raises ``DataError`` for a path or a
    fusion that is none.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        dim: int,
        *,
        paths: Sequence[str],
        fusion: str,
        early: Sequence[str] | None = None,
    ):
        super().__init__()
        known = (EARLY, *widths)
        if not paths or any(p not in known for p in paths):
            raise DataError(f"paths={tuple(paths)}: choose among {known}")
        if fusion not in FUSIONS:
            raise DataError(f"fusion={fusion!r}: one of {sorted(FUSIONS)}")
        self.widths, self.paths, self.dim = dict(widths), tuple(paths), dim
        self.early = tuple(widths) if early is None else tuple(early)
        if EARLY in self.paths:
            everything = sum(widths[m] for m in self.early) + len(self.early)
            self.linear = nn.Linear(everything, dim)
            self.bend = nn.Sequential(nn.Linear(everything, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            self.norm = nn.LayerNorm(dim)
        self.late = nn.ModuleDict(
            {m: nn.Sequential(nn.Linear(widths[m], dim), nn.LayerNorm(dim)) for m in self.paths if m != EARLY}
        )
        self.fusion = FUSIONS[fusion](dim, len(self.paths))

    def forward(self, states: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Content:
        """``states`` {kind: (B, K)}, zero where absent, and ``present`` {kind: (B,) bool}, of all kinds."""
        vectors, known = {}, {}
        for path in self.paths:
            if path == EARLY:
                here = torch.stack([present[m] for m in self.early], dim=1)
                x = torch.cat([*(states[m] for m in self.early), here.to(self.linear.weight)], dim=1)
                vectors[path], known[path] = self.norm(self.linear(x) + self.bend(x)), here.any(dim=1)
            else:
                vectors[path], known[path] = self.late[path](states[path]), present[path]
            vectors[path] = vectors[path] * known[path][:, None]
        fused, weights = self.fusion(torch.stack(list(vectors.values()), 1), torch.stack(list(known.values()), 1))
        return Content(fused, vectors, known, weights)
