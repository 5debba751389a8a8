"""Graph propagation on the user-item graph: one symmetrically normalised matrix, sparse, in float32.

Legend: U users, I items, N = U + I nodes, E stored entries (two an event), D width.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError, Interactions

BAG = 1 << 20  # multiplications from which a product on a CPU is worth a bag of embeddings
EDGES = 4096  # edges whose ends are gathered at once: two megabytes of 64 columns

# torch says this once a process for every CSR tensor; what is used of it here is covered by tests
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


class CSR(NamedTuple):
    """A sparse matrix (N, M): row starts (N + 1,), columns (E,), values (E,) and M, without a gradient."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    def tensor(self) -> Tensor:
        """The same as PyTorch's sparse CSR tensor, over the same memory."""
        shape = len(self.starts) - 1, self.width
        return torch.sparse_csr_tensor(self.starts, self.columns, self.values, shape, check_invariants=False)

    def __matmul__(self, x: Tensor) -> Tensor:
        """(M, D) -> (N, D) in the values' dtype, also where autocast is on (a backward may run inside it).

        On a CPU it is a bag of embeddings: of 237 thousand entries and 64 columns 1.5 ms on one thread, where the
        product of PyTorch's CSR tensor takes 4.1 and of its COO tensor 11.8. Forward and backward, in one run, PyG's
        ``LGConv`` takes 2 to 5 times as long over the CSR tensor and 20 to 30 times over an edge index.
        """
        x = x.detach().to(self.values.dtype)
        if x.is_cuda or len(self.columns) * x.shape[1] < BAG:
            with torch.autocast(x.device.type, enabled=False):
                return self.tensor() @ x
        rows, values = x.contiguous(), self.values
        return F.embedding_bag(
            self.columns, rows, self.starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )


class _Product(torch.autograd.Function):
    """(A + A^2 + ... + A^layers) x, ``own`` x beside it: a sum over layers, added up in place.

    Its backward is the same of the A^T given: the transposed copy that autograd would make is never made, and the
    layers between need not be kept.
    """

    @staticmethod
    def forward(ctx: Any, matrix: CSR, transposed: CSR, x: Tensor, layers: int, own: bool) -> Tensor:
        ctx.of = transposed, layers, own
        return _summed(matrix, x, layers, own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None, None]:
        transposed, layers, own = ctx.of
        return None, None, _summed(transposed, grads[0], layers, own), None, None


def _summed(matrix: CSR, x: Tensor, layers: int, own: bool) -> Tensor:
    """(own + A + ... + A^layers) x, as x + A (x + A (x + ...))."""
    total = x
    for left in range(layers, 0, -1):
        total = matrix @ total
        if left > 1 or own:
            total.add_(x)
    return total


