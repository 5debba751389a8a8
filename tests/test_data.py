"""The data layer: what is refused at the door, and the algebra of splits and sampling."""

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st

from mmllmrec.data import sampling, splits
from mmllmrec.data.atelier import atelier
from mmllmrec.data.catalog import Catalog, open_picture
from mmllmrec.data.dataset import RecDataset, load_dataset
from mmllmrec.data.interactions import DataError, IdMap, Interactions


def dataset(events: int, users: int = 7, items: int = 11, seed: int = 0) -> RecDataset:
    rng = np.random.default_rng(seed)
    cells = rng.choice(users * items, size=events, replace=False)
    user_ids, item_ids = IdMap(range(users), what="user id"), IdMap(range(items), what="item id")
    x = Interactions(cells // items, cells % items, rng.integers(0, 50, events), user_ids, item_ids)
    catalog = Catalog(datasets.Dataset.from_dict({"item_id": item_ids.ids}), item_ids)
    return RecDataset("random", x, catalog)


def cells(x: Interactions) -> set[int]:
    return set((x.users * x.n_items + x.items).tolist())


@pytest.mark.parametrize("name", ["random_per_user", "leave_last", "temporal", "cold_items", "cold_users"])
@forall(events=st.integers(20, 70), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_parts_are_disjoint_and_their_union_is_the_input(name, events, seed):
    data = dataset(events, seed=seed)
    options = {} if name == "temporal" else {"seed": seed}
    try:
        split = splits.SPLITS[name](data, **options)
    except DataError as error:  # all events of a tiny world can fall in one second, or be held out
        assert "left to train on" in str(error)
        return
    again = splits.SPLITS[name](data, **options)
    parts = [cells(split.train), cells(split.valid), cells(split._test)]
    assert sum(map(len, parts)) == events and set.union(*parts) == cells(data.interactions)
    assert again.hash == split.hash
    if name == "cold_items":
        held = ~split.warm_items
        assert held.sum() >= 1 and not held[split.train.items].any()
    if name == "cold_users":
        assert not split.cold_users[split.train.users].any() and split.cold_users.any()
    if name == "temporal":
        for earlier, later in ((split.train, split.valid), (split.valid, split._test)):
            if len(earlier) and len(later):
                assert earlier.times.max() < later.times.min()
    if name == "leave_last":
        for user in np.unique(split._test.users):
            mine = split.train.times[split.train.users == user]
            assert split._test.times[split._test.users == user].max() >= mine.max()


def test_another_seed_is_another_split():
    data = dataset(60)
    assert splits.random_per_user(data, seed=0).hash != splits.random_per_user(data, seed=1).hash


def test_cold_items_are_stratified_by_popularity_and_halved():
    # item i has i + 1 events, so that the order of popularity has no ties
    items = np.repeat(np.arange(101), np.arange(1, 102))
    users = np.concatenate([np.arange(n) for n in range(1, 102)])
    item_ids = IdMap(range(101), what="item id")
    x = Interactions(users, items, None, IdMap(range(101), what="user id"), item_ids)
    data = RecDataset("stairs", x, Catalog(datasets.Dataset.from_dict({"item_id": item_ids.ids}), item_ids))
    split = splits.cold_items(data, fraction=0.2, seed=3)
    held = ~split.warm_items
    assert held.sum() in (20, 21)
    for quarter in np.array_split(held, 4):
        assert 4 <= quarter.sum() <= 6
    in_valid = np.unique(split.valid.items[held[split.valid.items]])
    in_test = np.unique(split._test.items[held[split._test.items]])
    assert not set(in_valid) & set(in_test) and abs(len(in_valid) - len(in_test)) <= 1


def test_test_part_is_sealed():
    split = splits.random_per_user(dataset(60))
    with pytest.raises(splits.SealedError, match="evaluate"):
        _ = split.test
    assert split.test_opened == 0
    split.open_test()
    assert split.test_opened == 1


def test_negatives_avoid_exactly_the_training_positives():
    train = dataset(50, seed=4).interactions
    drawn = sampling.sample_negatives(train, train.users, 40, rng=np.random.default_rng(0))
    known = cells(train)
    assert not known & set((train.users[:, None] * train.n_items + drawn).ravel().tolist())
    for user in range(train.n_users):  # every other item does come
        reach = set(drawn[train.users == user].ravel().tolist())
        assert len(reach) in (0, train.n_items - int(train.user_counts[user]))


def test_weighted_negatives_follow_their_weights():
    train = Interactions(np.zeros(1, int), np.zeros(1, int), None, IdMap([0]), IdMap(range(5)))
    weights = np.array([9.0, 1.0, 2.0, 0.0, 5.0])
    drawn = sampling.sample_negatives(
        train, np.zeros(1, int), 40_000, rng=np.random.default_rng(1), weights=weights, candidates=np.ones(5, bool)
    )
    share = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    np.testing.assert_allclose(share, np.array([0, 1, 2, 0, 5]) / 8, atol=0.01)


def test_user_who_took_everything_is_named():
    train = Interactions(np.zeros(3, int), np.arange(3), None, IdMap(["anna"]), IdMap(range(3)))
    with pytest.raises(DataError, match="anna"):
        sampling.sample_negatives(train, train.users, 1, rng=np.random.default_rng(0))


def test_epoch_is_a_permutation_of_the_events():
    train = dataset(53, seed=2).interactions
    batches = list(sampling.epoch(train, batch_size=8, negatives=2, rng=np.random.default_rng(0)))
    seen = np.concatenate([(b.users * train.n_items + b.items).numpy() for b in batches])
    assert sorted(seen.tolist()) == sorted(cells(train))
    assert all(b.negatives.shape == (len(b), 2) for b in batches)


def test_log_inclusion_is_the_chance_of_being_in_a_batch():
    counts, size, rng = np.array([50, 30, 15, 5]), 7, np.random.default_rng(0)
    draws = rng.choice(4, p=counts / counts.sum(), size=(40_000, size))
    share = np.array([(draws == i).any(axis=1).mean() for i in range(4)])
    np.testing.assert_allclose(np.exp(sampling.log_inclusion(counts, size)), share, atol=0.01)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"users": np.array([0, 9])}, "row 1: users has id 9"),
        ({"items": np.array([0, 0]), "users": np.array([1, 1])}, "rows 0 and 1: user '1' takes item '0' twice"),
        ({"times": np.array([3, -1])}, "row 1: negative time"),
        ({"times": np.array([3])}, "times has 1 rows"),
        ({"users": np.array([0.5, 1.0])}, "users must be integers"),
    ],
)
def test_bad_events_are_refused(change, says):
    good = {"users": np.array([0, 1]), "items": np.array([0, 1]), "times": None}
    with pytest.raises(DataError, match=says):
        Interactions(**(good | change), user_ids=IdMap(range(3)), item_ids=IdMap(range(3)))


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        ({"user_id": ["a"]}, "events.csv: column 'item_id' is missing"),
        ({"user_id": [], "item_id": []}, "events.csv: no interactions"),
        ({"user_id": ["a", None], "item_id": ["x", "y"]}, "events.csv, row 1: column 'user_id' is empty"),
        ({"user_id": ["a"], "item_id": ["z"]}, "events.csv: row 0: unknown item id 'z'"),
    ],
)
def test_bad_tables_are_refused(frame, says):
    with pytest.raises(DataError, match=says):
        Interactions.from_frame(
            pd.DataFrame(frame), time=None, item_ids=IdMap(["x", "y"], what="item id"), source="events.csv"
        )


