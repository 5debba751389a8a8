"""A folder of one's own: both file formats, its options, every way it can be wrong, and the command line on it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmllmrec as mm
from mmllmrec.cli import app
from mmllmrec.data.interactions import DataError

U, N = 7, 11
EVENTS, ITEMS = "interactions.csv", "items.csv"


@pytest.fixture
def shop(tmp_path):
    """Seven users, the last without a training event, and eleven items, of which two have a picture and two no text."""
    folder = tmp_path / "shop"
    (folder / "images" / "more").mkdir(parents=True)
    (folder / "features").mkdir()
    part = ["train", "train", "train", "valid", "test"]
    events = [
        (f"u{u}", f"i{(u * 3 + k) % N}", 100 + 10 * u + k, part[max(k, 3 * (u == 6))])
        for u in range(U)
        for k in range(5)
    ]
    pd.DataFrame(events, columns=["user_id", "item_id", "timestamp", "split"]).to_csv(folder / EVENTS, index=False)
    rows = [(f"i{i}", f"Chair {i}", "" if i in (3, 4) else f"a seat of kind {i}", "oak", "") for i in range(N)]
    items = pd.DataFrame(rows, columns=["item_id", "title", "text", "wood", "image"])
    items.loc[2, "image"], items.loc[5, "image"] = "i2.jpg", "more/five.png"
    items.to_csv(folder / ITEMS, index=False)
    Image.effect_noise((40, 30), 50).convert("RGB").save(folder / "images" / "i2.jpg")
    Image.new("RGB", (20, 30), "teal").save(folder / "images" / "more" / "five.png")
    np.save(folder / "features" / "vggish.npy", np.random.default_rng(0).normal(size=(N, 3)))
    return folder


def load(folder, **options):
    return mm.load_dataset("folder", path=folder, **options)


def change(path, **cells):
    """Set the cell of a CSV's row, as change(path, image=(2, "x.jpg")); a None for the row drops the column."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column, (row, value) in cells.items():
        if row is None:
            frame = frame.drop(columns=column)
        else:
            frame.loc[row, column] = value
    frame.to_csv(path, index=False)


def as_parquet(folder, ids=str):
    """The same folder with .parquet tables, item_id saved as the index, ids as text or as integers."""
    for path in (folder / EVENTS, folder / ITEMS):
        frame = pd.read_csv(path)
        for column in {"user_id", "item_id"} & set(frame.columns):
            frame[column] = frame[column] if ids is str else frame[column].str[1:].astype(ids)
        frame.set_index("item_id").to_parquet(path.with_suffix(".parquet"))
        path.unlink()
    return folder


# -- what is read ----------------------------------------------------------------------------------------------------


def test_the_layout_in_csv(shop):
    data = load(shop)
    x, catalog = data.interactions, data.catalog
    assert data.name == "shop" and (x.n_users, x.n_items, len(x)) == (U, N, 5 * U)
    assert catalog.modalities == ("image", "text", "vggish") and catalog.titles[3] == "Chair 3"
    assert np.flatnonzero(catalog.present("image")).tolist() == [2, 5]
    assert np.flatnonzero(~catalog.present("text")).tolist() == [3, 4]
    assert catalog.image(2).size == (40, 30) and catalog.image(5).getpixel((0, 0)) == (0, 128, 128)
    np.testing.assert_allclose(catalog.signal("vggish"), np.load(shop / "features" / "vggish.npy"), rtol=1e-6)
    assert x.times.tolist() == [100 + 10 * u + k for u in range(U) for k in range(5)]
    split = mm.splits.given(data)
    assert (len(split.train), len(split.valid), len(split.open_test())) == (18, 10, 7)
    assert split.cold_users.tolist() == [False] * 6 + [True]


def test_the_layout_in_parquet_is_the_same_data(shop, tmp_path):
    csv = load(shop)
    other = load(as_parquet(shutil.copytree(shop, tmp_path / "elsewhere")))
    # and no hash knows the name of a folder or where it is
    assert other.interactions.hash == csv.interactions.hash and other.catalog.hash == csv.catalog.hash
    assert mm.splits.given(other).hash == mm.splits.given(csv).hash


