"""The planted world: factors of items, tastes of users, true utilities, and events drawn from them.

Legend: U users, I items, L levels of a factor, B users of a block, N events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from mmllmrec.data.atelier import sense
from mmllmrec.data.atelier.draw import draw, encode
from mmllmrec.data.atelier.words import ATELIER, ATELIER_B, Vocabulary, caption, describe
from mmllmrec.data.catalog import RAW, Catalog
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.seed import generator

# term of the utility -> what must be perceived to know it: all of one of these sets
TERMS: dict[str, tuple[frozenset[str], ...]] = {
    "hue": (frozenset({"image"}),),
    "pattern": (frozenset({"image"}),),
    "material": (frozenset({"text"}),),
    "occasion": (frozenset({"text"}),),
    "kind": (frozenset({"image"}), frozenset({"text"})),
    "interaction": (frozenset({"image", "text"}),),
    "chime": (frozenset({"audio"}),),
    "scent": (frozenset({"sensor"}),),
    "popularity": (frozenset(),),
}
# modality -> the factors that it shows
SHOWS = {
    "image": ("hue", "pattern", "backdrop", "kind"),
    "text": ("material", "occasion", "maker", "kind"),
    "audio": ("chime",),
    "sensor": ("scent",),
}
YEAR = 365 * 24 * 3600
PHASES = 10  # a year's tenths: items arrive and users choose phase by phase


@dataclass(frozen=True)
class Weights:
    """Share of the utility's variance that each term has; 0 switches a term off."""

    hue: float = 0.13
    pattern: float = 0.13
    material: float = 0.13
    occasion: float = 0.11
    kind: float = 0.12
    interaction: float = 0.18
    chime: float = 0.04
    scent: float = 0.04
    popularity: float = 0.12

    def __post_init__(self) -> None:
        bad = [f.name for f in fields(self) if not getattr(self, f.name) >= 0]
        if bad:
            raise DataError(f"weights: {bad[0]} is below 0; a weight is a share of variance")


@dataclass(frozen=True)
class World:
    """A world's published settings."""

    vocabulary: Vocabulary
    seed: int
    nose: int
    weights: Weights
    temperature: float


WORLDS = {
    "atelier": World(ATELIER, seed=20, nose=1, weights=Weights(), temperature=0.2),
    "atelier-b": World(
        ATELIER_B,
        seed=30,
        nose=2,
        weights=Weights(0.10, 0.14, 0.14, 0.10, 0.10, 0.20, 0.03, 0.04, 0.15),
        temperature=0.3,
    ),
}
DEFAULT_MISSING = {"image": 0.05, "text": 0.05, "audio": 0.1, "sensor": 0.1}


@dataclass(frozen=True)
class Tastes:
    """One term of the utility as tastes (U, L) for levels (I,): its partial utility is tastes[u, levels[i]]."""

    tastes: np.ndarray
    levels: np.ndarray

    def __call__(self, users: np.ndarray) -> np.ndarray:
        """(B,) -> (B, I) float32."""
        return self.tastes[users][:, self.levels]


