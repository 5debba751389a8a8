"""Instruction tuning: questions about users and items with known answers, made from training events, and the LoRA that
learns to answer them.

Legend: U users, I items, N candidates.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.evaluation.ranking import Lists
from mmllmrec.features import adapters
from mmllmrec.features.prompts import load_prompt
from mmllmrec.language.generate import Generator, identity
from mmllmrec.language.profiles import LAST, Overlap, histories
from mmllmrec.language.rerank import LABELS, NO, NOBODY, YES
from mmllmrec.seed import generator as numbers
from mmllmrec.seed import seed_everything
from mmllmrec.training.causal import Row, fit_causal, is_main_process

TASKS = ("pointwise", "pairwise", "listwise", "next_title")
Asked = list[tuple[dict[str, Any], str]]  # fields of a prompt, and what is to be said


@dataclass(frozen=True)
class Example:
    """A question and its answer: the prompt's name (the task), its fields, what is to be said, and whom it is about."""

    task: str
    fields: Mapping[str, Any]
    answer: str
    user: int = 0


def examples(
    train: Interactions,
    texts: Sequence[str],
    candidates: Lists,
    *,
    tasks: Sequence[str] = TASKS,
    rounds: int = 1,
    per_user: int = 4,
    negatives: int = 2,
    listed: int = 20,
    last: int = LAST,
    profile: Callable[[Sequence[str]], str] | None = None,
    overlap: Overlap | None = None,
    seed: int = 0,
) -> list[Example]:
    """Questions whose answers training events know.

    In each of ``rounds`` up to ``per_user`` events of a user, and at most half of them, are hidden and asked about; the
    prompts tell the others' texts: the ``last`` of them as a history, and all as ``profile`` puts them
    (``profiles.counted``), and pointwise with what ``overlap`` counts for and against, where given. Tasks:

    - ``pointwise``: yes to a hidden event's item, no to ``negatives`` items of other users' events, which are drawn as
      often as they are taken. The log-odds of yes are then, but for a constant, log p(item | user) - log p(item).
    - ``pairwise``: a hidden item and another, in either place; ``listwise``: ``listed`` candidates, the hidden item
      first in the answer, the others in the first stage's order. The others come half from ``candidates``
      (``ranking.top`` of a first stage, items of ``train`` left out), so that a model learns to tell apart what it will
      be asked to order, and half from all items.
    - ``next_title``: what was taken.

    Only training events are asked about: an item that is taken in validation or test alone can only be a "no", as for
    every sampled negative. Raises ``DataError`` for an unknown task, and where there is nothing to ask about.
    """
    unknown = [t for t in tasks if t not in TASKS]
    if unknown or not tasks:
        raise DataError(f"tasks={list(tasks)}: {unknown} are not known; these are {list(TASKS)}")
    if "listwise" in tasks and not 2 <= listed <= len(LABELS):
        raise DataError(f"listed={listed}: 2 to {len(LABELS)} candidates have a letter")
    if min(rounds, per_user, negatives) < 1:
        raise DataError(f"rounds={rounds}, per_user={per_user}, negatives={negatives}: each is at least 1")
    told = np.array([bool(t) for t in texts])
    events, warm = train.items[told[train.items]], np.flatnonzero((train.item_counts > 0) & told)
    asker = _Asker(texts, events, warm, negatives, listed)
    offered = {
        int(u): items[real & told[items]].tolist()
        for u, items, real in zip(candidates.users, candidates.items, candidates.real, strict=True)
    }
    found: list[Example] = []
    for user, items in enumerate(histories(train, last=train.n_items)):
        items = items[told[items]]
        taken = set(items.tolist())
        others = [i for i in offered.get(user, ()) if i not in taken]
        for turn in range(rounds if len(items) > 1 else 0):
            rng = numbers(seed, "instruct", user, turn)
            hidden = rng.permutation(len(items))[: min(per_user, len(items) // 2)]
            shown = [texts[i] for i in np.delete(items, hidden)]
            history = shown[max(len(shown) - last, 0) :]
            thoughts = None if overlap is None else overlap.of_history(shown)
            asked = {**NOBODY, "history": history, "profile": profile(shown) if profile is not None else ""}
            for task in tasks:  # those of one task follow one another: they begin alike
                for item in items[hidden].tolist():
                    some = getattr(asker, task)(rng, item, taken, others)
                    if thoughts is not None and task == "pointwise":
                        some = [(f | {"candidate": "", "reasoning": thoughts(f["candidate"])}, a) for f, a in some]
                    found += [Example(task, {**asked, **fields}, answer, user) for fields, answer in some]
    if not found:
        raise DataError("no user of training has two items of which something is said: there is nothing to ask about")
    return found


@dataclass(frozen=True)
class _Asker:
    """The tasks: fields and answers of questions about an item that a user took. ``events`` are the items of all
    events, ``warm`` each of them once."""

    texts: Sequence[str]
    events: np.ndarray
    warm: np.ndarray
    negatives: int
    listed: int

    def pointwise(self, rng: np.random.Generator, item: int, taken: set[int], others: list[int]) -> Asked:
        drawn = rng.choice(self.events, 4 * self.negatives + len(taken)).tolist()
        wrong = [i for i in drawn if i not in taken][: self.negatives]
        judged = [(item, YES), *((i, NO) for i in wrong)] if wrong else []
        return [({"candidate": self.texts[i], "reasoning": ""}, answer) for i, answer in judged]

    def pairwise(self, rng: np.random.Generator, item: int, taken: set[int], others: list[int]) -> Asked:
        found = []
        for wrong in self._wrong(rng, others, taken, 1):
            two = [item, wrong] if rng.random() < 0.5 else [wrong, item]
            pair = {"first": self.texts[two[0]], "second": self.texts[two[1]]}
            found.append((pair, f" {'ab'[two.index(item)]}"))
        return found

    def listwise(self, rng: np.random.Generator, item: int, taken: set[int], others: list[int]) -> Asked:
        some = self._wrong(rng, others, taken, self.listed - 1)
        if not some:
            return []
        best = [item, *(i for i in others if i in some), *(i for i in some if i not in others)]
        order = rng.permutation(len(best))
        rows = [{"label": LABELS[n], "item": self.texts[best[c]]} for n, c in enumerate(order)]
        answer = ", ".join(LABELS[int(np.flatnonzero(order == c)[0])] for c in range(len(best)))
        return [({"candidates": rows, "reasoning": ""}, f" {answer}")]

    def next_title(self, rng: np.random.Generator, item: int, taken: set[int], others: list[int]) -> Asked:
        return [({}, f" {self.texts[item]}")]

    def _wrong(self, rng: np.random.Generator, others: list[int], taken: set[int], count: int) -> list[int]:
        """Up to ``count`` distinct items that were not taken: from ``others`` and from all in turn."""
        drawn = [int(i) for i in rng.permutation(others)] if others else []
        anywhere = rng.choice(self.warm, min(2 * count + len(taken), len(self.warm)), replace=False).tolist()
        turns = [drawn, anywhere] if rng.random() < 0.5 else [anywhere, drawn]
        mixed = [i for n in range(max(map(len, turns))) for some in turns for i in some[n : n + 1]]
        return list(dict.fromkeys(i for i in mixed if i not in taken))[:count]


def rows_of(generator: Generator, some: Sequence[Example]) -> list[Row]:
    """Examples as tokens: the prompt's, and the answer's with the end mark."""
    prompts = {task: load_prompt(task) for task in {e.task for e in some}}
    end = [] if generator.tokenizer.eos_token_id is None else [generator.tokenizer.eos_token_id]
    found: list[Row] = []
    for n, one in enumerate(some):
        asked = generator.ids(prompts[one.task].render(**one.fields))
        answer = [*generator.said(one.answer), *end]
        if len(asked) + len(answer) > generator.context:
            size = f"{len(asked) + len(answer)} tokens; {generator.name} holds {generator.context}"
            raise DataError(f"example {n} ({one.task}) has {size}: ask for a shorter history, last=")
        found.append((asked, answer))
    return found


def instruct(
    generator: Generator,
    some: Sequence[Example],
    *,
    valid: float = 0.05,
    rank: int = 8,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **fit: Any,
) -> Generator:
    """The same language model with a LoRA of ``rank`` that was trained to give the examples' answers.

    The examples of a share ``valid`` of the users are kept aside to choose the epoch; ``fit`` are the keywords of
    ``fit_causal``. ``folder`` gets checkpoints while it trains (a run that was cut off goes on) and the adapter in
    PEFT's format, which ``Generator.load(adapter=)`` reads; ``generator`` itself is left as it is. Raises ``DataError``
    for a share that leaves nobody aside.
    """
    rows = rows_of(generator, some)
    whose = np.unique([one.user for one in some], return_inverse=True)[1]
    whole = int(whose.max(initial=-1)) + 1
    kept = numbers(seed, "aside").permutation(whole)[: max(round(valid * whole), 1)]
    aside = np.isin(whose, kept)
    if not aside.any() or aside.all():
        raise DataError(f"valid={valid} of {whole} users leaves {len(kept)} aside: give examples of more users")
    seed_everything(seed)  # a LoRA's first factor is drawn
    adapted = adapters.attach(copy.deepcopy(generator.model), rank=rank, kind="language")
    place = None if folder is None else Path(folder)
    run = fit_causal(
        adapted,
        [r for r, a in zip(rows, aside, strict=True) if not a],
        valid=[r for r, a in zip(rows, aside, strict=True) if a],
        folder=place,
        seed=seed,
        name=f"instruct {generator.name}",
        **fit,
    )
    if place is not None and is_main_process():
        about = {"base_model": generator.name, "base_weights": generator.hash, "valid loss": -run.best_score}
        adapters.save(adapted, place, card=run.card.as_dict() | about)
    merged = adapted.merge_and_unload().eval()
    return replace(generator, model=merged, hash=identity(merged, generator.tokenizer))
