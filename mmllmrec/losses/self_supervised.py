"""Self-supervised losses: what two views of one thing should have in common.

Feature-based: views made by modalities, noise or masks; structure-based: views made by dropping edges and nodes of the
graph (``encoders.views``). Both end in one of these functions. Survey (arXiv 2502.15711), section VI.B.

Legend: N rows of any kind, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllmrec.data.interactions import DataError
from mmllmrec.losses.supervised import _wide, matched_softmax


def info_nce(
    a: Tensor, b: Tensor, *, temperature: float | Tensor = 0.1, both_ways: bool = True, within: bool = False
) -> Tensor:
    """InfoNCE: row n of ``a`` belongs to row n of ``b``, all other rows of ``b`` are negatives.

    L(a, b) = mean over n of -log softmax_m(cos(a_n, b_m) / temperature)[n], van den Oord et al. 2018, eq. 4; with
    ``both_ways`` (L(a, b) + L(b, a)) / 2 as Radford et al. 2021, section 2.3; (N, D), (N, D) -> (). Rows are
    L2-normalised here. Rows that show the same thing twice are each other's negatives: de-duplicate before. Equal
    cosines give log N. ``within``: a view's other rows are negatives too, as in Zhu et al. 2020 (GRACE), eq. 1: log of
    2N - 1 for equal cosines. Softmax in float32.
    """
    _alike("info_nce", a, b)
    first, second = F.normalize(_wide(a), dim=-1), F.normalize(_wide(b), dim=-1)
    own = torch.arange(len(a), device=a.device)
    if not both_ways and not within:
        return matched_softmax(first / temperature, second, own)
    across = first / temperature @ second.T
    ways = [across, across.T] if both_ways else [across]
    if within:
        ways = [torch.cat([w, _others(x, temperature)], dim=1) for w, x in zip(ways, (first, second), strict=False)]
    return torch.stack([F.cross_entropy(logits, own) for logits in ways]).mean()


def _others(rows: Tensor, temperature: float | Tensor) -> Tensor:
    """Scores of unit rows among themselves, but for their own: (N, D) -> (N, N)."""
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return (rows @ rows.T / temperature).masked_fill(own, float("-inf"))


def bootstrap(online: Tensor, target: Tensor) -> Tensor:
    """Predict the other view without negatives: no gradient reaches the target, which keeps both from collapsing.

    mean over n of 1 - cos(online_n, stop_gradient(target_n)), Grill et al. 2020 (BYOL), eq. 2, halved: 2 - 2 cos there;
    (N, D), (N, D) -> (). ``online`` is what a predictor makes of its view. 0 at the same direction, 2 at the opposite.

    >>> bootstrap(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])).item()
    0.5
    """
    _alike("bootstrap", online, target)
    return reconstruction(online, target)


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """How far apart the two rows of a positive pair are, on the unit sphere.

    mean over n of ||a_n / |a_n| - b_n / |b_n| ||^2, Wang and Isola 2020, section 4.1, alpha = 2; for users and items
    Wang et al. 2022 (DirectAU), eq. 5; (N, D), (N, D) -> (). Between 0 and 4.
    """
    _alike("alignment", a, b)
    return (F.normalize(_wide(a), dim=-1) - F.normalize(_wide(b), dim=-1)).square().sum(-1).mean()


def uniformity(rows: Tensor, *, t: float = 2.0) -> Tensor:
    """How evenly rows lie on the unit sphere: lower is more even.

    log of the mean over pairs n < m of exp(-t ||x_n - x_m||^2), x of unit length, Wang and Isola 2020, section 4.1;
    (N, D) -> (). 0 where all rows are one direction. Raises ``DataError`` for fewer than two rows.
    """
    if rows.ndim != 2 or len(rows) < 2:
        raise DataError(f"uniformity: rows {tuple(rows.shape)}; expected (N, D) with N of 2 or more")
    unit = F.normalize(_wide(rows), dim=-1)
    cosines = unit @ unit.T
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    exponents = -t * (2 - 2 * cosines[first, second])
    return torch.logsumexp(exponents, dim=0) - math.log(len(exponents))


def reconstruction(decoded: Tensor, original: Tensor, *, power: float = 1.0) -> Tensor:
    """What was masked, decoded again: the scaled cosine error of masked rows.

    mean over n of (1 - cos(decoded_n, stop_gradient(original_n)))^power, Hou et al. 2022 (GraphMAE), eq. 2;
    (N, D), (N, D) -> (). ``power`` above 1 lets easy rows weigh less. The original is data: it gets no gradient. Raises
    ``DataError`` for a ``power`` below 1, whose gradient has no bound.
    """
    _alike("reconstruction", decoded, original)
    if power < 1:
        raise DataError(f"reconstruction: power={power}; give 1 or more")
    apart = 1 - F.cosine_similarity(_wide(decoded), _wide(original.detach()), dim=-1)
    return (apart if power == 1 else apart.clamp(min=0).pow(power)).mean()  # rounding makes a cosine a bit over 1


def _alike(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 2:
        raise DataError(f"{name}: {tuple(a.shape)} and {tuple(b.shape)}; expected both (N, D)")
