"""How fast and how large training is: each baseline in a process of its own, on a planted set of Amazon Baby's size.

Legend: U users, I items, N events, D width of the planted taste.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
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
from mmllmrec.data.splits import TEST, TRAIN, VALID, Split
from mmllmrec.evaluation.ranking import frozen, rank
from mmllmrec.features.table import FeatureTable
from mmllmrec.runcard import RunCard, peak_memory_mb
from mmllmrec.seed import generator, seed_everything
from mmllmrec.training.fit import fit
from mmllmrec.training.floor import floor, rates

SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "BPR": ("BPR", {}),
    "VBPR": ("VBPR", {"feature_dim": 64}),
    "LightGCN, 1 layer": ("LightGCN", {"layers": 1}),
    "LightGCN, 2 layers": ("LightGCN", {"layers": 2}),
    "FREEDOM": ("FREEDOM", {}),
    "FREEDOM, raw table": ("FREEDOM", {"trained_features": True}),
    "BM3": ("BM3", {}),
    "BM3, raw table": ("BM3", {"trained_features": True}),
    "MMGCN": ("MMGCN", {}),
    "MGCN": ("MGCN", {}),
    "SMORE": ("SMORE", {}),
    "SLMRec": ("SLMRec", {}),
    "LGMRec": ("LGMRec", {}),
    "GRCN": ("GRCN", {}),
    "LATTICE": ("LATTICE", {}),
    "ItemKNN": ("ItemKNN", {}),
    "EASE": ("EASE", {}),
    "IALS, 1 iteration": ("IALS", {"iterations": 1}),
}
# of the peer's rows, by system and layers: which of ours stands beside it
PEER: dict[str, tuple[str, float | None]] = {
    "BPR": ("BPR", None),
    "LightGCN, 1 layer": ("LightGCN", 1),
    "VBPR": ("VBPR", None),
    "FREEDOM": ("FREEDOM", 2),
    "FREEDOM, raw table": ("FREEDOM", 2),
    "BM3": ("BM3", 1),
    "BM3, raw table": ("BM3", 1),
    "MMGCN": ("MMGCN", 2),
    "MGCN": ("MGCN", None),
    "SMORE": ("SMORE", None),
    "SLMRec": ("SLMRec", None),
    "LGMRec": ("LGMRec", None),
    "GRCN": ("GRCN", None),
    "LATTICE": ("LATTICE", None),
}
ANCHOR, ANCHOR_PEER = "IALS, 1 iteration", 0.105  # seconds of one iteration of ``implicit``'s ALS where the peer ran
FIT: dict[str, Any] = {"batch_size": 2048, "lr": 5e-3}
BUILD, EPOCH, SAMPLES, PEAK = "build seconds", "seconds per epoch", "samples per second", "peak memory MiB"
PAIR, FASTER, RANKS = "seconds per evaluation", "times the peer", "times the peer, evaluation"
FLOOR, BEST, TO_BEST = "over the floor", "best ndcg@20", "seconds to 99% of it"
PATIENCE = 10  # validations without a better one, after which a system has had its best


def speed(
    *,
    users: int = 19_445,
    items: int = 7_050,
    events: int = 118_551,
    widths: tuple[int, int] = (4096, 384),
    systems: Sequence[str] = tuple(SYSTEMS),
    repeats: int = 5,
    threads: int | None = None,
    peer: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Seconds to build, per epoch and per evaluation, training events per second and peak memory; a row a system.

    The data is ``planted(users, items, ...)``. An epoch is what ``fit`` takes for one, its sampling included and
    validation left out: the median of ``repeats``, after one to warm up. Build seconds are the constructor's: VBPR's
    hold the whitening of its features to 64 columns a modality, which happens once; a closed form is computed in them,
    and has no epoch. ``over the floor`` is an epoch's seconds over what its products and Adam need at the rates of this
    machine (``training.floor``). Peak memory (MiB) is the resident set of the process, interpreter, libraries and data
    included. An evaluation is of validation and test, full ranking, the best 50 of every user, with embeddings that are
    computed once for both. ``peer`` is a CSV of another toolkit's seconds (columns system, layers, clock,
    train_seconds_per_epoch, evaluation_pair_seconds): a system it has is measured by that row's clock, ``2T`` two
    threads and seconds, ``1C`` one thread and processor seconds, and set beside it, the peer's seconds scaled by what
    one iteration of ``implicit``'s ALS takes here and took there (``ANCHOR_PEER``). Epochs of different methods are not
    worth the same: with ``minutes`` each system is also trained until ``PATIENCE`` validations were no better, or that
    long, and ``seconds to 99% of it`` is its epochs up to 99% of its best validation ndcg@20, at its seconds per epoch,
    validation left out; "cut" beside it where time ended the training and the best may be yet to come. "raw table"
    trains the features as they are, 4,480 columns, as the published code does. ``threads`` is how many each process
    computes with, the libraries' own choice where not given: pass 1 on a machine that others use, where threads that
    wait for one another take many times longer. ``folder`` gets ``card.json``, with every epoch and the machine's load
    beforehand, and ``table.txt``. Raises ``DataError`` for an unknown system and for ``repeats`` or ``threads`` below
    1, and ``RuntimeError`` when a measuring process fails.
    """
    unknown = [s for s in systems if s not in SYSTEMS]
    if unknown:
        raise DataError(f"unknown system {unknown[0]!r}; systems are {list(SYSTEMS)}")
    if repeats < 1:
        raise DataError(f"repeats={repeats}: time at least one epoch")
    if threads is not None and threads < 1:
        raise DataError(f"threads={threads}: give one or more, or None for the libraries' own choice")
    began, load = time.perf_counter(), os.getloadavg()[0]
    size = {"users": users, "items": items, "events": events, "widths": list(widths)}
    theirs = {} if peer is None else _peers(peer)
    chosen = [*systems, *([ANCHOR] if theirs and ANCHOR not in systems else [])]
    found = {}
    for s in chosen:
        clock = theirs[s]["clock"] if s in theirs else None
        asked = {"system": s, "size": size, "repeats": repeats, "processor": clock == "1C", "minutes": minutes}
        limit = threads if clock is None else {"2T": 2, "1C": 1}[clock]
        found[s] = apart("mmllmrec.training.speed", asked, s, limit)
    for s, row in theirs.items():
        if s in found:
            scale = found[ANCHOR][BUILD] / ANCHOR_PEER
            for column, ours, their in ((FASTER, EPOCH, "train"), (RANKS, PAIR, "evaluation")):
                found[s][column] = round(row[their] * scale / found[s][ours], 2)
    more = [*([FASTER, RANKS] if theirs else []), *([BEST, TO_BEST, "cut"] if minutes is not None else [])]
    columns = [BUILD, EPOCH, FLOOR, SAMPLES, PAIR, PEAK, *more]
    lines = [[s, *(one.get(c) for c in columns)] for s, one in found.items()]
    frame = pd.DataFrame(lines, columns=["system", *columns], dtype=object)
    if folder is not None:
        card = RunCard(
            kind="bench",
            name="train",
            seed=0,
            data=f"planted: {users:,} users, {items:,} items, {events:,} training events, features {widths}, float32",
            model={s: {"class": SYSTEMS[s][0], "config": SYSTEMS[s][1]} for s in found},
            settings={
                **FIT,
                "repeats": repeats,
                "threads": threads or torch.get_num_threads(),
                "minutes": minutes,
                "load": round(load, 2),
            },
            metrics=found,
            seconds=round(time.perf_counter() - began, 3),
            peak_memory_mb=max(one[PEAK] for one in found.values()),
        )
        card.save_with(frame.fillna("-").to_string(index=False), folder)
    return frame