def test_duplicate_item_id_and_earliest_of_a_pair():
    with pytest.raises(DataError, match="'b' appears twice"):
        IdMap(["a", "b", "b"], what="item id")
    frame = pd.DataFrame({"user_id": ["u", "u"], "item_id": ["x", "x"], "timestamp": [9, 4]})
    assert Interactions.from_frame(frame, duplicates="first").times.tolist() == [4]


def test_pictures_that_cannot_be_trusted(tmp_path):
    from PIL import Image

    good = tmp_path / "good.jpg"
    Image.new("RGB", (40, 30), "red").save(good)
    assert open_picture(good, what="good").size == (40, 30)
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:200])
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    for name, says in (("cut.jpg", "not a readable picture"), ("empty.jpg", "empty"), ("bomb.png", "shrink")):
        with pytest.raises(DataError, match=f"{name}: .*{says}"):
            open_picture(tmp_path / name, what=name)


def small_catalog() -> Catalog:
    ids = IdMap(["a", "b", "c", "d"], what="item id")
    rows = {"item_id": ids.ids, "title": ["A", "B", "C", "D"], "text": ["one", "", "three", "four"]}
    return Catalog(datasets.Dataset.from_dict(rows), ids, features={"vggish": np.eye(4, dtype=np.float32)})


