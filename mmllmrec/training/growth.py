"""How time and memory grow with the data: the same systems on planted sets of ever more events.

Legend: U users, I items, N events, G groups of users with one taste.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch

from mmllmrec import models
from mmllmrec.data import splits
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.splits import TRAIN, VALID, Split
from mmllmrec.runcard import RunCard, peak_memory_mb
from mmllmrec.seed import generator, seed_everything
from mmllmrec.training.fit import fit
from mmllmrec.training.speed import EPOCH, PEAK, apart

SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "BPR": ("BPR", {}),
    "LightGCN": ("LightGCN", {"layers": 2}),
    "FREEDOM": ("FREEDOM", {}),
}
EVENTS = (160_000, 1_600_000, 16_000_000)
WIDTH = 64  # columns of the one modality
STEPS = 58  # of an epoch, whatever its events: as many as Amazon Baby's have in batches of 2,048
DATA, PER_EVENT, FLAT = "data seconds", "microseconds per event", "times the smallest"
BYTES, FLAT_BYTES = "bytes per event", "times the smallest, memory"


def growth(
    *,
    events: Sequence[int] = EVENTS,
    systems: Sequence[str] = tuple(SYSTEMS),
    epochs: int = 2,
    threads: int | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Seconds and memory of a training epoch on planted sets of ``events``; a row a system and size, each measured in a
    process of its own.

    A set of N events has N / 8 users and 7,050 sqrt(N / 160,000) items (``grown``), and batches of N / 58: an epoch has
    as many steps at every size, since Adam passes over all embeddings in each of them. ``data seconds`` are those of
    checking the events, dividing and indexing them; seconds per epoch the least of ``epochs``, after one to warm up.
    ``bytes per event`` is what the process grew by in training, over what it was before the data was made. The columns
    "times the smallest" set a size's microseconds and bytes per event beside those of the first of ``events``: 1 is
    growth in proportion. ``folder`` gets ``card.json`` and ``table.txt``. Raises ``DataError`` for an unknown system
    and for fewer than 10,000 events, and ``RuntimeError`` when a measuring process fails.
    """
    unknown = [s for s in systems if s not in SYSTEMS]
    if unknown:
        raise DataError(f"unknown system {unknown[0]!r}; systems are {list(SYSTEMS)}")
    if not events or min(events) < 10_000 or epochs < 1:
        raise DataError(f"events={list(events)}, epochs={epochs}: give sizes of 10,000 or more, and an epoch or more")
    began, load = time.perf_counter(), os.getloadavg()[0]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for system in systems:
        for size in events:
            asked = {"system": system, "events": size, "epochs": epochs}
            one = apart("mmllmrec.training.growth", asked, f"{system}, {size:,} events", threads)
            first = found.get((system, events[0]), one)
            for per, flat in ((PER_EVENT, FLAT), (BYTES, FLAT_BYTES)):
                one[flat] = round(one[per] / first[per], 2)
            found[system, size] = one
    columns = [DATA, EPOCH, PER_EVENT, FLAT, PEAK, BYTES, FLAT_BYTES]
    lines = [[system, size, *(one[c] for c in columns)] for (system, size), one in found.items()]
    frame = pd.DataFrame(lines, columns=["system", "events", *columns])
    if folder is not None:
        card = RunCard(
            kind="bench",
            name="growth",
            seed=0,
            data=f"planted: {', '.join(f'{n:,}' for n in events)} training events",
            model={s: {"class": SYSTEMS[s][0], "config": SYSTEMS[s][1]} for s in systems},
            settings={"epochs": epochs, "threads": threads or torch.get_num_threads(), "load": round(load, 2)},
            metrics={f"{system}, {size}": one for (system, size), one in found.items()},
            seconds=round(time.perf_counter() - began, 3),
            peak_memory_mb=max(one[PEAK] for one in found.values()),
        )
        card.save_with(frame.to_string(index=False), folder)
    return frame


