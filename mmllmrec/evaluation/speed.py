"""How fast the evaluator is, beside the bare arithmetic it cannot do without.

Legend: U users, I items, D width, K places.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from mmllmrec.data.interactions import IdMap, Interactions
from mmllmrec.evaluation.metrics import METRICS
from mmllmrec.evaluation.ranking import BLOCK, rank
from mmllmrec.runcard import RunCard
from mmllmrec.seed import generator


def speed(
    *,
    users: int = 19_445,
    items: int = 7_050,
    events: int = 118_551,
    dim: int = 64,
    k: int = 50,
    repeats: int = 5,
    folder: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Users ranked and measured per second beside the bare matrix product and top-k of the same shapes, medians of
    ``repeats``; the last column is our time over that floor. ``folder`` gets ``card.json`` and ``table.txt``."""
    started = time.perf_counter()
    rng = generator(0, "speed")
    key = np.sort(rng.choice(users * items, size=events + users, replace=False))
    ids = IdMap(range(users), what="user id"), IdMap(range(items), what="item id")
    every = Interactions(key // items, key % items, None, *ids)
    held = rng.permutation(len(every)) < users
    seen, positives = every.select(~held).csr, every.select(held)
    ranked = np.unique(positives.users)
    u = torch.from_numpy(rng.normal(size=(users, dim)).astype(np.float32))
    i = torch.from_numpy(rng.normal(size=(items, dim)).astype(np.float32))

    class Fixed:
        name = "fixed"

        def embed(self) -> tuple[torch.Tensor, torch.Tensor]:
            return u, i

    def ours() -> None:
        ranking = rank(Fixed(), positives, seen=seen, k=k)
        for metric in METRICS:
            ranking.per_user(f"{metric}@{k}")

    scores = torch.empty(BLOCK, items)

    def floor() -> None:
        for block in torch.from_numpy(ranked).split(BLOCK):
            torch.mm(u[block], i.T, out=scores[: len(block)]).topk(k, dim=1)

    times = {"evaluator": _median(ours, repeats), "matrix product and top-k": _median(floor, repeats)}
    base = times["matrix product and top-k"]
    lines = [(name, t, round(len(ranked) / t), round(t / base, 2)) for name, t in times.items()]
    frame = pd.DataFrame(lines, columns=["what", "seconds", "users per second", "over the floor"])
    if folder is not None:
        card = RunCard(
            kind="bench",
            name="eval",
            seed=0,
            data=f"planted: {users:,} users, {items:,} items, {events:,} seen events, {len(ranked):,} users ranked",
            settings={"dim": dim, "k": k, "repeats": repeats, "threads": torch.get_num_threads()},
            metrics={name: dict(zip(frame.columns[1:], values, strict=True)) for name, *values in lines},
            seconds=round(time.perf_counter() - started, 3),
        )
        card.save_with(frame.to_string(index=False), folder)
    return frame


def _median(work: Callable[[], None], repeats: int) -> float:
    """Median wall-clock seconds after one call to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
