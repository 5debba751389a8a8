"""Makes a vision tower that has seen film posters: an image tower of a CLIP trained against locked words.

``python -m mmllmrec.training.posters FOLDER --split cold_items --seed 0`` trains it on the posters of the warm films of
that split of MovieLens and writes FOLDER, which ``features.towers.load_vision`` reads and ``Preset.vision`` takes. No
interaction is read, and of a cold film neither picture nor words, until the finished tower is measured on them.

Legend: B batch, N films, S pixels a side, V width of the tower's output and of the language model, G labels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmllmrec import losses
from mmllmrec.data import splits
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import load_dataset
from mmllmrec.data.descriptors import describe
from mmllmrec.data.interactions import DataError, IdMap
from mmllmrec.data.splits import Split
from mmllmrec.features.text import pool, reader
from mmllmrec.features.towers import Language, load_language, load_vision, normalise, save_clip
from mmllmrec.runcard import RunCard, content_hash, peak_memory_mb, write_atomically
from mmllmrec.seed import generator, seed_everything, torch_generator
from mmllmrec.shipped import shipped
from mmllmrec.training import checkpoint
from mmllmrec.training.fit import factor

TALL = 1.5  # height of a poster over its width
WORDS = 128  # tokens of a film's words that are read
KS = (1, 10, 50)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside data and seed.

    Chosen on warm films kept aside (split seed 0, 290 films, geometric mean rank 57, by chance 108). One run each, and
    differences of a few ranks are within its noise: words centred 57, centred and whitened 63 to 65, genres and plot
    without the title 59, sigmoid for softmax 61, 96 pixels 61, lower lr with more decay 59, harder crops with
    erasing 61, mean pooling instead of the class token 68 (whitened), three times the films (``more``) 59.
    """

    size: int = 64  # S
    patch: int = 16
    width: int = 96
    layers: int = 4
    head_width: int = 24
    start: str = "nano"  # weights to start from where names and shapes fit; "random" for none
    epochs: int = 24
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.1
    temperature: float = 0.1  # at the start; it is learned
    crop: float = 0.6  # the smallest crop's area, in squares of the poster's width
    jitter: float = 0.1  # of brightness, contrast and saturation, each
    aside: float = 0.1  # share of the films that are not trained on and choose the epoch


@dataclass
class Films:
    """What training reads of N films. posters (N, 3, H, W) uint8, whole; pixels (N, 3, S, S) uint8, as a recommender
    sees them; words (N, V) float32, what the language model makes of them."""

    posters: Tensor
    pixels: Tensor
    words: Tensor