def test_integer_ids_and_parts(shop):
    by_name = load(shop).parts.tolist()
    frame = pd.read_csv(shop / EVENTS)
    frame["split"] = frame["split"].map({"train": 0, "valid": 1, "test": 2})
    frame.to_csv(shop / EVENTS, index=False)
    assert load(shop).parts.tolist() == by_name
    data = load(as_parquet(shop, ids=int))
    assert data.parts.tolist() == by_name and data.interactions.item_ids.ids == [str(i) for i in range(N)]


def test_only_ids_are_needed(shop):
    for path, columns in ((shop / EVENTS, ["user_id", "item_id"]), (shop / ITEMS, ["item_id"])):
        pd.read_csv(path)[columns].to_csv(path, index=False)
    shutil.rmtree(shop / "images")
    shutil.rmtree(shop / "features")
    data = load(shop)
    assert data.catalog.modalities == () and data.parts is None and data.interactions.times is None
    assert data.catalog.titles[3] == "i3"


def test_pictures_are_found_by_item_id_where_no_column_names_them(shop):
    change(shop / ITEMS, image=(None, None))
    Image.new("RGB", (3, 5)).save(shop / "images" / "i7.PNG")
    Image.new("RGB", (3, 5)).save(shop / "images" / "i2.webp")  # i2.jpg comes first
    catalog = load(shop).catalog
    assert np.flatnonzero(catalog.present("image")).tolist() == [2, 7] and catalog.image(2).size == (40, 30)


def test_cells_of_csv_are_read_as_written(shop):
    """007 is not 7, NA is a title, and a byte order mark is no part of a column's name."""
    text = (shop / ITEMS).read_text().replace("i7,Chair 7", "007,NA")
    (shop / ITEMS).write_text("\ufeff" + text)
    (shop / EVENTS).write_text((shop / EVENTS).read_text().replace("i7,", "007,"))
    data = load(shop)
    assert data.interactions.item_ids[7] == "007" and data.catalog.titles[7] == "NA"


def test_text_columns_are_joined_to_the_text(shop):
    words = load(shop, text_columns=("wood",)).catalog.words()
    assert words[1]["text"] == "a seat of kind 1. oak" and words[3]["text"] == "oak"
    assert load(shop, text_columns="wood").catalog.words() == words
    with pytest.raises(DataError, match=r"items\.csv: column 'metal' is missing"):
        load(shop, text_columns=("metal",))


def test_the_earliest_of_a_pair_is_kept_with_its_part(shop):
    with (shop / EVENTS).open("a") as file:
        file.write("u0,i1,7,test\nu6,i0,900,train\n")  # earlier than row 1, and later than a row of u6
    with pytest.raises(DataError, match=r"interactions\.csv: rows 1 and 35: user 'u0' takes item 'i1' twice.*'first'"):
        load(shop)
    data = load(shop, duplicates="first")
    x = data.interactions
    assert len(x) == 5 * U and len(data.parts) == 5 * U
    found = {
        (x.user_ids[u], x.item_ids[i]): (t, p) for u, i, t, p in zip(x.users, x.items, x.times, data.parts, strict=True)
    }
    assert found["u0", "i1"] == (7, 2)
    assert found["u6", "i0"] == (164, 2) and found["u0", "i0"] == (100, 0)
    with pytest.raises(DataError, match="duplicates='last'"):
        load(shop, duplicates="last")


def test_errors_name_the_rows_of_the_file_when_pairs_repeat(shop):
    with (shop / EVENTS).open("a") as file:
        file.write("u0,i1,7,test\nu0,i99,8,test\n")
    with pytest.raises(DataError, match="row 36: unknown item id 'i99'"):
        load(shop, duplicates="first")


