"""Does language help, and at what price? Profiles as one more modality, and the first places put in another order by a
language model that was tuned on training events.

Legend: U users, I items, N candidates.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from mmllmrec.language.senses import beside, heard
from mmllmrec.runcard import content_hash
from mmllmrec.seed import dealt

FIRST = REFERENCE.name  # the first stage whose first places are put in another order
N = 50  # candidates
LISTED = 20  # of them that a list is made of: a letter each
PROFILING = ("item_profile", "user_profile")
PROMPTS = (*PROFILING, "preference_reasoning", "pointwise", "listwise")
AROUND = 200  # tokens of a prompt besides the items in it, thoughts and answer among them
WEIGHTS = {"prior": (0.0, 0.5, 1.0, 2.0), "blend": (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)}  # chosen on validation
TUNING: dict[str, Any] = {"rank": 16, "lr": 3e-3, "epochs": 2, "batch_tokens": 4096}
FINE = 4  # steps an octave of what is counted, where a model is tuned to them
ASKED: dict[str, Any] = {"rounds": 4, "per_user": 4, "negatives": 2}
# of what is long to read, or has thoughts to be written: an eighth of the examples, in more time than all of the others
FEWER = {"rounds": 1, "per_user": 2}
ORDER = f"{FIRST}, in the order of the twin"
SPENT = [
    Column("tokens a user", COST, "tokens a user", digits=0),
    Column("seconds a user", COST, "seconds a user"),
    Column("tuning, s", COST, "tuning, s", digits=0),
]
LINES = {  # a row's name -> what is written of the items, and whether other items' lines are read
    "TwoStage + template profiles": ("template", False),
    "TwoStage + LLM profiles": ("written", False),
    "TwoStage + LLM profiles, retrieval": ("retrieved", False),
    "TwoStage + LLM profiles, shuffled": ("written", True),
}
ANSWERS = "answers"  # the folder of what was written and judged, by model and prompt, for all splits


@dataclass(frozen=True)
class Order:
    """The first places of a scorer in another order: by a model as it is, or ``tuned`` to what it is told (``how``,
    ``Desk.telling``); of the first ``LISTED`` alone (``few``); of ``ours`` or of the first stage. ``shuffled``: texts
    of other items; ``retrieval``: with evidence, which no model was tuned to; ``silent``: no model, how often an item
    is taken alone."""

    name: str
    tuned: str = ""
    how: str = "counted"
    few: bool = False
    ours: bool = False
    shuffled: bool = False
    retrieval: bool = False
    silent: bool = False


def _named(order: Order, ours: str) -> str:
    return f"{ours if order.ours else FIRST} + {order.name}"


ORDERS = (
    Order("prior", silent=True),
    Order("zero-shot"),
    Order("tuned", "counted"),
    Order("tuned, shuffled texts", "counted", shuffled=True),
    Order("tuned, retrieval", "counted", retrieval=True),
    Order("tuned, no thoughts", "history", "history"),
    Order(f"tuned, {LISTED}", "counted", few=True),
    Order(f"tuned, own thoughts, {LISTED}", "written", "written", few=True),
    Order(f"tuned, listwise, {LISTED}", "listwise", "listwise", few=True),
    Order("zero-shot", ours=True),
    Order("tuned", "counted", ours=True),
)
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
    model's order. It is told what is counted for and against each (``profiles.Overlap``, in ``FINE`` steps where
    it is tuned to them, sound and scent among it as clusters), zero-shot, tuned, with texts of other items (the
    control) and with retrieved evidence; or, tuned, the history alone; and of the first ``LISTED`` it is told what is
    counted, or it writes thoughts of its own, or it orders them as a list. How much the model's judgement counts
    against the scorer's own, and how much how often an item is taken (``WEIGHTS``), is chosen on validation for each of
    them alone, 0 among the choices; so it is for what knows no language and adds how often an item is taken.

    ``model`` is a language model (``Generator.load``): on planted worlds ``nano-writer`` unless named. On other data
    the rows that generate are there when one is named, and the template's are there without. What is written, judged,
    tuned and fitted is kept in ``tuned``: a bench that was cut off goes on. ``systems`` names rows, and orders of first
    places, of which none is made where none is named. Otherwise as the questions (``bench.q1``).

    What it costs a user: tokens that were read and written and the model's seconds, of profiles (all items' and all
    users', divided by the users) and of judgements on top of the profiles that they read; tuning stands apart.
    """
    asked = setup(data, path, end_to_end=end_to_end, whole=False, vision=vision)
    name = model or ("nano-writer" if isinstance(asked.data, Atelier) else None)
    ours = "Unified" if systems is None or "Unified" in systems else "TwoStage"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    desk = Desk(asked, None if name is None else Generator.load(name, device=device), Path(tuned), n, ours, quick)
    orders = dict(desk.orders)
    if systems is not None:
        desk.orders = {name: order for name, order in orders.items() if name in systems}
    question = _question(desk)
    if systems is not None:
        question = only(question, [FIRST, ours, *(s for s in systems if s not in orders)])
    options = {"model": model, "n": n if n != N else None, "system": tuple(systems or ()), "end_to_end": end_to_end}
    question = replace(question, options=options)
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
    orders: dict[str, Order] = field(default_factory=dict)  # by the name of a scorer
    _seen: list[str] | None = field(default=None, repr=False)
    _profiles: dict[Any, Profiles] = field(default_factory=dict, repr=False)
    _heard: dict[str, list[list[str]]] = field(default_factory=dict, repr=False)  # of the split at hand
    _tuning: dict[str, float] = field(default_factory=dict, repr=False)  # seconds, by a tuned model's hash

    def __post_init__(self) -> None:
        if self.writer is not None:
            self.orders = self.orders or {_named(order, self.ours): order for order in ORDERS}

    @property
    def about(self) -> dict[str, Any]:
        """What decides its numbers."""
        if self.writer is None:
            return {}
        model = {"name": self.writer.name, "hash": self.writer.hash}
        told = {
            "n": self.n,
            "listed": LISTED,
            "last": LAST,
            "weights": WEIGHTS,
            "steps": FINE,
            "orders": list(self.orders),
        }
        asked = {name: load_prompt(name).hash for name in PROMPTS}
        return {
            "language": {"model": model, **told, "tuning": TUNING, "asked": ASKED, "fewer": FEWER, "prompts": asked}
        }

    @property
    def writing(self) -> str:
        """What decides the lines that are written, besides what they are of."""
        parts = [load_prompt(name).hash for name in PROFILING]
        return content_hash("" if self.writer is None else self.writer.hash, self.asked.data.catalog.hash, parts)

    @property
    def answers(self) -> Path:
        """Where all that the model says is kept, by what it was asked."""
        return self.folder / self.asked.data.name / "language" / ANSWERS

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
        train, catalog, seen = split.train, split.catalog, self.seen()
        if kind == "template":
            began = time.perf_counter()
            found = profiles.template(train, catalog, seen=seen)
            found.seconds = time.perf_counter() - began
        else:
            evidence = self._evidence(split, made) if kind == "retrieved" else None
            options: dict[str, Any] = {"folder": self.answers, "progress": False}
            found = profiles.written(self._ready(), train, catalog, seen=seen, evidence=evidence, **options)
            if kind == "retrieved":  # the lines of its evidence were written first
                first = self.profiles(split, "written", made)
                found = replace(found, tokens=found.tokens + first.tokens, seconds=found.seconds + first.seconds)
        self._profiles[split.hash, kind] = found
        return found

    def lines(self, split: Split, made: Mapping[str, Any], how: str) -> list[str]:
        """A line an item, as the language model is told of it: what was written, and where reasons are counted, what
        sound and scent are clusters of (``language.senses``) too."""
        texts = self.profiles(split, "written", made).items
        if how != "counted":
            return texts
        if split.hash not in self._heard:
            self._heard = {split.hash: heard(split.catalog, fit_on=split.warm_items)}
        return beside(texts, self._heard[split.hash])

    def last(self, split: Split, made: Mapping[str, Any], *, besides: int = 1) -> int:
        """How many items of a history a prompt can tell with ``besides`` further ones, the longest there are."""
        writer, texts = self._ready(), self.profiles(split, "written", made).items
        longest = max(len(writer.ids(f"- {t}\n")) for t in texts)
        return int(np.clip((writer.context - AROUND) // longest - besides, 1, LAST))

    def retriever(self, split: Split, made: Mapping[str, Any], texts: Sequence[str]) -> Retriever:
        """Evidence by nearness in the first stage's vectors."""
        users, items = self._first(made).embed()
        return Retriever(split.train, texts, users.detach(), items.detach())

    def candidates(self, split: Split, made: Mapping[str, Any]) -> Lists:
        """The first places of the first stage, of all users."""
        train = split.train
        return top(frozen(self._first(made)), np.arange(train.n_users), train.n_items, seen=train.csr, k=self.n)

    def _first(self, made: Mapping[str, Any]) -> Any:
        """The first stage, on the CPU: what a tuned model was tuned to is known by its candidates, and elsewhere near
        ties fall in another order from one run to the next."""
        return made[FIRST].model.cpu()

    def telling(self, split: Split, made: Mapping[str, Any], how: str, *, tuned: bool = False) -> dict[str, Any]:
        """Keywords of ``Reranked``: ``counted``, what speaks for and against is counted, and nothing else is told;
        ``history``, a history and no thoughts; ``written``, a history and thoughts of the model's own; ``listwise``. A
        model that is ``tuned`` to what is counted is told it in ``FINE`` steps."""
        mode, reasoning = ("listwise" if how == "listwise" else "pointwise", how if how in REASONINGS else "")
        last = 0 if how == "counted" else self.last(split, made, besides=LISTED if how == "listwise" else 1)
        steps = {"steps": FINE} if tuned and how == "counted" else {}
        return {"mode": mode, "reasoning": reasoning, "last": last, **steps}

    def tuned(self, split: Split, made: Mapping[str, Any], how: str) -> Generator:
        """The language model after instruction tuning on a split's training events, told as ``telling`` says."""
        writer, texts, train = self._ready(), self.lines(split, made, how), split.train
        drawn = ASKED | ({} if how == "counted" else FEWER) | ({"rounds": 1} if self.quick else {})
        asked = self.telling(split, made, how, tuned=True)
        prompts = [load_prompt(name).hash for name in (asked["mode"], "preference_reasoning")]
        candidates = self.candidates(split, made)
        decides = (asked, drawn, TUNING, prompts, content_hash(texts), content_hash(candidates.items, candidates.real))
        place = self.place(split, "tuned", *decides)
        if (place / "adapter_config.json").is_file():
            found = writer.adapted(place)
        else:
            overlap = Overlap.of(train, texts, steps=asked["steps"]) if how == "counted" else None
            options = {"tasks": (asked["mode"],), "last": asked["last"], "listed": LISTED, "overlap": overlap, **drawn}
            some = instruct.examples(train, texts, candidates, **options)
            if how == "written":
                said, _ = thoughts(writer, [e.fields for e in some], folder=self.answers, progress=False)
                some = [replace(e, fields={**e.fields, "reasoning": t}) for e, t in zip(some, said, strict=True)]
            found = instruct.instruct(writer, some, folder=place, progress=False, **TUNING)
        self._tuning[found.hash] = json.loads((place / "card.json").read_text(encoding="utf-8"))["seconds"]
        return found

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
        others = ("TwoStage + template profiles", "TwoStage + LLM profiles, shuffled")
        claims += [Claim("TwoStage + LLM profiles", other, r) for other in others for r in ("warm", "cold")]
        claims += [Claim(best, other, "warm") for other in (FIRST, zero, f"{FIRST} + prior", f"{best}, shuffled texts")]
        claims += [Claim(f"{best}, {more}", best, "warm") for more in ("retrieval", "no thoughts")]
        shorter = (f"{best}, own thoughts, {LISTED}", f"{best}, listwise, {LISTED}")
        claims += [Claim(name, f"{best}, {LISTED}", "warm") for name in shorter]
        claims += [
            Claim(f"{desk.ours} + tuned", other, row)
            for other in (desk.ours, f"{desk.ours} + zero-shot")
            for row in ("warm", "cold")
        ]

    gone = {name for o in ORDERS if (name := _named(o, desk.ours)) not in desk.orders}

    def beside(split: Split, runs: Mapping[str, Any], seed: int) -> list[Any]:
        desk.scorers = _beside(desk, split, runs, seed)
        return desk.scorers

    return Question(
        "language",
        "Language:",
        rows,
        Layout({NDCG: [*RANKED, *SPENT]}, grey=("Oracle", TWIN, ORDER)),
        cold_items,
        claims=[c for c in claims if not gone & {c.system, c.other}],
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

    after = (FIRST,) if kind == "retrieved" else ()
    return two_stage_row(desk.asked, name, written=lines, after=after, about=desk.writing)


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
        vectors = (runs[name].model.cpu().embed() for name in (FIRST, TWIN))
        own, by = ((users @ items.T).detach() for users, items in vectors)
        scorers.append(Ordered(ORDER, own, desk.candidates(split, runs), by))
    for name, order in desk.orders.items():
        texts = desk.lines(split, runs, order.how)
        asked = {
            "texts": _dealt(texts, seed) if order.shuffled else texts,
            "n": min(desk.n, LISTED) if order.few else desk.n,
            "retriever": desk.retriever(split, runs, texts) if order.retrieval else None,
            "thinker": desk.writer,  # a model that was tuned to say yes and no has no more thoughts
            "folder": desk.answers,
            "seed": seed,
            "progress": False,
            "label": name,
            **desk.telling(split, runs, order.how, tuned=bool(order.tuned)),
        }
        language = desk.tuned(split, runs, order.tuned) if order.tuned else desk._ready()
        kind = _Silent if order.silent else Reranked
        scorer = runs[desk.ours if order.ours else FIRST].model
        scorers.append(_chosen(kind(scorer, language, split.train, **asked), split))
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
    """Tokens and seconds a user: of writing what a row reads, and of judging; seconds of tuning; weights chosen."""
    users = split.train.n_users
    found: dict[str, list[float]] = {}
    spent: dict[str, tuple[float, float]] = {}
    for name, (kind, _) in LINES.items():
        if name in runs:
            written = desk.profiles(split, kind, runs)
            spent[name] = written.tokens / users, written.seconds / users
    for one in desk.scorers:
        if isinstance(one, Reranked):
            judged = max(len(one.judged), 1)
            read = Profiles("", [], []) if isinstance(one, _Silent) else desk.profiles(split, "written", runs)
            spent[one.name] = one.tokens / judged + read.tokens / users, one.seconds / judged + read.seconds / users
            about = {"blend": one.blend, "prior": one.prior}
            about |= {"tuning, s": desk._tuning[one.language.hash]} if one.language.hash in desk._tuning else {}
            found |= {f"{one.name} | {COST} | {what}": [float(value)] for what, value in about.items()}
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