class Propagation(nn.Module):
    """Multiply by a sparse matrix: (M, D) -> (N, D) for a matrix (N, M).

    The matrix is kept as plain buffers (CSR: row starts, columns, values), none persistent, so that copying, moving,
    checkpointing and broadcasting need no sparse support. A symmetric one is its own transpose in the backward; of
    another the transpose is kept beside it. ``symmetric`` says which it is; left out, it is looked at. Runs in the
    values' dtype (float32) outside autocast, since bfloat16 CSR products do not exist on the CPU. Raises ``DataError``
    for ``symmetric=True`` where it is not square.
    """

    def __init__(self, matrix: sp.spmatrix, *, symmetric: bool | None = None):
        super().__init__()
        csr = sp.csr_matrix(matrix, dtype=np.float32)
        self.shape: tuple[int, int] = csr.shape
        if symmetric is None:
            difference = csr - csr.T if self.shape[0] == self.shape[1] else None
            symmetric = difference is not None and not (difference.nnz and abs(difference).max() > 1e-6)
        if symmetric and self.shape[0] != self.shape[1]:
            raise DataError(f"propagation: a matrix {self.shape} cannot be symmetric")
        self._keep("", csr)
        self.symmetric = symmetric
        if not symmetric:
            self._keep("back_", csr.T.tocsr())

    def _keep(self, prefix: str, csr: sp.csr_matrix) -> None:
        csr.sort_indices()
        index = np.int32 if csr.nnz < 2**31 else np.int64  # half the bytes of the index wherever it fits
        parts = {"starts": csr.indptr.astype(index), "columns": csr.indices.astype(index), "values": csr.data.copy()}
        for name, part in parts.items():
            self.register_buffer(prefix + name, torch.from_numpy(part), persistent=False)

    def _csr(self, prefix: str, width: int) -> CSR:
        starts, columns, values = (self.get_buffer(prefix + name) for name in ("starts", "columns", "values"))
        return CSR(starts, columns, values, width)

    @property
    def csr(self) -> CSR:
        """The matrix (N, M), over the same memory."""
        return self._csr("", self.shape[1])

    def sparse(self) -> sp.csr_matrix:
        """The matrix as SciPy has it, on the CPU."""
        values, columns, starts = (self.get_buffer(n).cpu().numpy() for n in ("values", "columns", "starts"))
        return sp.csr_matrix((values, columns, starts), shape=self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_sum(x, 1, own=False)

    def layers_mean(self, x: Tensor, layers: int) -> Tensor:
        """The mean of x, A x, ..., A^layers x: (N, D) -> (N, D), of a square matrix."""
        return self._apply_sum(x, layers, own=True) / (layers + 1) if layers else x

    def _apply_sum(self, x: Tensor, layers: int, *, own: bool) -> Tensor:
        back = self.csr if self.symmetric else self._csr("back_", self.shape[0])
        product: Tensor = _Product.apply(self.csr, back, x.to(back.values.dtype), layers, own)
        return product


def normalised_adjacency(train: Interactions, *, keep: np.ndarray | None = None) -> sp.csr_matrix:
    """D^-1/2 A D^-1/2 of the bipartite graph A = [[0, R], [R^T, 0]], He et al. 2020, eqs. 7 and 8; (N, N) float32.

    Users come first, then items. A node without an event has an empty row: nothing flows to it or from it. ``keep``,
    indices or a mask (E,) of training events, leaves the others out; degrees are those of what is left.
    """
    n_users, n_items = train.n_users, train.n_items
    users, items = (train.users, train.items) if keep is None else (train.users[keep], train.items[keep])
    of_user, of_item = np.bincount(users, minlength=n_users), np.bincount(items, minlength=n_items)
    weights = ((1 / np.sqrt(of_user[users])) * (1 / np.sqrt(of_item[items]))).astype(np.float32)
    r = sp.csr_matrix((weights, (users, items)), shape=(n_users, n_items))
    back = r.T.tocsr()
    starts = np.concatenate([r.indptr, r.nnz + back.indptr[1:]])
    columns = np.concatenate([r.indices + n_users, back.indices])
    size = n_users + n_items
    return sp.csr_matrix((np.concatenate([r.data, back.data]), columns, starts), shape=(size, size))


def normalised_events(train: Interactions, *, mean: bool = False) -> sp.csr_matrix:
    """R, the events as a matrix (U, I) float32 with 1 / (sqrt(d_u) sqrt(d_i)), or with ``mean`` with 1 / d_u, a
    cell."""
    of_user, of_item = train.user_counts, train.item_counts
    cells = 1 / of_user[train.users] if mean else 1 / np.sqrt(of_user[train.users] * of_item[train.items].astype(float))
    shape = train.n_users, train.n_items
    return sp.csr_matrix((cells.astype(np.float32), (train.users, train.items)), shape=shape)


def mean_adjacency(train: Interactions) -> sp.csr_matrix:
    """D^-1 A of the bipartite graph, (N, N) float32: each row is the mean of a node's neighbours, or empty."""
    symmetric = normalised_adjacency(train)
    degree = np.concatenate([train.user_counts, train.item_counts])
    cells = np.repeat(1 / np.maximum(degree, 1), np.diff(symmetric.indptr)).astype(np.float32)
    return sp.csr_matrix((cells, symmetric.indices, symmetric.indptr), shape=symmetric.shape)


class LightGraph(nn.Module):
    """LightGCN's encoder: users (U, D), items (I, D) -> users (U, D), items (I, D), no parameters of its own.

    E^(k+1) = D^-1/2 A D^-1/2 E^(k), He et al. 2020, eqs. 3 and 7; the result is the mean of layers 0..K (eq. 4 with
    alpha_k = 1 / (K + 1), the paper's choice). A node without an event keeps E^(0) / (K + 1): finite, and small.
    ``through`` is another propagation than that of all training events: one of fewer edges, while a model trains.
    """

    def __init__(self, train: Interactions, *, layers: int = 2):
        super().__init__()
        if layers < 0:
            raise DataError(f"layers={layers}: how often to propagate, 0 or more")
        self.layers = layers
        self.sizes = [train.n_users, train.n_items]
        self.propagation = Propagation(normalised_adjacency(train), symmetric=True)

    def forward(self, users: Tensor, items: Tensor, *, through: Propagation | None = None) -> tuple[Tensor, Tensor]:
        propagation = self.propagation if through is None else through
        out_users, out_items = propagation.layers_mean(torch.cat([users, items]), self.layers).split(self.sizes)
        return out_users, out_items


class _EdgeDots(torch.autograd.Function):
    """Inner products of both ends of every edge; see ``Edges.dots``. Their gradients are weighted sums over edges."""

    @staticmethod
    def forward(ctx: Any, edges: Edges, users: Tensor, items: Tensor) -> Tensor:
        ctx.edges = edges
        ctx.save_for_backward(users, items)
        return _dots(users, items, edges.users, edges.items)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        users, items = ctx.saved_tensors
        return None, ctx.edges.matrix(grads[0]) @ items, ctx.edges.matrix(grads[0], back=True) @ users


def _dots(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """x[of_x] . y[of_y] row by row: (N, D), (M, D), (E,), (E,) -> (E,), in blocks that stay in a processor's cache."""
    pairs = zip(of_x.split(EDGES), of_y.split(EDGES), strict=True)
    return torch.cat([x.index_select(0, a).mul_(y.index_select(0, b)).sum(-1) for a, b in pairs])


class _EdgeSum(torch.autograd.Function):
    """Weighted sums over the edges of one side's nodes; see ``Edges.to_users``."""

    @staticmethod
    def forward(ctx: Any, edges: Edges, back: bool, weights: Tensor, x: Tensor) -> Tensor:
        ctx.edges, ctx.back = edges, back
        ctx.save_for_backward(weights, x)
        return edges.matrix(weights, back=back) @ x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        weights, x = ctx.saved_tensors
        edges, gradient = ctx.edges, grads[0].contiguous()
        of_weights = of_x = None
        if ctx.needs_input_grad[2]:
            ends = (edges.items, edges.users) if ctx.back else (edges.users, edges.items)
            of_weights = _dots(gradient, x, *ends)
        if ctx.needs_input_grad[3]:
            of_x = edges.matrix(weights, back=not ctx.back) @ gradient
        return None, None, of_weights, of_x


class Edges(nn.Module):
    """The training events as edges with weights that are computed, and may have a gradient: sums and softmaxes of them.

    Weights are (E,), in the order of ``users`` and ``items`` (E,), ascending by user. Products are of CSR matrices, an
    order of magnitude faster here than gathering and scattering an (E, D) array.
    """

    users: Tensor
    items: Tensor
    order: Tensor

    def __init__(self, train: Interactions):
        super().__init__()
        csr = train.csr
        users = np.repeat(np.arange(train.n_users), np.diff(csr.indptr))
        order = np.argsort(csr.indices, kind="stable")
        starts = np.concatenate([[0], np.cumsum(train.item_counts)])
        parts = {"users": users, "items": csr.indices, "order": order, "starts": csr.indptr, "back_starts": starts}
        parts["back_users"] = users[order]
        for name, part in parts.items():
            self.register_buffer(name, torch.from_numpy(np.asarray(part, dtype=np.int64)), persistent=False)
        self.shape = train.n_users, train.n_items

    def matrix(self, weights: Tensor, *, back: bool = False) -> CSR:
        """The weights as a sparse matrix, (U, I), or with ``back`` (I, U)."""
        values = weights.detach()
        if back:
            return CSR(self.get_buffer("back_starts"), self.get_buffer("back_users"), values[self.order], self.shape[0])
        return CSR(self.get_buffer("starts"), self.items, values, self.shape[1])

    def to_users(self, weights: Tensor, items: Tensor) -> Tensor:
        """Each user's sum over its events e of weights_e items_e: (E,), (I, D) -> (U, D)."""
        total: Tensor = _EdgeSum.apply(self, False, weights, items)
        return total

    def to_items(self, weights: Tensor, users: Tensor) -> Tensor:
        """Each item's sum over its events e of weights_e users_e: (E,), (U, D) -> (I, D)."""
        total: Tensor = _EdgeSum.apply(self, True, weights, users)
        return total

    def dots(self, users: Tensor, items: Tensor) -> Tensor:
        """Inner products of both ends of every event: (U, D), (I, D) -> (E,)."""
        found: Tensor = _EdgeDots.apply(self, users, items)
        return found

    def softmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits (E,), over each user's events and over each item's: (E,), (E,)."""
        found = []
        for ends, size in zip((self.users, self.items), self.shape, strict=True):
            top = torch.full((size,), -torch.inf, dtype=logits.dtype, device=logits.device)
            top = top.scatter_reduce(0, ends, logits.detach(), "amax")
            value = torch.exp(logits - top.index_select(0, ends))
            found.append(value / torch.zeros_like(top).index_add(0, ends, value).index_select(0, ends))
        return found[0], found[1]

    def layers_sum(
        self, of_users: Tensor, of_items: Tensor, users: Tensor, items: Tensor, layers: int
    ) -> tuple[Tensor, Tensor]:
        """Users (U, D) and items (I, D) propagated ``layers`` times, the start and all layers added up; each event
        weighs ``of_users`` (E,) on its way to a user and ``of_items`` (E,) to an item."""
        total_users, total_items = users, items
        for _ in range(layers):
            users, items = self.to_users(of_users, items), self.to_items(of_items, users)
            total_users, total_items = total_users + users, total_items + items
        return total_users, total_items

    def routed(self, users: Tensor, items: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
        """Users drawn to those of their items that they are nearest to, and how much each event then weighs.

        ``rounds`` times p <- unit(p + sum over the user's items i of a_ui f_i), a the softmax over them of p . f_i (Wei
        et al. 2020, GRCN, arXiv 2111.02036): (U, D) and (I, D), rows at unit length or zero, -> p (U, D), and the
        softmax of p . f over each user's events and over each item's, (E,) and (E,).
        """
        for _ in range(rounds):
            users = F.normalize(users + self.to_users(self.softmax(self.dots(users, items))[0], items), dim=-1)
        return users, *self.softmax(self.dots(users, items))
