"""Re-ranking: the first places of any scorer, put in another order by a language model.

Legend: B users, N candidates of each, I items.
"""

from __future__ import annotations

import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.evaluation.ranking import Lists, frozen, name_of, top
from mmllmrec.features.prompts import Prompt, load_prompt
from mmllmrec.language.generate import Generator
from mmllmrec.language.profiles import LAST, STEPS, Overlap, argued, histories
from mmllmrec.language.retrieve import Retriever
from mmllmrec.seed import generator as numbers

MODES = ("pointwise", "listwise")
REASONINGS = ("written", "counted")
LABELS = string.ascii_lowercase
YES, NO = " yes", " no"
NOBODY: dict[str, Any] = {"profile": "", "history": [], "evidence": []}  # what prompts say of a user, left empty


@dataclass
class Reranked:
    """The first ``n`` items of a scorer, in the order a language model gives them; a scorer itself.

    ``scorer`` ranks (``evaluation.ranking.Scorer``), items of ``train`` left out; what it puts after the first ``n``
    stays where it is. The model reads the user's ``last`` training items (none where 0), of which ``texts`` (I,) say
    what they are, with ``users``, a profile a user (``profiles``), and evidence of a ``retriever``, where given.

    ``mode="pointwise"``: each candidate is judged alone, by log p(yes) - log p(no) after the prompt ``pointwise``.
    ``mode="listwise"``: the model writes the candidates' letters, the best first, held to a permutation of them, after
    the prompt ``listwise``; the mean place over ``passes`` orders of showing them counts. A model without a sense of
    the task orders at random. ``reasoning="written"``: before it judges it writes what speaks for and against
    (``preference_reasoning``); ``"counted"``: this is counted for it (``profiles.Overlap``, of ``steps``), pointwise,
    over the whole training history, and is all that it is told of the candidate: a text speaks through what it has in
    common with other items.

    From any other pointwise judgement is taken what the model says of the same candidate to ``strangers`` other people,
    drawn among those with a history, in the mean over those who have not taken it (0: nothing is taken; where thoughts
    are written, strangers are asked about without): what a text says of itself, that it is the best or that the answer
    is yes, then counts for nothing. So does how often an item is taken by anyone; ``prior`` times log(1 + its training
    events), which no text can forge, is added to the judgement.
    With 1 this is Bayes' rule for a model that ``instruct`` tuned pointwise, as its judgement is log p(item | user) -
    log p(item), but for what strangers take away of it. ``blend`` is the weight of the model's judgement against the
    scorer's own (each standardised within the list; 1: the model alone).

    Whatever the texts say, the outcome is a permutation of the candidates. What is too long for the model's context is
    shortened, the oldest of a history first. ``folder`` keeps thoughts and judgements: what was cut off goes on, and
    what several re-rankings ask is asked once. ``tokens`` and ``seconds`` add up what was spent, that is, what was kept
    when it was made. ``thinker`` is another model that writes the thoughts. Raises ``DataError`` for an unknown mode,
    and for a listwise ``n`` above 26, the letters there are.
    """

    scorer: Any
    language: Generator
    train: Interactions
    texts: Sequence[str]
    n: int = 20
    mode: str = "pointwise"
    reasoning: str = ""
    strangers: int = 8
    prior: float = 0.0
    blend: float = 1.0
    passes: int = 1
    last: int = LAST
    steps: int = STEPS
    users: Sequence[str] | None = None
    retriever: Retriever | None = None
    prompt: Prompt | str | Path | None = None
    folder: str | os.PathLike[str] | None = None
    thinker: Generator | None = None
    seed: int = 0
    progress: bool = True
    label: str | None = None
    loss_name: str = "-"
    tokens: int = 0
    seconds: float = 0.0
    judged: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DataError(f"mode={self.mode!r}: one of {MODES}")
        if self.reasoning not in ("", *REASONINGS) or (self.mode, self.reasoning) == ("listwise", "counted"):
            raise DataError(
                f"reasoning={self.reasoning!r}: one of {REASONINGS}, or ''; listwise it can only be written"
            )
        most = len(LABELS) if self.mode == "listwise" else self.train.n_items
        if not 2 <= self.n <= most:
            raise DataError(f"n={self.n}: {self.mode} re-ranks 2 to {most} candidates")
        if not 0 <= self.blend <= 1 or self.passes < 1 or self.strangers < 0:
            raise DataError(
                f"blend={self.blend} is a share, passes={self.passes} at least 1, strangers={self.strangers} 0 or more"
            )
        if len(self.texts) != self.train.n_items:
            raise DataError(f"{len(self.texts)} texts: there are {self.train.n_items} items")
        asked = self.mode if self.prompt is None else self.prompt
        self._prompt = asked if isinstance(asked, Prompt) else load_prompt(asked)
        self._said, self._frozen = histories(self.train, last=self.last), frozen(self.scorer)

    @property
    def name(self) -> str:
        """The scorer's name and what re-ranks it."""
        how = self.mode + (f", reasoning {self.reasoning}" if self.reasoning else "")
        return self.label or f"{name_of(self.scorer)} + {self.language.name} ({how})"

    def score(self, users: np.ndarray) -> Tensor:
        """(B,) -> (B, I): the scorer's own scores, but for the first ``n``, which stand above all others, a step apart:
        equal scores of the scorer's must not put in question what was ordered."""
        users = np.asarray(users)
        lists = self.rerank(np.unique(users))
        scores = self._own(users)
        for row, user in enumerate(users):
            place = int(np.searchsorted(lists.users, user))
            items = lists.items[place][lists.real[place]]
            highest = float(scores[row][torch.isfinite(scores[row])].max())
            scores[row, items] = highest + max(abs(highest), 1.0) * 1e-3 * torch.arange(len(items), 0, -1)
        return scores

    def rerank(self, users: np.ndarray) -> Lists:
        """The first ``n`` of some users (B,) ascending, in the new order; judged once a user."""
        users = np.asarray(users)
        new = np.array([u for u in users if int(u) not in self.judged], dtype=np.int64)
        if len(new):
            first = top(self._frozen, new, self.train.n_items, seen=self.train.csr, k=self.n, seed=self.seed)
            values = self._judge(first)
            for row, user in enumerate(new):
                self.judged[int(user)] = first.items[row], first.real[row], values[row]
        shape = (len(users), min(self.n, self.train.n_items))
        parts = list(zip(*(self.judged[int(u)] for u in users), strict=True)) or [(), (), ()]
        items, real = np.array(parts[0], dtype=np.int64).reshape(shape), np.array(parts[1], dtype=bool).reshape(shape)
        values = self._blended(Lists(users, items, real), np.array(parts[2], dtype=float).reshape(shape))
        order = np.argsort(-values, axis=1, kind="stable")
        return Lists(users, np.take_along_axis(items, order, axis=1), np.take_along_axis(real, order, axis=1))

    def pairs(self) -> np.ndarray:
        """The first and the last of each user's candidates in the new order, as ``models.LLMRec`` takes what a language
        model likes and dislikes for them: (U, 2), -1 for a user of fewer than two candidates or without an event."""
        lists, found = self.rerank(np.arange(self.train.n_users)), np.full((self.train.n_users, 2), -1)
        count = lists.real.sum(axis=1)
        some = np.flatnonzero((count > 1) & (self.train.user_counts > 0))
        found[some] = np.stack([lists.items[some, 0], lists.items[some, count[some] - 1]], axis=1)
        return found

    def blended(self, blend: float, prior: float | None = None) -> Reranked:
        """The same with another ``blend``, and ``prior``; what was judged is not judged again."""
        return replace(self, blend=blend, prior=self.prior if prior is None else prior, scorer=self._frozen)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _own(self, users: np.ndarray) -> Tensor:
        """The scorer's scores, (B,) -> (B, I), ours to write to."""
        if hasattr(self._frozen, "embed"):
            of_users, of_items = (x.detach().float().cpu() for x in self._frozen.embed())
            return of_users[torch.from_numpy(users)] @ of_items.T
        return torch.as_tensor(self._frozen.score(users)).detach().float().cpu().clone()

    def _judge(self, lists: Lists) -> np.ndarray:
        """A value a candidate, larger is better: (B, N)."""
        return self._pointwise(lists) if self.mode == "pointwise" else self._listwise(lists)

    def _blended(self, lists: Lists, values: np.ndarray) -> np.ndarray:
        """Judgements (B, N) and the prior, mixed with the scorer's own; what is no candidate stays last."""
        values = values + self.prior * np.log1p(self.train.item_counts[lists.items])
        if self.blend < 1:
            own = np.take_along_axis(self._own(lists.users).numpy(), lists.items, axis=1)
            values = self.blend * _standard(values, lists.real) + (1 - self.blend) * _standard(own, lists.real)
        return np.where(lists.real, values, -np.inf)

    def _fields(self, users: np.ndarray) -> list[dict[str, Any]]:
        """What the prompts say of each user."""
        evidence = [[e.said for e in es] for es in self.retriever.alike(users)] if self.retriever else None
        return [
            {
                "profile": self.users[u] if self.users is not None else "",
                "history": [self.texts[i] for i in self._said[u] if self.texts[i]],
                "evidence": evidence[row] if evidence is not None else [],
            }
            for row, u in enumerate(users)
        ]

    def _pointwise(self, lists: Lists) -> np.ndarray:
        fields = self._fields(lists.users)
        cells = np.argwhere(lists.real)
        items = lists.items[tuple(cells.T)]
        rows = self._about([fields[b] for b in cells[:, 0]], lists.users[cells[:, 0]], items)
        if self.reasoning == "written":
            for row, thought in zip(rows, self._thoughts(rows), strict=True):
                row["reasoning"] = thought
        values = np.zeros(lists.items.shape)
        values[tuple(cells.T)] = self._leaning(rows)
        if self.strangers and self.reasoning != "counted":
            values[tuple(cells.T)] -= self._usual(lists.users[cells[:, 0]], items)
        return values

    def _usual(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """What the model says of items (R,) to strangers to users (R,), in the mean: (R,). Those who took an item are
        no strangers to it, as whoever it is judged for has not."""
        known = np.flatnonzero(self.train.user_counts)
        drawn = np.sort(
            numbers(self.seed, "strangers").choice(known, min(self.strangers + 1, len(known)), replace=False)
        )
        which, where = np.unique(items, return_inverse=True)
        told = self._about(
            [fields for fields in self._fields(drawn) for _ in which],
            np.repeat(drawn, len(which)),
            np.tile(which, len(drawn)),
        )
        said = self._leaning(told).reshape(len(drawn), -1)[:, where]
        strange = (self.train.csr[drawn][:, which].toarray() == 0)[:, where] & (drawn[:, None] != users)
        strange &= strange.cumsum(axis=0) <= self.strangers
        count = strange.sum(axis=0)
        return np.where(count > 0, (said * strange).sum(axis=0) / np.maximum(count, 1), 0.0)

    def _about(self, fields: Sequence[Mapping[str, Any]], users: np.ndarray, items: np.ndarray) -> list[dict[str, Any]]:
        """Rows of the prompt about users (R,) and items (R,), with what is counted for and against where it is."""
        if self.reasoning == "counted":
            overlap, whole = self._counting
            thoughts = {int(u): overlap.of_history(whole[u]) for u in np.unique(users)}
            said = [("", thoughts[int(u)](self.texts[i])) for u, i in zip(users, items, strict=True)]
        else:
            said = [(self.texts[i], "") for i in items]
        return [{**f, "candidate": text, "reasoning": one} for f, (text, one) in zip(fields, said, strict=True)]

    @cached_property
    def _counting(self) -> tuple[Overlap, list[list[str]]]:
        """What counts, and the lines of each user's whole history."""
        whole = histories(self.train, last=self.train.n_items)
        overlap = Overlap.of(self.train, self.texts, steps=self.steps)
        return overlap, [[self.texts[i] for i in h if self.texts[i]] for h in whole]

    def _leaning(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """log p(yes) - log p(no) of prompts."""
        before, began = self.language.read, self.language.seconds
        found = self.language.likelihoods(self._prompt, rows, (YES, NO), **self._asking)
        self.tokens += self.language.read - before
        self.seconds += self.language.seconds - began
        return (found[:, 0] - found[:, 1]).double().numpy()

    @property
    def _asking(self) -> dict[str, Any]:
        """How the model is asked, whatever it is asked."""
        return {"folder": self.folder, "shorten": True, "progress": self.progress}

    def _listwise(self, lists: Lists) -> np.ndarray:
        fields = self._fields(lists.users)
        if self.reasoning:
            asked = [
                {**f, "candidate": "; ".join(self.texts[i] for i in items[real])}
                for f, items, real in zip(fields, lists.items, lists.real, strict=True)
            ]
            thoughts = self._thoughts(asked)
        else:
            thoughts = [""] * len(fields)
        places = np.zeros(lists.items.shape)
        for turn in range(self.passes):
            shown = [self._shown(int(u), turn, int(r.sum())) for u, r in zip(lists.users, lists.real, strict=True)]
            rows = []
            for f, items, order, thought in zip(fields, lists.items, shown, thoughts, strict=True):
                listed = [{"label": LABELS[n], "item": self.texts[items[c]]} for n, c in enumerate(order)]
                rows.append({**f, "candidates": listed, "reasoning": thought})
            began = self.language.seconds
            labels = [LABELS[: len(o)] for o in shown]
            answers = self.language.permutations(self._prompt, rows, labels, **self._asking)
            self.seconds += self.language.seconds - began
            self.tokens += sum(a.tokens_in + a.tokens_out for a in answers)
            for b, (order, answer) in enumerate(zip(shown, answers, strict=True)):
                for place, letter in enumerate(answer.value):
                    places[b, order[LABELS.index(letter)]] -= place
        return places

    def _shown(self, user: int, turn: int, count: int) -> np.ndarray:
        """The order in which a user's candidates are shown: a permutation of 0 .. count - 1, drawn, so that where a
        candidate stood says nothing."""
        return numbers(self.seed, "shown", user, turn).permutation(count)

    def _thoughts(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the model writes for and against before it judges."""
        thinker = self.thinker or self.language
        began = thinker.seconds
        found, spent = thoughts(thinker, rows, **self._asking)
        self.tokens += spent
        self.seconds += thinker.seconds - began
        return found


def thoughts(generator: Generator, rows: Sequence[Mapping[str, Any]], **options: Any) -> tuple[list[str], int]:
    """What a language model writes for and against of each of some rows (history, candidate, evidence) before it
    judges, by the prompt ``preference_reasoning``, and the tokens that it took; ``options`` are of ``generate``."""
    asked = [{k: row[k] for k in ("history", "candidate", "evidence")} for row in rows]
    options = {"max_tokens": 48, "shorten": True} | options
    answers = generator.generate(load_prompt("preference_reasoning"), asked, **options)
    return [argued(a.value) for a in answers], sum(a.tokens_in + a.tokens_out for a in answers)


def _standard(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 within each row's real places."""
    count = np.maximum(real.sum(axis=1, keepdims=True), 1)
    mean = np.where(real, values, 0).sum(axis=1, keepdims=True) / count
    apart = np.where(real, values - mean, 0)
    spread = np.sqrt((apart**2).sum(axis=1, keepdims=True) / count)
    found: np.ndarray = apart / np.where(spread > 0, spread, 1.0)
    return found
