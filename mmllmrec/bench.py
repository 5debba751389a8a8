"""The comparisons a user runs: the same systems, split and evaluator over several seeds, a run card for each number.

A bench goes on where it was cut off: a seed whose report is in the folder is read, not run, and a model that was being
fitted goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmllmrec.data import splits
from mmllmrec.data.dataset import RecDataset, load_dataset
from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.runcard import RunCard, content_hash
from mmllmrec.seed import seed_everything

METRICS = ("ndcg@20", "recall@20", "ndcg@10", "recall@10")  # what a summary holds; a seed's own card has all
CLASSICAL = {"epochs": 200, "batch_size": 2048, "lr": 5e-3, "patience": 20}  # of the trained baselines
QUICKSTART = ("LightGCN", "LightGCN (softmax)", "VBPR", "VBPR (softmax)", "TwoStage", "Unified")
SOFTMAX = {**CLASSICAL, "lr": 1e-3, "weight_decay": 1.0}  # of the same under the unified model's loss
PARITY = {"epochs": 1000, "batch_size": 2048, "lr": 1e-3, "patience": 20, "monitor": "recall@20"}  # as the peer's


@dataclass(frozen=True)
class Entry:
    """A system of a bench: how it is built from a split, and the keywords of ``fit``."""

    name: str
    build: Callable[[Split], Any]
    settings: dict[str, Any]
    controls: bool | tuple[str, ...] = False  # of the last entry: rows that read content gone, shuffled or random


@dataclass
class Summary:
    """Mean and standard deviation over seeds: ``frame`` has a row a (system, row, metric), ``path`` is its run card."""

    title: str
    frame: pd.DataFrame
    path: Path

    def table(self, metric: str = "ndcg@20") -> pd.DataFrame:
        """A line a system, a column a row of the split, and the share of the oracle where there is one."""
        part = self.frame[self.frame["metric"] == metric]
        lines: dict[str, dict[str, str]] = {}
        for one in part.to_dict("records"):
            line = lines.setdefault(one["system"], {})
            line[one["row"]] = f"{one['mean']:.4f}" + (f" ±{one['std']:.4f}" if one["std"] is not None else "")
            if one["of oracle"] is not None:
                line[f"{one['row']}, of oracle"] = f"{one['of oracle']:.0%}"
        return pd.DataFrame.from_dict(lines, orient="index").fillna("-").rename_axis("system")

    def __str__(self) -> str:
        heading = f"{self.title}\n"
        tables = [f"{metric}\n{self.table(metric).to_string()}" for metric in METRICS[:2]]
        return heading + "\n".join(tables) + f"\nrun card: {self.path}"


def model_of(name: str, split: Split, *, preset: str = "nano", **options: Any) -> Any:
    """A model by its class's name, built for a split with its own defaults and ``options``; ``preset`` is Unified's.

    Raises ``DataError`` with the list of models for a name that is none.
    """
    from mmllmrec import models

    known = models.classes()
    kind = {k.lower(): v for k, v in known.items()}.get(name.lower())
    if kind is None:
        raise DataError(f"unknown model {name!r}; models are {sorted(known)}")
    if kind.__name__ == "Unified":
        return kind.from_preset(preset, data=split.train, catalog=split.catalog, **options)  # type: ignore[attr-defined]
    content = {"catalog": split.catalog} if hasattr(kind, "with_catalog") else {}
    return kind(split.train, **content, **options)


def settings_of(model: Any) -> dict[str, Any]:
    """The keywords of ``fit`` that a model asks for (``fit_defaults``); the classical ones otherwise."""
    return dict(getattr(model, "fit_defaults", CLASSICAL)) if model.trainable else {}


def entry(name: str, *, preset: str = "nano", **unified: Any) -> Entry:
    """A system under its own defaults; ``"LightGCN (softmax)"`` is a baseline under the unified model's loss.
    ``preset`` and ``unified`` are Unified's alone."""
    from mmllmrec import models

    base, _, loss = name.partition(" (")
    if loss:
        return Entry(name, lambda split: model_of(base, split, loss=loss.rstrip(")")), SOFTMAX)
    settings = settings_of(models.classes()[name])
    options = unified if name == "Unified" else {}
    return Entry(name, lambda split: model_of(name, split, preset=preset, **options), settings)