def grown(*, events: int, seed: int = 0, groups: int = 64) -> RecDataset:
    """A planted set of ``events`` training events and one for validation each of the first 10,000 users.

    N / 8 users of log-normal activity, three events at least, in G groups; a group's items have weights popularity_i
    exp(2 p_g . q_i / 4), p and q normal in 16 dimensions, popularity falling as (rank + 20)^-0.8; a user draws without
    replacement. The catalogue brings ``visual`` (I, 64): q through a random matrix, plus noise.
    """
    rng = generator(seed, "growth")
    n_users, n_items = events // 8, round(7050 * (events / 160_000) ** 0.5)
    activity = np.exp(rng.normal(size=n_users))
    held = np.arange(n_users) < 10_000
    counts = 3 + rng.multinomial(events - 3 * n_users, activity / activity.sum())
    counts = np.minimum(counts, n_items // 4)
    wanted = counts + held
    q = rng.normal(size=(n_items, 16))
    popularity = -0.8 * np.log(rng.permutation(n_items) + 20)
    weights = np.exp(rng.normal(size=(groups, 16)) @ q.T / 2 + popularity)
    ends = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
    ends = ends + np.arange(groups)[:, None]  # one ascending row: group g's draws lie in g .. g + 1
    group = rng.integers(0, groups, n_users)
    drawn, open_keys, left = [], np.zeros(0, dtype=np.int64), wanted
    while left.any():  # what was drawn twice is drawn again; users who have theirs are put aside
        owner = np.repeat(np.arange(n_users), left)
        place = np.searchsorted(ends.ravel(), group[owner] + rng.random(len(owner)))
        item = np.minimum(place - group[owner] * n_items, n_items - 1)
        open_keys = np.unique(np.concatenate([open_keys, owner * n_items + item]))
        had = np.bincount(open_keys // n_items, minlength=n_users)
        left = np.where(had > 0, wanted - had, 0)
        full = left[open_keys // n_items] == 0
        drawn.append(open_keys[full])
        open_keys = open_keys[~full]
    keys = np.sort(np.concatenate(drawn))
    users, items = np.divmod(keys, n_items)
    order = rng.permutation(len(keys))
    first = np.full(n_users, -1)
    first[users[order]] = order  # one event of each user, at random
    parts = np.full(len(keys), TRAIN)
    parts[first[held]] = VALID
    user_ids, item_ids = IdMap(range(n_users), what="user id"), IdMap(range(n_items), what="item id")
    table = (q @ rng.normal(size=(16, WIDTH)) + rng.normal(size=(n_items, WIDTH))).astype(np.float32)
    catalog = Catalog(datasets.Dataset.from_dict({"item_id": item_ids.ids}), item_ids, features={"visual": table})
    return RecDataset("grown", Interactions(users, items, None, user_ids, item_ids), catalog, parts)


def measure(*, system: str, events: int, epochs: int) -> dict[str, Any]:
    """One system and size in this process."""
    before = peak_memory_mb()
    data = grown(events=events)
    users, items = data.interactions.users, data.interactions.items
    began = time.perf_counter()
    again = Interactions(users, items, None, data.interactions.user_ids, data.interactions.item_ids)
    split: Split = splits.given(RecDataset("grown", again, data.catalog, data.parts))
    assert split.train.csr.nnz and split.hash
    seconds = time.perf_counter() - began
    name, config = SYSTEMS[system]
    kind: Any = models.classes()[name]
    content = {"catalog": split.catalog} if hasattr(kind, "with_catalog") else {}
    seed_everything(0)
    model = kind(split.train, **content, **config)
    marks = []

    def passed(row: dict[str, Any]) -> None:
        marks.append(time.perf_counter())

    size = -(-len(split.train) // STEPS)
    fit(model, split, epochs=epochs + 2, eval_every=epochs + 2, batch_size=size, lr=1e-3, on_epoch=passed)
    epoch, peak, n = min(np.diff(marks)[:-1]), peak_memory_mb(), len(split.train)
    found = {DATA: round(seconds, 2), EPOCH: round(float(epoch), 3), PER_EVENT: round(float(epoch) / n * 1e6, 3)}
    found |= {PEAK: round(peak), BYTES: round((peak - before) * 2**20 / n), "train": n, "validation": len(split.valid)}
    return found | {"users": split.train.n_users, "items": split.train.n_items, "batch": size}


if __name__ == "__main__":
    import sys

    print(json.dumps(measure(**json.loads(sys.argv[1]))))
