"""Graph propagation on the user-item graph: one symmetrically normalised matrix, sparse, in float32.

Legend: U users, I items, N = U + I nodes, E stored entries (two an event), D width.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError, Interactions

# torch says this once a process for every CSR tensor; what is used of it here is covered by tests
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


class _SymmetricProduct(torch.autograd.Function):
    """A @ x for a symmetric A, whose backward is A @ g: the transposed copy that autograd would make is never made."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _product(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _product(ctx.matrix, grads[0])


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix @ x in the matrix's dtype, also where autocast is on (a backward may run inside it)."""
    with torch.autocast(x.device.type, enabled=False):
        return matrix @ x.to(matrix.dtype)


class Propagation(nn.Module):
    """Multiply by a symmetric sparse matrix: (N, D) -> (N, D).

    The matrix is kept as three plain buffers (CSR: row starts, columns, values), none persistent, so that copying,
    moving, checkpointing and broadcasting need no sparse support. Runs in the values' dtype (float32) outside autocast,
    since bfloat16 CSR products do not exist on the CPU. Raises ``DataError`` when the matrix is not symmetric, because
    the backward relies on it.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, matrix: sp.spmatrix):
        super().__init__()
        csr = sp.csr_matrix(matrix, dtype=np.float32)
        csr.sort_indices()
        difference = csr - csr.T
        if csr.shape[0] != csr.shape[1] or (difference.nnz and abs(difference).max() > 1e-6):
            raise DataError(f"propagation needs a symmetric matrix; this one, {csr.shape}, is not")
        index = np.int32 if csr.nnz < 2**31 else np.int64  # half the bytes of the index wherever it fits
        self.register_buffer("starts", torch.from_numpy(csr.indptr.astype(index)), persistent=False)
        self.register_buffer("columns", torch.from_numpy(csr.indices.astype(index)), persistent=False)
        self.register_buffer("values", torch.from_numpy(csr.data.copy()), persistent=False)

    def matrix(self) -> Tensor:
        """The matrix as a sparse CSR tensor (N, N) over the same memory."""
        n = len(self.starts) - 1
        return torch.sparse_csr_tensor(self.starts, self.columns, self.values, (n, n), check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _SymmetricProduct.apply(self.matrix(), x.to(self.values.dtype))
        return product


def normalised_adjacency(train: Interactions) -> sp.csr_matrix:
    """D^-1/2 A D^-1/2 of the bipartite graph A = [[0, R], [R^T, 0]], He et al. 2020, eqs. 7 and 8; (N, N) float32.

    Users come first, then items. A node without an event has an empty row: nothing flows to it or from it.
    """
    r = train.csr
    degree = np.concatenate([train.user_counts, train.item_counts]).astype(np.float64)
    inverse = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    half = sp.diags(inverse)
    adjacency = sp.bmat([[None, r], [r.T, None]], format="csr", dtype=np.float64)
    return (half @ adjacency @ half).tocsr().astype(np.float32)


class LightGraph(nn.Module):
    """LightGCN's encoder: users (U, D), items (I, D) -> users (U, D), items (I, D), no parameters of its own.

    E^(k+1) = D^-1/2 A D^-1/2 E^(k), He et al. 2020, eqs. 3 and 7; the result is the mean of layers 0..K (eq. 4 with
    alpha_k = 1 / (K + 1), the paper's choice). A node without an event keeps E^(0) / (K + 1): finite, and small.
    """

    def __init__(self, train: Interactions, *, layers: int = 2):
        super().__init__()
        if layers < 0:
            raise DataError(f"layers={layers}: how often to propagate, 0 or more")
        self.layers = layers
        self.sizes = [train.n_users, train.n_items]
        self.propagation = Propagation(normalised_adjacency(train))

    def forward(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([users, items])
        total = x
        for _ in range(self.layers):
            x = self.propagation(x)
            total = total + x
        out_users, out_items = (total / (self.layers + 1)).split(self.sizes)
        return out_users, out_items