def test_a_k_core_takes_items_content_and_parts_along(shop):
    pd.read_csv(shop / EVENTS).sample(31, random_state=3).to_csv(shop / EVENTS, index=False)
    whole = load(shop)
    x = whole.interactions
    data = load(shop, min_events=3)
    y = data.interactions
    rows = pd.DataFrame({"u": x.users, "i": x.items, "p": whole.parts})
    while True:  # the naive form: one value leaves at a time
        rare = [(c, v) for c in ("u", "i") for v, n in rows[c].value_counts().items() if n < 3]
        if not rare:
            break
        rows = rows[rows[rare[0][0]] != rare[0][1]]
    assert 0 < len(rows) < len(x)
    assert [x.user_ids[u] for u in rows["u"]] == [y.user_ids[u] for u in y.users]
    assert [x.item_ids[i] for i in rows["i"]] == [y.item_ids[i] for i in y.items]
    assert rows["p"].tolist() == data.parts.tolist()
    old = x.item_ids.index(y.item_ids.ids)
    np.testing.assert_array_equal(data.catalog.signal("vggish"), whole.catalog.signal("vggish")[old])
    np.testing.assert_array_equal(data.catalog.presence, whole.catalog.presence[old])
    assert data.catalog.words() == [whole.catalog.words()[i] for i in old]
    with pytest.raises(DataError, match="no event is left with min_events=9"):
        load(shop, min_events=9)
    with pytest.raises(DataError, match="min_events=0"):
        load(shop, min_events=0)


# -- what is refused -------------------------------------------------------------------------------------------------


def features(value):
    def damage(folder):
        table = np.load(folder / "features" / "vggish.npy")
        table[4, 1] = value
        np.save(folder / "features" / "vggish.npy", table)

    return damage


def link(folder, name, target):
    (folder / "images" / name).symlink_to(target)


def outside(folder):
    """A picture that is really there, one step too far up."""
    return shutil.copy(folder / "images" / "i2.jpg", folder / "secret.jpg")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / EVENTS).unlink(), r"shop: interactions\.csv \(or \.parquet\) is missing; pass path="),
        (
            lambda f: (f / "items.parquet").write_bytes(b""),
            r"shop: both items\.csv and items\.parquet are here; keep one",
        ),
        (lambda f: change(f / EVENTS, user_id=(None, None)), r"interactions\.csv: column 'user_id' is missing; it has"),
        (lambda f: change(f / ITEMS, item_id=(None, None)), r"items\.csv: column 'item_id' is missing; it has"),
        (lambda f: change(f / EVENTS, item_id=(4, "i99")), r"interactions\.csv: row 4: unknown item id 'i99'"),
        (lambda f: change(f / EVENTS, user_id=(6, "")), r"interactions\.csv, row 6: column 'user_id' is empty"),
        (lambda f: change(f / ITEMS, item_id=(6, "")), r"items\.csv, row 6: column 'item_id' is empty"),
        (lambda f: change(f / ITEMS, item_id=(6, "i2")), r"items\.csv, row 6: item_id 'i2' appears twice; keep one"),
        (
            lambda f: change(f / EVENTS, timestamp=(3, "noon")),
            r"interactions\.csv, row 3: timestamp is 'noon', not sec",
        ),
        (
            lambda f: change(f / EVENTS, timestamp=(3, "-1")),
            r"interactions\.csv, row 3: timestamp is '-1', not seconds",
        ),
        (
            lambda f: change(f / EVENTS, split=(5, "dev")),
            r"interactions\.csv, row 5: split 'dev'; use train, valid, te",
        ),
        (lambda f: change(f / EVENTS, split=(5, "")), r"interactions\.csv, row 5: split nan; use train, valid, test"),
        (lambda f: change(f / EVENTS, split=(5, "3")), r"interactions\.csv, row 5: split '3'; use train, valid, test"),
        (lambda f: (f / EVENTS).write_text("user_id,item_id\n"), r"interactions\.csv: no interactions"),
        (lambda f: (f / EVENTS).write_text(""), r"interactions\.csv is not a table"),
        (
            lambda f: (f / EVENTS).write_text("user_id,item_id\nu0,i1,9\n"),
            r"interactions\.csv: its rows have more cells",
        ),
        (
            lambda f: (f / ITEMS).write_bytes(b"item_id,title\ni0,Caf\xe9\n"),
            r"items\.csv, line 2: not UTF-8 \(byte 0xe9",
        ),
        (features(np.nan), r"vggish\.npy, row 4: NaN or infinite"),
        (features(-np.inf), r"vggish\.npy, row 4: NaN or infinite"),
        (features(1e300), r"vggish\.npy, row 4: NaN or infinite"),  # too large for float32
        (lambda f: np.save(f / "features" / "a.npy", np.ones((13, 2))), r"a\.npy: 13 rows for 11 items"),
        (
            lambda f: np.save(f / "features" / "text.npy", np.ones((N, 2))),
            r"text\.npy: the items have text of their own",
        ),
        (lambda f: np.save(f / "features" / "a.npy", np.array([{}] * N)), r"a\.npy: .*pickle is never loaded"),
        (lambda f: np.save(f / "features" / "a.npy", np.ones(N)), r"a\.npy: float64 of shape \(11,\)"),
        (lambda f: np.savez((f / "features" / "a.npy").open("wb"), np.ones((N, 2))), r"a\.npy: an archive of arrays"),
        (lambda f: (f / "features" / "a.npy").write_bytes(b""), r"a\.npy: not a plain array"),
        (lambda f: change(f / ITEMS, image=(3, "i3.jpg")), r"items\.csv, row 3: 'i3\.jpg' is not in .*images; correct"),
        (lambda f: change(f / ITEMS, image=(3, "more")), r"items\.csv, row 3: 'more' is not in"),
        (lambda f: change(f / ITEMS, image=(3, "x" * 999)), r"items\.csv, row 3: 'x+' is no name of a file"),
        (
            lambda f: (outside(f), change(f / ITEMS, image=(3, "../secret.jpg"))),
            r"row 3: '\.\./secret\.jpg' leads out of",
        ),
        (lambda f: change(f / ITEMS, image=(3, str(outside(f)))), r"items\.csv, row 3: '/.*secret\.jpg' leads out of"),
        (
            lambda f: (link(f, "l.jpg", outside(f)), change(f / ITEMS, image=(3, "l.jpg"))),
            r"items\.csv, row 3: 'l\.jpg' leads out of",
        ),
        (
            lambda f: (link(f, "up", f), outside(f), change(f / ITEMS, image=(3, "up/secret.jpg"))),
            r"items\.csv, row 3: 'up/secret\.jpg' leads out of",
        ),
        (
            lambda f: (link(f, "i3.png", outside(f)), change(f / ITEMS, image=(None, None))),
            r"items\.csv, row 3: 'i3\.png' leads out of",
        ),
    ],
)
def test_damaged_folders_are_refused(shop, damage, says):
    damage(shop)
    with pytest.raises(DataError, match=says):
        load(shop)


