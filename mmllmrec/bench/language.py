"""Does language help, and at what price? Profiles as one more modality, and the first places put in another order by a
language model that was tuned on training events.

Legend: U users, I items, N candidates.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllmrec.bench.answer import COST, NDCG, Answer, Claim, Column, Layout
from mmllmrec.bench.ask import Budget, Question, ask
from mmllmrec.bench.questions import RANKED, TUNED, cold_items, only
from mmllmrec.bench.rows import REFERENCE, TWIN, Row, Setup, setup, twin_row, two_stage_row, unified_row
from mmllmrec.data.atelier.world import Atelier
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.ranking import Lists, frozen, rank, top
from mmllmrec.features.prompts import load_prompt
from mmllmrec.language import instruct, profiles
from mmllmrec.language.captions import captions
from mmllmrec.language.generate import Generator
from mmllmrec.language.profiles import LAST, Overlap, Profiles
from mmllmrec.language.rerank import REASONINGS, Reranked, thoughts
from mmllmrec.language.retrieve import Retriever
from mmllmrec.runcard import content_hash, write_json
from mmllmrec.seed import dealt

FIRST = REFERENCE.name  # the first stage whose first places are put in another order
N = 50  # candidates
LISTED = 20  # of them that a list is made of: a letter each
AROUND = 200  # tokens of a prompt besides the items in it, thoughts and answer among them
WEIGHTS = {"prior": (0.0, 0.5, 1.0, 2.0), "blend": (0.0, 0.25, 0.5, 0.75, 1.0)}  # chosen on validation
TUNING: dict[str, Any] = {"rank": 16, "lr": 3e-3, "epochs": 1, "batch_tokens": 4096}
ASKED: dict[str, Any] = {"rounds": 4, "per_user": 4, "negatives": 2}
FEWER = {"rounds": 1, "per_user": 2}  # of what is long to read, or has thoughts to be written
ORDER = f"{FIRST}, in the order of the twin"
SPENT = [Column("tokens a user", COST, "tokens a user", digits=0), Column("seconds a user", COST, "seconds a user")]
LINES = {  # a row's name -> what is written of the items, and whether other items' lines are read
    "TwoStage + template profiles": ("template", False),
    "TwoStage + LLM profiles": ("written", False),
    "TwoStage + LLM profiles, retrieval": ("retrieved", False),
    "TwoStage + LLM profiles, shuffled": ("written", True),
}
GAP = "of the gap to the twin's order of the same candidates"


def language(
    *,
    data: str | RecDataset = "atelier",
    path: str | os.PathLike[str] | None = None,
    seeds: int = 3,
    trials: int = 6,
    minutes: float | None = 10.0,
    folder: str | os.PathLike[str] = "runs/language",
    tuned: str | os.PathLike[str] = TUNED,
    model: str | None = None,
    n: int = N,
    end_to_end: bool | None = None,
    vision: str | os.PathLike[str] | None = None,
    systems: Sequence[str] | None = None,
    quick: int | None = None,
) -> Answer:
    """Profiles, retrieval and re-ranking beside the models that do without, on items known and new.

    Rows that are fitted: the first stage, the two-stage model with profiles by template, by a language model, with
    retrieved evidence, and with those of other items (the control), and the unified model. Beside them the first ``n``
    of the first stage and of the unified model (of the two-stage one where ``systems`` leaves that out) in the language
    model's order. It is told what is counted for and against each (``profiles.Overlap``), zero-shot, tuned, with texts
    of other items (the control) and with retrieved evidence; or, tuned, the history alone; and of the first ``LISTED``
    it is told what is counted, or it writes thoughts of its own, or it orders them as a list. How much the model's
    judgement counts against the scorer's own, and how much how often an item is taken (``WEIGHTS``), is chosen on
    validation for each of them alone, 0 among the choices; so it is for what knows no language and adds how often an
    item is taken.

    ``model`` is a language model (``Generator.load``): on planted worlds ``nano-writer`` unless named. On other data
    the rows that generate are there when one is named, and the template's are there without. What is written, tuned and
    fitted is kept in ``tuned``: a bench that was cut off goes on. Otherwise as the questions (``bench.q1``).
    """
    asked = setup(data, path, end_to_end=end_to_end, whole=False, vision=vision)
    name = model or ("nano-writer" if isinstance(asked.data, Atelier) else None)
    ours = "Unified" if systems is None or "Unified" in systems else "TwoStage"
    desk = Desk(asked, None if name is None else Generator.load(name), Path(tuned), n, ours, quick)
    question = _question(desk)
    question = question if systems is None else only(question, [FIRST, ours, *systems])
    budget = Budget(trials, minutes, Path(tuned))
    return ask(question, asked, seeds=seeds, budget=budget, folder=folder, quick=quick)


@dataclass
class Desk:
    """What a language model writes and learns on the splits of a dataset, made once and kept under ``folder``."""

    asked: Setup
    writer: Generator | None
    folder: Path
    n: int
    ours: str = "Unified"  # whose first places are put in another order besides the first stage's
    quick: int | None = None
    scorers: list[Any] = field(default_factory=list, repr=False)  # of the seed at hand
    _seen: list[str] | None = field(default=None, repr=False)
    _profiles: dict[Any, Profiles] = field(default_factory=dict, repr=False)

    @property
    def about(self) -> dict[str, Any]:
        """What decides its numbers."""
        if self.writer is None:
            return {}
        model = {"name": self.writer.name, "hash": self.writer.hash}
        return {"language": {"model": model, "n": self.n, "weights": WEIGHTS, "tuning": TUNING, "asked": ASKED}}

    def place(self, split: Split, *parts: Any) -> Path:
        """Where what is made for a split lies, by what it depends on."""
        own = "" if self.writer is None else self.writer.hash
        key = content_hash(split.hash, own, *map(str, parts))[:12]
        return self.folder / self.asked.data.name / "language" / f"{split.name}, seed {split.settings['seed']}" / key

    def seen(self) -> list[str] | None:
        """What is to be seen in the pictures, of a world whose pictures the shipped tower can put into words."""
        if isinstance(self.asked.data, Atelier) and "image" in self.asked.data.catalog.modalities:
            self._seen = self._seen or captions(self.asked.data.catalog, progress=False)
        return self._seen

    def profiles(self, split: Split, kind: str, made: Mapping[str, Any]) -> Profiles:
        """Profiles of a split's items and users: ``template``, ``written`` by the language model, or ``retrieved``,
        written with evidence by nearness in the first stage's vectors, of training events alone."""
        if (split.hash, kind) in self._profiles:
            return self._profiles[split.hash, kind]
        asked = [load_prompt(name).hash for name in ("item_profile", "user_profile")]
        train, catalog, place = split.train, split.catalog, self.place(split, "profiles", kind, asked)
        path = place / "profiles.json"
        if path.is_file():
            found = Profiles(**json.loads(path.read_text(encoding="utf-8")))
        else:
            began = time.perf_counter()
            if kind == "template":
                found = profiles.template(train, catalog, seen=self.seen())
            else:
                evidence = self._evidence(split, made) if kind == "retrieved" else None
                options: dict[str, Any] = {"folder": place, "progress": False}
                found = profiles.written(self._ready(), train, catalog, seen=self.seen(), evidence=evidence, **options)
            found.about["seconds"] = round(time.perf_counter() - began, 3)
            place.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(found))
        self._profiles[split.hash, kind] = found
        return found

    def last(self, split: Split, made: Mapping[str, Any], *, besides: int = 1) -> int:
        """How many items of a history a prompt can tell with ``besides`` further ones, the longest there are."""
        writer, texts = self._ready(), self.profiles(split, "written", made).items
        longest = max(len(writer.ids(f"- {t}\n")) for t in texts)
        return int(np.clip((writer.context - AROUND) // longest - besides, 1, LAST))

    def retriever(self, split: Split, made: Mapping[str, Any], texts: Sequence[str]) -> Retriever:
        """Evidence by nearness in the first stage's vectors."""
        users, items = made[FIRST].model.embed()
        return Retriever(split.train, texts, users.detach(), items.detach())

    def candidates(self, split: Split, made: Mapping[str, Any]) -> Lists:
        """The first places of the first stage, of all users."""
        train = split.train
        return top(frozen(made[FIRST].model), np.arange(train.n_users), train.n_items, seen=train.csr, k=self.n)

    def telling(self, split: Split, made: Mapping[str, Any], how: str) -> dict[str, Any]:
        """Keywords of ``Reranked``: ``counted``, what speaks for and against is counted, and nothing else is told;
        ``history``, a history and no thoughts; ``written``, a history and thoughts of the model's own; ``listwise``."""
        mode, reasoning = ("listwise" if how == "listwise" else "pointwise", how if how in REASONINGS else "")
        last = 0 if how == "counted" else self.last(split, made, besides=LISTED if how == "listwise" else 1)
        return {"mode": mode, "reasoning": reasoning, "last": last}

    def tuned(self, split: Split, made: Mapping[str, Any], how: str) -> Generator:
        """The language model after instruction tuning on a split's training events, told as ``telling`` says."""
        writer, texts, train = self._ready(), self.profiles(split, "written", made).items, split.train
        drawn = ASKED | (FEWER if how in ("listwise", "written") else {}) | ({"rounds": 1} if self.quick else {})
        asked = self.telling(split, made, how)
        prompt = load_prompt(asked["mode"]).hash
        place = self.place(split, "tuned", asked, drawn, TUNING, prompt, self.n, content_hash(texts))
        if (place / "adapter_config.json").is_file():
            return writer.adapted(place)
        overlap = Overlap.of(train, texts) if how == "counted" else None
        options = {"tasks": (asked["mode"],), "last": asked["last"], "listed": LISTED, "overlap": overlap, **drawn}
        some = instruct.examples(train, texts, self.candidates(split, made), **options)
        if how == "written":
            found, _ = thoughts(writer, [e.fields for e in some], folder=place / "thoughts", progress=False)
            some = [replace(e, fields={**e.fields, "reasoning": t}) for e, t in zip(some, found, strict=True)]
        return instruct.instruct(writer, some, folder=place, progress=False, **TUNING)

    def _evidence(self, split: Split, made: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
        """Lines for each item and each user."""
        told = self.profiles(split, "written", made).items
        found = self.retriever(split, made, told)
        items = found.neighbours(np.arange(split.train.n_items), k=2)
        users = found.alike(np.arange(split.train.n_users))
        return [[e.said for e in some] for some in items], [[e.said for e in some[:1]] for some in users]

    def _ready(self) -> Generator:
        if self.writer is None:
            raise DataError(f"{self.asked.data.name}: name a language model, model=, for what is to be written")
        return self.writer


@dataclass
class Ordered:
    """The first candidates of all users by scores (U, I), in the order of other scores (U, I); a scorer itself."""

    name: str
    own: Tensor
    lists: Lists
    by: Tensor
    loss_name: str = "-"

    def score(self, users: np.ndarray) -> Tensor:
        """(B,) -> (B, I)."""
        found: Tensor = self.own[torch.from_numpy(np.asarray(users))]
        for row, user in enumerate(np.asarray(users)):
            items = torch.from_numpy(self.lists.items[user][self.lists.real[user]])
            best = items[self.by[user, items].argsort(descending=True, stable=True)]
            found[row, best] = found[row, items].sort(descending=True).values
        return found


def _question(desk: Desk) -> Question:
    asked, planted = desk.asked, isinstance(desk.asked.data, Atelier)
    kinds = {name: kind for name, kind in LINES.items() if desk.writer is not None or kind[0] == "template"}
    rows: list[Row] = [REFERENCE, two_stage_row(asked)]
    rows += [_profile_row(desk, name, *kind) for name, kind in kinds.items()]
    rows += [unified_row(asked), *([twin_row(asked)] if planted else [])]
    zero, best = (f"{FIRST} + {how}" for how in ("zero-shot", "tuned"))
    claims = [Claim(name, "TwoStage", row) for name in kinds for row in ("warm", "cold")]
    if desk.writer is not None:
        claims += [Claim("TwoStage + LLM profiles", "TwoStage + template profiles", r) for r in ("warm", "cold")]
        claims += [Claim(best, other, "warm") for other in (FIRST, zero, f"{FIRST} + prior", f"{best}, shuffled texts")]
        claims += [Claim(f"{best}, {more}", best, "warm") for more in ("retrieval", "no thoughts")]
        shorter = (f"{best}, own thoughts, {LISTED}", f"{best}, listwise, {LISTED}")
        claims += [Claim(name, f"{best}, {LISTED}", "warm") for name in shorter]
        claims += [
            Claim(f"{desk.ours} + tuned", other, row)
            for other in (desk.ours, f"{desk.ours} + zero-shot")
            for row in ("warm", "cold")
        ]

    def beside(split: Split, runs: Mapping[str, Any], seed: int) -> list[Any]:
        desk.scorers = _beside(desk, split, runs, seed)
        return desk.scorers

    return Question(
        "language",
        "Language:",
        rows,
        Layout({NDCG: [*RANKED, *SPENT]}, grey=("Oracle", TWIN, ORDER)),
        cold_items,
        claims=claims,
        beside=beside,
        more=lambda split, runs, seed: _spent(desk, split, runs),
        notes=_notes,
        about=desk.about,
    )


def _profile_row(desk: Desk, name: str, kind: str, other: bool) -> Row:
    """The two-stage twin with profiles as one more modality; ``other``: those of other items."""

    def lines(split: Split, made: Mapping[str, Any]) -> list[str]:
        found = desk.profiles(split, kind, made).items
        return _dealt(found, split.settings["seed"]) if other else found

    return two_stage_row(desk.asked, name, written=lines, after=(FIRST,) if kind == "retrieved" else ())


def _dealt(lines: Sequence[str], seed: int) -> list[str]:
    """Lines dealt to other items among those that have one."""
    return [lines[n] for n in dealt(np.array([bool(t) for t in lines]), seed, "shuffled profiles")]


class _Silent(Reranked):
    """Re-ranking without a language model: how often an item is taken, and the scorer."""

    def _judge(self, lists: Lists) -> np.ndarray:
        return np.zeros(lists.items.shape)


def _beside(desk: Desk, split: Split, runs: Mapping[str, Any], seed: int) -> list[Any]:
    """The scorers beside the rows: the first places of the first stage and of ours in other orders."""
    scorers: list[Any] = []
    if TWIN in runs:
        own, by = ((users @ items.T).detach() for users, items in (runs[name].model.embed() for name in (FIRST, TWIN)))
        scorers.append(Ordered(ORDER, own, desk.candidates(split, runs), by))
    if desk.writer is None:
        return scorers
    texts = desk.profiles(split, "written", runs).items
    tuned = desk.tuned(split, runs, "counted")
    options = {"n": desk.n, "seed": seed, "progress": False, "folder": desk.place(split, "thoughts")}
    few: dict[str, Any] = {"n": min(desk.n, LISTED)}

    def add(
        name: str,
        language: Generator,
        how: str = "counted",
        *,
        kind: type[Reranked] = Reranked,
        of: str = FIRST,
        **more: Any,
    ) -> None:
        asked = {"texts": texts, **options, **desk.telling(split, runs, how), **more, "label": f"{of} + {name}"}
        scorers.append(_chosen(kind(runs[of].model, language, split.train, **asked), split))

    add("prior", desk.writer, kind=_Silent)
    add("zero-shot", desk.writer)
    add("tuned", tuned)
    add("tuned, shuffled texts", tuned, texts=_dealt(texts, seed))
    add("tuned, retrieval", tuned, retriever=desk.retriever(split, runs, texts))
    add("tuned, no thoughts", desk.tuned(split, runs, "history"), "history")
    add(f"tuned, {LISTED}", tuned, **few)
    add(f"tuned, own thoughts, {LISTED}", desk.tuned(split, runs, "written"), "written", **few)
    add(f"tuned, listwise, {LISTED}", desk.tuned(split, runs, "listwise"), "listwise", **few)
    add("zero-shot", desk.writer, of=desk.ours)
    add("tuned", tuned, of=desk.ours)
    return scorers


def _chosen(scorer: Reranked, split: Split) -> Reranked:
    """With the weights of the prior and of the judgement that serve validation best; the smaller ones in a tie."""
    scorer.rerank(np.arange(split.train.n_users))  # judged once, by the one whose copies share the judgements
    found = []
    for blend, prior in product(WEIGHTS["blend"], WEIGHTS["prior"]):
        if blend or not prior:  # no judgement, no prior of it
            lists = rank(scorer.blended(blend, prior), split.valid, seen=split.train.csr, k=20)
            found.append((-float(np.mean(lists.per_user(NDCG))), blend, prior))
    _, blend, prior = min(found)
    return scorer.blended(blend, prior)


def _spent(desk: Desk, split: Split, runs: Mapping[str, Any]) -> dict[str, list[float]]:
    """Tokens and seconds a user: of writing what a row reads, or of re-ranking with its choice of weights."""
    users, found = split.train.n_users, {}
    spent = {}
    for name, (kind, _) in LINES.items():
        if name in runs:
            written = desk.profiles(split, kind, runs)
            spent[name] = written.tokens / users, written.about["seconds"] / users
    for one in desk.scorers:
        if isinstance(one, Reranked):
            judged = max(len(one.judged), 1)
            spent[one.name] = one.tokens / judged, one.seconds / judged
            for what in ("blend", "prior"):
                found[f"{one.name} | {COST} | {what}"] = [float(getattr(one, what))]
    for name, (tokens, seconds) in spent.items():
        found |= {f"{name} | {COST} | tokens a user": [tokens], f"{name} | {COST} | seconds a user": [seconds]}
    return found


def _notes(answer: Answer) -> list[str]:
    """How much of the gap between the first stage and the twin's order of the same candidates is closed."""
    start, end = (answer.value(name, "warm") for name in (FIRST, ORDER))
    notes = []
    for how in ("zero-shot", "tuned", "tuned, shuffled texts", "prior"):
        value = answer.value(f"{FIRST} + {how}", "warm")
        if end > start and value == value:
            notes.append(f"{FIRST} + {how} closes {(value - start) / (end - start):.0%} {GAP}, on warm items")
    return notes
