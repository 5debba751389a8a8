"""Profiles: what is said of an item and of a user, from training events alone.

Two backends write them: keyphrases in a template, which are deterministic and what a language model has to beat, and a
local language model (``generate``) by the prompts ``item_profile`` and ``user_profile``.

Legend: U users, I items, P phrases.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.features.prompts import clean, load_prompt
from mmllmrec.language.generate import Generator

LONGEST = 600  # characters of an item's text that go into a prompt
WORDS = 40  # characters at the end of a cut text among which a word's end is looked for
LAST = 20  # events of a history that go into a prompt
EVENTS = 20.0  # usual events that a history is mixed with before its shares are told
STEPS = 2  # an octave, of what is told as a percentage: what the shipped writer was taught
ROWS = 512  # whose weights over all phrases are held at once
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
STOP = frozenset(
    WORD.findall(
        "a an and are as at be been by for from had has have he her his i in into is it its of on or our she so such "
        "that the their them they this to was we were which who will with you your"
    )
)


def told(catalog: Catalog, *, seen: Sequence[str] | None = None, longest: int = LONGEST) -> list[str]:
    """What is said of each item in one line: title and text, and ``seen``, what was written of its picture; empty where
    there is nothing. A text is cut after ``longest`` characters, at a word."""
    found = []
    for n, words in enumerate(catalog.words()):
        parts = [words["title"], words["text"], seen[n] if seen is not None else ""]
        found.append(_cut(clean(". ".join(p.strip().rstrip(".") for p in parts if p.strip())), longest))
    return found


def line(attributes: Sequence[str], audience: str) -> str:
    """An item's profile in one line, as it stands in histories and lists of candidates."""
    return clean(", ".join(part for part in (*attributes, audience) if part.strip()))


def counted(lines: Sequence[str], *, most: int = 40) -> str:
    """What a history has in common: the ``most`` frequent parts of its lines (what commas part), and how often each is.

    >>> counted(["teal, vase", "teal, lamp, for weddings"])
    'of 2: teal 2, for weddings 1, lamp 1, vase 1'
    """
    counts = Counter(part for text in lines for part in _parts(text))
    often = sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:most]
    return f"of {len(lines)}: {', '.join(f'{part} {n}' for part, n in often)}" if often else ""


def weigh(leanings: Mapping[str, float]) -> dict[str, str]:
    """What is ``for`` an item (leans above 0) and what ``against`` it (below 0), in the order given; what leans to no
    side is left out.

    >>> weigh({"teal 2": 1.4, "vase 1": -0.2})
    {'for': 'teal 2', 'against': 'vase 1'}
    """
    sides = {"for": [said for said, n in leanings.items() if n > 0]}
    sides["against"] = [said for said, n in leanings.items() if n < 0]
    return {side: ", ".join(said) or "nothing" for side, said in sides.items()}


def argued(sides: Mapping[str, str]) -> str:
    """What is for and what against an item, as a prompt tells it."""
    return f"for: {sides['for']}; against: {sides['against']}"


