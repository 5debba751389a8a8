"""Curves: what a handful of events is worth to users or items that training has not seen.

Legend: N events, k events revealed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.protocols import seen_matrix
from mmllmrec.evaluation.ranking import find, name_of, top
from mmllmrec.evaluation.report import scorer_of
from mmllmrec.evaluation.significance import interval
from mmllmrec.runcard import RunCard, write_atomically
from mmllmrec.seed import generator


@dataclass
class Curve:
    """Means over users at each k: ``frame`` has a row a (system, k): mean, low, high (95%), users, adapts."""

    frame: pd.DataFrame
    metric: str
    card: RunCard

    def table(self) -> pd.DataFrame:
        """A line a system, a column a number of events: mean +- half of the 95% interval."""
        f = self.frame
        cells = [f"{m:.4f} ±{(b - a) / 2:.4f}" for m, a, b in zip(f["mean"], f["low"], f["high"], strict=True)]
        return f.assign(cell=cells).pivot(index="system", columns="k", values="cell").loc[f["system"].unique()]

    def plot(self) -> Any:
        """A line a system with its 95% interval; dashed where the system takes no history. Returns the figure."""
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(5.5, 3.4))
        for name, part in self.frame.groupby("system", sort=False):
            style = "-" if part["adapts"].all() else "--"
            (line,) = axis.plot(part["k"], part["mean"], style, marker="o", markersize=4, label=name)
            axis.fill_between(part["k"], part["low"], part["high"], color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xticks(sorted(self.frame["k"].unique()))
        axis.set_xlabel(f"events known of a cold {self.card.settings['of'][:-1]}")
        axis.set_ylabel(self.metric)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
        figure.tight_layout()
        return figure

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``card.json`` and ``table.txt`` to ``folder``, at once; the card's path."""

        def write(beside: Path) -> None:
            beside.mkdir()
            self.card.save(beside / "card.json")
            (beside / "table.txt").write_text(f"{self}\n", encoding="utf-8")

        return write_atomically(folder, write) / "card.json"

    def __str__(self) -> str:
        s = self.card
        where = f"{s.settings['on']} of {s.split['name']}({s.data})"
        return f"{self.metric} at k events of cold {s.settings['of']}, {where}\n{self.table().to_string()}"

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
    another one cannot use them and stays where it is (``adapts`` is False). Raises ``DataError`` when no cold one has
    enough events.
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
    rows = []
    for system in systems:
        scorer = scorer_of(system)
        adapts = hasattr(scorer, "with_history")
        values = np.zeros(0)
        for k in ks:
            if adapts or not len(values):
                one = scorer
                if adapts and k:
                    one = scorer.with_history(split.train.union(events.select(enough & (place < k))))
                lists = top(one, users, target.n_items, seen=seen, k=int(metric.partition("@")[2] or 0), seed=seed)
                values = find(lists, positives).per_user(metric)
            rows.append([name_of(system), k, values.mean(), *interval(values), len(values), adapts])
    card = RunCard(
        kind="curve",
        name="k-shot",
        seed=seed,
        data=split.data.name,
        split=split.describe(),
        settings={"of": of, "ks": list(ks), "on": on, "mask": mask if on == "test" else "train", "metric": metric},
        metrics={f"{s} | {k} | {metric}": [m, low, high] for s, k, m, low, high, _, _ in rows},
        seconds=round(time.perf_counter() - began, 3),
        test_opened=split.test_opened,
    )
    return Curve(pd.DataFrame(rows, columns=["system", "k", "mean", "low", "high", "users", "adapts"]), metric, card)


def _dealt(
    target: Interactions, split: Split, of: str, rng: np.random.Generator
) -> tuple[Interactions, np.ndarray, np.ndarray]:
    """The events of cold users (items), each one's place, from 0, in a random order of its owner's, and how many the
    owner has: (N,) each."""
    cold = split.cold_users[target.users] if of == "users" else ~split.warm_items[target.items]
    events = target.select(cold)
    owner = events.users if of == "users" else events.items
    order = np.lexsort((rng.random(len(owner)), owner))
    place = np.empty(len(owner), dtype=np.int64)
    place[order] = np.arange(len(owner)) - np.searchsorted(owner[order], owner[order])
    return events, place, np.bincount(owner, minlength=1)[owner]