def test_damaged_parquet_is_refused(shop):
    as_parquet(shop)
    path = shop / "interactions.parquet"
    whole, frame = path.read_bytes(), pd.read_parquet(path).reset_index()
    for column, values, says in (
        ("item_id", np.arange(5.0 * U), r"interactions\.parquet: column 'item_id' holds float64; save ids"),
        ("item_id", [None, *frame["item_id"][1:]], r"interactions\.parquet, row 0: column 'item_id' is empty"),
        ("timestamp", pd.to_datetime(frame["timestamp"], unit="s"), r"interactions\.parquet: timestamp holds dates"),
    ):
        frame.assign(**{column: values}).to_parquet(path)
        with pytest.raises(DataError, match=says):
            load(shop)
    path.write_bytes(whole[:200])
    with pytest.raises(DataError, match=r"interactions\.parquet is not a readable Parquet file"):
        load(shop)


def test_a_folder_needs_a_path(shop, monkeypatch):
    for root in ("", str(shop.parent)):
        monkeypatch.setenv("MMLLMREC_DATA", root)
        with pytest.raises(
            DataError, match=r"'folder' is not here \(no path was given\): pass path=.*interactions\.csv"
        ):
            mm.load_dataset("folder")
    with pytest.raises(DataError, match=r"looked in .*nowhere"):
        load(shop.parent / "nowhere")
    with pytest.raises(DataError, match="unknown dataset"):
        mm.load_dataset(str(shop))


# -- what is done with it --------------------------------------------------------------------------------------------


