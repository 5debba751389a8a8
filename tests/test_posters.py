"""The tower trained on posters: it learns, resumes exactly, never opens a cold film, and is a tower like any other."""

import io
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mmllmrec.data import splits
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.features.towers import load_vision
from mmllmrec.runcard import RunCard
from mmllmrec.training import checkpoint, posters
from tests.towers import tiny_preset

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
NOUNS = ["lamp", "vase", "bowl"]
USERS, ITEMS = 61, 97
RECIPE = posters.Recipe(
    size=32, width=32, head_width=16, patch=8, layers=1, start="random", epochs=12, batch=16, lr=4e-3
)
BROKEN = b"\xff\xd8 a picture that cannot be opened"


def film(n: int, *, broken: bool) -> dict:
    """A poster of the film's colour, striped by its noun."""
    rng = np.random.default_rng(n)
    pixels = np.full((48, 32, 3), list(COLOURS.values())[n % 3], dtype=np.uint8)
    pixels[:: 2 + n // 3 % 3 * 3] = 255
    pixels = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": BROKEN if broken else buffer.getvalue(), "path": None}


def world(*, broken: bool = False) -> splits.Split:
    """Films whose words name what is on their posters; ``broken`` gives every cold film a picture that is none."""
    rng = np.random.default_rng(0)
    u, i = np.nonzero(rng.random((USERS, ITEMS)) < 0.2)
    ids = IdMap([f"m{n}" for n in range(ITEMS)], what="item id")
    events = Interactions(u, i, None, IdMap(range(USERS), what="user id"), ids)

    def catalog(bad: np.ndarray) -> Catalog:
        names = [f"{list(COLOURS)[n % 3]} {NOUNS[n // 3 % 3]}" for n in range(ITEMS)]
        rows = {
            "item_id": ids.ids,
            "title": names,
            "text": [f"{NOUNS[n // 3 % 3]}, {list(COLOURS)[n % 3]}. of {names[n]}" for n in range(ITEMS)],
            "image": [None if n == 2 else film(n, broken=bool(bad[n])) for n in range(ITEMS)],
        }
        string = datasets.Value("string")
        features = datasets.Features(item_id=string, title=string, text=string, image=datasets.Image(decode=False))
        return Catalog(datasets.Dataset.from_dict(rows, features=features), ids)

    none = np.zeros(ITEMS, dtype=bool)
    split = splits.cold_items(RecDataset("films", events, catalog(none)), seed=0)
    if broken:
        return splits.cold_items(RecDataset("films", events, catalog(~split.warm_items)), seed=0)
    return split


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return tiny_preset(folder).language


@pytest.fixture(scope="module")
def made(language, tmp_path_factory):
    folder = tmp_path_factory.mktemp("posters") / "seed0"
    split = world(broken=True)
    return folder, split, posters.pretrain(folder, split, recipe=RECIPE, language=language, progress=False)


def test_it_learns_without_opening_a_cold_film(made):
    _, split, card = made
    assert card.metrics["losses"][-1] < card.metrics["log_batch"] - 0.5 == math.log(16) - 0.5
    assert card.metrics["aside"]["rank"] < card.metrics["aside"]["rank_by_chance"]
    assert card.split["hash"] == split.hash and card.kind == "pretrain"
    cold = int(np.flatnonzero(~split.warm_items)[0])
    with pytest.raises(DataError, match="not a readable picture"):
        split.catalog.image(cold)  # so that any look at one would have ended the training


def test_cold_films_do_not_move_a_weight(made, language, tmp_path):
    other = posters.pretrain(tmp_path / "other", world(), recipe=RECIPE, language=language, progress=False)
    assert other.model["vision"] == made[2].model["vision"]


def test_resume_is_exact(made, language, tmp_path, monkeypatch):
    keep, calls = checkpoint.save, []

    def killed(*args, **kwargs):
        keep(*args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    split, folder = made[1], tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        posters.pretrain(folder, split, recipe=RECIPE, language=language, progress=False)
    with pytest.raises(DataError, match=r"no \.safetensors file"):
        load_vision(str(folder))
    with pytest.raises(DataError, match="other films or settings"):
        posters.pretrain(folder, split, recipe=replace(RECIPE, lr=1e-3), language=language, progress=False)
    resumed = posters.pretrain(folder, split, recipe=RECIPE, language=language, progress=False)
    assert len(calls) == RECIPE.epochs
    assert resumed.model["vision"] == made[2].model["vision"]
    assert resumed.metrics == made[2].metrics


def test_it_is_a_tower_like_any_other(made):
    folder, split, card = made
    vision = load_vision(str(folder))
    assert (vision.size, vision.token_width) == (32, 32) and vision.hash == card.model["vision"]
    warm = posters.with_both(split.catalog, split.warm_items)
    pooled, patches = vision.model((torch.from_numpy(warm.pixels(32)[:7].copy()).float() / 255 - 0.5) / 0.25)
    assert pooled.shape == (7, vision.pooled_width) and patches.shape == (7, 16, 32)
    assert torch.allclose(pooled, posters.look(vision.model, torch.from_numpy(warm.pixels(32)[:7].copy())), atol=1e-5)


def test_films_that_are_new_in_a_further_split_are_left_out_too(language, tmp_path):
    split = world()
    other = splits.cold_items(split.data, seed=1)
    card = posters.pretrain(tmp_path, split, also=[other], recipe=RECIPE, language=language, progress=False)
    both = posters.with_both(split.catalog, split.warm_items & other.warm_items)
    assert card.settings["films"] == both.hash and len(both) < len(posters.with_both(split.catalog, split.warm_items))
    assert card.settings["also"] == [{"name": "cold_items", "hash": other.hash}]


def test_measured_on_cold_films(language, tmp_path):
    split, folder = world(), tmp_path / "seed0"
    posters.pretrain(folder, split, recipe=RECIPE, language=language, progress=False)
    card = posters.measure(folder, split)
    assert RunCard.load(folder / "card.json").metrics == card.metrics
    cold = int((~split.warm_items & split.catalog.present("image")).sum())
    assert card.metrics["cold"]["films"] == cold and card.metrics["cold"]["chance@10"] == 10 / cold
    assert set(card.metrics["probe"]) == {"tower", "nano", "histogram", "random"}


def test_retrieval_and_precision_of_known_orders():
    words = torch.eye(7)
    found = posters.retrieval(words, words)
    assert (found["recall@1"], found["rank"], found["chance@1"]) == (1.0, 1.0, 1 / 7)
    assert posters.retrieval(torch.ones(7, 7), words)["rank"] == pytest.approx(7)  # all tied: no film is found
    swapped = posters.retrieval(words[[1, 0, 2, 3, 4, 5, 6]], words)
    assert swapped["recall@1"] == pytest.approx(5 / 7) and swapped["recall@10"] == 1.0
    labels = np.array([[1, 0], [0, 1], [1, 0]], dtype=bool)
    scores = np.array([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    assert posters._precision(scores, labels) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)


def test_crops_come_from_the_poster():
    tall = torch.zeros(11, 3, 48, 32, dtype=torch.uint8)
    tall[:, 0] = 200
    tall[:, 1] = torch.arange(48)[:, None] * 5  # green says the row that was looked at
    rng = torch.Generator().manual_seed(0)
    recipe = replace(RECIPE, jitter=0.0, crop=0.25)
    crops = posters.augment(tall, recipe, rng)
    assert crops.shape == (11, 3, 32, 32) and torch.allclose(crops[:, 0], torch.tensor(200.0), atol=1e-3)
    span = crops[:, 1].amax((1, 2)) - crops[:, 1].amin((1, 2))
    assert span.min() > 48 * 5 / 4 and span.max() < 48 * 5 * 0.8
    assert crops[:, 1].mean((1, 2)).std() > 5  # at other heights


@pytest.mark.parametrize(("change", "says"), [({"patch": 7}, "patch"), ({"start": "else"}, "start")])
def test_recipes_that_cannot_be(change, says):
    with pytest.raises(DataError, match=says):
        posters.build(replace(RECIPE, **change), 24)


def test_more_films_join_and_those_of_the_split_do_not(made, language, tmp_path):
    split = made[1]
    rows = split.catalog.dataset.to_dict()
    ids = [*rows["item_id"][:-3], "x1", "x2", "x3"]  # all known but three
    table = datasets.Dataset.from_dict({**rows, "item_id": ids}, features=split.catalog.dataset.features)
    # the three new ones have whole pictures; a cold one is still broken under its old name, and is left out
    pictures = [{"bytes": film(n, broken=n < ITEMS - 3)["bytes"], "path": None} for n in range(ITEMS)]
    table = table.remove_columns("image").add_column("image", pictures).cast(split.catalog.dataset.features)
    more = Catalog(table, IdMap(ids, what="item id"))
    recipe = replace(RECIPE, epochs=1)
    card = posters.pretrain(tmp_path / "more", split, more=more, recipe=recipe, language=language, progress=False)
    warm = int((split.warm_items & split.catalog.present("image")).sum())
    held = round(warm * 0.1)
    assert card.data == f"films: {warm - held + 3} films to train on, {held} aside" and card.settings["more"]