def test_absent_is_absent_and_controls_do_what_they_say():
    catalog = small_catalog()
    assert catalog.modalities == ("text", "vggish")
    assert catalog.present("text").tolist() == [True, False, True, True]
    assert catalog.words()[1] == {"title": "", "text": ""}
    assert not catalog.without("text").present("text").any()
    shuffled = catalog.shuffled("text", seed=1)
    assert shuffled.present("text").tolist() == [True, False, True, True]
    texts = [w["text"] for w in shuffled.words()]
    assert sorted(texts) == ["", "four", "one", "three"] and texts[1] == ""
    assert len({catalog.hash, catalog.without("text").hash, catalog.shuffled("vggish", seed=0).hash}) == 3
    with pytest.raises(DataError, match="'smell' is not in this catalogue"):
        catalog.without("smell")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_numbers_name_their_row(bad):
    table = np.ones((4, 2), np.float32)
    table[2, 1] = bad
    with pytest.raises(DataError, match="'image', row 2"):
        Catalog(datasets.Dataset.from_dict({"item_id": ["a", "b", "c", "d"]}), IdMap("abcd"), features={"image": table})


def test_missing_dataset_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("MMLLMREC_DATA", raising=False)
    with pytest.raises(DataError, match=r"MMLLMREC_DATA is not set.*GroupLens"):
        load_dataset("movielens-small")
    with pytest.raises(DataError, match="unknown dataset 'nope'"):
        load_dataset("nope")


def test_cold_both_holds_out_items_and_users_at_once_and_keeps_a_users_events_together():
    data = atelier(n_items=211, n_users=101, n_events=3000, modalities=())
    split = splits.cold_both(data, fraction=0.2, users=0.1, seed=3)
    parts = (split.train, split.valid, split._test)
    cells = [set(zip(p.users.tolist(), p.items.tolist(), strict=True)) for p in parts]
    assert sum(map(len, cells)) == len(data.interactions) and not cells[0] & cells[1] and not cells[1] & cells[2]
    held = splits.cold_items(data, fraction=0.2, seed=3)
    assert (~split.warm_items[~held.warm_items]).all()  # the cold items are those of cold_items
    assert (~split.warm_items).sum() == pytest.approx(0.2 * 211, abs=3)
    cold = np.flatnonzero(split.cold_users)
    assert len(cold) == pytest.approx(0.1 * 101, abs=1)
    in_valid, in_test = split.valid.user_counts[cold] > 0, split._test.user_counts[cold] > 0
    assert (in_valid ^ in_test).all() and in_test.sum() == pytest.approx(len(cold) / 2, abs=1)
    assert splits.cold_both(data, seed=3).hash == split.hash != splits.cold_both(data, seed=4).hash
    with pytest.raises(DataError, match="users=0"):
        splits.cold_both(data, users=0)


