"""Asking a question: one search a row on validation, every row over the seeds, and the answer of all of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mmllmrec.bench.answer import COST, Answer, Claim, Layout, judge, plain
from mmllmrec.bench.rows import COLD_COST, REFERENCE, Row, Setup
from mmllmrec.bench.run import METRICS, Entry, Progress, card_of, command_of, frame_of, over, run_seed
from mmllmrec.data import splits
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.calibration import known_score
from mmllmrec.evaluation.report import HARMONIC
from mmllmrec.runcard import RunCard, content_hash, write_json
from mmllmrec.seed import seed_everything

VALID = "validation ndcg@20"
COSTS = ("trained parameters", "seconds", "peak MiB", VALID)
FITS = "fits"  # under the folder of the searches: fits that several questions, or searches, have in common


@dataclass(frozen=True)
class Budget:
    """What every search gets: trials, and minutes of training; and where searches are kept."""

    trials: int
    minutes: float | None
    folder: Path


@dataclass(frozen=True)
class Question:
    """A comparison: its rows, the split of a seed, scorers beside the rows (``beside``, or what makes them of a seed's
    runs), further metrics of a seed's runs (``more``, which gets them as their searches ranked them), the claims that
    are judged, and sentences on the finished answer (``notes``). ``first`` is the system whose controls at test are
    rows; ``about`` is what else decides the numbers, and ``options`` what else the command was asked with. Settings are
    searched on the validation part of ``search``'s split; ``searches`` is a folder of their own, for questions that
    share none with others. ``new_items``: it is about new items, which get room (``ask``). ``shows_unified``: the title
    says how Unified reads."""

    name: str
    title: str
    rows: Sequence[Row]
    layout: Layout
    split: Callable[[RecDataset, int], Split]
    claims: Sequence[Claim] = ()
    controls: tuple[str, ...] = ()
    first: str = "Unified"
    beside: Sequence[Any] | Callable[[Split, Mapping[str, Any], int], Sequence[Any]] = ()
    more: Callable[[Split, Mapping[str, Any], int], dict[str, list[float]]] = lambda split, runs, seed: {}
    notes: Callable[[Answer], list[str]] = field(default=lambda answer: [])
    search: Callable[[RecDataset], Split] = field(default=lambda data: splits.cold_items(data, seed=0))
    about: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    searches: str = ""
    new_items: bool = True
    shows_unified: bool = True


def ask(
    question: Question,
    asked: Setup,
    *,
    seeds: int,
    budget: Budget,
    folder: str | os.PathLike[str],
    settings: str | os.PathLike[str] | None = None,
    quick: int | None = None,
) -> Answer:
    """Search each row's settings on validation (of ``cold_items`` with seed 0, unless a question says otherwise), then
    fit and test all rows on the question's split for seeds 0, 1, ...; ``card.json`` and ``table.txt`` in ``folder``.

    The searches are the same for all questions, whatever their splits, and each is made once; the settings it found are
    those of all seeds. Fits are kept beside them, by row, split, seed and settings: a row that two questions share on
    one split is fitted once, and the best trial of a search goes on as the fit of seed 0 on its split. What was done is
    read: trials, fits and seeds' reports. ``quick`` bounds the epochs. Where a question is about new items, they get as
    much room as leaves known ones the validation ndcg@20 of ``REFERENCE`` on that split, or 1 - ``COLD_COST`` of the
    row's own where that is lower: one rule for all rows that rank new items (``fit``). ``settings``, the card of an
    earlier answer on the same data and split, stands in for the searches of the rows that it has. Raises ``DataError``
    for fewer than one seed, for a card of other data, and for a folder that holds the results of other settings or
    data.
    """
    if seeds < 1:
        raise DataError(f"seeds={seeds}: run at least one; three for a verdict")
    rows, place = question.rows, Path(folder)
    fits = _Fits(rows, asked.data, budget, new_items=question.new_items, quick=quick)
    searched = {r.search for r in fits.by_name.values() if r.space}
    bar = Progress(question.name, len(searched) + seeds * len(rows))
    searching = question.search(asked.data)
    if settings is not None:
        fits.tuned |= _of_card(settings, fits.by_name.values(), searching)
    _search(fits, searching, question.searches, quick, bar)
    tuned = fits.tuned
    told = {**asked.told, "seeds": seeds, "trials": budget.trials, "minutes": budget.minutes}
    command = command_of(question.name, **told, **question.options, settings=settings, vision=asked.vision)

    def one(seed: int) -> Any:
        split = question.split(asked.data, seed)
        room = fits.room(split, seed)
        entries = [
            Entry(
                r.name,
                lambda split, made, r=r: r.build(split, made, **tuned[r.search].options),  # type: ignore[misc]
                fits.settings(r, room),
                question.controls if r.name == question.first else False,
            )
            for r in rows
        ]
        # what decides a seed's numbers besides the split and the settings of fit
        about = {r.name: tuned[r.search].options for r in rows} | {"controls": list(question.controls)}
        about |= question.about

        def more(runs: Mapping[str, Any], report: Any) -> dict[str, list[float]]:
            searches = {r.name: tuned[r.search] for r in rows}
            found = {f"{n} | {COST} | {what}": [v] for n, run in runs.items() for what, v in _costs(run).items()}
            found |= {f"{n} | {COST} | trials": [float(s.card.settings["trials run"])] for n, s in searches.items()}
            if {"warm", "cold"} <= set(report.rows):
                for name in report.names:
                    for metric in METRICS[:2]:
                        found[f"{name} | {HARMONIC} | {metric}"] = [report.mean(name, HARMONIC, metric)]
            ranked = dict(sorted(runs.items(), key=lambda one: -searches[one[0]].score))
            return found | question.more(split, ranked, seed)

        where, beside = place / f"seed{seed}", question.beside
        card = run_seed(
            split,
            entries,
            seed=seed,
            folder=where,
            first=question.first,
            beside=(lambda runs: beside(split, runs, seed)) if callable(beside) else beside,
            more=more,
            about=about,
            places={r.name: fits.place(r, split, seed) for r in rows},
            bar=bar,
            command=command,
        )
        return card

    cards = [one(seed) for seed in range(seeds)]
    bar.close()
    metrics = {*METRICS[:2], *(k.split(" | ")[2] for c in cards for k in c.metrics if f" | {COST} | " in k)}
    metrics |= {c.metric for columns in question.layout.tables.values() for c in columns}
    frame = frame_of(cards, metrics)
    verdicts = judge(question.claims, frame, cards, place)
    title = f"{question.title} {asked.data.name}, {over(seeds)}"
    title += f" (Unified: {asked.preset}, {asked.trainer.replace('_', ' ')})" if question.shows_unified else ""
    answer = Answer(title, frame, verdicts, [], question.layout, place / "card.json")
    answer.notes = question.notes(answer)
    told_in_card = {
        "tuned": {r.name: {"search": r.search, **tuned[r.search].best} for r in fits.by_name.values()},
        "validation": {name: found.score for name, found in tuned.items()},
        "budget": {"trials": budget.trials, "minutes": budget.minutes, "folder": str(budget.folder)},
        "trials run": {name: found.card.settings["trials run"] for name, found in tuned.items()},
        "minutes run": {name: found.card.settings["minutes run"] for name, found in tuned.items()},
        "verdicts": plain(verdicts.to_dict("records")),
        "told": answer.told(),
        **question.about,
    }
    card_of(question.name, cards, frame, **told_in_card).save_with(str(answer), place)
    return answer


@dataclass
class _Fits:
    """The fits of some rows and, for the room of new items, the reference: where each lies, and how it is made.
    ``quick`` bounds their epochs; ``tuned`` is what each search has found so far."""

    rows: Sequence[Row]
    data: RecDataset
    budget: Budget
    new_items: bool
    quick: int | None = None
    tuned: dict[str, Any] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, Row]:
        return {r.name: r for r in (*([REFERENCE] if self.new_items else []), *self.rows)}

    def place(self, row: Row, split: Split, seed: int) -> Path:
        """Where the fit of a row on a split lies: its name, and a hash of all that decides it."""
        behind = (row, *(self.by_name[name] for name in row.after))
        parts = [
            (
                r.name,
                r.search,
                self.tuned[r.search].options,
                self.tuned[r.search].settings,
                *([r.about] if r.about else []),
            )
            for r in behind
        ]
        name = f"{row.name}, {content_hash(split.hash, parts)[:8]}"
        return self.budget.folder / self.data.name / FITS / f"{split.name}, seed {seed}" / name

    def settings(self, row: Row, room: Mapping[str, float]) -> dict[str, Any]:
        """The keywords of a row's ``fit``; the reference, which ranks no new items, is fitted before there is room."""
        found: dict[str, Any] = self.tuned[row.search].settings
        found = {**found, "epochs": self.quick} if self.quick and found else found
        return found if row.name == REFERENCE.name else {**found, **room}

    def fit(self, row: Row, split: Split, seed: int, made: Mapping[str, Any], room: Mapping[str, float]) -> Any:
        """A row with the settings its search found, fitted on a split, at its place."""
        from mmllmrec.training.fit import fit

        seed_everything(seed)
        model = row.build(split, made, **self.tuned[row.search].options)
        where = self.place(row, split, seed)
        return fit(model, split, seed=seed, folder=where, progress=sys.stderr.isatty(), **self.settings(row, room))

    def room(self, split: Split, seed: int) -> dict[str, float]:
        """The keywords of ``fit`` that say how much room new items get on a split; kept beside the reference's fit."""
        if not self.new_items:
            return {}
        path = self.place(REFERENCE, split, seed) / "room.json"
        if not path.is_file():
            run = self.fit(REFERENCE, split, seed, {}, {})
            write_json(path, {"cold_cost": COLD_COST, "warm_floor": round(known_score(run.model, split), 6)})
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found


