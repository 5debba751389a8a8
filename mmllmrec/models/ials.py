"""Matrix factorisation by the ``implicit`` library: weighted least squares (iALS), and BPR by lock-free SGD.

Legend: B users asked for, U users, I items, D width.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.models.base import ClosedForm
from mmllmrec.models.vectors import changed, means_of


class Factorised(ClosedForm):
    """Two factor matrices that a library computes from the training events at once: score(u, i) = x_u . y_i.

    Not trained by ``fit``, which only measures it; computed when first needed, in one thread, so that a seed gives the
    same factors. Users and items without an event are zero.
    """

    @property
    @abstractmethod
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Users (U, D) and items (I, D), float32; a subclass computes them once."""

    def embed(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Users (U, D) and items (I, D); a user whose events are not those of training is folded in."""
        users, items = self.factors
        others = changed(self.history, self.train_data)
        if others.any():
            users = np.where(others[:, None], self.folded(self.history, np.flatnonzero(others)), users)
        return torch.from_numpy(np.ascontiguousarray(users)), torch.from_numpy(items)

    def folded(self, history: sparse.csr_matrix, users: np.ndarray) -> np.ndarray:
        """Factors of all users by other events: (U, I) -> (U, D). The mean of their items', unless a method has
        better."""
        return means_of(history, torch.from_numpy(self.factors[1])).numpy()

    def score(self, users: np.ndarray | Tensor) -> Tensor:
        """Scores of all items, (B,) -> (B, I) float32."""
        all_users, items = self.embed()
        return all_users[torch.as_tensor(users).cpu()] @ items.T

    def with_history(self, history: Interactions) -> Self:
        _ = self.factors  # once, here, so that every copy shares it
        other: Self = super().with_history(history)  # type: ignore[assignment]
        return other

    def _fitted(self, model: Any, *, columns: int) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on threads of the linear algebra library
            model.fit(self.train_data.csr.astype(np.float32), show_progress=False)
        here = (self.train_data.user_counts > 0), (self.train_data.item_counts > 0)
        found = [
            np.ascontiguousarray(rows[:, :columns] * some[:, None], dtype=np.float32)
            for rows, some in zip((model.user_factors, model.item_factors), here, strict=True)
        ]
        return found[0], found[1]


class IALS(Factorised):
    """Weighted alternating least squares on implicit feedback.

    sum over all u, i of c_ui (p_ui - x_u . y_i)^2 + reg (sum of ||x_u||^2 + ||y_i||^2), p 1 for an event and 0
    elsewhere, c = 1 + ``alpha`` p, Hu et al. 2008, eqs. 3 to 5 (there, of hours of television, 40); ``implicit.als``,
    three conjugate-gradient steps a row (Takacs et al. 2011). A new user is its exact minimiser given the items. Raises
    ``DataError`` for a ``reg`` below 0.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        dim: int = 64,
        reg: float = 0.01,
        alpha: float = 10.0,
        iterations: int = 15,
        seed: int = 0,
    ):
        super().__init__(train, dim=dim, reg=reg, alpha=alpha, iterations=iterations, seed=seed)
        if reg < 0:
            raise DataError(f"reg={reg}: 0 or more")

    def _model(self) -> Any:
        from implicit.cpu.als import AlternatingLeastSquares

        c = self.config
        return AlternatingLeastSquares(
            factors=c["dim"],
            regularization=c["reg"],
            alpha=1 + c["alpha"],  # the library's is the confidence itself
            iterations=c["iterations"],
            num_threads=1,
            random_state=c["seed"],
        )

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        return self._fitted(self._model(), columns=self.config["dim"])

    def folded(self, history: sparse.csr_matrix, users: np.ndarray) -> np.ndarray:
        items = self.factors[1].astype(np.float64)
        gram, alpha = items.T @ items + self.config["reg"] * np.eye(items.shape[1]), self.config["alpha"]
        found = np.zeros((self.n_users, items.shape[1]), dtype=np.float32)
        for some in np.split(users, range(64, len(users), 64)):
            # eq. 4: (Y^T Y + alpha Y_u^T Y_u + reg 1) x = (1 + alpha) sum of y
            taken = np.unique(history[some].indices)
            outer = (items[taken, :, None] * items[taken, None]).reshape(len(taken), -1)
            own = (history[some][:, taken] @ outer).reshape(len(some), *gram.shape)
            sums = (1 + alpha) * (history[some] @ items)
            found[some] = np.linalg.solve(gram + alpha * own, sums[..., None])[..., 0]
        return found


class ImplicitBPR(Factorised):
    """BPR-MF by ``implicit.bpr``: stochastic gradient descent of single triples, Rendle et al. 2009, figure 4.

    The lock-free C++ of that library, here in one thread; items have a bias, the last column of the factors. An epoch
    is some forty times cheaper than one of ``BPR`` and worth as much less.
    """

    def __init__(
        self,
        train: Interactions,
        *,
        dim: int = 64,
        lr: float = 0.01,
        reg: float = 0.01,
        iterations: int = 100,
        seed: int = 0,
    ):
        super().__init__(train, dim=dim, lr=lr, reg=reg, iterations=iterations, seed=seed)

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        from implicit.cpu.bpr import BayesianPersonalizedRanking

        c = self.config
        model = BayesianPersonalizedRanking(
            factors=c["dim"],
            learning_rate=c["lr"],
            regularization=c["reg"],
            iterations=c["iterations"],
            num_threads=1,
            random_state=c["seed"],
        )
        return self._fitted(model, columns=c["dim"] + 1)

    def folded(self, history: sparse.csr_matrix, users: np.ndarray) -> np.ndarray:
        found = super().folded(history, users)
        found[:, -1] = np.diff(history.indptr) > 0  # what the items' biases are multiplied by
        return found