class Overlap:
    """What speaks for an item and what against it, counted: how often a history has each part of the item's line, as a
    percentage of how often all training events have it. It is deterministic, and what a language model's own reasoning
    (``rerank.thoughts``) has to beat.

    The share of a history is its posterior mean under a Dirichlet prior that is worth ``EVENTS`` usual events, so that
    one event of a short history does not count for much. Percentages are rounded to ``steps`` an octave, two unless
    given (71, 100, 140, 200, 280 ...): a model has few numbers to learn, and one that is tuned to them can learn more.
    What is as frequent as usual, or was never taken, is left out.

    >>> overlap = Overlap({"teal": 0.1, "vase": 0.5, "lamp": 0.4})
    >>> overlap.thoughts(["teal, vase"] * 9 + ["lamp"], "teal, lamp, vase")
    'for: teal 400%, vase 140%; against: lamp 71%'
    """

    def __init__(self, usual: Mapping[str, float], *, steps: int = STEPS):
        self.usual, self.steps = dict(usual), steps

    @classmethod
    def of(cls, train: Interactions, texts: Sequence[str], *, steps: int = STEPS) -> Overlap:
        """With what is usual in ``train``: the share of its events, of items that have a line, whose line, of ``texts``
        (I,), has a part. What one item alone says, among those with an event, is no part: nobody who has not taken it
        can have it, and a text of its own must not reach a prompt."""
        counts: Counter[str] = Counter()
        items: Counter[str] = Counter()
        for text, events in zip(texts, train.item_counts.tolist(), strict=True):
            if events:
                counts.update(dict.fromkeys(_parts(text), events))
                items.update(set(_parts(text)))
        told = int(train.item_counts[np.array([bool(t) for t in texts])].sum())
        return cls({part: n / told for part, n in counts.items() if items[part] > 1}, steps=steps)

    def thoughts(self, history: Sequence[str], candidate: str) -> str:
        """Of a history's lines and a candidate's."""
        return self.of_history(history)(candidate)

    def of_history(self, history: Sequence[str]) -> Callable[[str], str]:
        """A history's lines, counted once: what is thought of each candidate's line."""
        counts, events = Counter(part for text in history for part in _parts(text)), len(history)

        def thoughts(candidate: str) -> str:
            leanings = {}
            for part in _parts(candidate):
                if usual := self.usual.get(part):
                    lift = (counts[part] + EVENTS * usual) / ((events + EVENTS) * usual)
                    step = round(self.steps * math.log2(lift))
                    leanings[f"{part} {float(f'{100 * 2 ** (step / self.steps):.2g}'):.0f}%"] = step
            return argued(weigh(leanings))

        return thoughts