def test_thinned_takes_one_modality_of_some_items_and_more_of_the_same_with_a_larger_share():
    catalog = atelier(n_items=101, n_users=31, n_events=600, size=8).catalog
    before = catalog.presence
    some, most = catalog.thinned(0.3, seed=1).presence, catalog.thinned(0.8, seed=1).presence
    assert np.array_equal(catalog.thinned(0.0, seed=1).presence, before)
    lost = (before & ~some).sum(1)
    assert not (some & ~before).any() and set(lost.tolist()) == {0, 1} and lost.sum() == 30
    assert not (most & ~some).any() and (before & ~most).sum() == 81
    assert (before & ~most).any(0).all()  # every modality is lost by some item
    assert not np.array_equal(catalog.thinned(0.3, seed=2).presence, some)
    with pytest.raises(DataError, match=r"share=1\.5"):
        catalog.thinned(1.5, seed=0)


def test_noised_content_is_there_and_hard_to_perceive():
    catalog = atelier(n_items=101, n_users=31, n_events=600, size=8).catalog
    for modality in catalog.modalities:
        noised = catalog.noised(modality, seed=1)
        assert np.array_equal(noised.presence, catalog.presence)
        assert noised.hash == catalog.noised(modality, seed=1).hash != catalog.hash
        assert noised.hash != catalog.noised(modality, seed=2).hash
    here = catalog.present("sensor")
    added = (catalog.noised("sensor", seed=1).signal("sensor") - catalog.signal("sensor"))[here]
    assert added.std(0) == pytest.approx(catalog.signal("sensor")[here].std(0), rel=0.5)
    assert not catalog.noised("sensor", seed=1).signal("sensor")[~here].any()
    sound = catalog.signal("audio")[catalog.present("audio")]
    added = (catalog.noised("audio", seed=1).signal("audio") - catalog.signal("audio"))[catalog.present("audio")]
    assert added.std() == pytest.approx(sound.std(), rel=0.05)
    noised, shown = catalog.noised("image", seed=1), catalog.present("image")
    moved = noised.pixels(8)[shown].astype(float) - catalog.pixels(8)[shown]
    assert 0.3 < moved.std() / catalog.pixels(8)[shown].astype(float).std() <= 1.1  # clipped
    assert not noised.pixels(8)[~shown].any() and noised.picture(int(np.flatnonzero(shown)[0])).startswith(b"\x89PNG")
    for old, new in zip(catalog.words(), catalog.noised("text", seed=1).words(), strict=True):
        words, left = old["text"].split(), new["text"].split()
        assert len(left) == len(words) - len(words) // 2
        rest = iter(words)
        assert all(word in rest for word in left)  # in their order
    with pytest.raises(DataError, match="cannot be joined"):
        noised.joined(catalog)


def test_channels_go_missing_an_item_and_stay_gone():
    catalog = atelier(n_items=53, n_users=31, n_events=600, size=8).catalog
    here = catalog.present("sensor")
    half, most = (catalog.without_channels("sensor", s, seed=1).signal("sensor") for s in (0.5, 0.75))
    assert (np.isnan(half[here]).sum(1) == 8).all() and (np.isnan(most[here]).sum(1) == 12).all()
    assert not np.isnan(half[~here]).any() and not (np.isnan(half) & ~np.isnan(most)).any()
    kept = ~np.isnan(half)
    assert np.array_equal(half[kept], catalog.signal("sensor")[kept])
    assert len({row.tobytes() for row in np.isnan(half[here])}) > 20  # drawn an item
    with pytest.raises(DataError, match="only a raw 'sensor'"):
        catalog.without_channels("audio", 0.5, seed=0)


def test_a_changed_modality_leaves_the_others_pictures_as_they_are():
    catalog = atelier(n_items=23, n_users=11, n_events=100, size=8).catalog
    whole = catalog.pixels(8)
    assert catalog.noised("text", seed=0).pixels(8) is whole  # not decoded again
    for other in (catalog.without("image"), catalog.shuffled("image", seed=0), catalog.noised("image", seed=0)):
        assert not np.array_equal(other.pixels(8), whole)
    assert np.array_equal(
        catalog.thinned(1.0, seed=0).pixels(8).any((1, 2, 3)), catalog.thinned(1.0, seed=0).present("image")
    )
