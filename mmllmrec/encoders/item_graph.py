"""Latent graphs of items that are alike, and of users who took the same: sparse, built in blocks.

Legend: I items, U users, N rows of either, M modalities, K neighbours, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.encoders.graph import CSR

BLOCK = 1 << 22  # cells of a similarity matrix that are held at once (16 MiB)


def nearest(
    rows: Tensor, k: int, *, present: Tensor | None = None, parts: Tensor | None = None, itself: bool = True
) -> tuple[Tensor, Tensor]:
    """The K most similar rows of each, by cosine: (N, D) -> indices (N, K) int64, cosines (N, K), best first.

    A block of rows at a time: no N x N matrix is made. Only rows that are ``present`` (N,) bool are anyone's
    neighbours; a row that is not has cosines of 0; where none is, K is 1, all indices and cosines 0. ``parts`` (N, M)
    bool: rows are M parts of unit length side by side, an absent one zero, and the cosine of two is the mean over the
    parts that both have, 0 without any. (As one vector, two that lack the same part would be nearer than two of which
    one has it.) Without ``itself`` a row is not its own neighbour. Gradients do not flow: which rows are near is a
    choice (``cosines`` says how near, with a gradient). K is at most the number of candidates. Raises ``DataError`` for
    ``k`` below 1.
    """
    if k < 1:
        raise DataError(f"k={k}: keep at least one neighbour")
    with torch.no_grad():
        unit = rows.detach().float()
        unit = F.normalize(unit, dim=-1) if parts is None else unit
        pool = torch.arange(len(unit), device=unit.device) if present is None else present.nonzero()[:, 0]
        if not len(pool):
            return unit.new_zeros(len(unit), 1, dtype=torch.long), unit.new_zeros(len(unit), 1)
        size = max(min(k, len(pool) - int(not itself)), 1)
        candidates = unit[pool].T.contiguous()
        place = torch.full((len(unit),), -1, device=unit.device)
        place[pool] = torch.arange(len(pool), device=unit.device)
        indices, values = [], []
        for block in torch.arange(len(unit), device=unit.device).split(max(BLOCK // max(len(pool), 1), 1)):
            similarity = unit[block] @ candidates
            if parts is not None:
                similarity /= (parts[block].float() @ parts[pool].float().T).clamp(min=1)
            if not itself:
                own = place[block]
                similarity[(own >= 0).nonzero()[:, 0], own[own >= 0]] = -torch.inf
            value, index = similarity.topk(size, dim=1)
            indices.append(pool[index])
            values.append(value)
        near, how = torch.cat(indices), torch.cat(values)
        return near, how if present is None else how * present[:, None]


def cosines(rows: Tensor, near: Tensor) -> Tensor:
    """Cosines of rows and their neighbours, with a gradient: (N, D), (N, K) -> (N, K), in float32 at least."""
    unit = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    return (unit[:, None] * unit[near]).sum(-1)


def item_graph(features: np.ndarray, present: np.ndarray, *, k: int = 10, weighted: bool = False) -> sp.csr_matrix:
    """A graph of each item's K nearest in frozen features, normalised: (I, D), (I,) bool -> (I, I) float32.

    S = D^-1/2 A D^-1/2 with A_ij the cosine of i and j (``weighted``: Zhang et al. 2021 (LATTICE), section 3.1) or 1
    (Zhou and Shen 2023 (FREEDOM), section 3.1) where j is among i's K nearest, i itself included, and D the row sums
    of A. Directed: S is not symmetric. An item without these features has an empty row and is nobody's neighbour.
    ``present`` (I, M): the features are M parts, see ``nearest``, and an item is there that has one of them.
    """
    given = torch.from_numpy(np.array(present, dtype=bool))
    here, parts = (given, None) if given.ndim == 1 else (given.any(dim=1), given)
    near, how = nearest(torch.from_numpy(np.array(features, dtype=np.float32)), k, present=here, parts=parts)
    values = how.clamp(min=0.0) if weighted else torch.ones_like(how)
    rows = torch.arange(len(near)).repeat_interleave(near.shape[1])
    keep = here[rows] & (values.flatten() > 0)
    cells = values.flatten()[keep].numpy(), (rows[keep].numpy(), near.flatten()[keep].numpy())
    return symmetric_degrees(sp.csr_matrix(cells, shape=(len(near), len(near))))


def mixed(graphs: Sequence[sp.csr_matrix], presence: np.ndarray, shares: np.ndarray) -> sp.csr_matrix:
    """One graph of several: row i is the mean of its rows in the graphs of the modalities it has, weighed by
    ``shares``.

    (I, I) a graph, (I, M) bool, (M,) -> (I, I). Where all are present it is sum over m of shares_m S_m; an item that
    lacks a modality is as close to its neighbours by the others; one that has none has an empty row.
    """
    weights = np.asarray(presence, dtype=np.float64) * np.asarray(shares)[None]
    total = weights.sum(axis=1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    parts = [sp.diags(weights[:, m]) @ graph for m, graph in enumerate(graphs)]
    return sp.csr_matrix(sum(parts[1:], parts[0]), dtype=np.float32)


def symmetric_degrees(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """D^-1/2 A D^-1/2 with D the row sums of A (N, N), float32; a row that sums to zero stays empty."""
    degree = np.asarray(matrix.sum(axis=1)).ravel().astype(np.float64)
    half = sp.diags(np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0))
    return (half @ matrix @ half).tocsr().astype(np.float32)


def user_graph(train: Interactions, *, k: int = 10) -> sp.csr_matrix:
    """Each user's K companions: who took most of the same training items, (U, U), values the number in common.

    Wang et al. 2021 (DualGNN). Ties go to the lower user number; a user who shares nothing has an empty row. Raises
    ``DataError`` for ``k`` below 1.
    """
    return top_of_rows(train.csr.astype(np.float32), k=k)


def top_of_rows(
    matrix: sp.csr_matrix,
    *,
    k: int,
    least: float = 1,
    weigh: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> sp.csr_matrix:
    """Of X X^T, without its diagonal, the k largest a row of those that are ``least`` or more: (N, C) -> (N, N).

    ``weigh(rows, columns, values)`` says what they are to count as. Blocks of rows: the product is never held whole.
    Ties go to the lower column.
    """
    if k < 1:
        raise DataError(f"k={k}: keep at least one neighbour")
    back = matrix.T.tocsr()
    rows, columns, values = [], [], []
    for start in range(0, matrix.shape[0], 1024):
        common = (matrix[start : start + 1024] @ back).tocoo()
        keep = (common.row + start != common.col) & (common.data >= least)
        row, column, value = common.row[keep] + start, common.col[keep], common.data[keep]
        value = value if weigh is None else weigh(row, column, value)
        order = np.lexsort((column, -value, row))
        row, column, value = row[order], column[order], value[order]
        keep = np.arange(len(row)) - np.searchsorted(row, row, side="left") < k
        rows.append(row[keep])
        columns.append(column[keep])
        values.append(value[keep])
    cells = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return sp.csr_matrix(cells, shape=(matrix.shape[0], matrix.shape[0]), dtype=np.float32)


def companions(train: Interactions, *, k: int = 40) -> sp.csr_matrix:
    """``user_graph`` with weights that sum to 1: each user's softmax over the numbers in common, (U, U).

    Wang et al. 2021 (DualGNN); also of DRAGON, COHESION. ``k=0``: no one has any. A user who shares nothing has an
    empty row. Departure: the published code fills short lists up to K by drawing from them again, every epoch; here
    they are short.
    """
    if k == 0:
        return sp.csr_matrix((train.n_users, train.n_users), dtype=np.float32)
    graph = user_graph(train, k=k)
    rows = np.repeat(np.arange(train.n_users), np.diff(graph.indptr))
    top = np.full(train.n_users, -np.inf)
    np.maximum.at(top, rows, graph.data)
    weights = np.exp(graph.data - top[rows])
    graph.data = (weights / np.bincount(rows, weights=weights, minlength=train.n_users)[rows]).astype(np.float32)
    return graph


class _WeightedSum(torch.autograd.Function):
    """sum over k of w_nk x_near(n,k) without an (N, K, D) array: (N, K), (N, K), (M, D) -> (N, D)."""

    @staticmethod
    def forward(ctx: Any, near: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(near, weights, x)
        return _rows(near, weights, len(x)) @ x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        near, weights, x = ctx.saved_tensors
        of_weights = of_x = None
        if ctx.needs_input_grad[1]:
            of_weights = torch.stack([(grads[0] * x[near[:, k]]).sum(-1) for k in range(near.shape[1])], dim=1)
        if ctx.needs_input_grad[2]:
            of_x = _rows(near, weights, len(x)).tensor().t() @ grads[0]
        return None, of_weights, of_x


def _rows(near: Tensor, weights: Tensor, width: int) -> CSR:
    starts = torch.arange(0, near.numel() + 1, near.shape[1], device=near.device)
    return CSR(starts, near.flatten(), weights.detach().flatten(), width)


def weighted_sum(near: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """Each row's sum over its K neighbours, with a gradient to the weights too: (N, K), (N, K), (M, D) -> (N, D).

    What a *learned* graph multiplies by: out_n = sum over k of weights_nk x_near(n,k). In float32 at least, also
    where autocast is on: as ``Propagation``.
    """
    out: Tensor = _WeightedSum.apply(near, *(t.to(torch.promote_types(t.dtype, torch.float32)) for t in (weights, x)))
    return out
