"""Splits: train, validation and a sealed test part, and which items and users are cold.

Each split is a partition of the events: parts are disjoint and their union is the input. Legend: U users, I items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.runcard import content_hash
from mmllmrec.seed import generator

TRAIN, VALID, TEST = 0, 1, 2


class SealedError(RuntimeError):
    """The test part was reached for outside ``evaluate(..., on="test")``."""


@dataclass
class Split:
    """Training and validation events, and a sealed test part.

    ``warm_items`` (I,) bool have a training event; an item without one is cold. ``cold_users`` (U,) bool have none.
    ``test`` raises ``SealedError``: only ``evaluate(..., on="test")`` opens it (``open_test``), and counts.
    """

    name: str
    data: RecDataset
    train: Interactions
    valid: Interactions
    _test: Interactions = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    test_opened: int = 0

    @property
    def catalog(self) -> Catalog:
        """The catalogue of all items, cold ones included."""
        return self.data.catalog

    @property
    def warm_items(self) -> np.ndarray:
        return self.train.item_counts > 0

    @property
    def cold_users(self) -> np.ndarray:
        return self.train.user_counts == 0

    @property
    def test(self) -> Interactions:
        raise SealedError("the test part is sealed: use evaluate(..., on='test'), once, when the choices are made")

    def open_test(self) -> Interactions:
        """The test events; counted, and the count goes into every run card. For ``evaluate`` alone."""
        self.test_opened += 1
        return self._test

    @property
    def hash(self) -> str:
        """Hash of all three parts and of the id maps."""
        return content_hash(self.train.hash, self.valid.hash, self._test.hash)

    def describe(self) -> dict[str, Any]:
        """Name, hash, settings and sizes, for the run card."""
        return {
            "name": self.name,
            "data": self.data.name,
            "hash": self.hash,
            **self.settings,
            "users": self.train.n_users,
            "items": self.train.n_items,
            "train": len(self.train),
            "valid": len(self.valid),
            "test": len(self._test),
            "cold_items": int((~self.warm_items).sum()),
            "cold_users": int(self.cold_users.sum()),
        }

    def __repr__(self) -> str:
        d = self.describe()
        return (
            f"Split({self.name} of {d['data']}: {d['train']:,} train, {d['valid']:,} valid, "
            f"{d['test']:,} test (sealed); "
            f"{d['cold_items']:,} cold items, {d['cold_users']:,} cold users)"
        )


def _make(name: str, data: RecDataset, parts: np.ndarray, **settings: Any) -> Split:
    x = data.interactions
    train, valid, test = (x.select(parts == p) for p in (TRAIN, VALID, TEST))
    if not len(train):
        raise DataError(f"{name}: no event is left to train on; make the held-out shares smaller")
    return Split(name, data, train, valid, test, settings)


def _need_times(data: RecDataset, name: str) -> np.ndarray:
    if data.interactions.times is None:
        raise DataError(f"splits.{name} needs timestamps and {data.name!r} has none; use random_per_user")
    return data.interactions.times


def _random_parts(x: Interactions, ratio: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Each user's events dealt to the parts in ``ratio``: floor(share * n) to validation and to test, at least one
    each from three events on, the rest to train. (N,) -> (N,) int8."""
    if len(ratio) != 3 or min(ratio) < 0 or ratio[0] <= 0:
        raise DataError(f"ratio={ratio}: give (train, valid, test), train above zero")
    share = np.asarray(ratio, dtype=float) / sum(ratio)
    order = np.lexsort((rng.random(len(x)), x.users))
    counts = x.user_counts
    start = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.empty(len(x), dtype=np.int64)
    rank[order] = np.arange(len(x)) - start[x.users[order]]

    def held(p: int) -> np.ndarray:
        n = np.floor(share[p] * counts + 1e-9).astype(np.int64)
        return np.where((counts >= 3) & (share[p] > 0), np.maximum(n, 1), n)

    n_test, n_valid = held(TEST)[x.users], held(VALID)[x.users]
    parts = np.full(len(x), TRAIN, dtype=np.int8)
    parts[rank < n_test + n_valid] = VALID
    parts[rank < n_test] = TEST
    return parts


def given(data: RecDataset) -> Split:
    """The source's own division (``x_label`` of an ``.inter`` file, ``split`` in a folder of yours)."""
    if data.parts is None:
        raise DataError(f"{data.name!r} brings no division of its own; use random_per_user or another split")
    return _make("given", data, data.parts)


def random_per_user(data: RecDataset, *, ratio: tuple[float, float, float] = (8, 1, 1), seed: int = 0) -> Split:
    """Each user's events divided at random in ``ratio`` (train : valid : test). Users with one or two events stay in
    train whole."""
    rng = generator(seed, "random_per_user")
    return _make("random_per_user", data, _random_parts(data.interactions, ratio, rng), ratio=list(ratio), seed=seed)


def leave_last(data: RecDataset, *, seed: int = 0) -> Split:
    """Each user's last event to test, the one before to validation; ties in time are broken at random by ``seed``.
    Users with fewer than three events stay in train whole. Needs timestamps."""
    times = _need_times(data, "leave_last")
    x = data.interactions
    order = np.lexsort((generator(seed, "leave_last").random(len(x)), -times, x.users))
    start = np.concatenate([[0], np.cumsum(x.user_counts)[:-1]])
    rank = np.empty(len(x), dtype=np.int64)
    rank[order] = np.arange(len(x)) - start[x.users[order]]
    enough = x.user_counts[x.users] >= 3
    parts = np.full(len(x), TRAIN, dtype=np.int8)
    parts[enough & (rank == 1)] = VALID
    parts[enough & (rank == 0)] = TEST
    return _make("leave_last", data, parts, seed=seed)