def run_seed(
    split: Split,
    entries: Sequence[Entry],
    *,
    seed: int,
    folder: Path,
    mask: str = "train+valid",
    quick: int | None = None,
) -> RunCard:
    """Fit and test every entry on one split under one seed; the report's card. The last entry is the report's first
    system, which the others stand against. ``quick`` bounds the epochs (smoke tests)."""
    from mmllmrec.evaluation.report import evaluate
    from mmllmrec.training.fit import fit

    asked = {e.name: e.settings | ({"epochs": quick} if quick and e.settings else {}) for e in entries}
    key = content_hash(asked, split.hash, mask, seed)
    card_path = folder / "report" / "card.json"
    if card_path.is_file():
        card = RunCard.load(card_path)
        if card.settings.get("bench") != key:
            raise DataError(f"{folder / 'report'} is of other settings or data: pass another folder, or remove it")
        return card
    runs = []
    for one in entries:
        # weights are drawn at building: a model must not depend on which others were built before it
        seed_everything(seed)
        runs.append(fit(one.build(split), split, seed=seed, folder=folder / one.name, **asked[one.name]))
    controls = entries[-1].controls
    report = evaluate(runs[-1], split, against=runs[:-1], on="test", mask=mask, controls=controls, seed=seed)
    report.card.settings |= {"bench": key, "fit": asked}
    report.save(folder / "report")
    return report.card


def summarise(name: str, cards: Sequence[RunCard], folder: Path) -> Summary:
    """Mean and standard deviation (n - 1) over seeds of every system, row and metric of METRICS; written as
    ``card.json`` and ``table.txt``."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for card in cards:
        for key, (mean, *_) in card.metrics.items():
            system, row, metric = key.split(" | ")
            if metric in METRICS:
                found.setdefault((system, row, metric), []).append(mean)
    lines = []
    for (system, row, metric), values in found.items():
        ceiling = found.get(("Oracle", row, metric))
        share = None
        if ceiling is not None and min(ceiling) > 0:
            share = statistics.mean(v / c for v, c in zip(values, ceiling, strict=True))
        std = statistics.stdev(values) if len(values) > 1 else None
        lines.append((system, row, metric, statistics.mean(values), std, share, len(values)))
    columns = ["system", "row", "metric", "mean", "std", "of oracle", "seeds"]
    frame = pd.DataFrame(lines, columns=columns)
    frame[["std", "of oracle"]] = (
        frame[["std", "of oracle"]].astype(object).where(frame[["std", "of oracle"]].notna(), None)
    )
    card = RunCard(
        kind="bench",
        name=name,
        data=cards[0].data,
        split={k: v for k, v in cards[0].split.items() if k not in ("hash", "seed")},
        settings={"seeds": [c.seed for c in cards], "cards": [f"seed{c.seed}/report/card.json" for c in cards]},
        metrics={f"{s} | {r} | {m}": [mean, std] for s, r, m, mean, std, _, _ in lines},
        seconds=sum(c.seconds for c in cards),
        test_opened=max(c.test_opened for c in cards),
    )
    summary = Summary(f"{name}: mean ± std over {len(cards)} seeds", frame, folder / "card.json")
    card.save_with(str(summary), folder)
    return summary


def _bench(
    name: str,
    make: Callable[[int], Split],
    entries: Sequence[Entry],
    *,
    seeds: int,
    folder: Path,
    mask: str = "train+valid",
    quick: int | None = None,
) -> Summary:
    if seeds < 1:
        raise DataError(f"seeds={seeds}: run at least one")
    cards = [
        run_seed(make(s), entries, seed=s, folder=folder / f"seed{s}", mask=mask, quick=quick) for s in range(seeds)
    ]
    return summarise(name, cards, folder)


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
    return _bench(
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

    ``kinds`` limits the splits. MiniLM is large for two cores: the cached trainer, eight epochs, blocks of 256 items.
    """
    # a garbled row is left out here and counted in the dataset's ``about``: a bench must run on the files as they are
    data = load_dataset("movielens-small", path, bad_rows="drop")
    entries = [entry(s, preset="minilm", trainer="cached") for s in systems]
    if entries[-1].name == "Unified":
        settings = entries[-1].settings | {"epochs": 8, "item_batch": 256}
        entries[-1] = replace(entries[-1], settings=settings, controls=("shuffled image", "shuffled text"))

    def one(kind: str) -> Summary:
        place = Path(folder) / kind
        make = splits.SPLITS[kind]
        return _bench(
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
        Entry("BPR", lambda split: BPR(split.train, dim=64, reg=0.1), PARITY),
        Entry("LightGCN", lambda split: LightGCN(split.train, dim=64, layers=2, reg=1e-4), PARITY),
        Entry("VBPR", lambda split: VBPR(split.train, features=features, dim=64, reg=0.1), PARITY),
    ]
    summary = _bench(
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
