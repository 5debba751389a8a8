"""Curves: what a handful of events is worth to users or items that training has not seen; what missing content costs.

Legend: N events, k events revealed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.protocols import rankings, seen_matrix
from mmllmrec.evaluation.ranking import find, name_of, top
from mmllmrec.evaluation.report import scorer_of
from mmllmrec.evaluation.significance import interval
from mmllmrec.runcard import RunCard, write_atomically
from mmllmrec.seed import generator


@dataclass(repr=False)
class Curve:
    """Means over users at each place of an axis: ``frame`` has a row a (system, place): mean, low, high (95%), users,
    adapts. ``axis`` is the column of the places (``"k"``, ``"missing"``), ``label`` what it is called in a figure."""

    frame: pd.DataFrame
    metric: str
    card: RunCard
    axis: str = "k"
    label: str = ""

    def table(self) -> pd.DataFrame:
        """A line a system, a column a place: mean +- half of the 95% interval."""
        f = self.frame
        cells = [f"{m:.4f} ±{(b - a) / 2:.4f}" for m, a, b in zip(f["mean"], f["low"], f["high"], strict=True)]
        return f.assign(cell=cells).pivot(index="system", columns=self.axis, values="cell").loc[f["system"].unique()]

    def plot(self) -> Any:
        """A line a system with its 95% interval; dashed where the system cannot follow. Returns the figure."""
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(6.8, 3.4))
        for name, part in self.frame.groupby("system", sort=False):
            style = "-" if part["adapts"].all() else "--"
            (line,) = axis.plot(part[self.axis], part["mean"], style, marker="o", markersize=4, label=name)
            axis.fill_between(
                part[self.axis], part["low"], part["high"], color=line.get_color(), alpha=0.15, linewidth=0
            )
        axis.set_xticks(sorted(self.frame[self.axis].unique()))
        axis.set_xlabel(self.label)
        axis.set_ylabel(self.metric)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        return figure

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``card.json`` and ``table.txt`` to ``folder``, at once; the card's path."""

        def write(beside: Path) -> None:
            beside.mkdir()
            self.card.save(beside / "card.json")
            (beside / "table.txt").write_text(f"{self}\n", encoding="utf-8")

        return write_atomically(folder, write) / "card.json"

    def __repr__(self) -> str:
        return f"Curve({self.metric} by {self.label}; {', '.join(self.frame['system'].unique())})"

    def __str__(self) -> str:
        s = self.card
        where = f"{s.settings['on']} of {s.split['name']}({s.data})"
        return f"{self.metric} by {self.label}, {where}\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        return self.table().to_html()


def k_shot(
    systems: Sequence[Any],
    split: Split,
    *,
    of: str = "users",
    ks: Sequence[int] = (0, 1, 2, 4),
    on: str = "valid",
    mask: str = "train+valid",
    metric: str = "ndcg@20",
    seed: int = 0,
) -> Curve:
    """Rank for cold ``of`` (``"users"`` or ``"items"``) when k of their events are known, for each of ``ks``.

    Of each cold user (item) with more than max(ks) events in the part ``on``, max(ks) drawn by ``seed`` may be
    revealed; the others are to be found, the same ones at every k, so that only the history moves the curve. What may
    be revealed is masked at every k. A scorer with ``with_history`` gets training events and the k revealed ones;
    another one cannot use them and stays where it is (``adapts`` is False). One thing at a time is new: a cold user's
    events are those with items that training knows, a cold item's those of users it knows. Raises ``DataError`` when no
    cold one has enough events.
    """
    if of not in ("users", "items"):
        raise DataError(f"of={of!r}: use 'users' or 'items'")
    if min(ks, default=-1) < 0:
        raise DataError(f"ks={tuple(ks)}: give numbers of events, such as (0, 1, 2, 4)")
    began = time.perf_counter()
    seen = seen_matrix(split, on=on, mask=mask)
    target = split.open_test() if on == "test" else split.valid
    events, place, size = _dealt(target, split, of, generator(seed, "k-shot"))
    most = max(ks)
    enough = size > most
    if not enough.any():
        raise DataError(f"no cold {of[:-1]} of {split.name} has more than {most} events in {on}: use smaller ks")
    positives = events.select(enough & (place >= most))
    seen = (seen + events.select(enough & (place < most)).csr).tocsr()
    users = np.flatnonzero(positives.user_counts > 0)

    def measure(scorer: Any, k: float) -> np.ndarray:
        one = scorer.with_history(split.train.union(events.select(enough & (place < k)))) if k else scorer
        lists = top(one, users, target.n_items, seen=seen, k=int(metric.partition("@")[2] or 0), seed=seed)
        return find(lists, positives).per_user(metric)

    return _curve(
        "k-shot",
        _walk(systems, ks, "with_history", measure),
        split,
        axis="k",
        label=f"events known of a cold {of[:-1]}",
        settings={"of": of, "ks": list(ks), "on": on, "mask": mask if on == "test" else "train", "metric": metric},
        seed=seed,
        began=began,
    )