def planted(
    *, users: int, items: int, events: int, widths: tuple[int, int] = (4096, 384), dim: int = 16, seed: int = 0
) -> Split:
    """A split with ``events`` training events, and one a user for validation and for test; its features say the taste.

    User u takes items without replacement with weights popularity_i exp(2 p_u . q_i / sqrt(D)), p and q normal,
    popularity falling as (rank + 20)^-0.8: three training events a user, the others dealt by a log-normal activity.
    The catalogue brings ``visual`` (I, widths[0]) and ``textual`` (I, widths[1]) float32: q through a random matrix,
    plus noise. Raises ``DataError`` when there are too few events for the users or too few items for an active one.
    """
    if events < 3 * users:
        raise DataError(f"events={events}: {users} users need three each, {3 * users}")
    rng = generator(seed, "speed")
    activity = np.exp(rng.normal(size=users))
    counts = 3 + rng.multinomial(events - 3 * users, activity / activity.sum())
    taken = counts + 2
    if taken.max() > items:
        raise DataError(f"items={items}: the most active user takes {taken.max()}; plant more items or fewer events")
    p, q = (rng.normal(size=(n, dim)).astype(np.float32) for n in (users, items))
    popularity = (-0.8 * np.log(rng.permutation(items) + 20)).astype(np.float32)
    who, what = [], []
    for part in np.split(np.arange(users), range(1024, users, 1024)):
        # the largest of log weight + Gumbel noise are a weighted draw without replacement
        noise = np.log(rng.standard_exponential((len(part), items), dtype=np.float32) + np.float32(1e-30))
        score = torch.from_numpy(p[part] @ q.T * (2 / dim**0.5) + popularity - noise)
        width = int(taken[part].max())
        first = score.topk(width, dim=1).indices.numpy()
        mine = np.arange(width) < taken[part, None]
        who.append(np.repeat(part, taken[part]))
        what.append(first[mine])
    owner = np.concatenate(who)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(taken) - taken, taken)
    parts = np.select([place == counts[owner], place == counts[owner] + 1], [VALID, TEST], TRAIN)
    user_ids, item_ids = IdMap(range(users), what="user id"), IdMap(range(items), what="item id")
    every = Interactions(owner, np.concatenate(what), None, user_ids, item_ids)
    features = {}
    for name, width in zip(("visual", "textual"), widths, strict=True):
        table = rng.standard_normal((items, width), dtype=np.float32)
        mixing = rng.standard_normal((dim, width), dtype=np.float32)
        for rows in range(0, items, 1024):  # in blocks: the peak is to be the table's size, not that of its making
            table[rows : rows + 1024] += q[rows : rows + 1024] @ mixing
        features[name] = table
    catalog = Catalog(datasets.Dataset.from_dict({"item_id": item_ids.ids}), item_ids, features=features)
    return splits.given(RecDataset("planted", every, catalog, parts))