def pretrain(
    folder: Path,
    split: Split,
    *,
    recipe: Recipe | None = None,
    also: Sequence[Split] = (),
    more: Catalog | None = None,
    language: str = "minilm",
    seed: int = 0,
    progress: bool = True,
) -> RunCard:
    """Train a tower on the warm films of ``split`` that have a picture and words, and write ``folder`` in open_clip's
    layout with ``card.json``; its CLIP has a text tower of one tiny layer, which nothing trained and nothing reads.
    ``also``: further splits that it is to serve, whose new films are left out as well.

    The loss is ``losses.info_nce`` of the tower's output and the frozen mean-pooled states of the language model on
    title and text: locked-image tuning turned round (LiT, Zhai et al. 2022, section 3.1, there the picture is locked),
    with a learned temperature. The linear map into the words' space is on the picture's side. A share of the films is
    kept aside, and the epoch at which they find their own words best is kept. Departures: the batch is hundreds, not
    thousands, and films with the same words are each other's negatives.

    ``more``: another catalogue whose films join the training, those of ``split`` left out. Work in progress is under
    ``folder/working``: decoded pictures, words and a checkpoint an epoch, from which a killed run goes on to the same
    weights; it may be removed once the card is there. Raises ``DataError`` for fewer than ten films, for a checkpoint
    of other settings or films, and for a loss that is not finite.
    """
    recipe = recipe or Recipe()
    began = time.perf_counter()
    working = folder / "working"
    catalog = with_both(split.catalog, np.logical_and.reduce([s.warm_items for s in (split, *also)]))
    aside = torch.from_numpy(set_aside(len(catalog), recipe.aside, seed=seed))
    if more is not None:
        others = np.array([i not in split.catalog.item_ids for i in more.item_ids.ids])
        catalog = catalog.joined(with_both(more, others))
    tongue = load_language(language)
    same = {**asdict(recipe), "seed": seed, "films": catalog.hash, "language": tongue.hash, "split": split.hash}
    same |= {"also": [s.hash for s in also]} if also else {}
    films = _films(working, catalog, tongue, recipe, key=content_hash(same))
    train = torch.cat([torch.nonzero(~aside)[:, 0], torch.arange(len(aside), len(catalog))])
    held = torch.nonzero(aside)[:, 0]
    batch = min(recipe.batch, len(train))

    seed_everything(seed)
    clip, about = build(recipe, films.words.shape[1])
    decayed = [p for p in clip.visual.parameters() if p.ndim > 1]
    rest = [p for p in clip.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    steps = len(train) // batch
    total = recipe.epochs * steps
    state: dict[str, Any] = {"key": content_hash(same), "epoch": 0, "best": {}, "spent": 0.0, "history": []}
    best = checkpoint.trained(clip)
    if (found := checkpoint.peek(working)) is not None:
        if found["key"] != state["key"]:
            raise DataError(f"{working} is of a run with other films or settings: pass another folder, or remove it")
        best, moments, state = checkpoint.load(working, model=clip)
        checkpoint.set_moments(optimiser, moments)
    spent = state["spent"]
    bar = tqdm(total=total, initial=state["epoch"] * steps, desc="posters", disable=not progress)
    for epoch in range(state["epoch"], recipe.epochs):
        # an epoch's films and crops depend on seed and number alone: a run cut off draws the same ones again
        rng = torch_generator(seed, "posters", epoch)
        order, sums = train[torch.randperm(len(train), generator=rng)], 0.0
        clip.train()
        for step in range(steps):
            pick = order[step * batch : (step + 1) * batch]
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr * factor(epoch * steps + step, total, "cosine", 0.05)
            seen = clip.visual(normalise(augment(films.posters[pick], recipe, rng)))
            loss = losses.info_nce(seen, films.words[pick], temperature=(-clip.logit_scale).exp())
            if not bool(torch.isfinite(loss)):
                raise DataError(f"the loss is not finite in epoch {epoch}: lower lr")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimiser.step()
            clip.logit_scale.data.clamp_(max=math.log(100))
            sums += float(loss.detach())
            bar.update()
            bar.set_postfix(epoch=epoch, loss=f"{float(loss.detach()):.3f}", log_batch=f"{math.log(batch):.3f}")
        metrics = {
            "epoch": epoch + 1,
            "loss": sums / steps,
            **retrieval(look(clip.visual, films.pixels[held]), films.words[held]),
        }
        state["history"].append(metrics)
        if not state["best"] or metrics["rank"] < state["best"]["rank"]:
            best, state["best"] = checkpoint.trained(clip), metrics
        state |= {"epoch": epoch + 1, "spent": spent + time.perf_counter() - began}
        checkpoint.save(working, model=clip, moments=checkpoint.moments(optimiser), best=best, state=state)
    bar.close()

    checkpoint.restore(clip, best)
    save_clip(folder, clip, about)
    card = RunCard(
        kind="pretrain",
        name="posters",
        seed=seed,
        data=f"{split.data.name}: {len(train):,} films to train on, {len(held):,} aside",
        loaded=split.data.about.get("loaded", {}),
        split=split.describe(),
        model={"vision": load_vision(str(folder)).hash, "language": tongue.hash, **about["vision_cfg"]},
        settings={**asdict(recipe), "language": language, "films": catalog.hash, "more": more is not None}
        | {"also": [{"name": s.name, "hash": s.hash} for s in also]},
        metrics={
            "log_batch": math.log(batch),
            "aside": state["best"],
            "losses": [h["loss"] for h in state["history"]],
            "ranks": [h["rank"] for h in state["history"]],
        },
        seconds=round(spent + time.perf_counter() - began, 1),
        peak_memory_mb=peak_memory_mb(),
        trainable_parameters=sum(p.numel() for p in clip.parameters() if p.requires_grad),
        test_opened=split.test_opened,
    )
    card.save(folder / "card.json")
    return card


# -- what is read ----------------------------------------------------------------------------------------------------


def with_both(catalog: Catalog, among: np.ndarray) -> Catalog:
    """The items of ``among`` (I,) bool that have a picture and words, as a catalogue: no other item is in it."""
    rows = np.flatnonzero(among & catalog.present("image") & catalog.present("text"))
    ids = IdMap([catalog.item_ids[int(i)] for i in rows], what="item id")
    return Catalog(catalog.dataset.select(rows), ids, name=catalog.name)


def set_aside(n: int, share: float, *, seed: int) -> np.ndarray:
    """Which of n films are kept aside: (n,) bool, the same for every recipe of a seed. Raises ``DataError`` when fewer
    than ten films are there or fewer than two would be on either side."""
    held = round(share * n)
    if n < 10 or not 2 <= held <= n - 2:
        raise DataError(f"{n} warm items with a picture and words, {held} of them aside: at least 10, 2 on either side")
    mask = np.zeros(n, dtype=bool)
    mask[generator(seed, "aside").permutation(n)[:held]] = True
    return mask


def _films(working: Path, catalog: Catalog, language: Language, recipe: Recipe, *, key: str) -> Films:
    """Pictures and words of a catalogue, read once and kept in ``working``."""
    n = len(catalog)
    path = working / "films.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return Films(**{k: file.get_tensor(k) for k in ("posters", "pixels", "words")})
        raise DataError(f"{working} is of a run with other films or settings: pass another folder, or remove it")
    posters = np.zeros((n, 3, round(TALL * recipe.size), recipe.size), dtype=np.uint8)
    for i in tqdm(range(n), desc="pictures"):
        picture = catalog.image(i)
        assert picture is not None
        fitted = picture.resize(posters.shape[:1:-1], Image.Resampling.BILINEAR)
        posters[i] = np.asarray(fitted).transpose(2, 0, 1)
    pixels = torch.from_numpy(catalog.pixels(recipe.size).copy())
    films = Films(torch.from_numpy(posters), pixels, read(language, catalog))
    write_atomically(path, lambda p: save_file(vars(films), p, metadata={"key": key}))
    return films


@torch.no_grad()
def read(language: Language, catalog: Catalog, *, batch: int = 128) -> Tensor:
    """Mean over the tokens of the language model's last states on "title. text": (N, V) float32, not normalised."""
    texts = [f"{f['title']}. {f['text']}" for f in catalog.words()]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of like length are padded least
    found = torch.zeros(len(texts), language.width)
    states_of = reader(language, None, WORDS, "cpu")
    for start in tqdm(range(0, len(order), batch), desc="words"):
        rows = order[start : start + batch]
        _, states, lengths = states_of([texts[i] for i in rows])
        found[rows] = pool(states, lengths, "mean")
    return found


# -- the tower -------------------------------------------------------------------------------------------------------


def build(recipe: Recipe, dim: int) -> tuple[Any, dict[str, Any]]:
    """An open_clip CLIP whose image tower gives (B, dim), and its config. Its text tower is a frozen stub.

    Raises ``DataError`` when the patches do not divide the picture, and for a ``start`` that is neither word.
    """
    from open_clip.model import CLIP

    if recipe.size % recipe.patch or recipe.width % recipe.head_width or recipe.start not in ("nano", "random"):
        raise DataError(f"{recipe}: patch must divide size, head_width width, and start be 'nano' or 'random'")
    vision = {"image_size": recipe.size, "layers": recipe.layers, "width": recipe.width}
    about = {
        "embed_dim": dim,
        "vision_cfg": {**vision, "head_width": recipe.head_width, "patch_size": recipe.patch},
        "text_cfg": {"context_length": 2, "vocab_size": 2, "width": 2, "heads": 1, "layers": 1},
    }
    clip: Any = CLIP(**about, init_logit_scale=-math.log(recipe.temperature))
    if recipe.start == "nano":
        known = load_vision(str(shipped("adapters/nano-base") / "clip")).model.state_dict()
        own = clip.visual.state_dict()
        fits = {k: v for k, v in known.items() if k in own and v.shape == own[k].shape}
        clip.visual.load_state_dict({**own, **fits})
    clip.requires_grad_(False)
    clip.visual.requires_grad_(True)
    clip.logit_scale.requires_grad_(True)
    return clip, about


def augment(posters: Tensor, recipe: Recipe, rng: torch.Generator) -> Tensor:
    """Random crops of whole posters, a half of them mirrored, with brightness, contrast and saturation moved:
    (B, 3, H, W) uint8 -> (B, 3, S, S) float32 in 0..255. One ``grid_sample`` for the whole batch."""
    b, _, height, width = posters.shape

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=rng)

    side, stretch = draw(recipe.crop**0.5, 1.0) * width, draw(-0.15, 0.15).exp()
    w, h = side, (side * stretch).clamp(max=height)
    x, y = w / 2 + draw(0, 1) * (width - w), h / 2 + draw(0, 1) * (height - h)
    turn = torch.zeros(b, 2, 3)
    turn[:, 0, 0], turn[:, 0, 2] = w / width * draw(-1, 1).sign(), 2 * x / width - 1
    turn[:, 1, 1], turn[:, 1, 2] = h / height, 2 * y / height - 1
    grid = F.affine_grid(turn, [b, 3, recipe.size, recipe.size], align_corners=False)
    crops = F.grid_sample(posters.float(), grid, padding_mode="reflection", align_corners=False)
    for axes in ((), (1, 2, 3), (1,)):  # away from black: brightness; from the mean: contrast; from grey: saturation
        centre = crops.mean(axes, keepdim=True) if axes else 0.0
        crops = centre + (crops - centre) * draw(1 - recipe.jitter, 1 + recipe.jitter, 1, 1, 1)
    return crops.clamp(0, 255)


