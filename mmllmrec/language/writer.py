"""Makes ``adapters/nano-writer``: a small causal language model that answers the prompts of this library in the planted
worlds' language.

``python -m mmllmrec.language.writer adapters/nano-writer`` trains it on both planted worlds, made with seeds that no
dataset in notebooks or benchmarks uses. First it learns to repeat, from sequences of random tokens that are said twice:
whatever is asked of it later, it has to find something in a prompt and say it again. Then it learns to say what items
are, to write profiles of items and users, to weigh what speaks for and against an item, to describe what is missing and
to explain with evidence. It knows what is asked when it is to say yes or no, name one of two or order a list, and takes
it by the letter: whether an item is in the history or made of what the profile names, and whether more speaks for it
than against. What anyone likes is left to instruction tuning on the data at hand.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllmrec.data.atelier import atelier
from mmllmrec.features.prompts import load_prompt, prompts
from mmllmrec.language.profiles import LAST, Overlap, counted, histories, line, told, weigh
from mmllmrec.language.rerank import LABELS, NOBODY
from mmllmrec.language.schema import spelling
from mmllmrec.runcard import RunCard, write_atomically
from mmllmrec.seed import generator, seed_everything
from mmllmrec.training.causal import Row, fit_causal
from mmllmrec.training.nano import SPECIAL, causal, tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
TASKS = {
    "item_profile": 12,
    "user_profile": 3,
    "preference_reasoning": 4,
    "missing_modality": 1,
    "explanation": 3,
    "pointwise": 8,
    "pairwise": 1,
    "listwise": 2,
}
JUDGED = ("pointwise", "pairwise", "listwise")  # answered in plain words, as re-ranking reads them
WEIGHED = 6  # items that are weighed against one history
REPEATED = (8, 48)  # tokens of what is said twice


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    items: int = 3000  # a world
    users: int = 1500
    events: int = 45_000
    seeds: tuple[int, int] = (1_000_103, 1_000_133)  # of the two worlds
    vocabulary: int = 1536
    repeats: int = 44_000
    rows: int = 72_000
    batch_tokens: int = 4096
    lr: float = 3e-3
    seed: int = 0


class Shop:
    """One planted world as a writer sees it: what is said of each item, and what it is."""

    def __init__(self, name: str, seed: int, recipe: Recipe):
        sizes = {"n_items": recipe.items, "n_users": recipe.users, "n_events": recipe.events}
        world = atelier(name, seed=seed, missing=0.0, modalities=("text",), **sizes)  # type: ignore[arg-type]
        captions = world.captions()
        self.words = world.catalog.words()
        self.seen = captions
        self.texts = told(world.catalog, seen=captions)
        self.histories = [h for h in histories(world.interactions) if len(h) > 3]
        self.traits = list(zip(*world.traits().values(), strict=True))  # what is written, what is seen, the occasion
        self.lines = [line(t[:6], f"for {t[6]}") for t in self.traits]  # as a written profile says it, in a history
        counts = Counter(t for traits in self.traits for t in traits)
        self.share = {t: n / len(self.traits) for t, n in counts.items()}
        said = Counter(part for text in self.lines for part in text.split(", "))
        self.overlap = Overlap({part: n / len(self.lines) for part, n in said.items()})


def answers(shop: Shop, rng: np.random.Generator, count: int) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """``count`` draws of tasks with their answers: the prompt's name, its fields, and the value to be written."""
    names, weights = list(TASKS), np.array(list(TASKS.values()), dtype=float)
    for name in rng.choice(names, count, p=weights / weights.sum()):
        for fields, value in getattr(_Answers, name)(shop, rng):
            yield str(name), fields, value


Answered = list[tuple[dict[str, Any], Any]]


