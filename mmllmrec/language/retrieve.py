"""Retrieval: what training events and items' words say for a user or an item, with where each line comes from.

Legend: U users, I items, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.features.prompts import Prompt, load_prompt
from mmllmrec.index import Index
from mmllmrec.language.generate import Generator


@dataclass(frozen=True)
class Evidence:
    """A line that may be cited: its label, what it says, and what it rests on: events (user, item) of training, and
    items."""

    label: str
    said: str
    events: tuple[tuple[int, int], ...] = ()
    items: tuple[int, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Why an item is recommended to a user: sentences, each with the evidence that it cites."""

    user: int
    item: int
    sentences: tuple[tuple[str, tuple[Evidence, ...]], ...]

    def __str__(self) -> str:
        return " ".join(f"{text} [{', '.join(e.label for e in cited)}]" for text, cited in self.sentences)


class Retriever:
    """Evidence by nearest neighbours (``index.Index``, cosine) over a model's embeddings.

    ``texts`` are what is said of each item (``profiles.told``); ``users`` (U, D) and ``items`` (I, D) a fitted model's
    (``Recommender.embed``). Everything it says is of training events and of the catalogue: validation and test events
    are never seen. A user without an event has no neighbours; an item of which nothing is said is not cited.
    """

    def __init__(
        self, train: Interactions, texts: Sequence[str], users: np.ndarray | Tensor, items: np.ndarray | Tensor
    ):
        if (len(users), len(items), len(texts)) != (train.n_users, train.n_items, train.n_items):
            sizes = f"{len(users)} users, {len(items)} items, {len(texts)} texts"
            raise DataError(f"{sizes}: training knows {train.n_users} users and {train.n_items} items")
        self.train, self.texts, self._by_item = train, list(texts), train.csr.tocsc()
        self._users, self._items = (np.asarray(x.cpu() if isinstance(x, Tensor) else x) for x in (users, items))
        self._told = np.array([bool(t) for t in texts])
        warm = train.item_counts > 0
        if not (warm & self._told).any():
            raise DataError("no item of training has a text: there is nothing to cite")
        self._of_users = Index(self._users, which=train.user_counts > 0)
        self._of_items = Index(self._items, which=warm & self._told)

    def alike(self, users: np.ndarray, *, k: int = 3, each: int = 3) -> list[list[Evidence]]:
        """For each of some users, the histories of the ``k`` nearest others: the ``each`` of their items that are
        nearest to the user, none that the user took."""
        users = np.asarray(users)
        known = self.train.user_counts[users] > 0
        place, _ = self._of_users.nearest(self._users[users], k=k, besides=users)
        found = []
        for user, others, here in zip(users, place, known, strict=True):
            lines: list[Evidence] = []
            own = set(self._history(user))
            for other in others if here else ():
                theirs = [i for i in self._history(int(other)) if i not in own and self._told[i]] if other >= 0 else []
                best = _nearest_of(self._items, theirs, self._users[user], each)
                if best:
                    events = tuple((int(other), i) for i in best)
                    lines.append(Evidence(f"e{len(lines) + 1}", "; ".join(self.texts[i] for i in best), events, best))
            found.append(lines)
        return found

    def neighbours(self, items: np.ndarray, *, k: int = 3) -> list[list[Evidence]]:
        """For each of some items, the ``k`` nearest with a training event."""
        items = np.asarray(items)
        place, _ = self._of_items.nearest(self._items[items], k=k, besides=items)
        absent = ~np.abs(self._items[items]).any(axis=1)
        return [
            [
                Evidence(f"e{n}", self.texts[int(i)], (), (int(i),))
                for n, i in enumerate((i for i in row if i >= 0 and not gone), 1)
            ]
            for row, gone in zip(place, absent, strict=True)
        ]

    def between(self, user: int, item: int, *, k: int = 3) -> list[Evidence]:
        """What speaks for an item to a user: the item's own words, the ``k`` of the user's items nearest to it, and
        one more for each of ``k`` like-minded users who took it."""
        lines: list[tuple[str, tuple[tuple[int, int], ...], tuple[int, ...]]] = []
        if self._told[item]:
            lines.append((self.texts[item], (), (item,)))
        own = [i for i in self._history(user) if self._told[i] and i != item]
        for i in _nearest_of(self._items, own, self._items[item], k):
            lines.append((f"you took {self.texts[i]}", ((user, i),), (i,)))
        takers = [u for u in self._takers(item) if u != user]
        for other in _nearest_of(self._users, takers, self._users[user], k) if own else ():
            theirs = set(self._history(other))
            both = _nearest_of(self._items, [i for i in own if i in theirs], self._items[item], 1)
            if both:
                said = f"someone who also took {self.texts[both[0]]} took it"
                lines.append((said, ((other, both[0]), (other, item)), (both[0], item)))
        return [Evidence(f"e{n}", said, events, items) for n, (said, events, items) in enumerate(lines, 1)]

    def _history(self, user: int) -> list[int]:
        csr = self.train.csr
        return [int(i) for i in csr.indices[csr.indptr[user] : csr.indptr[user + 1]]]

    def _takers(self, item: int) -> list[int]:
        csc = self._by_item
        return [int(u) for u in csc.indices[csc.indptr[item] : csc.indptr[item + 1]]]


