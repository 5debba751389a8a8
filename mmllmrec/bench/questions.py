"""The library's questions, a function each: one unified model (q1), cold start (q2), more senses (q3), fusion (q4).

All take the data (a name, or a ``RecDataset``) and ``path`` of its folder; ``seeds``; the budget of every search,
``trials`` and ``minutes``; ``folder``, where the answer, its cards and checkpoints go; ``tuned``, where searches are
kept and shared; ``end_to_end``, the trainer of Unified: left out, the first question trains it end to end on planted
worlds and everything else has the cached trainer (``rows.setup``); ``vision``, the folder of another image tower, with
``{seed}`` in it where it is another for each split; ``systems``, the rows to fit, all where left out (their fits are
kept, so that more can be asked later, in another folder). A question that was cut off goes on, and one that was
answered is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmllmrec.bench.answer import COST, NDCG, Answer, Claim, Column, Layout, Line
from mmllmrec.bench.ask import VALID, Budget, Question, ask
from mmllmrec.bench.measures import RECOVERED, by_price, knocked_out, named, points, recovered
from mmllmrec.bench.rows import (
    TWIN,
    TWIN_PRESENT,
    Row,
    Setup,
    randomised,
    setup,
    shuffled,
    tuned_vbpr_row,
    twin_row,
    two_stage_row,
    unified_row,
    vector_row,
)
from mmllmrec.data import splits
from mmllmrec.data.atelier.world import Atelier
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.curves import k_shot, missing_content
from mmllmrec.evaluation.floors import ContentKNN
from mmllmrec.evaluation.report import HARMONIC

Folder = str | os.PathLike[str]
TUNED = "runs/tuned"
SOFTMAXED = ("BPR (softmax)", "LightGCN (softmax)")
RANKED = [Column(row, row) for row in ("warm", "cold", "cold only")]
COSTS = [Column(what, COST, what, digits=0) for what in ("trained parameters", "seconds", "peak MiB")]
OF_ORACLE = [Column(f"{row}, of oracle", row, of_oracle=True) for row in ("all", "warm", "cold")]
USER_EVENTS, ITEM_EVENTS = (0, 1, 3, 5), (0, 1, 2, 4)
PRICES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of a system's own score on known items
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
KNOCKED = ("without", "noised", "shuffled")


def cold_items(data: RecDataset, seed: int) -> Split:
    """The split of the questions that hold out items alone."""
    return splits.cold_items(data, seed=seed)


def _asked(make: Callable[[Setup], Question]) -> Callable[..., Answer]:
    """A question of a setup, as the function a user calls: it loads the data, searches, fits, and answers."""
    name = make.__name__

    def answer(
        *,
        data: str | RecDataset = "atelier",
        path: Folder | None = None,
        seeds: int = 3,
        trials: int = 6,
        minutes: float | None = 10.0,
        folder: Folder = f"runs/{name}",
        tuned: Folder = TUNED,
        end_to_end: bool | None = None,
        vision: Folder | None = None,
        systems: Sequence[str] | None = None,
        quick: int | None = None,
    ) -> Answer:
        asked = setup(data, path, end_to_end=end_to_end, whole=name == "q1", vision=vision)
        budget = Budget(trials, minutes, Path(tuned))
        question = make(asked) if systems is None else only(make(asked), systems)
        question = replace(question, options={"system": tuple(systems or ()), "end_to_end": end_to_end})
        return ask(question, asked, seeds=seeds, budget=budget, folder=folder, quick=quick)

    answer.__name__ = answer.__qualname__ = name
    answer.__doc__ = make.__doc__
    return answer


def only(question: Question, systems: Sequence[str]) -> Question:
    """A question of some of its rows, those they are built from or whose settings they take, and the claims that are of
    these alone. Raises ``DataError`` for a row that it does not have."""
    rows = {r.name: r for r in question.rows}
    unknown = [name for name in systems if name not in rows]
    if unknown or not systems:
        raise DataError(f"systems={list(systems)}: {unknown} are no rows of {question.name}; these are {list(rows)}")
    kept, left = set[str](), list(systems)
    while left:
        row = rows[left.pop()]
        kept.add(row.name)
        searched = [] if row.space else [r.name for r in rows.values() if r.search == row.search and r.space]
        left += [other for other in (*row.after, *searched) if other not in kept]
    gone = rows.keys() - kept
    claims = []
    for claim in question.claims:
        others = (claim.other,) if isinstance(claim.other, str) else claim.other
        others = tuple(o for o in others if o not in gone)
        if claim.system not in gone and others:
            claims.append(replace(claim, other=others))
    first = question.first in kept
    return replace(
        question,
        rows=[r for r in question.rows if r.name in kept],
        claims=claims,
        controls=question.controls if first else (),
        first=question.first if first else next(r.name for r in reversed(question.rows) if r.name in kept),
    )


@_asked
def q1(asked: Setup) -> Question:
    """Does one model, trained from pixels and words to rankings, beat extracting first and encoding later?

    Rows: ID-only and content baselines under the same loss, the two-stage twin and the unified model; a baseline on the
    tuned features; controls trained from scratch (random and shuffled features, random towers) and at test (shuffled
    modalities); on a planted world the factor-fed twin.
    """
    rows = [
        vector_row("BPR", loss="softmax"),
        vector_row("LightGCN", loss="softmax"),
        vector_row("VBPR", loss="softmax"),
        vector_row("LightGCNContent", loss="softmax"),
        vector_row("AlphaRec"),
        two_stage_row(asked),
        two_stage_row(
            asked, "TwoStage on random features", change=lambda table, split: randomised(table, seed=_seed(split))
        ),
        two_stage_row(
            asked, "TwoStage on shuffled features", change=lambda table, split: shuffled(table, seed=_seed(split))
        ),
        unified_row(asked),
        unified_row(asked, "Unified, random weights", random_weights=True),
        tuned_vbpr_row(),
    ]
    if asked.both:
        rows.append(unified_row(asked, "Unified (cached)", trainer="cached", searched=True))
    claims = [
        Claim("Unified", "TwoStage", "cold"),
        Claim("Unified", "TwoStage", "warm"),
        Claim("Unified", "AlphaRec", "cold"),
        Claim("Unified", SOFTMAXED, "warm"),
    ]
    if _planted(asked):
        rows += [twin_row(asked), twin_row(asked, present=True)]
        claims += [Claim("Unified", twin, row, share=True) for twin in (TWIN, TWIN_PRESENT) for row in ("warm", "cold")]
    return Question(
        "q1",
        "Q1, one unified model:",
        rows,
        Layout({NDCG: [*RANKED, *COSTS]}, grey=("Oracle", TWIN, TWIN_PRESENT)),
        cold_items,
        claims=claims,
        controls=tuple(f"shuffled {m}" for m in asked.data.catalog.modalities),
        notes=_cached_note if asked.both else lambda answer: [],
    )


def _cached_note(answer: Answer) -> list[str]:
    name = "Unified (cached)"
    score, whole = (answer.value(s, COST, VALID) for s in (name, "Unified"))
    seconds, long = (answer.value(s, COST, "seconds") for s in (name, "Unified"))
    part = f"{score / whole:.1%}" if whole > 0 else "-"
    return [
        f"{name} reaches {score:.4f} of {whole:.4f} validation {NDCG} ({part}) in {seconds / max(long, 1e-9):.2f} of "
        "the seconds"
    ]


@_asked
def q2(asked: Setup) -> Question:
    """New items and new users, from content alone or from a handful of events.

    ``splits.cold_both``: one model serves the rows of cold items and the curves of cold users and of cold items, k of
    whose events are known at scoring time. DropoutNet and ALDI stand on the row LightGCN (softmax). How much new items
    are worth is a choice: what each system gives at other prices is told beside the one price of the first table.
    """
    first = "LightGCN (softmax)"
    rows = [
        vector_row("LightGCN", loss="softmax"),
        vector_row("DropoutNet", loss="softmax", first=first),
        vector_row("CLCRec"),
        vector_row("ALDI", loss="softmax", first=first),
        vector_row("AlphaRec"),
        two_stage_row(asked),
        unified_row(asked),
        unified_row(asked, "Unified, no ID dropout", id_dropout=0.0),
        unified_row(asked, "Unified, content-to-collaborative term", collaborative_weight=0.1),
    ]
    users = {float(k): f"cold user, {k} events" for k in USER_EVENTS}
    items = {float(k): f"cold item, {k} events" for k in ITEM_EVENTS}
    priced = {price: {row: f"{row} at {price:.0%}" for row in ("warm", "cold")} for price in PRICES}

    def more(split: Split, runs: Mapping[str, Any], seed: int) -> dict[str, list[float]]:
        systems = [*named(runs), ContentKNN(split.train, catalog=split.catalog)]
        found: dict[str, list[float]] = {}
        for of, ks, names in (("users", USER_EVENTS, users), ("items", ITEM_EVENTS, items)):
            found |= points(k_shot(systems, split, of=of, ks=ks, on="test", seed=seed), names)
        return found | by_price(split, runs, priced, seed=seed)

    return Question(
        "q2",
        "Q2, cold start:",
        rows,
        Layout(
            {
                NDCG: [*RANKED, Column(HARMONIC, HARMONIC)],
                f"{NDCG}, events of a cold user": [Column(f"{k:g}", row) for k, row in users.items()],
                f"{NDCG}, events of a cold item": [Column(f"{k:g}", row) for k, row in items.items()],
                f"{NDCG} on cold items, by their price (a share of the system's own score on known ones)": [
                    Column(f"{price:.0%}", rows["cold"]) for price, rows in priced.items()
                ],
                f"{NDCG} on warm items, at that price of cold ones": [
                    Column(f"{price:.0%}", rows["warm"]) for price, rows in priced.items()
                ],
            },
            curves={
                "cold user": Line("events known", users),
                "cold item": Line("events known", items),
                "cold items, by their price": Line(
                    "share of the score on known items", {price: rows["cold"] for price, rows in priced.items()}
                ),
            },
        ),
        lambda data, seed: splits.cold_both(data, seed=seed),
        claims=[
            Claim("Unified", other, row)
            for row in ("cold", HARMONIC)
            for other in (*(r.name for r in rows if r.name not in ("Unified", first)), "ContentKNN")
        ],
        more=more,
        notes=lambda answer: [_unpriced_note(answer, priced)],
    )


def _unpriced_note(answer: Answer, priced: Mapping[float, Mapping[str, str]]) -> str:
    """ContentKNN knows no new items from old ones and so has no price: who gives more on both?"""
    warm, cold = (answer.value("ContentKNN", row) for row in ("warm", "cold"))
    note = f"ContentKNN, which has no price, gives {cold:.4f} on cold items and {warm:.4f} on warm ones; Unified gives "
    for price, rows in priced.items():
        own, known = answer.value("Unified", rows["cold"]), answer.value("Unified", rows["warm"])
        if own >= cold:
            return note + f"{own:.4f} and {known:.4f} at a price of {price:.0%}"
    return note + f"{own:.4f} and {known:.4f} at a price of {price:.0%}, and no more at a lower one"


@_asked
def q3(asked: Setup) -> Question:
    """Do further senses help, through the same door as pictures and words, and what does it cost to miss one?

    Unified and TwoStage read pictures and words, each further sense beside them, and all; on a planted world the oracle
    without what a row cannot perceive is its ceiling. Curves at test: items that lose a modality, and, for the unified
    rows that smell, channels of the sensor that are missing.
    """
    reads = asked.data.catalog.modalities
    base = tuple(m for m in ("image", "text") if m in reads)
    if len(base) == len(reads):
        base = base[1:]
    extra = tuple(m for m in reads if m not in base)
    if not base or not extra:
        raise DataError(f"data={asked.data.name!r}: it has {list(reads)} alone, and no further sense to ask about")
    sets = [base, *((*base, m) for m in extra if len(extra) > 1)]
    rows: list[Row] = []
    for some in sets:
        title = " + ".join(some)
        rows += [
            two_stage_row(asked, f"TwoStage, {title}", modalities=some),
            unified_row(asked, f"Unified, {title}", modalities=some),
        ]
    rows += [two_stage_row(asked), unified_row(asked)]
    smells = [
        r.name for r in rows if r.name == "Unified" or (r.name.startswith("Unified") and r.name.endswith("+ sensor"))
    ]
    smells = smells if _planted(asked) and "sensor" in reads else []
    lost = {s: f"{s:.0%} of items lose a modality" for s in SHARES}
    channels = {s: f"{s:.0%} of channels missing" for s in SHARES}

    ceilings = _oracles(asked, sets)

    def more(split: Split, runs: Mapping[str, Any], seed: int) -> dict[str, list[float]]:
        found = points(missing_content(named(runs), split, shares=SHARES, on="test", seed=seed), lost)
        if smells:
            some = [s for s in named(runs) if s.name in smells]
            curve = missing_content(some, split, of="channels", shares=SHARES, on="test", seed=seed)
            found |= points(curve, channels)
        return found

    def missing(rows: Mapping[float, str]) -> list[Column]:
        return [Column(f"{share:.0%}", row) for share, row in rows.items()]

    columns = [Column("all", "all"), *RANKED]
    tables = {NDCG: [*columns, *(OF_ORACLE if _planted(asked) else [])]}
    tables[f"{NDCG}, share of items that lose a modality"] = missing(lost)
    curves = {"missing modality": Line("share of items that lose a modality", lost)}
    if smells:
        tables[f"{NDCG}, share of an item's sensor channels missing"] = missing(channels)
        curves["missing channels"] = Line("share of an item's sensor channels missing", channels)
    less = f"Unified, {' + '.join(base)}"
    claims = [Claim("Unified", less, row) for row in ("all", "warm", "cold", "cold only")]
    claims += [Claim(f"Unified, {' + '.join(some)}", less, "cold") for some in sets[1:]]
    claims += [Claim("Unified", "TwoStage", row) for row in ("all", "cold")]
    return Question(
        "q3",
        "Q3, more senses:",
        rows,
        Layout(tables, curves, grey=("Oracle", *(o.name for o in ceilings))),
        cold_items,
        claims=claims,
        beside=ceilings,
        more=more,
    )


@_asked
def q4(asked: Setup) -> Question:
    """Can fusion keep what each modality says and find what only their combination says, at once?

    The unified model with the early path alone, late ones alone (mean, gate), and both (attentive, gate, and its own,
    concatenation). On a planted world recovery says which of the true tastes each found on cold items, relative to the
    factor-fed twin. Knock-outs at test: each modality gone, noised, shuffled.
    """
    late = asked.data.catalog.modalities
    rows = [
        unified_row(asked, "Unified, early only", paths=("early",)),
        unified_row(asked, "Unified, late only", paths=late, fusion="mean"),
        unified_row(asked, "Unified, late + gate", paths=late, fusion="gate"),
        unified_row(asked, "Unified, early + late, attentive", fusion="attentive"),
        unified_row(asked, "Unified, early + late, gate", fusion="gate"),
        unified_row(asked),
    ]
    variants = [r.name for r in rows]
    planted = _planted(asked)
    knocked = [f"{kind} {m}" for m in late for kind in KNOCKED]
    tables = {NDCG: [Column(row, row) for row in ("all", "warm", "cold")] + (OF_ORACLE if planted else [])}
    if planted:
        rows.append(twin_row(asked))
        shares = [Column(name, "cold", f"recovery, {name}", digits=2) for name in RECOVERED]
        tables["recovery on cold items, share of the factor-fed twin's"] = shares
    tables[f"{NDCG} on all, knocked out at test"] = [Column(name, name) for name in knocked]
    tables[f"{NDCG} on cold, knocked out at test"] = [Column(name, f"{name}, cold") for name in knocked]

    def more(split: Split, runs: Mapping[str, Any], seed: int) -> dict[str, list[float]]:
        found = recovered(split, runs) if TWIN in runs else {}
        return found | knocked_out(split, {name: runs[name] for name in variants if name in runs}, knocked, seed=seed)

    return Question(
        "q4",
        "Q4, fusion:",
        rows,
        Layout(tables, grey=("Oracle", TWIN)),
        cold_items,
        claims=[Claim("Unified", other, row) for row in ("all", "cold") for other in variants if other != "Unified"],
        more=more,
    )


def _planted(asked: Setup) -> bool:
    return isinstance(asked.data, Atelier)


def _oracles(asked: Setup, sets: Sequence[tuple[str, ...]]) -> list[Any]:
    """What a system that reads only one of these sets can reach at most, where the truth is known."""
    if not isinstance(asked.data, Atelier):
        return []
    reads = asked.data.catalog.modalities
    return [asked.data.oracle(without=[m for m in reads if m not in some]) for some in sets]


def _seed(split: Split) -> int:
    return int(split.settings["seed"])