def measure(
    *, system: str, size: dict[str, Any], repeats: int, processor: bool = False, minutes: float | None = None
) -> dict[str, Any]:
    """One system in this process: the columns of ``speed``, each epoch's seconds, the first and last epoch's loss.
    ``processor``: seconds of the processor in place of the clock's."""
    split = planted(**size)
    name, config = SYSTEMS[system]
    kind: Any = models.classes()[name]
    content: dict[str, Any] = {}
    if hasattr(kind, "with_catalog"):
        raw = config.get("trained_features", False)
        content = {"features": FeatureTable.from_catalog(split.catalog)} if raw else {"catalog": split.catalog}
    clock = time.process_time if processor else time.perf_counter
    seed_everything(0)
    began = clock()
    model: Any = kind(split.train, **content, **config)
    if not model.trainable:
        model.score(np.zeros(1, dtype=np.int64))  # computed when first needed
    built, peak = clock() - began, peak_memory_mb()
    found: dict[str, Any] = {BUILD: round(built, 4), EPOCH: None, SAMPLES: None}
    if model.trainable:
        marks: list[float] = []

        def passed(row: dict[str, Any]) -> None:
            marks.append(clock())

        # the first epoch warms up; the last one's seconds hold the only validation
        options: dict[str, Any] = {"epochs": repeats + 2, "eval_every": repeats + 2, **FIT}
        history = fit(model, split, on_epoch=passed, **options).history
        taken = np.diff(marks)[:-1].tolist()
        median = statistics.median(taken)
        term = next(c for c in history if c in ("bpr", "softmax", "bootstrap"))
        found |= {EPOCH: round(median, 4), SAMPLES: round(len(split.train) / median)}
        found |= {"epochs": [round(t, 4) for t in taken], "losses": [float(history[term].iloc[n]) for n in (0, -1)]}
    test, pairs = split.open_test(), []
    for _ in range(min(repeats, 3)):
        began = clock()
        scorer = frozen(model)
        for positives in (split.valid, test):
            rank(scorer, positives, seen=split.train.csr, k=50).per_user("ndcg@20")
        pairs.append(clock() - began)
    found[PAIR] = round(statistics.median(pairs), 4)
    found |= {PEAK: round(max(peak, peak_memory_mb())), "threads": torch.get_num_threads()}
    if model.trainable:  # what follows is not in the peak
        flops, bandwidth = rates(device=model.device)
        least = floor(model, split, batch_size=FIT["batch_size"], flops=flops, bandwidth=bandwidth)
        found |= {FLOOR: round(found[EPOCH] / least, 2), "floor seconds": round(least, 4)}
        found |= {"GFLOP/s": round(flops / 1e9, 1), "GB/s": round(bandwidth / 1e9, 1)}
    if model.trainable and minutes is not None:
        seed_everything(0)
        found |= _to_best(kind(split.train, **content, **config), split, found[EPOCH], minutes)
    return found


def _to_best(model: Any, split: Split, seconds: float, minutes: float) -> dict[str, Any]:
    """A new model's best validation score, and the seconds of its epochs up to 99% of it."""

    def over(row: dict[str, Any]) -> bool:
        return bool(row["seconds"] > 60 * minutes)

    history = fit(model, split, epochs=1000, patience=PATIENCE, on_epoch=over, **FIT).history
    scores = history["ndcg@20"].to_numpy()
    epochs = int(np.argmax(scores >= 0.99 * scores.max())) + 1
    cut = "cut" if len(scores) - int(scores.argmax()) <= PATIENCE else None
    return {
        BEST: round(float(scores.max()), 4),
        TO_BEST: round(epochs * seconds, 2),
        "epochs to it": epochs,
        "cut": cut,
    }


def _peers(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The rows of a peer's CSV that ours stand beside, by our names."""
    table = pd.read_csv(path)
    found = {}
    for ours, (system, layers) in PEER.items():
        rows = table[
            (table["system"] == system) & (table["layers"].isna() if layers is None else table["layers"] == layers)
        ]
        if len(rows):
            one = rows.iloc[0]
            seconds = {"train": one["train_seconds_per_epoch"], "evaluation": one["evaluation_pair_seconds"]}
            found[ours] = {"clock": str(one["clock"]), **{k: float(v) for k, v in seconds.items()}}
    return found


def apart(module: str, asked: dict[str, Any], what: str, threads: int | None) -> dict[str, Any]:
    """A module's ``measure`` in a process of its own, for a peak never falls; its progress bar shows through."""
    command = [sys.executable, "-m", module, json.dumps(asked)]
    libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    limit = {} if threads is None else dict.fromkeys(libraries, str(threads))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | limit)
    if done.returncode:
        raise RuntimeError(f"{what}: its process ended with code {done.returncode}, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