@dataclass(frozen=True, repr=False)
class Atelier(RecDataset):
    """A planted dataset: what ``RecDataset`` is, and the truth behind it."""

    world: str = ""
    vocabulary: Vocabulary = ATELIER
    table: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # factor -> levels (I,)
    terms: dict[str, Tastes] = field(default_factory=dict, repr=False)

    def factors(self) -> pd.DataFrame:
        """The items' true factors as level numbers, one row an item."""
        return pd.DataFrame(self.table, index=pd.Index(self.interactions.item_ids.ids, name="item_id"))

    def factor_features(self, *, cross: bool = True) -> np.ndarray:
        """True factors as features, (I, F) float32: one-hot levels and, with ``cross``, the cell of the interaction."""
        levels = self._levels(self.table)
        return np.concatenate([levels, self._cross()], axis=1) if cross else levels

    def perceptible(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """True factors by what shows them: {modality: (one-hot levels (I, F_m) float32, present (I,) bool)}, and
        ``cross``, the interaction's cell, of items with picture and words."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for modality in self.catalog.modalities:
            found[modality] = self._levels(SHOWS[modality]), self.catalog.present(modality)
        found["cross"] = self._cross(), self.catalog.present("image") & self.catalog.present("text")
        return found

    def _levels(self, factors: Iterable[str]) -> np.ndarray:
        """One-hot levels of some factors side by side, (I, F) float32."""
        levels = [self.table[f] for f in factors]
        return np.concatenate([np.eye(int(v.max()) + 1, dtype=np.float32)[v] for v in levels], axis=1)

    def _cross(self) -> np.ndarray:
        """The interaction's cell, 1 or -1, (I, 1) float32."""
        sign = (2 * self.table["backdrop"] - 1) * (2 * self.table["maker"] - 1)
        return sign[:, None].astype(np.float32)

    def utilities(self, users: np.ndarray, *, without: Iterable[str] | str = ()) -> np.ndarray:
        """True utilities before noise, (B,) -> (B, I) float32; a term that cannot be known ``without`` the named
        modalities is replaced by its expectation, 0."""
        gone = {without} if isinstance(without, str) else set(without)
        unknown = gone - set(RAW)
        if unknown:
            raise DataError(f"oracle(without={sorted(unknown)}): modalities are {list(RAW)}")
        total = np.zeros((len(users), self.interactions.n_items), dtype=np.float32)
        for name, term in self.terms.items():
            if any(not needed & gone for needed in TERMS[name]):
                total += term(users)
        return total

    def oracle(self, *, without: Iterable[str] | str = ()) -> Oracle:
        """The scorer that knows every taste: the ceiling of everything, or of what cannot perceive ``without``."""
        return Oracle(self, (without,) if isinstance(without, str) else tuple(without))

    def captions(self) -> list[str]:
        """What is to be seen in each picture, in words: for pretraining vision towers only."""
        names = list(self.table)
        return [
            caption(self.vocabulary, dict(zip(names, row, strict=True)))
            for row in zip(*self.table.values(), strict=True)
        ]

    def traits(self) -> dict[str, list[str]]:
        """What is true of each item, in the words that texts and captions use: factor -> (I,)."""
        v = self.vocabulary
        said = {
            "material": v.materials,
            "kind": v.kinds,
            "maker": [ways[0] for ways in v.makers],
            "hue": list(v.hues),
            "pattern": v.patterns,
            "backdrop": [f"{b} backdrop" for b in v.backdrops],
            "occasion": v.occasions,
        }
        return {name: [words[level] for level in self.table[name]] for name, words in said.items()}


@dataclass(frozen=True)
class Oracle:
    """True utilities as a scorer."""

    data: Atelier
    without: tuple[str, ...] = ()
    loss_name = "-"

    @property
    def name(self) -> str:
        return "Oracle" + (f" without {', '.join(self.without)}" if self.without else "")

    def score(self, users: np.ndarray) -> Tensor:
        """(B,) -> (B, I) float32."""
        return torch.from_numpy(self.data.utilities(np.asarray(users), without=self.without))


def atelier(
    world: str = "atelier",
    *,
    seed: int | None = None,
    scale: float = 1.0,
    n_items: int = 1500,
    n_users: int = 1200,
    n_events: int = 30_000,
    weights: Weights | dict[str, float] | None = None,
    noise: float = 1.0,
    missing: float | dict[str, float] | None = None,
    arrivals: float = 0.15,
    choice: str = "gumbel",
    size: int = 64,
    modalities: tuple[str, ...] = RAW,
) -> Atelier:
    """Make a planted world; the same arguments give the same world, bit for bit.

    ``seed`` defaults to the world's published one. ``scale`` multiplies users, items and events. ``weights`` change
    single terms of the world's own (a dict) or all of them. A user chooses by utility / temperature + ``noise`` times a
    Gumbel variate, without replacement, among the items that have arrived; ``choice="top"`` takes the best ones.
    ``missing`` is the share of items without a modality (one number, or by modality); ``arrivals`` the share of items
    that come in the last three tenths of the year. ``modalities`` limits what is drawn and written (large benchmarks).
    """
    if world not in WORLDS:
        raise DataError(f"unknown world {world!r}; worlds are {sorted(WORLDS)}")
    if choice not in ("gumbel", "top"):
        raise DataError(f"choice={choice!r}: use 'gumbel' or 'top'")
    if not (0 <= arrivals < 1 and scale > 0 and noise >= 0):
        raise DataError(f"arrivals={arrivals} is a share below 1, scale={scale} above 0, noise={noise} not below 0")
    about = WORLDS[world]
    seed = about.seed if seed is None else seed
    n_items, n_users, n_events = (round(n * scale) for n in (n_items, n_users, n_events))
    if isinstance(weights, dict):
        weights = Weights(**{**asdict(about.weights), **weights})
    weights = weights or about.weights
    table = _factors(about.vocabulary, n_items, generator(seed, "factors"))
    terms = _terms(table, weights, n_users, generator(seed, "tastes"))
    item_ids = IdMap([f"i{n}" for n in range(n_items)], what="item id")
    user_ids = IdMap([f"u{n}" for n in range(n_users)], what="user id")
    catalog = _catalog(world, table, item_ids, missing, size, modalities, seed)
    data = Atelier(world, _nothing(user_ids, item_ids), catalog, None, {}, world, about.vocabulary, table, terms)
    spread = about.temperature * noise if choice == "gumbel" else 0.0
    users, items, times = _events(data, n_events, spread, arrivals, generator(seed, "events"))
    settings = {"source": world, "seed": seed, "weights": asdict(weights), "noise": noise, "choice": choice}
    interactions = Interactions(users, items, times, user_ids, item_ids)
    return Atelier(world, interactions, catalog, None, settings, world, about.vocabulary, table, terms)


def _nothing(user_ids: IdMap, item_ids: IdMap) -> Interactions:
    none = np.zeros(0, dtype=np.int64)
    return Interactions(none, none, none, user_ids, item_ids)


def _factors(v: Vocabulary, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Levels of every factor, independent, each level as often as the others: factor -> (I,) int64."""
    levels = {
        "hue": len(v.hues),
        "pattern": len(v.patterns),
        "backdrop": 2,
        "kind": len(v.kinds),
        "material": len(v.materials),
        "occasion": len(v.occasions),
        "maker": 2,
        "chime": len(sense.CHIMES),
        "scent": sense.SCENTS,
    }
    return {name: rng.permutation(np.arange(n) % count) for name, count in levels.items()}


def _terms(table: dict[str, np.ndarray], w: Weights, users: int, rng: np.random.Generator) -> dict[str, Tastes]:
    """Tastes of all terms, each partial utility with mean 0 for a user and variance = weight over users and items."""
    terms = {}
    n = len(table["kind"])
    for name in TERMS:
        if name == "interaction":
            levels = (table["backdrop"] ^ table["maker"]).astype(np.int64)
            tastes = rng.normal(size=(users, 1)) * np.array([[-1.0, 1.0]])
        elif name == "popularity":
            levels, tastes = np.arange(n), np.broadcast_to(rng.gumbel(size=(1, n)), (users, n))
        else:
            levels = table[name]
            tastes = rng.normal(size=(users, int(levels.max()) + 1))
        share = np.bincount(levels, minlength=tastes.shape[1]) / n
        tastes = tastes - (tastes * share).sum(1, keepdims=True)
        spread = np.sqrt((np.square(tastes[: users if name != "popularity" else 1]) * share).sum(1).mean())
        scaled = (tastes[:1] if name == "popularity" else tastes) * (np.sqrt(getattr(w, name)) / spread)
        scaled = np.broadcast_to(scaled.astype(np.float32), (users, scaled.shape[1]))
        terms[name] = Tastes(scaled, levels)
    return terms


def _events(
    data: Atelier, total: int, spread: float, arrivals: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who took what and when: users, items, times, (N,) each, ordered by time."""
    users, n = data.interactions.n_users, data.interactions.n_items
    # how many events a user has: log-normal, at least 8, never over half of the shop
    raw = rng.lognormal(0.0, 0.5, users)
    counts = np.clip(np.round(raw / raw.sum() * total), min(8, n // 4), n // 2).astype(np.int64)
    arrival = np.zeros(n, dtype=np.int64)
    late = rng.permutation(n)[: int(arrivals * n)]
    arrival[late] = rng.integers(PHASES - 3, PHASES, len(late))
    found = []
    for block in np.array_split(np.arange(users), max(users * n // 4_000_000, 1)):
        utility = data.utilities(block)
        # each user's events divided among the phases
        at = rng.random((len(block), int(counts[block].max())))
        real = np.arange(at.shape[1]) < counts[block][:, None]
        at = np.sort(np.where(real, at, 2.0), axis=1)
        phase = np.minimum((at * PHASES).astype(np.int64), PHASES)
        for p in range(PHASES):
            wanted = (phase == p).sum(1)
            k = int(wanted.max())
            if k == 0:
                continue
            key = utility + spread * rng.gumbel(size=utility.shape).astype(np.float32) if spread else utility.copy()
            key[:, arrival > p] = -np.inf
            top = np.argsort(-key, axis=1, kind="stable")[:, :k]
            row, place = np.nonzero(np.arange(k) < wanted[:, None])
            item = top[row, place]
            utility[row, item] = -np.inf  # taken once
            start = (phase < p).sum(1)
            when = at[
                row,
                start[row]
                + rng.permuted(np.broadcast_to(np.arange(k), (len(block), k)), axis=1)[row, place]
                % np.maximum(wanted, 1)[row],
            ]
            found.append(np.stack([block[row], item, (when * YEAR).astype(np.int64)]))
    u, i, t = np.concatenate(found, axis=1)
    order = np.lexsort((i, u, t))
    return u[order], i[order], t[order]


def _catalog(
    name: str,
    table: dict[str, np.ndarray],
    item_ids: IdMap,
    missing: float | dict[str, float] | None,
    size: int,
    modalities: tuple[str, ...],
    seed: int,
) -> Catalog:
    """Draw, write and record every item; what is missing is None or an empty text."""
    about, n = WORLDS[name], len(item_ids)
    shares = dict.fromkeys(RAW, missing) if isinstance(missing, int | float) else {**DEFAULT_MISSING, **(missing or {})}
    gone = {m: generator(seed, "missing", m).random(n) < shares[m] for m in RAW}
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    columns: dict[str, Any] = {"item_id": pa.array(item_ids.ids)}
    kinds: dict[str, Any] = {"item_id": datasets.Value("string"), "title": datasets.Value("string")}
    titles = [f"Item {i}" for i in range(n)]
    if "text" in modalities:
        rng = generator(seed, "words")
        written = [describe(about.vocabulary, row, rng) for row in rows]
        titles = [f"Item {i}" if gone["text"][i] else t for i, (t, _) in enumerate(written)]
        columns["text"] = pa.array(["" if gone["text"][i] else t for i, (_, t) in enumerate(written)])
        kinds["text"] = datasets.Value("string")
    columns["title"] = pa.array(titles)
    if "image" in modalities:
        rng = generator(seed, "pictures")
        pictures = [encode(draw(about.vocabulary, row, rng, size=size)) for row in rows]
        cells = [None if gone["image"][i] else {"bytes": p, "path": None} for i, p in enumerate(pictures)]
        columns["image"] = pa.array(cells, type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        kinds["image"] = datasets.Image(decode=False)
    signals = {
        "audio": lambda: sense.chimes(table["chime"], generator(seed, "chimes")),
        "sensor": lambda: sense.scents(table["scent"], generator(seed, "scents"), nose=about.nose),
    }
    for m in ("audio", "sensor"):
        if m in modalities:
            values = signals[m]()
            width = values.shape[1]
            lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
            indices = pa.array(np.arange(n), mask=gone[m])
            columns[m] = lists.cast(pa.list_(pa.float32())).take(indices)
            kinds[m] = datasets.List(datasets.Value("float32"))
    order = [c for c in ("item_id", "title", *RAW) if c in columns]
    features = datasets.Features({c: kinds[c] for c in order})
    content = pa.table({c: columns[c] for c in order}).cast(features.arrow_schema)
    return Catalog(datasets.Dataset(content, info=datasets.DatasetInfo(features=features)), item_ids, name=name)