class _Answers:
    """A draw of each task: fields and values; of several, those that are about one history."""

    @staticmethod
    def item_profile(shop: Shop, rng: np.random.Generator) -> Answered:
        item = int(rng.integers(len(shop.texts)))
        traits, words = shop.traits[item], shop.words[item]
        says, sees = rng.random() > 0.15, rng.random() > 0.3
        if not (says or sees):
            says = True
        known = [t for n, t in enumerate(traits[:6]) if (says if n < 3 else sees) or (n == 1)]
        fields = {"title": words["title"], "text": words["text"]} if says else {"title": "", "text": ""}
        look = " ".join(traits[3:5]) if sees else ""
        summary = f"a {f'{look} ' if look else ''}{traits[0] if says else ''} {traits[1]}"
        audience = f"for {traits[6]}" if says else "anyone"
        value = {"attributes": known, "audience": audience, "summary": " ".join(summary.split())}
        return [({**fields, "seen": shop.seen[item] if sees else "", "evidence": _others(shop, rng, 2)}, value)]

    @staticmethod
    def user_profile(shop: Shop, rng: np.random.Generator) -> Answered:
        history = _history(shop, rng)
        likes = _likes(shop, history)
        value = {"likes": likes[:6], "summary": f"likes {', '.join(likes[:3])}" if likes else "likes many things"}
        return [({"history": [shop.lines[i] for i in history], "evidence": _others(shop, rng, 1)}, value)]

    @staticmethod
    def preference_reasoning(shop: Shop, rng: np.random.Generator) -> Answered:
        history = _history(shop, rng)
        counts = Counter(t for i in history for t in shop.traits[i])
        said = {"history": [shop.lines[i] for i in history], "evidence": _others(shop, rng, 1)}
        found: Answered = []
        for item in rng.integers(0, len(shop.texts), WEIGHED).tolist():
            usual = {t: shop.share[t] * len(history) for t in shop.traits[item]}
            value = weigh({f"{t} {counts[t]}": counts[t] - n for t, n in usual.items()})
            found.append(({**said, "candidate": shop.lines[item]}, value))
        return found

    @staticmethod
    def missing_modality(shop: Shop, rng: np.random.Generator) -> Answered:
        item = int(rng.integers(len(shop.texts)))
        traits, words = shop.traits[item], shop.words[item]
        near = [i for i in rng.integers(0, len(shop.texts), 40) if shop.traits[i][1] == traits[1]][:3]
        looks = Counter(t for i in near for t in shop.traits[i][3:5])
        often = [t for t, n in looks.most_common(2) if n > 1]
        fields = {"title": words["title"], "text": words["text"], "missing": "picture"}
        value = {"description": " ".join(["a", *often, traits[1]])}
        return [({**fields, "neighbours": [shop.lines[i] for i in near]}, value)]

    @staticmethod
    def explanation(shop: Shop, rng: np.random.Generator) -> Answered:
        history, item = _history(shop, rng), int(rng.integers(len(shop.texts)))
        like = sorted(history, key=lambda i: -len(set(shop.traits[i]) & set(shop.traits[item])))[:3]
        lines = [shop.lines[item], *(f"you took {shop.lines[i]}" for i in like)]
        evidence = [{"label": f"e{n}", "said": text} for n, text in enumerate(lines, 1)]
        sentences = [{"text": f"it is a {shop.traits[item][0]} {shop.traits[item][1]}", "cites": ["e1"]}]
        for n, i in enumerate(like[:2], 2):
            both = [t for t in shop.traits[item] if t in shop.traits[i]]
            if both:
                sentences.append({"text": f"what you took is {both[0]} as well", "cites": [f"e{n}"]})
        return [({"item": shop.lines[item], "evidence": evidence}, {"sentences": sentences})]

    @staticmethod
    def pointwise(shop: Shop, rng: np.random.Generator) -> Answered:
        history = _history(shop, rng)
        lines = [shop.lines[i] for i in history]
        counts = Counter(t for i in history for t in shop.traits[i])
        how = rng.choice(["history", "profile", "reasoning"])
        said = NOBODY | {"history": lines} if how == "history" else NOBODY | {"profile": counted(lines)}
        found: Answered = []
        for n in range(WEIGHED):
            own = int(rng.choice(history)) if n % 2 else int(rng.integers(len(shop.texts)))
            item = own if rng.random() < 0.5 else _near(shop, rng, own)
            reasoning, taken = "", shop.lines[item] in lines
            if how != "history":
                taken = all(counts[t] for t in shop.traits[item])
            if how == "reasoning":
                reasoning = shop.overlap.thoughts(lines, shop.lines[item])
                sides = reasoning.split("; against: ")
                taken = sides[0].count("%") > sides[1].count("%")
            found.append(({**said, "candidate": shop.lines[item], "reasoning": reasoning}, "yes" if taken else "no"))
        return found

    @staticmethod
    def pairwise(shop: Shop, rng: np.random.Generator) -> Answered:
        history = _history(shop, rng)
        lines = [shop.lines[i] for i in history]
        taken = int(rng.choice(history))
        two = [shop.lines[taken], shop.lines[_near(shop, rng, taken)]]
        if two[1] in lines:
            return []
        right = int(rng.integers(2))
        pair = {"first": two[right], "second": two[1 - right]}
        return [({**NOBODY, "history": lines, **pair}, "ab"[right])]

    @staticmethod
    def listwise(shop: Shop, rng: np.random.Generator) -> Answered:
        history = _history(shop, rng)[-10:]
        lines = [shop.lines[i] for i in history]
        size = int(rng.integers(3, 21))
        shown = [
            int(rng.choice(history)) if rng.random() < 0.3 else int(rng.integers(len(shop.texts))) for _ in range(size)
        ]
        rows = [{"label": LABELS[n], "item": shop.lines[i]} for n, i in enumerate(shown)]
        first = sorted(range(size), key=lambda n: shop.lines[shown[n]] not in lines)
        said = {**NOBODY, "history": lines, "candidates": rows, "reasoning": ""}
        return [(said, [LABELS[n] for n in first])]


def _near(shop: Shop, rng: np.random.Generator, item: int) -> int:
    """Another item that is much like one: of forty the one that shares most of its traits."""
    some = rng.integers(0, len(shop.texts), 40).tolist()
    own = set(shop.traits[item])
    return int(max((i for i in some if i != item), key=lambda i: len(own & set(shop.traits[i]))))