def histories(train: Interactions, *, last: int = LAST) -> list[np.ndarray]:
    """Each user's ``last`` items of training, the oldest first; by place in the catalogue where no times are known."""
    times = np.zeros(len(train), dtype=np.int64) if train.times is None else train.times
    order = np.lexsort((train.items, times, train.users))
    ends = np.cumsum(np.bincount(train.users, minlength=train.n_users))
    items = train.items[order]
    return [items[max(end - last, begin) : end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


class Keyphrases:
    """Words and pairs of words, and how much more a set of items says them than the catalogue does.

    The weight of a phrase in some items is the log-odds ratio with an informative Dirichlet prior of Monroe et al. 2008
    (eqs. 16 and 22, z-scores), over how many of these items and how many of all train items say it; the prior's size is
    ``prior`` items.
    """

    def __init__(self, texts: Sequence[str], *, fit_on: np.ndarray, prior: float = 10.0, least: int = 2):
        said = [_phrases(t) for t in texts]
        names = sorted({p for ps in said for p in ps})
        place = {p: n for n, p in enumerate(names)}
        cells = [(i, place[p]) for i, ps in enumerate(said) for p in ps]
        row, column = np.array(cells, dtype=np.int64).reshape(-1, 2).T
        says = sp.csr_matrix((np.ones(len(cells), dtype=np.float32), (row, column)), shape=(len(texts), len(names)))
        counts = np.asarray(says[np.asarray(fit_on, dtype=bool)].sum(0)).ravel()
        # what hardly anything or everything says tells nothing apart
        kept = (counts >= least) & (counts < max(int(np.sum(fit_on)), 1))
        self.names = [n for n, k in zip(names, kept, strict=True) if k]
        self.says, self.counts, self.total, self.prior = says[:, kept], counts[kept], int(np.sum(fit_on)), prior

    def weights(self, of: sp.csr_matrix) -> np.ndarray:
        """z-scores of all phrases: which items, (N, I) 0 or 1 -> (N, P) float32."""
        said = np.asarray((of @ self.says).todense())
        items = np.asarray(of.sum(1))
        prior = self.prior * self.counts / max(self.total, 1)

        def odds(count: np.ndarray, n: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
            yes, no = count + prior, np.maximum(n - count, 0) + self.prior - prior
            return np.log(yes / np.maximum(no, 1e-6)), 1 / yes

        (own, spread), (every, base) = odds(said, items), odds(self.counts, float(self.total))
        found: np.ndarray = ((own - every) / np.sqrt(spread + base)).astype(np.float32)
        return np.where(said > 0, found, -np.inf)

    def top(self, of: sp.csr_matrix, *, k: int) -> list[list[str]]:
        """The ``k`` phrases of largest weight for each row of items, none inside another one."""
        blocks = [of[start : start + ROWS] for start in range(0, of.shape[0], ROWS)]
        return [self._best(row, k) for block in blocks for row in self.weights(block)]

    def _best(self, row: np.ndarray, k: int) -> list[str]:
        best: list[str] = []
        for n in np.argsort(-row, kind="stable")[: 4 * k]:
            words = set(self.names[n].split())
            if np.isfinite(row[n]) and not any(words & set(b.split()) for b in best):
                best.append(self.names[n])
            if len(best) == k:
                break
        return best


@dataclass
class Profiles:
    """What was written: ``items`` a line an item, ``users`` a line a user, empty where nothing was written, and
    ``summaries``, a language model's sentence on each item; ``tokens`` that it read and wrote, and its ``seconds``."""

    backend: str
    items: list[str]
    users: list[str]
    summaries: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    def as_modality(
        self, catalog: Catalog, encode: Callable[[list[str]], np.ndarray], *, name: str = "profile"
    ) -> Catalog:
        """The catalogue with the items' profiles as one more modality ``name``, encoded: texts -> (N, D). An item
        without a profile lacks it. Any model of the zoo reads it, as it reads every modality."""
        table, here = _encoded(self.items, encode, "item")
        return catalog.with_features(name, table, absent=~here)

    def of_users(self, encode: Callable[[list[str]], np.ndarray]) -> np.ndarray:
        """The users' profiles encoded, texts -> (N, P), as ``models.LLMRec`` takes them: (U, P) float32, zero where
        nothing was written."""
        return _encoded(self.users, encode, "user")[0]


def _encoded(
    texts: Sequence[str], encode: Callable[[list[str]], np.ndarray], whose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Texts (N,) as rows (N, D) float32, zero where one is empty, and which are not: (N,) bool."""
    here = np.array([bool(t) for t in texts])
    if not here.any():
        raise DataError(f"no {whose} has a profile: there is nothing to encode")
    rows = np.asarray(encode([t for t in texts if t]), dtype=np.float32)
    table = np.zeros((len(texts), rows.shape[1]), dtype=np.float32)
    table[here] = rows
    return table, here


def template(train: Interactions, catalog: Catalog, *, seen: Sequence[str] | None = None, phrases: int = 6) -> Profiles:
    """Profiles of keyphrases: an item's own and those of what its takers took besides; a user's of their history.

    From ``train`` and the catalogue alone. An item without text has a profile where someone took it, a user without an
    event has none.
    """
    texts = told(catalog, seen=seen)
    found = Keyphrases(texts, fit_on=train.item_counts > 0)
    took = train.csr
    likes = found.top(took, k=phrases)
    own = found.top(sp.identity(len(texts), format="csr", dtype=np.float32), k=phrases)
    took_by, n = took.T.tocsr(), len(texts)
    audience = []
    for start in range(0, n, ROWS):  # of some items at once: of all, what was taken besides can be all pairs
        pairs = (took_by[start : start + ROWS] @ took).tocoo()
        others = pairs.col != pairs.row + start
        cells = pairs.row[others], pairs.col[others]
        beside = sp.csr_matrix((np.ones(int(others.sum()), dtype=np.float32), cells), shape=pairs.shape)
        audience += found.top(beside, k=3)
    items = []
    for mine, theirs in zip(own, audience, strict=True):
        parts = [", ".join(mine)] if mine else []
        parts += [f"for those who like {', '.join(theirs)}"] if theirs else []
        items.append("; ".join(parts))
    users = [f"likes {', '.join(mine)}" if mine else "" for mine in likes]
    return Profiles("template", items, users, about={"phrases": phrases})


def written(
    generator: Generator,
    train: Interactions,
    catalog: Catalog,
    *,
    seen: Sequence[str] | None = None,
    evidence: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]] | None = None,
    last: int = LAST,
    max_tokens: int = 160,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Profiles:
    """Profiles that a language model writes, by the prompts ``item_profile`` and ``user_profile``.

    A user's prompt holds the profiles of the ``last`` items of training, the oldest first, whatever the history's
    length; a user without an event is described as one. ``evidence`` are further lines for each item and each user
    (``retrieve``), the best first. An item of which nothing is said has no profile, and no prompt. What is too long for
    the model's context is shortened. ``folder`` keeps answers; ``options`` are ``Generator.generate``'s.
    """
    texts = told(catalog, seen=seen)
    words = catalog.words()
    of_items, of_users = evidence or ([()] * len(texts), [()] * train.n_users)
    here = [n for n, t in enumerate(texts) if t]
    asked = {"max_tokens": max_tokens, "folder": folder, "shorten": True, "progress": progress, **options}
    began = generator.seconds
    rows = [
        {
            "title": words[n]["title"],
            "text": _cut(clean(words[n]["text"]), LONGEST),
            "seen": seen[n] if seen is not None else "",
            "evidence": list(of_items[n]),
        }
        for n in here
    ]
    answers = generator.generate(load_prompt("item_profile"), rows, **asked)
    items, summaries = [""] * len(texts), [""] * len(texts)
    for n, one in zip(here, answers, strict=True):
        items[n], summaries[n] = line(one.value["attributes"], one.value["audience"]), clean(one.value["summary"])
    said = histories(train, last=last)
    rows = [
        {"history": [items[i] for i in items_of if items[i]], "evidence": list(of_users[u])}
        for u, items_of in enumerate(said)
    ]
    of = generator.generate(load_prompt("user_profile"), rows, **asked)
    users = [clean("; ".join(dict.fromkeys([*one.value["likes"], one.value["summary"]]))) for one in of]
    tokens, about = (
        sum(one.tokens_in + one.tokens_out for one in (*answers, *of)),
        {"model": generator.hash, "last": last},
    )
    return Profiles(generator.name, items, users, summaries, tokens, generator.seconds - began, about)


def described(
    generator: Generator,
    catalog: Catalog,
    modality: str,
    neighbours: Sequence[Sequence[str]],
    *,
    max_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """What each item that lacks a ``modality`` may have in it, in one line, by the prompt ``missing_modality``; empty
    for those that have it.

    It is told the item's words and the lines of its ``neighbours`` (``retrieve.Retriever.neighbours``), a list an item.
    A guess: mark it as one where it is read beside what is known. ``options`` are ``Generator.generate``'s.
    """
    words, lacking = catalog.words(), np.flatnonzero(~catalog.present(modality)).tolist()
    missing = {"image": "picture", "audio": "sound"}.get(modality, modality)
    rows = [
        {
            "title": words[n]["title"],
            "text": _cut(clean(words[n]["text"]), LONGEST),
            "missing": missing,
            "neighbours": list(neighbours[n]),
        }
        for n in lacking
    ]
    found, asked = [""] * len(words), {"max_tokens": max_tokens, "shorten": True} | options
    for n, one in zip(lacking, generator.generate(load_prompt("missing_modality"), rows, **asked), strict=True):
        found[n] = clean(one.value["description"])
    return found


def _parts(text: str) -> dict[str, None]:
    """What commas part in a line, each once, in its order."""
    return dict.fromkeys(part for part in text.split(", ") if part)


def _phrases(text: str) -> set[str]:
    """Words and pairs of neighbouring words of a text, in lower case, none of them common words alone."""
    words = [w.lower() for w in WORD.findall(text)]
    single = {w for w in words if w not in STOP}
    pairs = {f"{a} {b}" for a, b in pairwise(words) if a not in STOP and b not in STOP}
    return single | pairs


def _cut(text: str, longest: int) -> str:
    """At most ``longest`` characters of a text, to the last word where one ends among the last of them: some scripts
    put no spaces."""
    if len(text) <= longest:
        return text
    end = text.rfind(" ", longest - WORDS, longest + 1)
    return f"{text[:longest] if end < 0 else text[:end]} ..."
