"""The tables of the README: the quickstart's, MovieLens and Last.fm beside another toolkit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from mmllmrec.bench.rows import setup
from mmllmrec.bench.run import Entry, Summary, entry, over_seeds
from mmllmrec.data import splits
from mmllmrec.data.dataset import RecDataset, load_dataset
from mmllmrec.data.interactions import DataError

QUICKSTART = ("LightGCN", "LightGCN (softmax)", "VBPR", "VBPR (softmax)", "TwoStage", "Unified")
PARITY = {"epochs": 1000, "batch_size": 2048, "lr": 1e-3, "patience": 20, "monitor": "recall@20"}  # as the peer's


def quickstart(
    *,
    seeds: int = 3,
    folder: str | os.PathLike[str] = "runs/quickstart",
    data: RecDataset | None = None,
    systems: Sequence[str] = QUICKSTART,
    quick: int | None = None,
) -> Summary:
    """The quickstart's table over seeds: Atelier, cold items held out, floors and oracle beside ``systems``."""
    data = data or load_dataset("atelier")
    entries = [entry(s) for s in systems]
    entries[-1] = replace(entries[-1], controls=entries[-1].name == "Unified")
    return over_seeds(
        "quickstart", lambda s: splits.cold_items(data, seed=s), entries, seeds=seeds, folder=Path(folder), quick=quick
    )


def movielens(
    *,
    seeds: int = 3,
    folder: str | os.PathLike[str] = "runs/movielens",
    path: str | os.PathLike[str] | None = None,
    systems: Sequence[str] = ("LightGCN", "VBPR", "Unified"),
    kinds: Sequence[str] = ("random_per_user", "cold_items"),
    quick: int | None = None,
) -> list[Summary]:
    """Real posters and words, random-per-user and cold-items splits; Unified reads with ``minilm``.

    ``kinds`` limits the splits. MiniLM is large for two cores: the cached trainer, with its own settings.
    """
    asked = setup("movielens-small", path)
    data = asked.data
    entries = [entry(s, preset=asked.preset, trainer=asked.trainer) for s in systems]
    if entries[-1].name == "Unified":
        entries[-1] = replace(entries[-1], controls=("shuffled image", "shuffled text"))

    def one(kind: str) -> Summary:
        place = Path(folder) / kind
        make = splits.SPLITS[kind]
        return over_seeds(
            f"movielens {kind}", lambda s: make(data, seed=s), entries, seeds=seeds, folder=place, quick=quick
        )

    return [one(kind) for kind in kinds]


def lastfm(
    *,
    seeds: int = 3,
    folder: str | os.PathLike[str] = "runs/lastfm",
    path: str | os.PathLike[str] | None = None,
    peer: str | os.PathLike[str] | None = None,
    quick: int | None = None,
) -> tuple[Summary, pd.DataFrame]:
    """BPR-MF, LightGCN and VBPR under the MMRec family's protocol: the given split, training items alone masked, the
    best epoch by validation recall@20. VBPR reads ``vggish`` and ``all-MiniLM-L6-v2`` as they are.

    ``peer`` is a CSV with columns system, hyper_parameters (JSON), test_recall@20 and test_ndcg@20; the frame sets its
    means of the same hyper-parameters beside ours, relative difference included (empty without it).
    """
    from mmllmrec.features.table import FeatureTable
    from mmllmrec.models import BPR, VBPR, LightGCN

    data = load_dataset("lastfm-2k", path)
    names = ("vggish", "all-MiniLM-L6-v2")
    absent = [n for n in names if n not in data.catalog.modalities]
    if absent:
        raise DataError(f"{data.name}: feature file {absent[0]}.npy is missing; VBPR reads {list(names)}")
    here = np.stack([data.catalog.present(n) for n in names], axis=1)
    features = FeatureTable({n: data.catalog.signal(n) for n in names}, here)
    entries = [
        Entry("BPR", lambda split, made: BPR(split.train, dim=64, reg=0.1), PARITY),
        Entry("LightGCN", lambda split, made: LightGCN(split.train, dim=64, layers=2, reg=1e-4), PARITY),
        Entry("VBPR", lambda split, made: VBPR(split.train, features=features, dim=64, reg=0.1), PARITY),
    ]
    summary = over_seeds(
        "lastfm", lambda s: splits.given(data), entries, seeds=seeds, folder=Path(folder), mask="train", quick=quick
    )
    return summary, beside(summary, peer) if peer is not None else pd.DataFrame()


def beside(summary: Summary, peer: str | os.PathLike[str]) -> pd.DataFrame:
    """Ours, the peer's and the relative difference, a row a (system, metric)."""
    theirs = pd.read_csv(peer)
    same = {"BPR": {"reg_weight": 0.1}, "LightGCN": {"n_layers": 2, "reg_weight": 1e-4}, "VBPR": {"reg_weight": 0.1}}
    ours = summary.frame[summary.frame["row"] == "all"].set_index(["system", "metric"])["mean"]
    lines = []
    for system, asked in same.items():
        rows = theirs[(theirs["system"] == system) & (theirs["hyper_parameters"].map(json.loads) == asked)]
        for metric in ("recall@20", "ndcg@20"):
            reference = float(rows[f"test_{metric}"].mean())
            value = float(ours[system, metric])
            lines.append((system, metric, value, reference, value / reference - 1, len(rows)))
    return pd.DataFrame(lines, columns=["system", "metric", "ours", "peer", "difference", "peer seeds"])