def _history(shop: Shop, rng: np.random.Generator) -> list[int]:
    """A part of someone's history."""
    whole = shop.histories[int(rng.integers(len(shop.histories)))]
    return [int(i) for i in whole[-int(rng.integers(3, len(whole) + 1)) :]]


def _likes(shop: Shop, history: Sequence[int]) -> list[str]:
    """What a history has more often than the shop, the clearest first."""
    counts = Counter(t for i in history for t in shop.traits[i])
    n = len(history)

    def clear(trait: str) -> float:
        usual = shop.share[trait]
        return float((counts[trait] - n * usual) / np.sqrt(n * usual * (1 - usual)))

    return sorted((t for t in counts if counts[t] > 1 and clear(t) > 1), key=lambda t: (-clear(t), t))


def _others(shop: Shop, rng: np.random.Generator, most: int) -> list[str]:
    return [shop.lines[int(i)] for i in rng.integers(0, len(shop.lines), int(rng.integers(0, most + 1)))]


def as_text(name: str, value: Any) -> str:
    """An answer as text: JSON, or, where it is a judgement, the words."""
    if name in JUDGED:
        return f" {value if isinstance(value, str) else ', '.join(value)}"
    return json.dumps(value, separators=(",", ":"))


def _repeats(recipe: Recipe, vocabulary: int) -> list[Row]:
    """Random tokens, to be said again."""
    rng = generator(recipe.seed, "repeats")
    drawn = [rng.integers(len(SPECIAL), vocabulary, rng.integers(*REPEATED)).tolist() for _ in range(recipe.repeats)]
    return [(some, some) for some in drawn]


def train(folder: Path, recipe: Recipe, *, work: Path | None = None) -> RunCard:
    """Train the writer and write ``folder`` at once: the model, its tokenizer and card.json. ``work`` keeps
    checkpoints: a run that was cut off goes on."""
    from transformers import AutoTokenizer

    seed_everything(recipe.seed)
    shops = [Shop(n, s, recipe) for n, s in zip(("atelier", "atelier-b"), recipe.seeds, strict=True)]
    rng = generator(recipe.seed, "writer")
    tasks = [one for shop in shops for one in answers(shop, rng, recipe.rows // 2)]
    ready = {name: load_prompt(name) for name in prompts()}
    asked = [(ready[name].render(**fields), as_text(name, value)) for name, fields, value in tasks]
    made: list[RunCard] = []

    def make(beside: Path) -> None:
        beside.mkdir(parents=True)
        letters = " ".join(f"{c}," for c in (*"abcdefghijklmnopqrstuvwxyz", *range(LAST + 1), "yes", "no"))
        questions = [ready[n].template for n in ready]
        corpus = [f"{q} {a}" for q, a in asked[:: max(len(asked) // 6000, 1)]]
        tokenizer(beside, [*corpus, *questions * 20, *[letters] * 50], vocabulary=recipe.vocabulary)
        tok = AutoTokenizer.from_pretrained(beside)
        seed_everything(recipe.seed)
        model = causal(tok, SIZES)
        spell = spelling(tok)
        rows: list[Row] = [(tok(q)["input_ids"], [*spell(a), tok.eos_token_id]) for q, a in asked]
        rows += [([tok.bos_token_id], [*tok(t)["input_ids"], tok.eos_token_id]) for s in shops for t in s.texts]
        options = {"batch_tokens": recipe.batch_tokens, "lr": recipe.lr, "weight_decay": 0.05, "seed": recipe.seed}
        for name, some in (("repeats", _repeats(recipe, len(tok))), ("nano-writer", rows)):
            aside = np.arange(len(some)) // WEIGHED % 40 == 39
            run = fit_causal(
                model,
                [r for r, a in zip(some, aside, strict=True) if not a],
                valid=[r for r, a in zip(some, aside, strict=True) if a],
                folder=work / name if work else None,
                name=name,
                **options,  # type: ignore[arg-type]
            )
        model.save_pretrained(beside)
        card = RunCard(
            kind="pretrain",
            name="nano-writer",
            seed=recipe.seed,
            data=f"atelier and atelier-b, seeds {recipe.seeds}, {recipe.items} items and {recipe.users} users each",
            settings={**asdict(recipe), **SIZES, "tasks": TASKS, "weighed": WEIGHED, "command": COMMAND},
            metrics={"answers_nats": round(-run.best_score, 4)},
            seconds=run.seconds,
            peak_memory_mb=run.card.peak_memory_mb,
        )
        card.save(beside / "card.json")
        made.append(card)

    write_atomically(folder, make)
    return made[0]


COMMAND = "python -m mmllmrec.language.writer adapters/nano-writer"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, help="where checkpoints go; a run that was cut off goes on")
    given = parser.parse_args()
    print(json.dumps(train(given.folder, Recipe(), work=given.work).as_dict(), indent=1))