def _of_card(path: str | os.PathLike[str], rows: Iterable[Row], split: Split) -> dict[str, Any]:
    """What searches of rows on a split found, by their names, as the card of an earlier answer tells it."""
    from mmllmrec.training.tune import Tuned

    card, data = RunCard.load(path), split.data.name
    if (card.data, card.split.get("name")) != (data, split.name) or "tuned" not in card.settings:
        what = f"{split.name} of {data}"
        raise DataError(f"{path} is no answer on {what}: its settings were chosen for something else")
    told, found = card.settings, {}
    for row in rows:
        chosen = {k: v for k, v in told["tuned"].get(row.name, {}).items() if k != "search"}
        if row.space and chosen:
            if set(chosen) != set(row.space):
                raise DataError(f"{path}: {row.name} has settings {sorted(chosen)}, and wants {sorted(row.space)}")
            about = {k: told[k][row.search] for k in ("trials run", "minutes run")}
            one = RunCard(kind="tune", name=row.name, data=data, settings={"fit": row.settings, **about})
            found[row.search] = Tuned(chosen, told["validation"][row.search], pd.DataFrame(), one)
    return found


def _search(fits: _Fits, split: Split, folder: str, quick: int | None, bar: Progress) -> None:
    """Make every search of the rows on a split, into ``fits.tuned``; ``folder`` is one of their own, or empty."""
    from mmllmrec.training.tune import OtherSearchError, tune

    budget = fits.budget
    place = budget.folder / fits.data.name / folder
    place = place if split.name == "cold_items" else place / split.name
    made: dict[str, Any] = {}
    room: dict[str, Any] = {}
    known = set(fits.tuned)  # told by a card

    def fitted(name: str) -> Any:
        if name not in made:
            made[name] = fits.fit(fits.by_name[name], split, 0, made, room)
        return made[name]

    for row in fits.by_name.values():
        if not row.space:
            continue
        if row.search in known:
            bar.skip(1)
            continue
        if row.search != REFERENCE.search:
            room = room or fits.room(split, 0)
        bar.begin(f"tune {row.search}")
        first = {name: fitted(name) for name in row.after}
        option, values = row.choices or ("", ())
        # every choice at the first start, and every other start with the first choice
        chosen = [{option: v} for v in values] or [{}]
        starts = [{**start, **chosen[0]} for start in row.starts]
        starts += [{**row.starts[0], **choice} for choice in chosen[1:]]
        space, settings = row.space | ({option: list(values)} if values else {}), row.settings | room
        if quick:
            space, settings = {k: v for k, v in space.items() if k != "fit.epochs"}, settings | {"epochs": quick}
            starts = [{k: v for k, v in start.items() if k in space} for start in starts]

        def build(split: Split, row: Row = row, first: Any = first, **options: Any) -> Any:
            return row.build(split, first, **options)

        try:
            found = tune(
                build,
                split,
                space=space,
                settings=settings,
                start=starts,
                trials=budget.trials + max(len(values) - 1, 0),
                minutes=budget.minutes,
                folder=place / row.search,
                keep_best=True,
                progress=bar.shown,
            )
        except OtherSearchError as error:
            why = "the room of new items follows the reference's score, and so its budget: " if room else ""
            raise DataError(f"{error}; {why}give another folder of searches (--tuned)") from error
        fits.tuned[row.search] = found
        there = fits.place(row, split, 0)
        if found.kept is not None and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            found.kept.replace(there)  # the fit of seed 0, which would be the best trial's once more
        bar.end(f"{found.score:.4f} on validation in {found.card.settings['trials run']} trials")


def _costs(run: Any) -> dict[str, float]:
    card = run.card
    values = (float(card.trainable_parameters), card.seconds, card.peak_memory_mb, run.best_score)
    return dict(zip(COSTS, values, strict=True))
