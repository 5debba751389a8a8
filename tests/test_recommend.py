"""recommend(): ids, masks, cold items, cold and unknown users, folders, classes of one's own, the grid."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.features.table import FeatureTable
from mmllmrec.models import TwoStage
from mmllmrec.models.base import Recommender
from mmllmrec.models.bpr import BPR
from mmllmrec.models.itemknn import ItemKNN
from mmllmrec.serving.recommend import COLUMNS, recommend

N_USERS, N_ITEMS = 7, 11


@pytest.fixture(scope="module")
def train() -> Interactions:
    """Users u0..u6 (u6 without an event) and items i0..i10 (i10 without one)."""
    rng = np.random.default_rng(0)
    u, i = np.nonzero(rng.random((N_USERS - 1, N_ITEMS - 1)) < 0.4)
    users = IdMap([f"u{n}" for n in range(N_USERS)], what="user id")
    return Interactions(u, i, None, users, IdMap([f"i{n}" for n in range(N_ITEMS)], what="item id"))


@pytest.fixture(scope="module")
def model(train: Interactions) -> BPR:
    torch.manual_seed(0)
    return BPR(train, dim=5)


def test_rows_are_the_naive_ranking(model, train):
    found = recommend(model, users=["u3", "u0"], k=4).frame
    assert list(found.columns) == COLUMNS and (found["basis"] == "history").all()
    for user in ("u3", "u0"):
        u = train.user_ids.index([user])
        scores = model.score(u)[0].numpy()
        taken = set(train.items[train.users == u[0]])
        ranked = [n for n in np.argsort(-scores) if n not in taken and train.item_counts[n]][:4]
        part = found[found["user_id"] == user]
        assert part["item_id"].tolist() == [f"i{n}" for n in ranked]
        assert part["rank"].tolist() == [1, 2, 3, 4]
        np.testing.assert_allclose(part["score"], scores[ranked], rtol=1e-6)
    assert found["user_id"].drop_duplicates().tolist() == ["u3", "u0"]  # the order asked for


def test_seen_items_come_back_only_when_asked_for(model, train):
    all_of = recommend(model, users="u0", k=N_ITEMS, exclude_seen=False).frame
    fewer = recommend(model, users="u0", k=N_ITEMS).frame
    taken = {f"i{n}" for n in train.items[train.users == 0]}
    assert set(all_of["item_id"]) - set(fewer["item_id"]) == taken


def test_a_cold_item_is_recommended_only_by_a_model_that_can_score_it(model, monkeypatch):
    def items():
        return set(recommend(model, users=["u1"], k=N_ITEMS, exclude_seen=False).frame["item_id"])

    assert "i10" not in items()
    monkeypatch.setattr(BPR, "supports_cold_items", True)
    assert "i10" in items()


def test_users_without_history_get_popular_items_and_it_says_so(model, train, monkeypatch):
    found = recommend(model, users=["stranger", "u6", "u1"], k=3).frame
    basis = found.drop_duplicates("user_id").set_index("user_id")["basis"]
    assert basis.to_dict() == {"stranger": "popularity", "u6": "popularity", "u1": "history"}
    popular = [f"i{n}" for n in np.argsort(-train.item_counts, kind="stable")[:3]]
    for user in ("stranger", "u6"):
        assert found[found["user_id"] == user]["item_id"].tolist() == popular
    monkeypatch.setattr(BPR, "supports_cold_users", True)
    assert recommend(model, users=["u6"], k=1).frame["basis"].tolist() == ["history"]
    with pytest.raises(DataError, match="unknown user id 'stranger'"):
        recommend(model, users=["u1", "stranger"], unknown="error")


def test_history_is_seen_and_scored_from(train):
    knn = ItemKNN(train, k=5)
    taken = train.items[train.users == 1]
    others = np.setdiff1d(np.flatnonzero(train.item_counts), [])[:2]
    history = Interactions(np.full(2, 6), others, None, train.user_ids, train.item_ids)
    found = recommend(knn, users=["u6"], k=N_ITEMS, history=history).frame
    assert (found["basis"] == "history").all()
    assert not set(found["item_id"]) & {f"i{n}" for n in others}
    assert len(taken)
    with pytest.raises(DataError, match="other id maps"):
        foreign = Interactions(np.zeros(1, int), np.zeros(1, int), None, IdMap(["x"]), IdMap(["y"]))
        recommend(knn, users=["u1"], history=foreign)


def test_among_and_exclude(model):
    found = recommend(
        model, users=["u2"], k=N_ITEMS, among=["i1", "i2", "i3"], exclude=["i2"], exclude_seen=False
    ).frame
    assert set(found["item_id"]) == {"i1", "i3"}
    with pytest.raises(DataError, match=r"among=.*unknown item id 'nowhere'"):
        recommend(model, users=["u2"], among=["i1", "nowhere"])
    with pytest.raises(DataError, match=r"exclude=.*unknown item id 'nowhere'"):
        recommend(model, users=["u2"], exclude=["nowhere"])
    with pytest.raises(DataError, match="exclude='i1'"):
        recommend(model, users=["u2"], exclude="i1")


@pytest.mark.parametrize("wrong", [{"k": 0}, {"unknown": "maybe"}])
def test_wrong_arguments(model, wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        recommend(model, users=["u1"], **wrong)


def test_a_saved_folder_recommends_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "bpr")
    again = recommend(tmp_path / "bpr", users=["u1", "u4"], k=5).frame
    assert again.equals(recommend(model, users=["u1", "u4"], k=5).frame)
    with pytest.raises(DataError, match="cannot recommend with a dict"):
        recommend({}, users=["u1"])


def test_a_class_of_ones_own_is_loaded_by_itself(train, tmp_path):
    class Bakery(BPR):
        def __init__(self, train, *, dim=5, sharpness=2.0):
            Recommender.__init__(self, train, dim=dim, sharpness=sharpness)
            self.users, self.items = torch.nn.Embedding(N_USERS, dim), torch.nn.Embedding(N_ITEMS, dim)

        def forward(self):
            return self.config["sharpness"] * self.users.weight, self.items.weight

    model = Bakery(train, sharpness=3.0)
    folder = model.save_pretrained(tmp_path / "bakery")
    again = Bakery.from_pretrained(folder)
    everyone = np.arange(N_USERS)
    assert type(again) is Bakery and torch.equal(again.score(everyone), model.score(everyone))
    for other in (Recommender, BPR):
        with pytest.raises(DataError, match=r"class 'Bakery' is not one of .*called on the class itself"):
            other.from_pretrained(folder)


def test_titles_and_pictures(model, train, capsys):
    picture = Image.new("RGB", (9, 5), (200, 30, 30))
    rows = {
        "item_id": train.item_ids.ids,
        "title": ["<b>bold</b>"] * N_ITEMS,
        "image": [picture] + [None] * (N_ITEMS - 1),
    }
    table = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {"item_id": datasets.Value("string"), "title": datasets.Value("string"), "image": datasets.Image()}
        ),
    ).cast_column("image", datasets.Image(decode=False))
    found = recommend(model, users=["u1"], k=N_ITEMS, exclude_seen=False, catalog=Catalog(table, train.item_ids))
    page = found._repr_html_()
    assert "&lt;b&gt;bold" in page and "<b>bold" not in page
    assert page.count("data:image/png;base64,") == 1 and page.count("background:#eee") == len(found) - 1
    found.show()
    assert "<b>bold</b>" in capsys.readouterr().out
    shorter = IdMap(train.item_ids.ids[::-1])
    with pytest.raises(DataError, match="not those the model was trained on"):
        recommend(model, users=["u1"], catalog=Catalog(datasets.Dataset.from_dict({"item_id": shorter.ids}), shorter))


def test_a_stranger_is_what_a_list_of_items_says(model, train, monkeypatch):
    """Scored from scratch: the history tower over the content of these items, and the biases."""
    table = FeatureTable({"a": np.random.default_rng(1).normal(size=(N_ITEMS, 5))}, np.ones((N_ITEMS, 1), bool))
    torch.manual_seed(0)
    reader = TwoStage(train, features=table, dim=8)
    took = ["i2", "i7"]
    read, content = [], reader.content
    monkeypatch.setattr(reader, "content", lambda index: (read.extend(index.tolist()), content(index))[1])
    found = recommend(reader, users="stranger", history=took, k=N_ITEMS).frame
    assert sorted(read) == list(range(N_ITEMS))  # the catalogue is encoded once
    assert (found["basis"] == "history").all() and len(found) == N_ITEMS - 2 and not found["item_id"].isin(took).any()
    rows = np.isin(np.arange(N_ITEMS), [2, 7])
    scores = (reader.users_from(rows[None]) @ reader.embed()[1].T)[0]
    expected = [f"i{n}" for n in (-scores).argsort().tolist() if n not in (2, 7)]
    assert found["item_id"].tolist() == expected
    other = recommend(reader, users="stranger", history=["i1"], k=3).frame
    assert other["item_id"].tolist() != expected[:3]
    with pytest.raises(DataError, match="cannot read a user from events alone"):
        recommend(model, users="stranger", history=took)
    with pytest.raises(DataError, match=r"history=, .*'i99'"):
        recommend(reader, users="stranger", history=["i99"])
    with pytest.raises(DataError, match="one user"):
        recommend(reader, users=["a", "b"], history=took)
