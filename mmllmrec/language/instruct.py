"""Instruction tuning: questions about users and items with known answers, made from training events, and the LoRA that
learns to answer them.

Legend: U users, I items, N candidates.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.evaluation.ranking import Lists
from mmllmrec.features import adapters
from mmllmrec.features.prompts import load_prompt
from mmllmrec.language.generate import Generator, identity
from mmllmrec.language.profiles import LAST, histories
from mmllmrec.language.rerank import LABELS, NO, NOBODY, YES
from mmllmrec.seed import generator as numbers
from mmllmrec.seed import seed_everything
from mmllmrec.training.causal import Row, fit_causal, is_main_process

TASKS = ("pointwise", "pairwise", "listwise", "next_title")


@dataclass(frozen=True)
class Example:
    """A question and its answer: the prompt's name (the task), its fields, and what is to be said."""

    task: str
    fields: Mapping[str, Any]
    answer: str


def examples(
    train: Interactions,
    texts: Sequence[str],
    candidates: Lists,
    *,
    tasks: Sequence[str] = TASKS,
    per_user: int = 8,
    negatives: int = 2,
    listed: int = 20,
    last: int = LAST,
    seed: int = 0,
) -> list[Example]:
    """Questions whose answers training events know, those of each user about up to ``per_user`` of their events.

    The event asked about is taken out of the history that the prompt tells, the ``last`` of what is left. What is not
    taken comes from ``candidates`` (``ranking.top`` of a first stage, items of ``train`` left out), so that a model
    learns to tell apart what it will be asked to order, half of it, and from all items, the other half. Tasks:
    ``pointwise`` (yes to the event's item, no to ``negatives`` others), ``pairwise`` (one of each, in either place),
    ``listwise`` (``listed`` candidates, the event's item first in the answer, the others in the first stage's order),
    ``next_title`` (what was taken). Only training events are asked about: an item that is taken in validation or test
    alone can only be a "no", as for every sampled negative. Raises ``DataError`` for an unknown task, and
    where there is nothing to ask about.
    """
    unknown = [t for t in tasks if t not in TASKS]
    if unknown or not tasks:
        raise DataError(f"tasks={list(tasks)}: {unknown} are not known; these are {list(TASKS)}")
    if "listwise" in tasks and not 2 <= listed <= len(LABELS):
        raise DataError(f"listed={listed}: 2 to {len(LABELS)} candidates have a letter")
    told = np.array([bool(t) for t in texts])
    warm = np.flatnonzero((train.item_counts > 0) & told)
    offered = {
        int(u): items[real & told[items]]
        for u, items, real in zip(candidates.users, candidates.items, candidates.real, strict=True)
    }
    found: list[Example] = []
    for user, items in enumerate(histories(train, last=train.n_items)):
        items = items[told[items]]
        if len(items) < 2:
            continue
        rng = numbers(seed, "instruct", user)
        taken = set(items.tolist())
        others = [int(i) for i in offered.get(user, ()) if int(i) not in taken]
        for item in rng.permutation(items)[:per_user].tolist():
            history = [texts[i] for i in items[items != item][-last:]]
            asked = {**NOBODY, "history": history}
            wrong = _wrong(rng, others, warm, taken, max(negatives, listed))
            if not wrong:
                continue
            if "pointwise" in tasks:
                judged = [(item, YES), *((i, NO) for i in wrong[:negatives])]
                found += [Example("pointwise", {**asked, "candidate": texts[i], "reasoning": ""}, a) for i, a in judged]
            if "pairwise" in tasks:
                two = [item, wrong[0]] if rng.random() < 0.5 else [wrong[0], item]
                pair = {"first": texts[two[0]], "second": texts[two[1]]}
                found.append(Example("pairwise", {**asked, **pair}, f" {'ab'[two.index(item)]}"))
            if "listwise" in tasks:
                some = wrong[: listed - 1]
                best = [item, *(i for i in others if i in some), *(i for i in some if i not in others)]
                order = rng.permutation(len(best))
                rows = [{"label": LABELS[n], "item": texts[best[c]]} for n, c in enumerate(order)]
                answer = ", ".join(LABELS[int(np.flatnonzero(order == c)[0])] for c in range(len(best)))
                found.append(Example("listwise", {**asked, "candidates": rows, "reasoning": ""}, f" {answer}"))
            if "next_title" in tasks:
                found.append(Example("next_title", asked, f" {texts[item]}"))
    if not found:
        raise DataError("no user of training has two items of which something is said: there is nothing to ask about")
    return found


def _wrong(rng: np.random.Generator, others: list[int], warm: np.ndarray, taken: set[int], count: int) -> list[int]:
    """Up to ``count`` distinct items that were not taken: from ``others`` and from ``warm`` in turn."""
    drawn = [int(i) for i in rng.permutation(others)] if others else []
    anywhere = [int(i) for i in rng.choice(warm, min(2 * count + len(taken), len(warm)), replace=False)]
    turns = [drawn, anywhere] if rng.random() < 0.5 else [anywhere, drawn]
    mixed = [i for n in range(max(map(len, turns))) for some in turns for i in some[n : n + 1]]
    kept = [i for i in dict.fromkeys(mixed) if i not in taken]
    return kept[:count]


def rows_of(generator: Generator, some: Sequence[Example]) -> list[Row]:
    """Examples as tokens: the prompt's, and the answer's with the end mark."""
    prompts = {e.task: load_prompt(e.task) for e in some}
    end = [] if generator.tokenizer.eos_token_id is None else [generator.tokenizer.eos_token_id]
    found: list[Row] = []
    for n, one in enumerate(some):
        asked = generator.ids(prompts[one.task].render(**one.fields))
        answer = [*generator.tokenizer(one.answer, add_special_tokens=False)["input_ids"], *end]
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

    A share ``valid`` of the examples is kept aside to choose the epoch; ``fit`` are the keywords of ``fit_causal``.
    ``folder`` gets checkpoints while it trains (a run that was cut off goes on) and the adapter in PEFT's format, which
    ``Generator.load(adapter=)`` reads; ``generator`` itself is left as it is. For causal models whose projections are
    named as Llama's are (``features.adapters.LANGUAGE``); others raise ``DataError``.
    """
    rows = rows_of(generator, some)
    aside = numbers(seed, "aside").random(len(rows)) < valid
    if not aside.any() or aside.all():
        raise DataError(f"valid={valid} of {len(rows)} examples leaves {int(aside.sum())} aside: give more examples")
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
    return replace(generator, model=merged, hash=identity(merged))