def missing_content(
    systems: Sequence[Any],
    split: Split,
    *,
    of: str = "modalities",
    shares: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8),
    row: str = "all",
    on: str = "valid",
    mask: str = "train+valid",
    metric: str = "ndcg@20",
    seed: int = 0,
) -> Curve:
    """Rank when content is missing at scoring time, nothing being trained again.

    ``of="modalities"``: a share of the items lose one modality each (``Catalog.thinned``); ``"channels"``: each item
    loses that share of its sensor's channels (``Catalog.without_channels``), for models that read a sensor channel by
    channel. The same content is missing for every system. ``row`` is a row of the split's table
    (``protocols.rankings``). A scorer without ``with_catalog`` reads no content and stays where it is (``adapts`` is
    False). Raises ``DataError`` for another ``of``, for shares outside 0..1, and for a row that the split has not.
    """
    if of not in ("modalities", "channels"):
        raise DataError(f"of={of!r}: use 'modalities' or 'channels'")
    if not shares or not 0 <= min(shares) <= max(shares) <= 1:
        raise DataError(f"shares={tuple(shares)}: give shares from 0 to 1, such as (0, 0.4, 0.8)")
    began = time.perf_counter()
    seen = seen_matrix(split, on=on, mask=mask)
    target = split.open_test() if on == "test" else split.valid
    catalogs = {
        s: split.catalog.thinned(s, seed=seed)
        if of == "modalities"
        else split.catalog.without_channels("sensor", s, seed=seed)
        for s in shares
    }

    def measure(scorer: Any, share: float) -> np.ndarray:
        one = scorer.with_catalog(catalogs[share]) if share else scorer
        found = rankings(one, split, target, seen=seen, k=int(metric.partition("@")[2] or 0), seed=seed)
        if row not in found:
            raise DataError(f"row={row!r}: {split.name} has {list(found)}")
        return found[row].per_user(metric)

    what = "items that lose a modality" if of == "modalities" else "an item's channels that are missing"
    settings = {"of": of, "shares": list(shares), "row": row, "on": on, "mask": mask if on == "test" else "train"}
    return _curve(
        "missing content",
        _walk(systems, shares, "with_catalog", measure),
        split,
        axis="missing",
        label=f"share of {what}",
        settings=settings | {"metric": metric},
        seed=seed,
        began=began,
    )


def _walk(
    systems: Sequence[Any], places: Sequence[float], follows: str, measure: Callable[[Any, float], np.ndarray]
) -> list[list[Any]]:
    """A row a (system, place) of a curve's frame: ``measure`` (scorer, place) gives the users' values there. A scorer
    without the method ``follows`` cannot follow: it is measured once, at place 0."""
    rows = []
    for system in systems:
        scorer = scorer_of(system)
        adapts = hasattr(scorer, follows)
        if follows == "with_history" and hasattr(scorer, "settled"):
            scorer = scorer.settled()
        values = np.zeros(0)
        for place in places:
            if adapts or not len(values):
                values = measure(scorer, place if adapts else 0)
            rows.append([name_of(system), place, values.mean(), *interval(values), len(values), adapts])
    return rows


def _curve(
    name: str,
    rows: list[list[Any]],
    split: Split,
    *,
    axis: str,
    label: str,
    settings: dict[str, Any],
    seed: int,
    began: float,
) -> Curve:
    """A curve and its card from the rows of ``_walk``; ``began`` is a reading of the clock."""
    metric = settings["metric"]
    card = RunCard(
        kind="curve",
        name=name,
        seed=seed,
        data=split.data.name,
        split=split.describe(),
        settings=settings,
        metrics={f"{s} | {place} | {metric}": [m, low, high] for s, place, m, low, high, _, _ in rows},
        seconds=round(time.perf_counter() - began, 3),
        test_opened=split.test_opened,
    )
    frame = pd.DataFrame(rows, columns=["system", axis, "mean", "low", "high", "users", "adapts"])
    return Curve(frame, metric, card, axis=axis, label=label)


def _dealt(
    target: Interactions, split: Split, of: str, rng: np.random.Generator
) -> tuple[Interactions, np.ndarray, np.ndarray]:
    """The events of cold users (items), each one's place, from 0, in a random order of its owner's, and how many the
    owner has: (N,) each."""
    cold_user, cold_item = split.cold_users[target.users], ~split.warm_items[target.items]
    events = target.select(cold_user & ~cold_item if of == "users" else cold_item & ~cold_user)
    owner = events.users if of == "users" else events.items
    order = np.lexsort((rng.random(len(owner)), owner))
    place = np.empty(len(owner), dtype=np.int64)
    place[order] = np.arange(len(owner)) - np.searchsorted(owner[order], owner[order])
    return events, place, np.bincount(owner, minlength=1)[owner]