def test_a_user_without_a_training_event_is_scored_ranked_and_served(shop):
    split = mm.splits.given(load(shop))
    assert split.cold_users[6] and split.data.interactions.user_ids[6] == "u6"
    popular = split.train.item_ids[int(split.train.item_counts.argmax())]
    for kind in ("ItemKNN", "EASE", "BPR", "LightGCN", "VBPR"):
        mm.seed_everything(0)
        extra = {"catalog": split.catalog} if kind == "VBPR" else {}
        model = getattr(mm.models, kind)(split.train, **extra)
        scores = model.score(np.array([6]))
        assert torch.isfinite(scores).all(), kind
        if not model.trainable:
            assert not scores.any()  # as their docstrings say
        report = mm.evaluate(model, split, on="test", ks=(5,))
        frame = report.frame
        cold = frame[(frame["system"] == kind) & (frame["row"] == "cold users")]
        assert len(cold) and np.isfinite(cold["mean"]).all() and (cold["users"] == 1).all(), kind
        found = mm.recommend(model, users=["u6", "u0"], k=1).frame.set_index("user_id")
        assert found["basis"].to_dict() == {"u6": "popularity", "u0": "history"}
        assert found["item_id"]["u6"] == popular


def call(*arguments, fails=False):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if fails:
        assert isinstance(result.exception, DataError), result.output
        return str(result.exception)
    assert result.exception is None, result.output
    return result.output


def test_info_and_check(shop):
    info = call("data", "info", "folder", "--path", shop)
    assert "shop" in info and "items with vggish" in info
    good = call("data", "check", "folder", "--path", shop)
    assert good == "shop: 35 events, 11 items, 2 pictures read: good\n"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "not a readable picture"),
        (lambda p: p.write_bytes(b""), "the file is empty"),
        (lambda p: Image.new("1", (10_000, 10_000)).save(p, "PNG"), "10000 x 10000 pixels is over"),
    ],
)
def test_check_names_a_broken_picture(shop, damage, says):
    damage(shop / "images" / "i2.jpg")
    message = call("data", "check", "folder", "--path", shop, fails=True)
    assert "i2.jpg: " in message and says in message


def test_a_model_finds_its_folder_again(shop, tmp_path):
    run = tmp_path / "run"
    call("train", "EASE", "--data", "folder", "--path", shop, "--split", "given", "--folder", run)
    card = json.loads((run / "card.json").read_text())
    assert card["data"] == "shop" and card["loaded"] == {"name": "folder", "path": str(shop.resolve()), "options": {}}
    assert "EASE" in call("evaluate", run)
    assert "Chair" in call("recommend", run, "u0", "-k", "1")
    moved = shop.rename(tmp_path / "moved")
    assert "looked in" in call("evaluate", run, fails=True)
    assert "Chair" in call("recommend", run, "u0", "-k", "1", "--path", moved)
    for arguments in ((), ("--data", "folder"), ("--split", "given")):
        assert "EASE" in call("evaluate", run, "--path", moved, *arguments)
    assert "trained on other events" in call("evaluate", run, "--path", moved, "--split", "leave_last", fails=True)
    change(moved / EVENTS, split=(0, "valid"))
    assert "trained on other events" in call("evaluate", run, "--path", moved, fails=True)


def test_a_card_keeps_the_options_and_a_path_only_where_one_was_given(shop, tmp_path, monkeypatch):
    pd.read_csv(shop / EVENTS).sample(31, random_state=3).to_csv(shop / EVENTS, index=False)
    data = load(shop, text_columns=("wood",), min_events=3)
    assert len(data.interactions) < 31
    run = mm.fit(mm.models.EASE((split := mm.splits.given(data)).train), split)
    run.card.save(tmp_path / "run" / "card.json")
    run.model.save_pretrained(tmp_path / "run" / "model")
    assert run.card.loaded["options"] == {"text_columns": ("wood",), "min_events": 3}
    assert "EASE" in call("evaluate", tmp_path / "run")  # of the same k-core, or its events would be others
    root = tmp_path / "root"
    (root / "lastfm-2k-audio").mkdir(parents=True)
    lines = [f"{u}\t{(u + k) % N}\t{(0, 0, 0, 1, 2)[k]}" for u in range(U) for k in range(5)]
    (root / "lastfm-2k-audio" / "x.inter").write_text("\n".join(["userID\titemID\tx_label", *lines]) + "\n")
    monkeypatch.setenv("MMLLMREC_DATA", str(root))
    assert mm.load_dataset("lastfm-2k").about["loaded"] == {"name": "lastfm-2k", "path": None, "options": {}}
    call("train", "ItemKNN", "--data", "lastfm-2k", "--split", "given", "--folder", tmp_path / "knn")
    assert "ItemKNN" in call("evaluate", tmp_path / "knn")  # by the reader's name, not by the folder's