def temporal(data: RecDataset, *, valid: float = 0.1, test: float = 0.1) -> Split:
    """Global cut-off in time: the last ``test`` share of events is test, the ``valid`` share before it validation, as
    a deployed system would meet them; events of one second stay in one part. Needs timestamps. Deterministic."""
    times = _need_times(data, "temporal")
    if not (valid >= 0 and test > 0 and valid + test < 1):
        raise DataError(f"valid={valid}, test={test}: shares of the events, together below 1")
    # the cut falls between two distinct times, so that no second is divided
    ordered = np.sort(times)
    cut_valid = ordered[int(len(times) * (1 - valid - test))]
    cut_test = ordered[int(len(times) * (1 - test))]
    parts = np.where(times >= cut_test, TEST, np.where(times >= cut_valid, VALID, TRAIN)).astype(np.int8)
    return _make("temporal", data, parts, valid_share=valid, test_share=test)


def cold_items(
    data: RecDataset,
    *,
    fraction: float = 0.2,
    ratio: tuple[float, float, float] = (8, 1, 1),
    seed: int = 0,
) -> Split:
    """``fraction`` of the items held out of training whole, stratified by popularity, half for validation and half for
    test; the other items' events are divided per user in ``ratio``, so that warm and cold rows come from one model."""
    if not 0 < fraction < 1:
        raise DataError(f"fraction={fraction}: a share of the items, between 0 and 1")
    x = data.interactions
    rng = generator(seed, "cold_items")
    kind = _stratified(x.item_counts, fraction, rng)
    return _hold_out("cold_items", data, kind[x.items], ratio, rng, fraction=fraction, seed=seed)


def cold_users(
    data: RecDataset,
    *,
    fraction: float = 0.2,
    ratio: tuple[float, float, float] = (8, 1, 1),
    seed: int = 0,
) -> Split:
    """``fraction`` of the users held out of training whole, stratified by their number of events, half for validation
    and half for test; the other users' events are divided per user in ``ratio``."""
    if not 0 < fraction < 1:
        raise DataError(f"fraction={fraction}: a share of the users, between 0 and 1")
    x = data.interactions
    rng = generator(seed, "cold_users")
    kind = _stratified(x.user_counts, fraction, rng)
    return _hold_out("cold_users", data, kind[x.users], ratio, rng, fraction=fraction, seed=seed)


def cold_both(
    data: RecDataset,
    *,
    fraction: float = 0.2,
    users: float = 0.1,
    ratio: tuple[float, float, float] = (8, 1, 1),
    seed: int = 0,
) -> Split:
    """``fraction`` of the items and ``users`` of the users held out of training whole, so that one model serves the
    rows of both: as ``cold_items`` holds out items (the same ones for a seed), and ``cold_users`` users.

    An event of a cold user goes to that user's part, whatever its item, so that a cold user's history is in one part;
    one of another user with a cold item to the item's part; the others are divided per user in ``ratio``. Tables and
    curves take the two apart: their rows warm, cold and cold only are about users whom training knows, and a cold
    user's curve about items that it knows.
    """
    for name, value in (("fraction", fraction), ("users", users)):
        if not 0 < value < 1:
            raise DataError(f"{name}={value}: a share, between 0 and 1")
    x = data.interactions
    items = _stratified(x.item_counts, fraction, generator(seed, "cold_items"))[x.items]
    people = _stratified(x.user_counts, users, generator(seed, "cold_users"))[x.users]
    kind = np.where(people == TRAIN, items, people)
    settings = {"fraction": fraction, "users_fraction": users, "seed": seed}
    return _hold_out("cold_both", data, kind, ratio, generator(seed, "cold_both"), **settings)


def _stratified(counts: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """TRAIN, VALID or TEST for each id: in each run of ids of like count the same share is held out. (n,) -> (n,)."""
    order = np.lexsort((rng.random(len(counts)), counts))
    kind = np.full(len(counts), TRAIN, dtype=np.int8)
    # along the order of popularity, floor() steps of a line of slope fraction/2 mark one id each, at a random phase
    phase = rng.random()
    marks = np.floor(np.arange(len(counts) + 1) * fraction + phase)
    held = order[np.flatnonzero(np.diff(marks) > 0)]
    # neighbours in popularity go one to validation and one to test, which one by a coin
    coin = rng.integers(0, 2, size=(len(held) + 1) // 2)
    sides = np.stack([coin, 1 - coin], axis=1).reshape(-1)[: len(held)]
    kind[held] = np.where(sides == 1, TEST, VALID)
    return kind


def _hold_out(
    name: str,
    data: RecDataset,
    kind: np.ndarray,
    ratio: tuple[float, float, float],
    rng: np.random.Generator,
    **settings: Any,
) -> Split:
    x = data.interactions
    rest = np.flatnonzero(kind == TRAIN)
    parts = kind.copy()
    parts[rest] = _random_parts(x.select(rest), ratio, rng)
    return _make(name, data, parts, ratio=list(ratio), **settings)


SPLITS: dict[str, Callable[..., Split]] = {
    f.__name__: f for f in (random_per_user, leave_last, temporal, cold_items, cold_users, cold_both, given)
}


def by_name(kind: str, data: RecDataset, *, seed: int) -> Split:
    """A split of that name with its own defaults; ``seed`` goes to those that draw. Raises ``DataError`` for others."""
    if kind not in SPLITS:
        raise DataError(f"unknown split {kind!r}; splits are {sorted(SPLITS)}")
    return SPLITS[kind](data, **({} if kind in ("given", "temporal") else {"seed": seed}))