@torch.no_grad()
def look(tower: Any, pixels: Tensor) -> Tensor:
    """The tower's pooled output on pictures, in eval mode: (N, 3, S, S) uint8 -> (N, V)."""
    tower.eval()
    found = [tower(normalise(part)) for part in pixels.split(256)]
    return torch.cat([f[0] if isinstance(f, tuple) else f for f in found])


# -- what it has learned ---------------------------------------------------------------------------------------------


def retrieval(pictures: Tensor, words: Tensor) -> dict[str, float]:
    """How near to its picture a film's own words are, by cosine among all words: (N, V), (N, V) -> shares of films
    found among the first k (``recall@k``, by chance k / N) and the geometric mean of their ``rank`` (by chance about
    N / e). A tie counts against the film."""
    near = F.normalize(pictures, dim=-1) @ F.normalize(words, dim=-1).T
    rank = (near >= near.diagonal()[:, None]).sum(1).clamp(min=1).double()
    n = len(rank)
    found = {f"recall@{k}": float((rank <= k).double().mean()) for k in KS}
    by_chance = float(torch.arange(1, n + 1).double().log().mean().exp())
    chance = {f"chance@{k}": min(k / n, 1.0) for k in KS}
    return {**found, **chance, "rank": float(rank.log().mean().exp()), "rank_by_chance": by_chance, "films": n}


