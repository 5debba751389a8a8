"""What the questions measure of a seed's runs beside rankings: curves, recovery, knock-outs, as metrics of a card.

Metrics are ``"system | row | metric": [value, ...]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmllmrec.bench.answer import NDCG
from mmllmrec.bench.rows import TWIN
from mmllmrec.bench.run import Named
from mmllmrec.data.atelier.recovery import FACTORS, recovery
from mmllmrec.data.atelier.world import Atelier
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.calibration import priced
from mmllmrec.evaluation.controls import KINDS
from mmllmrec.evaluation.curves import Curve
from mmllmrec.evaluation.protocols import rankings, seen_matrix
from mmllmrec.evaluation.ranking import Frozen

# what is printed of per-factor recovery: a factor, or the mean of those that one modality alone shows
RECOVERED = {"image-only": ("hue", "pattern"), "text-only": ("material", "occasion"), "XOR": ("interaction",)}
RECOVERED |= {name: (name,) for name in ("kind", "chime", "scent")}


def named(runs: Mapping[str, Any]) -> list[Named]:
    """Runs under the names of their rows."""
    return [Named(name, run) for name, run in runs.items()]


def points(curve: Curve, names: Mapping[float, str]) -> dict[str, list[float]]:
    """A curve as metrics of a card, ``"system | row | metric": [mean, low, high]``."""
    lines = curve.frame.to_dict("records")
    return {
        f"{one['system']} | {names[float(one[curve.axis])]} | {curve.metric}": [one["mean"], one["low"], one["high"]]
        for one in lines
    }


def recovered(split: Split, runs: Mapping[str, Any]) -> dict[str, list[float]]:
    """Recovery of each factor on cold items, and of groups of them relative to the twin's: means over mean."""
    assert isinstance(split.data, Atelier)
    tables = {
        name: recovery(run.model, split.data, items=~split.warm_items)["recovery"].to_dict()
        for name, run in runs.items()
    }
    found = {f"{name} | cold | recovery of {f}": [float(table[f])] for name, table in tables.items() for f in FACTORS}
    for group, factors in RECOVERED.items():
        ceiling = sum(tables[TWIN][f] for f in factors)
        if ceiling > 0:  # a world can have a term switched off
            for name, table in tables.items():
                found[f"{name} | cold | recovery, {group}"] = [float(sum(table[f] for f in factors) / ceiling)]
    return found


def knocked_out(split: Split, runs: Mapping[str, Any], controls: Sequence[str], *, seed: int) -> dict[str, list[float]]:
    """ndcg@20 at test of each run with each control (``"without image"``), one at a time, on the rows all and cold: as
    rows ``"without image"`` and ``"without image, cold"``. Opens the test part once."""
    seen, target = seen_matrix(split, on="test", mask="train+valid"), split.open_test()
    found: dict[str, list[float]] = {}
    for control in controls:
        kind, _, modality = control.partition(" ")
        changed = KINDS[kind](split.catalog, modality, seed)  # once for all runs: its pictures are decoded once
        for name, run in runs.items():
            lists = rankings(run.model.with_catalog(changed), split, target, seen=seen, k=20, seed=seed)
            for row, title in (("all", control), ("cold", f"{control}, cold")):
                found[f"{name} | {title} | {NDCG}"] = [_mean(lists[row])]
    return found


def by_price(
    split: Split, runs: Mapping[str, Any], names: Mapping[float, Mapping[str, str]], *, seed: int
) -> dict[str, list[float]]:
    """ndcg@20 at test of each run that ranks new items, these given the room that costs it a share of its own score on
    known ones (``evaluation.calibration.priced``). ``names`` {share: {row: its name among the metrics}}. Opens the test
    part once."""
    seen, target = seen_matrix(split, on="test", mask="train+valid"), split.open_test()
    found: dict[str, list[float]] = {}
    for name, run in runs.items():
        if not run.model.supports_cold_items:
            continue
        once = Frozen(name, *run.model.embed())  # a catalogue is read once, and not at every price
        for cost, titles in names.items():
            scorer = priced(once, split, cost=cost, metric=NDCG, seed=seed)
            if scorer is not None:
                lists = rankings(scorer, split, target, seen=seen, k=20, seed=seed)
                found |= {f"{name} | {title} | {NDCG}": [_mean(lists[row])] for row, title in titles.items()}
    return found


def _mean(found: Any) -> float:
    return float(found.per_user(NDCG).mean())
