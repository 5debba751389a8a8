"""Ours beside another toolkit's figures: its data, split, protocol and hyper-parameters, a row a system."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmllmrec.bench.run import Entry, Summary, command_of, over_seeds
from mmllmrec.data import splits
from mmllmrec.data.dataset import load_dataset
from mmllmrec.data.interactions import DataError

PARITY = {"epochs": 1000, "batch_size": 2048, "lr": 1e-3, "patience": 20, "monitor": "recall@20"}  # as the peer's
FEATURES = ("vggish", "all-MiniLM-L6-v2")  # in the peer's slots of pictures and of text
SHARES = (0.1, 0.9)  # of the two in its graphs of alike items


@dataclass(frozen=True)
class Published:
    """The peer's hyper-parameters of a system, as its files name them, and the same in our names. ``trained``: its code
    trains the raw feature tables, which we do too here."""

    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]
    trained: bool = False


SYSTEMS: dict[str, Published] = {
    "BPR": Published({"reg_weight": 0.1}, {"reg": 0.1}),
    "VBPR": Published({"reg_weight": 0.1}, {"reg": 0.1}),
    "LightGCN": Published({"n_layers": 2, "reg_weight": 1e-4}, {"layers": 2, "reg": 1e-4}),
    "MMGCN": Published({"reg_weight": 1e-4}, {"reg": 1e-4, "train_ids": False}),
    "LATTICE": Published({"reg_weight": 1e-4}, {"reg": 1e-4}, trained=True),
    "BM3": Published({"dropout": 0.3, "n_layers": 1, "reg_weight": 0.1}, {"dropout": 0.3, "reg": 0.1}, trained=True),
    "FREEDOM": Published(
        {"dropout": 0.8, "reg_weight": 1e-4}, {"prune": 0.8, "content_weight": 1e-4, "shares": SHARES}, trained=True
    ),
    "MGCN": Published({"cl_loss": 0.01}, {"contrast_weight": 0.01, "reg": 1e-4}, trained=True),
    "LGMRec": Published(
        {
            "alpha": 0.3,
            "cl_weight": 1e-4,
            "hyper_num": 4,
            "keep_rate": 0.5,
            "n_hyper_layer": 1,
            "n_mm_layers": 2,
            "n_ui_layers": 2,
            "reg_weight": 1e-6,
        },
        {"contrast_weight": 1e-4 * PARITY["batch_size"]},  # type: ignore[operator]
    ),
    "PGL": Published(
        {"dropout": 0.2, "mode": "local", "reg_weight": 0}, {"contrast_weight": 0.0, "shares": SHARES}, trained=True
    ),
}


def parity(
    *,
    seeds: int = 3,
    folder: str | os.PathLike[str] = "runs/parity",
    path: str | os.PathLike[str] | None = None,
    peer: str | os.PathLike[str] | None = None,
    systems: Sequence[str] = tuple(SYSTEMS),
    quick: int | None = None,
) -> tuple[Summary, pd.DataFrame]:
    """Systems on ``lastfm-2k`` under the MMRec family's protocol: the given split, training items alone masked, the
    best epoch by validation recall@20, features as they are (``FEATURES``), hyper-parameters of ``SYSTEMS``.

    ``peer`` is a CSV with columns system, hyper_parameters (JSON), test_recall@20 and test_ndcg@20; the frame sets its
    means of the same hyper-parameters beside ours, relative difference included (empty without it). Raises
    ``DataError`` for a system that has no published figures here, and for a folder without the features.
    """
    from mmllmrec import models
    from mmllmrec.features.table import FeatureTable

    unknown = [s for s in systems if s not in SYSTEMS]
    if unknown or not systems:
        raise DataError(
            f"systems={list(systems)}: {unknown} have no published figures here; these have {list(SYSTEMS)}"
        )
    data = load_dataset("lastfm-2k", path)
    absent = [n for n in FEATURES if n not in data.catalog.modalities]
    if absent:
        raise DataError(f"{data.name}: feature file {absent[0]}.npy is missing; content models read {list(FEATURES)}")
    here = np.stack([data.catalog.present(n) for n in FEATURES], axis=1)
    features = FeatureTable({n: data.catalog.signal(n) for n in FEATURES}, here)

    def build(name: str) -> Callable[..., Any]:
        kind: Any = models.classes()[name]
        options = dict(SYSTEMS[name].ours)
        if hasattr(kind, "with_catalog"):
            options["features"] = features
        if SYSTEMS[name].trained:
            options["trained_features"] = True
        return lambda split, made: kind(split.train, **options)

    read = features.hash
    entries = [
        Entry(name, build(name), PARITY, about=[dict(SYSTEMS[name].ours), SYSTEMS[name].trained, read])
        for name in systems
    ]
    summary = over_seeds(
        "parity",
        lambda s: splits.given(data),
        entries,
        seeds=seeds,
        folder=Path(folder),
        mask="train",
        quick=quick,
        command=command_of("parity", seeds=seeds, system=() if tuple(systems) == tuple(SYSTEMS) else tuple(systems)),
    )
    return summary, beside(summary, peer) if peer is not None else pd.DataFrame()


def beside(summary: Summary, peer: str | os.PathLike[str]) -> pd.DataFrame:
    """Ours, the peer's and the relative difference, a row a (system, metric)."""
    theirs = pd.read_csv(peer)
    ours = summary.frame[summary.frame["row"] == "all"].set_index(["system", "metric"])["mean"]
    lines = []
    for system, published in SYSTEMS.items():
        same = theirs["hyper_parameters"].map(json.loads) == dict(published.theirs)
        rows = theirs[(theirs["system"] == system) & same]
        if (system, "recall@20") not in ours or not len(rows):
            continue
        for metric in ("recall@20", "ndcg@20"):
            reference = float(rows[f"test_{metric}"].mean())
            value = float(ours[system, metric])
            lines.append((system, metric, value, reference, value / reference - 1, len(rows)))
    return pd.DataFrame(lines, columns=["system", "metric", "ours", "peer", "difference", "peer seeds"])
