"""Interactions: who took what and when, as validated integer arrays beside their external ids.

Legend: N events, U users, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from mmllmrec.runcard import content_hash

USER, ITEM, TIME = "user_id", "item_id", "timestamp"


class DataError(ValueError):
    """Bad input, named by file, row or argument, with what to do about it."""


class IdMap:
    """External ids <-> internal positions 0..n-1. External ids are strings, unique, in a fixed order.

    >>> ids = IdMap(["b", "a"])
    >>> ids.index(["a", "b", "a"]).tolist(), ids[0], "c" in ids, len(ids)
    ([1, 0, 1], 'b', False, 2)
    """

    def __init__(self, ids: Sequence[Any], *, what: str = "id"):
        self.what = what
        self._ids = [str(i) for i in ids]
        self._index = {name: position for position, name in enumerate(self._ids)}
        if len(self._index) != len(self._ids):
            seen: set[str] = set()
            twice = next(i for i in self._ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise DataError(f"{what} {twice!r} appears twice; each {what} must be unique: drop or rename the duplicate")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, position: int) -> str:
        return self._ids[position]

    def __contains__(self, external: object) -> bool:
        return str(external) in self._index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdMap) and self._ids == other._ids

    def __hash__(self) -> int:
        return hash(tuple(self._ids))

    def __repr__(self) -> str:
        return f"IdMap({len(self)} {self.what}s)"

    @property
    def ids(self) -> list[str]:
        """All external ids, in internal order."""
        return list(self._ids)

    def index(self, external: Sequence[Any]) -> np.ndarray:
        """Internal positions of external ids: n ids -> (n,) int64. Raises ``DataError`` on the first unknown one."""
        try:
            return np.fromiter((self._index[str(e)] for e in external), dtype=np.int64, count=len(external))
        except KeyError:
            row, name = next((r, e) for r, e in enumerate(external) if str(e) not in self._index)
            raise DataError(
                f"row {row}: unknown {self.what} {str(name)!r} (not among the {len(self)} known); "
                "add it or drop its rows"
            ) from None


@dataclass(frozen=True)
class Interactions:
    """Implicit feedback: event n says that ``users[n]`` took ``items[n]`` at ``times[n]``.

    users, items (N,) int64 internal ids; times (N,) int64 seconds, or None where unknown. A (user, item) pair occurs
    once. Two ``Interactions`` with the same id maps can be compared, and a part keeps its parent's maps: a user or an
    item without an event in a part is still there, with an empty row.
    Raises ``DataError`` on negative or unknown ids, duplicates, negative times and length mismatches.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    user_ids: IdMap
    item_ids: IdMap

    def __post_init__(self) -> None:
        n = len(self.users)
        for name in ("users", "items", "times"):
            values = getattr(self, name)
            if values is None:
                continue
            values = np.asarray(values)
            if len(values) != n:
                raise DataError(f"{name} has {len(values)} rows, users has {n}: give one value an event")
            if not np.issubdtype(values.dtype, np.integer) and n:
                raise DataError(f"{name} must be integers, got {values.dtype}: round or map them first")
            values = np.array(values, dtype=np.int64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        for name, size in (("users", self.n_users), ("items", self.n_items)):
            values = getattr(self, name)
            bad = np.flatnonzero((values < 0) | (values >= size))
            if bad.size:
                raise DataError(f"row {bad[0]}: {name} has id {values[bad[0]]}, outside 0..{size - 1}")
        if self.times is not None and n and self.times.min() < 0:
            raise DataError(
                f"row {int(self.times.argmin())}: negative time {self.times.min()}; give seconds since 1970"
            )
        key = np.sort(self.users * self.n_items + self.items)
        twice = np.flatnonzero(key[1:] == key[:-1])
        if twice.size:
            user, item = divmod(int(key[twice[0]]), self.n_items)
            rows = np.flatnonzero((self.users == user) & (self.items == item))
            raise DataError(
                f"rows {rows[0]} and {rows[1]}: user {self.user_ids[user]!r} takes item {self.item_ids[item]!r} twice; "
                "keep one, or pass duplicates='first' where the table is read"
            )

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        user: str = USER,
        item: str = ITEM,
        time: str | None = TIME,
        user_ids: IdMap | None = None,
        item_ids: IdMap | None = None,
        duplicates: str = "error",
        source: str = "interactions",
    ) -> Interactions:
        """Build from a table with one row an event.

        Id maps default to the ids found, sorted. ``duplicates="first"`` keeps a pair's earliest event instead of
        raising. ``source`` names the file in errors. Raises ``DataError`` on a missing column, an empty table, NaN,
        an id outside a given map.
        """
        for column in (user, item, *([time] if time else [])):
            if column not in frame.columns:
                raise DataError(f"{source}: column {column!r} is missing; it has {list(frame.columns)}")
            empty = np.flatnonzero(frame[column].isna().to_numpy())
            if empty.size:
                raise DataError(f"{source}, row {empty[0]}: column {column!r} is empty; fill it or drop the row")
        if frame.empty:
            raise DataError(f"{source}: no interactions; there is nothing to learn from")
        if duplicates not in ("error", "first"):
            raise DataError(f"duplicates={duplicates!r}: use 'error' or 'first'")
        frame = frame.reset_index(drop=True)
        times = None
        if time:
            if pd.api.types.is_datetime64_any_dtype(frame[time]):  # pandas would count them in its own unit
                raise DataError(f"{source}: {time} holds dates ({frame[time].dtype}); save whole seconds since 1970")
            values = pd.to_numeric(frame[time], errors="coerce")
            seconds = values.to_numpy(dtype=float)
            bad = np.flatnonzero(~(np.isfinite(seconds) & (seconds >= 0)))
            if bad.size:
                raise DataError(f"{source}, row {bad[0]}: {time} is {frame[time][bad[0]]!r}, not seconds since 1970")
            times = values.to_numpy().astype(np.int64)
        user_ids = user_ids or IdMap(sorted(set(frame[user].astype(str)), key=_natural), what="user id")
        item_ids = item_ids or IdMap(sorted(set(frame[item].astype(str)), key=_natural), what="item id")
        try:
            users, items = user_ids.index(frame[user].tolist()), item_ids.index(frame[item].tolist())
            if duplicates == "first":  # after the ids are known: their errors name the table's own rows
                order = np.argsort(times, kind="stable") if times is not None else np.arange(len(frame))
                keep = np.sort(order[np.unique((users * len(item_ids) + items)[order], return_index=True)[1]])
                users, items, times = users[keep], items[keep], times[keep] if times is not None else None
            return cls(users, items, times, user_ids, item_ids)
        except DataError as error:
            raise DataError(f"{source}: {error}") from None

    def __len__(self) -> int:
        return len(self.users)

    def __repr__(self) -> str:
        return f"Interactions({len(self):,} events, {self.n_users:,} users, {self.n_items:,} items)"

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    def to_pyg(self, *, features: Any = None) -> Any:
        """The events as a ``torch_geometric.data.HeteroData``: node types ``user`` and ``item``, edges ``(user, takes,
        item)`` with ``edge_index`` (2, E) and, where there are times, ``time`` (E,), and their reverse ``(item, taken
        by, user)``. Nodes have the numbers they have here. ``features``, a ``FeatureTable``, puts all modalities side
        by side as ``x`` (I, F) and who has what as ``presence`` (I, M). Raises ``DataError`` without the package.
        """
        try:
            from torch_geometric.data import HeteroData
        except ImportError:
            raise DataError("to_pyg needs the package torch_geometric: pip install 'mmllmrec[pyg]'") from None
        import torch

        data, ends = HeteroData(), torch.from_numpy(np.stack([self.users, self.items]))
        data["user"].num_nodes, data["item"].num_nodes = self.n_users, self.n_items
        data["user", "takes", "item"].edge_index = ends
        data["item", "taken by", "user"].edge_index = ends.flip(0)
        if self.times is not None:
            for kind in (("user", "takes", "item"), ("item", "taken by", "user")):
                data[kind].time = torch.from_numpy(self.times.copy())
        if features is not None:
            if len(features) != self.n_items:
                raise DataError(f"features have {len(features)} rows; there are {self.n_items} items")
            data["item"].x = torch.from_numpy(features.concatenated())
            data["item"].presence = torch.from_numpy(features.presence.copy())
        return data

    def select(self, which: np.ndarray) -> Interactions:
        """The events at ``which`` (boolean mask or positions), with the same id maps."""
        times = self.times[which] if self.times is not None else None
        return Interactions(self.users[which], self.items[which], times, self.user_ids, self.item_ids)

    def union(self, other: Interactions) -> Interactions:
        """Both sets of events; raises ``DataError`` when they share a pair or do not share their id maps."""
        if (self.user_ids, self.item_ids) != (other.user_ids, other.item_ids):
            raise DataError("these interactions have different id maps and cannot be joined")
        times = None
        if self.times is not None and other.times is not None:
            times = np.concatenate([self.times, other.times])
        users, items = np.concatenate([self.users, other.users]), np.concatenate([self.items, other.items])
        return Interactions(users, items, times, self.user_ids, self.item_ids)

    @cached_property
    def csr(self) -> sp.csr_matrix:
        """The binary user-item matrix, (U, I) float32 CSR with sorted indices. Do not write to it."""
        ones = np.ones(len(self), dtype=np.float32)
        matrix = sp.csr_matrix((ones, (self.users, self.items)), shape=(self.n_users, self.n_items))
        matrix.sort_indices()
        return matrix

    @cached_property
    def keys(self) -> np.ndarray:
        """user * I + item of every event, ascending, (N,) int64: what is in it has been taken."""
        users = np.repeat(np.arange(self.n_users), np.diff(self.csr.indptr))
        return users * self.n_items + self.csr.indices

    @cached_property
    def item_counts(self) -> np.ndarray:
        """Events an item has, (I,) int64."""
        return np.bincount(self.items, minlength=self.n_items)

    @cached_property
    def user_counts(self) -> np.ndarray:
        """Events a user has, (U,) int64."""
        return np.bincount(self.users, minlength=self.n_users)

    @cached_property
    def hash(self) -> str:
        """Hash of events and ids, independent of the order of the events."""
        order = np.lexsort((self.items, self.users))
        times = self.times[order] if self.times is not None else np.zeros(0)
        return content_hash(self.users[order], self.items[order], times, self.user_ids.ids, self.item_ids.ids)


def _natural(text: str) -> tuple[int, int, str]:
    """Sort key that puts '2' before '10'."""
    return (0, int(text), text) if text.isdecimal() else (1, 0, text)
