"""The comparisons a user runs: the same systems, split and evaluator over several seeds, a run card for each number.

A bench goes on where it was cut off: a seed whose report is in the folder is read, not run, and a model that was being
fitted goes on from its checkpoint.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.features.hub import bases, write_card
from mmllmrec.runcard import RunCard, content_hash
from mmllmrec.seed import seed_everything

METRICS = ("ndcg@20", "recall@20", "ndcg@10", "recall@10")  # what a summary holds; a seed's own card has all
CLASSICAL = {"epochs": 200, "batch_size": 2048, "lr": 5e-3, "patience": 20}  # of the trained baselines
SOFTMAX = {**CLASSICAL, "lr": 1e-3, "weight_decay": 1.0}  # of the same under the unified model's loss


class Progress:
    """How far a bench is: a bar where there is a terminal, and a line a step elsewhere, in logs and notebooks."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.n = name, total, 0
        self.shown = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=name, disable=not self.shown)
        self.now, self.began = "", time.perf_counter()

    def begin(self, what: str) -> None:
        """A step begins."""
        self.now, self.began = what, time.perf_counter()
        self.bar.set_description(f"{self.name}: {what}")

    def end(self, found: str) -> None:
        """It is over, with this result."""
        self.n += 1
        self.bar.update()
        if not self.shown:
            seconds = time.perf_counter() - self.began
            print(
                f"{self.name} {self.n}/{self.total}: {self.now}, {found}, {seconds:.0f} s", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        self.bar.close()

    def skip(self, steps: int) -> None:
        """Steps that were only read."""
        self.n += steps
        self.bar.update(steps)


@dataclass(frozen=True)
class Entry:
    """A system of a bench: how it is built from a split and the runs of the entries before it, and the keywords of
    ``fit``. Of the report's first system ``controls`` are rows that read content gone, shuffled, random or noised.
    ``about`` is what decides its numbers besides: options it is built with, features it reads."""

    name: str
    build: Callable[[Split, Mapping[str, Any]], Any]
    settings: dict[str, Any]
    controls: bool | tuple[str, ...] = False
    about: Any = None


@dataclass(frozen=True)
class Named:
    """A fitted run under the name of its row: two rows of one table can be of one class."""

    name: str
    run: Any

    @property
    def model(self) -> Any:
        return self.run.model

    @property
    def card(self) -> RunCard:
        card: RunCard = self.run.card
        return card


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
            line[one["row"]] += fewer(one, self.frame)
            if one["of oracle"] is not None:
                line[f"{one['row']}, of oracle"] = f"{one['of oracle']:.0%}"
        return pd.DataFrame.from_dict(lines, orient="index").fillna("-").rename_axis("system")

    def __str__(self) -> str:
        heading = f"{self.title}\n"
        tables = [f"{metric}\n{self.table(metric).to_string()}" for metric in METRICS[:2]]
        return heading + "\n".join(tables) + f"\nrun card: {self.path}"


def fewer(one: Mapping[Any, Any], frame: pd.DataFrame) -> str:
    """A mark on a cell that is the mean of fewer seeds than others."""
    total = int(frame["seeds"].max())
    return f" ({one['seeds']} of {total} seeds)" if one["seeds"] < total else ""


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
        return Entry(name, lambda split, made: model_of(base, split, loss=loss.rstrip(")")), SOFTMAX)
    settings = settings_of(models.classes()[name])
    options = unified if name == "Unified" else {}
    return Entry(name, lambda split, made: model_of(name, split, preset=preset, **options), settings)


def run_seed(
    split: Split,
    entries: Sequence[Entry],
    *,
    seed: int,
    folder: Path,
    first: str | None = None,
    beside: Sequence[Any] | Callable[[Mapping[str, Any]], Sequence[Any]] = (),
    more: Callable[[dict[str, Any], Any], Mapping[str, Sequence[float]]] | None = None,
    about: Mapping[str, Any] | None = None,
    places: Mapping[str, Path] | None = None,
    mask: str = "train+valid",
    quick: int | None = None,
    bar: Progress | None = None,
    command: str = "",
) -> RunCard:
    """Fit and test every entry on one split under one seed; the report's card, and the report beside it.

    ``first`` (the last entry without it) is the report's first system, whose controls are asked for, and whose model is
    kept in ``folder/model``; ``beside`` are further scorers, or what makes them of the runs by name. ``more`` gets the
    runs and the report, and gives further metrics for the card, ``"system | row | metric": [value, ...]``; ``about`` is
    what they depend on. ``places`` are folders of fits, by name, that lie elsewhere than in ``folder``. ``quick``
    bounds the epochs (smoke tests); ``bar`` is told of each entry; ``command`` is what the card says to run.
    """
    from mmllmrec.evaluation.report import evaluate
    from mmllmrec.training.fit import fit

    asked = {e.name: e.settings | ({"epochs": quick} if quick and e.settings else {}) for e in entries}
    entries_are = {e.name: e.about for e in entries if e.about is not None}
    parts = [asked, split.hash, mask, seed, *([dict(about)] if about else []), *([entries_are] if entries_are else [])]
    key = content_hash(*parts)
    card_path = folder / "report" / "card.json"
    if card_path.is_file():
        card = RunCard.load(card_path)
        if card.settings.get("bench") != key:
            raise DataError(f"{folder / 'report'} is of other settings or data: pass another folder, or remove it")
        if bar is not None:
            bar.skip(len(entries))
        return card
    runs: dict[str, Any] = {}
    for one in entries:
        if bar is not None:
            bar.begin(f"seed {seed}, {one.name}")
        # weights are drawn at building: a model must not depend on which others were built before it
        seed_everything(seed)
        model = one.build(split, runs)
        shown = sys.stderr.isatty()
        place = (places or {}).get(one.name, folder / one.name)
        run = fit(model, split, seed=seed, folder=place, progress=shown, **asked[one.name])
        runs[one.name] = run
        if bar is not None:
            bar.end(f"{run.best_score:.4f} on validation")
    named = {name: Named(name, run) for name, run in runs.items()}
    leader = named.pop(first or entries[-1].name)
    controls = next(e.controls for e in entries if e.name == leader.name)
    against = [*named.values(), *(beside(runs) if callable(beside) else beside)]
    report = evaluate(leader, split, against=against, on="test", mask=mask, controls=controls, seed=seed)
    report.card.settings |= {"bench": key, "fit": asked, "command": command}
    if more is not None:
        report.card.metrics |= {k: list(v) for k, v in more(runs, report).items()}
        report.card.test_opened = split.test_opened
    if first is not None:
        keep_model(runs[first], report.card, folder / "model")
    report.save(folder / "report")
    return report.card


def keep_model(run: Any, card: RunCard, folder: Path) -> None:
    """Save a run's model, its adapters in PEFT's format inside, with a model card of its rows in a report's card."""
    own = {k: v for k, v in card.metrics.items() if k.startswith(f"{card.name} | ") and k.endswith(METRICS[:2])}
    run.model.save_pretrained(folder)
    write_card(folder, card=replace(card, metrics=own, model=run.card.model), base=bases(run.model))


def frame_of(cards: Sequence[RunCard], metrics: Collection[str] = METRICS) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over seeds of every system, row and metric named, and its share of the
    oracle's where there is one; a line each."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for card in cards:
        for key, (mean, *_) in card.metrics.items():
            system, row, metric = key.split(" | ")
            if metric in metrics:
                found.setdefault((system, row, metric), []).append(mean)
    lines = []
    for (system, row, metric), values in found.items():
        ceiling = found.get(("Oracle", row, metric))
        share = None
        if ceiling is not None and len(ceiling) == len(values) and min(ceiling) > 0:
            share = statistics.mean(v / c for v, c in zip(values, ceiling, strict=True))
        std = statistics.stdev(values) if len(values) > 1 else None
        lines.append((system, row, metric, statistics.mean(values), std, share, len(values)))
    columns = ["system", "row", "metric", "mean", "std", "of oracle", "seeds"]
    frame = pd.DataFrame(lines, columns=columns)
    frame[["std", "of oracle"]] = (
        frame[["std", "of oracle"]].astype(object).where(frame[["std", "of oracle"]].notna(), None)
    )
    return frame


def card_of(name: str, cards: Sequence[RunCard], frame: pd.DataFrame, **settings: Any) -> RunCard:
    """The card of a bench: means and deviations of ``frame``, each seed's numbers, and where the seeds' cards lie."""
    kept = set(zip(frame["system"], frame["row"], frame["metric"], strict=True))
    by_seed = {
        str(c.seed): {k: v[0] for k, v in c.metrics.items() if tuple(k.split(" | ")) in kept and v} for c in cards
    }
    return RunCard(
        kind="bench",
        name=name,
        data=cards[0].data,
        split={k: v for k, v in cards[0].split.items() if k not in ("hash", "seed")},
        settings={
            "seeds": [c.seed for c in cards],
            "cards": [f"seed{c.seed}/report/card.json" for c in cards],
            "by seed": by_seed,
            **settings,
        },
        metrics={
            f"{line['system']} | {line['row']} | {line['metric']}": [line["mean"], line["std"]]
            for line in frame.to_dict("records")
        },
        seconds=sum(c.seconds for c in cards),
        test_opened=max(c.test_opened for c in cards),
    )


def command_of(bench: str, **options: Any) -> str:
    """The command that asks for a bench with some options: what is None, False or empty is left out."""
    words = ["mmllmrec", "bench", bench]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value not in (None, False, "", ()):
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [flag, f"{one:g}" if isinstance(one, float) else str(one)]
    return shlex.join(words)


def over(seeds: int) -> str:
    """What a table's cells are, for its title."""
    return f"mean ± std over {seeds} seeds" if seeds > 1 else "one seed: one division of the data, one start"


def summarise(name: str, cards: Sequence[RunCard], folder: Path) -> Summary:
    """``frame_of`` the seeds' cards, written as ``card.json`` and ``table.txt``."""
    frame = frame_of(cards)
    card = card_of(name, cards, frame)
    summary = Summary(f"{name}: {over(len(cards))}", frame, folder / "card.json")
    card.save_with(str(summary), folder)
    return summary


def over_seeds(
    name: str,
    make: Callable[[int], Split],
    entries: Sequence[Entry],
    *,
    seeds: int,
    folder: Path,
    mask: str = "train+valid",
    quick: int | None = None,
    command: str = "",
) -> Summary:
    """``run_seed`` for seeds 0, 1, ..., each on its own split, and the summary of them."""
    if seeds < 1:
        raise DataError(f"seeds={seeds}: run at least one")
    bar = Progress(name, seeds * len(entries))
    asked: dict[str, Any] = {"mask": mask, "quick": quick, "bar": bar, "command": command}
    cards = [run_seed(make(s), entries, seed=s, folder=folder / f"seed{s}", **asked) for s in range(seeds)]
    bar.close()
    return summarise(name, cards, folder)