def probe(table: np.ndarray, labels: np.ndarray, *, fit: np.ndarray, choose: np.ndarray, test: np.ndarray) -> float:
    """Macro mean average precision on ``test`` of a ridge regression from standardised features (N, V) to labels (N, G)
    bool, fitted on ``fit``; its penalty is the best of five on ``choose``. The three are masks (N,) bool."""
    rows = table[fit].astype(np.float64)
    x = (table - rows.mean(0)) / np.maximum(rows.std(0), 1e-6)
    y = labels - labels[fit].mean(0)
    gram, cross = x[fit].T @ x[fit], x[fit].T @ y[fit]
    scores = [x @ np.linalg.solve(gram + p * fit.sum() * np.eye(len(gram)), cross) for p in (1e-2, 1e-1, 1, 10, 100)]
    best = max(scores, key=lambda s: _precision(s[choose], labels[choose]))
    return _precision(best[test], labels[test])


def _precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over labels of average precision: (N, G), (N, G) -> ()."""
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(labels, order, axis=0)
    at = np.cumsum(hits, axis=0) / np.arange(1, len(hits) + 1)[:, None]
    some = hits.sum(0) > 0
    return float(((at * hits).sum(0)[some] / hits.sum(0)[some]).mean())


def genres(catalog: Catalog, *, support: float = 0.01) -> np.ndarray:
    """The genres that at least that share of the films has, read from the head of MovieLens' text: (N, G) bool."""
    lists = [set(f["text"].partition(". ")[0].split(", ")) for f in catalog.words()]
    names = sorted({name for one in lists for name in one})
    table = np.array([[name in one for name in names] for one in lists])
    return table[:, table.mean(0) >= support]