def _nearest_of(table: np.ndarray, some: Sequence[int], query: np.ndarray, k: int) -> tuple[int, ...]:
    """The k of some rows of a table (N, D) of the largest cosine with a query (D,), nearest first."""
    rows = table[list(some)]
    cosine = rows @ query / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(query), 1e-12)
    return tuple(int(some[n]) for n in np.argsort(-cosine, kind="stable")[:k])


def explain(
    generator: Generator,
    retriever: Retriever,
    pairs: Sequence[tuple[int, int]],
    *,
    k: int = 3,
    max_tokens: int = 160,
    **options: Any,
) -> list[Explanation | None]:
    """Why each item is recommended to each user, (user, item), by the prompt ``explanation``; every sentence cites.

    The answer is held to labels of the pair's own evidence while it is written, and ``cited`` refuses any other. That
    a sentence cites what there is does not make it true: read it beside its evidence. None where there is no evidence:
    nothing is said then. ``options`` are ``Generator.generate``'s; what is too long is shortened.
    """
    prompt = load_prompt("explanation")
    found: list[Explanation | None] = [None] * len(pairs)
    evidence = [retriever.between(u, i, k=k) for u, i in pairs]
    asked = {"max_tokens": max_tokens, "shorten": True} | options
    for size in sorted({len(e) for e in evidence} - {0}):  # a prompt a number of labels
        which = [n for n, e in enumerate(evidence) if len(e) == size]
        rows = [
            {
                "item": retriever.texts[pairs[n][1]],
                "evidence": [{"label": e.label, "said": e.said} for e in evidence[n]],
            }
            for n in which
        ]
        held = limited(prompt, [e.label for e in evidence[which[0]]])
        for n, one in zip(which, generator.generate(held, rows, **asked), strict=True):
            found[n] = cited(one.value, pairs[n], evidence[n])
    return found


def limited(prompt: Prompt, labels: Sequence[str]) -> Prompt:
    """The prompt ``explanation`` with citations held to ``labels``."""
    assert prompt.output is not None
    output: dict[str, Any] = copy.deepcopy(dict(prompt.output))
    output["properties"]["sentences"]["items"]["properties"]["cites"]["items"] = {"enum": list(labels)}
    return replace(prompt, output=output)


def cited(answer: dict[str, Any], pair: tuple[int, int], evidence: Sequence[Evidence]) -> Explanation:
    """An answer's sentences with what they cite. Raises ``DataError`` for a sentence without a citation, and for one of
    something that is not in the evidence."""
    known = {e.label: e for e in evidence}
    sentences = []
    for one in answer["sentences"]:
        strange = [label for label in one["cites"] if label not in known]
        if strange or not one["cites"]:
            what = f"cites {strange}" if strange else "cites nothing"
            raise DataError(
                f"explanation of item {pair[1]} to user {pair[0]}: {one['text']!r:.80} {what}; known are {list(known)}"
            )
        sentences.append((one["text"], tuple(known[label] for label in dict.fromkeys(one["cites"]))))
    return Explanation(pair[0], pair[1], tuple(sentences))