def measure(folder: Path, split: Split) -> RunCard:
    """Measure a finished tower on the *cold* films of ``split``, which it never saw; its card grows by that.

    ``cold``: ``retrieval`` of their words. ``probe``: genres told from frozen features, mean average precision on cold
    films, fitted on warm ones, beside the shipped tower's, a colour histogram's and random features. Choices are made
    on warm films kept aside; nothing here chooses.
    """
    card = RunCard.load(folder / "card.json")
    seed = int(card.seed or 0)
    tower, nano = load_vision(str(folder)), load_vision(str(shipped("adapters/nano-base") / "clip"))
    cold, warm = (with_both(split.catalog, mask) for mask in (~split.warm_items, split.warm_items))
    both = warm.joined(cold)
    test = np.arange(len(both)) >= len(warm)
    seen = look(tower.model, torch.from_numpy(both.pixels(tower.size).copy()))
    words = read(load_language(card.settings["language"]), cold)
    held = np.append(set_aside(len(warm), card.settings["aside"], seed=seed), np.zeros(len(cold), dtype=bool))
    tables = {
        "tower": seen.numpy(),
        "nano": look(nano.model, torch.from_numpy(both.pixels(nano.size).copy())).numpy(),
        "histogram": describe(both)["image"][0],
        "random": generator(seed, "random features").normal(size=(len(both), 64)),
    }
    masks = {"fit": ~test & ~held, "choose": held, "test": test}
    card.metrics["cold"] = retrieval(seen[test], words)
    card.metrics["probe"] = {name: probe(table, genres(both), **masks) for name, table in tables.items()}
    card.save(folder / "card.json")
    return card


def main(arguments: Sequence[str] | None = None) -> RunCard:
    """The command: train and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="cold_items", choices=sorted(splits.SPLITS))
    parser.add_argument(
        "--also", nargs="*", default=[], choices=sorted(splits.SPLITS), help="leave out their new films"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the splits, the weights and the batches")
    parser.add_argument("--path", type=Path, help="the dataset's folder; otherwise found under MMLLMREC_DATA")
    parser.add_argument("--more", action="store_true", help="also train on films too rare to be in the split at all")
    asked = parser.parse_args(arguments)
    data = load_dataset("movielens-small", asked.path, bad_rows="drop")
    more = load_dataset("movielens-small", asked.path, bad_rows="drop", min_events=1).catalog if asked.more else None
    split, *also = (splits.by_name(name, data, seed=asked.seed) for name in (asked.split, *asked.also))
    card = pretrain(asked.folder, split, also=also, more=more, seed=asked.seed)
    # where it was written and read says nothing of how it was made
    made = f"python -m mmllmrec.training.posters FOLDER --split {asked.split} --seed {asked.seed}"
    made += f" --also {' '.join(asked.also)}" if asked.also else ""
    card.settings["command"] = made + (" --more" if asked.more else "")
    card.save(asked.folder / "card.json")
    return measure(asked.folder, split)


if __name__ == "__main__":
    print(json.dumps(main().as_dict(), indent=1))
